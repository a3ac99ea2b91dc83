"""What ``qa_every`` costs the answers and saves in time: one minibatch in so many teaches the questions.

PPO on two tasks of the study, with their questions and hyperparameters (eight epochs). No gradient goes into the trunk, so that the agent
is the same, bit for bit, whatever ``qa_every``: *skill* is the share of the best constant answer's error that the answers remove
on 200 fresh episodes with sampled actions, averaged over the questions.

DQN and SAC on a random walk with exactly known probabilities, as in ``tests/test_known_answers.py``, where each transition is handed out
16 times: *error* is the mean absolute one of all answers, early and late.

One line of JSON for each run; runs that are there already are not repeated.

    python tests/bench/every.py            # runs what is missing, prints the tables
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import completed, wanted_seeds
from stable_baselines3 import DQN, SAC

from sb3_qa.evaluation import AnswerRecord
from sb3_qa.study.arms import train_arm
from sb3_qa.study.measure import TEST_SEED, answers, play
from sb3_qa.study.task import load_task

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_known_answers import check_random_walk

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS = ("navigation", "lander")
EVERY = (1, 2, 3, 4)
WALKS = {f"{each.__name__}, {steps:,} steps": (each, steps) for each in (DQN, SAC) for steps in (15_000, 48_000)}
EVERY_REPLAYED = (1, 2, 4, 8)


def run(name: str, arm: str, seed: int, **qa_kwargs: Any) -> dict[str, float]:
    """Train an arm of a task with other settings of its questions, and let it play and answer."""
    task = load_task(name)
    task = replace(task, qa_kwargs={**task.qa_kwargs, **qa_kwargs})
    started = time.process_time()
    trained = train_arm(task, arm, seed)
    seconds = time.process_time() - started
    record = None if trained.answerer is None else AnswerRecord(trained.answerer)
    played = play(task, trained.model, TEST_SEED, record=record)
    row = {"return": round(float(np.mean(played.returns)), 2), "cpu_seconds": round(seconds, 1)}
    if record is not None:
        skill = np.nanmean([scores["skill"] for scores in answers(record).values()])
        row["skill"] = round(float(skill), 4)
        row["added"] = round(100 * trained.parameters["questions"] / trained.parameters["agent"], 1)
    return row


def taught(task: str, every: int, seed: int) -> dict[str, float]:
    """What came of a head that is taught so rarely."""
    if task in TASKS:
        return run(task, "detached", seed, qa_every=every)
    algorithm, steps = WALKS[task]
    started = time.process_time()
    error = check_random_walk(steps, seed, algorithm, every)
    return {"error": round(error, 4), "cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    seeds = wanted_seeds(__doc__, 3)
    kinds = [*itertools.product(TASKS, EVERY), *itertools.product(WALKS, EVERY_REPLAYED)]
    cells = [(*kind, seed) for seed, kind in itertools.product(seeds, kinds)]
    done = completed(RESULTS, ("task", "every", "seed"), cells, taught)
    for figure, tasks, columns in (("skill", TASKS, EVERY), ("error", WALKS, EVERY_REPLAYED)):
        print(f"| {figure} | " + " | ".join(f"`qa_every={every}`" for every in columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for task in tasks:
            texts = []
            for every in columns:
                values, seconds = ([done[task, every, seed][key] for seed in seeds] for key in (figure, "cpu_seconds"))
                texts.append(
                    f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}), {np.mean(seconds):.0f} s"
                )
            print(f"| {task} | " + " | ".join(texts) + " |")
        print()


if __name__ == "__main__":
    main()
