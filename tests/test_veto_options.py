"""Options of a veto: a fallback policy, gradient steps, budget, cooldown, and what is let through by chance."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.vec_env import DummyVecEnv
from test_veto import ACTIONS, RUIN, make_risks, nought, once, steps
from wrapping import Toy, assert_same, batch, make_model, make_qa, run_single, run_vec, toys

from sb3_qa import QAError, QuestionAnswerer
from sb3_qa.policies import qa_policy
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction, VetoAction, vector
from sb3_qa.wrappers.restraint import Restraint
from sb3_qa.wrappers.substitutes import refined


@pytest.fixture(scope="module")
def risks():
    return make_risks([0.9, 0.2, 0.1], preferences=[2.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def qa():
    return make_qa()


class Always:
    """A policy with one action, that notes what it is asked."""

    def __init__(self, action, **spaces_):
        self.action = action
        self.asked = []
        self.__dict__.update(spaces_)

    def predict(self, observation, *, deterministic):
        assert deterministic
        self.asked.append(np.array(observation))
        return np.stack([np.asarray(self.action)] * len(observation)), None


class TestFallback:
    def test_its_action_is_executed(self, risks):
        other = Always(1)
        info = once(VetoAction(Toy(), "ruin", 0.5, on_veto=other, qa=risks), 0)
        assert info["qa/executed_action"] == 1
        assert info["qa/vetoed"] is True
        assert info["qa/substitute_catastrophe"] is False

    def test_even_if_it_is_judged_catastrophic_itself(self, risks):
        """As in Recovery RL; and told."""
        info = once(VetoAction(Toy(), "ruin", 0.15, on_veto=Always(1), qa=risks), 0)
        assert info["qa/executed_action"] == 1
        assert info["qa/substitute_catastrophe"] is True
        assert info["qa/ruin"] == pytest.approx(0.2, rel=1e-5)

    def test_asked_only_of_flagged_states(self, qa):
        other = Always(2)
        env = VecVetoAction(toys(3), "crash[k=3]", 0.5, on_veto=other, qa=qa)
        flagged = [m.before for ms in run_vec(env, ACTIONS) for m in steps(ms) if m.told["qa/catastrophe"]]
        asked = np.concatenate(other.asked)
        assert 20 < len(asked) == len(flagged) < 120
        assert {obs.tobytes() for obs in asked} == {obs.tobytes() for obs in flagged}

    def test_a_model_and_its_policy(self, qa):
        """Deterministic actions of an SB3 model."""
        model = PPO("MlpPolicy", toys(), seed=3, device="cpu")
        runs = [
            run_vec(VecVetoAction(toys(2), "crash[k=3]", 0.5, on_veto=other, qa=qa), ACTIONS[:, :2])
            for other in (model, model.policy)
        ]
        n = 0
        for moment in [m for ms in runs[0] for m in steps(ms)]:
            expected = int(moment.action)
            if moment.told["qa/catastrophe"]:
                expected = int(model.predict(batch(moment.before), deterministic=True)[0][0])
                n += 1
            assert moment.info["did"] == expected
        assert n > 10
        for a, b in zip(*runs, strict=True):
            assert_same(a, b)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (Always(0, observation_space=spaces.Box(-1, 1, (5,))), r"fallback policy \(on_veto\) sees Box"),
            (Always(0, action_space=spaces.Discrete(4)), r"fallback policy's \(on_veto\) is Discrete\(4\)"),
            (Always(0, lstm_actor=None), "recurrent fallback policy"),
            (PPO, "or a model with predict"),
        ],
    )
    def test_refused(self, qa, other, message):
        for form, env in ((VetoAction, Toy()), (VecVetoAction, toys())):
            with pytest.raises(QAError, match=message):
                form(env, "crash[k=3]", 0.5, on_veto=other, qa=qa)

    def test_a_model_is_not_asked_where_nothing_is_known(self):
        """It would refuse all observations for one; there the proposal stays."""
        space = spaces.Box(-1, 2, (2,), np.float32)
        model = PPO("MlpPolicy", toys(action_space=space), seed=3, device="cpu")
        env = VecVetoAction(
            toys(3, action_space=space), "crash[k=3]", 0.0, on_veto=model, qa=make_qa(action_space=space)
        )
        obs = env.reset()
        expected = model.predict(obs, deterministic=True)[0]
        obs[1, 0] = np.nan
        env.rule.obs = obs
        proposed = np.full((3, 2), 0.5, np.float32)
        with np.errstate(invalid="ignore"):
            infos = env.step(proposed)[3]
        expected[1] = 0.5
        np.testing.assert_array_equal([info["did"] for info in infos], expected)
        assert [info["qa/vetoed"] for info in infos] == [True, False, True]

    @pytest.mark.parametrize("given", [-1, 3, 1.5, np.nan])
    def test_what_is_no_action(self, risks, given):
        env = VetoAction(Toy(), "ruin", 0.5, on_veto=Always(given), qa=risks)
        env.reset(seed=0)
        with pytest.raises(QAError, match=r"fallback policy gave .*; expected an action of Discrete\(3\)"):
            env.step(0)

    def test_actions_of_another_shape(self, risks):
        env = VetoAction(Toy(), "ruin", 0.5, on_veto=Always([1, 2]), qa=risks)
        env.reset(seed=0)
        with pytest.raises(QAError, match=r"fallback policy gave actions of shape \(1, 2\); expected \(1,\)"):
            env.step(0)


class TestNoSafeAction:
    @pytest.mark.parametrize("on_veto", ["safest", "policy", nought, Always(2)])
    @pytest.mark.parametrize("shadow", [False, True])
    @pytest.mark.parametrize(("threshold", "unsafe"), [(0.05, True), (0.1001, False), (0.15, False)])
    def test_when_all_are_above_the_threshold(self, risks, on_veto, shadow, threshold, unsafe):
        env = VetoAction(Toy(), "ruin", threshold, on_veto=on_veto, shadow=shadow, qa=risks)
        assert env.reset(seed=0)[1]["qa/no_safe_action"] is False
        assert env.step(0)[4]["qa/no_safe_action"] is unsafe

    def test_against_asking_about_each(self, qa):
        found = {True: 0, False: 0}
        for moment in [
            m for ms in run_vec(VecVetoAction(toys(3), "crash[k=3]", 0.3, qa=qa), ACTIONS) for m in steps(ms)
        ]:
            unsafe = bool((qa.ask("crash[k=3]", batch(moment.before)).probability >= 0.3).all())
            assert moment.told["qa/no_safe_action"] is unsafe
            found[unsafe] += 1
        assert min(found.values()) > 10

    def test_nothing_is_known(self, risks):
        env = VetoAction(Toy(), "ruin", 1.0, qa=risks)
        env.reset(seed=0)
        env.rule.risk = lambda actions: np.full((1, 3), np.nan, np.float32)
        assert env.step(0)[4]["qa/no_safe_action"] is True

    def test_a_question_about_the_state(self, qa):
        """No action is safer than another there."""
        for moment in steps(run_single(VetoAction(Toy(), "danger", 0.5, on_veto=nought, qa=qa), ACTIONS[:, 0])):
            assert moment.told["qa/no_safe_action"] is moment.told["qa/catastrophe"]

    def test_what_the_environment_forbids_is_no_way_out(self, risks):
        """As MaskablePPO asks: the safe actions are masked by the environment itself."""
        env = VecVetoAction(toys(1), "ruin", 0.5, qa=risks)
        env.reset()
        only_first = np.array([[True, False, False]])
        assert env.rule.masks(only_first).tolist() == only_first.tolist()
        info = env.step(np.array([0]))[3][0]
        assert info["qa/no_safe_action"] is True
        assert info["did"] == info["qa/executed_action"] == 0
        info = env.step(np.array([0]))[3][0]  # a step later nobody asked, and all are possible
        assert info["qa/no_safe_action"] is False
        assert info["did"] == 2

    def test_what_the_environment_allows_is_all_there_is_where_nothing_is_known(self, qa):
        env = VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=qa)
        env.reset()
        env.rule.risk = lambda actions: np.array([[np.nan] * 3, [np.nan, 0.9, 0.8]], np.float32)
        masks = env.rule.masks(np.array([[False, True, True], [True, True, False]]))
        assert masks.tolist() == [[False, True, True], [False, True, False]]


class TestRefine:
    """Gradient steps on the risk."""

    SPACE = spaces.Box(np.float32([-2, 0, 5]), np.float32([2, 10, 6]))

    @pytest.fixture(scope="class")
    @classmethod
    def qa(cls):
        return QuestionAnswerer.from_model(make_model(toys(action_space=cls.SPACE), questions=RUIN))

    def test_the_gradient_is_that_of_the_risk(self, qa):
        obs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
        here = qa.read(obs)
        half = ((self.SPACE.high - self.SPACE.low) / 2).astype(float)
        actions = np.random.default_rng(1).uniform(self.SPACE.low, self.SPACE.high, (6, 3))
        hazard, gradient = here.hazard_gradient("ruin", actions)
        np.testing.assert_allclose(1 - np.exp(-hazard), qa.ask("ruin", obs, actions).probability, rtol=1e-4)
        for part in range(3):
            moved = [actions + sign * 0.01 * half * np.eye(3)[part] for sign in (1, -1)]
            up, down = (here.hazard_gradient("ruin", each)[0] for each in moved)
            np.testing.assert_allclose((up - down) / 0.02, gradient[:, part], rtol=0.05, atol=1e-3)

    def test_never_a_higher_risk_and_never_outside(self, qa):
        obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        here = qa.read(obs)
        start = np.random.default_rng(1).uniform(self.SPACE.low, self.SPACE.high, (50, 3)).astype(np.float32)
        before = qa.ask("ruin", obs, start).probability
        last = before
        for n in (0, 1, 5, 20):
            better = refined(here, "ruin", start, self.SPACE, n)
            assert all(self.SPACE.contains(action) for action in better)
            risk = qa.ask("ruin", obs, better).probability
            assert (risk <= before + 1e-6).all()
            assert risk.mean() <= last.mean() + 1e-7
            last = risk
        assert (last < before - 0.05).mean() > 0.5
        np.testing.assert_array_equal(refined(here, "ruin", start, self.SPACE, 0), start)

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_lower_than_candidates_alone_at_as_many_candidates(self, qa, form, monkeypatch):
        monkeypatch.setattr("sb3_qa.wrappers.substitutes.CANDIDATES", 4)
        actions = np.random.default_rng(0).uniform(self.SPACE.low, self.SPACE.high, (40, 1, 3)).astype(np.float32)
        told = {}
        for refine in (0, 5):
            if form == "single":
                env = VetoAction(Toy(self.SPACE), "ruin", 0.0, refine=refine, qa=qa)
                moments = run_single(env, actions[:, 0])
            else:
                env = VecVetoAction(toys(action_space=self.SPACE), "ruin", 0.0, refine=refine, qa=qa)
                moments = run_vec(env, actions)[0]
            told[refine] = np.array([moment.told["qa/ruin"] for moment in steps(moments)])
        assert (told[5] <= told[0] + 1e-6).all()
        assert (told[5] < told[0] - 1e-3).mean() > 0.5
        assert told[5].mean() < 0.8 * told[0].mean()

    def test_the_policys_own_actions_alone(self):
        """Nothing is executed that the policy would hardly take, and nothing of a higher risk than what it proposed."""
        model = make_model(toys(action_space=self.SPACE), questions=RUIN)
        with torch.no_grad():
            model.policy.log_std.fill_(-3.0)
        qa, away = QuestionAnswerer.from_model(model), {}
        for candidates in ("all", "policy"):
            env = VecVetoAction(toys(1, action_space=self.SPACE), "ruin", 0.0, candidates=candidates, qa=qa)
            env.seed(0)
            proposed = model.predict(env.reset(), deterministic=True)[0]
            (info,) = env.step(proposed)[3]
            assert info["qa/ruin"] <= info["qa/risk"]
            away[candidates] = np.abs(info["qa/executed_action"] - proposed[0]).max()
        assert 0 < away["policy"] < 0.3 < away["all"]

    def test_without_gradient_steps_which_lead_away_from_them(self, qa):
        several = gym.vector.SyncVectorEnv([lambda: Toy(self.SPACE)])
        for form, env in (
            (VetoAction, Toy(self.SPACE)),
            (VecVetoAction, toys(action_space=self.SPACE)),
            (vector.VetoAction, several),
        ):
            refined_by = [
                form(env, "ruin", 0.0, qa=qa, **given).rule.refine
                for given in ({}, dict(candidates="policy"), dict(candidates="policy", refine=2))
            ]
            assert refined_by == [5, 0, 2]

    def test_a_policy_that_takes_one_action_has_none_to_compare(self):
        model = TD3(qa_policy(TD3), toys(action_space=self.SPACE), policy_kwargs=dict(questions=RUIN, net_arch=[8]))
        with pytest.raises(QAError, match='takes one action in each state.*candidates="all"'):
            VetoAction(Toy(self.SPACE), "ruin", 0.5, candidates="policy", qa=QuestionAnswerer.from_model(model))

    def test_what_is_not_finite_is_left_alone(self, qa):
        here = qa.read(np.full((2, 4), np.nan, np.float32))
        start = np.float32([[0, 5, 5.5]] * 2)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(refined(here, "ruin", start, self.SPACE, 5), start)


def play(env, action=0, n=12):
    """Steps of one long episode of the same action."""
    env.reset(seed=0)
    return [env.step(action)[4] for _ in range(n)]


class TestBudgetAndCooldown:
    def test_at_most_so_many_vetoes_an_episode(self, risks):
        env = VetoAction(Toy(length=6), "ruin", 0.5, budget=2, qa=risks)
        moments = run_single(env, [0] * 18)
        vetoed = [m.told["qa/vetoed"] for m in steps(moments)]
        assert vetoed == [True, True, False, False, False, False] * 3
        assert all(m.told["qa/catastrophe"] for m in steps(moments))
        assert [m.told["qa/veto_withheld"] for m in steps(moments)] == [not veto for veto in vetoed]
        assert [m.told["qa/vetoes_left"] for m in moments] == [2, 1, 0, 0, 0, 0, 0] * 3 + [2]

    def test_each_environment_has_its_own(self, risks):
        env = VecVetoAction(toys(2), "ruin", 0.5, budget=1, qa=risks)
        env.reset()
        executed = [[info["qa/executed_action"] for info in env.step(np.array(a))[3]] for a in ([0, 1], [0, 0], [0, 0])]
        assert executed == [[2, 1], [0, 2], [0, 0]]

    def test_no_other_veto_in_the_steps_after_one(self, risks):
        infos = play(VetoAction(Toy(length=99), "ruin", 0.5, cooldown=3, qa=risks))
        assert [info["qa/vetoed"] for info in infos] == [True, False, False, False] * 3
        assert all(info["qa/catastrophe"] for info in infos)
        assert [info["qa/veto_withheld"] for info in infos] == [False, True, True, True] * 3

    def test_a_reset_ends_a_cooldown(self, risks):
        env = VetoAction(Toy(length=2), "ruin", 0.5, cooldown=50, qa=risks)
        assert [m.told["qa/vetoed"] for m in steps(run_single(env, [0] * 6))] == [True, False] * 3
        env = VetoAction(Toy(length=99), "ruin", 0.5, cooldown=50, qa=risks)
        assert play(env, n=2)[1]["qa/vetoed"] is False
        assert play(env, n=1)[0]["qa/vetoed"] is True  # the episode was given up

    def test_binding_again_in_the_middle_of_an_episode_does_not_fill_the_budget(self, risks):
        env = VecVetoAction(toys(1), "ruin", 0.5, budget=1, qa=risks)
        env.reset()
        assert env.step(np.array([0]))[3][0]["qa/vetoed"] is True
        env.bind(risks)
        assert env.step(np.array([0]))[3][0]["qa/vetoed"] is False

    def test_masks_are_lifted_where_no_veto_would_be_carried_out(self, risks):
        env = VecVetoAction(toys(1), "ruin", 0.5, budget=1, qa=risks)
        env.reset()
        assert env.env_method("action_masks")[0].tolist() == [False, True, True]
        env.step(np.array([0]))
        assert env.env_method("action_masks")[0].all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(cooldown=-1), "cooldown=-1; expected a number of steps"),
            (dict(cooldown=True), "cooldown=True"),
            (dict(budget=1.5), "budget=1.5; expected a number of vetoes"),
            (dict(let_through=1.1), r"let_through=1.1; expected a probability in \[0, 1\]"),
            (dict(let_through=float("nan")), "let_through=nan"),
            (dict(refine=-1), "refine=-1; expected a number of gradient steps"),
            (dict(candidates="box"), 'candidates=\'box\'; expected "all" or "policy"'),
            (dict(candidates=["all"]), "candidates="),
            (dict(seed=-1), "seed=-1; expected a whole number, at least 0"),
            (dict(seed=None), "seed=None"),
        ],
    )
    def test_refused(self, qa, arguments, message):
        for form, env in ((VetoAction, Toy()), (VecVetoAction, toys())):
            with pytest.raises(QAError, match=message):
                form(env, "crash[k=3]", 0.5, qa=qa, **arguments)


class TestLetThrough:
    def test_so_many_and_told(self, risks):
        n, p = 3000, 0.2
        infos = play(VetoAction(Toy(length=n + 1), "ruin", 0.5, let_through=p, qa=risks), n=n)
        through = np.array([info["qa/let_through"] for info in infos])
        assert abs(through.sum() - p * n) < 4 * np.sqrt(n * p * (1 - p))
        for info in infos:
            assert info["qa/catastrophe"] is True
            assert info["qa/vetoed"] is not info["qa/let_through"]
            assert info["did"] == (0 if info["qa/let_through"] else 2)
            assert info["qa/let_through_probability"] == p

    def test_what_no_veto_would_change_is_certain(self, risks):
        """Not flagged, or flagged while nothing is safer."""
        for action, threshold in ((1, 0.5), (2, 0.05)):
            for info in play(VetoAction(Toy(length=99), "ruin", threshold, let_through=0.5, qa=risks), action):
                assert info["qa/let_through"] is False
                assert info["qa/let_through_probability"] == 1.0

    def test_candidates_are_the_same_with_and_without(self):
        space = spaces.Box(-1, 1, (2,), np.float32)
        qa = make_qa(action_space=space)
        actions = np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32)
        runs = [
            [
                m.told
                for m in steps(run_single(VetoAction(Toy(space), "crash[k=3]", 0.0, let_through=p, qa=qa), actions))
            ]
            for p in (0.0, 0.3)
        ]
        through = [told["qa/let_through"] for told in runs[1]]
        assert 2 < sum(through) < 20
        for a, b, passed in zip(*runs, through, strict=True):
            same = np.array_equal(a["qa/executed_action"], b["qa/executed_action"])
            assert same is not passed

    def test_by_its_own_seed(self, risks):
        def run(seed, reset):
            env = VetoAction(Toy(length=99), "ruin", 0.5, let_through=0.5, seed=seed, qa=risks)
            env.reset(seed=reset)
            return [env.step(0)[4]["qa/let_through"] for _ in range(40)]

        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        assert run(0, 7) == run(0, 7)
        assert run(0, 7) != run(1, 7) != run(1, 8)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.random.get_state()[1].tolist() == state[1]

    def test_masks_are_lifted_by_the_same_chance(self, risks):
        env = VecVetoAction(toys(1), "ruin", 0.5, let_through=0.5, qa=risks)
        env.reset()
        seen = set()
        for _ in range(40):
            (masks,) = env.env_method("action_masks")
            lifted = bool(masks.all())
            assert lifted or masks.tolist() == [False, True, True]
            info = env.step(np.array([0]))[3][0]
            assert info["qa/let_through"] is lifted
            seen.add(lifted)
        assert seen == {True, False}


@pytest.mark.parametrize("options", [dict(budget=2, cooldown=1), dict(let_through=0.4), dict(on_veto=Always(1))])
def test_single_and_vector_forms_are_alike(qa, options):
    arguments = dict(question="crash[k=3]", threshold=0.4, qa=qa, **options)
    single = run_single(VetoAction(Toy(), **arguments), ACTIONS[:, 0])
    vector = run_vec(VecVetoAction(toys(), **arguments), ACTIONS[:, :1])[0]
    assert_same(single, vector)
    assert 3 < sum(moment.told["qa/vetoed"] for moment in single) < 40


def test_a_decision_by_hand():
    restraint = Restraint("X", cooldown=1, budget=2, let_through=0.0, seed=0)
    restraint.start(np.arange(3), 3)
    wanted = np.array([True, False, True])
    carried = [restraint.decide(wanted).carried_out.tolist() for _ in range(5)]
    assert carried == [[True, False, True], [False] * 3, [True, False, True], [False] * 3, [False] * 3]


def sizes_of(space):
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return space.nvec.tolist() if isinstance(space, spaces.MultiDiscrete) else [2] * space.n


class Masked(Toy):
    """One choice of one part of the action is forbidden, another in every step, and must never be executed."""

    def forbidden(self):
        sizes = sizes_of(self.action_space)
        part = self._steps % len(sizes)
        return part, self._steps % sizes[part]

    def action_masks(self):
        part, choice = self.forbidden()
        return [
            n != part or each != choice for n, size in enumerate(sizes_of(self.action_space)) for each in range(size)
        ]

    def step(self, action):
        part, choice = self.forbidden()
        assert np.ravel(action)[part] != choice, f"{action} is forbidden"
        return super().step(action)

    def proposed(self, step):
        """An action that is allowed."""
        parts = [(step + 1) % n for n in sizes_of(self.action_space)]
        return parts[0] if isinstance(self.action_space, spaces.Discrete) else np.array(parts)


class MaskedModel(Always):
    """Takes the first action that is allowed, as MaskablePPO is told."""

    def predict(self, observation, *, deterministic, action_masks=None):
        return np.argmax(action_masks, axis=1), None


def played(form, veto, action_space=None, n_steps=9):
    """What is told in each step by two environments, that always end together."""
    made, env = [partial(Masked, action_space)] * 2, None
    toy = Masked(action_space)
    if form == "single":
        env = veto["single"](toy)
    elif form == "inside":
        env = DummyVecEnv([lambda: veto["single"](Masked(action_space))] * 2)
    elif form == "vec":
        env = veto["vec"](DummyVecEnv(made))
    else:
        kind = SyncVectorEnv if form == "sync" else partial(AsyncVectorEnv, context="fork")
        env = veto["vector"](kind(made, autoreset_mode=AutoresetMode.SAME_STEP))
    try:
        if form in ("inside", "vec"):
            env.seed(0)
        env.reset(**({} if form in ("inside", "vec") else {"seed": 0}))
        for n in range(n_steps):
            action = toy.proposed(n % toy.length)
            if form == "single":
                *_, over, cut, info = env.step(action)
                yield {key: value for key, value in info.items() if key.startswith("qa/")}
                if over or cut:
                    env.reset()
            elif form in ("inside", "vec"):
                yield from env.step(np.stack([action] * 2))[3][:1]
            else:
                infos = env.step(np.stack([action] * 2))[4]
                infos = infos.get("final_info", infos)
                yield {key: value[0] for key, value in infos.items() if key.startswith("qa/")}
    finally:
        env.close()


def forms(*args, **kwargs):
    return {
        "single": lambda env: VetoAction(env, *args, **kwargs),
        "vec": lambda env: VecVetoAction(env, *args, **kwargs),
        "vector": lambda env: vector.VetoAction(env, *args, **kwargs),
    }


FORMS = ["single", "inside", "vec", "sync", "async"]


class Bare(DummyVecEnv):
    """As environments that are no Python objects have it."""

    def get_attr(self, attr_name, indices=None):
        if attr_name == "render_mode":  # which SB3 asks for itself
            return [None] * self.num_envs
        raise NotImplementedError


def test_environments_that_cannot_be_asked_for_masks():
    env = VecVetoAction(Bare([Toy]), "crash[k=3]", 0.5, qa=make_qa())
    env.reset()
    assert env.step(np.array([1]))[3][0]["qa/risk"] > 0


class TestWhatTheEnvironmentForbids:
    """Is no way out, whether the agent has asked for ``action_masks()`` or not."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("on_veto", ["safest", "policy", MaskedModel(0)])
    def test_is_not_executed(self, risks, form, on_veto):
        """Of three actions the last is the safest; where it is forbidden, the second is."""
        told = list(played(form, forms("ruin", 0.15, on_veto, qa=risks)))
        proposed = [(step % 5 + 1) % 3 for step in range(9)]
        assert [one["qa/proposed_action"] for one in told] == proposed
        best = [2, 2, 1, 2, 2, 2, 2, 1, 2] if isinstance(on_veto, str) else [1, 0, 0, 1, 0, 1, 0, 0, 1]
        expected = [p if p == 2 else b for p, b in zip(proposed, best, strict=True)]
        assert [one["qa/executed_action"] for one in told] == expected
        assert [one["qa/no_safe_action"] for one in told] == [step % 5 == 2 for step in range(9)]

    @pytest.mark.parametrize("form", ["single", "vec", "sync"])
    @pytest.mark.parametrize(
        "space", [spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([17, 16]), spaces.MultiBinary(3)]
    )
    def test_of_actions_with_parts(self, form, space):
        """All that can be listed are looked at, or some; each part must be allowed."""
        qa = make_qa(action_space=space)
        told = list(played(form, forms("crash[k=3]", 0.0, qa=qa), space))
        assert sum(one["qa/vetoed"] for one in told) >= 5

    @pytest.mark.parametrize("form", FORMS[:-1])
    def test_is_no_answer_of_a_callable(self, risks, form):
        """Unless it is what the agent proposes."""
        veto = forms("ruin", 0.0, lambda obs, action: 1, qa=risks)
        with pytest.raises(
            QAError, match=r"callable gave 1; expected an action of .* that the environment's action_masks"
        ):
            list(played(form, veto))
        env = VecVetoAction(DummyVecEnv([Forgiving]), "ruin", 0.0, lambda obs, action: action, qa=risks)
        env.reset()
        assert env.step(np.array([0]))[3][0]["did"] == 0

    def test_is_not_executed_by_the_control(self, risks):
        """Random vetoes, of an agent that never asked."""
        env = VecRandomVeto(DummyVecEnv([Masked] * 2), "ruin", 1.0, qa=risks)
        env.reset()
        vetoed = [env.step(np.full(2, (step % 5 + 1) % 3))[3][0]["qa/vetoed"] for step in range(20)]
        assert all(vetoed)

    def test_environments_without_masks_are_asked_once(self, risks):
        class Counting(DummyVecEnv):
            asked = 0

            def has_attr(self, attr_name):
                self.asked += attr_name == "action_masks"
                return super().has_attr(attr_name)

            def env_method(self, *args, **kwargs):
                raise AssertionError

        inside = Counting([Toy])
        env = VecVetoAction(inside, "ruin", 0.5, qa=risks)
        env.reset()
        for _ in range(4):
            env.step(np.array([0]))
        assert inside.asked == 1

    def test_masks_of_another_size_are_refused(self, risks):
        class Short(Toy):
            def action_masks(self):
                return [True, False]

        env = VetoAction(Short(), "ruin", 0.5, qa=risks)
        env.reset(seed=0)
        with pytest.raises(QAError, match="with 2 entries; expected 3, one for each choice"):
            env.step(0)


class Forgiving(Masked):
    """Where what is forbidden can be done all the same."""

    def step(self, action):
        return Toy.step(self, action)
