"""Make the reward of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.named import function_named, is_function_name
from sb3_qa.questions import Choice
from sb3_qa.wrappers.answer import AnswerRule
from sb3_qa.wrappers.shell import QA, Arrival, Info, QAWrapper, VecQAWrapper
from sb3_qa.wrappers.specification import as_data, recorded

__all__ = ["Rewards", "ShapeReward", "ShapeRule", "VecShapeReward", "potential_shaping"]

Floats = NDArray[np.float32]
Weights = Mapping[str, float] | Callable[[dict[str, Floats]], Any]
Rewards = Weights | str
"""Weights of instances, or a callable of the answers: a dict from instance to point values (n_envs,); or the callable's name,
``"package.module:function"``, where only plain data can be given."""


def potential_shaping(
    potential_tm1: Floats, potential_t: Floats, terminated: NDArray[np.bool_], gamma: float
) -> Floats:
    """F = gamma * Phi(s_t) - Phi(s_{t-1}), with Phi = 0 in a terminal state, so that the best policy stays the best.

    Sources: Ng, Harada and Russell 1999; for the terminal state Grzes 2017; for a potential that changes while it is
    learnt, evaluated when its state was visited, Devlin and Kudenko 2012.

    :param potential_tm1: (n,) of the states left
    :param potential_t: (n,) of the states arrived in
    :param terminated: (n,)
    """
    return np.asarray(gamma * np.where(terminated, 0.0, potential_t) - potential_tm1, np.float32)


class ShapeRule(AnswerRule):
    """reward + shaping ("add", "potential") or shaping alone ("replace")."""

    def __init__(self, name: str, rewards: Rewards, mode: str, gamma: float | None, qa: QA, unbound: str) -> None:
        if mode not in ("add", "replace", "potential"):
            raise QAError(f'{name} got mode={mode!r}; expected "add", "replace" or "potential"; give one of them')
        if gamma is not None and (not isinstance(gamma, Real) or not 0.0 <= gamma <= 1.0):
            raise QAError(f"{name} got gamma={gamma!r}; expected a number in [0, 1]; give the agent's discount")
        if isinstance(rewards, str) and is_function_name(rewards):
            rewards = function_named(rewards, f"{name}, rewards,")
        if not callable(rewards):
            if not isinstance(rewards, Mapping) or not rewards:
                raise QAError(
                    f'{name} got rewards={rewards!r}; expected weights of instances; give e.g. {{"crash[k=5]": -1.0}}'
                )
            for key, weight in rewards.items():
                if isinstance(weight, bool) or not isinstance(weight, Real) or not np.isfinite(weight):
                    raise QAError(
                        f"{name} got the weight {weight!r} for {key!r}; expected a finite number; give e.g. -1.0"
                    )
        super().__init__(name, None if callable(rewards) else list(rewards), qa, unbound)
        self.rewards: Weights = rewards if callable(rewards) else dict(rewards)
        self.mode = mode
        self.gamma = gamma
        self.discount: float | None = gamma
        self._potential: Floats | None = None

    def on_bind(self, qa: QuestionAnswerer) -> None:
        super().on_bind(qa)
        assert self.values is not None
        for key in self.values.keys:
            instance = qa.catalogue.find(key)
            if self.mode == "potential" and instance.per_action and not callable(self.rewards):
                raise QAError(
                    f'{self.name} got {key!r} in mode="potential"; expected a question about the state; drop {{action}} from it'
                )
            if isinstance(instance.question.answer, Choice) and not callable(self.rewards):
                raise QAError(
                    f"{self.name} got a weight for the choice {key!r}; expected a number; make rewards a callable of the answers"
                )
        if self.mode == "potential":
            if callable(self.rewards):  # the callable may look at questions about the state only
                self.questions = [key for key in self.values.keys if not qa.catalogue.find(key).per_action]
                super().on_bind(qa)
            if self.discount is None:
                raise QAError(
                    f'{self.name} got mode="potential" without gamma; expected the agent\'s discount; give gamma=model.gamma'
                )

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        table = self.at_first(index)
        if self.mode == "potential":
            if self._potential is None or len(self._potential) != len(self.here):
                self._potential = np.zeros(len(self.here), np.float32)
            self._potential[index] = self.weigh(table)
        return [{**told, "qa/raw_reward": 0.0, "qa/shaping_reward": 0.0} for told in self.told(table)]

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        table = self.answers(actions, arrival)
        shaping = self.weigh(table)
        if self.mode == "potential":
            assert self._potential is not None and self.discount is not None
            potential, shaping = shaping, potential_shaping(self._potential, shaping, arrival.terminated, self.discount)
            self._potential = np.array(potential)  # of those that ended, `begin` sets the new episode's
        raw = arrival.rewards
        arrival.rewards = (shaping if self.mode == "replace" else raw + shaping).astype(raw.dtype)
        for info, told in zip(arrival.infos, self.told(table), strict=True):
            info.update(told)
        self.tell_rewards(raw, arrival, None if self.mode != "replace" else shaping)

    def weigh(self, table: Floats) -> Floats:
        """The reward (n,) in the answers (n, n_questions).

        :raises QAError: where it is not finite, as an agent that learnt from it would be lost
        """
        reward = self._weighed(table)
        if not np.isfinite(reward).all():
            i = int(np.argmin(np.isfinite(reward)))
            assert self.values is not None
            told = dict(zip(self.values.keys, table[i].tolist(), strict=True))
            raise QAError(
                f"{self.name} got the reward {reward[i]} of environment {i}, from the answers {told}; expected a finite number; look "
                "whether observations, weights of the network and rewards= are finite"
            )
        return reward

    def _weighed(self, table: Floats) -> Floats:
        assert self.values is not None
        if callable(self.rewards):
            told = np.asarray(self.rewards({key: table[:, n] for n, key in enumerate(self.values.keys)}), np.float32)
            if told.shape not in ((), (len(table),)):
                raise QAError(
                    f"{self.name}'s rewards callable gave the shape {told.shape}; expected {(len(table),)}; keep the first dimension"
                )
            return np.broadcast_to(told, (len(table),))
        return table @ np.array([self.rewards[key] for key in self.values.keys], np.float32)


class ShapeReward(QAWrapper, RecordConstructorArgs):
    """Make the reward of answers. Vector form: :class:`VecShapeReward`, which says what the arguments mean."""

    def __init__(
        self,
        env: gym.Env[Any, Any],
        rewards: Rewards,
        mode: str = "add",
        gamma: float | None = None,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        rule = ShapeRule("ShapeReward", rewards, mode, gamma, qa, unbound)
        RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            rewards=as_data(rule.rewards),
            mode=mode,
            gamma=as_data(gamma),
            qa=recorded(qa),
            unbound=unbound,
        )
        QAWrapper.__init__(self, env, rule, qa)


class VecShapeReward(VecQAWrapper):
    """Make the reward of answers. Single form: :class:`ShapeReward`.

    A question about the state is asked of the state arrived in (the true last one when an episode ends), one about an
    action of the action executed. ``info`` tells ``qa/raw_reward`` and ``qa/shaping_reward`` beside the answers.

    :param rewards: weights of instances, or a callable that makes (n_envs,) rewards from a dict of their point values
    :param mode: "add" to the reward, "replace" it, or "potential": add gamma * Phi(s') - Phi(s), where Phi is the
        weighted answer, which leaves the best policy as it is
    :param gamma: for "potential", the agent's discount; a QACallback fills it in
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(
        self,
        venv: VecEnv,
        rewards: Rewards,
        mode: str = "add",
        gamma: float | None = None,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        super().__init__(venv, ShapeRule("VecShapeReward", rewards, mode, gamma, qa, unbound), qa)
