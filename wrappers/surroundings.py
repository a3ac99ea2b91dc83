"""What stands around a decision: the steps before it, whether a catastrophe happened, seeds and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.facts import fact_of_slots
from sb3_qa.truth import Step
from sb3_qa.units import own_units
from sb3_qa.wrappers.shell import Arrival, own_rewards, row

__all__ = ["Fact", "Ring", "Stretch", "action_masks", "by_name", "environments_in", "frames_of", "masking", "seed_of"]

log = logging.getLogger(__name__)

Bools = NDArray[np.bool_]


class Stretch(NamedTuple):
    """Some consecutive steps of one environment, oldest first."""

    env: int
    obs: dict[str, NDArray[Any]]
    """(n_steps, ...) each, by name."""
    steps: list[tuple[Any, ...]]
    """Of all environments: proposed and executed actions, risks, rewards, and pictures or None."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that is written down of them, each (n_steps, ...)."""
        arrays = dict(self.obs)
        for n, name in enumerate(("proposed", "executed", "risk", "reward")):
            arrays[name] = np.array([step[n][self.env] for step in self.steps])
        frames = [np.asarray(step[4][self.env]) for step in self.steps if step[4] is not None]
        if frames and len(frames) == len(self.steps):
            arrays["frames"] = np.stack(frames)
        return arrays


class Ring:
    """The newest steps of all environments; their observations in arrays (length, n_envs, ...) that are written over."""

    def __init__(self, length: int, obs: Any) -> None:
        self.length = length
        self._head = -1
        self._columns = {
            name: np.empty((length, *array.shape), array.dtype) for name, array in by_name("obs", obs).items()
        }
        self._steps: list[tuple[Any, ...]] = [()] * length

    def add(
        self, obs: Any, proposed: Any, executed: Any, risk: Any, reward: Any, pictures: Sequence[Any] | None
    ) -> None:
        """Take in a step. What may be written over outside is copied: observations, and proposed actions."""
        self._head = head = (self._head + 1) % self.length
        if isinstance(obs, dict):
            for name, array in obs.items():
                self._columns[f"obs/{name}"][head] = array
        else:
            self._columns["obs"][head] = obs
        self._steps[head] = (proposed.copy(), executed, risk, reward, pictures)

    def newest(self, i: int, count: int) -> Stretch:
        """The last steps of one environment."""
        places = [k % self.length for k in range(self._head + 1 - count, self._head + 1)]
        obs = {name: column[places, i] for name, column in self._columns.items()}
        return Stretch(i, obs, [self._steps[k] for k in places])


class Fact:
    """Whether the catastrophe that a question asks about has happened in a step."""

    def __init__(self, name: str, fact: Any, slots: Any) -> None:
        self.name, self._seen, self._failed = name, False, False
        self._fact = fact_of_slots(fact, slots)

    def __str__(self) -> str:
        return repr(self._fact) if isinstance(self._fact, str) else getattr(self._fact, "__name__", "a callable")

    def of(self, arrival: Arrival, executed: NDArray[Any], env: Any) -> Bools | None:
        """(n,), or None if it cannot be known: a fact that has not been there once, or a callable that fails.

        The facts of an answerer from a file that were callables are names in no ``info``.
        """
        fact = self._fact
        if isinstance(fact, str):
            values = [info.get(fact) for info in arrival.infos]
        else:
            try:
                values = [_called(fact, step) for step in self._steps(arrival, executed, env)]
            except Exception as error:
                self._complain(error)
                return None
        if not self._seen:
            self._seen = any(value is not None for value in values)
            if not self._seen:
                return None
        return np.array([bool(value) for value in values])

    def _complain(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "%s: the fact of the question raised %s: %s; where it does, terminations are recorded, not catastrophes, and nothing is "
                "known to a certificate's alarm",
                self.name,
                type(error).__name__,
                error,
            )

    def _steps(self, arrival: Arrival, executed: NDArray[Any], env: Any) -> list[Step]:
        """Steps in the environment's own units, as facts are about them."""
        obs, done, terminated = own_units(env, arrival.obs), arrival.done.tolist(), arrival.terminated.tolist()
        rewards = own_rewards(env, arrival.rewards, arrival.infos)
        steps = []
        for i, (info, reward, done_, over) in enumerate(zip(arrival.infos, rewards, done, terminated, strict=True)):
            arrived = row(obs, i)
            if done_ and "terminal_observation" in info:
                arrived = own_units(env, info["terminal_observation"])
            steps.append(Step(arrived, executed[i], reward, over, done_ and not over, info))
        return steps


def _called(fact: Any, step: Step) -> Any:
    """The value of a callable; None where it asks for a key that is not there."""
    try:
        return fact(step)
    except KeyError:
        return None


def environments_in(env: Any) -> list[Any] | None:
    """The environments themselves, where they live in this process."""
    inside = getattr(env, "unwrapped", None)
    if isinstance(inside, gym.Env):
        return [inside]
    envs = getattr(inside, "envs", None)
    return None if envs is None else [each.unwrapped for each in envs]


def seed_of(env: Any) -> int | None:
    """What an environment's random numbers were seeded with."""
    seed = getattr(env, "np_random_seed", None)
    return None if seed is None or seed < 0 else int(seed)


def masking(env: Any) -> Any:
    """What a wrapper wraps, where ``action_masks()`` tells which actions are allowed in it, as for MaskablePPO; None otherwise.

    :param env: the wrapper itself
    """
    inside, name = env.unwrapped, "action_masks"
    if isinstance(env, VecEnv):
        try:
            return inside if inside.has_attr(name) else None
        except NotImplementedError:  # a VecEnv of one's own that has nothing to ask for
            return None
    if isinstance(env, VectorEnv):
        # Not asked for itself: a process that does not have it would end.
        return inside if hasattr(inside, "call") and all(inside.call("has_wrapper_attr", name)) else None
    return env.env if env.env.has_wrapper_attr(name) else None


def action_masks(env: Any) -> Bools:
    """Which choices (n, n_choices) are allowed in the environments that :func:`masking` found; of actions with parts, those of each."""
    name = "action_masks"
    if isinstance(env, VecEnv):
        told: Sequence[Any] = env.env_method(name)
    elif isinstance(env, VectorEnv):
        told = env.call(name)  # type: ignore[attr-defined]
    else:
        told = [env.get_wrapper_attr(name)()]
    return np.array(told, np.bool_).reshape(len(told), -1)


def frames_of(env: Any) -> Sequence[Any]:
    """A picture of each environment."""
    if isinstance(env, VecEnv):
        return env.get_images()
    picture = env.render()
    return [picture] if isinstance(env, gym.Env) else picture


def by_name(name: str, obs: Any) -> dict[str, NDArray[Any]]:
    """Observations as arrays: a name for each part of Dict ones."""
    if isinstance(obs, dict):
        return {f"{name}/{key}": np.asarray(value) for key, value in obs.items()}
    return {name: np.asarray(obs)}
