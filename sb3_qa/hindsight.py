"""Labels of virtual goals: what hindsight replay (HER, arXiv 1707.01495) can teach about questions, and what it cannot.

A virtual transition is a real one with another goal in its place, one that was achieved later on. **The goal is chosen
because of the future**: it *was* achieved. So what came of the trajectory is no fair sample of what comes of that state
with that goal: "Will I reach my goal?" would nearly always be answered yes, and "Will I crash?" no, since goals that lie far
off are drawn only where there was no crash before. It also went on with actions taken for another goal. What is fair
is what HER itself learns from: the outcome of *one* step, given the action. Hence, for a virtual transition:

- a fact that depends on the goal is recomputed for the state that the step led to, with the virtual goal in
  ``obs["desired_goal"]`` and ``compute_reward``'s answer as ``reward``;
- beyond that step the future goes on by the answerer's own curve for that state and the virtual goal, as HER's own
  values do (of an end of the episode without the event nothing more is said: whether it would have ended for the other
  goal is not known);
- that holds for questions about actions (``{action}``). How a question about the state alone comes out depends on
  the action taken, which hindsight has selected for: only its ``now(...)`` is recomputed;
- what needs more steps than one and has no curve (``total(over=5)``, ``after(steps=3)``) is left out;
- so is a fact that depends on ``info``, ``terminated`` or ``truncated``, as they cannot be recomputed, and one that does not
  depend on the goal, as it would gain nothing but the selection. Both are taught by the real transitions.

As HER's values, this is exact where an action has one outcome; where it has several, the selection favours the one that
led to the goal (the bias of hindsight, arXiv 1809.02070).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.facts import FactReader, Signal
from sb3_qa.labels import ValueCells, yes_or_no
from sb3_qa.questions import Target
from sb3_qa.truth import Step

__all__ = ["Hindsight", "VirtualGoals"]

Floats = NDArray[np.float32]

GOAL = "desired_goal"
NOT_KNOWN = ("action", "terminated", "truncated", "info")  # and the reward, of the state that is asked about


class VirtualGoals(NamedTuple):
    """Transitions of a minibatch with another goal than they had."""

    position: NDArray[np.intp]
    """(n,), in the buffer"""
    env: NDArray[np.intp]
    """(n,)"""
    goal: NDArray[Any]
    """(n, *goal_shape), as the buffer keeps goals"""


class Hindsight:
    """Recomputes facts for virtual goals, and makes labels of them.

    :param targets: what is learnt
    :param reader: of the facts
    :param buffer: a HerReplayBuffer
    :param policy_sees: from observations as the buffer keeps them to those that the policy sees
    :param curves: from such observations and event targets to the survival curve (n, width + 1) of each target
    """

    def __init__(
        self,
        targets: Sequence[Target],
        reader: FactReader,
        buffer: Any,
        policy_sees: Callable[[Any], Any],
        curves: Callable[[Any, list[Target]], list[Floats]],
    ) -> None:
        self.buffer = buffer
        self._policy_sees = policy_sees
        self._curves = curves
        self._n_columns = sum(target.width for target in targets)
        self._facts: dict[tuple[int, bool], _GoalFact] = {}
        self._targets: list[tuple[Target, tuple[int, bool]]] = []
        for target, column in zip(targets, reader.column, strict=True):
            now = target.question.truth.operator == "now"
            one_step = target.question.per_action and (target.kind == "event" or target.horizon == 1)
            signal = reader.signals[column]
            if signal.call is not None and (now or one_step):
                self._targets.append((target, (column, now)))
                self._facts.setdefault((column, now), _GoalFact(signal))
        self._cells = {
            target.start: ValueCells([target]) for target, _ in self._targets if target.kind in ("choice", "number")
        }

    def labels(self, goals: VirtualGoals) -> tuple[Floats, Floats]:
        """Targets and weights of the loss's cells, (n, n_columns) both, as of :meth:`~sb3_qa.labels.LabelStore.dense`."""
        y, weight = np.zeros((2, len(goals.position), self._n_columns), np.float32)
        values: dict[tuple[int, bool], Floats | None] = {}
        states: dict[bool, _States] = {}
        events = []
        for target, fact in self._targets:
            if fact not in values:
                now = fact[1]
                if now not in states:
                    states[now] = _States(self.buffer, goals, now)
                values[fact] = self._facts[fact].values(states[now])
            value = values[fact]
            if value is None:
                continue
            if target.kind == "event":
                happens = (value == 1.0) == target.question.truth.event_when
                y[:, target.start], weight[:, target.start] = happens, 1.0
                if target.width > 1:
                    events.append((target, happens))
            elif target.kind == "yesno":
                y[:, target.start], weight[:, target.start] = yes_or_no(value)[::-1]
            else:
                self._cells[target.start].fill(value[:, None], y, weight)
        if events:
            self._go_on(events, goals, states[False], y, weight)
        return y, weight

    def _go_on(
        self,
        events: list[tuple[Target, NDArray[np.bool_]]],
        goals: VirtualGoals,
        states: _States,
        y: Floats,
        weight: Floats,
    ) -> None:
        """After the first step, by the answerer's curve for the state it led to."""
        buffer, place = self.buffer, (goals.position, goals.env)
        ended = (buffer.dones[place] * (1 - buffer.timeouts[place])).astype(np.bool_)
        rows = np.flatnonzero(~ended & ~np.logical_and.reduce([happens for _, happens in events]))
        if not len(rows):
            return
        obs = self._policy_sees({key: value[rows] for key, value in states.kept.items()})
        for (target, happens), curve in zip(events, self._curves(obs, [t for t, _ in events]), strict=True):
            open_ = ~happens[rows]
            at, rest = rows[open_], slice(target.start + 1, target.stop)
            at_risk, survive = curve[open_, : target.width - 1], curve[open_, 1 : target.width]
            weight[at, rest] = at_risk
            y[at, rest] = 1.0 - survive / np.maximum(at_risk, 1e-12)


class _States:
    """States of a minibatch that a fact is to be told about, with their virtual goals."""

    def __init__(self, buffer: Any, goals: VirtualGoals, now: bool) -> None:
        place = (goals.position, goals.env)
        source = buffer.observations if now else buffer.next_observations
        self.now = now
        self.kept = {key: value[place] for key, value in source.items()}
        """As the buffer keeps them."""
        self.kept[GOAL] = goals.goal
        self.obs = {key: _as_told(value, buffer.observation_space[key]) for key, value in self.kept.items()}
        self._buffer, self._goals = buffer, goals
        self._rewards: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self._goals.position)

    def rewards(self) -> NDArray[Any]:
        """As HerReplayBuffer computes them."""
        if self._rewards is None:
            infos: Any = [{} for _ in range(len(self))]
            if self._buffer.copy_info_dict:
                infos = self._buffer.infos[self._goals.position, self._goals.env]
            achieved = self.kept["achieved_goal"]
            self._rewards = self._buffer.env.env_method(
                "compute_reward", achieved, self.kept[GOAL], infos, indices=[0]
            )[0]
        assert self._rewards is not None
        return self._rewards

    def step(self, index: Any, read: set[str]) -> Step:
        """One of them, or all of them as one step of arrays.

        :param index: a number, or a slice
        :param read: is told what the fact reads
        """
        obs = _Watched({key: value[index] for key, value in self.obs.items()}, read)
        unknown: list[Any] = [_Unknown(name, read) for name in Step._fields[1:]]
        step = _VirtualStep(obs, *unknown)
        step.read = read
        step.reward_of = None if self.now else (lambda: self.rewards()[index])
        return step


class _NotRecomputable(Exception):
    pass


class _Unknown:
    """What is not known of a virtual goal's step. A fact that looks at it cannot be recomputed."""

    def __init__(self, name: str, read: set[str]) -> None:
        self.__dict__.update(_name=name, _read=read)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_read"].add(self.__dict__["_name"])
        raise _NotRecomputable(self.__dict__["_name"])

    __getattr__ = __getitem__ = __bool__ = __contains__ = __iter__ = __len__ = __eq__ = __ne__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __index__ = __array__ = __str__ = __invert__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _VirtualStep(Step):
    read: set[str]
    reward_of: Callable[[], Any] | None

    @property
    def reward(self) -> Any:
        if self.reward_of is None:
            return self[2]
        self.read.add("reward")
        return self.reward_of()


class _Watched(dict[str, Any]):
    """An observation that notes what is read of it."""

    def __init__(self, obs: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(obs)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def values(self) -> Any:
        self._read.update(self)
        return super().values()

    def items(self) -> Any:
        self._read.update(self)
        return super().items()


class _GoalFact:
    """One callable fact: whether it can be recomputed, and whether it takes a minibatch at once.

    Both are found out by calling it: on the first minibatch, and again on the 2nd, 4th, 8th, ... it is called row by row,
    what it reads is noted, and its answer to the whole minibatch as one step of arrays is compared (one that differs between
    rows, as all are alike otherwise). A fact that reads what
    is not known once, or raises, is not called again.
    """

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.recomputable = True
        self.about_goal = False
        self._at_once: bool | None = None
        self._n_calls = 0

    def values(self, states: _States) -> Floats | None:
        """The fact in each state (n,), nan where it has no value; None where it cannot be recomputed or is not about the goal."""
        if not self.recomputable:
            return None
        self._n_calls += 1
        check = self._n_calls & (self._n_calls - 1) == 0
        if not check and not self.about_goal:
            return None
        if not check and self._at_once:
            whole = self._whole(states)
            if whole is not None:
                return whole
        one_by_one = self._singly(states)
        if one_by_one is None:
            return None
        if check and self._at_once is not False:
            whole = self._whole(states)
            alike = whole is not None and np.allclose(whole, one_by_one, rtol=1e-5, equal_nan=True)
            self._at_once = alike and (self._at_once or len(np.unique(one_by_one)) > 1 or None)
        return one_by_one if self.about_goal else None

    def _singly(self, states: _States) -> Floats | None:
        read: set[str] = set()
        try:
            told = np.array([self.signal.read(states.step(n, read)) for n in range(len(states))], np.float32)
        except Exception:  # of any kind: what cannot be recomputed is left out
            self.recomputable = False
            return None
        if not read.isdisjoint(NOT_KNOWN):  # though the fact caught the exception itself
            self.recomputable = False
            return None
        self.about_goal |= GOAL in read or "reward" in read
        return told

    def _whole(self, states: _States) -> Floats | None:
        assert self.signal.call is not None
        try:
            told = self.signal.call(states.step(slice(None), set()))
            if not isinstance(told, np.ndarray) or told.shape != (len(states),):
                return None
            return np.array(self.signal.convert(told.tolist()), np.float32)
        except Exception:  # it was written for one step
            return None


def _as_told(value: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    return value.reshape(len(value), *space.shape) if space.shape is not None else value
