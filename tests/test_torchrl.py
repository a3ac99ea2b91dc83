"""TorchRL's environments over wrapped ones: what they give is what the wrapped environment gives. Needs the extra `torchrl`."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from wrapping import make_model

from sb3_qa import QuestionAnswerer
from sb3_qa.wrappers import ShapeReward, VetoAction

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchRL's and tensordict's own
try:
    import torch
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import GymEnv, GymWrapper, ParallelEnv
    from torchrl.envs.gym_like import BaseInfoDictReader
    from torchrl.envs.libs.gym import set_gym_backend
    from torchrl.envs.utils import check_env_specs
except ImportError:
    pytest.skip("TorchRL is not installed: pip install 'sb3-qa[torchrl]'", allow_module_level=True)

KEYS = ["qa/vetoed", "qa/executed_action", "qa/risk", "qa/raw_reward", "qa/shaping_reward", "qa/danger"]


class AnswerReader(BaseInfoDictReader):
    """TorchRL's own reader takes numpy's numbers only, and infos tell Python's."""

    info_spec = Composite({key: Unbounded((), dtype=torch.float32) for key in KEYS}, shape=[])

    def __call__(self, info, tensordict):
        for key in KEYS:
            tensordict.set(key, torch.as_tensor(info[key], dtype=torch.float32))
        return tensordict


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pole") / "pole.qa"
    QuestionAnswerer.from_model(make_model("CartPole-v1")).save(path)
    return str(path)


def wrapped(path):
    env = ShapeReward(gym.make("CartPole-v1"), {"danger": -1.0}, mode="potential", gamma=0.9, qa=path)
    return VetoAction(env, "crash[k=3]", 0.5, qa=path)


def made(path):
    return GymWrapper(wrapped(path), categorical_action_encoding=True)


def check(rollout, path, seed):
    """The rollout's own actions, given to the wrapped environment, give the same."""
    env = wrapped(path)
    obs, _ = env.reset(seed=seed)
    n_vetoed = 0
    for moment in rollout:
        np.testing.assert_array_equal(moment["observation"].numpy(), obs)
        obs, reward, terminated, truncated, info = env.step(int(moment["action"]))
        n_vetoed += info["qa/vetoed"]
        np.testing.assert_array_equal(moment["next", "observation"].numpy(), obs)
        assert moment["next", "reward"].item() == pytest.approx(reward, rel=1e-5)
        assert (moment["next", "terminated"].item(), moment["next", "truncated"].item()) == (terminated, truncated)
        for key in KEYS:
            if ("next", key) in moment.keys(True):
                assert moment["next", key].item() == pytest.approx(float(info[key]), rel=1e-5)
    return n_vetoed


def test_a_rollout_is_that_of_the_wrapped_environment(saved):
    env = made(saved)
    env.set_info_dict_reader(AnswerReader())
    check_env_specs(env)
    env.set_seed(0)
    seed = 5
    first = env.reset(seed=seed)
    rollout = env.rollout(20, auto_reset=False, tensordict=first)
    assert ("next", "qa/risk") in rollout.keys(True)
    assert len(rollout) > 5
    assert check(rollout, saved, seed) > 0


def test_an_environment_made_by_its_name(saved):
    shape = ShapeReward.wrapper_spec(rewards={"danger": -1.0}, mode="potential", gamma=0.9, qa=saved)
    veto = VetoAction.wrapper_spec(question="crash[k=3]", threshold=0.5, qa=saved)
    entry = gym.spec("CartPole-v1").entry_point
    gym.register("SafePole-v1", entry, max_episode_steps=500, additional_wrappers=(shape, veto))
    try:
        with set_gym_backend("gymnasium"):
            env = GymEnv("SafePole-v1", categorical_action_encoding=True)
        rollout = env.rollout(20, auto_reset=False, tensordict=env.reset(seed=3))
        assert check(rollout, saved, 3) > 0
    finally:
        del gym.registry["SafePole-v1"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_environments_in_processes_of_their_own(saved, start):
    env = ParallelEnv(2, partial(made, saved), mp_start_method=start)
    try:
        env.set_seed(0)
        rollout = env.rollout(30, break_when_any_done=False)
    finally:
        env.close()
    assert rollout.shape == (2, 30)
    reward = rollout["next", "reward"]
    assert torch.isfinite(reward).all()
    assert ((reward - 1.0).abs() > 1e-3).float().mean() > 0.9  # shaped
    for one in rollout:
        moved = (
            one["next", "observation"][:, 0, 1]
            if one["next", "observation"].ndim == 3
            else one["next", "observation"][:, 1]
        )
        assert moved.std() > 0
