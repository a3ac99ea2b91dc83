"""True risks by counterfactual rollouts of a cloned simulator, and the veto that knows them: what no answerer can do better than.

A clone has the random numbers to come of the environment too, so that the oracle knows its noise beforehand. What it does not
know is which actions a sampling agent will draw after the one that is judged: those are averaged over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa.errors import QAError
from sb3_qa.evaluation import Agent, SeededEpisodes
from sb3_qa.study.task import Oracle, Task
from sb3_qa.truth import Fact, Step
from sb3_qa.wrappers.judged import verdict
from sb3_qa.wrappers.shell import no_action, plain
from sb3_qa.wrappers.shell import stack as batch
from sb3_qa.wrappers.substitutes import all_actions

__all__ = ["Counterfactuals", "OracleVeto", "chain_copy", "deep_copy", "oracle_vec_env"]

Env = gym.Env[Any, Any]
Floats = NDArray[np.float64]
CANDIDATES = 15  # drawn from a box beside the proposed action, where actions cannot be listed


def deep_copy(env: Env) -> Env:
    """A clone of an environment that is all Python. Of MuJoCo's and the Arcade Learning Environment's it would be a fresh one."""
    return copy.deepcopy(env)


def chain_copy(env: Env, innermost: Callable[[Any], Env]) -> Env:
    """A clone whose wrappers are copied one by one, around the innermost environment's own clone.

    :param innermost: clones ``env.unwrapped``
    """
    if not isinstance(env, gym.Wrapper):
        return innermost(env)
    clone = shallow_copy(env)
    clone.env = chain_copy(env.env, innermost)
    return clone


def shallow_copy(env: Any) -> Any:
    """A copy with the same attributes: past ``EzPickle``, which would make ``copy.copy`` build a fresh environment."""
    clone = object.__new__(type(env))
    clone.__dict__.update(env.__dict__)
    return clone


class Counterfactuals:
    """An oracle: plays on in clones, each with another first action, and sees what comes of it.

    :param clone: from an environment, with its wrappers, to one in the same state that can be stepped by itself
    :param catastrophe: the fact that must not come true
    :param horizon: within how many steps
    :param rollouts: per action; more than one is only of use where the agent samples
    """

    def __init__(self, clone: Callable[[Env], Env], *, catastrophe: Fact, horizon: int, rollouts: int = 4) -> None:
        self.clone, self.catastrophe, self.horizon, self.rollouts = clone, catastrophe, horizon, rollouts

    def __call__(self, env: Env, agent: Agent, actions: NDArray[Any], deterministic: bool = False) -> Floats:
        """The share of rollouts in which the catastrophe comes, of each first action: (n_actions,)."""
        repeats = 1 if deterministic or self.horizon == 1 else self.rollouts
        first = np.repeat(np.asarray(actions), repeats, axis=0)
        happened = np.zeros(len(first), np.bool_)
        with torch.random.fork_rng(devices=[]):  # the agent's own draws stay what they would have been
            clones = {i: self.clone(env) for i in range(len(first))}
            chosen, arrived = dict(enumerate(first)), dict[int, Any]()
            for step in range(self.horizon):
                if step:
                    chosen = self._chosen(agent, clones, arrived, deterministic)
                for i, action in chosen.items():
                    obs, reward, terminated, truncated, info = clones[i].step(plain(action))
                    arrived[i] = obs
                    happened[i] = self._is_catastrophe(Step(obs, action, float(reward), terminated, truncated, info))
                    if happened[i] or terminated or truncated:
                        del clones[i]
                if not clones:
                    break
        return happened.reshape(len(actions), repeats).mean(axis=1)

    def _chosen(self, agent: Agent, clones: dict[int, Env], arrived: dict[int, Any], deterministic: bool) -> Any:
        which = list(clones)
        masks: dict[str, Any] = {}
        if all(env.has_wrapper_attr("action_masks") for env in clones.values()):
            masks["action_masks"] = np.stack([env.get_wrapper_attr("action_masks")() for env in clones.values()])
        obs = batch([arrived[i] for i in which])
        actions, _ = agent.predict(obs, deterministic=deterministic, **masks)
        return dict(zip(which, actions, strict=True))

    def _is_catastrophe(self, step: Step) -> bool:
        if callable(self.catastrophe):
            return bool(self.catastrophe(step))
        return bool(step.info[self.catastrophe])


class OracleVeto(gym.Wrapper[Any, Any, Any, Any]):
    """Vetoes by true risks: an action whose risk is at least the threshold gives way to the safest one.

    Of equally safe ones the proposed action, or else the first, is executed; actions that the environment masks are no choice.
    It stands *inside* the vectorised environment, which alone holds what can be cloned. ``info`` tells ``qa/risk``,
    ``qa/catastrophe``, ``qa/vetoed``, ``qa/proposed_action``, ``qa/executed_action`` and ``qa/no_safe_action`` as the vetoes
    of :mod:`sb3_qa.wrappers` do.

    :param oracle: see :data:`sb3_qa.study.task.Oracle`
    :param agent: that goes on after the action judged
    :param threshold: in (0, 1]
    :param deterministic: whether the agent takes its likeliest action, as it must be evaluated too
    :param seed: of the candidates, where actions cannot be listed
    """

    def __init__(
        self,
        env: Env,
        oracle: Oracle,
        agent: Agent,
        threshold: float,
        *,
        deterministic: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(env)
        if isinstance(threshold, bool) or not 0.0 < threshold <= 1.0:
            raise QAError(
                f"OracleVeto got threshold={threshold!r}; expected a probability in (0, 1]; a risk of at least that is vetoed; "
                "give e.g. 0.5"
            )
        self.oracle, self.agent, self.threshold = oracle, agent, threshold
        self.deterministic = deterministic
        self.rng = np.random.default_rng(seed)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        nothing = no_action(self.action_space)
        return obs, {**info, **verdict(0.0, False, False, nothing, nothing, False)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        # What is proposed is the first candidate, so that it is kept where nothing is safer.
        candidates = self._candidates(np.asarray(action))
        risks = np.asarray(self.oracle(self.env, self.agent, candidates[:1], self.deterministic), np.float64)
        flagged = bool(risks[0] >= self.threshold)
        best = 0
        if flagged and len(candidates) > 1:
            more = self.oracle(self.env, self.agent, candidates[1:], self.deterministic)
            risks = np.concatenate([risks, np.asarray(more, np.float64)])
            best = int(np.argmin(risks))
        executed = plain(candidates[best])
        obs, reward, terminated, truncated, info = self.env.step(executed)
        unsafe = bool(risks.min() >= self.threshold)
        told = verdict(float(risks[0]), flagged, best > 0, plain(candidates[0]), executed, unsafe)
        return obs, reward, terminated, truncated, {**info, **told}

    def _candidates(self, proposed: NDArray[Any]) -> NDArray[Any]:
        """(m, *action_shape), the proposed action first."""
        space = self.action_space
        every = all_actions(space)
        if every is not None:
            if self.env.has_wrapper_attr("action_masks"):
                every = every[np.asarray(self.env.get_wrapper_attr("action_masks")(), np.bool_)]
            others = every[(every != proposed).reshape(len(every), -1).any(axis=1)]
        elif isinstance(space, spaces.Box):
            drawn = self.rng.uniform(space.low, space.high, (CANDIDATES, *space.shape))
            others = drawn.astype(space.dtype)
        else:
            raise QAError(
                f"OracleVeto got the action space {space}; expected one that can be listed, or a Box; use another"
            )
        return np.concatenate([proposed[None].astype(others.dtype), others])


def oracle_vec_env(
    task: Task, agent: Agent, n_envs: int, seed: int, threshold: float = 0.1, *, deterministic: bool = False
) -> DummyVecEnv:
    """Environments with the oracle's veto, whose episodes are seeded one by one as in :meth:`Task.evaluation_env`.

    They are the task's Python ones, also where it is trained in others, as those cannot be cloned.

    :raises QAError: when the task has no oracle
    """
    oracle = task.oracle
    if oracle is None:
        raise QAError(f"task {task.name!r} has no oracle; expected one that can be cloned; leave the oracle's veto out")

    def one(i: int) -> Env:
        env = SeededEpisodes(task.make(), seed + i, n_envs)
        return OracleVeto(env, oracle, agent, threshold, deterministic=deterministic, seed=seed + i)

    return DummyVecEnv([lambda i=i: one(i) for i in range(n_envs)])  # type: ignore[misc]
