"""A certificate at work in a veto: it is held against the answerer, and against what happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.monitor import MissMonitor
from sb3_qa.wrappers.shell import Arrival

__all__ = ["Guard", "guard_of"]

log = logging.getLogger(__name__)

LOOK_AGAIN = 1.0  # seconds until the weights are looked at again, though nothing says that they have changed
MOST_WAITING = 100  # episodes that are over and wait for one that began before them
Bools = NDArray[np.bool_]


def guard_of(name: str, question: str, threshold: Any, shadow: bool) -> Guard | None:
    """The guard of a threshold that is a certificate (or one as an environment's spec has it); None of a number."""
    if isinstance(threshold, Mapping):
        warn = threshold.get("mismatch") == "warn"
        threshold = Certificate.from_dict(threshold)
        threshold = threshold.only_warn() if warn else threshold
    if not isinstance(threshold, Certificate):
        return None
    if threshold.question != question:
        raise QAError(
            f"{name} asks {question!r} and got a certificate of {threshold.question!r}; expected one of the same; certify() {question!r}"
        )
    return Guard(threshold, shadow)


@dataclass(eq=False)
class _Episode:
    """An episode under watch."""

    flags: list[int] = field(default_factory=list)
    """Decisions that were flagged."""
    step: int = 0
    flagged: bool | None = None
    """Whether its first catastrophe had a flag in time; None while there has been none."""
    known: bool = True
    """Whether of every step it is known if the catastrophe happened in it."""
    over: bool = False
    """Whether all is known that will be asked."""


class Guard:
    """Refuses an answerer that was not certified, and watches whether catastrophes come without a flag.

    Episodes are told to the monitor in the order in which they *began*: of those that run side by side, the ones with an
    early catastrophe would else be counted first. One that a hundred others have overtaken is waited for no longer, and counted
    when it ends.

    :param certificate: of the threshold
    :param shadow: whether nobody acts on the flags
    """

    def __init__(self, certificate: Certificate, shadow: bool) -> None:
        self.certificate = certificate
        self.shadow = shadow
        self.monitor = MissMonitor(certificate, per="catastrophe" if shadow else "episode")
        self._checked, self._look_again = -1, 0.0
        self._open: dict[int, _Episode] = {}
        self._queue: list[_Episode] = []
        self._told, self._untold = False, 0  # whether the fact has been told once, and how many episodes ended before
        self._warned = False

    def bind(self, qa: QuestionAnswerer, env: Any = None) -> None:
        """Hold an answerer against the certificate, and what an environment normalises observations by, once it is known."""
        self._look(qa, env)

    def check(self, qa: QuestionAnswerer | None) -> None:
        """The same of the answerer again, if its weights may have changed since: a live one learns on.

        Weights that were written to past torch's count of changes (by ``.data``, as target networks are) are found within a second,
        or within a hundred times as long as looking at them takes.
        """
        if qa is not None and (qa.version != self._checked or time.monotonic() > self._look_again):
            self._look(qa, None)

    def _look(self, qa: QuestionAnswerer, env: Any) -> None:
        started = time.monotonic()
        self.certificate.check(qa, env)
        now = time.monotonic()
        self._checked, self._look_again = qa.version, now + max(LOOK_AGAIN, 100.0 * (now - started))
        if self.certificate.mismatch == "warn":  # it has been said
            self._look_again = float("inf")

    def begin(self, index: NDArray[np.intp]) -> None:
        """Episodes begin in these environments."""
        for i in index.tolist():
            if i in self._open:  # given up by a reset: a shorter episode, with no more misses than a whole one
                self._open[i].over = True
            self._open[i] = _Episode()
            self._queue.append(self._open[i])

    def watch(self, flagged: Bools, arrival: Arrival, happened: Bools | None) -> None:
        """Take in a step of every environment: what was flagged, and what came of it; tell ``qa/alarm``.

        :param happened: (n,), whether the catastrophe did; None where that cannot be known
        """
        if happened is not None and not self._told:  # told where it happens, and so it had not
            self._told = True
            for _ in range(self._untold):
                self.monitor.update(None)
            for waiting in self._queue:
                waiting.known = True
        for i in range(len(arrival.infos)):
            episode = self._open.get(i)
            if episode is not None:
                self._step(episode, bool(flagged[i]), None if happened is None else bool(happened[i]))
                if arrival.done[i]:
                    del self._open[i]
                    episode.over = True
        if self._queue and (self._queue[0].over or len(self._queue) > MOST_WAITING + len(self._open)):
            self._count()
        for info in arrival.infos:
            info["qa/alarm"] = self.monitor.alarm

    def _count(self) -> None:
        """Tell the monitor of episodes that are over, in the order of their beginnings."""
        first_open = next((n for n, episode in enumerate(self._queue) if not episode.over), len(self._queue))
        upto = len(self._queue) if len(self._queue) > MOST_WAITING + len(self._open) else first_open
        for episode in self._queue[:upto]:
            if episode.over and episode.flagged is None and not episode.known:
                self._untold += not self._told
                self._say_unknown()
            elif episode.over and episode.step:
                self.monitor.update(episode.flagged)
        self._queue = [episode for episode in self._queue[:upto] if not episode.over] + self._queue[upto:]

    def _say_unknown(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "nobody can tell whether the catastrophe has happened that the certificate of %r is about: its fact is in no info, or was "
                "a callable that the file of an answerer does not hold. Until it is told, qa/alarm will NOT be raised. Let info tell it "
                "under the name of the fact, or pass a live answerer",
                self.certificate.question,
            )

    def _step(self, episode: _Episode, flagged: bool, happened: bool | None) -> None:
        if flagged:
            episode.flags.append(episode.step)
        episode.step += 1  # the number of the state arrived in
        episode.known &= happened is not None
        if not happened or episode.flagged is not None:
            return
        first, last = 0, episode.step
        if self.shadow:
            last = episode.step - self.certificate.lead
            first = episode.step - (self.certificate.window or episode.step)
        # Once a veto has acted the episode is another one: only a catastrophe with no flag at all is held against it.
        episode.flagged = any(first <= t <= last for t in episode.flags)
        episode.over = True
