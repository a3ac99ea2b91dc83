"""Vetoes: which actions are judged catastrophic, what is executed instead, and what is told of it."""

import itertools
import logging
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.vec_env import VecEnvWrapper
from wrapping import (
    QUESTIONS,
    VECTOR,
    VERDICT,
    Toy,
    Witness,
    answer,
    assert_same,
    batch,
    force,
    logit,
    make_model,
    make_qa,
    prefer,
    run_single,
    run_vec,
    toys,
)

from sb3_qa import Number, QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.flight_log import FlightLog
from sb3_qa.policies import qa_policy
from sb3_qa.questions import TOLD
from sb3_qa.truth import always, eventually, now
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction, VetoAction
from sb3_qa.wrappers.substitutes import called
from sb3_qa.wrappers.veto import is_catastrophe, safest

RUIN = [Question("Will it crash at once after {action}?", eventually("crashed", within=1), name="ruin")]
BOX = spaces.Box(-1, 2, (2,), np.float32)
VECTORS = spaces.Dict({"other": spaces.Box(-1, 1, (2,), np.float32), "vector": VECTOR})
ACTIONS = np.random.default_rng(3).integers(3, size=(40, 3))
ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)
NAN, INF = float("nan"), float("inf")


def floats32(values):
    return np.array(values, np.float32)


def make_risks(risks, action_space=None, preferences=None):
    """An answerer of these risks in every state, with an agent of these preferences."""
    qa = QuestionAnswerer.from_model(make_model(toys(action_space=action_space), questions=RUIN))
    force(qa, "ruin", [logit(risk) for risk in risks])
    return qa if preferences is None else prefer(qa, preferences)


def once(env, action, seed=0):
    """What is told of the first step."""
    env.reset(seed=seed)
    info = env.step(action)[4]
    np.testing.assert_array_equal(info["did"], info["qa/executed_action"])
    return info


class Blinded(VecEnvWrapper):
    """The second environment shows a number that is not finite at the reset, or after so many steps, as told."""

    def __init__(self, venv, when, value):
        super().__init__(venv)
        self.when, self.value = when, value

    def reset(self):
        self.n = 0
        return self._blind(self.venv.reset())

    def step_wait(self):
        obs, *rest = self.venv.step_wait()
        self.n += 1
        return self._blind(obs), *rest

    def _blind(self, obs):
        if self.n in self.when:
            (obs["vector"] if isinstance(obs, dict) else obs)[1, 2] = self.value
        return obs


def small(algorithm, action_space, observation_space=VECTOR, **arguments):
    base = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    env = toys(action_space=action_space, observation_space=observation_space)
    policy_kwargs = dict(questions=QUESTIONS, net_arch=[8], qa_net_arch=[16], **arguments.pop("policy_kwargs", {}))
    return algorithm(qa_policy(algorithm, base), env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **arguments)


ON_POLICY = dict(n_steps=32, batch_size=32)
BLINDED = {
    "PPO discrete": lambda: small(PPO, spaces.Discrete(3), **ON_POLICY),
    "PPO multi-discrete": lambda: small(PPO, spaces.MultiDiscrete([2, 3]), **ON_POLICY),
    "PPO box": lambda: small(PPO, BOX, **ON_POLICY),
    "PPO box, gSDE": lambda: small(PPO, BOX, use_sde=True, **ON_POLICY),
    "PPO dict": lambda: small(PPO, BOX, VECTORS, **ON_POLICY),
    "RecurrentPPO": lambda: small(RecurrentPPO, BOX, **ON_POLICY),
    "SAC": lambda: small(SAC, BOX),
    "SAC dict": lambda: small(SAC, BOX, VECTORS, buffer_size=10),
    "TD3": lambda: small(TD3, BOX),
}


def steps(moments):
    return [moment for moment in moments if moment.before is not None]


def nought(obs, action):
    return 0


@pytest.fixture(scope="module")
def qa():
    return make_qa()


@pytest.fixture(scope="module")
def risks():
    """Three actions: a risk of 0.9 for the most preferred one, 0.2, and 0.1 for the least preferred one."""
    return make_risks([0.9, 0.2, 0.1], preferences=[2.0, 1.0, 0.0])


class TestIsCatastrophe:
    def test_by_hand(self):
        flagged = is_catastrophe(floats32([0.0, 0.29, 0.3, 0.31, 1.0]), 0.3)
        assert flagged.tolist() == [False, False, True, True, True]

    def test_what_is_not_finite_is_a_catastrophe(self):
        assert is_catastrophe(floats32([NAN, INF, -INF]), 0.5).all()
        assert is_catastrophe(floats32([NAN, INF, -INF]), 1.0).all()

    @settings(deadline=None)
    @given(arrays(np.float32, array_shapes(max_dims=2), elements=ANY), st.floats(0, 1, width=32))
    def test_element_by_element(self, risk, threshold):
        flagged = is_catastrophe(risk, threshold)
        assert flagged.shape == risk.shape
        assert flagged.dtype == np.bool_
        for each, flag in zip(risk.ravel().tolist(), flagged.ravel().tolist(), strict=True):
            assert flag is (not np.isfinite(each) or each >= threshold)

    @settings(deadline=None)
    @given(arrays(np.float32, 5, elements=ANY), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
    def test_a_higher_threshold_flags_no_more(self, risk, a, b):
        assert np.all(is_catastrophe(risk, max(a, b)) <= is_catastrophe(risk, min(a, b)))


class TestSafest:
    def test_by_hand(self):
        risk = floats32([[0.3, 0.1, 0.2], [0.9, NAN, 0.95], [INF, -INF, 0.99]])
        assert safest(risk).tolist() == [1, 0, 2]

    def test_preferred_under_the_threshold(self):
        risk = floats32([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [NAN, 0.1, 0.2]])
        preference = floats32([[3, 2, 1], [3, 1, 2], [1, 3, 2], [3, 1, 2]])
        assert safest(risk, preference, 0.25).tolist() == [1, 2, 1, 2]
        assert safest(risk, preference, 0.3).tolist() == [1, 2, 1, 2]
        assert safest(risk, preference, 0.31).tolist() == [0, 0, 1, 2]
        assert safest(risk, preference, 0.1).tolist() == [1, 1, 1, 1]  # none is under it: the safest

    def test_what_is_allowed_wins_even_if_the_policy_would_never_do_it(self):
        assert safest(floats32([[0.9, 0.1]]), floats32([[0.0, -INF]]), 0.5).tolist() == [1]

    @settings(deadline=None)
    @given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=ANY))
    def test_none_is_safer(self, risk):
        for row, index in zip(risk, safest(risk), strict=True):
            finite = row[np.isfinite(row)]
            if len(finite):
                assert row[index] == finite.min()

    @settings(deadline=None)
    @given(st.data(), st.floats(0, 1, width=32))
    def test_preferred_of_the_allowed_or_safest(self, data, threshold):
        shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
        risk = data.draw(arrays(np.float32, shape, elements=ANY))
        preference = data.draw(arrays(np.float32, shape, elements=st.floats(-100, 0, width=32)))
        chosen = safest(risk, preference, threshold)
        for n in range(shape[0]):
            allowed = ~is_catastrophe(risk[n], threshold)
            if allowed.any():
                assert allowed[chosen[n]]
                assert preference[n, chosen[n]] == preference[n][allowed].max()
            else:
                assert chosen[n] == safest(risk)[n]


class TestJudgement:
    def test_at_least_the_threshold(self, risks):
        """The threshold itself is flagged."""
        told = once(VetoAction(Toy(), "ruin", 1.0, qa=risks), 1)["qa/risk"]
        above = float(np.nextafter(np.float32(told), np.float32(1)))
        for threshold, flagged in ((told, True), (above, False), (told - 0.01, True), (told + 0.01, False)):
            info = once(VetoAction(Toy(), "ruin", threshold, qa=risks), 1)
            assert info["qa/risk"] == told
            assert info["qa/catastrophe"] is flagged, threshold

    def test_a_threshold_of_nought_flags_all(self, risks):
        env = VetoAction(Toy(), "ruin", 0.0, qa=risks)
        assert all(moment.told["qa/catastrophe"] for moment in steps(run_single(env, ACTIONS[:, 0])))

    def test_a_threshold_of_one_flags_certainties_only(self, risks):
        env = VetoAction(Toy(), "ruin", 1.0, qa=risks)
        assert not any(moment.told["qa/catastrophe"] for moment in steps(run_single(env, ACTIONS[:, 0])))

    @pytest.mark.parametrize(
        ("threshold", "on_veto", "proposed", "flagged", "executed"),
        [
            (0.5, "safest", 0, True, 2),
            (0.5, "safest", 1, False, 1),
            (0.5, "safest", 2, False, 2),
            (0.5, "policy", 0, True, 1),  # preferred to 2, and under the threshold
            (0.15, "policy", 0, True, 2),
            (0.15, "policy", 1, True, 2),
            (0.15, "policy", 2, False, 2),
            (0.05, "policy", 0, True, 2),  # none is under the threshold: the safest
            (0.05, "policy", 2, True, 2),
            (0.05, "safest", 2, True, 2),  # flagged, but nothing is safer
            (0.95, "safest", 0, False, 0),
            (0.5, lambda obs, action: 1, 0, True, 1),
            (0.5, lambda obs, action: action, 0, True, 0),
            (0.5, lambda obs, action: np.int64(1), 0, True, 1),
            (0.5, lambda obs, action: 0, 1, False, 1),
        ],
    )
    def test_what_is_executed(self, risks, threshold, on_veto, proposed, flagged, executed):
        asked = {0: 0.9, 1: 0.2, 2: 0.1}
        info = once(VetoAction(Toy(), "ruin", threshold, on_veto=on_veto, qa=risks), proposed)
        assert info["qa/risk"] == pytest.approx(asked[proposed], rel=1e-5)
        assert info["qa/risk"] == pytest.approx(
            float(risks.ask("ruin", np.zeros(4, np.float32), proposed).value), rel=1e-5
        )
        assert info["qa/catastrophe"] is flagged
        assert info["qa/vetoed"] is (executed != proposed)
        assert info["qa/proposed_action"] == proposed
        assert info["qa/executed_action"] == executed
        assert info["qa/risk"] == pytest.approx(asked[proposed], rel=1e-5)
        assert "qa/raw_reward" not in info

    @pytest.mark.parametrize("on_veto", ["safest", "policy"])
    def test_each_step_against_a_plain_statement_of_the_rule(self, qa, on_veto):
        """In random states, of three environments at once."""
        threshold, kept = 0.5, {True: 0, False: 0}
        for moments in run_vec(VecVetoAction(toys(3), "crash[k=3]", threshold, on_veto=on_veto, qa=qa), ACTIONS):
            for moment in steps(moments):
                obs = batch(moment.before)
                risk = qa.ask("crash[k=3]", obs).probability[0].tolist()
                distribution = qa.policy.get_distribution(torch.as_tensor(obs)).distribution
                log_prob = distribution.logits[0].tolist()
                allowed = [a for a in range(3) if risk[a] < threshold]
                expected = int(moment.action)
                if risk[expected] >= threshold:
                    by_policy = on_veto == "policy" and allowed
                    expected = (
                        max(allowed, key=lambda a: log_prob[a]) if by_policy else min(range(3), key=lambda a: risk[a])
                    )
                assert moment.told["qa/executed_action"] == moment.info["did"] == expected
                assert moment.told["qa/risk"] == pytest.approx(risk[int(moment.action)], rel=1e-5)
                assert moment.told["qa/catastrophe"] is (risk[int(moment.action)] >= threshold)
                assert moment.told["qa/vetoed"] is bool(expected != moment.action)
                kept[moment.told["qa/vetoed"]] += 1
        assert min(kept.values()) > 20

    def test_the_two_ways_differ(self, qa):
        """The test above would fail, were one of them the other."""
        ways = [
            [moment.told["qa/executed_action"] for moments in run_vec(env, ACTIONS) for moment in steps(moments)]
            for env in (VecVetoAction(toys(3), "crash[k=3]", 0.5, on_veto=way, qa=qa) for way in ("safest", "policy"))
        ]
        assert ways[0] != ways[1]

    def test_a_callable_is_given_the_observation_and_the_action(self, qa):
        given = []

        def on_veto(obs, action):
            given.append((obs.copy(), action))
            return (action + 1) % 3

        n_flagged = 0
        for moments in run_vec(VecVetoAction(toys(3), "crash[k=3]", 0.5, on_veto=on_veto, qa=qa), ACTIONS):
            for moment in steps(moments):
                if moment.told["qa/catastrophe"]:
                    n_flagged += 1
                    assert moment.info["did"] == (moment.action + 1) % 3
                    assert any(np.array_equal(obs, moment.before) and action == moment.action for obs, action in given)
                else:
                    assert moment.info["did"] == moment.action
        assert len(given) == n_flagged > 20
        assert {type(action) for _, action in given} == {int}

    @pytest.mark.parametrize("given", [[1, 2], -1, 3, 1.6, NAN, None, "1"], ids=str)
    def test_a_callable_that_gives_no_action(self, risks, given):
        env = VetoAction(Toy(), "ruin", 0.5, on_veto=lambda obs, action: given, qa=risks)
        env.reset(seed=0)
        message = re.escape(f"on_veto callable gave {given!r}; expected an action of Discrete(3)")
        with pytest.raises(QAError, match=message):
            env.step(0)

    @pytest.mark.parametrize("given", [1, 1.0, True, np.int64(1), np.array(1), torch.tensor(1)], ids=repr)
    def test_a_callable_that_gives_one_in_another_form(self, risks, given):
        info = once(VetoAction(Toy(), "ruin", 0.5, on_veto=lambda obs, action: given, qa=risks), 0)
        assert info["qa/executed_action"] == 1
        assert info["qa/ruin"] == pytest.approx(0.2, rel=1e-5)

    @pytest.mark.parametrize(
        ("space", "given"),
        [
            (spaces.MultiDiscrete([2, 3], start=[1, 1]), [1, 0]),
            (spaces.MultiDiscrete([2, 3], start=[1, 1]), [3, 1]),
            (spaces.MultiBinary(2), [0, 2]),
            (spaces.Box(-1, 1, (2,), np.float32), [0.0, NAN]),
            (spaces.Box(-INF, INF, (2,), np.float32), [0.0, INF]),
        ],
        ids=str,
    )
    def test_a_callable_that_leaves_the_space(self, space, given):
        proposed = np.stack([space.sample()] * 2)
        with pytest.raises(QAError, match="VetoAction's on_veto callable gave .*; expected an action of"):
            called("VetoAction", lambda obs, action: given, np.zeros((2, 4)), np.arange(2), proposed, space)

    def test_a_callable_outside_of_a_box_is_clipped(self):
        space = spaces.Box(-1, 2, (2,), np.float32)
        env = VetoAction(
            Toy(space), "crash[k=3]", 0.0, on_veto=lambda obs, a: [9.9, -INF], qa=make_qa(action_space=space)
        )
        info = once(env, np.zeros(2, np.float32))
        assert info["did"].tolist() == [2.0, -1.0]

    def test_a_question_about_the_state_with_a_callable(self, qa):
        """The risk is the one in the state the action is chosen in; the answer told is about the state arrived in."""
        env = VetoAction(Toy(), "danger", 0.5, on_veto=lambda obs, action: (action + 1) % 3, qa=qa)
        kept = {True: 0, False: 0}
        for moment in steps(run_single(env, ACTIONS[:, 0])):
            risk = qa.ask("danger", batch(moment.before)).value[0]
            assert moment.told["qa/risk"] == pytest.approx(risk, rel=1e-5)
            assert moment.told["qa/catastrophe"] is bool(risk >= 0.5) is moment.told["qa/vetoed"]
            assert moment.told["qa/danger"] == pytest.approx(qa.ask("danger", batch(moment.after)).value[0], rel=1e-5)
            kept[moment.told["qa/vetoed"]] += 1
        assert min(kept.values()) > 3

    def test_the_risk_is_of_the_proposed_action_and_the_answer_of_the_executed_one(self, qa):
        env = VetoAction(Toy(), "crash[k=3]", 0.5, qa=qa)
        vetoed = [moment for moment in steps(run_single(env, ACTIONS[:, 0])) if moment.told["qa/vetoed"]]
        assert len(vetoed) > 3
        for moment in vetoed:
            assert moment.told["qa/crash[k=3]"] == pytest.approx(answer(qa, "crash[k=3]", moment), rel=1e-5)
            assert moment.told["qa/crash[k=3]"] < moment.told["qa/risk"]

    def test_proposals_are_left_as_they_were(self, risks):
        env = VecVetoAction(toys(2), "ruin", 0.5, qa=risks)
        env.reset()
        proposed = np.array([0, 1])
        env.step(proposed)
        assert proposed.tolist() == [0, 1]


class TestShadow:
    @pytest.mark.parametrize("on_veto", ["safest", "policy", lambda obs, action: (action + 1) % 3])
    def test_never_interferes(self, qa, on_veto):
        bare = run_vec(VecVetoAction(toys(3), "crash[k=3]", 1.0, qa=qa), ACTIONS)
        acting = run_vec(VecVetoAction(toys(3), "crash[k=3]", 0.5, on_veto=on_veto, qa=qa), ACTIONS)
        env = VecVetoAction(toys(3), "crash[k=3]", 0.5, on_veto=on_veto, shadow=True, penalty=5.0, qa=qa)
        flagged = []
        for moments, plain in zip(run_vec(env, ACTIONS), bare, strict=True):
            for moment, other in zip(steps(moments), steps(plain), strict=True):
                np.testing.assert_array_equal(moment.after, other.after)
                assert moment.reward == other.reward
                assert moment.told["qa/vetoed"] is False
                assert moment.told["qa/executed_action"] == moment.told["qa/proposed_action"] == moment.info["did"]
                risk = qa.ask("crash[k=3]", batch(moment.before), int(moment.action)).value[0]
                assert moment.told["qa/catastrophe"] is bool(risk >= 0.5)
                flagged.append(moment.told["qa/catastrophe"])
        # What it flags is what a veto flags (in the same states, which these draw whatever the actions).
        assert flagged == [moment.told["qa/catastrophe"] for moments in acting for moment in steps(moments)]
        assert 20 < sum(flagged) < 100


class TestPenalty:
    def test_is_taken_from_the_reward_of_vetoed_steps_and_told(self, qa):
        bare = [
            VecVetoAction(toys(3), "crash[k=3]", 0.5, qa=qa),
            VecVetoAction(toys(3), "crash[k=3]", 0.5, penalty=0.5, qa=qa),
        ]
        n_vetoed = 0
        for without, moments in zip(*(run_vec(env, ACTIONS) for env in bare), strict=True):
            for plain, moment in zip(steps(without), steps(moments), strict=True):
                taken = 0.5 * moment.told["qa/vetoed"]
                assert moment.reward == pytest.approx(plain.reward - taken, abs=1e-6)
                assert moment.told["qa/raw_reward"] == plain.reward
                assert moment.told["qa/shaping_reward"] == pytest.approx(-taken, abs=1e-6)
                n_vetoed += moment.told["qa/vetoed"]
        assert 20 < n_vetoed < 110

    def test_only_a_veto_costs(self, risks):
        """A flagged action that stays, as none is safer, is not punished."""
        info = once(VetoAction(Toy(), "ruin", 0.05, penalty=2.0, qa=risks), 2)
        assert info["qa/catastrophe"] is True
        assert info["qa/vetoed"] is False
        assert info["qa/shaping_reward"] == 0.0


class TestNotFinite:
    """Fail closed: an answer that is no number counts as a catastrophe."""

    @staticmethod
    def broken(value):
        """An answerer with such weights."""
        qa = make_risks([0.1, 0.2, 0.3])
        with torch.no_grad():
            qa.policy.qa_head.weights(qa.policy.qa_head.flat).bias.fill_(value)
        return qa

    @pytest.mark.parametrize("on_veto", ["safest", "policy"])
    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_nothing_is_known(self, caplog, on_veto, form):
        """All is flagged, it is said once, and there is no reason to prefer another action."""
        qa = self.broken(NAN)
        with np.errstate(invalid="ignore"), caplog.at_level(logging.ERROR):
            if form == "single":
                moments = run_single(VetoAction(Toy(), "ruin", 1.0, on_veto=on_veto, qa=qa), ACTIONS[:, 0])
            else:
                moments = run_vec(VecVetoAction(toys(1), "ruin", 1.0, on_veto=on_veto, qa=qa), ACTIONS[:, :1])[0]
        for moment in steps(moments):
            assert np.isnan(moment.told["qa/risk"])
            assert moment.told["qa/catastrophe"] is True
            assert moment.told["qa/vetoed"] is False
            assert moment.info["did"] == moment.action
        (record,) = caplog.records
        assert "the answers to 'ruin' are not finite" in record.getMessage()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_callable_still_decides(self, value):
        qa = self.broken(value)
        env = VetoAction(Toy(), "ruin", 1.0, on_veto=lambda obs, action: 2, qa=qa)
        with np.errstate(invalid="ignore"):
            info = once(env, 0)
        assert info["qa/catastrophe"] is True
        assert info["qa/executed_action"] == 2

    @pytest.mark.parametrize(("on_veto", "executed"), [("safest", 1), ("policy", 2)])
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_one_action_is_not_known(self, value, on_veto, executed):
        """It is flagged, and is not what is executed instead of another one."""
        qa = make_risks([0.5, 0.5, 0.5], preferences=[2.0, 0.0, 1.0])
        env = VetoAction(Toy(), "ruin", 0.4, on_veto=on_veto, qa=qa)
        env.reset(seed=0)
        for risk, proposed, flagged, did in (
            ([value, 0.1, 0.2], 0, True, executed),
            ([value, 0.1, 0.2], 1, False, 1),
            ([value, 0.6, 0.7], 2, True, 1),
        ):
            env.rule.risk = lambda actions, risk=risk: floats32([risk])
            info = env.step(proposed)[4]
            np.testing.assert_equal(np.float32(info["qa/risk"]), np.float32(risk[proposed]))
            assert info["qa/catastrophe"] is flagged
            assert info["did"] == info["qa/executed_action"] == did

    def test_an_infinite_logit_is_a_certainty(self):
        qa = self.broken(INF)
        with np.errstate(invalid="ignore"):
            info = once(VetoAction(Toy(), "ruin", 1.0, qa=qa), 1)
        assert info["qa/risk"] == 1.0
        assert info["qa/catastrophe"] is True

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_observations_that_are_not_finite(self, value):
        qa = make_qa()
        env = VetoAction(Toy(), "crash[k=3]", 1.0, on_veto=lambda obs, action: 2, qa=qa)
        env.reset(seed=0)
        env.rule.obs = np.full((1, 4), value, np.float32)
        with np.errstate(invalid="ignore"):
            info = env.step(0)[4]
        assert info["qa/catastrophe"] is True
        assert info["did"] == 2

    @pytest.mark.parametrize(
        ("options", "value"),
        [
            ({}, NAN),
            ({}, INF),
            (dict(on_veto="policy"), NAN),
            (dict(on_veto="policy"), -INF),
            (dict(shadow=True), NAN),
            (dict(on_veto=lambda obs, a: a), NAN),
        ],
    )
    @pytest.mark.parametrize("make", BLINDED.values(), ids=BLINDED.keys())
    def test_one_observation_that_is_not_finite_stops_no_other(self, make, options, value, tmp_path):
        """Its environment goes on, flagged, as it was proposed; the others are judged as ever, and so is it afterwards."""
        model = make()
        qa, space = QuestionAnswerer.from_model(model), model.action_space
        space.seed(1)
        actions = [np.stack([space.sample() for _ in range(3)]) for _ in range(4)]
        runs = []
        for when in ((), (0, 2)):
            venv = Blinded(toys(3, action_space=space, observation_space=model.observation_space), when, value)
            record = tmp_path / f"{len(when)}.sqlite"
            env = VecVetoAction(venv, "crash[k=3]", 0.0, qa=qa, record=record, **options)
            env.seed(7)
            with np.errstate(invalid="ignore"):
                env.reset()
                told = [env.reset_infos, *(env.step(chosen)[3] for chosen in actions)]
                env.close()
            runs.append(told)
        for step, (row, seen) in enumerate(zip(runs[1], runs[0], strict=True)):
            for i in (0, 2):
                np.testing.assert_equal(row[i], seen[i])
            blind = step in (0, 1, 3)  # at the reset, and in the steps from it and from the second step's end
            assert np.isnan(row[1]["qa/risk"]) == blind
            assert row[1]["qa/catastrophe"] is (step > 0)
            if blind and step:
                np.testing.assert_array_equal(row[1]["did"], actions[step - 1][1])


class TestActionSpaces:
    """Each risk is the sigmoid of a sum over the action's parts, so the safest action is known."""

    def test_discrete_that_does_not_start_at_nought(self):
        qa = make_risks([0.9, 0.2, 0.1], spaces.Discrete(3, start=5))
        env = VetoAction(Toy(spaces.Discrete(3, start=5)), "ruin", 0.5, qa=qa)
        env.unwrapped.action_space = env.action_space
        with pytest.MonkeyPatch.context() as patch:  # the answer at a reset is another subject, tested below
            patch.setattr(env.rule, "begin", lambda index: [{}])
            assert once(env, 5)["qa/executed_action"] == 7
            assert once(env, 5)["qa/risk"] == pytest.approx(0.9, rel=1e-5)
            assert once(env, np.int64(6))["qa/executed_action"] == 6
            assert once(env, 7)["qa/risk"] == pytest.approx(0.1, rel=1e-5)
            with pytest.raises(QAError, match=r"got the actions \[1\]; expected ones in Discrete\(3, start=5\)"):
                env.step(1)

    @pytest.mark.parametrize("on_veto", ["safest", "policy"])
    def test_discrete_that_does_not_start_at_nought_by_policy(self, on_veto):
        qa = make_risks([0.9, 0.2, 0.1], spaces.Discrete(3, start=5), [2.0, 1.0, 0.0])
        env = VetoAction(Toy(spaces.Discrete(3, start=5)), "ruin", 0.5, on_veto=on_veto, qa=qa)
        assert env.reset(seed=0)[1]["qa/risk"] == pytest.approx(0.9, rel=1e-5)
        assert once(env, 5)["qa/executed_action"] == (6 if on_veto == "policy" else 7)

    @pytest.mark.parametrize("start", [(0, 0), (2, 1)])
    def test_multi_discrete(self, start):
        space = spaces.MultiDiscrete([2, 3], start=start)
        qa = make_risks([0.9, 0.4, 0.5, 0.2, 0.9], space)
        env = VetoAction(Toy(space), "ruin", 0.5, qa=qa)
        for first, second in itertools.product(range(2), range(3)):
            proposed = np.add(start, [first, second])
            parts = logit([0.9, 0.4][first]) + logit([0.5, 0.2, 0.9][second])
            if start != (0, 0):  # the policy's own actions count from 0
                env.rule.begin = lambda index: [{}]
            info = once(env, proposed)
            assert info["qa/risk"] == pytest.approx(1 / (1 + np.exp(-parts)), rel=1e-5)
            flagged = parts >= 0
            assert info["qa/catastrophe"] is flagged
            assert info["qa/executed_action"].tolist() == np.add(start, [1, 1] if flagged else [first, second]).tolist()

    def test_multi_discrete_by_policy(self):
        space = spaces.MultiDiscrete([2, 3])
        qa = make_risks([0.9, 0.4, 0.5, 0.2, 0.9], space, preferences=[0.0, 0.0, 2.0, 0.0, 3.0])
        info = once(VetoAction(Toy(space), "ruin", 0.5, on_veto="policy", qa=qa), np.array([0, 2]))
        assert info["qa/executed_action"].tolist() == [
            1,
            0,
        ]  # 0.4 and even odds: under the threshold, and preferred to [1, 1]

    def test_multi_binary(self):
        space = spaces.MultiBinary(3)
        qa = make_risks([0.9, 0.3, 0.6], space)
        env = VetoAction(Toy(space), "ruin", 0.55, qa=qa)
        for bits in itertools.product((0, 1), repeat=3):
            parts = np.dot(bits, [logit(0.9), logit(0.3), logit(0.6)])
            info = once(env, np.array(bits, np.int8))
            assert info["qa/risk"] == pytest.approx(1 / (1 + np.exp(-parts)), rel=1e-5)
            flagged = bool(info["qa/risk"] >= 0.55)
            assert info["qa/catastrophe"] is flagged
            assert info["qa/executed_action"].tolist() == ([0, 1, 0] if flagged else list(bits))
            assert info["qa/executed_action"].dtype == np.int8

    def test_multi_binary_by_policy(self):
        space = spaces.MultiBinary(3)
        qa = make_risks([0.9, 0.3, 0.6], space, preferences=[2.0, -2.0, 2.0])
        info = once(VetoAction(Toy(space), "ruin", 0.7, on_veto="policy", qa=qa), np.array([1, 0, 1], np.int8))
        assert info["qa/executed_action"].tolist() == [0, 0, 1]

    def test_more_actions_than_are_listed(self):
        """Candidates stand for them: of the proposed one, the policy's and drawn ones, the safest is taken."""
        space = spaces.MultiDiscrete([20, 20])
        qa = QuestionAnswerer.from_model(make_model(toys(action_space=space), questions=RUIN))
        own = str(qa.policy.action_space.np_random.bit_generator.state)
        for moment in steps(run_single(VetoAction(Toy(space), "ruin", 0.3, qa=qa), list(ACTIONS[:, :2]))):
            told = moment.told
            assert told["qa/catastrophe"] is (told["qa/risk"] >= 0.3)
            executed = qa.ask("ruin", batch(moment.before), moment.info["did"]).value[0]
            assert told["qa/vetoed"] is (told["qa/executed_action"].tolist() != moment.action.tolist())
            assert executed <= told["qa/risk"] + 1e-6
            if told["qa/catastrophe"]:
                others = [qa.ask("ruin", batch(moment.before), np.array(a)).value[0] for a in ACTIONS[:20, :2]]
                assert executed < np.quantile(others, 0.3)
        assert str(qa.policy.action_space.np_random.bit_generator.state) == own

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_box_takes_the_safest_of_many_candidates(self, form):
        """The risk grows with both parts of the action, whose range is not the unit one."""
        space = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
        qa = make_risks([0.5, 0.5], space)
        with torch.no_grad():
            weights = qa.policy.qa_head.weights(qa.policy.qa_head.flat)
            weights.action[:, :2] = torch.eye(2)
            weights.rows[0, :2] = 3.0 / qa.policy.qa_head.scale
        actions = np.random.default_rng(0).uniform(space.low, space.high, (30, 1, 2)).astype(np.float32)
        if form == "single":
            moments = run_single(VetoAction(Toy(space), "ruin", 0.3, qa=qa), actions[:, 0])
        else:
            moments = run_vec(VecVetoAction(toys(action_space=space), "ruin", 0.3, qa=qa), actions)[0]
        n_flagged = 0
        for moment in steps(moments):
            scaled = np.tanh([moment.action[0] / 2, moment.action[1] / 5 - 1])
            assert moment.told["qa/risk"] == pytest.approx(1 / (1 + np.exp(-3 * scaled.sum())), rel=1e-4)
            assert moment.told["qa/catastrophe"] is (moment.told["qa/risk"] >= 0.3)
            assert space.contains(moment.info["did"])
            np.testing.assert_array_equal(moment.info["did"], moment.told["qa/executed_action"])
            if moment.told["qa/catastrophe"]:
                assert qa.ask("ruin", batch(moment.before), moment.info["did"]).value[0] < 0.1
                n_flagged += 1
            else:
                np.testing.assert_array_equal(moment.info["did"], moment.action)
        assert n_flagged > 10

    def test_box_by_policy_takes_what_the_policy_would_do(self):
        """Under the threshold, the candidate nearest to the policy's mean, which is at a risk of 0.8."""
        space = spaces.Box(-1, 1, (1,), np.float32)
        qa = prefer(make_risks([0.5], space), [0.6])
        with torch.no_grad():
            weights = qa.policy.qa_head.weights(qa.policy.qa_head.flat)
            weights.action[:, :1] = 1.0
            weights.rows[0, 0] = 3.0 / qa.policy.qa_head.scale
        obs = np.zeros((1, 4), np.float32)
        assert qa.ask("ruin", obs, np.array([0.6])).value[0] > 0.8
        for seed in range(5):
            did = once(VetoAction(Toy(space), "ruin", 0.5, on_veto="policy", seed=seed, qa=qa), np.float32([0.6]))[
                "did"
            ]
            assert -0.2 < did[0] < 0.0  # a risk of 0.5 is at 0
            did = once(VetoAction(Toy(space), "ruin", 0.5, on_veto="safest", seed=seed, qa=qa), np.float32([0.6]))[
                "did"
            ]
            assert did[0] < -0.8

    @pytest.mark.parametrize("name", ["PPO", "PPO, gSDE, squashed", "SAC", "TD3"])
    def test_box_of_several_dimensions_by_policy(self, name):
        """As of the same box laid flat."""
        square, flat = spaces.Box(-2, 2, (2, 2), np.float32), spaces.Box(-2, 2, (4,), np.float32)
        algorithm = dict(SAC=SAC, TD3=TD3).get(name, PPO)
        arguments = ON_POLICY if algorithm is PPO else {}
        squashed = dict(use_sde=True, policy_kwargs=dict(squash_output=True)) if "gSDE" in name else {}
        told = []
        for space in (square, flat):
            model = small(algorithm, space, **arguments, **squashed)
            qa = QuestionAnswerer.from_model(model)
            env = VecVetoAction(toys(2, action_space=space), "crash[k=3]", 1.0, on_veto="policy", qa=qa)
            env.rule.judge = lambda risk: np.ones(len(risk), bool)
            env.seed(7)
            env.reset()
            infos = env.step(np.zeros((2, *space.shape), np.float32))[3]
            assert all(info["qa/executed_action"].shape == space.shape for info in infos)
            told.append([info["qa/executed_action"].ravel() for info in infos])
        np.testing.assert_allclose(told[0], told[1], rtol=1e-5)

    def test_the_policys_own_actions_are_among_the_candidates(self):
        """In six dimensions, 32 draws from the whole space come nowhere near to a policy that hardly varies."""
        space = spaces.Box(-1, 1, (6,), np.float32)
        qa = prefer(make_qa(action_space=space), [0.3] * 6)
        with torch.no_grad():
            qa.policy.log_std.fill_(-3.0)
        env = VetoAction(Toy(space), "crash[k=3]", 0.0, on_veto="safest", qa=qa)
        env.rule.risk = lambda actions: (  # the farther from the policy's mean, the higher
            np.abs(actions - 0.3).max(axis=-1).astype(np.float32) / 2
        )
        env.rule.begin = lambda index: [{}]
        assert np.abs(once(env, np.ones(6, np.float32))["did"] - 0.3).max() < 0.2

    def test_candidates_follow_the_seed_and_draw_on_no_other_stream(self):
        space = spaces.Box(-1, 1, (2,), np.float32)
        qa = make_qa(action_space=space)
        actions = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)

        def play(env, seed=7):
            return run_single(env, actions, seed)

        env = VetoAction(Toy(space), "crash[k=3]", 0.0, qa=qa)
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        alone = play(env)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.random.get_state()[1].tolist() == state[1]
        assert_same(alone, play(env))  # the same environment again, from the same seed
        venv = VecVetoAction(toys(action_space=space), "crash[k=3]", 0.0, qa=qa)
        assert_same(alone, run_vec(venv, actions[:, None])[0])
        for other in (play(env, seed=8), play(VetoAction(Toy(space), "crash[k=3]", 0.0, seed=1, qa=qa))):
            apart = [
                a.told["qa/executed_action"] - b.told["qa/executed_action"]
                for a, b in zip(alone[1:3], other[1:3], strict=True)
            ]
            assert np.abs(apart).max() > 1e-6

    @pytest.mark.parametrize(
        "space",
        [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Box(-1, 1, (2,), np.float32)],
        ids=str,
    )
    def test_learning(self, space):
        env = VecVetoAction(toys(2, action_space=space), "crash[k=3]", 0.5)
        witness = Witness(keys=["crash[k=3]"])
        make_model(env).learn(64, [QACallback(), witness])
        assert witness.n_steps == 32
        infos = [info for step in witness.infos for info in step]
        for info in infos:
            np.testing.assert_array_equal(info["did"], info["qa/executed_action"])
        assert 0 < sum(info["qa/vetoed"] for info in infos) < 64


class TestNested:
    def test_a_veto_inside_a_veto(self, risks):
        """The outer one lets 1 pass, the inner one does not."""
        env = VetoAction(VetoAction(Toy(), "ruin", 0.15, qa=risks), "ruin", 0.5, qa=risks)
        info = once(env, 1)
        assert info["qa/proposed_action"] == 1
        assert info["qa/executed_action"] == 2
        assert info["qa/vetoed"] is True
        assert info["qa/catastrophe"] is True
        assert info["qa/risk"] == pytest.approx(0.2, rel=1e-5)

    @pytest.mark.parametrize("shadow", [False, True])
    def test_what_the_inner_one_tells_of_a_step_stays_told(self, risks, tmp_path, shadow):
        """Of that step alone; and what the outer one records is its own judgement."""
        inner = VetoAction(Toy(reuse=True), "ruin", 0.05, shadow=shadow, qa=risks)
        env = VetoAction(inner, "ruin", 0.95, qa=risks, record=tmp_path / "flight.sqlite")
        info = env.reset(seed=0)[1]
        assert info["qa/catastrophe"] is info["qa/no_safe_action"] is False
        info = env.step(1)[4]
        assert info["qa/catastrophe"] is info["qa/no_safe_action"] is True
        assert info["qa/vetoed"] is not shadow
        inner.rule.threshold = 0.95
        info = env.step(1)[4]
        assert info["qa/catastrophe"] is info["qa/no_safe_action"] is info["qa/vetoed"] is False
        env.close()
        assert len(FlightLog(tmp_path / "flight.sqlite")) == 0

    def test_all_that_is_told_is_taken_as_a_name(self, risks):
        """So that no question's answer stands where a veto tells something else."""
        env = VetoAction(
            Toy(), "ruin", 0.5, on_veto=nought, penalty=1.0, cooldown=1, budget=2, let_through=0.1, qa=risks
        )
        told = {*env.reset(seed=0)[1], *env.step(0)[4]}
        assert {key.removeprefix("qa/") for key in told if key.startswith("qa/")} - {"ruin"} == {*TOLD} - {"alarm"}

    def test_the_outer_one_tells_its_own_proposal(self, risks):
        env = VetoAction(
            VetoAction(Toy(), "ruin", 0.15, on_veto=lambda obs, action: 2, qa=risks),
            "ruin",
            0.5,
            on_veto="policy",
            qa=risks,
        )
        info = once(env, 0)
        assert (info["qa/proposed_action"], info["qa/executed_action"]) == (0, 2)
        assert info["qa/risk"] == pytest.approx(0.9, rel=1e-5)


@pytest.fixture(scope="module")
def moments(qa):
    """2000 steps under a random veto."""
    env = VecRandomVeto(toys(4), "crash[k=3]", 0.3, qa=qa)
    actions = np.random.default_rng(5).integers(3, size=(500, 4))
    return [moment for moments in run_vec(env, actions) for moment in steps(moments)]


class TestRandomVeto:
    def test_rate(self, moments):
        n, vetoed = len(moments), sum(moment.told["qa/vetoed"] for moment in moments)
        assert n == 2000
        assert abs(vetoed - 0.3 * n) < 4 * np.sqrt(0.3 * 0.7 * n)

    def test_another_action_is_executed_each_as_often(self, moments):
        shifts = np.zeros(3, int)
        for moment in moments:
            told = moment.told
            assert told.keys() == VERDICT | {"qa/crash[k=3]"}
            assert told["qa/proposed_action"] == moment.action
            assert told["qa/executed_action"] == moment.info["did"]
            assert told["qa/vetoed"] is told["qa/catastrophe"] is bool(moment.info["did"] != moment.action)
            if told["qa/vetoed"]:
                shifts[(moment.info["did"] - moment.action) % 3] += 1
        assert shifts[0] == 0
        assert abs(shifts[1] - shifts[2]) < 4 * np.sqrt(shifts.sum())

    def test_nobody_asks_about_the_risk(self, qa, moments):
        risk = np.array([moment.told["qa/risk"] for moment in moments])
        vetoed = np.array([moment.told["qa/vetoed"] for moment in moments])
        error = risk.std() * np.sqrt(1 / vetoed.sum() + 1 / (~vetoed).sum())
        assert abs(risk[vetoed].mean() - risk[~vetoed].mean()) < 4 * error
        for moment in moments[:50]:
            expected = qa.ask("crash[k=3]", batch(moment.before), int(moment.action)).value[0]
            assert moment.told["qa/risk"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(("rate", "n"), [(0.0, 0), (1.0, 40)])
    def test_never_and_always(self, qa, rate, n):
        moments = run_vec(VecRandomVeto(toys(), "crash[k=3]", rate, qa=qa), ACTIONS[:, :1])[0]
        assert sum(moment.told["qa/vetoed"] for moment in steps(moments)) == n

    def test_box(self):
        space = spaces.Box(-1, 1, (2,), np.float32)
        env = VecRandomVeto(toys(action_space=space), "crash[k=3]", 0.5, qa=make_qa(action_space=space))
        actions = np.zeros((60, 1, 2), np.float32)
        moments = steps(run_vec(env, actions)[0])
        vetoed = [moment for moment in moments if moment.told["qa/vetoed"]]
        assert 10 < len(vetoed) < 50
        assert all(space.contains(moment.info["did"]) and np.any(moment.info["did"] != 0) for moment in vetoed)

    def test_seeds_differ(self, qa):
        runs = [
            [moment.told["qa/executed_action"] for moment in steps(run_vec(env, ACTIONS[:, :1])[0])]
            for env in (VecRandomVeto(toys(), "crash[k=3]", 0.5, seed=seed, qa=qa) for seed in (0, 0, 1))
        ]
        assert runs[0] == runs[1] != runs[2]

    @pytest.mark.parametrize("rate", [-0.1, 1.1, True, "often"])
    def test_refused_rates(self, rate):
        with pytest.raises(QAError, match=rf"VecRandomVeto got rate={rate!r}; expected the share of steps"):
            VecRandomVeto(toys(), "crash[k=3]", rate)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(threshold=1.5), r"threshold=1.5; expected a probability in \[0, 1\]"),
            (dict(threshold=-0.1), "threshold=-0.1"),
            (dict(threshold=NAN), "threshold=nan"),
            (dict(threshold=True), "threshold=True"),
            (dict(threshold="high"), "threshold='high'"),
            (dict(on_veto="stop"), 'on_veto=\'stop\'; expected "safest", "policy" or a callable'),
            (dict(penalty=-1.0), "penalty=-1.0; expected a number, at least 0"),
            (dict(penalty=NAN), "penalty=nan"),
            (dict(penalty=INF), "penalty=inf"),
            (
                dict(question="danger"),
                r"'danger', which is not about an action.*; expected \{action\}.*; or give on_veto a callable",
            ),
            (dict(question="speed", on_veto=nought), "'speed', answered by Number.*; expected a yes/no"),
            (dict(question="lane", on_veto=nought), "'lane', answered by Choice"),
            (dict(question="crash"), r"no question 'crash'; expected one of 'crash\[k="),
        ],
    )
    def test_arguments(self, qa, arguments, message):
        arguments = dict(question="crash[k=1]", threshold=0.5) | arguments
        for form, env in ((VetoAction, Toy()), (VecVetoAction, toys())):
            with pytest.raises(QAError, match=message):
                form(env, qa=qa, **arguments)

    def test_good_news(self):
        fine = Question("Will it stay upright for 3 steps after {action}?", always("upright", during=3), name="fine")
        far = Question("How far will {action} get it?", now("distance"), answer=Number(0, 1), name="far")
        qa = QuestionAnswerer.from_model(make_model(toys(), questions=[fine, far]))
        with pytest.raises(
            QAError,
            match=r"'fine', where yes is good news; expected one where yes is the catastrophe; ask eventually\(\)",
        ):
            VetoAction(Toy(), "fine", 0.5, qa=qa)
        with pytest.raises(QAError, match="'far', answered by Number"):
            VetoAction(Toy(), "far", 0.5, qa=qa)
