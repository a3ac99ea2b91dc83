"""Windows that a time limit would have cut: left out whether or not the episode ended before it.

A sum over the next 10 steps is not known where a time limit cuts them, but it is where a termination ends them first. To keep
the latter alone would make early ends look frequent: near a limit they would be all that is left. What is fair is to leave
out a window in either case, if the limit *would have* cut it. At which age an episode that terminated would have been cut
is drawn from the ages at which others were cut (the Kaplan-Meier estimate, in which terminated episodes are those lost from
sight: Kaplan and Meier 1958, "Nonparametric estimation from incomplete observations"). With a fixed limit that is exactly the
limit; with limits at random ages, windows are left out as often after a termination as without one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sb3_qa.labels import episode_end

__all__ = ["NEVER", "CutAges", "cut_anyway"]

Bools = NDArray[np.bool_]
Steps = NDArray[np.int64]

NEVER = 2**40


class CutAges:
    """The ages at which episodes are cut by a time limit, and for each that terminated how far it was from being cut.

    :param n_envs: number of environments
    :param begins: (n_envs,), whether each is at the beginning of an episode; the age of others is not known, and they
        count from their next episode on
    """

    def __init__(self, n_envs: int, begins: Bools) -> None:
        self._age = np.where(begins, 0, -1)
        self._survived = np.zeros(
            64, np.int64
        )  # ended episodes, by the number of steps that they were seen not to terminate in
        self._cut = np.zeros(64, np.int64)  # episodes cut, by their age
        self._none = np.full(n_envs, NEVER, np.int64)
        self._random = np.random.default_rng(0)

    def step(self, terminated: Bools, truncated: Bools) -> Steps:
        """Take in one step.

        :param terminated: (n_envs,)
        :param truncated: (n_envs,)
        :return: (n_envs,), for episodes that terminate the number of steps until they would have been cut, else ``NEVER``
        """
        age = self._age = self._age + (self._age >= 0)
        over = terminated | truncated
        if not over.any():
            return self._none
        if age.max() >= len(self._cut):
            grown = (0, int(age.max()) + 1)
            self._survived, self._cut = np.pad(self._survived, grown), np.pad(self._cut, grown)
        told = age >= 0
        np.add.at(self._survived, (age - terminated)[told & over], 1)
        np.add.at(self._cut, age[told & truncated & ~terminated], 1)
        left = self._none
        ending = np.flatnonzero(terminated & told).tolist()
        if ending and not self._cut.any():  # none has been cut at any age, whatever is drawn
            self._random.random(len(ending))  # so that the draws to come do not depend on this short cut
        elif ending:
            running = np.bincount(age[told & ~over], minlength=len(self._cut))
            at_risk = np.cumsum((self._survived + running)[::-1])[::-1]  # at an age: all that were seen to reach it
            left = self._none.copy()
            for env in ending:
                left[env] = self._draw(int(age[env]), at_risk)
        self._age[over] = 0
        return left

    def _draw(self, age: int, at_risk: Steps) -> int:
        hazard = self._cut[age:] / np.maximum(at_risk[age:], 1)
        reached = np.cumprod(1.0 - hazard)
        cut = np.flatnonzero(reached < self._random.random())
        return int(cut[0]) if len(cut) else NEVER


def cut_anyway(terminated: Bools, truncated: Bools, left: Steps, steps: int) -> Bools:
    """Decisions whose episode terminates, but whose window a time limit would have cut without that.

    :param terminated: (n_steps, n_envs)
    :param truncated: (n_steps, n_envs)
    :param left: (n_steps, n_envs), from :class:`CutAges`
    :param steps: the length of the window
    """
    here = np.arange(len(terminated))[:, None]
    end, ended = episode_end(terminated, truncated)
    cut = end + np.take_along_axis(left, end, axis=0)
    return ended & (cut <= here + steps - 2)
