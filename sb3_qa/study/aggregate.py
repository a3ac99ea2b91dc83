"""From results of runs to estimates with intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.scores import Interval

__all__ = ["Table", "collect", "difference", "estimate", "interquartile_mean", "verdict"]

Result = Mapping[str, Any]
Table = dict[str, dict[int, float]]
"""Of a quantity, by task and by seed."""
N_RESAMPLES = 5_000


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the middle half of the values (..., n); those at its ends count in part (Agarwal et al. 2021, arXiv 2108.13264).

    >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 3.0, 100.0])))
    2.0
    """
    ordered = np.sort(values, axis=-1)
    n = ordered.shape[-1]
    edges = np.arange(n + 1) / n
    share = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return np.asarray(ordered @ share / share.sum())


def collect(
    results: Sequence[Result], arm: str, quantity: Callable[[Result], float | None], labels: float = 1.0
) -> Table:
    """A quantity of an arm's runs; runs without it are left out.

    :param quantity: of a result
    """
    table: Table = {}
    for result in results:
        if result["arm"] == arm and result["labels"] == labels:
            value = quantity(result)
            if value is not None and np.isfinite(value):
                table.setdefault(result["task"], {})[result["seed"]] = float(value)
    return table


def difference(a: Table, b: Table) -> Table:
    """``a - b`` where both have been run: paired by task and seed."""
    return {
        task: {seed: a[task][seed] - b[task][seed] for seed in a[task] if seed in b[task]}
        for task in a
        if task in b and set(a[task]) & set(b[task])
    }


def estimate(table: Table, seed: int = 0) -> Interval | None:
    """Interquartile mean over all runs, with a 95 % stratified bootstrap interval: seeds are resampled within tasks.

    With fewer than two seeds of every task there is no interval, and ``nan`` in its place; None without any run.
    """
    strata = [np.array(list(seeds.values())) for seeds in table.values() if seeds]
    if not strata:
        return None
    rng = np.random.default_rng(seed)
    resampled = [rng.choice(values, (N_RESAMPLES, len(values))) for values in strata]
    means = interquartile_mean(np.concatenate(resampled, axis=1))
    middle = float(interquartile_mean(np.concatenate(strata)))
    if all(len(values) < 2 for values in strata):
        return Interval(middle, float("nan"), float("nan"))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(middle, float(low), float(high))


def verdict(interval: Interval | None, *, at_least: float = 0.0, margin: float = 0.0) -> str:
    """What an interval says of the claim that a quantity is above ``at_least - margin``.

    :return: "supported" where all of the interval is above it, "contradicted" where all is below, else "open"; "not run"
        without any, "too few runs" without its bounds
    """
    if interval is None:
        return "not run"
    if not np.isfinite(interval.low):
        return "too few runs"
    bar = at_least - margin
    return "supported" if interval.low > bar else "contradicted" if interval.high < bar else "open"
