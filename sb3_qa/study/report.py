"""The report: tables and figures of the results there are, on a page that can be read without the code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sb3_qa.scores import Interval
from sb3_qa.study.aggregate import Result, Table, collect, difference, estimate, verdict
from sb3_qa.study.arms import ARMS
from sb3_qa.study.drawing import draw
from sb3_qa.study.quantities import (
    ANSWERING,
    AT,
    LABELS,
    Quantity,
    gap,
    of_oracle,
    of_task,
    of_veto,
    played,
    rewarded,
    skill,
    tasks_in,
    title_of,
    understated,
)
from sb3_qa.study.task import task_names

__all__ = ["write_report"]

AFTERWARDS = ("probe", "finetune", "anchored", "separate")
COMMAND = "make study ARGS='--workers 2 --labels 1 0.1 0.01'"


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write ``report.md`` and its figures; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _opening(results),
        _premises(results),
        _play(results),
        _answers(results),
        _knowledge(results),
        _labels(results),
        _vetoes(results),
        _controls(results),
        _rewards(results),
        _fooling(results),
        _costs(results),
        _questions(results),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    draw(results, folder)
    return path


# --- Sections ---------------------------------------------------------------------------------------------------------------
def _opening(results: Sequence[Result]) -> str:
    tasks = tasks_in(results)
    rows = []
    for task in tasks:
        cells = [len(collect(results, arm, lambda _: 0.0).get(task, {})) for arm in ARMS]
        fewer = [
            min(len(collect(results, arm, lambda _: 0.0, share).get(task, {})) for arm in ("joint", "separate"))
            for share in LABELS[1:]
        ]
        rows.append([title_of(task), *map(str, cells), *map(str, fewer)])
    missing = [name for name in task_names() if name not in tasks]
    left = f"\n\nNot reached for lack of time: {', '.join(missing)}." if missing else ""
    return (
        "# Is joint training as cheap and as good as hoped?\n\n"
        "What was to be measured, and what would count for and against each premise, was written down [before](plan.md). This page is "
        f"written by `{COMMAND}`, which runs the cells that are missing in [results.jsonl](results.jsonl) and makes tables and "
        "figures of all. Across seeds: interquartile means with 95 % stratified bootstrap intervals.\n\n"
        "Seeds that were run:\n\n"
        + _table(["task", *(f"`{arm}`" for arm in ARMS), "10 % labels", "1 % labels"], rows)
        + "\n\nFive are planned; with fewer, intervals are of few runs, and narrower than what they would "
        "say of runs to come." + left
    )


def _premises(results: Sequence[Result]) -> str:
    of = partial(collect, results)
    common = partial(skill, where="answers_common")
    rows = [["M2", "gap of `joint` below 0.05", *_judged(_negated(of("joint", gap)), margin=0.05, sign=-1)]]
    rows.append(
        ["M2", "and below that of `detached`", *_judged(difference(of("detached", gap), of("joint", gap)), sign=1)]
    )
    for other in AFTERWARDS:
        own = _judged(difference(of("joint", skill), of(other, skill)))
        fair = _judged(difference(of("joint", common), of(other, common)))
        agree = own[1] if own[1] == fair[1] else "open"
        rows.append(
            [
                "M3",
                f"answers of `joint` better than `{other}`",
                f"{own[0]}; on the plain agent's episodes {fair[0]}",
                agree,
            ]
        )
    few = difference(of("joint", skill, 0.01), of("separate", skill, 0.01))
    many = difference(of("joint", skill), of("separate", skill))
    rows.append(["M3'", "advantage over `separate` larger at 1 % of labels", *_judged(difference(few, many))])
    for other in ("probe", "separate"):
        rows.append(
            [
                "M4",
                f"reward of `joint`'s answers teaches better than `{other}`'s",
                *_judged(_scaled(results, difference(of("joint", rewarded), of(other, rewarded)))),
            ]
        )
    for at in AT:
        averted = partial(of_veto, at=at, kind="veto", name="averted")
        chance = partial(of_veto, at=at, kind="random", name="averted")
        where = "certified threshold" if at == "certified" else f"{float(at):.0%} flagged"
        rows.append(
            [
                "M5",
                f"`joint` averts more than a random veto, {where}",
                *_judged(difference(of("joint", averted), of("joint", chance))),
            ]
        )
        for other in ("probe", "separate"):
            rows.append(
                [
                    "M5",
                    f"`joint` averts more than `{other}`, {where}",
                    *_judged(difference(of("joint", averted), of(other, averted))),
                ]
            )
    returns = partial(played, name="return")
    kept = _scaled(results, difference(of("joint", returns), of("plain", returns)))
    rows.append(["M6", "return of `joint` within 5 % of `plain`'s", *_judged(kept, margin=0.05)])
    tuned = _scaled(results, difference(of("joint", returns), of("finetune", returns)))
    rows.append(["M6'", "`finetune` loses more return than `joint`", *_judged(tuned)])
    share = of("joint", lambda r: -r["parameters"]["questions"] / r["parameters"]["agent"])
    rows.append(["M7", "parameters added at most 10 %", *_judged(share, margin=0.1, sign=-1)])
    less = difference(
        of("shaped", partial(understated, whose="judge")), of("shaped", partial(understated, whose="own"))
    )
    rows.append(["F", "`shaped`: own answers no lower than an independent judge's", *_judged(less, margin=0.01)])
    return (
        "## The premises\n\n*Supported*: all of the interval is on the premise's side of the bar that the plan names; *contradicted*: all "
        "of it is on the other; *open*: neither.\n\n" + _table(["", "premise", "measured", "verdict"], rows)
    )


def _play(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        for arm in ("plain", "joint", "finetune", "anchored", "punished", "shaped"):
            cells = [of_task(results, arm, task, partial(played, name=name)) for name in ("return", "catastrophes")]
            if cells[0] is not None:
                solved = [r["solved_at"] for r in results if (r["task"], r["arm"], r["labels"]) == (task, arm, 1.0)]
                reached = [at for at in solved if at is not None]
                median = (
                    f"{np.median(reached):,.0f} ({len(reached)} of {len(solved)})" if reached else f"0 of {len(solved)}"
                )
                rows.append([title_of(task), f"`{arm}`", _shown(cells[0], 1), _shown(cells[1], 3), median])
    return (
        "## How the agents play\n\n`detached`, `separate` and `probe` have the agent of `plain`. Steps: environment steps "
        "to the mean return "
        "that counts as having learnt the task, median over the seeds that reached it; of arms that come afterwards, steps once more.\n\n"
        + _table(["task", "arm", "return", "episodes with a catastrophe", "steps"], rows)
    )


def _answers(results: Sequence[Result]) -> str:
    rows = []
    for task in [*tasks_in(results), None]:
        for where, name in (("answers", "own"), ("answers_common", "plain agent's")):
            cells = [of_task(results, arm, task, partial(skill, where=where)) for arm in ANSWERING]
            rows.append(["**all**" if task is None else title_of(task), name, *(_shown(cell, 3) for cell in cells)])
    head = ["task", "episodes", *(f"`{arm}`" for arm in ANSWERING)]
    return (
        "## How good the answers are (M3)\n\nSkill: the share of the best constant answer's error that the answers remove, "
        "mean over a task's "
        "questions; 1 is perfect, 0 no better than the constant.\n\n![skill by arm](skill.png)\n\n" + _table(head, rows)
    )


def _knowledge(results: Sequence[Result]) -> str:
    rows = [
        [title_of(task), *(_shown(of_task(results, arm, task, gap), 3) for arm in ("joint", "detached", "finetune"))]
        for task in tasks_in(results)
    ]
    return (
        "## What the agent knows and the answers do not tell (M2)\n\nSkill of the best probe that is fitted afterwards to "
        "the agent's latents (logistic "
        "regression or gradient-boosted trees, ample labels of other episodes) minus the skill of the answers, mean over yes/no "
        "questions. Below 0 the answers know more than such a probe finds.\n\n"
        + _table(["task", "`joint`", "`detached`", "`finetune`"], rows)
    )


def _labels(results: Sequence[Result]) -> str:
    arms = ("joint", "detached", "separate", "probe")
    rows = [
        [title_of(task), f"{share:.0%}", *(_shown(of_task(results, arm, task, skill, share), 3) for arm in arms)]
        for task in tasks_in(results)
        for share in LABELS
        if collect(results, "joint", skill, share).get(task)
    ]
    if not any(result["labels"] < 1.0 for result in results):
        return "## Fewer labels\n\nNot reached for lack of time."
    return (
        "## Fewer labels\n\nSkill by the share of the steps that have labels.\n\n![skill by labels](labels.png)\n\n"
        + _table(["task", "labels", *(f"`{arm}`" for arm in arms)], rows)
    )


def _vetoes(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        for at in AT:
            for arm in ANSWERING:
                of = {
                    (kind, name): of_task(results, arm, task, partial(of_veto, at=at, kind=kind, name=name))
                    for kind in ("veto", "random")
                    for name in ("averted", "lost", "veto_rate", "disrupted")
                }
                if of["veto", "veto_rate"] is not None:
                    cells = [_shown(of["veto", name], digits) for name, digits in (("averted", 2), ("lost", 1))]
                    cells += [_shown(of["random", "averted"], 2), _shown(of["random", "lost"], 1)]
                    cells += [_shown(of["veto", "veto_rate"], 3), _shown(of["veto", "disrupted"], 2)]
                    rows.append([title_of(task), at, f"`{arm}`", *cells])
    head = [
        "task",
        "at",
        "arm",
        "averted",
        "return lost",
        "averted at random",
        "return lost at random",
        "vetoes / step",
        "disrupted",
    ]
    return (
        "## What a veto averts, and costs (M5)\n\n*At* is the share of steps that is flagged without a veto, or the "
        "certified threshold (at most "
        "20 % of catastrophic episodes without a flag, at confidence 0.95; tasks whose agents have too few catastrophes for that are "
        "missing). *Averted*: the share of catastrophic episodes that is gone; below 0 there are more. *Disrupted*: the "
        "share of episodes without a "
        "catastrophe in which there was a veto. At random: as many vetoes of actions nobody judged.\n\n![vetoes](vetoes.png)\n\n"
        + _table(head, rows)
    )


def _controls(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        quantities: list[tuple[str, str, Callable[[str], Quantity]]] = [
            (
                f"`{arm}`'s answers, certified threshold",
                arm,
                lambda name: partial(of_veto, at="certified", kind="veto", name=name),
            )
            for arm in ("joint", "separate", "probe")
        ]
        chance = ("as many at random", "joint", lambda name: partial(of_veto, at="certified", kind="random", name=name))
        quantities.insert(1, chance)
        quantities.append(("true risks (oracle)", "oracle", lambda name: partial(of_oracle, name=name)))
        rows.append([title_of(task), "none", *_unvetoed(results, task, "plain"), "–", "–", "–", "–"])
        for what, arm, of in quantities:
            told = {
                name: of_task(results, arm, task, of(name))
                for name in ("return", "catastrophes", "averted", "lost", "veto_rate", "disrupted")
            }
            if told["return"] is not None:
                cells = [
                    _shown(told[name], digits)
                    for name, digits in (("return", 1), ("catastrophes", 3), ("averted", 2), ("lost", 1))
                ]
                rows.append([title_of(task), what, *cells, _shown(told["veto_rate"], 3), _shown(told["disrupted"], 2)])
        if collect(results, "punished", partial(played, name="return")).get(task):
            rows.append(
                [
                    title_of(task),
                    "none; catastrophes punished",
                    *_unvetoed(results, task, "punished"),
                    "–",
                    "–",
                    "–",
                    "–",
                ]
            )
    head = ["task", "veto by", "return", "catastrophes", "averted", "return lost", "vetoes / step", "disrupted"]
    return (
        "## The certified veto and its controls\n\n`separate` is a safety critic of its own, as in Recovery RL; the "
        "oracle plays on in clones of the "
        "simulator, where that is possible, in the task's Python environment and in fewer episodes; it knows the "
        "environment's noise to come, and no answerer "
        "can do better. Return and catastrophes are read together: where an agent avoids the catastrophe by doing nothing (the cliff), few "
        "catastrophes say nothing.\n\n" + _table(head, rows)
    )


def _unvetoed(results: Sequence[Result], task: str, arm: str) -> list[str]:
    return [
        _shown(of_task(results, arm, task, partial(played, name=name)), digits)
        for name, digits in (("return", 1), ("catastrophes", 3))
    ]


def _rewards(results: Sequence[Result]) -> str:
    rows = [
        [
            title_of(task),
            _shown(of_task(results, "plain", task, partial(played, name="return")), 1),
            *(_shown(of_task(results, arm, task, rewarded), 1) for arm in ANSWERING),
        ]
        for task in tasks_in(results)
        if collect(results, "joint", rewarded).get(task)
    ]
    return (
        "## A reward made of answers only (M4)\n\nTrue return of fresh agents that were trained on nothing but an arm's "
        "answers, beside `plain`, which had "
        "the true reward.\n\n" + _table(["task", "`plain`", *(f"`{arm}`" for arm in ANSWERING)], rows)
    )


def _fooling(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        for arm in ("joint", "shaped"):
            cells = [of_task(results, arm, task, partial(understated, whose=whose)) for whose in ("own", "judge")]
            rows.append([title_of(task), f"`{arm}`", *(_shown(cell, 4) for cell in cells)])
    return (
        "## Does the agent fool its own answerer?\n\nFrequency of the catastrophe that the veto asks about, minus what is "
        "said of it on average: above 0 it "
        "is understated. The judge is fitted to observations of other episodes, and the agent never sees it.\n\n"
        + _table(["task", "arm", "own answers", "judge"], rows)
    )


def _costs(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        for arm in ("plain", *ANSWERING):
            seconds = of_task(results, arm, task, lambda r: r["train_seconds"])
            size = [r["parameters"] for r in results if (r["task"], r["arm"]) == (task, arm)]
            if size:
                rows.append(
                    [
                        title_of(task),
                        f"`{arm}`",
                        f"{size[0]['agent']:,}",
                        f"{size[0]['questions']:,}",
                        _shown(seconds, 0),
                    ]
                )
    return (
        "## Size and time (M7, M8)\n\nSeconds of training are of runs on a machine that did other things too: `make bench` "
        "measures the ratio side by side. "
        "Arms that come afterwards need the agent's own training before.\n\n"
        + _table(["task", "arm", "parameters of the agent", "for questions", "seconds"], rows)
    )


def _questions(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        keys = next((list(r["answers"]) for r in results if r["task"] == task and "answers" in r), [])
        for key in keys:
            cells = []
            for arm in ANSWERING:
                told = [
                    r["answers"][key]
                    for r in results
                    if (r["task"], r["arm"], r["labels"]) == (task, arm, 1.0) and key in r.get("answers", {})
                ]
                each = [score["skill"] for score in told if score["skill"] is not None]
                ranks = [score["auroc"] for score in told if score.get("auroc") is not None]
                cells.append((f"{np.mean(each):.2f}" if each else "–") + (f" ({np.mean(ranks):.2f})" if ranks else ""))
            rows.append([title_of(task), f"`{key}`", *cells])
    return (
        "## Every question\n\nMean skill over seeds on the own agent's episodes; in brackets the area under the ROC curve "
        "of yes/no questions (a constant: "
        "0.5). Log-loss, Brier score, average precision and calibration error, each beside a constant's, are in results.jsonl.\n\n"
        + _table(["task", "question", *(f"`{arm}`" for arm in ANSWERING)], rows)
    )


# --- Helpers ----------------------------------------------------------------------------------------------------------------
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


def _judged(table: Table, *, margin: float = 0.0, sign: int = 1) -> list[str]:
    """The estimate as it is shown (``sign`` -1: of the quantity that the table is the negative of), and the verdict."""
    interval = estimate(table)
    if interval is None:
        return ["–", "not run"]
    shown = interval if sign > 0 else Interval(-interval.estimate, -interval.high, -interval.low)
    return [f"{_shown(shown, 3)} ({len(table)} tasks)", verdict(interval, margin=margin)]


def _shown(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "–"
    around = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if np.isfinite(interval.low) else ""
    return f"{interval.estimate:.{digits}f}{around}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
