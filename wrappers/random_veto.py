"""The control to hold a veto against."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.errors import QAError
from sb3_qa.wrappers.shell import QA, VecQAWrapper
from sb3_qa.wrappers.substitutes import Bools, Floats, allowed
from sb3_qa.wrappers.veto_rule import VetoRule

__all__ = ["RandomVetoRule", "VecRandomVeto"]


class RandomVetoRule(VetoRule):
    """The control: as many vetoes, at random, of actions nobody judged. A random other action is executed."""

    def __init__(self, name: str, question: str, rate: float, seed: int, qa: QA, unbound: str) -> None:
        super().__init__(name, question, 1.0, "safest", False, 0.0, seed, qa, unbound, refine=0)
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0.0 <= rate <= 1.0:
            raise QAError(f"{name} got rate={rate!r}; expected the share of steps to veto, in [0, 1]; give e.g. 0.05")
        self.rate: float = float(rate)

    def judge(self, risk: Floats) -> Bools:
        return self.rng.random(len(risk)) < self.rate

    def replace(self, actions: NDArray[Any], candidates: NDArray[Any], risk: Floats) -> NDArray[Any]:
        other = (candidates != actions[:, None]).reshape(*candidates.shape[:2], -1).any(axis=2)
        other &= allowed(self.space, self._possible, candidates) if self._possible is not None else True
        pick = np.argmax(self.rng.random(other.shape) * other, axis=1)
        chosen = np.array(candidates[np.arange(len(pick)), pick])
        none = ~other.any(axis=1)
        chosen[none] = actions[none]
        return chosen


class VecRandomVeto(VecQAWrapper):
    """The control to hold a veto against: vetoes a random share of actions and executes a random other one.

    Tells the same keys as :class:`VecVetoAction`.

    :param question: the question whose answers are told (and not used)
    :param rate: share of steps to veto
    """

    def __init__(
        self, venv: VecEnv, question: str, rate: float, seed: int = 0, qa: QA = None, unbound: str = "error"
    ) -> None:
        super().__init__(venv, RandomVetoRule("VecRandomVeto", question, rate, seed, qa, unbound), qa)
