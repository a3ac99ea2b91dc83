"""LunarLander, each action held for four frames; the catastrophe is a crash, or leaving the screen."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO

from sb3_qa import Choice, Number, Question
from sb3_qa.errors import QAError
from sb3_qa.study.oracle import Counterfactuals
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, peak, steps_until, total

FRAMES = 4  # an action that is held for a single frame hardly matters to what becomes of the lander
LIMIT = 100  # actions an episode; a landing takes some 60
ACTIONS = ["nothing", "left engine", "main engine", "right engine"]


class HeldActions(gym.Wrapper[Any, Any, Any, Any]):
    """Holds each action for some frames, and tells whether the lander crashed.

    It keeps the seed and the actions of the episode: Box2D's world cannot be copied, but played again.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episode_seed: int | None = None
        self.actions: list[int] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode_seed, self.actions = seed, []
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, {**info, "crashed": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(int(action))
        total_reward = last = 0.0
        for _ in range(FRAMES):
            obs, reward, terminated, truncated, info = self.env.step(action)
            last = float(reward)
            total_reward += last
            if terminated or truncated:
                break
        return obs, total_reward, terminated, truncated, {**info, "crashed": terminated and last <= -100}


def make() -> gym.Env[Any, Any]:
    return HeldActions(gym.make("LunarLander-v3", max_episode_steps=LIMIT * FRAMES))


def replay(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """A clone: another environment, with the seed and the actions of this episode."""
    held = env
    while not isinstance(held, HeldActions):
        assert isinstance(held, gym.Wrapper)
        held = held.env
    if held.episode_seed is None:
        raise QAError(
            "the lander's oracle got an episode that was not seeded; expected a seed at the reset, to play it again; use seeded_vec_env"
        )
    clone = make()
    clone.reset(seed=held.episode_seed)
    for action in held.actions:
        clone.step(action)
    return clone


def touching(step: Step) -> bool:
    return bool(step.obs[6] > 0 or step.obs[7] > 0)


def tilted(step: Step) -> bool:
    return bool(abs(step.obs[4]) > 0.3)


def side(step: Step) -> str:
    return "left" if step.obs[0] < -0.2 else "right" if step.obs[0] > 0.2 else "over"


def height(step: Step) -> float:
    return float(6.67 * step.obs[1])  # in Box2D's metres above the pad


def speed(step: Step) -> float:
    return math.hypot(5.0 * step.obs[2], 7.5 * step.obs[3])  # in metres a second


def reward(step: Step) -> float:
    return step.reward


TASK = Task(
    name="lander",
    title="LunarLander (crash)",
    make=make,
    questions=[
        Question(
            "Will I crash within {k} steps if I choose {action}?",
            eventually("crashed", within="k"),
            k=[5, 10, 20, 40],
            name="crash",
        ),
        Question("Am I touching the ground?", now(touching), name="touching"),
        Question("Am I tilted?", now(tilted), name="tilted"),
        Question("Will I be tilted within {k} steps?", eventually(tilted, within="k"), k=[5, 20], name="tilts"),
        Question("Will I stay upright for 10 steps?", always(lambda step: not tilted(step), during=10), name="upright"),
        Question(
            "Which side of the pad will I be on {k} steps from now?",
            after(side, steps="k"),
            Choice("left", "over", "right"),
            k=[1, 10],
            name="side",
        ),
        Question("How high am I?", now(height), Number(-1, 12), name="height"),
        Question("How fast am I?", now(speed), Number(0, 12), name="speed"),
        Question("How fast will I be at most in the next 5 steps?", peak(speed, over=5), Number(0, 12), name="fastest"),
        Question("How low will I get in the next 5 steps?", lowest(height, over=5), Number(-1, 12), name="lowest"),
        Question("How much reward is in the next 10 steps?", total(reward, over=10), Number(-200, 200), name="reward"),
        Question("How many steps until I touch down?", steps_until(touching, cap=40), name="touchdown"),
    ],
    catastrophe="crashed",
    risk="crash[k=5]",
    reward={"crash[k=10]": -1.0, "touching": 0.1, "tilts[k=5]": -0.1},
    penalty=100.0,
    algorithm=PPO,
    hyperparameters=dict(
        n_steps=128, batch_size=256, n_epochs=8, learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, ent_coef=0.002
    ),
    timesteps=120_000,
    n_envs=16,
    solved=150.0,
    oracle=Counterfactuals(replay, catastrophe="crashed", horizon=5, rollouts=2),
    quick=dict(timesteps=2_048, episodes=8),
)
