"""What certified vetoes avert and cost: at most 5 % of catastrophic episodes without a flag, beside what might embarrass them.

Four tasks of the study, whose own cells play too few episodes for such a claim (they certify 20 %). Here as many are played as it takes
to see some 130 catastrophes, at most 5,000 (1,000, and nothing is certified, where those would not bring the 59 that are needed at the
least). The threshold is then the highest that ``certify(window=...)`` would claim at 95 % confidence, for each agent and answerer; a flag
counts that stands within the question's horizon before the catastrophe (for ``joint`` also: any flag before it, as by default).
Under the veto, and without it, the agents play 1,000 other episodes, with sampled actions. The veto by ``joint`` is tried at further
thresholds too, at which 20, 30 and 50 % of the steps are flagged while nothing is vetoed.

One line of JSON for each run; runs that are there already are not repeated. The oracle is the study's own
(``docs/study/long_average/results.jsonl``).

    python tests/bench/certified.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import completed

from sb3_qa.bounds import needed
from sb3_qa.questions import Catalogue
from sb3_qa.study.aggregate import Table, estimate
from sb3_qa.study.arms import train_arm
from sb3_qa.study.measure import CALIBRATION_SEED, CONFIDENCE, TEST_SEED, certified_threshold, play, shadowed, summary
from sb3_qa.study.page import shown, table
from sb3_qa.study.run import finished
from sb3_qa.study.task import load_task
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction

RESULTS = Path(__file__).with_suffix(".jsonl")
STUDY = Path(__file__).parents[2] / "docs" / "study" / "long_average" / "results.jsonl"
MODELS = Path("outputs/study")
TASKS = ("cliff", "navigation", "lander", "highway")
ARMS = ("joint", "separate", "probe", "punished")
MISS_RATE = 0.05
EPISODES = 1_000
SHARES = (0.2, 0.3, 0.5)
CATASTROPHES, MOST = 130, 5_000

Row = dict[str, Any]


def run(name: str, arm: str, seed: int) -> Row:
    """Train an arm, certify its threshold, and let the agent play with and without the veto."""
    started = time.perf_counter()
    task = replace(load_task(name), episodes=EPISODES)
    trained = train_arm(task, arm, seed, folder=MODELS)
    model, qa = trained.model, trained.answerer
    row: Row = {"none": summary(play(task, model, TEST_SEED))}
    if qa is not None:
        # How many are played is settled by other episodes than those that are judged.
        share = row["none"]["catastrophes"]
        least = needed(MISS_RATE, CONFIDENCE)
        episodes = min(math.ceil(CATASTROPHES / share), MOST) if share * MOST >= least else EPISODES
        long_enough = replace(task, episodes=episodes)
        calm = play(long_enough, model, CALIBRATION_SEED, shadowed(task, qa))
        horizon = Catalogue(task.questions).instances[task.risk].horizon
        threshold = certified_threshold(calm, MISS_RATE, horizon)
        row |= {"threshold": threshold, "seen": int((calm.catastrophes > 0).sum()), "of": len(calm)}
        ask: Row = dict(question=task.risk, qa=qa)
        wanted = {"veto": threshold}
        if arm == "joint":
            risks = np.concatenate([trace.risk for trace in calm.traces])
            wanted["whenever"] = certified_threshold(calm, MISS_RATE)
            wanted |= {f"{share:.0%}": float(np.quantile(risks, 1.0 - share)) for share in SHARES}
        for kind, limit in wanted.items():
            if limit is not None:
                row[kind] = summary(play(task, model, TEST_SEED, partial(VecVetoAction, threshold=limit, **ask)))
        if "veto" in row and arm == "joint":
            chance = partial(VecRandomVeto, rate=row["veto"]["veto_rate"], seed=0, **ask)
            row["random"] = summary(play(task, model, TEST_SEED, chance))
    return row | {"seconds": round(time.perf_counter() - started)}


def averted(row: Row, kind: str) -> float | None:
    """The share of catastrophic episodes that is gone; below 0 there are more."""
    if kind not in row or not row["none"]["catastrophes"]:
        return None
    return 1.0 - float(row[kind]["catastrophes"] / row["none"]["catastrophes"])


def lost(row: Row, kind: str) -> float | None:
    """How much return the veto costs, in percent of what there is without it; below 0 there is more."""
    if kind not in row:
        return None
    before = row["none"]["return"]
    return float(100.0 * (before - row[kind]["return"]) / abs(before))


def told(row: Row, kind: str, what: str) -> float | None:
    return float(row[kind][what]) if kind in row else None


def cells(rows: dict[int, Row], of: Iterable[tuple[Callable[[Row], float | None], int]]) -> list[str]:
    """Interquartile means over seeds, with their intervals."""
    texts = []
    for quantity, digits in of:
        values = {seed: value for seed, row in rows.items() if (value := quantity(row)) is not None}
        seeds: Table = {"": values}
        texts.append(shown(estimate(seeds) if values else None, digits))
    return texts


def columns(kind: str) -> list[tuple[Callable[[Row], float | None], int]]:
    return [
        (partial(averted, kind=kind), 2),
        (partial(lost, kind=kind), 1),
        (partial(told, kind=kind, what="catastrophes"), 3),
        (partial(told, kind=kind, what="veto_rate"), 3),
        (partial(told, kind=kind, what="disrupted"), 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--only-table", action="store_true", help="of the runs that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(task, arm, seed) for seed, task, arm in itertools.product(range(args.seeds), args.tasks, ARMS)]
    done = completed(RESULTS, ("task", "arm", "seed"), [] if args.only_table else wanted, run)
    study = {(row["task"], row["seed"]): row["oracle"] for row in finished(STUDY) if row["arm"] == "oracle"}
    lines = []
    for task in args.tasks:
        seeds = [seed for seed in range(args.seeds) if all((task, arm, seed) in done for arm in ARMS)]
        of = {arm: {seed: done[task, arm, seed] for seed in seeds} for arm in ARMS}
        oracle = {seed: study[task, seed] for seed in seeds if (task, seed) in study}
        kinds = [
            ("none", of["joint"], "none"),
            ("`joint`'s answers", of["joint"], "veto"),
            ("as many at random", of["joint"], "random"),
            ("`joint`'s answers, flags count whenever they come", of["joint"], "whenever"),
            *((f"`joint`'s answers, {share:.0%} flagged", of["joint"], f"{share:.0%}") for share in SHARES),
            ("a critic of its own", of["separate"], "veto"),
            ("a probe of the frozen trunk", of["probe"], "veto"),
            ("true risks (oracle)", oracle, "veto"),
            ("none; catastrophes punished", of["punished"], "none"),
        ]
        for name, rows, kind in kinds:
            said = cells(rows, columns(kind))
            certified = sum(kind in row for row in rows.values())
            few = f" ({certified} of {len(rows)} seeds)" if certified < len(rows) else ""
            lines.append(
                [f"{task}, {len(seeds)} seeds", name + few, *(["–", "–", *said[2:]] if kind == "none" else said)]
            )
    header = ["task", "veto by", "averted", "return lost, %", "catastrophes", "vetoes / step", "disrupted"]
    print(table(header, lines, names=2))
    seen = np.array([[row["seen"], row["of"]] for row in done.values() if row.get("threshold") is not None])
    print(f"\nA certified threshold rests on {seen[:, 0].min()} to {seen[:, 0].max()} catastrophes.")


if __name__ == "__main__":
    main()
