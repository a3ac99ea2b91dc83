"""A certificate at work in a veto: it is held against the answerer, and against what happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.facts import fact_of_slots
from sb3_qa.monitor import MissMonitor
from sb3_qa.wrappers.shell import Arrival

__all__ = ["Guard", "guard_of"]

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
    over: bool = False
    """Whether all is known that will be asked."""


class Guard:
    """Refuses an answerer that was not certified, and watches whether catastrophes come without a flag.

    Episodes are told to the monitor in the order in which they *began*: of those that run side by side, the ones with an
    early catastrophe would else be counted first.

    :param certificate: of the threshold
    :param shadow: whether nobody acts on the flags
    """

    def __init__(self, certificate: Certificate, shadow: bool) -> None:
        self.certificate = certificate
        self.shadow = shadow
        self.monitor = MissMonitor(certificate, per="catastrophe" if shadow else "episode")
        self._checked: int | None = None
        self._fact: str | None = None
        self._open: dict[int, _Episode] = {}
        self._queue: deque[_Episode] = deque()

    def bind(self, qa: QuestionAnswerer) -> None:
        """Hold an answerer against the certificate, and find out which fact to watch."""
        self._checked = None
        self.check(qa)
        instance = qa.catalogue.find(self.certificate.question)
        fact = fact_of_slots(instance.question.truth.fact, instance.slots)
        self._fact = fact if isinstance(fact, str) else None

    def check(self, qa: QuestionAnswerer | None) -> None:
        """The same again, if the weights may have changed since: a live answerer learns on."""
        if qa is not None and qa.version != self._checked:
            self.certificate.check(qa)
            self._checked = qa.version

    def begin(self, index: NDArray[np.intp], infos: Sequence[dict[str, Any]]) -> None:
        """Episodes begin in these environments; tell ``qa/alarm``."""
        for i, info in zip(index.tolist(), infos, strict=True):
            if i in self._open:
                self._open[
                    i
                ].over = True  # given up by a reset: a shorter episode, with no more misses than a whole one
            self._open[i] = _Episode()
            self._queue.append(self._open[i])
            info["qa/alarm"] = self.monitor.alarm

    def watch(self, flagged: Bools, arrival: Arrival) -> None:
        """Take in a step of every environment: what was flagged, and what came of it; tell ``qa/alarm``."""
        for i, info in enumerate(arrival.infos):
            episode = self._open.get(i)
            if episode is not None and self._fact is not None:
                self._step(episode, bool(flagged[i]), info.get(self._fact))
                if arrival.done[i]:
                    del self._open[i]
                    episode.over = True
        while self._queue and self._queue[0].over:
            episode = self._queue.popleft()
            if episode.step:
                self.monitor.update(episode.flagged)
        for info in arrival.infos:
            info["qa/alarm"] = self.monitor.alarm

    def _step(self, episode: _Episode, flagged: bool, fact: Any) -> None:
        if flagged:
            episode.flags.append(episode.step)
        episode.step += 1  # the number of the state arrived in
        if fact is None or not bool(fact) or episode.flagged is not None:
            return
        first, last = 0, episode.step
        if self.shadow:
            last = episode.step - self.certificate.lead
            first = episode.step - (self.certificate.window or episode.step)
        # Once a veto has acted the episode is another one: only a catastrophe with no flag at all is held against it.
        episode.flagged = any(first <= t <= last for t in episode.flags)
        episode.over = True
