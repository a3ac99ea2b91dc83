"""When a veto holds back: by a budget, in a cooldown, and at random, so that what it prevents can be learnt."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["Decision", "Restraint"]

Bools = NDArray[np.bool_]


class Decision(NamedTuple):
    """Which vetoes are carried out, each (n,)."""

    carried_out: Bools
    withheld: Bools
    """Not, as the budget is spent or a cooldown runs."""
    let_through: Bools
    """Not, as chance would have it."""
    probability: NDArray[np.float64]
    """With which the proposed action was to be executed: 1 where nothing would replace it, 0 where a veto was certain."""


class Restraint:
    """Holds vetoes back.

    :param name: of the wrapper, for errors
    :param cooldown: steps after a veto in which there is no other
    :param budget: most vetoes an episode; None for any number
    :param let_through: probability with which a veto is not carried out
    :param seed: of that chance; a stream of its own, so that candidates are the same with and without
    """

    cooldown: int
    budget: int | None
    let_through: float
    _seed: int
    _rng: np.random.Generator
    _cooling: NDArray[np.int64]
    _spent: NDArray[np.int64]
    _lucky: Bools | None

    def __init__(self, name: str, cooldown: int, budget: int | None, let_through: float, seed: int) -> None:
        if not _is_whole(cooldown) or cooldown < 0:
            raise QAError(f"{name} got cooldown={cooldown!r}; expected a number of steps, at least 0; give e.g. 10")
        if budget is not None and (not _is_whole(budget) or budget < 0):
            raise QAError(
                f"{name} got budget={budget!r}; expected a number of vetoes an episode, at least 0, or None for any; give e.g. 5"
            )
        if isinstance(let_through, bool) or not isinstance(let_through, Real) or not 0.0 <= let_through <= 1.0:
            raise QAError(
                f"{name} got let_through={let_through!r}; expected a probability in [0, 1]; give e.g. 0.05, and only in simulation"
            )
        self.cooldown = int(cooldown)
        self.budget = None if budget is None else int(budget)
        self.let_through = float(let_through)
        self._seed = seed
        self.seed(None)
        self._cooling = np.zeros(0, np.int64)
        self._spent = np.zeros(0, np.int64)
        self._lucky = None

    @property
    def active(self) -> bool:
        """Whether anything holds vetoes back."""
        return bool(self.cooldown or self.budget is not None or self.let_through)

    def seed(self, seed: int | None) -> None:
        """Begin the stream of chances again."""
        self._rng = np.random.default_rng([self._seed, 1] if seed is None else [self._seed, 1, seed])

    def start(self, index: NDArray[np.intp], n: int) -> None:
        """Episodes begin in the environments at ``index`` of ``n``."""
        self._fit(n)
        self._cooling[index] = 0
        self._spent[index] = 0
        self._lucky = None

    def held_back(self, n: int) -> Bools:
        """Where (n,) no veto would be carried out in this step, whatever is proposed."""
        return self._withholding(n) | self._chance(n)

    def decide(self, wanted: Bools) -> Decision:
        """Which vetoes to carry out, once a step.

        :param wanted: (n,), where another action would be executed
        """
        n = len(wanted)
        withholding, lucky = self._withholding(n), self._chance(n)
        withheld = wanted & withholding
        open_ = wanted & ~withholding
        carried_out = open_ & ~lucky
        probability = np.where(open_, self.let_through, 1.0)
        self._lucky = None
        self._cooling = np.where(carried_out, self.cooldown, np.maximum(self._cooling - 1, 0))
        self._spent += carried_out
        return Decision(carried_out, withheld, open_ & lucky, probability)

    def told(self, i: int, decision: Decision | None) -> dict[str, Any]:
        """What to tell of environment ``i``; without a decision, of a reset. Only of options that are in use."""
        told: dict[str, Any] = {}
        if self.cooldown or self.budget is not None:
            told["qa/veto_withheld"] = bool(decision is not None and decision.withheld[i])
        if self.budget is not None:
            told["qa/vetoes_left"] = self.budget - int(self._spent[i])
        if self.let_through:
            told["qa/let_through"] = bool(decision is not None and decision.let_through[i])
            told["qa/let_through_probability"] = 1.0 if decision is None else float(decision.probability[i])
        return told

    def _withholding(self, n: int) -> Bools:
        self._fit(n)
        spent = np.zeros(n, np.bool_) if self.budget is None else self._spent >= self.budget
        return spent | (self._cooling > 0)

    def _chance(self, n: int) -> Bools:
        # One draw a step and environment, flagged or not, that masks and vetoes share.
        if self._lucky is None:
            self._lucky = self._rng.random(n) < self.let_through if self.let_through else np.zeros(n, np.bool_)
        return self._lucky

    def _fit(self, n: int) -> None:
        if len(self._spent) != n:
            self._cooling, self._spent, self._lucky = np.zeros(n, np.int64), np.zeros(n, np.int64), None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
