"""Labels of hindsight's virtual goals: recomputed where that can be done, and without its bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Number, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.hindsight import Hindsight, VirtualGoals
from sb3_qa.policies import qa_policy
from sb3_qa.truth import always, eventually, now, peak, steps_until, total

CELLS = 7
HORIZONS = list(range(1, 13))


class GoalWalk(gym.Env[Any, Any]):
    """A walk along cells by actions that always do as they say; the goal is one of the cells. Nothing ends but the time."""

    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        each = spaces.Box(0.0, 1.0, (CELLS,), np.float32)
        self.observation_space = spaces.Dict({"observation": each, "achieved_goal": each, "desired_goal": each})

    def _told(self) -> dict[str, Any]:
        here = np.eye(CELLS, dtype=np.float32)[self.cell]
        return {"observation": here, "achieved_goal": here, "desired_goal": np.eye(CELLS, dtype=np.float32)[self.goal]}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.goal = self.np_random.integers(CELLS, size=2).tolist()
        self.t = 0
        return self._told(), {"is_success": False}

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return (np.argmax(achieved, axis=-1) == np.argmax(desired, axis=-1)) - 1.0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.cell = int(np.clip(self.cell + 2 * int(action) - 1, 0, CELLS - 1))
        self.t += 1
        obs = self._told()
        reward = float(self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {}))
        return obs, reward, False, self.t >= 15, {"is_success": reward == 0.0}


def there(step: Any) -> Any:
    """For one step, and for a minibatch as one step."""
    return (step.obs["achieved_goal"] * step.obs["desired_goal"]).sum(-1) > 0


def probability_within(k: int) -> np.ndarray:
    """Of reaching the goal by taking an action and random ones after it: (cells, goals, actions)."""
    within = np.zeros((CELLS, CELLS))  # within no step, of the state itself not counted
    step = np.clip(np.arange(CELLS)[:, None] + np.array([-1, 1]), 0, CELLS - 1)
    for _ in range(k):
        at = np.maximum(within, np.eye(CELLS))
        acted = at[step].transpose(0, 2, 1)
        within = acted.mean(-1)
    return acted


def train(questions: list[Question], steps: int, **kwargs: Any) -> DQN:
    """An agent that always takes random actions, so that there is one truth."""
    torch.set_num_threads(1)
    given: dict[str, Any] = dict(
        learning_rate=2e-3,
        batch_size=128,
        train_freq=1,
        buffer_size=20_000,
        learning_starts=300,
        exploration_initial_eps=1.0,
        exploration_final_eps=1.0,
        seed=0,
    )
    model = DQN(
        qa_policy(DQN, "MultiInputPolicy"),
        DummyVecEnv([GoalWalk for _ in range(4)]),
        replay_buffer_class=HerReplayBuffer,
        policy_kwargs=dict(questions=questions, net_arch=[64, 64]),
        **(given | kwargs),
    )
    return model.learn(steps, callback=QACallback())


def every_state() -> dict[str, np.ndarray]:
    cell, goal = (x.ravel() for x in np.mgrid[:CELLS, :CELLS])
    one_hot = np.eye(CELLS, dtype=np.float32)
    return {"observation": one_hot[cell], "achieved_goal": one_hot[cell], "desired_goal": one_hot[goal]}


def answers(model: Any, name: str) -> np.ndarray:
    qa = QuestionAnswerer.from_model(model)
    told = np.stack([qa.ask(f"{name}[k={k}]", every_state()).probability for k in HORIZONS])
    return told.reshape(len(HORIZONS), CELLS, CELLS, -1)


REACH = [
    Question(
        "Will I be there within {k} steps if I choose {action}?", eventually(there, within="k"), k=HORIZONS, name="if"
    ),
    Question("Will I be there within {k} steps?", eventually(there, within="k"), k=HORIZONS, name="reach"),
]
if __name__ == "__main__":
    import sys

    known = np.stack([probability_within(k) for k in HORIZONS])

    def report(tag, model):
        print(
            tag,
            "action",
            np.abs(answers(model, "if") - known).mean(),
            "state",
            np.abs(answers(model, "reach")[..., 0] - known.mean(-1)).mean(),
            flush=True,
        )

    for steps in (3000, 8000):
        report(f"{steps} hindsight", train(REACH, steps))
        keep = Hindsight.labels
        Hindsight.labels = lambda self, goals: tuple(np.zeros((2, len(goals.position), self._n_columns), np.float32))
        report(f"{steps} masked", train(REACH, steps))
        Hindsight.labels = keep
