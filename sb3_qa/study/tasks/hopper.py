"""MuJoCo's Hopper with PPO; the catastrophe is a fall."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_qa import Choice, Number, Question
from sb3_qa.study.oracle import Counterfactuals, chain_copy, shallow_copy
from sb3_qa.study.task import Task
from sb3_qa.truth import Step, after, always, eventually, lowest, now, peak, steps_until, total

LIMIT = 160  # steps, 1.3 s of hopping; most agents fall before long
LEAN = 0.1  # radians; beyond 0.2 it counts as fallen


class Falls(gym.Wrapper[Any, Any, Any, Any]):
    """Tells whether the hopper fell, and whether its foot is on the ground."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, "x_velocity": 0.0, "fell": False, "on_ground": self._on_ground()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        told = {"fell": terminated, "on_ground": self._on_ground()}  # nothing but an unhealthy state terminates
        return obs, float(reward), terminated, truncated, {**info, **told}

    def _on_ground(self) -> bool:
        simulator: Any = self.unwrapped
        return bool(simulator.data.ncon > 0)


def make(limit: int = LIMIT) -> gym.Env[Any, Any]:
    return Falls(gym.make("Hopper-v5", max_episode_steps=limit))


def clone(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The state of the simulator copied whole, the model shared; copying the environment would make a fresh one."""
    return chain_copy(env, _clone_simulator)


def _clone_simulator(simulator: Any) -> Any:
    import mujoco

    other = shallow_copy(simulator)
    other.data = copy.copy(simulator.data)
    mujoco.mj_copyData(other.data, simulator.model, simulator.data)
    return other


def lean(step: Step) -> str:
    return "back" if step.obs[1] < -LEAN else "forward" if step.obs[1] > LEAN else "upright"


def upright(step: Step) -> bool:
    return bool(abs(step.obs[1]) <= LEAN)


def in_the_air(step: Step) -> bool:
    return not step.info["on_ground"]


def height(step: Step) -> float:
    return float(step.obs[0])


def rising(step: Step) -> bool:
    return bool(step.obs[6] > 0)


def reward(step: Step) -> float:
    return step.reward


QUESTIONS = [
    Question(
        "Will I fall within {k} steps if I choose {action}?",
        eventually("fell", within="k"),
        k=[5, 10, 20, 50],
        name="fall",
    ),
    Question("Is my foot on the ground?", now("on_ground"), name="on_ground"),
    Question("Am I rising?", now(rising), name="rising"),
    Question("Will I be in the air within {k} steps?", eventually(in_the_air, within="k"), k=[10], name="jump"),
    Question("Will I stay upright for 10 steps?", always(upright, during=10), name="upright"),
    Question("Which way do I lean?", now(lean), Choice("back", "upright", "forward"), name="lean"),
    Question(
        "Which way will I lean {k} steps from now?",
        after(lean, steps="k"),
        Choice("back", "upright", "forward"),
        k=[10],
        name="lean_later",
    ),
    Question("How high is my torso?", now(height), Number(0.6, 1.7), name="height"),
    Question("How fast do I move forward?", now("x_velocity"), Number(-2, 5), name="speed"),
    Question("How fast will I be in {k} steps?", after("x_velocity", steps="k"), Number(-2, 5), k=[10], name="later"),
    Question("How low will I get in 10 steps?", lowest(height, over=10), Number(0.6, 1.7), name="lowest"),
    Question("How high will I get in 20 steps?", peak(height, over=20), Number(0.6, 1.7), name="highest"),
    Question("How much reward is in the next 10 steps?", total(reward, over=10), Number(-10, 50), name="reward"),
    Question("How many steps until I touch the ground?", steps_until("on_ground", cap=30), name="landing"),
]

TASK = Task(
    name="hopper",
    title="Hopper, PPO (fall)",
    make=make,
    questions=QUESTIONS,
    catastrophe="fell",
    risk="fall[k=10]",
    reward={"fall[k=20]": -1.0, "speed": 0.5},
    penalty=50.0,
    algorithm=PPO,
    hyperparameters=dict(
        n_steps=512,
        batch_size=128,
        n_epochs=6,
        learning_rate=LinearSchedule(7e-4, 5e-5, 1.0),
        gamma=0.99,
        gae_lambda=0.95,
        max_grad_norm=0.5,
    ),
    policy_kwargs=dict(net_arch=[64, 64], log_std_init=-0.5),
    timesteps=200_000,
    n_envs=4,
    episodes=100,
    evaluation_envs=20,
    solved=400.0,
    oracle=Counterfactuals(clone, catastrophe="fell", horizon=10, rollouts=2),
    quick=dict(timesteps=4_096, episodes=16),
)
