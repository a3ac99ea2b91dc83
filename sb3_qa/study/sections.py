"""Sections of the report: a table of each kind of quantity, by task and arm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from sb3_qa.study.aggregate import Result, collect
from sb3_qa.study.page import folded, shown, table
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
    understated,
)

__all__ = ["SECTIONS"]

ACTING = ("plain", "joint", "finetune", "anchored", "punished", "shaped")
"""Arms with an agent of their own."""


def _arms(arms: Sequence[str]) -> list[str]:
    return [f"`{arm}`" for arm in arms]


def _cells(results: Sequence[Result], task: str | None, arms: Sequence[str], of: Quantity, digits: int) -> list[str]:
    return [shown(of_task(results, arm, task, of), digits) for arm in arms]


def _play(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        for name, digits in (("return", 2), ("catastrophes", 3)):
            rows.append([task, name, *_cells(results, task, ACTING, partial(played, name=name), digits)])
        rows.append([task, "steps", *(_learnt(results, task, arm) for arm in ACTING)])
    return (
        "## How the agents play\n\n`detached`, `separate` and `probe` have the agent of `plain`. Catastrophes: the share of "
        "episodes with one. Steps: environment steps to the mean return that counts as having learnt the task, median over the seeds "
        "that reached it; of arms that come afterwards, steps once more.\n\n"
        + table(["task", "", *_arms(ACTING)], rows, names=2)
    )


def _learnt(results: Sequence[Result], task: str, arm: str) -> str:
    solved = [r["solved_at"] for r in results if (r["task"], r["arm"], r["labels"]) == (task, arm, 1.0)]
    reached = [at for at in solved if at is not None]
    if not solved:
        return "–"
    return f"{np.median(reached):,.0f} ({len(reached)} of {len(solved)})" if reached else f"0 of {len(solved)}"


def _answers(results: Sequence[Result]) -> str:
    rows = [
        [task or "**all**", name, *_cells(results, task, ANSWERING, partial(skill, where=where), 3)]
        for task in [*tasks_in(results), None]
        for where, name in (("answers", "own"), ("answers_common", "plain agent's"))
    ]
    return (
        "## How good the answers are (M3)\n\nSkill: the share of the best constant answer's error that the answers remove, mean over a "
        "task's questions; 1 is perfect, 0 no better than the constant.\n\n![skill by arm](skill.png)\n\n"
        + table(["task", "episodes", *_arms(ANSWERING)], rows, names=2)
    )


def _knowledge(results: Sequence[Result]) -> str:
    arms = ("joint", "detached", "finetune")
    rows = [[task, *_cells(results, task, arms, gap, 3)] for task in tasks_in(results)]
    return (
        "## What the agent knows and the answers do not tell (M2)\n\nSkill of the best probe that is fitted afterwards to the agent's "
        "latents (logistic regression, gradient-boosted trees, or a head that has as many steps of the final policy as the agent was "
        "trained for) minus the skill of the answers, mean over yes/no questions; which is best is decided by other episodes. Below 0 "
        "the answers know more than any of these finds.\n\n" + table(["task", *_arms(arms)], rows)
    )


def _labels(results: Sequence[Result]) -> str:
    if not any(result["labels"] < 1.0 for result in results):
        return "## Fewer labels\n\nNot reached for lack of time."
    arms = ("joint", "detached", "separate", "probe")
    rows = [
        [task, f"{share:.0%}", *(shown(of_task(results, arm, task, skill, share), 3) for arm in arms)]
        for task in tasks_in(results)
        for share in LABELS
    ]
    return (
        "## Fewer labels\n\nSkill by the share of the steps that have labels.\n\n![skill by labels](labels.png)\n\n"
        + table(["task", "labels", *_arms(arms)], rows, names=2)
    )


def _vetoes(results: Sequence[Result]) -> str:
    tasks = tasks_in(results)
    averted = partial(of_veto, kind="veto", name="averted")
    chance = partial(of_veto, kind="random", name="averted")
    rows = [
        [
            task,
            at,
            *_cells(results, task, ANSWERING, partial(averted, at=at), 2),
            *_cells(results, task, ["joint"], partial(chance, at=at), 2),
        ]
        for task in tasks
        for at in AT
    ]
    columns = [("veto", "averted", 2), ("veto", "lost", 2), ("random", "averted", 2), ("random", "lost", 2)]
    columns += [("veto", "veto_rate", 3), ("veto", "disrupted", 2)]
    every = [
        [
            task,
            at,
            f"`{arm}`",
            *(
                shown(of_task(results, arm, task, partial(of_veto, at=at, kind=kind, name=name)), digits)
                for kind, name, digits in columns
            ),
        ]
        for task in tasks
        for at in AT
        for arm in ANSWERING
    ]
    head = ["task", "at", "arm", "averted", "return lost", "averted at random", "return lost at random"]
    return (
        "## What a veto averts, and costs (M5)\n\n*At* is the largest share of steps that is flagged without a veto, or the certified "
        "threshold (at most 20 % of catastrophic episodes without a flag, at confidence 0.95; tasks whose agents have too few "
        "catastrophes for that are missing). *Averted*: the share of catastrophic episodes that is gone; below 0 there are more, and many "
        "times as many where there were few. *Disrupted*: the share of episodes without a catastrophe in which there was a veto. At "
        "random: as many vetoes of actions nobody judged.\n\n"
        "![vetoes](vetoes.png)\n\nAverted:\n\n"
        + table(["task", "at", *_arms(ANSWERING), "at random, as many as `joint`"], rows, names=2)
        + "\n\n"
        + folded("What each veto averted and cost", table([*head, "vetoes / step", "disrupted"], every, names=3))
    )


def _controls(results: Sequence[Result]) -> str:
    names = [("return", 2), ("catastrophes", 3), ("averted", 2), ("lost", 2), ("veto_rate", 3), ("disrupted", 2)]
    certified = partial(of_veto, at="certified")
    rows = []
    for task in tasks_in(results):
        for what, arm, of in (
            ("none", "plain", played),
            ("`joint`'s answers, certified threshold", "joint", partial(certified, kind="veto")),
            ("as many at random", "joint", partial(certified, kind="random")),
            ("`separate`'s answers, certified threshold", "separate", partial(certified, kind="veto")),
            ("`probe`'s answers, certified threshold", "probe", partial(certified, kind="veto")),
            ("true risks (oracle)", "oracle", of_oracle),
            ("none; catastrophes punished", "punished", played),
        ):
            told = names[:2] if of is played else names
            cells = [shown(of_task(results, arm, task, partial(of, name=name)), digits) for name, digits in told]
            rows.append([task, what, *cells, *["–"] * (len(names) - len(told))])
    head = ["task", "veto by", "return", "catastrophes", "averted", "return lost", "vetoes / step", "disrupted"]
    return (
        "## The certified veto and its controls\n\n`separate` is a safety critic of its own, as in Recovery RL; the oracle plays on in "
        "clones of the simulator, where that is possible, in the task's Python environment and in fewer episodes. It knows the "
        "environment's noise to come, but looks at two rollouts an action, and vetoes at one threshold. Return and catastrophes are read "
        "together: where an agent avoids the catastrophe by doing nothing (the cliff), few catastrophes say nothing.\n\n"
        + table(head, rows, names=2)
    )


def _rewards(results: Sequence[Result]) -> str:
    returns = partial(played, name="return")
    rows = [
        [task, *_cells(results, task, ["plain"], returns, 2), *_cells(results, task, ANSWERING, rewarded, 2)]
        for task in tasks_in(results)
        if collect(results, "joint", rewarded).get(task)
    ]
    return (
        "## A reward made of answers only (M4)\n\nTrue return of fresh agents that were trained on nothing but an arm's answers, beside "
        "`plain`, which had the true reward.\n\n" + table(["task", "`plain`", *_arms(ANSWERING)], rows)
    )


def _fooling(results: Sequence[Result]) -> str:
    whose = [partial(understated, whose=each) for each in ("own", "judge")]
    rows = [
        [task, f"`{arm}`", *(shown(of_task(results, arm, task, of), 4) for of in whose)]
        for task in tasks_in(results)
        for arm in ("joint", "shaped")
    ]
    return (
        "## Does the agent fool its own answerer?\n\nFrequency of the catastrophe that the veto asks about, minus what is said of it on "
        "average: above 0 it is understated. The judge is fitted to observations of other episodes, and the agent never sees it. Runs in "
        "which the catastrophe has become too rare to fit a judge to are not among them.\n\n"
        + table(["task", "arm", "own answers", "judge"], rows, names=2)
    )


def _costs(results: Sequence[Result]) -> str:
    arms = ("plain", *ANSWERING)
    rows = []
    for task in tasks_in(results):
        sizes = {arm: [r["parameters"] for r in results if (r["task"], r["arm"]) == (task, arm)] for arm in arms}
        counts = [("plain", "agent"), ("joint", "questions"), ("separate", "questions")]
        told = [f"{sizes[arm][0][what]:,}" if sizes[arm] else "–" for arm, what in counts]
        rows.append([task, *told, *_cells(results, task, arms, lambda r: r["train_seconds"], 0)])
    head = ["task", "parameters of the agent", "for questions", "of `separate`, for questions"]
    return (
        "## Size and time (M7, M8)\n\nSeconds of training, by arm, are of runs on a machine that did other things too: `make bench` "
        "measures the ratio side by side. Arms that come afterwards need the agent's own training before.\n\n"
        + table([*head, *_arms(arms)], rows)
    )


def _questions(results: Sequence[Result]) -> str:
    rows = []
    for task in tasks_in(results):
        keys = next((list(r["answers"]) for r in results if r["task"] == task and "answers" in r), [])
        rows += [[task, f"`{key}`", *(_question(results, task, key, arm) for arm in ANSWERING)] for key in keys]
    return (
        "## Every question\n\nMean skill over seeds on the own agent's episodes; in brackets the area under the ROC curve of yes/no "
        "questions (a constant: 0.5). Log-loss, Brier score, average precision and calibration error, each beside a constant's, are in "
        "results.jsonl.\n\n" + folded("All of them", table(["task", "question", *_arms(ANSWERING)], rows, names=2))
    )


def _question(results: Sequence[Result], task: str, key: str, arm: str) -> str:
    told = [
        r["answers"][key]
        for r in results
        if (r["task"], r["arm"], r["labels"]) == (task, arm, 1.0) and key in r.get("answers", {})
    ]
    each = [score["skill"] for score in told if score["skill"] is not None]
    ranks = [score["auroc"] for score in told if score.get("auroc") is not None]
    return (f"{np.mean(each):.2f}" if each else "–") + (f" ({np.mean(ranks):.2f})" if ranks else "")


SECTIONS = (
    _play,
    _answers,
    _knowledge,
    _labels,
    _vetoes,
    _controls,
    _rewards,
    _fooling,
    _costs,
    _questions,
)
"""From results to Markdown, in the order of the page."""
