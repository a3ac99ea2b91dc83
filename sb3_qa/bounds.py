"""Exact binomial bounds, and the highest threshold that they certify. Pure functions over counts of episodes.

>>> [needed(rate, 0.95) for rate in (0.1, 0.05, 0.01)]
[29, 59, 299]
>>> allowed(124, 0.05, 0.95)
2
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sb3_qa.errors import QAError

__all__ = ["THRESHOLDS", "allowed", "binomial_cdf", "fixed_sequence", "needed", "upper_bound"]

Floats = NDArray[np.float64]

# Evenly spread in the odds, as the risks of rare events are small ones: 2.8 % apart, from one in a million up. Each is a
# float32, as risks are, so that a comparison with a risk comes out alike wherever it is made.
_ODDS = np.exp(np.linspace(-1, 1, 1001) * math.log(1e6))
THRESHOLDS: Floats = np.unique((_ODDS / (1 + _ODDS)).astype(np.float32)).astype(np.float64)
"""The thresholds that are tested unless others are given, ascending; fixed before any data are seen."""


def binomial_cdf(count: int, rate: float) -> Floats:
    """P(X <= k) for k = 0 .. count, where X is the number of events in ``count`` trials of that rate: (count + 1,).

    >>> binomial_cdf(2, 0.5).tolist()
    [0.25, 0.75, 1.0]
    """
    k = np.arange(1, count + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((count - k + 1) / k))])  # log of the binomial coefficients
    k = np.arange(count + 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a rate of 0 or 1
        log_p = ways + np.where(k > 0, k * np.log(rate), 0.0) + np.where(k < count, (count - k) * np.log1p(-rate), 0.0)
    cdf: Floats = np.minimum(np.cumsum(np.exp(log_p)), 1.0)
    cdf[-1] = 1.0
    return cdf


def upper_bound(events: int, count: int, confidence: float) -> float:
    """One-sided upper bound of a rate from ``events`` in ``count`` trials (Clopper and Pearson 1934).

    The rate at which so few events would be seen with probability ``1 - confidence``; 1.0 if every trial was an event.
    It also holds where trials went on until enough events had been seen.

    >>> round(upper_bound(0, 59, 0.95), 4)
    0.0495
    """
    if events >= count:
        return 1.0
    low, high = events / count, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if binomial_cdf(count, middle)[events] > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def allowed(count: int, rate: float, confidence: float) -> int:
    """The most events in ``count`` trials that still show, with this confidence, a rate of at most ``rate``.

    That is the largest k with P(X <= k) <= 1 - confidence if the rate were ``rate``; -1 if not even 0 events would do.
    """
    return int(np.searchsorted(binomial_cdf(count, rate), _tolerant(1 - confidence), side="right")) - 1


def needed(rate: float, confidence: float, events: int = 0) -> int:
    """The fewest trials in which so many events would show, with this confidence, a rate of at most ``rate``."""
    low, high = events, math.ceil((events + 1) / rate)
    while allowed(high, rate, confidence) < events:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if allowed(middle, rate, confidence) >= events else (middle, high)
    return high


def fixed_sequence(events: ArrayLike, count: int, rate: float, confidence: float) -> int:
    """How many of a sequence of hypotheses "the rate is above ``rate``" are rejected: the first so many.

    Each is tested at the full level ``1 - confidence`` with the exact binomial p-value, in the order given, until the
    first that is not rejected (Bauer 1991; fixed-sequence testing of Learn then Test, Angelopoulos, Bates, Candès,
    Jordan and Lei 2021, arXiv 2110.01052). The chance that any true one is among those rejected is then at most
    ``1 - confidence``, however many there are, provided that the order was fixed beforehand.

    :param events: (n_hypotheses,), number of events in ``count`` trials, for each
    """
    p_value = binomial_cdf(count, rate)[np.asarray(events, np.intp)]
    accepted = np.flatnonzero(p_value > _tolerant(1 - confidence))
    return int(accepted[0]) if len(accepted) else len(p_value)


def check_share(where: str, name: str, value: Any, example: float = 0.05) -> float:
    """A share in (0, 1), as a float.

    :raises QAError: when it is none
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0.0 < value < 1.0:
        raise QAError(f"{where} got {name}={value!r}; expected a share between 0 and 1; give e.g. {name}={example}")
    return float(value)


def check_whole(where: str, name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``.

    :raises QAError: when it is none
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise QAError(
            f"{where} got {name}={value!r}; expected a whole number, at least {least}; give e.g. {name}={least}"
        )
    return int(value)


def _tolerant(level: float) -> float:
    return level * (1 + 1e-9)  # 1 - 0.95 is a hair above 0.05, and 1 - 0.9 one below 0.1
