"""How much slower is an agent that also answers? Joint against plain PPO, paired.

Eight CartPole environments, default networks and hyperparameters, one torch thread. The joint agent has eight yes/no
questions, one of them about the action, and a wrapper answers all of them live at every step. Plain and joint runs
alternate, so that drifts of the machine's speed hit both; the figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Question
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, always, eventually, now
from sb3_qa.wrappers import VecAnswerQuestions

QUESTIONS = [
    Question("Will I fall within 10 steps if I choose {action}?", eventually("fallen", within=10), name="fall"),
    Question("Will I fall within 20 steps?", eventually("fallen", within=20), name="fall_later"),
    Question("Will I stay in the middle for 10 steps?", always("middle", during=10), name="stay"),
    Question("Am I in the middle?", now("middle"), name="middle"),
    Question("Do I lean left?", now("leans_left"), name="leans_left"),
    Question("Do I move left?", now("moves_left"), name="moves_left"),
    Question("Will I lean left in 5 steps?", after("leans_left", steps=5), name="lean_soon"),
    Question("Will I move left within 5 steps?", eventually("moves_left", within=5), name="move_soon"),
]
TARGET = 1.20
HISTORY = Path(__file__).with_name("history.jsonl")


def cartpole(wrap: type | None = None):
    """Eight CartPoles whose info tells the facts, in both arms alike."""
    import gymnasium as gym

    class Facts(gym.Wrapper):
        def facts(self, obs, fallen: bool) -> dict[str, bool]:
            x, speed, angle, _ = obs
            return {"fallen": fallen, "middle": abs(x) < 0.5, "leans_left": angle < 0, "moves_left": speed < 0}

        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            return obs, {**info, **self.facts(obs, False)}

        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated, truncated, {**info, **self.facts(obs, terminated)}

    env = make_vec_env("CartPole-v1", 8, seed=0, wrapper_class=Facts)
    return wrap(env) if wrap else env


def plain(steps: int) -> float:
    """Seconds that plain PPO takes."""
    model = PPO("MlpPolicy", cartpole(), seed=0)
    started = time.perf_counter()
    model.learn(steps)
    return time.perf_counter() - started


def joint(steps: int) -> float:
    """Seconds that PPO takes with the questions."""
    model = PPO(qa_policy(PPO), cartpole(VecAnswerQuestions), seed=0, policy_kwargs=dict(questions=QUESTIONS))
    started = time.perf_counter()
    model.learn(steps, callback=QACallback())
    return time.perf_counter() - started


def main() -> None:
    """Run the pairs, print the figure, and append it to the history beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=49_152, help="environment steps of a run (a PPO iteration has 16,384)"
    )
    parser.add_argument("--no-history", action="store_true", help="do not append to history.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain(2048), joint(2048)  # warm up
    pairs = []
    for n in range(args.pairs):
        pairs.append((plain(args.steps), joint(args.steps)))
        print(
            f"pair {n + 1}: plain {pairs[-1][0]:.2f} s, joint {pairs[-1][1]:.2f} s, ratio {pairs[-1][1] / pairs[-1][0]:.3f}",
            flush=True,
        )
    ratios = [b / a for a, b in pairs]
    ratio = statistics.median(ratios)
    verdict = "met" if ratio <= TARGET else "missed"
    print(
        f"\njoint / plain, PPO on 8 CartPoles, 8 yes/no questions answered live: median {ratio:.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {len(pairs)} pairs); target at most {TARGET:.2f}: {verdict}"
    )
    if not args.no_history:
        row = {
            "date": time.strftime("%Y-%m-%d"),
            "bench": "ppo_cartpole_8q_live",
            "ratio": round(ratio, 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
            "pairs": len(pairs),
            "steps": args.steps,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with HISTORY.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
