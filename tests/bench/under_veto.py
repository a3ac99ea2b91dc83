"""Does it help to go on learning under the veto? highway, where certified vetoes avert half of the crashes.

What is executed in place of a vetoed action is one that the agent hardly ever takes, and a veto leads to where it has not been: there the
answers are weakest. Five ways to come by an agent and its answers, joint training each, of the study's highway task:

- ``first``: 200,000 steps, as in the study;
- ``longer``: as many once more (the control);
- ``under``: as many once more under the veto, at the threshold at which 30 % of the first agent's steps are flagged. A vetoed step costs
  0.5 of reward, and one veto in ten is let through, so that it is seen what would have come;
- ``explored``: as many once more with one action in ten replaced by a random other one;
- ``both``: as many once more under that veto, none let through, and with one of the actions in ten replaced by a random other one after it.

Each plays 600 fresh episodes with sampled actions, without a veto and under one at which 30 % of its own steps are flagged, and ``under``
at the threshold it was trained with. One line of JSON for each run; runs that are there already are not repeated.

    python tests/bench/under_veto.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from cells import completed, wanted_seeds
from certified import averted, cells, lost, told
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa import QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.study.arms import train_arm
from sb3_qa.study.measure import CALIBRATION_SEED, TEST_SEED, play, shadowed, summary
from sb3_qa.study.page import table
from sb3_qa.study.task import Task, load_task
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction

RESULTS = Path(__file__).with_suffix(".jsonl")
TASK = replace(load_task("highway"), episodes=600)
WAYS = ("first", "longer", "under", "explored", "both")
VETOED = ("under", "both")
SHARE, PENALTY, LET_THROUGH, EXPLORED = 0.3, 0.5, 0.1, 0.1
FOLDER = tempfile.TemporaryDirectory()

Row = dict[str, Any]


@cache
def first(seed: int) -> tuple[Path, float]:
    """Where the agent lies that all begin with, and the threshold at which so many of its steps are flagged."""
    model, path = train_arm(TASK, "joint", seed).model, Path(FOLDER.name) / f"{seed}.zip"
    model.save(path)
    return path, threshold(TASK, model)


def threshold(task: Task, model: Any) -> float:
    """At which the share of flagged steps is as wanted, while nothing is vetoed."""
    calm = play(task, model, CALIBRATION_SEED, shadowed(task, QuestionAnswerer.from_model(model)))
    return float(np.quantile(np.concatenate([trace.risk for trace in calm.traces]), 1.0 - SHARE))


def run(way: str, seed: int) -> Row:
    """Train on in this way, and let the agent play with and without its veto."""
    started = time.perf_counter()
    path, limit = first(seed)
    model: Any = TASK.algorithm.load(path, device="cpu")
    vetoed = partial(VecVetoAction, question=TASK.risk, threshold=limit, penalty=PENALTY, seed=seed)
    explored = partial(VecRandomVeto, question=TASK.risk, rate=EXPLORED, seed=seed)
    around: dict[str, Callable[[VecEnv], VecEnv]] = {
        "longer": lambda env: env,
        "under": partial(vetoed, let_through=LET_THROUGH),
        "explored": explored,
        "both": lambda env: vetoed(explored(env)),
    }
    if way in around:
        env = around[way](TASK.training_env(seed + 500))
        model.set_env(env)
        model.learn(TASK.timesteps, callback=QACallback(), reset_num_timesteps=False)
        env.close()
    ask: Row = dict(question=TASK.risk, qa=QuestionAnswerer.from_model(model))
    row: Row = {"none": summary(play(TASK, model, TEST_SEED))}
    wanted = {"veto": threshold(TASK, model)} | ({"trained with": limit} if way in VETOED else {})
    for kind, each in wanted.items():
        row[kind] = summary(play(TASK, model, TEST_SEED, partial(VecVetoAction, threshold=each, **ask)))
    return row | {"thresholds": wanted, "seconds": round(time.perf_counter() - started)}


def main() -> None:
    seeds = wanted_seeds(__doc__, 5)
    wanted = [(way, seed) for seed, way in itertools.product(seeds, WAYS)]
    done = completed(RESULTS, ("way", "seed"), wanted, run)
    lines = []
    for way in WAYS:
        for kind in ("none", "veto", *(["trained with"] if way in VETOED else [])):
            # Held against the first agent, as one that has learnt to rely on its veto may have more catastrophes without.
            rows = {seed: {"none": done["first", seed]["none"], "here": done[way, seed][kind]} for seed in seeds}
            of = [(partial(told, kind="here", what=what), n) for what, n in (("catastrophes", 3), ("return", 1))]
            of += [(partial(averted, kind="here"), 2), (partial(lost, kind="here"), 1)]
            lines.append([f"`{way}`", kind, *cells(rows, [*of, (partial(told, kind="here", what="veto_rate"), 3)])])
    head = ["way", "veto", "catastrophes", "return", "averted", "return lost, %", "vetoes / step"]
    print(table(head, lines, 2))


if __name__ == "__main__":
    main()
