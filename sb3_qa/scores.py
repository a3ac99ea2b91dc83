"""How good the answers are: pure functions from answers and outcomes to numbers.

A *probability* is what an answer said, in [0, 1]; an *outcome* is what then happened, 0 or 1 (or a boolean). Both have
one shape, any shape, and their entries count alike. An outcome that never became known (a censored future) has no
place here: leave it out. Everything is computed in float64; a score that the data cannot settle is ``nan``.

>>> brier([0.9, 0.2], [1, 0])
0.025
>>> score([0.9, 0.2, 0.1, 0.2], [1, 0, 0, 0])["brier_skill"] > 0
True
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sb3_qa.errors import QAError

__all__ = [
    "Interval",
    "Reliability",
    "absolute_error",
    "accuracy",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "brier",
    "brier_choice",
    "calibration_error",
    "false_alarm_rate",
    "kaplan_meier",
    "log_loss",
    "ratio_interval",
    "reliability",
    "score",
    "survival_intervals",
    "wilson_interval",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Interval(NamedTuple):
    """An estimate and the bounds of its interval, all in the units of the estimate."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: what was said against what happened, bin by bin (``nan`` in a bin without answers)."""

    probability: Floats
    """Mean probability answered in the bin, shape (bins,)."""
    frequency: Floats
    """Share of the bin's outcomes that were 1, shape (bins,)."""
    count: Integers
    """Number of answers in the bin, shape (bins,)."""
    low: Floats
    """Lower bound of the frequency's 95 % Wilson interval, shape (bins,)."""
    high: Floats
    """Upper bound of the frequency's 95 % Wilson interval, shape (bins,)."""


def brier(probability: ArrayLike, outcome: ArrayLike) -> float:
    """Mean squared difference between probability and outcome: 0 is perfect, 1 is worst (Brier 1950).

    >>> brier([1.0, 0.5], [1, 0])
    0.125
    """
    p, y = _probabilities_and_outcomes(probability, outcome)
    return float(np.mean((p - y) ** 2))


def log_loss(probability: ArrayLike, outcome: ArrayLike, *, floor: float = 1e-7) -> float:
    """Mean negative log-likelihood of the outcomes, in nats: 0 is perfect (Good 1952).

    :param floor: Probabilities are held in [floor, 1 - floor], so that one certain and wrong answer (a sigmoid
        saturates in float32) costs ``-log(floor)`` nats and not infinity.
    """
    p, y = _probabilities_and_outcomes(probability, outcome)
    _require(0 < floor < 0.5, f"floor={floor!r}", "a number in (0, 0.5)", "pass a small one such as 1e-7")
    p = np.clip(p, floor, 1 - floor)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def auroc(score: ArrayLike, outcome: ArrayLike) -> float:
    """Chance that a random yes was scored above a random no, ties counting half (Hanley and McNeil 1982).

    Only the order counts, so ``score`` may be any finite number. ``nan`` if every outcome is the same.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    s, y = _scores_and_outcomes(score, outcome)
    n_yes = float(y.sum())
    n_no = y.size - n_yes
    if n_yes == 0 or n_no == 0:
        return float("nan")
    _, place, count = np.unique(s, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank, from 1, of each distinct score
    rank_sum = float(rank[place] @ y)
    return (rank_sum - n_yes * (n_yes + 1) / 2) / (n_yes * n_no)


def average_precision(score: ArrayLike, outcome: ArrayLike) -> float:
    """Area under the precision-recall steps, the score for rare events.

    The sum over distinct thresholds, from the highest down, of (gain in recall) x (precision there); in steps, as
    straight lines between the points promise too much (Davis and Goadrich 2006). Only the order counts, so ``score``
    may be any finite number. A constant score gives the base rate; ``nan`` if no outcome is 1.

    >>> average_precision([0.9, 0.8, 0.7], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2
    True
    """
    s, y = _scores_and_outcomes(score, outcome)
    n_yes = float(y.sum())
    if n_yes == 0:
        return float("nan")
    _, place, count = np.unique(-s, return_inverse=True, return_counts=True)
    yes = np.bincount(place, weights=y, minlength=count.size)
    precision = np.cumsum(yes) / np.cumsum(count)
    return float(np.sum(yes / n_yes * precision))


def calibration_error(probability: ArrayLike, outcome: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error (Naeini et al. 2015), over ``bins`` bins of equal width on [0, 1].

    The mean over answers of ``|mean probability - event frequency|`` of the bin the answer fell in. A bin holds its lower
    edge and not its upper one; the last holds 1.0 too. It is a biased estimate: with few answers in a bin a perfectly
    calibrated answerer scores above 0, so compare at equal numbers of answers.

    >>> calibration_error([0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0])
    0.0
    """
    p, y = _probabilities_and_outcomes(probability, outcome)
    count, sum_p, sum_y = _binned(p, y, bins)
    return float(np.sum(np.abs(sum_p - sum_y)) / count.sum())


def reliability(probability: ArrayLike, outcome: ArrayLike, bins: int = 10) -> Reliability:
    """Bin the answers as :func:`calibration_error` does, for a reliability diagram (Murphy and Winkler 1977).

    The intervals take the answers as independent; those of neighbouring steps are not, and truly spread wider.
    """
    p, y = _probabilities_and_outcomes(probability, outcome)
    count, sum_p, sum_y = _binned(p, y, bins)
    low, high = wilson_interval(sum_y, count)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the nan we want
        return Reliability(sum_p / count, sum_y / count, count, low, high)


def kaplan_meier(time: ArrayLike, event: ArrayLike, horizon: int) -> Floats:
    """Share without the event after 0..horizon steps, of futures that may be cut before it (Kaplan and Meier 1958).

    ``nan`` from where no future is followed any longer.

    :param time: (n,), steps up to the event, or up to where the future is cut, at least 0
    :param event: (n,), whether it is the event
    :return: (horizon + 1,), from 1
    """
    t, happened = _finite(time, "time"), np.asarray(event, np.bool_)
    _require(
        t.ndim == 1 and t.shape == happened.shape,
        f"time of shape {t.shape} and event of {happened.shape}",
        "both (n,)",
        "flatten",
    )
    _require(horizon >= 1, f"horizon={horizon}", "at least 1 step", "give the longest one asked about")
    at_risk = np.array([(t >= step).sum() for step in range(1, horizon + 1)], np.float64)
    events = np.array([(happened & (t == step)).sum() for step in range(1, horizon + 1)], np.float64)
    return _product_limit(events, at_risk)


def _product_limit(events: Floats, at_risk: Floats) -> Floats:
    """Share without the event after 0..K steps, (..., K + 1), of events and futures followed at each of K steps, (..., K)."""
    with np.errstate(invalid="ignore"):  # 0 / 0 where nobody is left is the nan we want
        hazard = events / at_risk
    return np.concatenate([np.ones((*hazard.shape[:-1], 1)), np.cumprod(1.0 - hazard, axis=-1)], axis=-1)


def wilson_interval(events: ArrayLike, count: ArrayLike, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper bounds of a frequency, ``events`` out of ``count`` independent trials (Wilson 1927).

    :param events: Number of trials in which it happened, any shape.
    :param count: Number of trials, the same shape; where it is 0 both bounds are ``nan``.
    """
    k, n = _finite(events, "events"), _finite(count, "count")
    _same_shape(k, "events", n, "count")
    _require(np.all((k >= 0) & (k <= n)), "events below 0 or above count", "0 <= events <= count", "pass events first")
    z = NormalDist().inv_cdf((1 + _level(level)) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        f = k / n
        middle = (f + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(f * (1 - f) / n + z**2 / (4 * n**2))
    # At 0 and n events a bound is the frequency itself, where rounding would leave it a hair away.
    low = np.where(k == 0, np.where(n == 0, np.nan, 0.0), middle - half)
    high = np.where(k == n, np.where(n == 0, np.nan, 1.0), middle + half)
    return low, high


def false_alarm_rate(
    outcome: ArrayLike,
    probability: ArrayLike,
    executed: ArrayLike,
    *,
    episode: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """Share of flags that were false alarms: had the action been executed, no catastrophe would have come.

    What a vetoed action would have led to is never seen, so the flags that a veto lets through at random stand for the
    others, each for 1/probability of them (inverse probability weighting; Horvitz and Thompson 1952, normalised by the
    sum of weights as by Hajek 1971). With one probability for all that is their plain share, which is unbiased; with
    several, the bias vanishes as 1/n. The interval is Wilson's at the effective number of outcomes (Kish 1965), which is
    lower where outcomes of one episode are alike.

    It is about the flags of the agent *as it acts under the veto*, and about what follows when later vetoes are
    carried out as before. Outcomes that a time limit cut off are to be nan, and where the limit is a fixed one those that it would have cut
    off too, as :meth:`sb3_qa.flight_log.FlightLog.flags` tells them; a limit that varies is taken to come by chance.

    :param outcome: (n,), of every flag whether the catastrophe came, 1 or 0; nan where that is not known. Those of
        actions that were not executed are not looked at
    :param probability: (n,), with which the flagged action was to be executed, ``info["qa/let_through_probability"]``
    :param executed: (n,), whether it was
    :param episode: (n,), which episode each is of; without, outcomes count as independent
    :return: nan where no outcome is known

    >>> [round(x, 2) for x in false_alarm_rate([1, 0, 0, 0], [0.1] * 4, [True, True, True, False])]
    [0.67, 0.21, 0.94]
    """
    y, p, shown = (np.asarray(x, np.float64) for x in (outcome, probability, executed))
    for x, name in ((y, "outcome"), (shown, "executed")):
        _same_shape(x, name, p, "probability")
    known = (shown != 0) & ~np.isnan(y)
    y, p = y[known], p[known]
    _require(np.all((p > 0) & (p <= 1)), "a probability of 0 of what was executed", "(0, 1]", "pass what the veto told")
    _require(np.all((y == 0) | (y == 1)), "an outcome that is neither", "0 or 1 each", "pass whether it happened")
    _level(level)
    if not len(y):
        return Interval(np.nan, np.nan, np.nan)
    weight = 1.0 / p
    rate = float(np.average(1.0 - y, weights=weight))
    n = float(weight.sum() ** 2 / np.square(weight).sum())
    if episode is not None:
        _, groups = np.unique(np.asarray(episode).reshape(known.shape)[known], return_inverse=True)
        pulls = weight * (1.0 - y - rate)
        alone, together = np.square(pulls).sum(), np.square(np.bincount(groups, pulls)).sum()
        # Where all outcomes are the same, there is nothing to tell how alike those of an episode are: at worst, entirely.
        n = min(n, n * alone / together) if together > 1e-12 else min(n, float(groups.max() + 1))
    low, high = wilson_interval(rate * n, n, level=level)
    return Interval(rate, float(low), float(high))


def score(
    probability: ArrayLike, outcome: ArrayLike, *, base_rate: float | None = None, bins: int = 15
) -> dict[str, float]:
    """Score answers to a yes-or-no question beside the control that always answers the same probability.

    :param base_rate: What the control answers: give the event frequency of the training data to be fair to both; by
        default it is the frequency in ``outcome``, the best that any constant can do.
    :param bins: Bins of the calibration errors.
    :return: ``brier``, ``auroc``, ``calibration_error``, ``log_loss``, ``average_precision`` of the answers; ``constant_brier``
        and so on of the control; ``brier_skill`` = 1 - brier / constant_brier, the share of the
        control's error that the answers remove (Murphy 1973: 1 is perfect, 0 no better than the control, below 0 worse;
        ``nan`` if the control makes no error); ``base_rate``, which the control answered; ``frequency``, the share of
        outcomes that were 1; ``count``, the number of answers.
    """
    p, y = _probabilities_and_outcomes(probability, outcome)
    frequency = float(y.mean())
    rate = frequency if base_rate is None else base_rate
    _require(0 <= rate <= 1, f"base_rate={base_rate!r}", "a probability", "pass an event frequency, or None")
    constant = np.full_like(p, rate)
    result = {"brier": brier(p, y), "auroc": auroc(p, y), "calibration_error": calibration_error(p, y, bins)}
    result |= {"log_loss": log_loss(p, y), "average_precision": average_precision(p, y)}
    control = {"brier": brier(constant, y), "auroc": auroc(constant, y), "log_loss": log_loss(constant, y)}
    control["average_precision"] = average_precision(constant, y)
    control["calibration_error"] = abs(rate - frequency)  # one bin; said outright, it is free of rounding
    result |= {f"constant_{name}": value for name, value in control.items()}
    result["brier_skill"] = 1 - result["brier"] / control["brier"] if control["brier"] > 0 else float("nan")
    return result | {"base_rate": float(rate), "frequency": frequency, "count": float(y.size)}


def accuracy(probabilities: ArrayLike, option: ArrayLike) -> float:
    """Share of choices where the most probable option (the first, among equals) was the true one.

    :param probabilities: Shape (n, n_options), each row summing to 1.
    :param option: Index of the true option, shape (n,).

    >>> accuracy([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], [0, 1])
    0.5
    """
    p, i = _probabilities_and_options(probabilities, option)
    return float(np.mean(p.argmax(axis=1) == i))


def brier_choice(probabilities: ArrayLike, option: ArrayLike) -> float:
    """Brier score of a choice: squared error summed over options, mean over rows, in [0, 2] (Brier 1950).

    With two options it is twice :func:`brier`. Shapes as in :func:`accuracy`.
    """
    p, i = _probabilities_and_options(probabilities, option)
    truth = np.eye(p.shape[1])[i]
    return float(np.mean(np.sum((p - truth) ** 2, axis=1)))


def absolute_error(answer: ArrayLike, truth: ArrayLike) -> float:
    """Mean ``|answer - truth|``, in the units of the answer; both finite and of one shape, any shape.

    For answers that are numbers, and for probabilities where the true probability is known.
    """
    a, t = _finite(answer, "answer"), _finite(truth, "truth")
    _same_shape(a, "answer", t, "truth")
    return float(np.mean(np.abs(a - t)))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of independent units (Efron 1979).

    :param values: One value a unit, shape (n_units,). Units must be independent: one value for an episode or a training
        run, not one for a step. For a paired comparison pass the differences.
    :param statistic: Maps values to a number. With an ``axis`` argument, as numpy's have, it is called on many
        resamples at once, as ``statistic(resamples, axis=-1)``; without one, on each resample in turn.
    :param level: Share of the resampled statistics within the interval.
    :return: (estimate, low, high), in the units of the statistic; the bounds of a single unit are ``nan``.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    Interval(estimate=1.0, low=1.0, high=1.0)
    """
    x = _units(values, "values")

    def resampled(index: Integers) -> Any:
        sample = x[index]
        return statistic(sample, axis=-1) if _takes_axis(statistic) else [statistic(row) for row in sample]

    return _percentiles(statistic(x), resampled, x.size, level, n_resamples, seed)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    scale: float = 1.0,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """Percentile bootstrap interval of ``scale * sum(numerators) / sum(denominators)`` over independent units.

    For rates whose steps are not independent but whose episodes are: catastrophes per 1,000 steps is
    ``ratio_interval(catastrophes_of_episode, steps_of_episode, scale=1000)``. A percentile interval knows only what
    it has seen: with no events at all it is (0, 0, 0), and the upper 95 % bound is then about 3 events in all the units
    (the rule of three, Hanley and Lippman-Hand 1983).

    :param numerators: One count or sum a unit, shape (n_units,).
    :param denominators: What it is counted over, above 0, shape (n_units,).
    :param scale: Multiplies the ratio.
    """
    a, b = _units(numerators, "numerators"), _units(denominators, "denominators")
    _same_shape(a, "numerators", b, "denominators")
    _require(b.min() > 0, f"a denominator of {b.min():g}", "all above 0", "leave out the units without any steps")
    _require(bool(np.isfinite(scale)), f"scale={scale!r}", "a finite number", "pass 1000 for a rate per 1,000")

    def resampled(index: Integers) -> Any:
        return scale * a[index].sum(axis=-1) / b[index].sum(axis=-1)

    return _percentiles(scale * a.sum() / b.sum(), resampled, a.size, level, n_resamples, seed)


def survival_intervals(
    known: ArrayLike,
    event: ArrayLike,
    horizon: int,
    *,
    episode: ArrayLike,
    level: float = 0.95,
    n_resamples: int = 500,
    seed: int = 0,
) -> tuple[Floats, Floats, Floats]:
    """How long it really took: the share without the event after 0 .. horizon steps, where some futures were cut.

    The product-limit estimate (Kaplan and Meier 1958): at every step, the share of the futures still followed that have the
    event there. Its bounds are percentiles over resampled *episodes*, whose decisions are alike.

    :param known: (n,), steps whose outcome is known, at least 1
    :param event: (n,), whether the last of them is the event
    :param episode: (n,), the episode that each is of
    :return: estimate, lower and upper bounds, each (horizon + 1,); bounds of a single episode are nan

    >>> survival_intervals([1, 2, 2], [True, False, True], 2, episode=[0, 1, 2])[0].round(3).tolist()
    [1.0, 0.667, 0.333]
    """
    steps, happened = _finite(known, "known").ravel(), _finite(event, "event").ravel() != 0
    _same_shape(steps, "known", happened.astype(np.float64), "event")
    horizon = _at_least_1(horizon, "horizon")
    names, group = np.unique(np.asarray(episode), return_inverse=True)
    n = len(names)
    last = np.minimum(steps, horizon).astype(np.int64)
    deaths, exits = np.zeros((2, n, horizon + 1))
    np.add.at(deaths, (group, last), happened & (steps <= horizon))
    np.add.at(exits, (group, last), 1.0)
    at_risk = np.cumsum(exits[:, ::-1], axis=1)[:, ::-1]  # of futures that are known for j steps at least

    def curve(weights: Floats) -> Floats:
        return _product_limit(weights @ deaths[:, 1:], weights @ at_risk[:, 1:])

    estimate = curve(np.ones((1, n)))[0]
    if n == 1:
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    tail = (1 - _level(level)) / 2
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)
    with np.errstate(all="ignore"):
        curves = curve(drawn)
        seen = ~np.isnan(estimate)
        bounds = np.full((2, horizon + 1), np.nan)
        bounds[:, seen] = np.nanquantile(curves[:, seen], [tail, 1 - tail], axis=0)
    return estimate, bounds[0], bounds[1]


def _percentiles(
    estimate: Any,
    resampled: Callable[[Integers], Any],
    n: int,
    level: float,
    n_resamples: int,
    seed: int | np.random.Generator,
) -> Interval:
    tail = (1 - _level(level)) / 2
    n_resamples = _at_least_1(n_resamples, "n_resamples")
    got, mend = f"a statistic of shape {np.shape(estimate)}", "make it reduce the values of all units to one number"
    _require(np.ndim(estimate) == 0, got, "one number", mend)
    if n == 1:
        return Interval(float(estimate), float("nan"), float("nan"))  # no spread to be seen
    blocks = []
    for index in _resamples(n, n_resamples, seed):
        block = np.asarray(resampled(index), dtype=np.float64)
        got = f"statistics of shape {block.shape} from {len(index)} resamples"
        _require(block.shape == (len(index),), got, "one number each", "reduce the axis that is given, and no other")
        blocks.append(block)
    low, high = np.quantile(np.concatenate(blocks), [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def _resamples(n: int, n_resamples: int, seed: int | np.random.Generator) -> Iterator[Integers]:
    """Yield indices drawn with replacement, shape (block, n), in blocks that hold memory near 32 MiB."""
    rng = np.random.default_rng(seed)
    block = max(1, 2**22 // n)
    for start in range(0, n_resamples, block):
        yield rng.integers(n, size=(min(block, n_resamples - start), n))


def _takes_axis(statistic: Callable[..., Any]) -> bool:
    try:
        return "axis" in inspect.signature(statistic).parameters
    except ValueError:  # some builtins, such as max, do not tell their signature
        return False


def _binned(p: Floats, y: Floats, bins: int) -> tuple[Integers, Floats, Floats]:
    """Count, sum of probabilities and sum of outcomes of each bin, three arrays of shape (bins,)."""
    bins = _at_least_1(bins, "bins")
    inner_edges = np.arange(1, bins) / bins
    place = np.searchsorted(inner_edges, p, side="right")
    count = np.bincount(place, minlength=bins).astype(np.int64)
    sum_p, sum_y = (np.bincount(place, weights, bins).astype(np.float64) for weights in (p, y))
    return count, sum_p, sum_y


def _require(holds: bool | np.bool_, got: str, expected: str, mend: str) -> None:
    if not holds:
        raise QAError(f"Got {got}, expected {expected}: {mend}.")


def _finite(value: ArrayLike, name: str) -> Floats:
    try:
        x = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QAError(f"Got {name} that numpy cannot read, expected numbers: pass one numeric array.") from error
    _require(x.size > 0, f"{name} without any value", "at least one", "score once an outcome is known")
    unknown = x.size - np.count_nonzero(np.isfinite(x))
    _require(unknown == 0, f"{unknown} of {x.size} values of {name} not finite", "all finite", "leave out unknown ones")
    return x


def _within(x: Floats, name: str, low: float, high: float, mend: str) -> None:
    inside = x.min() >= low and x.max() <= high
    _require(inside, f"{name} from {x.min():g} to {x.max():g}", f"all within [{low:g}, {high:g}]", mend)


def _same_shape(a: Floats, name_a: str, b: Floats, name_b: str) -> None:
    got = f"{name_a} of shape {a.shape} and {name_b} of shape {b.shape}"
    _require(a.shape == b.shape, got, "one shape", "reshape one so that entries pair up, as nothing is broadcast")


def _scores_and_outcomes(score: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    s, y = _finite(score, "score"), _finite(outcome, "outcome")
    _same_shape(s, "score", y, "outcome")
    neither = y[(y != 0) & (y != 1)]
    _require(neither.size == 0, f"an outcome of {neither[:1]}", "0 or 1 each", "pass whether the event happened")
    return s.ravel(), y.ravel()


def _probabilities_and_outcomes(probability: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    p = _finite(probability, "probability")
    _within(p, "probability", 0, 1, "apply a sigmoid to logits first")
    return _scores_and_outcomes(p, outcome)


def _probabilities_and_options(probabilities: ArrayLike, option: ArrayLike) -> tuple[Floats, Integers]:
    p, i = _finite(probabilities, "probabilities"), _finite(option, "option")
    got = f"probabilities of shape {p.shape} and option of shape {i.shape}"
    _require(
        p.ndim == 2 and i.shape == p.shape[:1], got, "(n, n_options) and (n,)", "give one row and one index a choice"
    )
    _within(p, "probabilities", 0, 1, "apply a softmax to logits first")
    _within(p.sum(axis=1), "sums of rows", 1 - 1e-3, 1 + 1e-3, "apply a softmax over the options")
    _within(i, "option", 0, p.shape[1] - 1, "pass the index of the true option, from 0")
    _require(np.all(i == np.floor(i)), "an option that is not whole", "an index", "pass the index of the true option")
    return p, i.astype(np.int64)


def _units(values: ArrayLike, name: str) -> Floats:
    x = _finite(values, name)
    _require(x.ndim == 1, f"{name} of shape {x.shape}", "(n_units,)", "reduce to one value for each independent unit")
    return x


def _level(level: float) -> float:
    _require(0 < level < 1, f"level={level!r}", "a number between 0 and 1", "pass 0.95 for 95 %")
    return level


def _at_least_1(value: int, name: str) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _require(whole and value >= 1, f"{name}={value!r}", "a whole number of at least 1", f"pass for example {name}=15")
    return int(value)
