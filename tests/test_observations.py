"""Wrappers that change what the policy sees, around and inside the question-answering ones, in every order.

Each order either tells what the answerer says of what the policy saw, or is refused with the order that works.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from wrapping import (
    BOTH,
    IMAGE,
    KEYS,
    QUESTIONS,
    VECTOR,
    Toy,
    Witness,
    answer,
    assert_same,
    copied,
    make_model,
    run_vec,
    toys,
)

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.evaluation import run_episodes
from sb3_qa.truth import eventually, now
from sb3_qa.wrappers import (
    AnswerQuestions,
    ShapeReward,
    VecAnswerQuestions,
    VecShapeReward,
    VecVetoAction,
    VetoAction,
    qa_wrappers,
)

WEIGHTS = {"danger": -1.0, "crash[k=1]": -0.5}
LARGE = spaces.Box(0, 255, (37, 36, 3), np.uint8)
SPACES = {"vector": VECTOR, "image": IMAGE, "large image": LARGE, "dict": BOTH}
ACTIONS = np.random.default_rng(3).integers(3, size=(13, 2))


def qa(env, **arguments):
    """All of the vector forms, outside ``env``."""
    env = VecShapeReward(env, WEIGHTS, **arguments)
    return VecAnswerQuestions(VecVetoAction(env, "crash[k=3]", 0.4, **arguments), **arguments)


def normalize(env, **arguments):
    keys = ["vector"] if hasattr(env.observation_space, "spaces") else None
    return VecNormalize(env, norm_obs_keys=keys, **arguments)


def normalize_rewards(env):
    return VecNormalize(env, norm_obs=False)


def stack(env):
    return VecFrameStack(env, 2)


transpose = VecTransposeImage


class Diary(gym.Wrapper):
    """Tells what the environment itself gave."""

    def reset(self, **arguments):
        obs, info = self.env.reset(**arguments)
        return obs, {**info, "own": (copied(obs), 0.0)}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "own": (copied(obs), reward)}


def nest(order, kind):
    """The environment of an order, from the outside in: "stack(qa(env))" or, with the single forms, "stack(qa env)"."""

    space = SPACES[kind]

    def single(toy):
        return AnswerQuestions(VetoAction(ShapeReward(toy, WEIGHTS), "crash[k=3]", 0.4))

    names = {
        "qa": qa,
        "normalize": normalize,
        "normalize_rewards": normalize_rewards,
        "stack": stack,
        "transpose": transpose,
    }
    names |= {
        "monitor": VecMonitor,
        "env": toys(2, Diary, observation_space=space),
        "qa_env": toys(2, lambda toy: single(Diary(toy)), observation_space=space),
    }
    return eval(order, names)


class Flat(BaseFeaturesExtractor):
    """All parts of a dict, one after the other: the images are too small for SB3's own."""

    def __init__(self, space):
        super().__init__(space, sum(int(np.prod(part.shape)) for part in space.values()))

    def forward(self, obs):
        return torch.cat([part.flatten(1) for part in obs.values()], dim=1)


def make(order, kind, questions=QUESTIONS):
    base = {"dict": "MultiInputPolicy", "large image": "CnnPolicy"}.get(kind, "MlpPolicy")
    more = dict(policy_kwargs=dict(features_extractor_class=Flat)) if kind == "dict" else {}
    return make_model(nest(order, kind), base, questions, **more)


WORKS = [
    ("vector", "qa(env)"),
    ("vector", "qa_env"),
    ("vector", "monitor(qa(env))"),
    ("vector", "qa(monitor(env))"),
    ("vector", "qa(normalize(env))"),
    ("vector", "monitor(qa(normalize(env)))"),
    ("vector", "qa(normalize_rewards(env))"),
    ("vector", "normalize_rewards(qa(env))"),
    ("vector", "normalize_rewards(qa_env)"),
    ("vector", "normalize_rewards(qa(normalize(env)))"),
    ("vector", "qa(stack(env))"),
    ("vector", "qa(stack(normalize(env)))"),
    ("vector", "qa(normalize(stack(env)))"),
    ("image", "qa(env)"),
    ("image", "qa_env"),
    ("image", "qa(transpose(env))"),
    ("image", "transpose(qa(env))"),
    ("image", "transpose(qa_env)"),
    ("image", "qa(stack(env))"),
    ("image", "transpose(qa(stack(env)))"),
    ("image", "qa(transpose(stack(env)))"),
    ("image", "qa(stack(transpose(env)))"),
    ("image", "qa(normalize(env))"),
    ("image", "qa(normalize(transpose(env)))"),
    ("image", "normalize_rewards(qa(env))"),
]
LARGE_IMAGES = [("large image", order) for order in ("qa(env)", "transpose(qa(stack(env)))")]
DICTS = [
    ("dict", "qa(env)"),
    ("dict", "qa_env"),
    ("dict", "qa(transpose(env))"),
    ("dict", "transpose(qa(env))"),
    ("dict", "qa(normalize(env))"),
    ("dict", "transpose(qa(normalize(env)))"),
    ("dict", "qa(normalize(transpose(env)))"),
    ("dict", "qa(stack(env))"),
    ("dict", "qa(stack(normalize(env)))"),
]


@pytest.mark.parametrize(("kind", "order"), WORKS + LARGE_IMAGES + DICTS)
def test_what_is_told_is_about_what_the_policy_saw(kind, order):
    model = make(order, kind)
    live = QuestionAnswerer.from_model(model)
    witness = Witness(live)
    model.learn(64, [QACallback(), witness])
    assert (witness.n_steps, witness.n_ended) == (32, 11)
    infos = [info for step in witness.infos for info in step]
    for info in infos:
        assert info["did"] == info["qa/executed_action"]
    assert 3 < sum(info["qa/vetoed"] for info in infos) < 60
    # The answers do tell states apart.
    assert np.std([info["qa/danger"] for info in infos]) > 1e-3
    wrappers = [wrapper for wrapper, _ in qa_wrappers(model.get_env())]
    assert len(wrappers) == (6 if "qa_env" in order else 3)
    assert all(wrapper.rule.qa is not None for wrapper in wrappers)


MORE = [
    ("vector", "qa(normalize_rewards(qa(env)))"),
    ("vector", "qa(normalize_rewards(qa_env))"),
    ("vector", "normalize_rewards(stack(normalize(env)))"),
    ("image", "stack(transpose(env))"),
    ("image", "normalize(stack(transpose(env)))"),
    ("dict", "stack(transpose(normalize(env)))"),
]


@pytest.mark.parametrize(("kind", "order"), WORKS + LARGE_IMAGES + DICTS + MORE)
def test_facts_are_about_what_the_environment_gives(kind, order, tmp_path, caplog):
    """Rewards before any shaping and normalisation, observations before every wrapper; of stacked ones the newest frame is last."""
    arrived = []

    def own(step):
        obs, reward = step.info["own"]
        assert step.reward == pytest.approx(reward, rel=1e-5)
        for seen, given in zip(*([x.values() if isinstance(x, dict) else [x] for x in (step.obs, obs)]), strict=True):
            np.testing.assert_allclose(seen[..., -given.shape[-1] :], given, rtol=1e-4, atol=1e-3)
        arrived.append(step)
        return False

    model = make(
        order, kind, [*QUESTIONS, Question("Is it its own, after {action}?", eventually(own, within=1), name="own")]
    )
    model.learn(64, QACallback())
    assert len(arrived) == 2 * 32 + 2 + 11  # steps, and first states
    env, live = model.get_env(), QuestionAnswerer.from_model(model)
    assert run_episodes(model, env, 4, catastrophe=own).catastrophes.sum() == 0
    arrived.clear()
    recorded = VecVetoAction(env, "own", 0.5, qa=live, record=tmp_path / "flight.sqlite")
    recorded.reset()
    for _ in range(7):
        recorded.step(np.ones(2, np.int64))
    assert len(arrived) == 14
    assert not caplog.text


@pytest.mark.parametrize(("strike", "n_lost"), [(3, 0), (40, 1)])
def test_what_is_rare_is_seen_though_normalised_observations_are_clipped(strike, n_lost, caplog):
    """Of the last state of an episode VecNormalize keeps nothing: that it was clipped is said."""

    class Struck(gym.Wrapper):
        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            struck = self.env._steps == strike
            return np.float32([0, 0, 0, struck]), reward, terminated, truncated, {**info, "struck": struck}

    arrived = []
    read = Question("Struck?", now(lambda step: arrived.append(step) or bool(step.obs[3] > 0.5)), name="struck")
    env = VecNormalize(DummyVecEnv([lambda: Struck(Toy(length=40))]), clip_obs=2.0)
    env.obs_rms.var[:], env.obs_rms.count = 1e-4, 1e9  # what has hardly ever been anything else
    make_model(env, questions=[read]).learn(64, QACallback())
    right = [bool(step.obs[3] > 0.5) == step.info["struck"] for step in arrived if "struck" in step.info]
    assert len(right) == 64 and right.count(False) == n_lost
    assert caplog.text.count("VecNormalize has clipped the last observation") == n_lost


@pytest.mark.parametrize(
    ("kind", "order"), [("image", "transpose(qa(env))"), ("image", "qa(env)"), ("vector", "qa(normalize(env))")]
)
def test_first_states_are_told_of_inside_other_wrappers(kind, order):
    """SB3's own wrappers do not pass reset_infos on; the wrapper has them."""
    model = make(order, kind)
    model.learn(32, QACallback())
    outermost, _ = next(qa_wrappers(model.get_env()))
    obs = model.get_env().reset()
    live = QuestionAnswerer.from_model(model)
    for i, info in enumerate(outermost.reset_infos):
        for key in ("danger", "speed"):
            expected = live.ask(key, obs).value[i]
            assert info[f"qa/{key}"] == pytest.approx(expected, rel=1e-4)


REFUSED = [
    # (kind, order, what it stands inside, what to write)
    ("vector", "normalize(qa(env))", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("vector", "normalize(qa_env)", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("vector", "monitor(normalize(monitor(qa(env))))", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("vector", "normalize(qa(stack(env)))", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("vector", "stack(qa(env))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("vector", "stack(qa_env)", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("vector", "stack(qa(normalize(env)))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("vector", "stack(normalize(qa(env)))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("image", "normalize(qa(env))", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("image", "stack(qa(env))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("image", "stack(transpose(qa(env)))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("image", "transpose(stack(qa_env))", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
    ("dict", "normalize(qa(env))", "VecNormalize", r"VecShapeReward\(VecNormalize\(env\), ...\)"),
    ("dict", "stack(qa_env)", "VecFrameStack", r"VecShapeReward\(VecFrameStack\(env, ...\), ...\)"),
]


@pytest.mark.parametrize(("kind", "order", "outer", "mend"), REFUSED)
def test_an_order_that_would_show_other_observations_is_refused(kind, order, outer, mend):
    model = make(order, kind)
    name = "ShapeReward" if "qa_env" in order else "VecShapeReward"
    with pytest.raises(QAError, match=rf"^{name} stands inside {outer}, .* expected the same; put it outside: {mend}$"):
        model.learn(32, QACallback())


def test_only_the_wrapper_further_in_is_refused():
    env = VecAnswerQuestions(VecNormalize(VecVetoAction(nest("env", "vector"), "crash[k=3]", 0.5)))
    with pytest.raises(QAError, match="^VecVetoAction stands inside VecNormalize"):
        make_model(env).learn(32, QACallback())


class TestGymnasiumWrappers:
    """Around the single forms; what changes observations goes inside, whether or not their space stays."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda env: gym.wrappers.TransformObservation(env, lambda obs: obs / 2, env.observation_space),
            lambda env: gym.wrappers.RescaleObservation(env, np.float32(-1), np.float32(1)),
            lambda env: gym.wrappers.NormalizeObservation(env),
            lambda env: gym.wrappers.FrameStackObservation(env, 2),
            lambda env: gym.wrappers.TimeAwareObservation(gym.wrappers.TimeLimit(env, 100)),
        ],
    )
    def test_what_changes_observations(self, change):
        outside = DummyVecEnv([lambda: change(AnswerQuestions(Toy()))])
        name = type(outside.envs[0]).__name__
        model = make_model(outside)
        mend = rf"put it outside: AnswerQuestions\({name}\(env, ...\), ...\)$"
        with pytest.raises(QAError, match=rf"^AnswerQuestions stands inside {name}, .*{mend}"):
            model.learn(32, QACallback())
        witness = Witness()
        make_model(DummyVecEnv([lambda: AnswerQuestions(change(Toy()))])).learn(32, [QACallback(), witness])
        assert witness.n_steps == 32

    def test_what_leaves_them(self):
        def make():
            return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(AnswerQuestions(Toy()), 4))

        witness = Witness()
        make_model(DummyVecEnv([make])).learn(32, [QACallback(), witness])
        assert (witness.n_steps, witness.n_ended) == (32, 8)


class TestFrozen:
    """A saved answerer is put where it sees what it learnt from, and refused elsewhere when the wrapper is made."""

    @pytest.mark.parametrize(
        ("kind", "order", "place"),
        [
            ("vector", "normalize(env)", "normalize(env)"),
            ("vector", "stack(env)", "stack(env)"),
            ("vector", "normalize(stack(env))", "stack(normalize(env))"),
            ("vector", "normalize_rewards(env)", "env"),
            ("image", "env", "env"),
            ("image", "env", "transpose(env)"),
            ("image", "transpose(env)", "env"),
            ("image", "stack(env)", "transpose(stack(env))"),
            ("dict", "normalize(env)", "transpose(normalize(env))"),
        ],
    )
    def test_told_answers_are_those_about_what_it_sees(self, tmp_path, kind, order, place):
        QuestionAnswerer.from_model(make(order, kind)).save(tmp_path / "saved.qa")
        frozen = QuestionAnswerer.load(tmp_path / "saved.qa", classes=[Flat])
        env = VecVetoAction(VecShapeReward(nest(place, kind), WEIGHTS, qa=frozen), "crash[k=3]", 0.4, qa=frozen)
        for moments in run_vec(VecAnswerQuestions(env, qa=frozen), ACTIONS):
            for moment in moments:
                for key in KEYS:
                    assert moment.told[f"qa/{key}"] == pytest.approx(answer(frozen, key, moment), rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize(("kind", "order"), [("image", "env"), ("dict", "env")])
    def test_single_and_vector_forms_agree(self, kind, order):
        live = QuestionAnswerer.from_model(make(order, kind))

        def single(toy):
            return AnswerQuestions(VetoAction(ShapeReward(toy, WEIGHTS, qa=live), "crash[k=3]", 0.4, qa=live), qa=live)

        within = run_vec(toys(2, single, observation_space=SPACES[kind]), ACTIONS)
        around = run_vec(qa(nest("env", kind), qa=live), ACTIONS)
        for left, right in zip(within, around, strict=True):
            assert_same(left, right)

    @pytest.mark.parametrize(
        ("order", "place", "message"),
        [
            (
                "normalize(env)",
                "env",
                r"answerer of VecAnswerQuestions learnt from observations normalised by VecNormalize, and this environment has none "
                r"inside; .* wrap VecAnswerQuestions\(VecNormalize.load\(path, env\), qa=...\)",
            ),
            (
                "normalize(env)",
                "normalize_rewards(env)",
                r"learnt from observations normalised by VecNormalize, and this environment has none",
            ),
            (
                "env",
                "normalize(env)",
                r"sees observations normalised by VecNormalize but its answerer learnt from raw ones; .* wrap the other way round: "
                r"VecNormalize\(VecAnswerQuestions\(env, ...\)\)",
            ),
            (
                "stack(env)",
                "env",
                r"sees Box\(.*\(4,\), float32\) but its answerer's policy sees Box\(.*\(8,\), float32\); .* put VecAnswerQuestions "
                r"outside the wrapper that changes observations \(VecFrameStack",
            ),
            (
                "env",
                "stack(env)",
                r"sees Box\(.*\(8,\), float32\) but its answerer's policy sees Box\(.*\(4,\), float32\)",
            ),
        ],
    )
    def test_elsewhere(self, tmp_path, order, place, message):
        QuestionAnswerer.from_model(make(order, "vector")).save(tmp_path / "saved.qa")
        with pytest.raises(QAError, match=message):
            VecAnswerQuestions(nest(place, "vector"), qa=tmp_path / "saved.qa")

    def test_the_single_form_sees_nothing_normalised(self):
        live = QuestionAnswerer.from_model(make("normalize(env)", "vector"))
        with pytest.raises(QAError, match=r"wrap VecVetoAction\(VecNormalize.load\(path, env\), qa=...\)"):
            VetoAction(Toy(), "crash[k=3]", 0.5, qa=live)

    @pytest.mark.parametrize("form", ["vector", "single"])
    def test_one_that_learnt_from_raw_observations_may_stay_inside(self, tmp_path, form):
        """It is asked about what it sees, whatever the policy sees that is trained around it."""
        QuestionAnswerer.from_model(make("env", "vector")).save(tmp_path / "saved.qa")
        frozen = QuestionAnswerer.load(tmp_path / "saved.qa")
        if form == "vector":
            inside = VecAnswerQuestions(nest("env", "vector"), qa=frozen)
        else:
            inside = toys(2, lambda toy: AnswerQuestions(toy, qa=frozen))
        env = VecNormalize(inside)

        class Raw(Witness):
            def _on_step(self):
                raw, dones = env.get_original_obs(), self.locals["dones"]
                for i, info in enumerate(self.locals["infos"]):
                    if not dones[i]:
                        assert info["qa/danger"] == pytest.approx(frozen.ask("danger", raw).value[i], rel=1e-4)
                        self.n_steps += 1
                return True

        raw = Raw()
        make_model(env).learn(64, [QACallback(), raw])
        assert raw.n_steps == 64 - 11


class Halve(VecEnvWrapper):
    """Changes values and leaves the space."""

    def reset(self):
        return self.venv.reset() / 2

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs / 2, rewards, dones, infos


def test_a_wrapper_of_ones_own_that_changes_values_only():
    with pytest.raises(QAError, match="stands inside Halve"):
        make_model(Halve(VecAnswerQuestions(nest("env", "vector")))).learn(32, QACallback())
