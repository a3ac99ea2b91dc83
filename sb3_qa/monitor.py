"""After deployment: do catastrophes without a flag arrive more often than was certified?

>>> monitor = RateMonitor(rate=0.05, alpha=0.05)
>>> [monitor.update(event) for event in (True, False, True, True, True)]
[False, False, True, True, True]
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np

from sb3_qa.bounds import check_share
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError

__all__ = ["MissMonitor", "RateMonitor"]

log = logging.getLogger(__name__)

ODDS_RATIOS = np.geomspace(1.2, 100.0, 40)  # how much worse than certified, as bet on


class RateMonitor:
    """Tests, after every trial and for ever, whether events come more often than a rate.

    The evidence is what a gambler would have made of 1 who bets on higher rates at odds that are fair, or better for the
    house, while the rate is kept: the likelihood ratio of higher rates against the certified one, averaged over those
    bet on (Robbins 1970, the method of mixtures; Waudby-Smith and Ramdas 2024, "Estimating means of bounded random
    variables by betting"). As long as no trial's chance of an event, given those before, is above ``rate``, that is a
    non-negative supermartingale, and the chance that it *ever* reaches ``1 / alpha`` is at most ``alpha`` (Ville 1939).

    :param rate: the rate that was certified, in (0, 1)
    :param alpha: chance of a false alarm, over all time
    """

    def __init__(self, rate: float, alpha: float = 0.05) -> None:
        self.rate = check_share(type(self).__name__, "rate", rate)
        self.alpha = check_share(type(self).__name__, "alpha", alpha)
        odds = self.rate / (1 - self.rate) * ODDS_RATIOS
        other = odds / (1 + odds)
        self._gain = np.log(other / self.rate), np.log((1 - other) / (1 - self.rate))
        self.count = 0
        """Number of trials so far."""
        self.events = 0
        """Number of events among them."""
        self.alarm = False
        """Whether the evidence has ever reached ``1 / alpha``."""

    @property
    def evidence(self) -> float:
        """Capital of the gambler who began with 1; at ``1 / alpha`` the alarm is raised."""
        won, lost = self._gain
        log_wealth = self.events * won + (self.count - self.events) * lost
        highest = float(log_wealth.max())
        return math.exp(min(highest, 700.0)) * float(np.mean(np.exp(log_wealth - highest)))

    def update(self, event: bool) -> bool:
        """Take in one trial.

        :return: whether the alarm has been raised; it stays raised
        :raises QAError: when it is neither true nor false
        """
        _check_bool(type(self).__name__, "event", event, "True or False")
        self.count += 1
        self.events += bool(event)
        self.alarm = self.alarm or self.evidence >= 1 / self.alpha
        return self.alarm

    def state_dict(self) -> dict[str, Any]:
        """What has been counted, as JSON takes it, to go on after a restart."""
        return {"rate": self.rate, "count": self.count, "events": self.events, "alarm": self.alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        :raises QAError: when it is none, or was counted against another rate
        """
        given: Any = state if isinstance(state, Mapping) else {}
        count, events, alarm = given.get("count"), given.get("events"), given.get("alarm")
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in (count, events))
        if not whole or not 0 <= events <= count or not isinstance(alarm, (bool, np.bool_)):
            raise QAError(
                f"{type(self).__name__} got the state {state!r}; expected a count, no more events than that, and an alarm that is true or "
                "false; give what state_dict() returned"
            )
        if given.get("rate") != self.rate:
            raise QAError(
                f"{type(self).__name__} got a state that was counted against a rate of {given.get('rate')}; expected {self.rate:.6g}; give "
                "that of a monitor of the same certificate, per the same kind of trial"
            )
        self.count, self.events, self.alarm = int(count), int(events), bool(alarm)


class MissMonitor(RateMonitor):
    """Watches a certificate: do catastrophes without a flag arrive more often than it says?

    Per catastrophe it holds the share of those without a flag against the certificate's ``miss_rate``. That is what was
    certified, but only as long as nobody acts on the flags: a veto averts the catastrophes that were flagged, and leaves those
    that were not. Per episode it holds the share of episodes with a catastrophe and *no flag before it* against
    :attr:`~sb3_qa.certificate.Certificate.unflagged_bound`; that carries over to an acting veto, as up to
    its first flag an episode is as it would have been without. :class:`~sb3_qa.wrappers.VecVetoAction` keeps such a
    monitor by itself where it is given a certificate about a fact in ``info``.

    >>> monitor = MissMonitor(certificate)  # doctest: +SKIP
    >>> if monitor.update(flagged=False):  # doctest: +SKIP
    ...     take_the_agent_out_of_service()

    :param certificate: what was certified
    :param alpha: chance of a false alarm, over all time
    :param per: what a trial is, a "catastrophe" (the first of an episode) or an "episode"
    """

    def __init__(
        self, certificate: Certificate, alpha: float = 0.05, per: Literal["catastrophe", "episode"] = "catastrophe"
    ) -> None:
        if not isinstance(certificate, Certificate):
            raise QAError(f"MissMonitor got {certificate!r}; expected a Certificate; give what certify() returned")
        if per not in ("catastrophe", "episode"):
            raise QAError(f'MissMonitor got per={per!r}; expected "catastrophe" or "episode"; give one of them')
        super().__init__(certificate.miss_rate if per == "catastrophe" else certificate.unflagged_bound, alpha)
        self.certificate = certificate
        self.per = per

    def update(self, flagged: bool | None) -> bool:
        """Take in the first catastrophe of an episode, or the end of an episode without one.

        :param flagged: whether there was a flag in time (per episode: any flag before it); None where no catastrophe
            came, which only counts per episode
        :return: whether the alarm has been raised; it stays raised
        """
        if flagged is not None:
            _check_bool("MissMonitor", "flagged", flagged, "True, False, or None where no catastrophe came")
        if flagged is None and self.per == "catastrophe":
            return self.alarm
        raised = self.alarm
        missed = flagged is not None and not flagged
        if super().update(missed) and not raised:
            log.warning(
                "catastrophes without a flag arrive more often than certified: %d in %d %ss, and at most %.3g of them were expected "
                "(evidence %.3g, alarm at %.3g); do not rely on the certificate of %r any more, and certify again",
                self.events,
                self.count,
                self.per,
                self.rate,
                self.evidence,
                1 / self.alpha,
                self.certificate.question,
            )
        return self.alarm


def _check_bool(who: str, name: str, value: Any, expected: str) -> None:
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
        raise QAError(f"{who}.update got {name}={value!r}; expected {expected}; give one of them")
