"""Observations as the environment itself gives them, from what a policy sees."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakSet

import numpy as np
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

__all__ = ["observation_normalizer", "own_units"]

log = logging.getLogger(__name__)

_CLIPPED: WeakSet[VecNormalize] = WeakSet()  # those of which it has been told


def observation_normalizer(env: Any) -> VecNormalize | None:
    """The VecNormalize around an SB3 environment that normalises observations, if there is one."""
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            return env
        env = env.venv
    return None


def own_units(env: Any, obs: Any) -> Any:
    """Observations, one or a batch (n_envs, ...), as they were before SB3's wrappers; of stacked ones every frame.

    ``VecNormalize`` keeps those that it normalised last, which are taken as they are. Of others (last ones of an episode, older
    frames) what was clipped is lost, which is told once.

    :param env: an SB3 environment, as the policy sees it
    """
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecFrameStack):
            return _frame_by_frame(env, obs)
        if isinstance(env, VecNormalize) and env.norm_obs:
            obs = _unnormalized(env, obs)
        elif isinstance(env, VecTransposeImage):
            obs = _each(obs, lambda key, value, env=env: np.moveaxis(value, -3, -1) if _turns(env, key) else value)
        env = env.venv
    return obs


def _frame_by_frame(env: VecFrameStack, obs: Any) -> Any:
    """The same of stacked frames, where something inside changes them."""
    inside: list[Any] = []
    inner = env.venv
    while isinstance(inner, VecEnvWrapper):
        inside.append(inner)
        inner = inner.venv
    turned = [wrapper for wrapper in inside if isinstance(wrapper, VecTransposeImage)]
    if not turned and observation_normalizer(env.venv) is None:
        return obs
    stacked: Any = env.stacked_obs

    def axis(key: str, value: Any) -> int:
        part = stacked.sub_stacked_observations[key] if isinstance(obs, dict) else stacked
        return value.ndim - len(part.stacked_shape) if part.channels_first else -1

    def joined(key: str, value: Any) -> Any:
        frames = [frame[key] if isinstance(obs, dict) else frame for frame in own]
        return np.concatenate(frames, -1 if any(_turns(each, key) for each in turned) else axis(key, value))

    split = _each(obs, lambda key, value: np.split(value, stacked.n_stack, axis(key, value)))
    own = [own_units(env.venv, _each(split, lambda _, frames, n=n: frames[n])) for n in range(stacked.n_stack)]
    return _each(obs, joined)


def _unnormalized(normalize: VecNormalize, obs: Any) -> Any:
    newest = normalize.get_original_obs()
    if _shapes(newest) == _shapes(obs) and _equal(normalize.normalize_obs(newest), obs):
        return newest
    if normalize not in _CLIPPED and _clipped(normalize, obs):
        _CLIPPED.add(normalize)
        log.warning(
            "VecNormalize has clipped the last observation of an episode, or an older frame, at clip_obs=%g standard deviations: a fact "
            "that reads it sees less than there was. Give VecNormalize a larger clip_obs, or let info tell the fact",
            normalize.clip_obs,
        )
    return normalize.unnormalize_obs(obs)


def _clipped(normalize: VecNormalize, obs: Any) -> bool:
    parts = [obs[key] for key in normalize.norm_obs_keys or obs] if isinstance(obs, dict) else [obs]
    return any(bool((np.abs(part) >= normalize.clip_obs).any()) for part in parts)


def _turns(env: VecTransposeImage, key: str) -> bool:
    """Whether a wrapper puts an image's channels first."""
    return not env.skip and key in getattr(env, "image_space_keys", [""])


def _each(obs: Any, change: Any) -> Any:
    """Observations with every part of Dict ones changed, or the only one, which has no name."""
    return {key: change(key, value) for key, value in obs.items()} if isinstance(obs, dict) else change("", obs)


def _shapes(obs: Any) -> Any:
    return {key: value.shape for key, value in obs.items()} if isinstance(obs, dict) else obs.shape


def _equal(a: Any, b: Any) -> bool:
    pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else [(a, b)]
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)
