"""Frozen answerers in the processes of environments: loaded once in each, given by a path, shared by nobody else."""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from wrapping import Toy, assert_same, make_model, make_qa, run_gym_vec, run_single

from sb3_qa import QAError, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.wrappers import AnswerQuestions, ShapeReward, VetoAction

ACTIONS = np.random.default_rng(3).integers(3, size=(23, 2))
WEIGHTS = {"danger": -2.0, "speed": 0.5}


class Loads(gym.Wrapper):
    """Tells what was loaded while the environment was made, and what the process holds."""

    def __init__(self, env, loads):
        super().__init__(env)
        self.loads = loads

    def report(self):
        rules = [self.env.rule, self.env.env.rule, self.env.env.env.rule]
        same = all(rule.qa is rules[0].qa for rule in rules)
        weights = rules[0].qa.policy.qa_head.flat
        return os.getpid(), self.loads, same, weights.is_shared(), float(weights.detach().sum())

    def damage(self):
        """What happens to the answerer of one worker is not seen by another."""
        self.env.rule.qa.policy.qa_head.flat.detach().zero_()


def guarded(path):
    """Three wrappers with one answerer, counting how often it is loaded."""
    load, loads = QuestionAnswerer.load, []
    QuestionAnswerer.load = classmethod(lambda cls, *given: loads.append(given) or load(*given))
    try:
        env = VetoAction(ShapeReward(Toy(), WEIGHTS, qa=path), "crash[k=3]", 0.5, qa=path)
        return Loads(AnswerQuestions(env, qa=path), len(loads))
    finally:
        QuestionAnswerer.load = load


@pytest.fixture
def saved(tmp_path):
    make_qa().save(tmp_path / "toy.qa")
    return str(tmp_path / "toy.qa")


def asked(envs, method):
    return envs.env_method(method) if isinstance(envs, SubprocVecEnv) else envs.call(method)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(AsyncVectorEnv, context="spawn"), id="gymnasium spawn"),
        pytest.param(partial(AsyncVectorEnv, context="fork"), id="gymnasium fork"),
        pytest.param(partial(SubprocVecEnv, start_method="forkserver"), id="sb3 forkserver"),
        pytest.param(partial(SubprocVecEnv, start_method="spawn"), id="sb3 spawn"),
    ],
)
def test_each_worker_loads_it_once_and_shares_it_with_none(saved, make):
    """And tells what the same environments tell in this process."""
    envs = make([partial(guarded, saved)] * 2)
    try:
        envs.reset()
        first = asked(envs, "report")
        assert len({pid for pid, *_ in first} | {os.getpid()}) == 3
        assert [loads for _, loads, *_ in first] == [1, 1]
        assert [(same, shared) for _, _, same, shared, _ in first] == [(True, False)] * 2
        assert first[0][-1] == first[1][-1] != 0.0
        if isinstance(envs, SubprocVecEnv):
            envs.env_method("damage", indices=0)
            assert [weights for *_, weights in asked(envs, "report")] == [0.0, first[1][-1]]
        if isinstance(envs, AsyncVectorEnv):
            for i, moments in enumerate(run_gym_vec(envs, ACTIONS)):
                assert_same(run_single(guarded(saved), ACTIONS[:, i], seed=7 + i), moments)
    finally:
        envs.close()


def test_in_one_process_it_is_loaded_once_for_all_environments(saved):
    envs = DummyVecEnv([partial(guarded, saved)] * 3)
    assert envs.get_attr("loads") == [1, 0, 0]


class Named(Toy):
    def get_action_meanings(self):
        return ["stay", "left", "right"]


def vetoed(unbound):
    return AnswerQuestions(VetoAction(Named(), "crash[k=3]", 0.5, unbound=unbound), unbound="pass")


@pytest.mark.parametrize("unbound", ["error", "pass"])
def test_one_that_has_no_answerer_is_told_of(unbound, caplog):
    """The one that learns cannot be given to it from here; one that lets steps pass is warned of."""
    env = SubprocVecEnv([partial(vetoed, unbound), Named], start_method="spawn")
    try:
        model = make_model(env)
        assert QuestionAnswerer.from_model(model).action_names == ["stay", "left", "right"]
        refused = pytest.raises(QAError, match=r"inside of a sub-process has no answerer.*share\(\)")
        with refused if unbound == "error" else nullcontext():
            model.learn(64, callback=QACallback())
        assert ("inside of a sub-process has no answerer" in caplog.text) is (unbound == "pass")
    finally:
        env.close()


def test_it_is_let_go_of_with_the_last_wrapper(saved):
    env = guarded(saved)
    assert env.loads == 1
    del env
    assert guarded(saved).loads == 1


def test_loading_brings_in_no_compiler(saved):
    """Torch's optimisers do: a second and 90 MB in every worker, and a frozen answerer needs none."""
    program = (
        "import sys; from sb3_qa import QuestionAnswerer; "
        f"QuestionAnswerer.load({saved!r}); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_what_makes_the_environment_is_pickled_by_path(saved):
    """A worker is sent some bytes, and no network."""
    assert len(cloudpickle.dumps(partial(guarded, saved))) < 1000
    spec = AnswerQuestions(gym.make("MountainCar-v0"), unbound="pass").spec
    assert len(cloudpickle.dumps(spec)) < 2000
