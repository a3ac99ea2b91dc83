"""Which average of the head's weights should answer: a long one, or of a long and a short one which foretells better?

PPO on two tasks of the study, seeds that it does not use; arms as there: `joint`, `detached` (no gradient into the trunk), `separate`
(a network of its own), `probe` (a head added afterwards) and `shaped` (joint, its own answers about the catastrophe punished in the
reward). *Skill* is the share of the best constant answer's error that the answers remove on 200 fresh episodes with sampled actions,
averaged over the questions. One line of JSON for each run; runs that are there already are not repeated.

    python tests/bench/averages.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from cells import completed, wanted_seeds
from every import run

from sb3_qa import head

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "lander")
ARMS = ("joint", "detached", "separate", "probe", "shaped")
AVERAGES = {"long": (500, 500), "the better": (head.LONG_AVERAGE, head.SHORT_AVERAGE)}
"""Updates that the two averages are over; of two alike neither is better."""
FIRST_SEED = 20


def answered_by(task: str, arm: str, average: str, seed: int) -> dict[str, Any]:
    """What came of an arm whose answers come from this average."""
    head.LONG_AVERAGE, head.SHORT_AVERAGE = AVERAGES[average]
    return run(task, arm, seed)


def main() -> None:
    seeds = wanted_seeds(__doc__, 2, FIRST_SEED)
    cells = [(task, arm, average, seed) for seed, task, arm, average in itertools.product(seeds, TASKS, ARMS, AVERAGES)]
    done = completed(RESULTS, ("task", "arm", "average", "seed"), cells, answered_by)
    for what, digits in (("skill", 2), ("return", 0)):
        print(f"| {what}, average | " + " | ".join(f"`{arm}`" for arm in ARMS) + " |")
        print("|---" * (len(ARMS) + 1) + "|")
        for task, average in itertools.product(TASKS, AVERAGES):
            texts = []
            for arm in ARMS:
                values = [done[task, arm, average, seed][what] for seed in seeds]
                texts.append(f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
            print(f"| {task}, {average} | " + " | ".join(texts) + " |")
        print()


if __name__ == "__main__":
    main()
