"""A point that drives round a wall to a goal (Recovery RL's dynamics); the catastrophe is to touch the wall."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO

from sb3_qa import Choice, Number, Question
from sb3_qa.study.navigation import LAYOUTS, Navigation
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, peak, steps_until, total

LAYOUT = "block"
WALL = LAYOUTS[LAYOUT][0]
SCALE = 25.0  # distances that an agent of small networks sees are about 1


def way(position: NDArray[Any]) -> float:
    """Length of the shortest way to the goal, round the nearer corners of the block."""
    x, y = float(position[0]), abs(float(position[1]))
    (left, right), top = WALL.x, WALL.y[1]
    home = math.hypot(x, y)
    if x >= right or y * -right >= top * -x:  # the straight line passes by
        return home
    last = math.hypot(right, top)
    if x >= left or y >= top:
        return math.hypot(right - x, top - y) + last
    return math.hypot(left - x, top - y) + (right - left) + last


class Progress(gym.Wrapper[Any, Any, Any, Any]):
    """Positions in units that a network likes; the reward is how much shorter the way became, and ten for the goal.

    By the paper's reward, minus the straight distance at each step, an early crash costs less than a long way round.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.left = 0.0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        self.left = way(obs)
        return obs / np.float32(SCALE), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = self.env.step(action)
        before, self.left = self.left, way(obs)
        bonus = 10.0 if info["success"] else 0.0
        return obs / np.float32(SCALE), before - self.left + bonus, terminated, truncated, info


def make() -> gym.Env[Any, Any]:
    return Progress(Navigation(LAYOUT))


def oracle(env: gym.Env[Any, Any], agent: Any, actions: NDArray[Any], deterministic: bool) -> NDArray[np.float64]:
    """In closed form, of the very next step: whatever the agent does then, it can drive back where it came from."""
    here: Any = env.unwrapped
    risks: NDArray[np.float64] = here.risk(here.position, np.asarray(actions))
    return risks


def position(step: Step) -> NDArray[np.float64]:
    return SCALE * np.asarray(step.obs, np.float64)


def wall_distance(step: Step) -> float:
    x, y = position(step)
    away = (max(WALL.x[0] - x, 0.0, x - WALL.x[1]), max(WALL.y[0] - y, 0.0, y - WALL.y[1]))
    return float(np.hypot(*away))


def goal_distance(step: Step) -> float:
    return way(position(step))


def near_wall(step: Step) -> bool:
    return wall_distance(step) < 3.0


def facing_wall(step: Step) -> bool:
    x, y = position(step)
    return bool(x < WALL.x[0] and WALL.y[0] <= y <= WALL.y[1])


def place(step: Step) -> str:
    x = position(step)[0]
    return "before" if x < WALL.x[0] else "beyond" if x > WALL.x[1] else "beside"


def sideways(step: Step) -> float:
    return float(abs(position(step)[1]))


def reward(step: Step) -> float:
    return step.reward


TASK = Task(
    name="navigation",
    title="Navigation round a block (touch the wall)",
    make=make,
    questions=[
        Question(
            "Will I touch the wall within {k} steps if I choose {action}?",
            eventually("constraint", within="k"),
            k=[1, 3, 10],
            name="touch",
        ),
        Question("Am I near the wall?", now(near_wall), name="near"),
        Question("Is the wall between me and the goal?", now(facing_wall), name="facing"),
        Question(
            "Will I be near the wall within {k} steps?", eventually(near_wall, within="k"), k=[5, 20], name="nears"
        ),
        Question("Will the wall be in my way for 5 steps?", always(facing_wall, during=5), name="blocked"),
        Question("Will I be at the goal within {k} steps?", eventually("success", within="k"), k=[10, 30], name="goal"),
        Question(
            "Where will I be {k} steps from now?",
            after(place, steps="k"),
            Choice("before", "beside", "beyond"),
            k=[1, 10],
            name="place",
        ),
        Question("How long is the way to the goal?", now(goal_distance), Number(0, 60), name="distance"),
        Question("How far is the wall?", now(wall_distance), Number(0, 30), name="wall"),
        Question(
            "How near will I come to the wall in 5 steps?", lowest(wall_distance, over=5), Number(0, 30), name="nearest"
        ),
        Question("How far aside will I go in 10 steps?", peak(sideways, over=10), Number(0, 20), name="aside"),
        Question("How much reward is in the next 10 steps?", total(reward, over=10), Number(-10, 22), name="reward"),
        Question("How many steps until I am at the goal?", steps_until("success", cap=60), name="until_goal"),
    ],
    catastrophe="constraint",
    risk="touch[k=3]",
    reward={"touch[k=3]": -1.0, "distance": -0.02, "goal[k=10]": 0.5},
    penalty=20.0,
    algorithm=PPO,
    hyperparameters=dict(
        n_steps=512, batch_size=128, n_epochs=8, learning_rate=1e-3, gamma=0.98, gae_lambda=0.95, ent_coef=0.0
    ),
    policy_kwargs=dict(net_arch=[64, 64]),
    timesteps=60_000,
    n_envs=8,
    solved=55.0,
    oracle=oracle,
    quick=dict(timesteps=4_096, episodes=16),
)
