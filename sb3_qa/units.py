"""Observations in the environment's own units, from what a policy sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

__all__ = ["observation_normalizer", "own_units"]


def observation_normalizer(env: Any) -> VecNormalize | None:
    """The VecNormalize around an SB3 environment that normalises observations, if there is one."""
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            return env
        env = env.venv
    return None


def own_units(env: Any, obs: Any) -> Any:
    """Observations, one or a batch (n_envs, ...), as they were before ``VecNormalize``; of stacked ones every frame.

    :param env: an SB3 environment, as the policy sees it
    """
    stacks: list[Any] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            return _unstacked(env, stacks, obs)
        if isinstance(env, VecFrameStack):
            stacks.append(env.stacked_obs)
        env = env.venv
    return obs


def _unstacked(normalize: VecNormalize, stacks: list[Any], obs: Any) -> Any:
    if not stacks:
        return normalize.unnormalize_obs(obs)
    stack, *inner = stacks
    if not isinstance(obs, dict):
        axis = _axis(stack, obs)
        frames = np.split(obs, stack.n_stack, axis)
        return np.concatenate([_unstacked(normalize, inner, frame) for frame in frames], axis)
    parts = stack.sub_stacked_observations
    axes = {key: _axis(parts[key], value) for key, value in obs.items()}
    split = {key: np.split(value, stack.n_stack, axes[key]) for key, value in obs.items()}
    own = [_unstacked(normalize, inner, {key: split[key][n] for key in obs}) for n in range(stack.n_stack)]
    return {key: np.concatenate([each[key] for each in own], axes[key]) for key in obs}


def _axis(stack: Any, obs: Any) -> int:
    """The dimension that frames are stacked in, of one observation or of a batch."""
    return -1 if not stack.channels_first else obs.ndim - len(stack.stacked_shape)
