"""The wrappers for gymnasium.vector: the same as the single forms and SB3's on the same trajectories, however the
environments reset themselves; infos as gymnasium makes them.
"""

import multiprocessing
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from wrapping import IGNORED, KEYS, VECTOR, Toy, assert_same, make_qa, run_gym_vec, run_single, run_vec, toys

import sb3_qa.wrappers as sb3
from sb3_qa import QAError
from sb3_qa.wrappers import vector

WEIGHTS = {"danger": -2.0, "speed": 0.5, "crash[k=1]": -1.0}
POTENTIAL = dict(rewards={"danger": -2.0, "speed": 0.5}, mode="potential", gamma=0.9)
ACTIONS = np.random.default_rng(3).integers(3, size=(23, 3))  # 23 steps of three environments: four episodes and a bit
MODES = list(AutoresetMode)
ENVS = 3


def looking(obs, action):
    """An on_veto that is called for no environment that ignores its action."""
    assert obs.shape == VECTOR.shape
    assert action in (0, 1, 2)
    return (action + 1) % 3


def product(told):
    return -told["danger"] * told["crash[k=3]"]


# name: (the class's name in every module, arguments)
WRAPPERS = {
    "answer all": ("AnswerQuestions", {}),
    "answer about states": ("AnswerQuestions", dict(questions=["lane", "danger"])),
    "add": ("ShapeReward", dict(rewards=WEIGHTS)),
    "replace": ("ShapeReward", dict(rewards=WEIGHTS, mode="replace")),
    "potential": ("ShapeReward", POTENTIAL),
    "add callable": ("ShapeReward", dict(rewards=product)),
    "veto": ("VetoAction", dict(question="crash[k=3]", threshold=0.5)),
    "veto by policy": ("VetoAction", dict(question="crash[k=3]", threshold=0.5, on_veto="policy")),
    "veto by callable": ("VetoAction", dict(question="crash[k=3]", threshold=0.5, on_veto=looking)),
    "shadow": ("VetoAction", dict(question="crash[k=3]", threshold=0.5, shadow=True)),
    "penalty": ("VetoAction", dict(question="crash[k=1]", threshold=0.5, penalty=0.5)),
}


@pytest.fixture(scope="module")
def qa():
    return make_qa()


@pytest.fixture(scope="module")
def saved(qa, tmp_path_factory):
    path = tmp_path_factory.mktemp("answerer") / "toy.qa"
    qa.save(path)
    return str(path)


def unwrapped(env):
    return env


def sync(mode, wrap=unwrapped, n=ENVS, **arguments):
    """Environments whose episodes last 5, 6, ... steps, so that they do not end together."""
    made = [partial(lambda i: wrap(Toy(length=5 + i, **arguments)), i) for i in range(n)]
    return SyncVectorEnv(made, autoreset_mode=mode)


def alone(wrap, i):
    return run_single(wrap(Toy(length=5 + i)), ACTIONS[:, i], seed=7 + i)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(WRAPPERS))
def test_all_three_forms_agree(qa, name, mode):
    kind, arguments = WRAPPERS[name]
    each = run_gym_vec(getattr(vector, kind)(sync(mode), qa=qa, **arguments), ACTIONS)
    of_sb3 = run_vec(getattr(sb3, f"Vec{kind}")(toys(ENVS), qa=qa, **arguments), ACTIONS)
    resets = [sum(moment.before is None for moment in moments) for moments in each]
    assert resets == [5, 4, 4]
    for i, moments in enumerate(each):
        assert_same(alone(lambda toy: getattr(sb3, kind)(toy, qa=qa, **arguments), i), moments)
        assert_same(of_sb3[i], moments)
    if name.startswith("veto"):
        assert 3 < sum(moment.told["qa/vetoed"] for moments in each for moment in moments) < 60


@pytest.mark.parametrize("mode", MODES)
def test_nested_and_mixed_forms_agree(qa, mode):
    def single(toy):
        return sb3.AnswerQuestions(inner(toy), qa=qa)

    def inner(toy):
        return sb3.VetoAction(sb3.ShapeReward(toy, WEIGHTS, qa=qa), "crash[k=3]", 0.5, penalty=0.5, qa=qa)

    envs = vector.VetoAction(vector.ShapeReward(sync(mode), WEIGHTS, qa=qa), "crash[k=3]", 0.5, penalty=0.5, qa=qa)
    outside = run_gym_vec(vector.AnswerQuestions(envs, qa=qa), ACTIONS)
    mixed = run_gym_vec(vector.AnswerQuestions(sync(mode, inner), qa=qa), ACTIONS)
    for i in range(ENVS):
        moments = alone(single, i)
        assert any(moment.told["qa/vetoed"] for moment in moments)
        assert_same(moments, outside[i])
        assert_same(moments, mixed[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["answer all", "potential", "penalty"])
def test_infos_are_those_of_gymnasium_with_the_single_form_inside(qa, name, mode):
    """The same keys, masks, types and values, in infos and in final_info, at every call."""
    kind, arguments = WRAPPERS[name]
    outside = getattr(vector, kind)(sync(mode), qa=qa, **arguments)
    inside = sync(mode, lambda toy: getattr(sb3, kind)(toy, qa=qa, **arguments))
    _, infos = outside.reset(seed=7)
    _, others = inside.reset(seed=7)
    assert_same_infos(infos, others)
    n_final = 0
    for actions in ACTIONS:
        *_, terminated, truncated, infos = outside.step(actions)
        *_, others = inside.step(actions)
        assert_same_infos(infos, others)
        n_final += "final_info" in infos
        done = terminated | truncated
        if mode is AutoresetMode.DISABLED and done.any():
            assert_same_infos(*(envs.reset(options={"reset_mask": done})[1] for envs in (outside, inside)))
    assert n_final == (0 if mode is not AutoresetMode.SAME_STEP else 10)  # steps 5, 10, 15, 20; 6, 12, 18; 7, 14, 21


def assert_same_infos(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_infos(value, b[key])
        elif key in ("final_obs",):
            assert len(value) == len(b[key])
        else:
            assert value.dtype == b[key].dtype, key
            np.testing.assert_allclose(value, b[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("mode", MODES)
def test_environments_in_processes_of_their_own(saved, mode):
    """Outside of them, and inside with the answerer of a path."""
    made = [partial(answering, saved, i) for i in range(2)]
    envs = AsyncVectorEnv(made, context="fork", autoreset_mode=mode)
    try:
        each = run_gym_vec(vector.VetoAction(envs, "crash[k=3]", 0.5, qa=saved), ACTIONS[:, :2])
    finally:
        envs.close()
    for i, moments in enumerate(each):
        single = partial(sb3.VetoAction, question="crash[k=3]", threshold=0.5, qa=saved)
        assert_same(alone(lambda toy, single=single: single(sb3.AnswerQuestions(toy, qa=saved)), i), moments)


def answering(path, i):
    return sb3.AnswerQuestions(Toy(length=5 + i), qa=path)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_one_memory_for_all_observations(qa, shared_memory):
    """With copy=False the next observations are written over the last."""
    made = [partial(Toy, length=5 + i) for i in range(ENVS)]
    envs = AsyncVectorEnv(made, copy=False, shared_memory=shared_memory, context="fork")
    try:
        each = run_gym_vec(vector.AnswerQuestions(vector.ShapeReward(envs, **POTENTIAL, qa=qa), qa=qa), ACTIONS)
    finally:
        envs.close()
    for i, moments in enumerate(each):
        assert_same(alone(lambda toy: sb3.AnswerQuestions(sb3.ShapeReward(toy, **POTENTIAL, qa=qa), qa=qa), i), moments)


@pytest.mark.parametrize("mode", MODES)
def test_observations_in_a_dict(mode):
    space = spaces.Dict({"near": VECTOR, "far": spaces.Box(-10, 10, (2,), np.float32)})
    qa = make_qa("MultiInputPolicy", observation_space=space)
    envs = sync(mode, observation_space=space)
    each = run_gym_vec(vector.VetoAction(vector.AnswerQuestions(envs, qa=qa), "crash[k=3]", 0.5, qa=qa), ACTIONS)
    for i, moments in enumerate(each):
        env = sb3.AnswerQuestions(Toy(length=5 + i, observation_space=space), qa=qa)
        assert_same(run_single(sb3.VetoAction(env, "crash[k=3]", 0.5, qa=qa), ACTIONS[:, i], seed=7 + i), moments)


@pytest.mark.parametrize("mode", MODES)
def test_continuous_actions(mode):
    """Candidates are drawn at random, so only what must hold of every draw is looked at."""
    space = spaces.Box(-1, 1, (2,), np.float32)
    qa = make_qa(action_space=space)
    envs = vector.AnswerQuestions(
        vector.VetoAction(sync(mode, action_space=space), "crash[k=1]", 0.4, qa=qa), ["crash[k=1]"], qa=qa
    )
    actions = np.random.default_rng(1).uniform(-1, 1, (23, ENVS, 2)).astype(np.float32)
    n_vetoed = 0
    for moments in run_gym_vec(envs, actions, ignored=np.full(2, np.nan, np.float32)):
        for moment in moments:
            if moment.before is None:
                assert np.isnan(moment.told["qa/executed_action"]).all()
                continue
            executed = moment.told["qa/executed_action"]
            np.testing.assert_array_equal(executed, moment.info["did"])
            expected = qa.ask("crash[k=1]", moment.before, executed).probability
            assert moment.told["qa/crash[k=1]"] == pytest.approx(expected, rel=1e-4)
            assert moment.told["qa/vetoed"] == bool((executed != moment.action).any())
            n_vetoed += moment.told["qa/vetoed"]
    assert n_vetoed > 3


@pytest.mark.parametrize("mode", MODES)
def test_nobody_is_asked_what_to_do_where_the_action_is_ignored(qa, mode):
    """on_veto may be a person: of the last state of an episode there is nothing to decide."""
    asked = []
    envs = vector.VetoAction(sync(mode), "crash[k=3]", 0.0, lambda obs, action: asked.append(obs) or action, qa=qa)
    envs.reset(seed=7)
    expected, resetting = 0, np.zeros(ENVS, bool)
    for _ in range(12):
        expected += (~resetting).sum()
        *_, terminated, truncated, _ = envs.step(np.full(ENVS, IGNORED) * resetting)
        done = terminated | truncated
        resetting = done & (mode is AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.DISABLED and done.any():
            envs.reset(options={"reset_mask": done})
    assert (
        len(asked) == expected == (36 if mode is not AutoresetMode.NEXT_STEP else 36 - 4)
    )  # resets: steps 6, 12; 7; 8


class TestBinding:
    def test_without_an_answerer_a_step_is_refused(self):
        envs = vector.AnswerQuestions(sync(AutoresetMode.NEXT_STEP))
        envs.reset(seed=0)
        with pytest.raises(QAError, match=r"AnswerQuestions has no answerer yet; .* pass qa="):
            envs.step(ACTIONS[0])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_step_may_pass_and_be_bound_later(self, qa, mode):
        envs = vector.ShapeReward(sync(mode), **POTENTIAL, unbound="pass")
        bare, passed = run_gym_vec(sync(mode), ACTIONS[:7]), run_gym_vec(envs, ACTIONS[:7])
        for i in range(ENVS):
            assert [moment.reward for moment in bare[i]] == [moment.reward for moment in passed[i]]
            assert not any(moment.told for moment in passed[i])
        envs.bind(qa)
        obs, *_ = envs.reset(seed=3)
        before = -2.0 * qa.ask("danger", obs).value + 0.5 * qa.ask("speed", obs).value
        obs, rewards, *_, infos = envs.step(ACTIONS[0])
        after = -2.0 * qa.ask("danger", obs).value + 0.5 * qa.ask("speed", obs).value
        np.testing.assert_allclose(infos["qa/shaping_reward"], 0.9 * after - before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rewards, infos["qa/raw_reward"] + infos["qa/shaping_reward"], rtol=1e-5)

    def test_bound_in_the_last_step_of_an_episode_the_next_ignores_the_action(self, qa):
        envs = vector.VetoAction(sync(AutoresetMode.NEXT_STEP), "crash[k=3]", 0.0, unbound="pass")
        envs.reset(seed=0)
        while not any(over := np.logical_or(*envs.step(np.zeros(ENVS, int))[2:4])):
            pass
        envs.bind(qa)
        infos = envs.step(np.zeros(ENVS, int))[4]
        np.testing.assert_array_equal(infos["qa/executed_action"] == -1, over)
        np.testing.assert_array_equal(infos["qa/catastrophe"], ~over)

    @pytest.mark.parametrize("masked", [False, True])
    def test_after_a_reset_by_hand_no_action_is_ignored(self, qa, masked):
        envs = vector.VetoAction(sync(AutoresetMode.NEXT_STEP), "crash[k=3]", 0.0, qa=qa)
        envs.reset(seed=0)
        while not any(over := np.logical_or(*envs.step(np.zeros(ENVS, int))[2:4])):
            pass
        _, infos = envs.reset(options={"reset_mask": over}) if masked else envs.reset()
        np.testing.assert_array_equal(infos["_qa/risk"], over if masked else np.ones(ENVS, bool))
        infos = envs.step(np.zeros(ENVS, int))[4]
        assert (infos["qa/executed_action"] == infos["did"]).all() and infos["qa/catastrophe"].all()

    def test_what_is_bound_after_a_reset_is_told_in_its_infos(self, qa):
        envs = vector.AnswerQuestions(sync(AutoresetMode.NEXT_STEP), KEYS[2:4])
        obs, infos = envs.reset(seed=0)
        assert not any(key.startswith("qa/") for key in infos)
        envs.bind(qa)
        np.testing.assert_allclose(infos["qa/speed"], qa.ask("speed", obs).value, rtol=1e-5)
        assert infos["_qa/speed"].all()

    @pytest.mark.parametrize("seed", [5, [5, 6, 7]])
    def test_a_seed_begins_the_random_draws_again(self, seed):
        space = spaces.Box(-1, 1, (2,), np.float32)
        qa = make_qa(action_space=space)
        envs = vector.VetoAction(sync(AutoresetMode.NEXT_STEP, action_space=space), "crash[k=1]", 0.0, qa=qa)
        did = []
        for _ in range(2):
            envs.reset(seed=seed)
            did.append(envs.step(np.zeros((ENVS, 2), np.float32))[4]["qa/executed_action"])
        np.testing.assert_array_equal(*did)


class TestRefused:
    def test_other_observations_and_actions(self, saved):
        with pytest.raises(
            QAError, match=r"AnswerQuestions sees Box\(.*\(5,\), float32\) but its answerer's policy sees"
        ):
            vector.AnswerQuestions(
                sync(AutoresetMode.NEXT_STEP, observation_space=spaces.Box(-10, 10, (5,), np.float32)), qa=saved
            )
        with pytest.raises(QAError, match=r"has the action space Discrete\(4\) but its answerer's is Discrete\(3\)"):
            vector.AnswerQuestions(sync(AutoresetMode.NEXT_STEP, action_space=spaces.Discrete(4)), qa=saved)

    def test_no_word_of_how_environments_reset_themselves(self, qa):
        envs = sync(AutoresetMode.NEXT_STEP)
        del envs.metadata["autoreset_mode"]
        with pytest.raises(
            QAError, match=r'whose metadata\["autoreset_mode"\] is None; expected .* AutoresetMode.NEXT_STEP'
        ):
            vector.AnswerQuestions(envs, qa=qa)

    def test_same_step_without_last_observations(self, qa):
        class Forgets(gym.vector.VectorWrapper):
            def step(self, actions):
                *given, infos = self.env.step(actions)
                return *given, {key: value for key, value in infos.items() if "final" not in key}

        envs = vector.AnswerQuestions(Forgets(sync(AutoresetMode.SAME_STEP)), qa=qa)
        with pytest.raises(QAError, match=r'without infos\["final_obs"\]; expected the last observation there'):
            run_gym_vec(envs, ACTIONS)

    def test_another_kind_of_environment(self, qa):
        envs = sync(AutoresetMode.NEXT_STEP)
        for make, env, mend in (
            (vector.VetoAction, Toy(), "sb3_qa.wrappers.VetoAction"),
            (vector.VetoAction, toys(), "sb3_qa.wrappers.VecVetoAction"),
            (sb3.VetoAction, envs, "sb3_qa.wrappers.vector.VetoAction"),
            (sb3.VetoAction, toys(), "sb3_qa.wrappers.VecVetoAction"),
            (sb3.VecVetoAction, envs, "sb3_qa.wrappers.vector.VetoAction"),
            (sb3.VecVetoAction, Toy(), "sb3_qa.wrappers.VetoAction"),
        ):
            with pytest.raises(QAError, match=f"VetoAction got a .*; expected .*; wrap it in {mend}(,|$)"):
                make(env, "crash[k=3]", 0.5, qa=qa)

    def test_an_answerer_that_saw_normalised_observations(self, qa):
        normalized = make_qa()
        normalized.normalized = True
        with pytest.raises(QAError, match="normalised by VecNormalize, and this environment has none inside"):
            vector.AnswerQuestions(sync(AutoresetMode.NEXT_STEP), qa=normalized)


def test_no_process_is_left_behind():
    assert not multiprocessing.active_children()
