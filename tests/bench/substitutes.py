"""What to execute in place of a vetoed continuous action: what is best over the whole box, or over what the policy itself might do?

Two tasks of the study with continuous actions, joint training, their hyperparameters and seeds. The threshold is that at which 5 or 10 %
of the steps are flagged while nothing is vetoed. Compared are ``on_veto`` ("safest", or by "policy" the likeliest action under the
threshold, or else the safest) and ``candidates``: "all" (32 of the policy and 32 of the box, the best going down the gradient of the risk
for five steps: the default) or "policy" (64 of the policy alone, no gradient steps). 200 fresh episodes each, with sampled actions;
interquartile means over seeds with 95 % bootstrap intervals. One line of JSON for each run; runs that are there are not repeated.

    python tests/bench/substitutes.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cells import completed, wanted_seeds
from certified import averted, cells, lost, told

from sb3_qa.study.arms import train_arm
from sb3_qa.study.measure import CALIBRATION_SEED, TEST_SEED, play, shadowed, summary
from sb3_qa.study.page import table
from sb3_qa.study.task import load_task
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "hopper")
SHARES = (0.05, 0.1)
KINDS = tuple(itertools.product(("safest", "policy"), ("all", "policy")))
EPISODES = 200


def run(name: str, seed: int) -> dict[str, Any]:
    """Train, and let the agent play under each veto."""
    started = time.perf_counter()
    task = replace(load_task(name), episodes=EPISODES)
    trained = train_arm(task, "joint", seed)
    model, qa = trained.model, trained.answerer
    assert qa is not None
    calm = play(task, model, CALIBRATION_SEED, shadowed(task, qa))
    risks = np.concatenate([trace.risk for trace in calm.traces])
    row: dict[str, Any] = {"none": summary(play(task, model, TEST_SEED))}
    for share in SHARES:
        limit = float(np.quantile(risks, 1.0 - share))
        for on_veto, candidates in KINDS:
            veto = partial(
                VecVetoAction, question=task.risk, threshold=limit, on_veto=on_veto, candidates=candidates, qa=qa
            )
            row[f"{share:.0%} {on_veto} {candidates}"] = summary(play(task, model, TEST_SEED, veto))
        rate = row[f"{share:.0%} safest all"]["veto_rate"]
        chance = partial(VecRandomVeto, question=task.risk, rate=rate, seed=0, qa=qa)
        row[f"{share:.0%} random"] = summary(play(task, model, TEST_SEED, chance))
    return row | {"seconds": round(time.perf_counter() - started)}


def main() -> None:
    seeds = wanted_seeds(__doc__, 5)
    done = completed(RESULTS, ("task", "seed"), [(task, seed) for seed in seeds for task in TASKS], run)
    lines = []
    for task, share in itertools.product(TASKS, SHARES):
        rows = {seed: done[task, seed] for seed in seeds}
        names = {f"{on_veto} {candidates}": [f'`"{on_veto}"`', f'`"{candidates}"`'] for on_veto, candidates in KINDS}
        for name, shown in {**names, "random": ["at random", "–"]}.items():
            kind = f"{share:.0%} {name}"
            of = [(partial(averted, kind=kind), 2), (partial(lost, kind=kind), 1)]
            of += [(partial(told, kind=kind, what=what), 3) for what in ("catastrophes", "veto_rate")]
            lines.append([f"{task}, {share:.0%}", *shown, *cells(rows, of)])
    head = ["task, flagged", "`on_veto`", "`candidates`", "averted", "return lost, %", "catastrophes", "vetoes / step"]
    print(table(head, lines, 3))


if __name__ == "__main__":
    main()
