"""The report: tables and figures of the results there are, on a page that can be read without the code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sb3_qa.scores import Interval
from sb3_qa.study.aggregate import Result, Table, collect, difference, estimate, verdict
from sb3_qa.study.arms import ARMS
from sb3_qa.study.drawing import draw
from sb3_qa.study.page import shown, table
from sb3_qa.study.quantities import (
    AT,
    LABELS,
    gap,
    miscalibrated,
    of_veto,
    played,
    rewarded,
    skill,
    tasks_in,
    title_of,
    understated,
)
from sb3_qa.study.sections import SECTIONS
from sb3_qa.study.task import task_names

__all__ = ["write_report"]

AFTERWARDS = ("probe", "finetune", "anchored", "separate")
COMMAND = "make study ARGS='--workers 2 --labels 1 0.1 0.01'"


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write ``report.md`` and its figures; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [section(results) for section in (_opening, _premises, _by_task, *SECTIONS)]
    path = folder / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    draw(results, folder)
    return path


def _opening(results: Sequence[Result]) -> str:
    tasks = tasks_in(results)
    rows = []
    for task in tasks:
        cells = [len(collect(results, arm, lambda _: 0.0).get(task, {})) for arm in ARMS]
        fewer = [
            min(len(collect(results, arm, lambda _: 0.0, share).get(task, {})) for arm in ("joint", "separate"))
            for share in LABELS[1:]
        ]
        rows.append([f"{task}: {title_of(task)}", *map(str, cells), *map(str, fewer)])
    missing = [name for name in task_names() if name not in tasks]
    left = f"\n\nNot reached for lack of time: {', '.join(missing)}." if missing else ""
    return (
        "# Is joint training as cheap and as good as hoped?\n\n"
        "What was to be measured, and what would count for and against each premise, was written down [before](plan.md). This page is "
        f"written by `{COMMAND}`, which runs the cells that are missing in [results.jsonl](results.jsonl) and makes tables and "
        "figures of all. Across seeds: interquartile means with 95 % stratified bootstrap intervals.\n\n"
        "Seeds that were run:\n\n"
        + table(["task", *(f"`{arm}`" for arm in ARMS), "10 % labels", "1 % labels"], rows)
        + "\n\nFive are planned; with fewer, intervals are of few runs, and narrower than what they would "
        "say of runs to come." + left
    )


def _premises(results: Sequence[Result]) -> str:
    of = partial(collect, results)
    common = partial(skill, where="answers_common")
    returns = partial(played, name="return")
    rows: list[list[str]] = []

    def claim(premise: str, what: str, table: Table, margin: float = 0.0, sign: int = 1) -> None:
        rows.append([premise, what, *_judged(table, margin, sign)])

    claim("M2", "gap of `joint` below 0.05", _negated(of("joint", gap)), margin=0.05, sign=-1)
    claim("M2", "and below that of `detached`", difference(of("detached", gap), of("joint", gap)))
    told_well = partial(skill, but_numbers=True)
    for other in AFTERWARDS:
        own = _judged(difference(of("joint", skill), of(other, skill)))
        fair = _judged(difference(of("joint", common), of(other, common)))
        but = _judged(difference(of("joint", told_well), of(other, told_well)))
        told = f"{own[0]}; on the plain agent's episodes {fair[0]}; without numbers {but[0]}"
        rows.append(["M3", f"answers of `joint` better than `{other}`", told, own[1] if own[1] == fair[1] else "open"])
    few, many = (difference(of("joint", skill, share), of("separate", skill, share)) for share in (0.01, 1.0))
    claim("M3'", "advantage over `separate` larger at 1 % of labels", difference(few, many))
    for other in ("probe", "separate", "detached"):
        better = _scaled(results, difference(of("joint", rewarded), of(other, rewarded)))
        claim("M4", f"reward of `joint`'s answers teaches better than `{other}`'s", better)
    for at in AT:
        for other in ("random", "probe", "separate"):
            arm, kind = ("joint", "random") if other == "random" else (other, "veto")
            changes = [
                difference(
                    of("joint", partial(of_veto, at=at, kind="veto", name=name)),
                    of(arm, partial(of_veto, at=at, kind=kind, name=name)),
                )
                for name in ("averted", "spared", "lost")
            ]
            averted, spared = _judged(changes[0]), _judged(changes[1])
            dearer = _judged(_scaled(results, changes[2]))
            ruling = averted[1] if averted[1] == spared[1] and dearer[1] != averted[1] else "open"
            whose = "a random veto" if other == "random" else f"`{other}`"
            where = "certified threshold" if at == "certified" else f"{float(at):.0%} flagged"
            told = f"{averted[0]}; of all episodes {spared[0]}; return lost more {dearer[0]}"
            rows.append(["M5", f"`joint` averts more than {whose}, {where}", told, ruling])
    kept = _scaled(results, difference(of("joint", returns), of("plain", returns)))
    claim("M6", "return of `joint` within 5 % of `plain`'s", kept, margin=0.05)
    tuned = _scaled(results, difference(of("joint", returns), of("finetune", returns)))
    claim("M6'", "`finetune` loses more return than `joint`", tuned)
    share = of("joint", lambda r: -100.0 * r["parameters"]["questions"] / r["parameters"]["agent"])
    claim("M7", "parameters added, in percent, at most 10", share, margin=10.0, sign=-1)
    off = [of("shaped", partial(miscalibrated, whose=whose)) for whose in ("judge", "own")]
    claim("F", "`shaped`: own answers as near to what happens as an independent judge's", difference(*off))
    below = [of("shaped", partial(understated, whose=whose)) for whose in ("judge", "own")]
    claim("F", "`shaped`: own answers say no less than the judge", difference(*below))
    return (
        "## The premises\n\n*Supported*: all of the interval is on the premise's side of the bar that the plan names; *contradicted*: all "
        "of it is on the other; *open*: neither. Where a premise is judged by two quantities, it is open unless they agree: M3 by episodes "
        "of the agent and of `plain`; M5 by the share of the catastrophic episodes that is averted and by the same as a share of all "
        "episodes, where few catastrophes count less, and it is open too where more is averted for more return.\n\n"
        + table(["", "premise", "measured", "verdict"], rows)
    )


def _by_task(results: Sequence[Result]) -> str:
    """What the premises are about, task by task: an average over tasks hides where they differ."""
    of = partial(collect, results)
    averted, chance = (partial(of_veto, at="0.05", kind=kind, name="averted") for kind in ("veto", "random"))
    returns = partial(played, name="return")
    joint = of("joint", skill)
    columns = {
        "answers, above `probe`": difference(joint, of("probe", skill)),
        "above `separate`": difference(joint, of("separate", skill)),
        "averted at 5 %, above random": difference(of("joint", averted), of("joint", chance)),
        "above `separate`'s": difference(of("joint", averted), of("separate", averted)),
        "return, above `plain`": _scaled(results, difference(of("joint", returns), of("plain", returns))),
        "above `finetune`": _scaled(results, difference(of("joint", returns), of("finetune", returns))),
    }
    rows = [
        [task, *(shown(estimate({task: column.get(task, {})}), 3) for column in columns.values())]
        for task in tasks_in(results)
    ]
    return (
        "## Task by task\n\nBy how much `joint` is above other arms: in skill, in the share of catastrophes averted, and in the "
        "share of the range of returns.\n\n" + table(["task", *columns], rows)
    )


def _negated(table: Table) -> Table:
    return {task: {seed: -value for seed, value in seeds.items()} for task, seeds in table.items()}


def _scaled(results: Sequence[Result], table: Table) -> Table:
    """As shares of the range of the task's returns, from the worst mean in training to the best agent."""
    scaled: Table = {}
    for task, seeds in table.items():
        own = [result for result in results if result["task"] == task]
        low = min(point[1] for result in own for point in result["curve"] if point[1] is not None)
        high = max(result["play"]["return"] for result in own)
        scaled[task] = {seed: value / max(high - low, 1e-9) for seed, value in seeds.items()}
    return scaled


def _judged(table: Table, margin: float = 0.0, sign: int = 1) -> list[str]:
    """The estimate as it is shown (``sign`` -1: of the quantity that the table is the negative of), and the verdict."""
    interval = estimate(table)
    if interval is None:
        return ["–", "not run"]
    told = interval if sign > 0 else Interval(-interval.estimate, -interval.high, -interval.low)
    return [f"{shown(told, 3)} ({len(table)} tasks)", verdict(interval, margin=margin)]
