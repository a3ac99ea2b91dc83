"""What a number of questions costs: in training, and at each step, from one instance to ten thousand.

PPO on 8 x CartPole, one torch thread. The questions are of two templates, half of them each: whether the cart will be within some
distance of a place within 10 steps (events), and whether it will be to the right of a place after some number of steps;
the environment tells their facts as arrays. CPU time of the process; numbers of instances alternate, so that drifts of the
machine's speed hit all of them; a figure is the median over rounds of the ratio to 8 instances in the same round.

    python tests/bench/scale.py --plot docs/images/scale.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: threads of its products would wait for each other

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.figures import new_figure
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, eventually, table
from sb3_qa.wrappers import VecAnswerQuestions

SIZES = [1, 8, 10, 100, 1000, 10_000]
BASE = 8
HISTORY = Path(__file__).with_name("history.jsonl")
PLACES, DISTANCES = 50, 100  # of the largest set of events: 5,000


def axes(n: int) -> tuple[list[float], list[float]]:
    """Places and distances of n events."""
    n_places = min(PLACES, n)
    n_distances = -(-n // n_places)
    return np.linspace(-2.4, 2.4, n_places).round(3).tolist(), np.linspace(0.01, 2.0, n_distances).round(3).tolist()


def questions(n: int) -> list[Question]:
    """n instances."""
    events, windows = max(n // 2, 1), n - max(n // 2, 1)
    made = []
    places, distances = axes(events)
    kept = [(p, d) for p in places for d in distances][:events]
    drop = [dict(place=p, distance=d) for p in places for d in distances if (p, d) not in set(kept)]
    made.append(
        Question(
            "Will I be within {distance} of {place} in the next {k} steps?",
            eventually(table("near", place=places, distance=distances), within="k"),
            name="near",
            holdout=drop,
            place=places,
            distance=distances,
            k=[10],
        )
    )
    if windows:
        places = axes(windows)[0]
        steps = list(range(1, -(-windows // len(places)) + 1))
        kept = [(p, k) for p in places for k in steps][:windows]
        drop = [dict(place=p, k=k) for p in places for k in steps if (p, k) not in set(kept)]
        made.append(
            Question(
                "Will I be to the right of {place} in {k} steps?",
                after(table("right", place=places), steps="k"),
                name="right",
                holdout=drop,
                place=places,
                k=steps,
            )
        )
    return made


class Facts(gym.Wrapper[Any, Any, Any, Any]):
    """Where the cart is, as arrays."""

    def __init__(self, env: gym.Env[Any, Any], n: int) -> None:
        super().__init__(env)
        events = max(n // 2, 1)
        places, distances = axes(events)
        self.places, self.distances = np.array(places), np.array(distances)
        self.others = np.array(axes(max(n - events, 1))[0])

    def _told(self, obs: Any) -> dict[str, Any]:
        apart = np.abs(obs[0] - self.places)
        return {"near": apart[:, None] < self.distances, "right": obs[0] > self.others}

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, **self._told(obs)}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, **self._told(obs)}


def measure(encoder: str, n: int, rollouts: int) -> dict[str, float]:
    """CPU seconds of making a model, of training it, and of a step of 8 environments with 8 questions answered live."""
    asked = questions(n)
    start = time.process_time()
    env = make_vec_env("CartPole-v1", 8, seed=0, wrapper_class=lambda env: Facts(env, n))
    model = PPO(qa_policy(PPO), env, n_steps=128, seed=0, policy_kwargs=dict(questions=asked, qa_encoder=encoder))
    made = time.process_time() - start
    start = time.process_time()
    model.learn(8 * 128 * rollouts, callback=QACallback())
    trained = (time.process_time() - start) / rollouts
    qa = QuestionAnswerer.from_model(model)
    few, all_of_them = (VecAnswerQuestions(env, keys, qa=qa) for keys in (qa.questions[:8], qa.questions))
    figures = {"make": made, "rollout": trained}
    for name, wrapped in (("step_8_asked", few), ("step_all_asked", all_of_them)):
        wrapped.reset()
        actions = np.zeros(8, np.int64)
        start = time.process_time()
        steps = 200 if name == "step_8_asked" or n <= 1000 else 20
        for _ in range(steps):
            wrapped.step(actions)
        figures[name] = (time.process_time() - start) / steps
    return figures


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against the number of instances."""
    figure, panels = new_figure(1, 2, size=(9, 3.6))
    for row in rows:
        panels[0].plot(SIZES, [row["rollout"][str(n)] for n in SIZES], "o-", label=row["encoder"])
        panels[1].plot(
            SIZES, [1e3 * row["step_8_asked"][str(n)] for n in SIZES], "o-", label=f"{row['encoder']}, 8 asked"
        )
        panels[1].plot(
            SIZES, [1e3 * row["step_all_asked"][str(n)] for n in SIZES], "o:", label=f"{row['encoder']}, all asked"
        )
    panels[0].set(xscale="log", ylim=(0, None), xlabel="instances", ylabel="CPU s a rollout and its updates")
    panels[1].set(xscale="log", yscale="log", xlabel="instances", ylabel="CPU ms a step of 8 environments")
    for axis in panels:
        axis.legend()
    figure.savefig(path)


def main() -> None:
    """Measure, print, and append to the history."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=["index", "text"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--no-history", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for encoder in args.encoders:
        measure(encoder, BASE, 1)  # warm up
        rounds = [{n: measure(encoder, n, args.rollouts) for n in SIZES} for _ in range(args.rounds)]
        row: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "bench": "scale", "encoder": encoder}
        for name in rounds[0][BASE]:
            row[name] = {str(n): round(statistics.median(r[n][name] for r in rounds), 6) for n in SIZES}
            row[f"{name}_ratio"] = {
                str(n): round(statistics.median(r[n][name] / r[BASE][name] for r in rounds), 3) for n in SIZES
            }
            print(encoder, name, row[name], "ratio to 8:", row[f"{name}_ratio"], flush=True)
        ratio = row["rollout_ratio"]["1000"]
        verdict = "met" if ratio <= 1.5 else "missed"
        print(
            f"{encoder}: training with 1,000 instances costs {ratio:.2f} x that with 8; target at most 1.5: {verdict}"
        )
        rows.append(row)
        if not args.no_history:
            with HISTORY.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
