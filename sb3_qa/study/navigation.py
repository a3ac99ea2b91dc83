"""A point that drives to a goal past walls: the navigation tasks of Recovery RL, small and with known risks.

Dynamics and layouts are those of Thananjeyan et al. 2021, "Recovery RL: Safe Reinforcement Learning with Learned Recovery
Zones" (arXiv 2010.15920): position s, s' = s + a + noise with actions in [-1, 1]² and a standard deviation of 0.05, from around
(-50, 0) towards the origin, 100 steps at most, reward minus the distance. Within 4 of the origin the task is done; touching
a wall ends the episode, and is the catastrophe.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["LAYOUTS", "Navigation", "Wall"]

Floats = NDArray[np.float64]


class Wall(NamedTuple):
    """A rectangle that must not be touched."""

    x: tuple[float, float]
    y: tuple[float, float]


LAYOUTS: dict[str, tuple[Wall, ...]] = {
    "corridor": (
        Wall((-100.0, 150.0), (5.0, 10.0)),
        Wall((-100.0, -80.0), (-10.0, 10.0)),
        Wall((-100.0, 150.0), (-10.0, -5.0)),
    ),
    "block": (Wall((-30.0, -20.0), (-7.5, 7.5)),),
}
"""``"corridor"`` is the paper's Navigation 1, ``"block"`` its Navigation 2, where the straight way leads into the wall."""


class Navigation(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Drive to the origin without touching a wall.

    ``info`` tells ``constraint`` (a wall is touched) and ``success``, both bool, on every step and at reset.

    >>> env = Navigation("corridor")
    >>> obs, info = env.reset(seed=0)
    >>> obs, reward, terminated, truncated, info = env.step(np.array([1.0, 0.0], np.float32))
    >>> info["constraint"], info["success"]
    (False, False)

    :param layout: a name in :data:`LAYOUTS`
    """

    START = (-50.0, 0.0)
    NOISE = 0.05  # standard deviation of a step in each direction
    NEAR = 4.0  # distance from the origin at which the task is done
    HORIZON = 100

    def __init__(self, layout: str = "corridor") -> None:
        if layout not in LAYOUTS:
            raise QAError(f"Navigation got layout={layout!r}; expected one of {sorted(LAYOUTS)}; give one of them")
        self.walls = LAYOUTS[layout]
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.position: Floats = np.array(self.START)
        self.n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.position = np.array(self.START) + self.np_random.standard_normal(2)
        self.n_steps = 0
        return self.position.astype(np.float32), {"constraint": False, "success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        distance = float(np.linalg.norm(self.position))  # the reward is about the state that is left
        push = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self.position = self.position + push + self.NOISE * self.np_random.standard_normal(2)
        self.n_steps += 1
        constraint = any(
            wall.x[0] <= self.position[0] <= wall.x[1] and wall.y[0] <= self.position[1] <= wall.y[1]
            for wall in self.walls
        )
        success = not constraint and float(np.linalg.norm(self.position)) < self.NEAR
        info = {"constraint": constraint, "success": success}
        obs = self.position.astype(np.float32)
        return obs, -distance, constraint or success, self.n_steps >= self.HORIZON, info

    def risk(self, position: Floats, action: Floats) -> Floats:
        """The true probability that the next step touches a wall, in closed form: what an oracle would veto by.

        :param position: (..., 2)
        :param action: (..., 2)
        :return: (...)
        """
        mean = np.asarray(position, np.float64) + np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        total = np.zeros(mean.shape[:-1])
        for wall in self.walls:
            inside = np.ones(mean.shape[:-1])
            for axis, (low, high) in enumerate((wall.x, wall.y)):
                inside = inside * (self._below(high - mean[..., axis]) - self._below(low - mean[..., axis]))
            total += inside
        return np.clip(total, 0.0, 1.0)

    def _below(self, x: Floats) -> Floats:
        """P(noise <= x)."""
        return np.asarray(0.5 * (1.0 + np.vectorize(math.erf)(x / (self.NOISE * math.sqrt(2.0)))))
