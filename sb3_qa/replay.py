"""Labels beside a replay buffer: filled in as the future arrives, for as long as the transition is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.labels import EventTimes, LabelStore
from sb3_qa.questions import Target

__all__ = ["ReplayLabels"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


RENEWED = 100  # minibatches that the curve at a time limit is used for before it is asked anew


class ReplayLabels(LabelStore):
    """Labels of what a replay buffer holds: row ``position * n_envs + env`` belongs to that transition.

    A transition whose future has not arrived yet has no label and is left out, whatever has happened so far, so that early
    events are not favoured. Beyond a time limit the future goes on by the curve that the answerer gives for the last state,
    asked anew every ``RENEWED`` minibatches, as the value of a target network would be.

    :param targets: what is learnt
    :param n_rows: transitions that the buffer holds
    :param n_features: width of the features of actions, None where no question is about actions
    """

    AHEAD = 0

    def __init__(self, targets: Sequence[Target], n_rows: int, n_features: int | None) -> None:
        timed = [target for target in targets if target.kind in ("event", "yesno")]
        n_events = sum(target.kind == "event" for target in targets)
        nothing = EventTimes(np.zeros(n_rows, np.int32), np.zeros(n_rows, np.bool_))
        super().__init__(
            targets,
            [nothing] * len(timed),
            [np.full(n_rows, np.nan, np.float32) for _ in range(len(targets) - len(timed))],
            np.full(n_rows, -1, np.int32),
            [np.zeros((0, 0), np.float32)] * n_events,
            None if n_features is None else np.zeros((n_rows, n_features), np.float32),
        )
        self.times.clear()  # they are in one array here
        asked = tuple((t.question.name, tuple(t.slots.items()), t.kind, t.width, t.start) for t in targets)
        self.signature = (n_rows, n_features, asked)
        """What has to be the same for labels to be used again."""
        self.curves: Callable[[NDArray[Any]], list[Floats]] | None = None
        """From rows of transitions to survival curves, of each event target, of the states they led to."""
        self._curve_after: dict[int, Floats] = {}
        self._age = 0

    def __getstate__(self) -> dict[str, Any]:
        """What is worth keeping with a buffer: no questions, whose facts need not be of a kind that can be pickled."""
        names = ("signature", "_known", "_event_at", "_open", "_any_open", "cut_row", "values", "features")
        return {name: getattr(self, name) for name in names}

    def forget(self, rows: NDArray[np.intp]) -> None:
        """These rows are about to hold other transitions."""
        self._known[rows] = 0
        self._event_at[rows] = 0
        self._open[rows] = False
        self._any_open[rows] = False
        self.cut_row[rows] = -1
        for value in self.values.values():
            value[rows] = np.nan
        for row in rows.tolist():
            self._curve_after.pop(row, None)

    def put(self, rows: NDArray[np.intp] | slice, labels: LabelStore) -> None:
        """Take in the labels of these rows; their ``cut_row`` names the row of the transition at the end of which they are cut."""
        self._known[rows] = labels._known
        self._event_at[rows] = labels._event_at
        self._open[rows] = labels._open
        self._any_open[rows] = labels._any_open
        self.cut_row[rows] = labels.cut_row
        for mine, theirs in zip(self.values.values(), labels.values.values(), strict=True):
            mine[rows] = theirs
        if self.features is not None:
            self.features[rows] = labels.features

    def _work_out(self, rows: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """As for a rollout; -1 stands for a transition that never was (of a virtual goal), which has no truth."""
        y, weight = super()._work_out(np.maximum(rows, 0))
        weight[rows < 0] = 0.0
        return y, weight

    def _continuations(self, rows: NDArray[np.intp]) -> tuple[Floats, Ints]:
        assert self.curves is not None
        self._age += 1
        if self._age > RENEWED:
            self._age = 0
            self._curve_after.clear()
        ends, which = np.unique(self.cut_row[rows], return_inverse=True)
        new = [row for row in ends.tolist() if row not in self._curve_after]
        if new:
            self._curve_after.update(zip(new, np.concatenate(self.curves(np.array(new)), axis=1), strict=True))
        return np.stack([self._curve_after[row] for row in ends.tolist()]), which.astype(np.int32)
