"""Environments of random observations and facts, of any spaces, and questions about them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Choice, Number, Question
from sb3_qa.truth import after, always, eventually, now, steps_until, total

SPACES: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1.0, 1.0, (5,), np.float32),
    "image": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "dict": spaces.Dict(
        {"vector": spaces.Box(-1.0, 1.0, (4,), np.float32), "image": spaces.Box(0, 255, (36, 36, 1), np.uint8)}
    ),
}
POLICIES = {"vector": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy"}
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(-2.0, 1.0, (2,), np.float32),
}


class Noise(gym.Env[Any, Any]):
    """Random observations and facts, of any spaces; episodes end in both ways."""

    def __init__(self, observation: str = "vector", action: str = "discrete") -> None:
        self.observation_space = SPACES[observation]
        self.action_space = ACTIONS[action]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), self._facts()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.t += 1
        end = self.np_random.random()
        return self.observation_space.sample(), float(end), bool(end < 0.05), self.t >= 20, self._facts()

    def _facts(self) -> dict[str, Any]:
        return {
            "bad": bool(self.np_random.random() < 0.1),
            "level": float(self.np_random.random()),
            "side": int(self.np_random.integers(3)),
        }


QUESTIONS = [
    Question("bad within {k} if I choose {action}?", eventually("bad", within="k"), k=[1, 6, 30], name="bad"),
    Question("fine for 3?", always(lambda step: not step.info["bad"], during=3), name="fine"),
    Question("steps until bad?", steps_until("bad", cap=12), name="until"),
    Question("level?", now("level"), Number(0, 1), name="level"),
    Question("sum if {action}?", total("level", over=4), Number(0, 4), name="sum"),
    Question("side in 2?", after("side", steps=2), Choice("left", "middle", "right"), name="side"),
    Question("bad now?", now("bad"), name="bad_now"),
]


def make_env(observation: str = "vector", action: str = "discrete", n_envs: int = 3) -> DummyVecEnv:
    return DummyVecEnv([lambda: Noise(observation, action) for _ in range(n_envs)])
