"""The tasks of the study: each loads, tells the facts of its questions, trains, and has an oracle that is exact."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env

from sb3_qa import QAError
from sb3_qa.callbacks import QACallback
from sb3_qa.evaluation import run_episodes
from sb3_qa.policies import qa_policy
from sb3_qa.questions import Catalogue
from sb3_qa.study.oracle import Counterfactuals, OracleVeto, deep_copy, oracle_vec_env
from sb3_qa.study.task import Task, load_task, task_names
from sb3_qa.truth import Step
from sb3_qa.wrappers.shell import plain

NEEDS = {  # beside what the tests install
    "highway": ["envpool", "highway_env"],
    "hopper": ["mujoco"],
    "hopper_sac": ["mujoco"],
    "lava": ["minigrid"],
    "microrts": ["jpype", "gym_microrts"],
    "microrts_light": ["jpype", "gym_microrts"],
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Box observation space m.* value is -?infinity.*"),
    pytest.mark.filterwarnings("ignore:Your observation  has an unconventional shape"),
]


@pytest.fixture(params=task_names())
def task(request: pytest.FixtureRequest) -> Task:
    for module in NEEDS.get(request.param, []):
        pytest.importorskip(module)
    return load_task(request.param)


def masks_of(env: gym.Env[Any, Any]) -> dict[str, Any]:
    return {"action_masks": env.get_wrapper_attr("action_masks")()} if env.has_wrapper_attr("action_masks") else {}


class Walk:
    """Acts at random, and deterministically so: a function of what it sees."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space

    def predict(
        self,
        obs: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[NDArray[Any], Any]:
        return np.stack(
            [self.one(each, masks) for each, masks in zip(obs, _each(action_masks, obs), strict=True)]
        ), None

    def one(self, obs: Any, mask: Any = None) -> Any:
        seed = int(np.abs(np.asarray(obs, np.float64)).sum() * 1e6) % 2**31
        self.space.seed(seed)
        if mask is None:
            return plain(np.asarray(self.space.sample()))
        return int(np.random.default_rng(seed).choice(np.flatnonzero(mask)))


def _each(masks: Any, obs: Any) -> Any:
    return [None] * len(obs) if masks is None else masks


def test_environment_keeps_to_the_interfaces(task: Task) -> None:
    check_env(task.make())


def test_questions_are_ten_to_twenty_instances_and_the_task_names_them(task: Task) -> None:
    instances = Catalogue(task.questions).instances
    assert 10 <= len(instances) <= 20
    assert instances[task.risk].per_action
    assert set(task.reward) <= set(instances)
    assert {question.truth.operator for question in task.questions} >= {"now", "after", "eventually", "steps_until"}


def test_facts_are_told_at_every_step_and_at_the_reset(task: Task) -> None:
    env = task.make()
    obs, info = env.reset(seed=3)
    walk = Walk(env.action_space)
    steps = [Step(obs, None, 0.0, False, False, info)]
    for _ in range(40):
        action = walk.one(obs, masks_of(env).get("action_masks"))
        obs, reward, terminated, truncated, info = env.step(action)
        steps.append(Step(obs, action, float(reward), terminated, truncated, info))
        if terminated or truncated:
            obs, info = env.reset(seed=4)
            steps.append(Step(obs, None, 0.0, False, False, info))
    if task.name == "highway":  # the Python environment's reset tells nothing but speed and crashed
        assert {"speed", "crashed"} <= set(steps[0].info)
    for step in steps:
        assert isinstance(step.info[task.catastrophe], (bool, np.bool_)) if isinstance(task.catastrophe, str) else True
        for question in task.questions:
            fact = question.truth.fact
            value = fact(step) if callable(fact) else step.info[fact]
            assert value is not None
            if hasattr(question.answer, "low"):
                assert np.isfinite(value)
            elif hasattr(question.answer, "options") and isinstance(value, str):
                assert value in question.answer.options


def test_a_little_of_the_training_answers_every_question(task: Task) -> None:
    task = task.quickly()
    hyper = {**task.hyperparameters}
    if "n_steps" in hyper:
        hyper |= dict(n_steps=32, batch_size=64)  # no question looks further
    model = task.algorithm(
        qa_policy(task.algorithm, task.policy),
        task.training_env(0),
        seed=0,
        device="cpu",
        policy_kwargs={**task.policy_kwargs, **task.qa_kwargs, "questions": list(task.questions)},
        **hyper,
    )
    before = [p.detach().clone() for p in model.policy.qa_head.parameters()]
    model.learn(max(32 * task.n_envs, 256), callback=QACallback())
    assert any(
        not np.array_equal(p.detach(), b) for p, b in zip(model.policy.qa_head.parameters(), before, strict=True)
    )


def test_a_counterfactual_of_the_action_then_taken_is_what_happens(task: Task) -> None:
    oracle = task.oracle
    if not isinstance(oracle, Counterfactuals):
        pytest.skip("a risk in closed form")
    env = task.make()
    walk = Walk(env.action_space)
    seen: list[tuple[Any, float, bool]] = []
    obs, _ = env.reset(seed=1)
    for t in range(30):
        action = walk.one(obs, masks_of(env).get("action_masks"))
        clone, ahead, then = oracle.clone(env), [], action
        for _ in range(5):  # the clone goes on, and nothing of it is felt in the environment
            clone_obs, reward, terminated, truncated, _ = clone.step(then)
            ahead.append((np.array(clone_obs), float(reward), terminated))
            if terminated or truncated:
                break
            then = walk.one(clone_obs, masks_of(clone).get("action_masks"))
        seen.append((t, ahead))  # type: ignore[arg-type]
        obs, reward, terminated, truncated, _ = env.step(action)
        for then_t, promised in seen:  # type: ignore[misc]
            if t - then_t < len(promised):
                want = promised[t - then_t]
                assert np.array_equal(want[0], obs) and want[1] == float(reward) and want[2] == terminated
        if terminated or truncated:
            seen = []
            obs, _ = env.reset(seed=2 + t)


def test_the_oracle_knows_what_comes_of_the_action(task: Task) -> None:
    """Risks of an oracle that knows the future are 0 or 1 for a deterministic agent, and come true."""
    oracle = task.oracle
    if oracle is None:
        pytest.skip("no oracle")
    env = task.make()
    walk = Walk(env.action_space)
    obs, _ = env.reset(seed=5)
    for t in range(60 if task.name != "highway" else 15):
        action = walk.one(obs, masks_of(env).get("action_masks"))
        (risk,) = oracle(env, walk, np.asarray(action)[None], True)
        assert 0.0 <= risk <= 1.0
        obs, _, terminated, truncated, info = env.step(action)
        if info[task.catastrophe]:  # type: ignore[index]
            assert risk > 0
        if risk == 0.0:
            assert not info[task.catastrophe]  # type: ignore[index]
        if terminated or truncated:
            obs, _ = env.reset(seed=6 + t)


def test_the_oracles_veto_averts_what_can_be_averted_and_tells_so() -> None:
    cliff = load_task("cliff")
    agent = Walk(spaces.Discrete(4))
    before = run_episodes(agent, cliff.evaluation_env(0), 8, catastrophe=cliff.catastrophe)
    venv = oracle_vec_env(cliff, agent, 2, seed=0, threshold=0.1)
    episodes = run_episodes(agent, venv, 8, catastrophe=cliff.catastrophe)
    assert before.catastrophes.sum() > 8 and episodes.catastrophes.sum() == 0
    assert episodes.vetoes.sum() > 8
    assert all(((trace.risk >= 0.1) == trace.flagged).all() for trace in episodes.traces)
    assert {round(float(risk), 3) for trace in episodes.traces for risk in trace.risk} == {0.0, 0.333}


class Fuse(gym.Env[NDArray[np.float32], int]):
    """Action 1 lights a fuse that burns for two steps; action 2 puts it out, but for where it may not be chosen."""

    def __init__(self, masked: bool = False) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(3)
        self.left, self.masked = 0, masked

    def reset(self, **kwargs: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self.left = 0
        return np.zeros(1, np.float32), {"burnt": False}

    def action_masks(self) -> NDArray[np.bool_]:
        return np.array([True, True, not self.masked])

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.left = {0: max(self.left - 1, 0) or -(self.left == 1), 1: self.left or 2, 2: 0}[action]
        burnt = self.left == -1
        return np.full(1, max(self.left, 0), np.float32), 0.0, burnt, False, {"burnt": burnt}


class Idle:
    def predict(self, obs: Any, **kwargs: Any) -> tuple[NDArray[Any], Any]:
        return np.zeros(len(obs), np.int64), None


def test_what_comes_of_an_action_is_seen_as_far_as_the_horizon() -> None:
    env = Fuse()
    env.reset()
    for horizon, risks in ((2, [0, 0, 0]), (3, [0, 1, 0])):
        oracle = Counterfactuals(deep_copy, catastrophe="burnt", horizon=horizon)
        assert oracle(env, Idle(), np.arange(3), False).tolist() == risks
    env.step(1)
    assert oracle(env, Idle(), np.arange(3), False).tolist() == [1, 1, 0]
    assert env.left == 2


def test_a_masked_action_is_no_way_out() -> None:
    oracle = Counterfactuals(deep_copy, catastrophe="burnt", horizon=3)
    env = OracleVeto(Fuse(masked=True), oracle, Idle(), 0.5)
    obs, info = env.reset()
    assert info["qa/proposed_action"] == -1 and not info["qa/vetoed"]
    env.unwrapped.step(1)  # past the veto
    *_, info = env.step(0)
    assert info["qa/no_safe_action"] and not info["qa/vetoed"] and info["qa/executed_action"] == 0
    env = OracleVeto(Fuse(), oracle, Idle(), 0.5)
    env.reset()
    *_, info = env.step(1)
    assert info["qa/vetoed"] and (info["qa/proposed_action"], info["qa/executed_action"]) == (1, 0)
    assert info["qa/risk"] == 1.0 and info["qa/catastrophe"] and not info["qa/no_safe_action"]


@pytest.mark.parametrize("threshold", [0.0, 1.5, True])
def test_a_threshold_that_is_no_probability_is_refused(threshold: Any) -> None:
    with pytest.raises(QAError, match="expected a probability"):
        OracleVeto(Fuse(), Counterfactuals(deep_copy, catastrophe="burnt", horizon=1), Idle(), threshold)


@pytest.mark.parametrize(
    ("name", "at", "action", "rest"),
    [
        ("navigation", np.array([-30.97, 2.0]), np.array([1.0, 0.0], np.float32), np.array([-1.0, 0.0], np.float32)),
        ("cliff", 27, 1, 0),  # at the edge, to the right: it slips down in a third of cases, and up to none
    ],
)
def test_a_risk_in_closed_form_is_how_often_it_happens(name: str, at: Any, action: Any, rest: Any) -> None:
    task = load_task(name)
    env: Any = task.make()
    env.reset(seed=0)
    happened = 0
    for _ in range(600):
        env.reset()
        if name == "cliff":
            env.unwrapped.s = at
        else:
            env.unwrapped.position = at.copy()
        assert task.oracle is not None
        risk, none = task.oracle(env, None, np.array([action, rest]), False)
        happened += env.step(action)[4][task.catastrophe]
    assert 0.2 < risk < 0.8 and none < 1e-6
    assert abs(happened / 600 - risk) < 4 * (risk * (1 - risk) / 600) ** 0.5
