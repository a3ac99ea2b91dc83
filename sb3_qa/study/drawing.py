"""Figures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sb3_qa.figures import new_figure
from sb3_qa.scores import Interval
from sb3_qa.study.aggregate import Result
from sb3_qa.study.quantities import ANSWERING, AT, LABELS, of_task, of_veto, skill, tasks_in

__all__ = ["draw"]

COLUMNS = 3  # of the panels, one a task


def draw(results: Sequence[Result], folder: Path) -> None:
    """Write ``skill.png``, ``labels.png`` and ``vetoes.png``."""
    tasks = tasks_in(results)
    figure, grid = new_figure(1, 1, size=(max(9.0, 1.4 * len(tasks)), 3.6))
    ax: Any = np.ravel(grid)[0]
    for n, arm in enumerate(ANSWERING):
        _errorbars(ax, [of_task(results, arm, task, skill) for task in tasks], (n - 2.5) * 0.12, arm)
    ax.set(xticks=range(len(tasks)), xticklabels=tasks, ylabel="skill of the answers")
    ax.legend(ncols=3, frameon=False, fontsize=8)
    figure.savefig(folder / "skill.png")

    figure, grid = new_figure(1, 1, size=(6, 3.6))
    ax = np.ravel(grid)[0]
    for n, arm in enumerate(("joint", "detached", "separate", "probe")):
        _errorbars(ax, [of_task(results, arm, None, skill, share) for share in LABELS], (n - 1.5) * 0.08, arm)
    ax.set(xticks=range(len(LABELS)), xticklabels=[f"{share:.0%}" for share in LABELS])
    ax.set(xlabel="steps with labels", ylabel="skill of the answers")
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "labels.png")

    columns = min(max(len(tasks), 1), COLUMNS)
    lines = -(-len(tasks) // columns) or 1
    figure, grid = new_figure(lines, columns, size=(3.6 * columns, 3.4 * lines))
    for empty in np.ravel(grid)[len(tasks) :]:
        empty.set_axis_off()
    for ax, task in zip(np.ravel(grid), tasks, strict=False):
        for arm in (*ANSWERING, "random"):
            kind, who = ("random", "joint") if arm == "random" else ("veto", arm)
            points = [
                [
                    of_task(results, who, task, partial(of_veto, at=at, kind=kind, name=name))
                    for name in ("lost", "averted")
                ]
                for at in AT[:3]
            ]
            told = [(x.estimate, y.estimate) for x, y in points if x is not None and y is not None]
            if told:
                ax.plot(*zip(*told, strict=True), "o--" if arm == "random" else "o-", ms=4, label=arm)
        ax.axhline(0.0, color="0.8", lw=0.8, zorder=0)
        ax.axvline(0.0, color="0.8", lw=0.8, zorder=0)
        ax.set(title=task, xlabel="return lost", ylabel="catastrophes averted")
    if tasks:
        np.ravel(grid)[0].legend(frameon=False, fontsize=7)
    figure.savefig(folder / "vetoes.png")


def _errorbars(ax: Any, intervals: Sequence[Interval | None], offset: float, label: str) -> None:
    told = [(n + offset, each) for n, each in enumerate(intervals) if each is not None]
    if told:
        middle = np.array([each.estimate for _, each in told])
        around = np.nan_to_num(np.array([[each.estimate - each.low, each.high - each.estimate] for _, each in told]).T)
        ax.errorbar([x for x, _ in told], middle, np.maximum(around, 0.0), fmt="o", ms=4, capsize=2, label=label)
