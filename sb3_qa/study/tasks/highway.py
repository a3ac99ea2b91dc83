"""A car on a highway (highway-env's, in envpool's C++ version); the catastrophe is a crash."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa import Choice, Number, Question
from sb3_qa.study.envpool import EnvPool
from sb3_qa.study.oracle import Counterfactuals, deep_copy
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, steps_until, total

NAME = "highway-fast-v0"
ACTIONS = ["LANE_LEFT", "IDLE", "LANE_RIGHT", "FASTER", "SLOWER"]


def make() -> gym.Env[Any, Any]:
    """The Python highway, which looks the same to the agent and is slow."""
    import highway_env

    gym.register_envs(highway_env)
    return gym.make(NAME)


def make_vec(n_envs: int, seed: int) -> VecEnv:
    return EnvPool(NAME, n_envs, seed)


def lane(step: Step) -> int:
    """Lanes are a third of the observation's range apart; the first row is the agent's own car."""
    return int(np.clip(np.rint(3.0 * step.obs[0, 2]), 0, 2))


def close_ahead(step: Step) -> bool:
    """Another car in the own lane, less than 20 m ahead."""
    others = step.obs[1:][step.obs[1:, 0] > 0]
    return bool(np.any((np.abs(others[:, 2]) < 0.15) & (others[:, 1] > 0) & (others[:, 1] < 0.2)))


def fast(step: Step) -> bool:
    return bool(step.info["speed"] > 27.0)


def reward(step: Step) -> float:
    return step.reward


TASK = Task(
    name="highway",
    title="highway-fast (crash)",
    make=make,
    make_vec=make_vec,
    questions=[
        Question(
            "Will I crash within {k} steps if I choose {action}?",
            eventually("crashed", within="k"),
            k=[1, 3, 5, 10],
            name="crash",
        ),
        Question("Is a car close ahead of me?", now(close_ahead), name="close"),
        Question(
            "Will a car be close ahead of me within {k} steps?", eventually(close_ahead, within="k"), k=[3], name="near"
        ),
        Question("Will I be fast in the next 5 steps?", always(fast, during=5), name="fast"),
        Question("How fast am I going?", now("speed"), Number(0, 40), name="speed"),
        Question(
            "How fast will I be in {k} steps?", after("speed", steps="k"), Number(0, 40), name="speed_later", k=[3]
        ),
        Question("How slow will I get in 5 steps?", lowest("speed", over=5), Number(0, 40), name="slowest"),
        Question(
            "Which lane will I be in {k} steps from now?",
            after(lane, steps="k"),
            Choice("left", "middle", "right"),
            k=[1, 3],
            name="lane",
        ),
        Question("How much reward is in the next 5 steps?", total(reward, over=5), Number(0, 5), name="reward"),
        Question("How many steps until a car is close ahead?", steps_until(close_ahead, cap=10), name="until_close"),
    ],
    catastrophe="crashed",
    risk="crash[k=5]",
    reward={"crash[k=5]": -1.0, "fast": 0.2},
    penalty=5.0,
    algorithm=PPO,
    hyperparameters=dict(n_steps=256, batch_size=256, n_epochs=6, learning_rate=5e-4, gamma=0.9),
    policy_kwargs=dict(net_arch=[128, 128]),
    timesteps=200_000,
    n_envs=8,
    solved=20.0,
    oracle=Counterfactuals(deep_copy, catastrophe="crashed", horizon=5, rollouts=2),
    oracle_episodes=20,
    quick=dict(timesteps=4_096, episodes=16),
)
