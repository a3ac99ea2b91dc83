"""The plugin dropped into highway-env: trained in envpool's C++ highway, driving with a veto in the Python one.

    pip install 'sb3-qa[demo,highway]'
    python examples/highway.py

envpool's highway runs hundreds of times faster than highway-env's and looks the same to the agent, so PPO and its answerer
learn in the first and are tried in both. Their questions are about what the environments tell in `info` (crashed, speed) and
are asked by the names highway-env gives its actions: "Will I crash within 5 steps if I choose FASTER?".

Each road is driven three times: without interference (the veto only watches), with actions vetoed whose answer to the crash
question is at least the threshold, and with as many vetoes at random. Results: outputs/highway/results.md and results.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are small: more threads would wait for each other

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa import Choice, Number, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.evaluation import AnswerRecord, Episodes, run_episodes, score_answers, seeded_vec_env
from sb3_qa.policies import qa_policy
from sb3_qa.scores import Interval
from sb3_qa.study.envpool import EnvPool
from sb3_qa.truth import Step, after, eventually, now
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction

try:
    import envpool  # noqa: F401
    import highway_env
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed; install it with: pip install 'sb3-qa[demo,highway]'") from error

ENV = "highway-fast-v0"
ACTIONS = ["LANE_LEFT", "IDLE", "LANE_RIGHT", "FASTER", "SLOWER"]
EVAL_SEED = 10_000  # of the first reported episode; tuning was done on other episodes and other training seeds


@dataclass
class Args:
    timesteps: int = 300_000
    """Environment steps to train for."""
    n_envs: int = 8
    """Environments side by side, in training."""
    seed: int = 0
    """Of the training run, and of the action noise afterwards."""
    episodes: int = 400
    """Episodes in each arm in envpool's highway."""
    python_episodes: int = 30
    """Episodes in each arm in highway-env, which runs some 50 steps a second."""
    question: str = "crash[k=5]"
    """The question whose answer is the risk."""
    threshold: float = 0.1
    """An action is vetoed when its risk is at least this."""
    out: Path = Path("outputs/highway")
    """Where results go."""


def lane(step: Step) -> int:
    """Lanes are a third of the observation's range apart; the first row is the agent's own car."""
    return int(np.clip(np.rint(3.0 * step.obs[0, 2]), 0, 2))


QUESTIONS = [
    Question(
        "Will I crash within {k} steps if I choose {action}?",
        truth=eventually("crashed", within="k"),
        k=[1, 3, 5, 10],
        name="crash",
    ),
    Question("How fast am I going?", truth=now("speed"), answer=Number(0, 40), name="speed"),
    Question("How fast will I be in {k} steps?", after("speed", steps="k"), Number(0, 40), name="speed_later", k=[3]),
    Question(
        "Which lane will I be in {k} steps from now?",
        truth=after(lane, steps="k"),
        answer=Choice("left", "middle", "right"),
        k=[1, 3],
        name="lane",
    ),
]


def train(args: Args) -> PPO:
    env = EnvPool("highway-fast-v0", args.n_envs, args.seed)
    model = PPO(
        qa_policy(PPO),
        env,
        n_steps=256,
        batch_size=256,
        n_epochs=6,
        learning_rate=5e-4,
        gamma=0.9,
        policy_kwargs=dict(
            questions=QUESTIONS, action_names=ACTIONS, net_arch=[128, 128], qa_net_arch=[256], qa_every=1
        ),
        seed=args.seed,
        device="cpu",
    )
    return model.learn(args.timesteps, callback=QACallback(), progress_bar=True)


def compare(
    args: Args, model: PPO, qa: QuestionAnswerer, make: Callable[[], VecEnv], n_episodes: int
) -> tuple[dict[str, Episodes], AnswerRecord]:
    """The three arms, on one road."""
    ask = dict(question=args.question, qa=qa)
    record = AnswerRecord(qa)

    def play(wrap: Callable[[VecEnv], VecEnv], record: AnswerRecord | None = None) -> Episodes:
        venv = wrap(make())
        torch.manual_seed(args.seed)
        episodes = run_episodes(model, venv, n_episodes, catastrophe="crashed", record=record)
        venv.close()
        return episodes

    arms = {"none": play(lambda env: VecVetoAction(env, threshold=args.threshold, shadow=True, **ask), record)}
    arms["veto"] = play(lambda env: VecVetoAction(env, threshold=args.threshold, **ask))
    rate = arms["veto"].vetoes.sum() / arms["veto"].lengths.sum()
    arms["random"] = play(lambda env: VecRandomVeto(env, rate=float(rate), seed=args.seed, **ask))
    return arms, record


def shown(interval: Interval, digits: int = 2) -> str:
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def main(args: Args) -> None:
    torch.set_num_threads(1)
    gym.register_envs(highway_env)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    started = time.perf_counter()
    model = train(args)
    qa = QuestionAnswerer.from_model(model)
    qa.save(args.out / "driver.qa")
    trained = time.perf_counter()

    roads: dict[str, tuple[Callable[[], VecEnv], int]] = {
        "envpool": (lambda: EnvPool(ENV, 16, EVAL_SEED), args.episodes),
        "highway-env": (lambda: seeded_vec_env(lambda: gym.make(ENV), 4, EVAL_SEED), args.python_episodes),
    }
    head = ["road", "arm", "episodes", "crashes / 1,000 steps", "crashes / episode", "return", "vetoes / 1,000 steps"]
    rows: list[Sequence[str]] = []
    results: dict[str, Any] = {"args": {**asdict(args), "out": str(args.out)}, "roads": {}}
    for road, (make, n_episodes) in roads.items():
        arms, record = compare(args, model, qa, make, n_episodes)
        for name, arm in arms.items():
            vetoes = shown(arm.flags_per_1000, 0) + " *" if name == "none" else shown(arm.vetoes_per_1000, 0)
            figures = [shown(arm.catastrophes_per_1000), shown(arm.catastrophes_per_episode), shown(arm.mean_return, 1)]
            rows.append([road, name, str(len(arm)), *figures, vetoes])
        results["roads"][road] = {
            "arms": {name: {key: i._asdict() for key, i in arm.summary().items()} for name, arm in arms.items()},
            "scores": {
                key: {k: v if np.isfinite(v) else None for k, v in s.items()}
                for key, s in score_answers(record).items()
            },
        }
    played = time.perf_counter()

    title = "Crashes, with 95 % bootstrap intervals over episodes (* flagged, not vetoed)"
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    scores = Table(
        "answers in highway-env", "Brier", "AUROC", "error", "accuracy", title="(in brackets: the best constant answer)"
    )
    for key, s in results["roads"]["highway-env"]["scores"].items():
        cells = []
        for name in ("brier", "auroc", "error", "accuracy"):
            value, constant = s.get(name), s.get(f"constant_{name}")
            cells.append("" if value is None or constant is None else f"{value:.3f} ({constant:.3f})")
        scores.add_row(key.replace("[", r"\["), *cells)
    console.print(scores)

    env = gym.make(ENV)
    obs, _ = env.reset(seed=EVAL_SEED)
    for action in ACTIONS:
        text = f"Will I crash within 5 steps if I choose {action}?"
        console.print(f"{text:<55} {float(qa.ask(text, obs).probability):.2f}")
    results["seconds"] = {"train": trained - started, "play": played - trained}
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    (args.out / "results.md").write_text(f"## {title}\n\n" + "\n".join(lines) + "\n")
    console.print(f"{args.out}/ holds the tables; took {played - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
