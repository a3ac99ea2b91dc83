"""Agents and environments for the command line: a model or an answerer from a file, and what it can act in."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.errors import QAError
from sb3_qa.evaluation import seeded_vec_env
from sb3_qa.memory import Memory
from sb3_qa.policies import QAPolicyMixin, algorithms, stock_policies
from sb3_qa.wrappers.substitutes import takes_masks

__all__ = ["Agent", "load_agent", "make_env"]


class Agent:
    """Who acts and answers: a model of SB3, or an answerer, which acts as the policy that it was saved with.

    :param qa: who answers
    :param model: who acts; the answerer's own policy if None
    """

    def __init__(self, qa: QuestionAnswerer, model: BaseAlgorithm | None = None) -> None:
        self.qa = qa
        self.model = model

    def act(
        self, obs: Any, memory: Memory | None, *, deterministic: bool, action_masks: NDArray[np.bool_] | None = None
    ) -> NDArray[Any]:
        """Actions (n_envs, ...) for a batch of observations; those liked best of an answerer, and of an agent with an LSTM.

        :param action_masks: which actions the environments allow, for an agent that takes them
        """
        if self.model is not None and memory is None:
            told = _told(self.model, action_masks)
            return np.asarray(self.model.predict(obs, deterministic=deterministic, **told)[0])
        return self._liked_best(obs, self.qa.read(obs, memory), action_masks)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """As a model's ``predict()``, for :func:`~sb3_qa.evaluation.run_episodes`; an answerer takes the action it likes best."""
        if self.model is not None:
            told = _told(self.model, action_masks)
            return self.model.predict(observation, state, episode_start, deterministic, **told)
        memory = state if state is not None else self.qa.blank(observation)
        if memory is not None:
            memory = Memory(memory.state, np.array(episode_start, np.bool_))
        reading = self.qa.read(observation, memory)
        actions = self._liked_best(observation, reading, action_masks)
        return actions, reading.remembered(np.zeros(len(reading), np.bool_))

    def _liked_best(self, obs: Any, reading: Reading, action_masks: NDArray[np.bool_] | None) -> NDArray[Any]:
        """What the answerer's own policy likes best of what it may do."""
        told = _told(self.qa.policy, action_masks)
        if not told:
            return reading.preferred()
        actions, _ = self.qa.policy.predict(obs, deterministic=True, **told)
        return np.asarray(actions + getattr(self.qa.policy.action_space, "start", 0))  # the policy counts from 0


def _told(agent: Any, action_masks: NDArray[np.bool_] | None) -> dict[str, Any]:
    """What is told to an agent that takes masks."""
    return {} if action_masks is None or not takes_masks(agent) else {"action_masks": action_masks}


def load_agent(path: Path, algorithm: str | None = None) -> Agent:
    """The agent in a file: an answerer (``QuestionAnswerer.save``) or, from a ``.zip``, a model (``model.save``).

    As with SB3 itself, loading a model runs code that was pickled into it: open only files you trust. An answerer's file holds
    none.

    :param algorithm: of a model, e.g. "ppo"; found out if None
    :raises QAError: when there is none, it cannot be read, or it has no questions
    """
    if not path.exists():
        raise QAError(
            f"there is no file {str(path)!r}; expected a model (.zip) or an answerer (.qa); write it with model.save() or qa.save()"
        )
    if path.suffix != ".zip":
        return Agent(QuestionAnswerer.load(path))
    try:
        data, _, _ = load_from_zip_file(path, device="cpu")
    except ValueError as error:
        raise QAError(
            f"{str(path)!r} could not be read ({error}); expected a model; write it with model.save()"
        ) from error
    if data is None or not issubclass(data.get("policy_class", object), QAPolicyMixin):
        raise QAError(
            f"{str(path)!r} holds a model without questions; expected a policy made by qa_policy(); train it with QACallback()"
        )
    of = _class_of(data, algorithm)
    try:
        model = of.load(path, device="cpu")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if algorithm is None:
            raise
        raise QAError(
            f"--algorithm got {algorithm!r}, and {of.__name__} could not load {str(path)!r} ({type(error).__name__}: {error}); expected "
            "the one that wrote it; leave it out to have it found"
        ) from error
    return Agent(QuestionAnswerer.from_model(model), model)


def _class_of(data: dict[str, Any], name: str | None) -> type[BaseAlgorithm]:
    known = {algorithm.__name__.lower(): algorithm for algorithm in algorithms()}
    if name is not None:
        if name.lower() not in known:
            raise QAError(f"got the algorithm {name!r}; expected one of {sorted(known)}; leave it out to have it found")
        return known[name.lower()]
    # The file does not say which algorithm wrote it; whose arguments it holds, and no others', it was.
    bases = data["policy_class"].__mro__
    fits = [a for a in known.values() if any(policy in bases for policy in stock_policies(a).values())]
    if not fits:
        raise QAError(
            f"the model has a {data['policy_class'].__name__}, which no known algorithm has; expected one of {sorted(known)}; say "
            "which one it is: --algorithm"
        )
    return max(fits, key=lambda algorithm: _fit(algorithm, data))


def _fit(algorithm: type[BaseAlgorithm], data: dict[str, Any]) -> float:
    arguments = set(inspect.signature(algorithm).parameters) - {"policy", "env", "_init_setup_model", "device"}
    found = arguments & set(data)
    return len(found) - 2.0 * len(arguments - found)


def make_env(
    name: str,
    kwargs: str = "{}",
    *,
    frame_stack: int = 1,
    normalize: Path | None = None,
    render: bool | str = True,
    n_envs: int = 1,
    seed: int | None = None,
) -> VecEnv:
    """Environments, one if not told otherwise, wrapped as SB3 wraps them for a policy.

    :param name: of a registered environment; ``module:Name-v0`` imports the module first
    :param kwargs: for ``gym.make``, as JSON
    :param frame_stack: how many observations the policy sees at once
    :param normalize: statistics saved by ``VecNormalize.save``
    :param render: whether it shows itself, in text if it can, else in frames; or the one mode that is wanted, if it has it
    :param seed: of the first episode, the next one having the next seed and so on; not seeded if None
    :raises QAError: when it cannot be made
    """
    if frame_stack < 1:
        raise QAError(f"--frame-stack got {frame_stack}; expected at least 1; give e.g. 4")
    if seed is not None:
        check_seed(seed)
    try:
        given = json.loads(kwargs)
        assert isinstance(given, dict)
    except (ValueError, AssertionError):
        raise QAError(
            f"--env-kwargs got {kwargs!r}; expected a JSON object; write e.g. '{{\"gravity\": -9.0}}'"
        ) from None
    mode: dict[str, Any] = {}
    if render and "render_mode" not in given:
        mode = {"render_mode": _render_mode(name, [render] if isinstance(render, str) else ["ansi", "rgb_array"])}
    make = partial(gym.make, name, **given, **mode)
    try:
        env: VecEnv = DummyVecEnv([make] * n_envs) if seed is None else seeded_vec_env(make, n_envs, seed)
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise QAError(
            f"--env got {name!r} ({error}); expected a registered environment; write module:Name-v0 to import the module that "
            "registers it"
        ) from error
    except TypeError as error:
        if not given:
            raise
        raise QAError(
            f"--env-kwargs got {kwargs!r} ({error}); expected arguments that {name} takes; leave out those that it does not"
        ) from error
    if frame_stack > 1:
        env = VecFrameStack(env, frame_stack)
    if normalize is not None:
        if not normalize.exists():
            raise QAError(
                f"there is no file {str(normalize)!r}; expected one written by VecNormalize.save(); mend the path"
            )
        env = VecNormalize.load(str(normalize), env)
        env.training = False
    return env


def check_seed(seed: int) -> None:
    """Refuse what is no seed.

    :raises QAError: naming it
    """
    if seed < 0:
        raise QAError(f"--seed got {seed}; expected a whole number, at least 0; give e.g. 0")


def as_seen_by(agent: Agent, env: VecEnv) -> VecEnv:
    """``env`` with the channels of images where the policy has them; refuse one whose observations or actions are others.

    :raises QAError: naming both
    """
    policy = agent.qa.policy
    if env.observation_space != policy.observation_space and not is_vecenv_wrapped(env, VecTransposeImage):
        try:
            turned = VecTransposeImage(env)
            env = turned if turned.observation_space == policy.observation_space else env
        except AssertionError:  # no images
            pass
    shapes = [getattr(space, "shape", None) for space in (env.observation_space, policy.observation_space)]
    if shapes[0] != shapes[1] or env.action_space != policy.action_space:
        raise QAError(
            f"--env has {env.observation_space} and {env.action_space}; expected those of the agent, {policy.observation_space} and "
            f"{policy.action_space}; give its own environment, and --frame-stack or --normalize as in training"
        )
    return env


def _render_mode(name: str, wanted: Sequence[str]) -> str | None:
    """The first of these ways in which the environment can show itself."""
    try:
        env = gym.make(name)
    except Exception:  # gym.make says it better, later
        return None
    modes = env.metadata.get("render_modes", [])
    env.close()
    return next((mode for mode in wanted if mode in modes), None)
