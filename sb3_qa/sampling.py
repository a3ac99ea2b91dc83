"""Many questions at a bounded cost: each gradient step asks some of them, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.labels import EventTimes, LabelStore
from sb3_qa.panel import Panel
from sb3_qa.questions import Target

__all__ = ["SHARDS", "SampledLabels", "drawn"]

SHARDS = 4  # gradient steps' worth of questions that a rollout is labelled with
Floats = NDArray[np.float32]


def drawn(targets: Sequence[Target], sample: int, seed: int) -> list[Target]:
    """The targets that a rollout is labelled with: all, or as many as ``SHARDS`` gradient steps ask, drawn at random."""
    most = SHARDS * sample
    if len(targets) <= most:
        return list(targets)
    picked = np.sort(np.random.default_rng([seed, 0]).permutation(len(targets))[:most])
    return [targets[n] for n in picked]


class SampledLabels(LabelStore):
    """Labels in shards of some questions each. A minibatch is given those of one shard, drawn at random.

    The questions were put into shards at random too, so that the loss of a shard, divided by the mean size of a shard, is
    an unbiased estimate of the mean over all questions.

    :param panels: of each shard, the questions
    :param shards: of each shard, the labels
    :param seed: of the order that shards are drawn in
    """

    def __init__(self, panels: Sequence[Panel], shards: Sequence[LabelStore], seed: int) -> None:
        self._panels, self._shards = list(panels), list(shards)
        self._random = np.random.default_rng([seed, 1])
        self.panel = self._panels[0]
        self.n_asked = sum(map(len, panels)) / len(self._panels)
        self.features = shards[0].features
        self.cut_row = shards[0].cut_row
        self.times: dict[int, EventTimes] = _by_column(panels, [shard.times for shard in shards])
        self.values: dict[int, Floats] = _by_column(panels, [shard.values for shard in shards])

    def batch(self, rows: NDArray[np.intp]) -> tuple[Floats, Floats, Floats | None]:
        """Targets, weights and features of a minibatch, of the questions of :attr:`panel`, which this call draws."""
        n = int(self._random.integers(len(self._shards)))
        self.panel = self._panels[n]
        return self._shards[n].batch(rows)


def _by_column(panels: Sequence[Panel], told: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    """What is known of targets by their columns in the head, from their columns in the panels."""
    return {
        original.start: each[mine.start]
        for panel, each in zip(panels, told, strict=True)
        for original, mine in zip(panel.original, panel.targets, strict=True)
        if mine.start in each
    }
