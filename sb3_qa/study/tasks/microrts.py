"""microRTS on 8 x 8 cells against a rush of workers; the catastrophe is to lose the own base, or the game."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
from sb3_contrib import MaskablePPO

from sb3_qa import Choice, Number, Question
from sb3_qa.study.microrts import MicroRTS, check_installed
from sb3_qa.study.oracle import Counterfactuals, chain_copy
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, peak, steps_until, total

check_installed()


class Ruin(gym.Wrapper[Any, Any, Any, Any]):
    """Tells of the catastrophe."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, "ruined": False}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "ruined": info["lost_base"] or info["defeated"]}


def make(opponent: str = "ai.abstraction.WorkerRush", latest_start: int = 20) -> gym.Env[Any, Any]:
    return Ruin(MicroRTS(opponent, latest_start=latest_start))


def clone(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return chain_copy(env, MicroRTS.clone)


def outnumbered(step: Step) -> bool:
    return bool(step.info["enemy_units"] > step.info["own_units"])


def lost_a_unit(step: Step) -> bool:
    return bool(step.info["lost"] > 0)


def killed_a_unit(step: Step) -> bool:
    return bool(step.info["killed"] > 0)


def balance(step: Step) -> str:
    ahead = step.info["own_units"] - step.info["enemy_units"]
    return "behind" if ahead < 0 else "ahead" if ahead > 0 else "even"


def safe(step: Step) -> bool:
    return not step.info["threatened"]


def reward(step: Step) -> float:
    return step.reward


QUESTIONS = [
    Question(
        "Will I lose my base or the game within {k} decisions if I choose {action}?",
        eventually("ruined", within="k"),
        k=[5, 10, 20],
        name="ruin",
    ),
    Question(
        "Will I lose a unit within {k} decisions if I choose {action}?",
        eventually(lost_a_unit, within="k"),
        k=[1, 5],
        name="lose",
    ),
    Question("Will I kill a unit within {k} decisions?", eventually(killed_a_unit, within="k"), k=[5], name="kill"),
    Question("Is an enemy close to my base?", now("threatened"), name="threat"),
    Question("Am I outnumbered?", now(outnumbered), name="outnumbered"),
    Question("Will my base be left alone for 5 decisions?", always(safe, during=5), name="alone"),
    Question(
        "Whom am I to give an order?",
        now("asked"),
        Choice("none", "base", "barracks", "worker", "light", "heavy", "ranged"),
        name="asked",
    ),
    Question(
        "How will our numbers compare {k} decisions from now?",
        after(balance, steps="k"),
        Choice("behind", "even", "ahead"),
        k=[1, 10],
        name="balance",
    ),
    Question("How many units has the enemy?", now("enemy_units"), Number(0, 12), name="enemies"),
    Question(
        "How many units will I have at most in 10 decisions?", peak("own_units", over=10), Number(0, 20), name="most"
    ),
    Question(
        "How few resources will I have in 5 decisions?", lowest("own_resources", over=5), Number(0, 15), name="poorest"
    ),
    Question("How much reward is in the next 10 decisions?", total(reward, over=10), Number(-12, 12), name="reward"),
    Question(
        "How many decisions until an enemy is close to my base?", steps_until("threatened", cap=20), name="until_threat"
    ),
    Question("Will I have won within {k} decisions?", eventually("won", within="k"), k=[20], name="win"),
]


def task(
    name: str, title: str, opponent: str, *, timesteps: int, learning_rate: float, solved: float, latest_start: int = 20
) -> Task:
    """The game against an opponent."""
    return Task(
        name=name,
        title=title,
        make=partial(make, opponent, latest_start),
        questions=QUESTIONS,
        catastrophe="ruined",
        risk="ruin[k=10]",
        reward={"ruin[k=20]": -1.0, "kill[k=5]": 0.2, "win[k=20]": 1.0, "lose[k=5]": -0.2},
        penalty=10.0,
        algorithm=MaskablePPO,
        hyperparameters=dict(
            n_steps=256,
            batch_size=256,
            n_epochs=4,
            learning_rate=learning_rate,
            gamma=0.997,
            gae_lambda=0.95,
            ent_coef=0.01,
        ),
        policy_kwargs=dict(net_arch=[256, 128]),
        timesteps=timesteps,
        n_envs=8,
        episodes=100,
        evaluation_envs=20,
        solved=solved,
        oracle=Counterfactuals(clone, catastrophe="ruined", horizon=10, rollouts=2),
        quick=dict(timesteps=4_096, episodes=8),
    )


TASK = task(
    "microrts",
    "microRTS 8x8, WorkerRush (base or game lost)",
    "ai.abstraction.WorkerRush",
    timesteps=500_000,
    learning_rate=3e-4,
    solved=8.0,
)
