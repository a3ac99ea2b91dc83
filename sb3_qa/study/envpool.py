"""envpool's environments, which are compiled and run side by side, as an SB3 VecEnv."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

__all__ = ["EnvPool"]


class EnvPool(VecEnv):
    """envpool's environments as an SB3 VecEnv: episodes that end are reset at once, as in DummyVecEnv.

    :param task: its name in envpool, e.g. "highway-fast-v0"
    :param n_envs: environments side by side
    :param seed: of the first; the others follow
    :param keys: of envpool's ``info`` that are passed on
    """

    def __init__(self, task: str, n_envs: int, seed: int, keys: tuple[str, ...] = ("crashed", "speed")) -> None:
        import envpool

        self.keys = keys
        self.pool = envpool.make(task, env_type="gymnasium", num_envs=n_envs, num_threads=1, seed=seed)
        self.render_mode = None
        shape = self.pool.observation_space.shape
        space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)  # as highway-env's
        super().__init__(n_envs, space, gym.spaces.Discrete(int(self.pool.action_space.n)))

    def reset(self) -> NDArray[Any]:
        obs, info = self.pool.reset()
        self.reset_infos = self._infos(info)
        return np.array(obs)

    def step_async(self, actions: NDArray[Any]) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        obs, rewards, terminated, truncated, info = self.pool.step(self.actions)
        obs, infos, done = np.array(obs), self._infos(info), terminated | truncated
        for i, one in enumerate(infos):
            one["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        ended = np.flatnonzero(done)
        if len(ended):
            for i in ended.tolist():
                infos[i]["terminal_observation"] = obs[i].copy()
            obs[ended], first = self.pool.reset(ended.astype(np.int32))
            for i, one in zip(ended.tolist(), self._infos(first), strict=True):
                self.reset_infos[i] = one
        return obs, rewards.astype(np.float32), done, infos

    def _infos(self, info: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
        rows = zip(*(info[key].tolist() for key in self.keys), strict=True)
        return [dict(zip(self.keys, row, strict=True)) for row in rows]

    def close(self) -> None:
        self.pool.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name != "render_mode":
            raise AttributeError(f"envpool's environments have no attribute {attr_name!r}")
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError
