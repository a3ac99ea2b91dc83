"""From facts recorded along trajectories to labels: vectorised reverse scans over arrays of shape (n_steps, n_envs).

The arrays of this module are indexed by decision: row ``t`` holds what the step taken at ``t`` brought, so ``fact[t]``
is f(s_{t+1}), and ``terminated[t]``/``truncated[t]`` say whether the episode ended there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.panel import Panel
from sb3_qa.questions import Number, Target

__all__ = [
    "Cuts",
    "EventTimes",
    "LabelStore",
    "ValueCells",
    "episode_end",
    "event_times",
    "find_cuts",
    "window",
    "window_after",
    "window_value",
    "yes_or_no",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

ENDED = np.iinfo(np.int32).max
"""Number of event-free steps known once an episode has terminated: no event comes after it, however far one looks."""


class EventTimes(NamedTuple):
    """What is known of the time of the next event after each decision. Both arrays are (n_steps, n_envs)."""

    known: Ints
    """Steps whose outcome is known: up to the event, up to the cut, or ``ENDED``."""
    event: Bools
    """Whether the last known step is the event."""


class Cuts(NamedTuple):
    """Where futures are cut: by a time limit or by the end of the recording."""

    row: Ints
    """(n_steps, n_envs): which cut each decision's future runs into, -1 if its episode terminates first."""
    step: NDArray[np.intp]
    """(n_cuts,): the decision after which the future is cut."""
    env: NDArray[np.intp]
    """(n_cuts,)"""


def find_cuts(terminated: Bools, truncated: Bools) -> Cuts:
    """Number the cuts of a recording.

    :param terminated: (n_steps, n_envs)
    :param truncated: (n_steps, n_envs)
    """
    cut = truncated & ~terminated
    cut[-1] |= ~terminated[-1]
    step, env = np.nonzero(cut)
    row_at = np.full(terminated.shape, -1, np.int32)
    row_at[step, env] = np.arange(len(step), dtype=np.int32)
    end = _next_index(terminated | truncated | cut)
    return Cuts(np.take_along_axis(row_at, end, axis=0), step, env)


def event_times(event: Bools, terminated: Bools, truncated: Bools) -> EventTimes:
    """Time to the first event after each decision, or how long none is known to come.

    :param event: (n_steps, n_envs), whether the event holds in the state that step ``t`` led to
    :param terminated: (n_steps, n_envs)
    :param truncated: (n_steps, n_envs)
    """
    here = np.arange(len(event))[:, None]
    end, ended = episode_end(terminated, truncated)
    first = _next_index(event)  # n_steps where none follows
    happens = first <= end
    known = np.where(happens, first, end) - here + 1
    return EventTimes(np.where(ended & ~happens, ENDED, known).astype(np.int32), happens)


def window_after(fact: Floats, terminated: Bools, truncated: Bools, steps: int, ended: float = np.nan) -> Floats:
    """f(s_{t+k}) for each decision.

    Decisions whose window runs past the end of the recording are left out (nan) whatever happens in between: keeping
    only those resolved early by a termination would bias the answer towards early endings.

    :param fact: (n_steps, n_envs), f(s_{t+1})
    :param ended: the value where the episode has terminated before
    :return: (n_steps, n_envs), nan where it is not known
    """
    out = np.full(fact.shape, np.nan, np.float32)
    fits = max(fact.shape[0] - steps + 1, 0)
    out[:fits] = fact[steps - 1 :][:fits]
    gone, cut = _over_before(terminated, truncated, steps)
    out[gone] = ended
    out[cut] = np.nan
    out[fits:] = np.nan
    return out


def window(
    operator: str, fact: Floats, terminated: Bools, truncated: Bools, over: int, discount: float = 1.0
) -> Floats:
    """``total``, ``peak`` or ``lowest`` of f(s_{t+1}) .. f(s_{t+k}), up to a termination; nan where it is not known.

    :param fact: (n_steps, n_envs), f(s_{t+1})
    :return: (n_steps, n_envs)
    """
    n_steps = fact.shape[0]
    combine = {"total": np.add, "peak": np.maximum, "lowest": np.minimum}[operator]
    out = fact.astype(np.float64)
    alive = ~(terminated | truncated)
    cut = truncated & ~terminated
    fits = max(n_steps - over + 1, 0)
    reached = np.ones(fact.shape, np.bool_)
    unknown = np.zeros(fact.shape, np.bool_)
    for j in range(1, min(over, n_steps)):
        unknown[: n_steps - j + 1] |= reached[: n_steps - j + 1] & cut[j - 1 :]
        reached[: n_steps - j] &= alive[j - 1 : n_steps - 1]
        step = fact[j:] * (discount**j if operator == "total" else 1.0)
        out[: n_steps - j] = np.where(reached[: n_steps - j], combine(out[: n_steps - j], step), out[: n_steps - j])
    out[unknown] = np.nan
    out[fits:] = np.nan
    return out.astype(np.float32)


def window_value(target: Target, fact: Floats, fact_now: Floats, terminated: Bools, truncated: Bools) -> Floats:
    """The truth of a choice, a number or a plain yes/no for each decision, (n_steps, n_envs), nan where it is not known.

    :param fact: (n_steps, n_envs), f(s_{t+1})
    :param fact_now: (n_steps, n_envs), f(s_t)
    """
    truth = target.question.truth
    if truth.operator == "now":
        return fact_now
    assert target.horizon is not None
    if truth.operator == "after":
        ended = 0.0 if target.kind == "yesno" else np.nan
        return window_after(fact, terminated, truncated, target.horizon, ended)
    return window(truth.operator, fact, terminated, truncated, target.horizon, truth.discount)


def yes_or_no(value: Floats) -> EventTimes:
    """A yes/no's truth (1, 0 or nan) as the event of a single step."""
    return EventTimes((~np.isnan(value)).astype(np.int32), value == 1.0)


def _next_index(flag: Bools) -> NDArray[np.intp]:
    """Of flags (n_steps, n_envs): index of the first True at or after each row, n_steps where there is none."""
    n_steps = flag.shape[0]
    index = np.where(flag, np.arange(n_steps)[:, None], n_steps)
    return np.minimum.accumulate(index[::-1], axis=0)[::-1]


def episode_end(terminated: Bools, truncated: Bools) -> tuple[NDArray[np.intp], Bools]:
    """For each decision, the one that its episode ends with in the recording, and whether that is a termination.

    :param terminated: (n_steps, n_envs)
    :param truncated: (n_steps, n_envs)
    """
    last = np.zeros_like(terminated)
    last[-1] = True
    end = _next_index(terminated | truncated | last)
    return end, np.take_along_axis(terminated, end, axis=0)


def _over_before(terminated: Bools, truncated: Bools, steps: int) -> tuple[Bools, Bools]:
    """Whether the episode terminates, or is cut, before s_{t+steps} is reached: at one of t .. t+steps-2."""
    end, ended = episode_end(terminated, truncated)
    before = end - np.arange(len(terminated))[:, None] <= steps - 2
    return before & ended, before & ~ended


class LabelStore:
    """Labels beside transitions, and the targets of a minibatch made of them.

    Events and yes/no questions are learnt alike, as hazards (a yes/no has one): they cost 10 bytes a transition, choices
    and numbers 4, and the row of the cut 5 for all questions together. Rows are in the order of the agent's buffer.

    :param targets: what is learnt, in the order of the head's columns
    :param times: for each ``event`` or ``yesno`` target what is known of it, arrays (n_rows,)
    :param values: for each ``choice`` or ``number`` target the index of the option or the number (n_rows,), nan where unknown
    :param cut_row: (n_rows,), the cut each row's future runs into, -1 for none
    :param survival: for each ``event`` target (n_cuts, width + 1): probability of no event within 0 .. width steps of the cut
    :param features: (n_rows, n_action_features) of the actions executed, None where no question is about actions
    """

    panel: Panel | None = None
    """The questions that the last :meth:`batch` was about, where it was not all of them."""
    n_asked: float | None = None
    """How many targets a batch is about, on average, where it is not all of them."""

    def __init__(
        self,
        targets: Sequence[Target],
        times: Sequence[EventTimes],
        values: Sequence[Floats],
        cut_row: Ints,
        survival: Sequence[Floats],
        features: Floats | None,
    ) -> None:
        self.targets = list(targets)
        self.n_columns = sum(target.width for target in targets)
        self.features = features
        self.cut_row = cut_row
        self._timed = [target for target in targets if target.kind in ("event", "yesno")]
        self._valued = [target for target in targets if target.kind in ("choice", "number")]
        self.values = {target.start: each for target, each in zip(self._valued, values, strict=True)}
        self._known = (
            np.stack([each.known for each in times], 1) if len(times) else np.zeros((len(cut_row), 0), np.int32)
        )
        event = np.stack([each.event for each in times], 1) if len(times) else np.zeros((len(cut_row), 0), np.bool_)
        self._event_at = np.where(event, self._known, np.int32(0))
        self.times = {target.start: EventTimes(self._known[:, n], event[:, n]) for n, target in enumerate(self._timed)}
        # Every hazard's column, the target it belongs to, and the step it is about.
        self._columns = _concatenate([np.arange(t.start, t.stop) for t in self._timed])
        self._owner = _concatenate([np.full(t.width, n) for n, t in enumerate(self._timed)])
        self._step = _concatenate([np.arange(1, t.width + 1) for t in self._timed]).astype(np.int32)
        # The continuations in one table, of which each event has width + 1 columns.
        widths = np.array([t.width for t in self._timed], np.int32)
        is_event = np.array([t.kind == "event" for t in self._timed], np.bool_)
        self._table = np.concatenate(list(survival), axis=1) if len(survival) else np.zeros((0, 0), np.float32)
        self._offset = np.cumsum((widths + 1) * is_event) - (widths + 1)
        self._open: Bools = (~event & is_event & (self._known < widths)) & (cut_row >= 0)[:, None]
        self._any_open: Bools = np.asarray(self._open.any(axis=1))
        self._cells = ValueCells(self._valued)

    def __len__(self) -> int:
        return len(self.cut_row)

    def dense(self, rows: NDArray[np.intp], *, beyond: bool = True) -> tuple[Floats, Floats]:
        """Targets and weights of the loss's cells for some transitions.

        A hazard's cell has weight P(the event has not come before that step) and as target P(it comes at that step,
        given that): 0 or 1 where the future is known, the continuation's where it is cut. The sum of the weighted
        cross-entropies is then the expected negative log-likelihood of the time of the event.

        :param rows: (n,)
        :param beyond: whether futures go on beyond the cut
        :return: ``(y, weight)``, both (n, n_columns) float32, for the caller to keep
        """
        y, weight = np.empty((2, len(rows), len(self._columns)), np.float32)
        np.less_equal(self._step, self._known.take(rows, axis=0).take(self._owner, axis=1), out=weight)
        np.equal(self._step, self._event_at.take(rows, axis=0).take(self._owner, axis=1), out=y)
        unfinished = np.flatnonzero(self._any_open.take(rows))
        if beyond and len(unfinished):
            self._continue(rows[unfinished], unfinished, y, weight)
        if not self._valued:
            return y, weight
        all_y, all_weight = np.zeros((2, len(rows), self.n_columns), np.float32)
        all_y[:, self._columns], all_weight[:, self._columns] = y, weight
        values = [self.values[target.start].take(rows) for target in self._valued]
        self._cells.fill(np.stack(values, axis=1), all_y, all_weight)
        return all_y, all_weight

    def batch(self, rows: NDArray[np.intp]) -> tuple[Floats, Floats, Floats | None]:
        """As :meth:`dense`, and the features of the actions too, (n, n_action_features)."""
        return *self.dense(rows), None if self.features is None else self.features[rows]

    def _continue(self, rows: NDArray[np.intp], at: NDArray[np.intp], y: Floats, weight: Floats) -> None:
        """Go on beyond the cut by the survival curve there."""
        beyond = self._step - self._known[rows].take(self._owner, axis=1)
        row, column = np.nonzero((beyond > 0) & self._open[rows].take(self._owner, axis=1))
        place = self._offset[self._owner[column]] + beyond[row, column]
        table, cut = self._continuations(rows)
        at_risk, survive = table[cut[row], place - 1], table[cut[row], place]
        weight[at[row], column] = at_risk
        y[at[row], column] = 1.0 - survive / np.maximum(at_risk, 1e-12)

    def _continuations(self, rows: NDArray[np.intp]) -> tuple[Floats, Ints]:
        """Curves of all events side by side (n_cuts, ...), and which of them goes on each row's future."""
        return self._table, self.cut_row[rows]


class ValueCells:
    """The cells of choices and numbers: an option, or two neighbouring atoms whose mean is the number (the projection of C51,
    arXiv 1707.06887).

    :param targets: in the order that their values are given in
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._start = np.array([target.start for target in targets], np.intp)
        self._columns = _concatenate([np.arange(t.start, t.stop) for t in targets])
        self._owner = _concatenate([np.full(t.width, n) for n, t in enumerate(targets)])
        self._is_number = np.array([target.kind == "number" for target in targets], np.bool_)
        ranges = [_range(target) for target in targets]
        self._low, self._high, self._scale = np.array(ranges, np.float32).reshape(-1, 3).T
        self._last = np.array([target.width - 1 for target in targets], np.intp) - self._is_number
        """The last column that a value may lie at; of a number's two, the first."""

    def fill(self, values: Floats, y: Floats, weight: Floats) -> None:
        """Write the cells into ``y`` and ``weight`` (n, n_columns), where values (n, n_targets) are not nan."""
        known = ~np.isnan(values)
        weight[:, self._columns] = known.take(self._owner, axis=1)
        row, which = np.nonzero(known)
        low = self._low[which]
        place = (np.clip(values[row, which], low, self._high[which]) - low) * self._scale[which]
        lower = np.minimum(place.astype(np.intp), self._last[which])
        column = self._start[which] + lower
        y[row, column] = lower + 1 - place
        number = np.flatnonzero(self._is_number[which])
        y[row[number], column[number] + 1] = (place - lower)[number]


def _range(target: Target) -> tuple[float, float, float]:
    """From where to where values lie, and how many columns apart those are that differ by one."""
    answer = target.question.answer
    if not isinstance(answer, Number):
        return 0.0, target.width - 1.0, 1.0
    return answer.low, answer.high, (target.width - 1) / (answer.high - answer.low)


def _concatenate(parts: list[NDArray[np.intp]]) -> NDArray[np.intp]:
    return np.concatenate(parts) if parts else np.zeros(0, np.intp)
