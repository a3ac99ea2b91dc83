"""How often things were so in the first labels: what a head says before it has learnt anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sb3_qa.encoders import initial_bias
from sb3_qa.labels import EventTimes, ValueCells
from sb3_qa.questions import Target

__all__ = ["BaseRates"]

Floats = NDArray[np.float32]

DEFAULT = 0.05
"""How much of what a head would say without labels stays in, so that nothing is held to be impossible."""


class BaseRates:
    """Counts labels, and makes of them the biases by which a head answers each question by its base rate.

    Without them a head would first have to learn how common everything is, with the same error in every state; all that while,
    its gradient would push the latents of every state the same way, which tells the trunk nothing and disturbs the agent.

    :param targets: what is labelled
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)
        self._default = {target.start: _default(target) for target in targets}
        self._hits = {start: np.zeros(len(default)) for start, default in self._default.items()}
        self._trials = dict.fromkeys(self._default, 0.0)
        self.n_rows = 0
        """Transitions that have been counted."""

    def add(self, times: Sequence[EventTimes], values: Sequence[Floats]) -> None:
        """Count some transitions.

        :param times: of each ``event`` and ``yesno`` target, arrays (n,)
        :param values: of each ``choice`` and ``number`` target (n,), nan where it is not known
        """
        timed, valued = iter(times), iter(values)
        self.n_rows += len(times[0].known) if len(times) else len(values[0])
        for target in self.targets:
            if target.kind in ("event", "yesno"):
                known, event = next(timed)
                self._hits[target.start] += np.count_nonzero(event & (known <= target.width))
                self._trials[target.start] += np.minimum(known, target.width).sum()
            else:
                value = next(valued)
                y, weight = np.zeros((2, len(value), target.width), np.float32)
                ValueCells([replace(target, start=0)]).fill(value[:, None], y, weight)
                self._hits[target.start] += y.sum(axis=0, dtype=np.float64)
                self._trials[target.start] += weight[:, 0].sum(dtype=np.float64)

    def biases(self) -> dict[int, Floats]:
        """Of each target, by its first column: the biases (width,) of its hazards or atoms."""
        biases = {}
        for target in self.targets:
            default, n = self._default[target.start], self._trials[target.start]
            single = len(default) == 1
            unsure = (0.5 / default[0] if single else 1.0) + DEFAULT * n  # as if so much had been seen of the default
            rate = (self._hits[target.start] + unsure * default) / (n + unsure)
            bias = np.log(rate / (1.0 - rate)) if single else np.log(rate)
            biases[target.start] = np.resize(bias, target.width).astype(np.float32)
        return biases


def _default(target: Target) -> NDArray[np.float64]:
    """The hazard of a step, or the probability of each atom, that a head begins with."""
    if target.kind in ("choice", "number"):
        return np.full(target.width, 1.0 / target.width)
    return np.array([1.0 / (1.0 + np.exp(-initial_bias(target)))])
