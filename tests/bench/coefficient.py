"""What the weight of the question loss, ``qa_coef``, costs an agent that has little time: SB3's identity tasks.

The action that equals the observation is paid; observations are drawn at random, so that questions about the future have
nothing to say and their gradient in the trunk is noise. 1,200 steps, 20 evaluation episodes of 100 steps: 100 is perfect. One
line of JSON for each run; runs that are there already are not repeated.

    python tests/bench/coefficient.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import completed
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Number, Question
from sb3_qa.callbacks import QACallback
from sb3_qa.truth import eventually, now

RESULTS = Path(__file__).with_suffix(".jsonl")
QUESTIONS = [
    Question(
        "Will it end within {k} steps if I choose {action}?",
        eventually(lambda step: step.terminated, within="k"),
        k=[1, 3],
        name="end",
    ),
    Question("Was I paid?", now(lambda step: step.reward > 0), name="paid"),
    Question("How much?", now(lambda step: step.reward), Number(-1, 1), name="reward"),
]
TASKS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    f"{algorithm.__name__} {env.__name__.removeprefix('IdentityEnv')}": (algorithm, given, env)
    for (algorithm, given), env in itertools.product(
        [(A2C, {}), (PPO, dict(n_epochs=4, n_steps=256))], [IdentityEnvMultiBinary, IdentityEnvMultiDiscrete]
    )
}
COLUMNS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "0.02": dict(qa_coef=0.02),
    "0.1": dict(qa_coef=0.1),
    "0.5": dict(qa_coef=0.5),
    "0.1, text": dict(qa_coef=0.1, qa_encoder="text"),
    "0.5, text": dict(qa_coef=0.5, qa_encoder="text"),
}


def run(task: str, column: str, seed: int) -> dict[str, float]:
    """The mean return."""
    algorithm, given, make = TASKS[task]
    env = DummyVecEnv([lambda: make(4)])
    qa = COLUMNS[column]
    name = "MlpPolicy" if qa is None else "QAMlpPolicy"
    kwargs = {} if qa is None else dict(questions=QUESTIONS, **qa)
    model = algorithm(name, env, gamma=0.4, learning_rate=0.002, seed=seed, policy_kwargs=kwargs, **given)
    model.learn(1200, callback=None if qa is None else QACallback())
    return {"return": round(float(evaluate_policy(model, env, n_eval_episodes=20, warn=False)[0]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(task, column, seed) for seed, task, column in itertools.product(range(args.seeds), TASKS, COLUMNS)]
    done = completed(RESULTS, ("task", "column", "seed"), cells, run)
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for task in TASKS:
        texts = []
        for column in COLUMNS:
            values = np.array([done[task, column, seed]["return"] for seed in range(args.seeds)])
            means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
            low, high = np.quantile(means, [0.025, 0.975])
            texts.append(f"{values.mean():.0f} [{low:.0f}, {high:.0f}]")
        print(f"| {task} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
