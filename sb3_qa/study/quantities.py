"""Quantities of the study's runs, and which runs there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sb3_qa.errors import QAError
from sb3_qa.scores import Interval
from sb3_qa.study.aggregate import Result, collect, estimate
from sb3_qa.study.arms import ARMS
from sb3_qa.study.task import load_task, task_names

__all__ = [
    "ANSWERING",
    "AT",
    "LABELS",
    "Quantity",
    "gap",
    "miscalibrated",
    "of_oracle",
    "of_task",
    "of_veto",
    "played",
    "rewarded",
    "skill",
    "tasks_in",
    "title_of",
    "understated",
]

ANSWERING = ("joint", "detached", "separate", "probe", "finetune", "anchored")
"""Arms whose answers are held against each other."""
LABELS = (1.0, 0.1, 0.01)
AT = ("0.02", "0.05", "0.1", "certified")
"""What vetoes are compared at: shares of steps flagged, and the certified threshold."""
Quantity = Callable[[Result], "float | None"]


def skill(result: Result, where: str = "answers", but_numbers: bool = False) -> float | None:
    """Mean skill over the questions of a task; where the agent is the plain one, its episodes are the own ones.

    :param but_numbers: whether questions whose answers are numbers are left out
    """
    if where == "answers_common" and not ARMS[result["arm"]].shapes_agent:
        where = "answers"
    told = [each for each in result.get(where, {}).values() if "brier" in each or not but_numbers]
    scores = [each["skill"] for each in told if each["skill"] is not None]
    return float(np.mean(scores)) if scores else None


def played(result: Result, name: str) -> float | None:
    """Of the episodes without a veto."""
    value: float | None = result["play"][name]
    return value


def gap(result: Result) -> float | None:
    """Skill of the best probe minus the arm's own, mean over its yes/no questions."""
    each = [p["skill"] - p["own_skill"] for p in result.get("probes", {}).values() if p["own_skill"] is not None]
    return float(np.mean(each)) if each else None


def of_veto(result: Result, at: str, kind: str, name: str) -> float | None:
    """What a veto changed: ``averted``, the share of the catastrophic episodes it took away; ``spared``, the same as a share of
    all episodes; ``lost``, of the return.
    """
    for row in result.get("vetoes", []):
        if row["at"] == at and kind in row:
            before, after = result["play"], row[kind]
            if name == "averted":
                return 1.0 - after["catastrophes"] / before["catastrophes"] if before["catastrophes"] else None
            if name == "spared":
                return float(before["catastrophes"] - after["catastrophes"])
            if name == "lost":
                return float(before["return"] - after["return"])
            value: float | None = after[name]
            return value
    return None


def of_oracle(result: Result, name: str) -> float | None:
    """As :func:`of_veto`, of the oracle's."""
    if "oracle" not in result:
        return None
    row = {"at": "oracle", "veto": result["oracle"]["veto"]}
    return of_veto({"play": result["play"], "vetoes": [row]}, "oracle", "veto", name)


def rewarded(result: Result) -> float | None:
    """True return of the agent that was trained on a reward made of the arm's answers."""
    value: float | None = result.get("reward", {}).get("return")
    return value


def understated(result: Result, whose: str) -> float | None:
    """How much less than what happens is said of the catastrophe: by the ``own`` answerer, or by the ``judge``."""
    each = list(result.get("judge", {}).values())
    return each[0]["frequency"] - each[0]["own_said" if whose == "own" else "said"] if each else None


def miscalibrated(result: Result, whose: str) -> float | None:
    """How far what is said of the catastrophe is from what happens, on average."""
    by = understated(result, whose)
    return None if by is None else abs(by)


def tasks_in(results: Sequence[Result]) -> list[str]:
    """Names of the tasks that have been run."""
    return [name for name in task_names() if any(result["task"] == name for result in results)]


def title_of(task: str) -> str:
    """The title of a task, or its name where what it needs is not installed."""
    try:
        return load_task(task).title
    except QAError:
        return task


def of_task(
    results: Sequence[Result], arm: str, task: str | None, quantity: Quantity, labels: float = 1.0
) -> Interval | None:
    """An arm's quantity in a task, or over all tasks if None: interquartile mean and interval over its runs."""
    table = collect(results, arm, quantity, labels)
    return estimate(table if task is None else {task: table.get(task, {})})
