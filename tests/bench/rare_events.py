"""Does an agent that has become safe forget what is dangerous, and does a memory of rare events help?

Slippery CliffWalking: PPO soon keeps far from the cliff and hardly ever falls. The truth is known exactly from the
environment's transition table: for "Will I fall in {k} steps if I choose {action}?" with k = 1 it is the same whatever the
agent does; for "Will I fall within 10 steps?" it follows from the policy of the moment. Errors are mean absolute
errors of the probability: over all cells and actions, over the cells from which one can fall, and over the cells as the agent
visits them. One line of JSON for each run and checkpoint; runs that are there already are not repeated.

    python tests/bench/rare_events.py            # runs what is missing, prints the table
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.rare_events import RareEventMemory
from sb3_qa.truth import eventually

RESULTS = Path(__file__).with_suffix(".jsonl")
ARMS: dict[str, dict[str, float] | None] = {"without": None, "memory": {}}
LATER = 10
QUESTIONS = [
    Question(
        "Will I fall within {k} steps if I choose {action}?",
        eventually(lambda step: step.reward <= -100, within="k"),
        k=[1, 5],
        name="fall",
    ),
    Question("Will I fall within 10 steps?", eventually(lambda step: step.reward <= -100, within=LATER), name="later"),
]


def make_env(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make("CliffWalking-v1", is_slippery=True, max_episode_steps=100, **kwargs)


def exact(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(fall at the next step | cell, action), and P(fall within LATER steps | cell) under a policy (n_cells, n_actions)."""
    table = make_env().unwrapped.P  # type: ignore[attr-defined]
    n, m = shares.shape
    falls, moves, goes_on = np.zeros((n, m)), np.zeros((n, m, n)), np.ones(n)
    for cell in range(n):
        for action in range(m):
            for chance, place, reward, terminated in table[cell][action]:
                falls[cell, action] += chance * (reward <= -100)
                moves[cell, action, place] += chance * (reward > -100) * (not terminated)
    within = np.zeros(n)
    for _ in range(LATER):
        within = np.einsum("nm,nm->n", shares, falls + moves @ within) * goes_on
    return falls, within


class Measure(BaseCallback):
    """Errors every so many steps."""

    def __init__(self, every: int, row: dict[str, Any]) -> None:
        super().__init__()
        self.every, self.row = every, row
        self.visits, self.n_falls = np.zeros(48), 0
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        np.add.at(self.visits, self.locals["obs_tensor"].cpu().numpy().astype(int), 1)
        self.n_falls += int((self.locals["rewards"] <= -100).sum())
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps < self.every * (len(self.rows) + 1):
            return
        qa, cells = QuestionAnswerer.from_model(self.model), np.arange(48)
        with torch.no_grad():
            shares = self.model.policy.get_distribution(torch.as_tensor(cells)).distribution.probs.numpy()
        falls, within = exact(shares)
        walkable = np.flatnonzero(cells <= 36)  # not the cliff itself, nor the goal
        edge = walkable[falls[walkable].max(axis=1) > 0]
        now = np.abs(qa.ask("fall[k=1]", cells).probability - falls)
        later = np.abs(qa.ask("later", cells).probability - within)
        seen = self.visits / self.visits.sum()
        self.rows.append(
            {
                **self.row,
                "steps": self.num_timesteps,
                "falls_per_1000": 1000 * self.n_falls / self.visits.sum(),
                "all": now[walkable].mean(),
                "edge": now[edge].mean(),
                "visited": float((seen[:, None] * shares * now).sum()),
                "later_edge": later[edge].mean(),
                "later_visited": float((seen * later).sum()),
            }
        )
        self.visits[:], self.n_falls = 0, 0


def run(arm: str, seed: int, steps: int, every: int) -> list[dict[str, Any]]:
    """Train, and return a line for each checkpoint."""
    kwargs = ARMS[arm]
    memory = None if kwargs is None else RareEventMemory(["fall"], seed=seed, **kwargs)  # type: ignore[arg-type]
    measure = Measure(every, {"arm": arm, "seed": seed})
    model = PPO(
        qa_policy(PPO),
        make_vec_env(make_env, 8, seed=seed),
        n_steps=128,
        batch_size=64,
        seed=seed,
        policy_kwargs=dict(questions=QUESTIONS),
    )
    model.learn(steps, callback=[QACallback(memory=memory), measure])
    return measure.rows


def table(rows: list[dict[str, Any]], first: int, last: int) -> str:
    """Mean and 95 % t-interval over seeds, averaged over the checkpoints from ``first`` to ``last`` steps."""
    names = ["falls_per_1000", "edge", "all", "visited", "later_edge", "later_visited"]
    lines = ["| arm | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for name in names:
            per_seed: dict[int, list[float]] = {}
            for row in rows:
                if row["arm"] == arm and first <= row["steps"] <= last:
                    per_seed.setdefault(row["seed"], []).append(row[name])
            means = [float(np.mean(values)) for values in per_seed.values()]
            if not means:
                continue
            half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means) if len(means) > 1 else float("nan")
            cells.append(f"{np.mean(means):.3f} ± {half:.3f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--every", type=int, default=25_000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed in range(args.seeds):
        for arm in args.arms:
            if (arm, seed) in done:
                continue
            new = run(arm, seed, args.steps, args.every)
            rows += new
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            print(arm, seed, {k: round(v, 4) for k, v in new[-1].items() if isinstance(v, float)}, flush=True)
    print(table(rows, args.steps // 2, args.steps))


if __name__ == "__main__":
    main()
