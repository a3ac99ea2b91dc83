"""Small environments whose every answer is known exactly, for checking that training finds the truth.

Two walks along a line of cells with a catastrophe at one end. Train a question such as
``eventually("hit", within="k")`` on one, and compare the answers with ``probability_within``:

>>> env = RandomWalk(cells=4)
>>> env.probability_within(1)
array([1. , 0.5, 0. , 0. ])
>>> observation, info = env.reset(seed=0, options={"cell": 2})
>>> observation, info
(array([0., 0., 1., 0.], dtype=float32), {'hit': False, 'cell': 2})
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from sb3_qa.errors import QAError

__all__ = ["ActionWalk", "RandomWalk"]

Observation = NDArray[np.float32]
Floats = NDArray[np.float64]

LEFT, RIGHT = 0, 1


class _Walk(gymnasium.Env[Observation, np.int64]):
    """A walk over ``cells`` cells where action a steps right with probability ``right[a]``, and left otherwise."""

    def __init__(self, cells: int, time_limit: int, right: tuple[float, float]) -> None:
        self.cells = _whole(cells, "cells", 2)
        self.time_limit = _whole(time_limit, "time_limit", 1)
        self.observation_space = spaces.Box(0.0, 1.0, (self.cells,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._right = right
        self._cell = 0
        self._steps = 0
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in a cell drawn uniformly from 1 .. cells - 1, or in ``options["cell"]``."""
        super().reset(seed=seed)
        cell = (options or {}).get("cell")
        if cell is None:
            cell = self.np_random.integers(1, self.cells)
        elif not 1 <= cell < self.cells:
            raise QAError(f"Got a start in cell {cell!r}, expected 1 to {self.cells - 1}: cell 0 is the catastrophe.")
        self._cell, self._steps, self._over = int(cell), 0, False
        return self._observation(), self._info()

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step: (observation, reward, terminated, truncated, info)."""
        if self._over:
            raise gymnasium.error.ResetNeeded("The episode is over, or has not begun: call reset() before step().")
        if not self.action_space.contains(action):
            raise QAError(
                f"Got action {action!r}, expected 0 (left) or 1 (right): pass an entry of {self.action_space}."
            )
        goes_right = self.np_random.random() < self._right[int(action)]
        self._cell = min(self._cell + 1, self.cells - 1) if goes_right else self._cell - 1
        self._steps += 1
        terminated = self._cell == 0
        truncated = self._steps >= self.time_limit and not terminated
        self._over = terminated or truncated
        return self._observation(), 0.0 if terminated else 1.0, terminated, truncated, self._info()

    def _observation(self) -> Observation:
        observation = np.zeros(self.cells, np.float32)
        observation[self._cell] = 1.0
        return observation

    def _info(self) -> dict[str, Any]:
        return {"hit": self._cell == 0, "cell": self._cell}

    def _transitions(self) -> Floats:
        """P(next cell | action, cell), shape (n_actions, cells, cells), with cell 0 absorbing."""
        transitions = np.zeros((2, self.cells, self.cells))
        transitions[:, 0, 0] = 1.0
        for action, right in enumerate(self._right):
            for cell in range(1, self.cells):
                transitions[action, cell, min(cell + 1, self.cells - 1)] += right
                transitions[action, cell, cell - 1] += 1.0 - right
        return transitions

    def _probability_within(self, k: int, policy: Floats) -> Floats:
        """P(hit within k | cell, first action, then policy), shape (cells, n_actions)."""
        k = _whole(k, "k", 0)
        transitions = self._transitions()
        hit = np.zeros(self.cells)
        hit[0] = 1.0
        if k == 0:
            return np.stack([hit, hit], axis=1)
        followed = np.einsum("ca,acd->cd", policy, transitions)
        return np.ascontiguousarray((transitions @ np.linalg.matrix_power(followed, k - 1) @ hit).T)


class RandomWalk(_Walk):
    """A walk that no action can change: the test of questions about what will happen.

    - Cells 0 .. cells - 1. An episode starts in a cell drawn uniformly from 1 .. cells - 1.
    - Each step goes one cell left or one cell right, with probability 1/2 each, *whatever the action*; from one seed,
      two sequences of actions even meet the very same walk.
    - Cell 0 is the catastrophe: arriving there gives ``terminated=True`` and ``info["hit"] = True``.
    - The other end reflects: a step right from the last cell stays in the last cell (and uses up the step).
    - ``truncated=True`` after ``time_limit`` steps, unless that step hit.
    - Observation: the cell, one-hot, float32, shape (cells,). Action: ``Discrete(2)``. Reward: 1.0 for a step
      survived, 0.0 for the step that hits.
    - ``info["hit"]`` (bool) and ``info["cell"]`` (int) are told on every step and at reset.
    """

    def __init__(self, cells: int = 11, time_limit: int = 30) -> None:
        super().__init__(cells, time_limit, right=(0.5, 0.5))

    def probability_within(self, k: int) -> Floats:
        """P(hit within the next ``k`` steps | cell), exact, shape (cells,).

        A power of the transition matrix with cell 0 absorbing. The time limit is ignored: it ends the watching, not the
        walk. The entry of cell 0 is 1.0 by convention; an episode is over there, so no decision is ever made in it.

        >>> RandomWalk(cells=4).probability_within(3)
        array([1.   , 0.625, 0.25 , 0.125])
        """
        policy = np.full((self.cells, 2), 0.5)
        return self._probability_within(k, policy)[:, 0].copy()


class ActionWalk(_Walk):
    """A walk that the actions steer: the test of questions about what would happen if an action were taken.

    As :class:`RandomWalk` in cells, start, catastrophe, reflecting end, time limit, observation, reward and info, but:

    - action 0 is left, towards the catastrophe, and action 1 is right, away from it;
    - the move chosen happens with probability ``1 - slip``, the opposite one with probability ``slip``.
    """

    def __init__(self, cells: int = 7, slip: float = 0.2, time_limit: int = 30) -> None:
        if not 0 <= slip <= 1:
            raise QAError(f"Got slip={slip!r}, expected a probability in [0, 1]: pass the chance of the opposite move.")
        super().__init__(cells, time_limit, right=(slip, 1.0 - slip))
        self.slip = slip

    def probability_within(self, k: int, policy: ArrayLike) -> Floats:
        """P(hit within the next ``k`` steps | cell, first action, then following ``policy``), exact.

        The time limit is ignored, and the row of cell 0 is 1.0 by convention, as in :class:`RandomWalk`. The
        probability for a state, whose first action is the policy's too, is ``(policy * result).sum(axis=1)``.

        :param policy: P(action | cell), shape (cells, n_actions), rows summing to 1 (the row of cell 0 is not used).
        :return: Shape (cells, n_actions).

        >>> ActionWalk(cells=3, slip=0.25).probability_within(1, policy=[[0.5, 0.5]] * 3)
        array([[1.  , 1.  ],
               [0.75, 0.25],
               [0.  , 0.  ]])
        """
        try:
            pi = np.asarray(policy, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise QAError(
                f"Got a policy that numpy cannot read ({error}), expected probabilities of shape {(self.cells, 2)}: "
                "pass one numeric array."
            ) from error
        if pi.shape != (self.cells, 2):
            raise QAError(
                f"Got a policy of shape {pi.shape}, expected (cells, n_actions) = {(self.cells, 2)}: "
                "give each cell one row of action probabilities."
            )
        if not (np.all(pi >= 0) and np.allclose(pi.sum(axis=1), 1, rtol=0, atol=1e-6)):
            raise QAError(
                f"Got policy rows summing to {pi.sum(axis=1)}, expected probabilities that sum to 1 in every row: "
                "divide each row by its sum."
            )
        return self._probability_within(k, pi)


def _whole(value: int, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise QAError(f"Got {name}={value!r}, expected a whole number of at least {least}: pass for example {name}=10.")
    return int(value)
