"""Labels beside a replay buffer: filled in as the future arrives, for as long as the transition is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.encoders import ActionFeatures
from sb3_qa.hindsight import Hindsight, VirtualGoals
from sb3_qa.labels import EventTimes, LabelStore
from sb3_qa.questions import Target

__all__ = ["KeptActions", "ReplayLabels"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


RENEWED = 100  # minibatches that the curve at a time limit is used for before it is asked anew
KEPT = ("_known", "_event_at", "_open", "_any_open", "cut_row", "values", "features", "ends")


class KeptActions:
    """The executed action of each row, as small as it can be kept; indexed by rows it gives their features.

    :param features: makes features (n, n_action_features) of actions
    :param n_rows: transitions that the buffer holds
    """

    def __init__(self, features: ActionFeatures, n_rows: int) -> None:
        self.of = features
        space = features.space
        first: Any = 0
        dtype: Any = np.float32
        if isinstance(space, spaces.Discrete):
            first, last = int(space.start), int(space.start + space.n) - 1
            dtype = np.result_type(np.min_scalar_type(first), np.min_scalar_type(last))
        elif isinstance(space, spaces.MultiDiscrete):
            first, last = space.start, int((space.start + space.nvec).max()) - 1
            dtype = np.result_type(np.min_scalar_type(int(first.min())), np.min_scalar_type(last))
        elif isinstance(space, spaces.MultiBinary):
            dtype = np.int8
        self.actions = np.zeros((n_rows, *(space.shape or ())), dtype)
        if np.any(first):
            self.actions[:] = first

    def __getitem__(self, rows: Any) -> Floats:
        return self.of(self.actions[rows])

    def __setitem__(self, rows: Any, actions: NDArray[Any]) -> None:
        self.actions[rows] = actions


class ReplayLabels(LabelStore):
    """Labels of what a replay buffer holds: row ``position * n_envs + env`` belongs to that transition.

    A transition whose future has not arrived yet has no label and is left out, whatever has happened so far, so that early
    events are not favoured. Beyond a time limit the future goes on by the curve that the answerer gives for the last state,
    asked anew every ``RENEWED`` minibatches, as the value of a target network would be. An event question costs 9 bytes a
    transition, a choice or a number 4, and all of them together 5 more and the action.

    Rows of a minibatch below 0 are those of virtual goals: ``~row`` is the transition that has been given another goal. They
    are left out, but for what :class:`~sb3_qa.hindsight.Hindsight` can tell about them.

    :param targets: what is learnt
    :param n_rows: transitions that the buffer holds
    :param features: makes features of actions, None where no question is about actions
    :param kept: labels made before of the same buffer, whose arrays are gone on with if they are of the same questions
    """

    def __init__(
        self, targets: Sequence[Target], n_rows: int, features: ActionFeatures | None, kept: Any = None
    ) -> None:
        n_timed = sum(target.kind in ("event", "yesno") for target in targets)
        n_events = sum(target.kind == "event" for target in targets)
        n_valued = len(targets) - n_timed
        nothing = EventTimes(np.zeros(0, np.int32), np.zeros(0, np.bool_))
        nowhere = [np.zeros((0, 0), np.float32)] * n_events
        super().__init__(
            targets, [nothing] * n_timed, [np.zeros(0, np.float32)] * n_valued, np.zeros(0, np.int32), nowhere, None
        )
        self.times.clear()  # they are in one array here
        self.signature = (n_rows, None if features is None else features.n_features, tuple(map(_identity, targets)))
        """What has to be the same for labels to be used again."""
        self.ends: dict[int, Any] = {}
        """Last states before a time limit, by the row that led there, where the buffer does not keep them."""
        if (
            isinstance(kept, ReplayLabels)
            and kept.signature == self.signature
            and all(hasattr(kept, name) for name in KEPT)
        ):
            for name in KEPT:
                setattr(self, name, getattr(kept, name))
        else:
            self._known = np.zeros((n_rows, n_timed), np.int32)
            self._event_at = np.zeros((n_rows, n_timed), np.int32)
            self._open = np.zeros((n_rows, n_timed), np.bool_)
            self._any_open = np.zeros(n_rows, np.bool_)
            self.cut_row = np.full(n_rows, -1, np.int32)
            self.values = {start: np.full(n_rows, np.nan, np.float32) for start in self.values}
            self.features: Any = None if features is None else KeptActions(features, n_rows)
        self.curves: Callable[[NDArray[Any]], list[Floats]] | None = None
        """From rows of transitions to survival curves, of each event target, of the states they led to."""
        self.hindsight: Hindsight | None = None
        self.virtual: VirtualGoals | None = None
        """The virtual goals of the minibatch that has just been handed out, in the order of its rows below 0."""
        self._curve_after: dict[int, Floats] = {}
        self._age = 0

    def __getstate__(self) -> dict[str, Any]:
        """What is worth keeping with a buffer: no questions, whose facts need not be of a kind that can be pickled."""
        return {name: getattr(self, name) for name in ("signature", *KEPT)}

    def forget(self, first: int, stop: int) -> None:
        """The rows from the first on are about to hold other transitions."""
        rows = slice(first, stop)  # which is quicker than an index
        self._known[rows] = 0
        self._event_at[rows] = 0
        self._open[rows] = False
        self._any_open[rows] = False
        self.cut_row[rows] = -1
        for value in self.values.values():
            value[rows] = np.nan
        for row in range(first, stop):
            self._curve_after.pop(row, None)
            self.ends.pop(row, None)

    def put(self, rows: NDArray[np.intp], labels: LabelStore, actions: NDArray[Any]) -> None:
        """Take in the labels of these rows; their ``cut_row`` names the row of the transition at the end of which they are cut.

        :param actions: (n, *action_shape), as they were executed
        """
        self._known[rows] = labels._known
        self._event_at[rows] = labels._event_at
        self._open[rows] = labels._open
        self._any_open[rows] = labels._any_open
        self.cut_row[rows] = labels.cut_row
        for mine, theirs in zip(self.values.values(), labels.values.values(), strict=True):
            mine[rows] = theirs
        if self.features is not None:
            self.features[rows] = actions

    def batch(self, rows: NDArray[np.intp]) -> tuple[Floats, Floats, Floats | None]:
        """As of a rollout; rows below 0 are of virtual goals."""
        goals, self.virtual = self.virtual, None
        if len(rows) == 0 or rows.min() >= 0:
            return super().batch(rows)
        real, virtual = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        y, weight = np.zeros((2, len(rows), self.n_columns), np.float32)
        y[real], weight[real] = self.dense(rows[real])
        if self.hindsight is not None and goals is not None and len(goals.position) == len(virtual):
            y[virtual], weight[virtual] = self.hindsight.labels(goals)
        return y, weight, None if self.features is None else self.features[np.where(rows < 0, ~rows, rows)]

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


def _identity(target: Target) -> tuple[Any, ...]:
    question = target.question
    fact = question.truth.fact if isinstance(question.truth.fact, str) else None
    truth = (question.truth.operator, fact, target.horizon, question.truth.discount)
    return question.name, tuple(target.slots.items()), target.kind, target.width, target.start, *truth
