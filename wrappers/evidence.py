"""What a veto leaves in a flight record: which steps are events, and what stood around them."""

from __future__ import annotations

import atexit
import json
import logging
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.errors import QAError
from sb3_qa.questions import Choice
from sb3_qa.recorder import Batch, Chunk, Event, FlightRecorder, pack
from sb3_qa.wrappers.judged import Judged
from sb3_qa.wrappers.shell import Arrival, plain, row
from sb3_qa.wrappers.surroundings import Fact, Ring, by_name, frames_of, seeds_in

__all__ = ["Evidence"]

Bools = NDArray[np.bool_]

log = logging.getLogger(__name__)

FLUSH = 1.0  # seconds that steps after an event may wait for the next commit


class Evidence:
    """Keeps the last steps of every environment in memory, and writes them down around each event.

    The event is committed before the step returns; the steps after it follow with the next commit, a second later at most
    while steps are taken.

    :param name: of the wrapper
    :param recorder: where to write
    :param about: what to write down of the wrapper
    """

    def __init__(self, name: str, recorder: FlightRecorder, question: str, about: dict[str, Any]) -> None:
        self.name, self.recorder, self.question, self.about = name, recorder, question, about
        self.env: Any = None
        self._run: int | None = None
        self._n = 0
        self._ring: Ring | None = None
        self._pictures: Sequence[Any] | None = None
        self._to_be_seeded: int | None = None
        self._begin_anew(0)
        _CLOSE_AT_EXIT.add(self)

    def _begin_anew(self, n: int) -> None:
        self._n = n
        self._ring = None
        self._batch = Batch()
        self._waiting_since = 0.0
        self._episode = [-1] * n
        self._elapsed = np.zeros(n, np.int64)
        self._seeds: list[int | None] = [None] * n
        self._since_seed = [0] * n
        self._written = [-1] * n  # the last step of the episode that is written
        self._until: dict[int, int] = {}  # of an environment in the steps after an event, the last of them
        self._newest: dict[int, int] = {}  # and the number of that event
        self._open_outcomes: dict[int, deque[tuple[int, int]]] = {}  # of flags that nothing has come of yet: id, step

    def bind(self, qa: QuestionAnswerer) -> None:
        """Find out how to ask, and what a catastrophe is."""
        self.qa = qa
        instance = qa.catalogue.find(self.question)
        keys = qa.catalogue.instances
        self._about_state = [key for key, each in keys.items() if not each.per_action]
        self._about_action = [key for key, each in keys.items() if each.per_action]
        self._state_values = qa.values(self._about_state)
        self._action_values = qa.values(self._about_action)
        self._options = {
            key: each.question.answer.options for key, each in keys.items() if isinstance(each.question.answer, Choice)
        }
        self._risk_is_told = self.question in self._about_action
        self._listed = isinstance(qa.policy.action_space, spaces.Discrete)
        self._fact = Fact(self.name, instance.question.truth.fact, instance.slots)
        truth = instance.question.truth
        self._horizon = instance.horizon if truth.operator in ("eventually", "after") else None
        self._exactly = truth.operator == "after"

    def watch(self, env: Any) -> None:
        """Look at this environment's frames and seeds.

        :raises QAError: when frames are wanted and it does not render any
        """
        self.env = env
        waiting = getattr(
            getattr(env, "unwrapped", None), "_seeds", None
        )  # given to SB3's environments, for the next reset
        if isinstance(env, VecEnv) and waiting and waiting[0] is not None:
            self._to_be_seeded = int(waiting[0])
        mode = getattr(env, "render_mode", None)
        if self.recorder.frames and mode not in ("rgb_array", "rgb_array_list"):
            raise QAError(
                f"{self.name} got a FlightRecorder(frames=True) and an environment of render_mode={mode!r}; expected 'rgb_array'; make it "
                'with render_mode="rgb_array" (make_vec_env: env_kwargs=dict(render_mode="rgb_array")), or leave frames out'
            )

    def seed(self, seed: int) -> None:
        """The environments are to be seeded with this and the numbers after it, as SB3 does."""
        self._to_be_seeded = seed

    def start(self, index: NDArray[np.intp], n: int) -> None:
        """Episodes begin in the environments at ``index`` of ``n``."""
        if n != self._n:
            self._begin_anew(n)
        seeds, given = seeds_in(self.env, n), self._to_be_seeded
        if given is not None and len(index) == n:
            self._seeds, self._since_seed, self._to_be_seeded = [given + i for i in range(n)], [-1] * n, None
        for i in index.tolist():
            if self._elapsed[i] or self._episode[i] < 0:  # a reset after a reset begins no other episode
                self._finish(i, int(self._elapsed[i]) - 1, None)
                self._episode[i] += 1
                self._since_seed[i] += 1
            if seeds is not None and seeds[i] != self._seeds[i]:
                self._seeds[i], self._since_seed[i] = seeds[i], 0
            self._since_seed[i] = max(self._since_seed[i], 0)
            self._elapsed[i], self._written[i] = 0, -1
            self._open_outcomes.pop(i, None)

    def look(self) -> None:
        """Take the pictures of the states that are about to be acted in."""
        if self.recorder.frames:
            self._pictures = frames_of(self.env)

    def arrive(self, here: Reading, obs: Any, judged: Judged, executed: NDArray[Any], arrival: Arrival) -> None:
        """Take in a step.

        :param here: of the states that were acted in
        :param obs: those states
        """
        if len(judged.risk) != self._n:
            self._begin_anew(len(judged.risk))
        if self._ring is None:
            self._ring = Ring(max(self.recorder.before + 1, self.recorder.after, 1), obs, judged.proposed)
        self._ring.add(obs, judged.proposed, executed, judged.risk, arrival.rewards, self._pictures)
        happened = self._fact.of(arrival, executed, self.env)
        if happened is None:  # nobody knows what a catastrophe is: terminations stand for them
            events = judged.flagged | arrival.terminated
        else:
            events = judged.flagged | happened
        if events.any():
            self._record(np.flatnonzero(events), here, judged, executed, arrival, happened)
        for i in list(self._open_outcomes):
            came = None if happened is None else bool(happened[i])
            self._settle(i, came, bool(arrival.done[i]), bool(arrival.terminated[i]))
        for i, until in list(self._until.items()):
            if arrival.done[i]:
                self._finish(i, int(self._elapsed[i]), row(arrival.last_obs(np.array([i])), 0))
            elif self._elapsed[i] >= until:
                self._finish(i, int(self._elapsed[i]), None)
        self._elapsed += 1
        if self._batch and time.monotonic() - self._waiting_since > FLUSH:
            self.flush()

    def flush(self) -> list[int]:
        """Commit what is waiting; the numbers of its events."""
        batch, self._batch = self._batch, Batch()
        self._waiting_since = time.monotonic()
        return (self.recorder.write(batch) or []) if batch else []

    def close(self) -> None:
        """Write down what is known, and close the file."""
        for i in list(self._until):
            self._finish(i, int(self._elapsed[i]) - 1, None)
        self.flush()
        self.recorder.close()

    def _record(
        self,
        rows: NDArray[np.intp],
        here: Reading,
        judged: Judged,
        executed: NDArray[Any],
        arrival: Arrival,
        happened: Bools | None,
    ) -> None:
        """Write down an event of each of these environments, and the steps up to it."""
        if self._run is None:
            self._run = self.recorder.begin_run({"wrapper": self.name, "question": self.question, **self.about})
        now, decision = time.time(), judged.decision
        answers, compared = self._answers(rows, here, judged, executed)
        for j, i in enumerate(rows.tolist()):
            risks = judged.risks[i] if judged.risks is not None else judged.risk[i : i + 1]
            vetoed, info, done = bool(judged.vetoed[i]), arrival.infos[i], bool(arrival.done[i])
            event = Event(
                run=self._run,
                time=now,
                env=i,
                episode=self._episode[i],
                step=int(self._elapsed[i]),
                seed=self._seeds[i],
                since_seed=self._since_seed[i],
                flagged=bool(judged.flagged[i]),
                vetoed=info["qa/vetoed"],
                let_through=decision is not None and bool(decision.let_through[i]),
                probability=float(not vetoed) if decision is None else float(decision.probability[i]),
                withheld=decision is not None and bool(decision.withheld[i]),
                no_safe_action=bool(judged.unsafe[i]),
                catastrophe=None if happened is None else bool(happened[i]),
                terminated=bool(arrival.terminated[i]),
                truncated=done and not arrival.terminated[i],
                risk=_finite(judged.risk[i]),
                executed_risk=_finite(info[f"qa/{self.question}"]) if self._risk_is_told else None,
                proposed=_json(plain(judged.proposed[i])),
                executed=_json(plain(executed[i])),
                answers=_json(answers[j]),
                compared=pack([risks] if compared is None else [risks, compared[j]]),
            )
            self._batch.events.append(event)
            last = row(arrival.last_obs(np.array([i])), 0) if done else None
            self._write_steps(i, int(self._elapsed[i]), len(self._batch.events) - 1, last)
        for i, number in zip(rows.tolist(), self.flush(), strict=False):  # none, if they could not be written
            step = int(self._elapsed[i])
            if not arrival.done[i]:
                self._until[i], self._newest[i] = step + self.recorder.after, number
            if judged.flagged[i] and self._horizon is not None:
                self._open_outcomes.setdefault(i, deque()).append((number, step))

    def _answers(
        self, rows: NDArray[np.intp], here: Reading, judged: Judged, executed: NDArray[Any]
    ) -> tuple[list[dict[str, Any]], NDArray[Any] | None]:
        """Answers to all questions, and the actions (len(rows), m, ...) that those about actions were asked of; None for all."""
        part = here.part(rows)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        if self._about_state:
            for given, values in zip(answers, self._state_values.of_states(part).tolist(), strict=True):
                given.update(zip(self._about_state, values, strict=True))
        compared = None if judged.options is None else np.array(judged.options[rows])
        if compared is None and not self._listed:
            compared = np.stack([judged.proposed[rows], executed[rows]], axis=1)
        if self._about_action:
            table = np.moveaxis(self._action_values.of_actions(part, compared), -1, 1)
            for given, values in zip(answers, table.tolist(), strict=True):
                given.update(zip(self._about_action, values, strict=True))
        for key, options in self._options.items():
            for given in answers:
                given[key] = _named(options, given[key])
        return answers, compared

    def _finish(self, i: int, step: int, last: Any) -> None:
        """Write down the steps after an event."""
        if self._until.pop(i, None) is not None:
            self._write_steps(i, step, ~self._newest.pop(i), last)

    def _write_steps(self, i: int, step: int, event: int, last: Any) -> None:
        """Write down what is not yet written of the steps up to ``step``, the newest; and the state that ended the episode."""
        assert self._ring is not None
        reach = self._ring.length if i in self._until or event < 0 else self.recorder.before + 1
        first = max(self._written[i] + 1, step + 1 - reach, 0)
        arrays = self._ring.newest(i, step + 1 - first) if first <= step else {}
        if last is not None:
            arrays |= by_name("last", last)
        if arrays:
            if not self._batch:
                self._waiting_since = time.monotonic()
            self._batch.chunks.append(Chunk(event, first, step + 1 - first, arrays))
        self._written[i] = step

    def _settle(self, i: int, came: bool | None, done: bool, terminated: bool) -> None:
        """What came of the flags: whether the question's event came within its horizon."""
        assert self._horizon is not None
        step, flags = int(self._elapsed[i]), self._open_outcomes[i]
        still: deque[tuple[int, int]] = deque()
        for number, at in flags:
            over = step - at + 1 >= self._horizon
            if came is None:
                continue
            if came and (over or not self._exactly):
                self._batch.outcomes.append((1, number))
            elif over or terminated:  # a termination ends the future; a time limit leaves it unknown
                self._batch.outcomes.append((0, number))
            elif not done:
                still.append((number, at))
        if still:
            self._open_outcomes[i] = still
        else:
            del self._open_outcomes[i]


_CLOSE_AT_EXIT: weakref.WeakSet[Evidence] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for evidence in list(_CLOSE_AT_EXIT):
        evidence.close()


def _named(options: Sequence[Any], index: Any) -> Any:
    """The options of indices, which may be a list for several actions; None where nothing is known."""
    if isinstance(index, list):
        return [_named(options, each) for each in index]
    return options[int(index)] if np.isfinite(index) else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _json(value: Any) -> str:
    """Strict JSON: what is not finite becomes null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
