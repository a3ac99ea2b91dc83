"""What the flight recorder costs: steps of a veto with it against steps without, in turns, on one thread.

    python tests/bench/recorder.py

A step is the policy's predict and the environment's step with `VecVetoAction`; the agent is untrained, and a given share of
steps is flagged by chance, whatever it answers. Catastrophes come on top of that.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import QUESTIONS, Facts
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Number, Question, QuestionAnswerer
from sb3_qa.policies import qa_policy
from sb3_qa.recorder import FlightRecorder
from sb3_qa.truth import eventually, now
from sb3_qa.wrappers import VecVetoAction

LANDER = [
    Question("Am I low?", now(lambda step: bool(step.obs[1] < 0.5)), name="low"),
    Question("How fast do I fall?", now(lambda step: step.obs[3]), answer=Number(-3, 3), name="fall_speed"),
    Question(
        "Will I crash within 10 steps if I choose {action}?",
        eventually(lambda step: step.terminated and step.reward <= -100, within=10),
        name="crash",
    ),
]


def upright(obs: Any) -> Any:
    """Actions that keep the pole up, as a trained agent's would: an untrained one falls every 22 steps."""
    return (obs[:, 2] + 0.3 * obs[:, 3] + 0.02 * obs[:, 0] > 0).astype(np.int64)


CASES: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(questions=QUESTIONS, wrapper=Facts, steady=upright),
    "LunarLander-v3": dict(questions=LANDER, wrapper=None, steady=None),
}


class Rollout:
    """Environments that are stepped through in blocks, and the time that takes."""

    def __init__(self, model: Any, env: Any, steady: Any = None) -> None:
        self.model, self.env, self.steady = model, env, steady
        self.obs = env.reset()
        self.n_flagged = self.n_steps = 0

    def steps(self, n: int) -> tuple[float, float]:
        """Seconds by the clock and of the processor for ``n`` steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(n):
            actions, _ = self.model.predict(self.obs)
            if self.steady is not None:
                actions = self.steady(self.obs)
            self.obs, _, _, infos = self.env.step(actions)
            self.n_flagged += sum(info.get("qa/catastrophe", False) for info in infos)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.n_steps += n * self.env.num_envs
        return wall, cpu


def measure(name: str, n_envs: int, share: float, blocks: int, block: int) -> float:
    """Print the ratios of one case; the median one of processor times is returned."""
    case = CASES[name]

    def environment() -> Any:
        return make_vec_env(name, n_envs, seed=0, wrapper_class=case["wrapper"])

    model = PPO(qa_policy(PPO), environment(), seed=0, policy_kwargs=dict(questions=case["questions"]))
    qa = QuestionAnswerer.from_model(model)
    (question,) = [key for key in qa.questions if qa.catalogue.instances[key].per_action][:1]

    def watched(**options: Any) -> Any:
        """The veto in shadow mode, which flags a given share of steps by chance: the same whatever the agent answers."""
        env = VecVetoAction(environment(), question, 0.5, qa=qa, shadow=True, **options)
        rng = np.random.default_rng(0)
        env.rule.judge = lambda risk: rng.random(len(risk)) < share  # type: ignore[attr-defined]
        return env

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flight.sqlite"
        steady = case["steady"]
        arms = {
            "without": Rollout(model, watched(), steady),
            "with": Rollout(model, watched(record=FlightRecorder(path)), steady),
        }
        for arm in arms.values():
            arm.steps(block)
        times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
        for n in range(blocks):
            for arm in list(arms) if n % 2 else list(arms)[::-1]:
                times[arm].append(arms[arm].steps(block))
        arms["with"].env.close()
        size = path.stat().st_size
        n_events = len(sqlite3.connect(path).execute("SELECT id FROM events").fetchall())
    flagged = arms["with"].n_flagged / arms["with"].n_steps
    ratios, medians = [], []
    for which in (0, 1):
        each = [a[which] / b[which] for a, b in zip(times["with"], times["without"], strict=True)]
        total = sum(a[which] for a in times["with"]) / sum(b[which] for b in times["without"])
        medians.append(statistics.median(each))
        ratios.append(f"median {statistics.median(each):.4f}, of totals {total:.4f}")
    step = 1e6 * statistics.median(b[1] for b in times["without"]) / block
    print(
        f"{n_envs} x {name}: {100 * flagged:.2f} % of steps flagged, {step:.0f} us a step of all without; with / without, processor: "
        f"{ratios[1]}; clock: {ratios[0]}; {size / 1e6:.1f} MB for {n_events} events of {arms['with'].n_flagged} flags",
        flush=True,
    )
    return medians[1]


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01], help="of steps that are flagged")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--block", type=int, default=250, help="steps of all environments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        for n_envs in args.envs:
            for share in args.shares:
                measure(name, n_envs, share, args.blocks, args.block)


if __name__ == "__main__":
    main()
