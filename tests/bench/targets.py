"""Do continuations of cut futures gain from a target head on the target network's latents?

Answers on walks whose probabilities are known exactly, learnt from a replay buffer: a time limit of 30, horizons to 40, so that
most long futures are cut. ``average`` continues by the running average of the head's weights, on the latents of the live
network; ``target`` by the target head, on those of the target network. ``actor`` is ``average`` without the critics, which
``average`` reads for questions about actions. ``python tests/bench/targets.py run`` appends lines to targets.jsonl, skipping
those that are there; ``report`` prints the table of docs/critics.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.callbacks.replay import Replay
from sb3_qa.policies import qa_policy
from sb3_qa.testing import ActionWalk, RandomWalk
from sb3_qa.truth import eventually

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_known_answers import HORIZONS, Pushed, Unrewarded

RESULTS = Path(__file__).with_name("targets.jsonl")
ARMS = ("average", "target", "actor")
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "dqn_hard": (DQN, "state", {}),
    "dqn_soft": (DQN, "state", dict(tau=0.005, target_update_interval=1)),
    "dqn_act_hard": (DQN, "act", {}),
    "dqn_act_soft": (DQN, "act", dict(tau=0.005, target_update_interval=1)),
    "sac_act": (SAC, "act", {}),
    "td3": (TD3, "state", {}),
}


class ByTarget(QACallback):
    """Continues cut futures as the target network answers."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        recorder, answerer = self._recorder, QuestionAnswerer.from_model(self.model, target=True)
        assert isinstance(recorder, Replay)

        def curves(rows: Any) -> Any:
            obs = recorder._observations(recorder.buffer.next_observations, rows)
            return recorder._curves(answerer.read(obs, keep=False), recorder._events)

        recorder.store.curves = curves


class Errors(BaseCallback):
    """Mean absolute error of all answers, every now and then."""

    def __init__(self, about_actions: bool, continuous: bool, every: int) -> None:
        super().__init__()
        self.about_actions, self.continuous, self.every = about_actions, continuous, every
        self.walk: Any = ActionWalk() if about_actions else RandomWalk()
        self.obs = np.eye(self.walk.cells, dtype=np.float32)[1:]
        self.errors: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            qa = QuestionAnswerer.from_model(self.model)
            if self.about_actions and self.continuous:
                signs = [np.full((len(self.obs), 1), a, np.float32) for a in (-0.5, 0.5)]
                told: Any = [
                    np.stack([qa.ask(f"hit[k={k}]", self.obs, a).probability for a in signs], 1) for k in HORIZONS
                ]
            else:
                told = [qa.ask(f"hit[k={k}]", self.obs).probability for k in HORIZONS]
            self.errors.append(round(float(np.abs(np.stack(told, -1) - self.known()).mean()), 5))
        return True

    def known(self) -> Any:
        """The truth, given how the agent goes on; one that takes both actions alike is DQN's, which always explores."""
        policy: Any = ()
        if self.about_actions:
            right = np.full(self.walk.cells, 0.5)
            if self.continuous:
                right[1:] = [np.mean(self.model.predict(np.repeat(each[None], 2000, 0))[0] > 0) for each in self.obs]
            policy = (np.stack([1 - right, right], axis=1),)
        return np.stack([self.walk.probability_within(k, *policy)[1:] for k in HORIZONS], axis=-1)


def run(name: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once: one line of the results."""
    algorithm, kind, given = CASES[name]
    continuous, about_actions = algorithm is not DQN, kind == "act"
    if not continuous and about_actions:
        given = {**given, "exploration_initial_eps": 1.0, "exploration_final_eps": 1.0}
    walk: Any = Unrewarded if about_actions else RandomWalk
    text = "Will I be at the edge within {k} steps" + (" if I choose {action}?" if about_actions else "?")
    model = algorithm(
        qa_policy(algorithm),
        DummyVecEnv([(lambda: Pushed(walk())) if continuous else walk for _ in range(16)]),
        seed=seed,
        learning_rate=1e-3,
        batch_size=256,
        train_freq=1,
        buffer_size=50_000,
        learning_starts=1000,
        policy_kwargs=dict(
            questions=[Question(text, eventually("hit", within="k"), k=HORIZONS, name="hit")],
            net_arch=[64, 64],
            qa_readouts=["actor.mu"] if arm == "actor" else None,
        ),
        **given,
    )
    errors = Errors(about_actions, continuous, steps // 6)
    started = time.process_time()
    model.learn(steps, callback=[ByTarget() if arm == "target" else QACallback(), errors])
    return dict(
        case=name,
        arm=arm,
        seed=seed,
        steps=steps,
        errors=errors.errors,
        seconds=round(time.process_time() - started, 1),
    )


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.what == "report":
        for name in args.cases:
            for arm in ARMS:
                mine = [line for line in lines if line["case"] == name and line["arm"] == arm]
                if mine:
                    at = [[line["errors"][n] for line in mine] for n in range(6)]
                    print(
                        name,
                        arm,
                        len(mine),
                        " ".join(f"{statistics.mean(e):.4f} ({min(e):.4f}-{max(e):.4f})" for e in at),
                    )
        return
    done = {(line["case"], line["arm"], line["seed"]) for line in lines}
    for seed in args.seeds:
        for name in args.cases:
            for arm in args.arms:
                if (name, arm, seed) not in done:
                    line = run(name, arm, seed, args.steps)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(line, flush=True)


if __name__ == "__main__":
    main()
