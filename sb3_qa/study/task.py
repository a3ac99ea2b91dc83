"""What a task of the study is: an environment, its questions, its catastrophe, an algorithm and its hyperparameters."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from sb3_qa.errors import QAError
from sb3_qa.evaluation import seeded_vec_env
from sb3_qa.questions import Question

__all__ = ["Oracle", "Task", "load_task", "task_names"]

Oracle = Callable[[gym.Env[Any, Any], Any, NDArray[Any], bool], NDArray[np.float64]]
"""``(env, agent, actions, deterministic)`` -> the true risk of each action in the environment's present state, (n_actions,). The
agent goes on after it: anything with SB3's ``predict``, by its likeliest actions or by sampled ones."""


@dataclass(frozen=True)
class Task:
    """A task of the study; each is one small module of :mod:`sb3_qa.study.tasks`, with a ``TASK``.

    Hyperparameters are tuned for the agent without questions, and then left alone.
    """

    name: str
    title: str
    """For the report, with what the catastrophe is."""
    make: Callable[[], gym.Env[Any, Any]]
    """Makes one environment, which tells the facts of the questions and of the catastrophe."""
    questions: Sequence[Question]
    catastrophe: str
    """The key of ``info`` that tells of it."""
    risk: str
    """The instance about ``{action}`` that a veto asks."""
    algorithm: type[BaseAlgorithm]
    hyperparameters: Mapping[str, Any]
    """Of the algorithm, but for ``policy_kwargs``."""
    timesteps: int
    n_envs: int
    solved: float
    """A mean return of training episodes that counts as having learnt the task."""
    reward: Mapping[str, float] = field(default_factory=dict)
    """Instances and weights, of which a reward is made of answers only; empty where that is not tried."""
    penalty: float = 1.0
    """What is taken from the reward for a catastrophe, or for a risk of 1, in the arms that do so."""
    episodes: int = 200
    """How many each measurement plays."""
    evaluation_envs: int = 0
    """Environments side by side in measurements, which are the faster for more of them; 0: as many as for training."""
    policy: str = "MlpPolicy"
    policy_kwargs: Mapping[str, Any] = field(default_factory=dict)
    qa_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"qa_net_arch": [64], "qa_every": 1})
    """Of the answering head, the same in every arm; every pass over the data teaches it."""
    make_vec: Callable[[int, int], VecEnv] | None = None
    """``(n_envs, seed)`` -> environments, where they are not made of :attr:`make`."""
    oracle: Oracle | None = None
    """True risks by counterfactual rollouts of a cloned simulator, where that is possible."""
    oracle_episodes: int = 40
    """How many the oracle's veto plays, which is slow."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are otherwise in a run of seconds, which shows that the machinery works and nothing else."""

    def training_env(self, seed: int) -> VecEnv:
        """Environments to learn in, with monitors."""
        if self.make_vec is not None:
            return VecMonitor(self.make_vec(self.n_envs, seed))
        return make_vec_env(self.make, self.n_envs, seed=seed)

    def evaluation_env(self, seed: int) -> VecEnv:
        """Environments whose episodes are seeded one by one where that is possible, so that arms meet the same ones."""
        n_envs = self.evaluation_envs or self.n_envs
        return self.make_vec(n_envs, seed) if self.make_vec is not None else seeded_vec_env(self.make, n_envs, seed)

    def quickly(self) -> Task:
        """The task in a run of seconds."""
        return replace(self, **self.quick)


def task_names() -> list[str]:
    """Names of the tasks there are."""
    from sb3_qa.study import tasks

    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def load_task(name: str) -> Task:
    """The task of that name.

    :raises QAError: when there is none, or what it needs is not installed
    """
    if name not in task_names():
        raise QAError(f"the study got task {name!r}; expected one of {task_names()}; give one of them")
    try:
        task: Task = importlib.import_module(f"sb3_qa.study.tasks.{name}").TASK
    except ModuleNotFoundError as error:
        raise QAError(
            f"task {name!r} needs {error.name}, which is not installed; expected it beside sb3_qa; pip install 'sb3-qa[study]'"
        ) from error
    return task
