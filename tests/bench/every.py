"""What ``qa_every`` costs the answers and saves in time: one minibatch in so many teaches the questions.

PPO on three tasks of the study (their questions and hyperparameters; 200 fresh episodes with sampled actions): *skill*, the share of
the best constant answer's error that the answers remove, averaged over the questions, the return, and the CPU time of training. One line of
JSON for each run; runs that are there already are not repeated.

    python tests/bench/every.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sb3_qa.study.arms import train_arm
from sb3_qa.study.knowledge import Knowledge
from sb3_qa.study.measure import TEST_SEED, answers, play, shadowed
from sb3_qa.study.task import load_task

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "cliff", "lander")
EVERY = (1, 2, 4, 8)


def run(name: str, every: int, seed: int) -> dict[str, float]:
    """Train the joint arm, and let it play and answer."""
    task = load_task(name)
    task = replace(task, qa_kwargs={**task.qa_kwargs, "qa_every": every})
    started = time.process_time()
    trained = train_arm(task, "joint", seed)
    seconds = time.process_time() - started
    assert trained.answerer is not None
    record = Knowledge(trained.answerer)
    episodes = play(task, trained.model, TEST_SEED, shadowed(task, trained.answerer), record)
    skills = [scores["skill"] for scores in answers(record).values()]
    return {
        "skill": round(float(np.nanmean(skills)), 4),
        "return": round(float(episodes.returns.mean()), 2),
        "catastrophes": round(float((episodes.catastrophes > 0).mean()), 4),
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["task"], row["every"], row["seed"]): row for row in rows}
    for seed, task, every in itertools.product(range(args.seeds), TASKS, EVERY):
        if (task, every, seed) not in done:
            done[task, every, seed] = row = {"task": task, "every": every, "seed": seed, **run(task, every, seed)}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("| task, `qa_every` | skill | return | CPU time of training |")
    print("|---|---|---|---|")
    for task, every in itertools.product(TASKS, EVERY):
        cells = []
        for key in ("skill", "return", "cpu_seconds"):
            values = [done[task, every, seed][key] for seed in range(args.seeds)]
            cells.append(f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        print(f"| {task}, {every} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
