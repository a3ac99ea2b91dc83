"""What a veto leaves in a flight record: which steps are events, and what stood around them."""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import math
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.certificate import answerer_digests
from sb3_qa.errors import QAError
from sb3_qa.questions import Choice
from sb3_qa.recorder import Batch, Chunk, Event, FlightRecorder, pack
from sb3_qa.wrappers.judged import Judged
from sb3_qa.wrappers.shell import Arrival, row
from sb3_qa.wrappers.surroundings import Ring, Stretch, by_name, environments_in, frames_of, seed_of

__all__ = ["Evidence"]

log = logging.getLogger(__name__)

Bools = NDArray[np.bool_]


class _Sighting(NamedTuple):
    """Events of one step, whose answers are still to be given: that takes hardly longer for many at once."""

    here: Reading
    """Of the states they happened in."""
    risks: list[NDArray[Any]]
    """Of each, those of all actions, or of those compared."""
    compared: NDArray[Any] | None
    """(n_events, m, *action_shape), what those about actions are asked of; None for all."""
    events: list[dict[str, Any]]
    """Everything else, by the names of :class:`Event`."""


class _Steps(NamedTuple):
    """Steps to be written down with an event."""

    event: int
    first: int
    """Step of the episode."""
    steps: Stretch | None
    last: Any
    """The observation that the episode ended in, if it did."""

    def chunk(self) -> Chunk:
        """As they are written."""
        arrays = {} if self.steps is None else self.steps.arrays()
        if self.last is not None:
            arrays |= by_name("last", self.last)
        return Chunk(self.event, self.first, 0 if self.steps is None else len(self.steps.steps), arrays)


class Evidence:
    """Keeps the last steps of every environment in memory, and writes them down around each event.

    What is written is committed with a delay of :attr:`FlightRecorder.delay`, in the course of a step.

    :param name: of the wrapper
    :param recorder: where to write
    :param about: what to write down of the wrapper
    """

    def __init__(self, name: str, recorder: FlightRecorder, question: str, about: dict[str, Any]) -> None:
        self.name, self.recorder, self.question, self.about = name, recorder, question, about
        self.env: Any = None
        self._inside: list[Any] | None = None
        self._run: int | None = None
        self._pictures: Sequence[Any] | None = None
        self._to_be_seeded: int | Sequence[int | None] | None = None
        self._begin_anew(0)
        _CLOSE_AT_EXIT.add(self)

    def _begin_anew(self, n: int) -> None:
        self._n = n
        self._ring: Ring | None = None
        self._sightings: list[_Sighting] = []
        self._steps: list[_Steps] = []
        self._batch = Batch()
        self._since: float | None = None  # when what is to be written began to wait
        self._now = 0  # steps taken; those of an episode are counted from its start
        self._start = [0] * n
        self._episode = [-1] * n
        self._seeds: list[int | None] = [None] * n
        self._since_seed = [0] * n
        self._written = [0] * n  # steps that are written down, or are not wanted
        self._until: dict[int, int] = {}  # of environments that an event has happened in, how long to write on
        self._newest: dict[int, int] = {}  # and the number of that event
        self._limits: dict[
            int, int | None
        ] = {}  # the steps after which an environment is cut off; None where they vary
        self._described = True  # whether the record knows of them
        self._open_flags: dict[int, list[tuple[int, int]]] = {}  # that nothing has come of yet: number and time

    def bind(self, qa: QuestionAnswerer) -> None:
        """Find out how to ask, and what a catastrophe is."""
        self._answer()  # what was to be asked of another
        self.qa = qa
        instance = qa.catalogue.find(self.question)
        keys = qa.catalogue.instances
        self._about_state = [key for key, each in keys.items() if not each.per_action]
        self._about_action = [key for key, each in keys.items() if each.per_action]
        self._values = qa.values([*self._about_state, *self._about_action])
        self._options = {
            key: [_as_json_takes_it(option) for option in each.question.answer.options]
            for key, each in keys.items()
            if isinstance(each.question.answer, Choice)
        }
        self._risk_is_told = self.question in self._about_action
        self._listed = isinstance(qa.policy.action_space, spaces.Discrete)
        truth = instance.question.truth
        self._horizon = instance.horizon if truth.operator in ("eventually", "after") else None
        self._exactly = truth.operator == "after"

    def watch(self, env: Any) -> None:
        """Look at this environment's frames and seeds.

        :raises QAError: when frames are wanted and it does not render any
        """
        self.env = env
        self._inside = environments_in(env)
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

    def seed(self, seed: int | Sequence[int | None]) -> None:
        """The environments are to be seeded with this and the numbers after it, as SB3 does, or each with its own."""
        self._to_be_seeded = seed

    def start(self, index: NDArray[np.intp], n: int) -> None:
        """Episodes begin in the environments at ``index`` of ``n``."""
        if n != self._n:
            self._begin_anew(n)
        given = self._to_be_seeded
        if given is not None and len(index) == n:
            self._seeds = [given + i for i in range(n)] if isinstance(given, int) else list(given)
            self._since_seed, self._to_be_seeded = [-1] * n, None
        for i in index.tolist():
            if self._now > self._start[i] or self._episode[i] < 0:  # a reset after a reset begins no other episode
                self._finish(i, None)
                self._episode[i] += 1
                self._since_seed[i] += 1
            seed = None if self._inside is None else seed_of(self._inside[i])
            if seed is not None and seed != self._seeds[i]:
                self._seeds[i], self._since_seed[i] = seed, 0
            self._since_seed[i] = max(self._since_seed[i], 0)
            self._start[i] = self._written[i] = self._now
            self._open_flags.pop(i, None)

    def look(self) -> None:
        """Take the pictures of the states that are about to be acted in."""
        if self.recorder.frames:
            self._pictures = frames_of(self.env)

    def arrive(
        self,
        here: Reading,
        obs: Any,
        judged: Judged,
        executed: NDArray[Any],
        arrival: Arrival,
        happened: Bools | None,
    ) -> None:
        """Take in a step.

        :param here: of the states that were acted in
        :param obs: those states
        :param happened: (n,), whether the catastrophe did; None where that cannot be known
        """
        if len(judged.risk) != self._n:
            self._begin_anew(len(judged.risk))
        if self._ring is None:
            self._ring = Ring(max(self.recorder.before + 1, self.recorder.after, 1), obs)
        self._ring.add(obs, judged.proposed, executed, judged.risk, arrival.rewards, self._pictures)
        self._now += 1
        # Where nobody knows what a catastrophe is, terminations stand for them.
        bad = arrival.terminated if happened is None else happened
        if judged.any_flagged or any(bad.tolist()):
            self._record(np.flatnonzero(judged.flagged | bad), here, judged, executed, arrival, happened)
        if self._open_flags:
            self._settle(happened, arrival)
        done = arrival.done.tolist()
        if any(done):
            self._note_limits(done, arrival.terminated)
        if self._until:
            for i in [i for i, until in self._until.items() if until <= self._now or done[i]]:
                self._finish(i, _last_obs(arrival, i) if done[i] else None)
        if self._since is not None and time.monotonic() - self._since >= self.recorder.delay:
            self.flush()

    @property
    def waiting(self) -> int:
        """How many events are not in the file yet."""
        return len(self._batch.events) + sum(len(each.events) for each in self._sightings)

    def flush(self) -> None:
        """Commit what is waiting."""
        if self._since is None:
            return
        self._answer()
        if self._run and not self._described:
            self._batch.about, self._described = (self._run, self._description), True
        self._batch.chunks += [steps.chunk() for steps in self._steps]
        batch, self._batch, self._steps, self._since = self._batch, Batch(), [], None
        self.recorder.write(batch)

    def close(self) -> None:
        """Write down what is known, and close the file."""
        for i in list(self._until):
            self._finish(i, None)
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
            self.about = {**self.about, "digests": _digests(self.qa)}
            self._run, self._described = self.recorder.begin_run(self._description), True
        now, decision = time.time(), judged.decision
        numbered, events, risks = [], [], []
        for i in rows.tolist():
            number = self.recorder.next_event()
            if not number:
                continue
            info, done, terminated = arrival.infos[i], bool(arrival.done[i]), bool(arrival.terminated[i])
            flagged, vetoed = bool(judged.flagged[i]), bool(judged.vetoed[i])
            numbered.append(i)
            risks.append(judged.risks[i] if judged.risks is not None else judged.risk[i : i + 1])
            event = dict(
                id=number,
                run=self._run,
                time=now,
                env=i,
                episode=self._episode[i],
                step=self._now - 1 - self._start[i],
                seed=None if self._seeds[i] is None else str(self._seeds[i]),
                since_seed=self._since_seed[i],
                flagged=flagged,
                vetoed=info["qa/vetoed"],
                let_through=decision is not None and bool(decision.let_through[i]),
                probability=float(not vetoed) if decision is None else float(decision.probability[i]),
                withheld=decision is not None and bool(decision.withheld[i]),
                no_safe_action=bool(judged.unsafe[i]),
                catastrophe=None if happened is None else bool(happened[i]),
                terminated=terminated,
                truncated=done and not terminated,
                risk=_finite(float(judged.risk[i])),
                executed_risk=_finite(info[f"qa/{self.question}"]) if self._risk_is_told else None,
                proposed=_json(info["qa/proposed_action"]),
                executed=_json(info["qa/executed_action"]),
            )
            events.append(event)
            self._write_steps(i, number, _last_obs(arrival, i) if done else None)
            self._until[i], self._newest[i] = self._now + self.recorder.after, number
            if flagged and self._horizon is not None:
                self._open_flags.setdefault(i, []).append((number, self._now))
        if not events:
            return
        index = np.array(numbered)
        compared = None if judged.options is None else np.array(judged.options[index])
        if compared is None and not self._listed:
            compared = np.stack([judged.proposed[index], executed[index]], axis=1)
        kept = here.kept(index)
        self._sightings.append(_Sighting(here.part(index) if kept is None else kept, risks, compared, events))
        if kept is None:
            self._answer()

    def _answer(self) -> None:
        """Give the answers to all questions where there were events."""
        sightings, self._sightings = self._sightings, []
        for _, group in itertools.groupby(sightings, _asked_alike):
            alike = list(group)
            here = alike[0].here if len(alike) == 1 else Reading.joined([each.here for each in alike])
            compared = None if alike[0].compared is None else np.concatenate([each.compared for each in alike])
            risks = [each for one in alike for each in one.risks]
            events = [event for one in alike for event in one.events]
            for j, (event, answers) in enumerate(zip(events, self._answers(here, compared), strict=True)):
                arrays = [risks[j]] if compared is None else [risks[j], compared[j]]
                self._batch.events.append(Event(**event, answers=_json(answers), compared=pack(arrays)))

    def _answers(self, here: Reading, compared: NDArray[Any] | None) -> list[dict[str, Any]]:
        """Answers to all questions in these states; those about actions of each of ``compared``."""
        about_state, about_action = self._values.of_states_and_actions(here, np.arange(len(here)), compared)
        answers = [dict(zip(self._about_state, values, strict=True)) for values in about_state.tolist()]
        if self._about_action:
            for given, values in zip(answers, about_action.swapaxes(1, 2).tolist(), strict=True):
                given.update(zip(self._about_action, values, strict=True))
        for key, options in self._options.items():
            for given in answers:
                given[key] = _named(options, given[key])
        return answers

    @property
    def _description(self) -> dict[str, Any]:
        """What is written down of the wrapper as a whole."""
        limits = {str(i): limit for i, limit in self._limits.items() if limit is not None}
        about = {"wrapper": self.name, "question": self.question, **self.about}
        return {**about, "horizon": self._horizon, "time_limits": limits}

    def _note_limits(self, done: list[bool], terminated: Bools) -> None:
        """Learn from the episodes that were cut off where a time limit is: it would cut off what is flagged just before it."""
        for i in [i for i, over in enumerate(done) if over and not terminated[i]]:
            length = self._now - self._start[i]
            limit = length if self._limits.get(i, length) == length else None
            if i not in self._limits or self._limits[i] != limit:
                self._limits[i], self._described = limit, False
                if self._run:
                    self._wait()

    def _finish(self, i: int, last: Any) -> None:
        """Write down the steps after an event."""
        if i in self._until:
            self._write_steps(i, self._newest.pop(i), last)
            del self._until[i]

    def _write_steps(self, i: int, event: int, last: Any) -> None:
        """Write down those of the newest steps that are not yet written, and the state that ended the episode."""
        assert self._ring is not None
        reach = self._ring.length if i in self._until else self.recorder.before + 1
        first = max(self._written[i], self._now - reach)
        steps = self._ring.newest(i, self._now - first) if first < self._now else None
        if steps is not None or last is not None:
            self._wait()
            self._steps.append(_Steps(event, first - self._start[i], steps, last))
        self._written[i] = self._now

    def _wait(self) -> None:
        """Something is to be written."""
        if self._since is None:
            self._since = time.monotonic()

    def _settle(self, happened: Bools | None, arrival: Arrival) -> None:
        """What came of the flags: whether the question's event came within its horizon."""
        assert self._horizon is not None
        if happened is None:
            self._open_flags.clear()
            return
        outcomes = self._batch.outcomes
        known = len(outcomes)
        for i, flags in list(self._open_flags.items()):
            still = []
            for number, at in flags:
                over = self._now - at + 1 >= self._horizon
                if happened[i] and (over or not self._exactly):
                    outcomes.append((1, number))
                elif over or arrival.terminated[i]:  # a termination ends the future; a time limit leaves it unknown
                    outcomes.append((0, number))
                elif not arrival.done[i]:
                    still.append((number, at))
            if still:
                self._open_flags[i] = still
            else:
                del self._open_flags[i]
        if len(outcomes) > known:
            self._wait()


_CLOSE_AT_EXIT: weakref.WeakSet[Evidence] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for evidence in list(_CLOSE_AT_EXIT):
        evidence.close()


def _asked_alike(sighting: _Sighting) -> Any:
    """What sightings have in common that are asked about at once: who answers, and how many actions are compared."""
    return id(sighting.here.head), None if sighting.compared is None else sighting.compared.shape[1:]


def _named(options: Sequence[Any], index: Any) -> Any:
    """The options of indices, which may be a list for several actions; None where nothing is known."""
    if isinstance(index, list):
        return [_named(options, each) for each in index]
    return options[int(index)] if np.isfinite(index) else None


def _as_json_takes_it(option: Any) -> Any:
    """An option of a choice; of one that JSON has no form for, such as a member of an enumeration, its text."""
    if isinstance(option, np.generic):
        option = option.item()
    try:
        json.dumps(option)
    except (TypeError, ValueError):
        return str(option)
    return option


def _digests(qa: QuestionAnswerer) -> dict[str, str] | None:
    """What tells the answerer from another; None of one whose weights no digest can be made of, which stops nothing."""
    try:
        return answerer_digests(qa)
    except Exception as error:
        log.warning("the flight record will not tell the answerer from another: its weights have no digest (%s)", error)
        return None


def _last_obs(arrival: Arrival, i: int) -> Any:
    return row(arrival.last_obs(np.array([i])), 0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(value: Any) -> str:
    """Strict JSON: what is not finite becomes null."""
    if type(value) is int:
        return str(value)
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
