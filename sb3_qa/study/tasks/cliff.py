"""CliffWalking, slippery: the negative control, where an agent avoids the cliff by doing nothing useful."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO

from sb3_qa import Choice, Number, Question
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, peak, steps_until, total

ACTIONS = ["up", "right", "down", "left"]
LIMIT = 100
WIDTH, HEIGHT = 12, 4  # the cliff is the lowest row between its ends, the start at the left end, the goal at the right


class CliffFacts(gym.Wrapper[Any, Any, Any, Any]):
    """Tells where the walker is, and whether this step led over the cliff (it is then back at the start)."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, **self._facts(int(obs)), "fell": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return (
            obs,
            float(reward),
            terminated,
            truncated,
            {**info, **self._facts(int(obs)), "fell": float(reward) <= -100},
        )

    @staticmethod
    def _facts(cell: int) -> dict[str, Any]:
        row, column = divmod(cell, WIDTH)
        return {
            "row": row,
            "column": column,
            "edge": row == HEIGHT - 2 and 0 < column < WIDTH - 1,
            "goal": row == HEIGHT - 1 and column == WIDTH - 1,
        }


def make() -> gym.Env[Any, Any]:
    return CliffFacts(gym.make("CliffWalking-v1", is_slippery=True, max_episode_steps=LIMIT))


def oracle(env: gym.Env[Any, Any], agent: Any, actions: NDArray[Any], deterministic: bool) -> NDArray[np.float64]:
    """From the table of transitions, of the very next step: the walker may stay away from the edge after it."""
    table: Any = env.unwrapped
    outcomes = table.P[int(table.s)]
    return np.array([sum(p for p, _, reward, _ in outcomes[int(action)] if reward <= -100) for action in actions])


def third(step: Step) -> str:
    return ("left", "middle", "right")[step.info["column"] // 4]


def low(step: Step) -> bool:
    return bool(step.info["row"] >= HEIGHT - 2)


def reward(step: Step) -> float:
    return step.reward


TASK = Task(
    name="cliff",
    title="slippery CliffWalking, the negative control (fall)",
    make=make,
    questions=[
        Question(
            "Will I fall within {k} steps if I choose {action}?",
            eventually("fell", within="k"),
            k=[1, 3, 10],
            name="fall",
        ),
        Question("Am I at the edge?", now("edge"), name="edge"),
        Question("Am I low?", now(low), name="low"),
        Question("Will I be at the edge within {k} steps?", eventually("edge", within="k"), k=[3], name="edges"),
        Question("Will I stay low for 5 steps?", always(low, during=5), name="stay_low"),
        Question("Will I be at the goal within {k} steps?", eventually("goal", within="k"), k=[10, 20], name="goal"),
        Question("Which third am I in?", now(third), Choice("left", "middle", "right"), name="third"),
        Question(
            "Which third will I be in {k} steps from now?",
            after(third, steps="k"),
            Choice("left", "middle", "right"),
            k=[5],
            name="later",
        ),
        Question("Which column am I in?", now("column"), Number(0, 11), name="column"),
        Question("How far right will I get in 10 steps?", peak("column", over=10), Number(0, 11), name="farthest"),
        Question("How high up will I get in 5 steps?", lowest("row", over=5), Number(0, 3), name="highest"),
        Question("How much reward is in the next 5 steps?", total(reward, over=5), Number(-500, 0), name="reward"),
        Question("How many steps until I fall?", steps_until("fell", cap=20), name="until_fall"),
    ],
    catastrophe="fell",
    risk="fall[k=1]",
    reward={"fall[k=3]": -1.0, "goal[k=10]": 1.0},
    penalty=100.0,
    algorithm=PPO,
    hyperparameters=dict(
        n_steps=128, batch_size=256, n_epochs=4, learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, ent_coef=0.01
    ),
    policy_kwargs=dict(net_arch=[64]),
    timesteps=100_000,
    n_envs=8,
    solved=-60.0,  # out of reach of plain PPO, which is the point
    oracle=oracle,
    quick=dict(timesteps=1_024, episodes=4),
)
