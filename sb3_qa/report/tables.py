"""Answers against truth: one row an instance, with intervals over episodes, and what is to be drawn of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa import scores
from sb3_qa.answers import ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.evaluation import Answered, EventCurves
from sb3_qa.questions import Instance, Question
from sb3_qa.report.played import Played
from sb3_qa.scores import Interval, Reliability, ratio_interval, reliability, survival_intervals

__all__ = ["InstanceRow", "QuestionPart", "Wrong", "question_parts"]

Floats = NDArray[np.float64]
MOST_QUESTIONS = 30  # that are shown, where there are many
MOST_INSTANCES = 12  # of each
MOST_CURVES = 4  # in one diagram
GROUPS = ((0.0, 0.5, "lowest half"), (0.5, 0.9, "next 40 %"), (0.9, 1.0, "highest 10 %"))
"""Of decisions, by what was answered about the longest horizon."""


@dataclass(frozen=True)
class Wrong:
    """The answer that was furthest from the truth."""

    key: str
    episode: int
    step: int
    said: str
    truth: str


@dataclass(frozen=True)
class InstanceRow:
    """How one instance was answered."""

    instance: Instance
    count: int
    """Decisions with a known truth."""
    happened: str
    """How often it was yes, the commonest option, or the middle of the numbers."""
    measure: str
    """Brier score, accuracy, or mean absolute error."""
    error: Interval
    constant: float
    """The same of the best constant answer."""
    skill: Interval
    """Share of the constant's error that is removed."""
    auroc: float
    calibration: float
    """Calibration error of a yes/no question; of a number, how often its 90 % interval held the truth."""


@dataclass
class QuestionPart:
    """One question of the report."""

    question: Question
    rows: list[InstanceRow] = field(default_factory=list)
    curves: dict[str, Reliability] = field(default_factory=dict)
    """Reliability diagrams of yes/no answers or options, by label."""
    numbers: tuple[str, Floats, Floats] | None = None
    """Key, numbers answered and true, (n,) each."""
    survival: list[tuple[str, dict[str, tuple[Floats, Floats, Floats, Floats]]]] = field(default_factory=list)
    """For some events a title and curves (said, seen, low, high) by group of decisions."""
    wrong: list[Wrong] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    """Keys of instances of which no truth became known."""
    left_out: int = 0
    """Instances that are not shown."""


def question_parts(played: Played) -> tuple[list[QuestionPart], int]:
    """All questions, scored on the watched episodes, and how many were left out as there are too many to show."""
    parts: dict[str, QuestionPart] = {}
    left_out: set[str] = set()
    for each in played.record.answered():
        name = each.instance.question.name
        if name not in parts:
            if len(parts) >= MOST_QUESTIONS:
                left_out.add(name)
                continue
            parts[name] = QuestionPart(each.instance.question)
        part = parts[name]
        if len(part.rows) + len(part.unscored) >= MOST_INSTANCES:
            part.left_out += 1
        elif not len(each.truth):
            part.unscored.append(each.instance.key)
        else:
            _add(part, each)
    for curves in played.record.event_curves():
        name = curves.target.question.name
        if name in parts and len(parts[name].survival) < 2 and len(curves.known):
            parts[name].survival.append(_survival(curves))
    return list(parts.values()), len(left_out)


def _add(part: QuestionPart, each: Answered) -> None:
    key, answer, truth = each.instance.key, each.answer, each.truth.astype(np.float64)
    if isinstance(answer, YesNoAnswer):
        p = np.clip(answer.probability.astype(np.float64), 0.0, 1.0)
        squared, constant = np.square(p - truth), np.square(truth.mean() - truth)
        rated = scores.score(p, truth)
        happened = f"yes in {100 * truth.mean():.3g} %"
        extra = rated["auroc"], rated["calibration_error"]
        _row(part, each, happened, "Brier score", squared, constant, *extra)
        if len(part.curves) < MOST_CURVES:
            part.curves[key] = reliability(p, truth)
        worst = int(np.argmax(np.abs(p - truth)))
        said, true = f"yes, {100 * p[worst]:.3g} %", "yes" if truth[worst] else "no"
    elif isinstance(answer, ChoiceAnswer):
        option, share = truth.astype(np.intp), answer.probabilities.astype(np.float64)
        share = share / share.sum(axis=1, keepdims=True)
        miss = (share.argmax(axis=1) != option).astype(float)
        counts = np.bincount(option, minlength=share.shape[1])
        common = int(counts.argmax())
        happened = f"{answer.options[common]} in {100 * counts[common] / len(option):.3g} %"
        _row(part, each, happened, "share wrong", miss, (option != common).astype(float), np.nan, np.nan)
        if not part.curves:
            for n, name in enumerate(answer.options[: MOST_CURVES + 2]):
                part.curves[f"{key}: {name}"] = reliability(share[:, n], (option == n).astype(float))
        worst = int(np.argmin(share[np.arange(len(option)), option]))
        best = int(share[worst].argmax())
        said, true = f"{answer.options[best]}, {100 * share[worst, best]:.3g} %", str(answer.options[option[worst]])
    else:
        assert isinstance(answer, NumberAnswer)
        said_numbers, middle = answer.mean.astype(np.float64), float(np.median(truth))
        off, constant = np.abs(said_numbers - truth), np.abs(truth - middle)
        low, high = answer.interval(0.9)
        held = float(np.mean((truth >= low - 1e-6) & (truth <= high + 1e-6)))
        _row(part, each, f"half below {middle:.3g}", "mean error", off, constant, np.nan, held)
        if part.numbers is None:
            part.numbers = key, said_numbers, truth
        worst = int(np.argmax(off))
        said, true = f"{said_numbers[worst]:.3g}", f"{truth[worst]:.3g}"
    part.wrong.append(Wrong(key, int(each.episode[worst]), int(each.elapsed[worst]), said, true))


def _row(
    part: QuestionPart,
    each: Answered,
    happened: str,
    measure: str,
    error: Floats,
    constant: Floats,
    auroc: float,
    calibration: float,
) -> None:
    """Errors are means over decisions; their intervals resample episodes, as the decisions of one are alike."""
    _, episode = np.unique(each.episode, return_inverse=True)
    sums = [np.asarray(np.bincount(episode, each_), np.float64) for each_ in (error, constant, np.ones(len(error)))]
    skill = Interval(float("nan"), float("nan"), float("nan"))
    if sums[1].sum() > 0:
        skill = _one_minus(_ratio(sums[0], sums[1]))
    part.rows.append(
        InstanceRow(
            *(each.instance, len(error), happened, measure, ratio_interval(sums[0], sums[2])),
            *(float(constant.mean()), skill, auroc, calibration),
        )
    )


def _ratio(a: Floats, b: Floats, n_resamples: int = 2000) -> Interval:
    """As :func:`ratio_interval`, where an episode by itself may have a denominator of 0."""
    if b.min() > 0:
        return ratio_interval(a, b, n_resamples=n_resamples)
    if len(a) == 1:
        return Interval(float(a.sum() / b.sum()), float("nan"), float("nan"))
    index = np.random.default_rng(0).integers(len(a), size=(n_resamples, len(a)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = a[index].sum(axis=1) / b[index].sum(axis=1)
    low, high = np.nanquantile(drawn[np.isfinite(drawn)], [0.025, 0.975]) if np.isfinite(drawn).any() else [np.nan] * 2
    return Interval(float(a.sum() / b.sum()), float(low), float(high))


def _one_minus(ratio: Interval) -> Interval:
    return Interval(1.0 - ratio.estimate, 1.0 - ratio.high, 1.0 - ratio.low)


def _survival(curves: EventCurves) -> tuple[str, dict[str, tuple[Floats, Floats, Floats, Floats]]]:
    said = curves.said.astype(np.float64)
    rank = np.argsort(np.argsort(1.0 - said[:, -1], kind="stable"), kind="stable") / len(said)
    groups: dict[str, Any] = {}
    for low, high, label in GROUPS:
        inside = (rank >= low) & (rank < high)
        if not inside.any():
            continue
        seen = survival_intervals(
            curves.known[inside], curves.event[inside], curves.target.width, episode=curves.episode[inside]
        )
        groups[f"{label} ({int(inside.sum())})"] = (said[inside].mean(axis=0), *seen)
    slots = ", ".join(
        f"{name}={value}"
        for name, value in curves.target.slots.items()
        if name != curves.target.question.truth.horizon and name in curves.target.question.slots
    )
    return f"{curves.target.question.name}{f'[{slots}]' if slots else ''}", groups
