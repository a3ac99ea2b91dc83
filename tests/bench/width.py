"""How wide the head must be: the default's 32 units are more than half of a 64x64 agent once more, and fewer cost what?

PPO on two tasks of the study, 64x64 networks, seeds that the study does not use. No gradient goes into the trunk, so that the agent is the
same, bit for bit, whatever the head. *Skill* is the share of the best constant answer's error that the answers remove on 200 fresh
episodes with sampled actions, averaged over the questions; *added* are the head's parameters in percent of the agent's. One line of JSON
for each run; runs that are there already are not repeated.

    python tests/bench/width.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from cells import completed, wanted_seeds
from every import run

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "lander")
WIDTHS = (4, 8, 16, 32)
"""Units of the head's one layer."""
FIRST_SEED = 10


def narrow(task: str, width: int, seed: int) -> dict[str, Any]:
    """What came of a head of this width."""
    return run(task, "detached", seed, qa_net_arch=[width])


def main() -> None:
    seeds = wanted_seeds(__doc__, 2, FIRST_SEED)
    done = completed(
        RESULTS,
        ("task", "width", "seed"),
        [(task, w, seed) for seed, task, w in itertools.product(seeds, TASKS, WIDTHS)],
        narrow,
    )
    print("| skill (added) | " + " | ".join(map(str, WIDTHS)) + " |")
    print("|---" * (len(WIDTHS) + 1) + "|")
    for task in TASKS:
        texts = []
        for width in WIDTHS:
            rows = [done[task, width, seed] for seed in seeds]
            skills = np.array([row["skill"] for row in rows])
            texts.append(f"{skills.mean():.3f} ({skills.min():.3f} to {skills.max():.3f}), {rows[0]['added']:.0f} %")
        print(f"| {task} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
