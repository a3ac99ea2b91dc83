"""How strongly questions should shape the agent: ``qa_coef`` against what the answers and the agent gain or lose.

PPO on two tasks of the study, joint training, seeds that the study does not use, so that a default may be chosen here and judged
there. *Skill* is the share of the best constant answer's error that the answers remove on 200 fresh episodes with sampled actions, averaged
over the questions; the return is that of the same episodes. One line of JSON for each run; runs that are there already are not repeated.

    python tests/bench/shaping.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from cells import completed, wanted_seeds
from every import run

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "lander")
COEFFICIENTS = (None, 0.0, 0.1, 0.3, 1.0)
"""None: the plain agent, which answers nothing; 0: no gradient into the trunk (as any coefficient teaches the head the same)."""
FIRST_SEED = 10


def shaped(task: str, coefficient: float | None, seed: int) -> dict[str, float]:
    """What came of an agent whose trunk is shaped so strongly."""
    arm = {None: "plain", 0.0: "detached"}.get(coefficient, "joint")
    return run(task, arm, seed, **({"qa_coef": coefficient} if arm == "joint" else {}))


def main() -> None:
    seeds = wanted_seeds(__doc__, 3, FIRST_SEED)
    cells = [(task, c, seed) for seed, task, c in itertools.product(seeds, TASKS, COEFFICIENTS)]
    done = completed(RESULTS, ("task", "coefficient", "seed"), cells, shaped)
    for what in ("skill", "return"):
        print(f"| {what} | " + " | ".join("plain" if c is None else f"{c:g}" for c in COEFFICIENTS) + " |")
        print("|---" * (len(COEFFICIENTS) + 1) + "|")
        for task in TASKS:
            cells = []
            for coefficient in COEFFICIENTS:
                values = np.array([done[task, coefficient, seed].get(what, np.nan) for seed in seeds])
                digits = 3 if what == "skill" else 1
                spread = f"({values.min():.{digits}f} to {values.max():.{digits}f})"
                cells.append("–" if np.isnan(values).any() else f"{values.mean():.{digits}f} {spread}")
            print(f"| {task} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
