"""Wrappers that stand where rl_zoo3 puts them, and see what the policy sees all the same."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn, VecEnvWrapper

from sb3_qa import wrappers
from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.policies.mixin import LEARNERS
from sb3_qa.wrappers.shell import QA, VecQAWrapper, as_answerer

__all__ = ["Seat", "VecAnswerQuestions", "VecShapeReward", "VecVetoAction"]


class Seat(VecEnvWrapper):
    """Keeps a place for a question-answering wrapper, which is taken out of it in one of two ways.

    In training, :class:`sb3_qa.zoo.QACallback` puts the wrapper outermost, and nothing stays here. Where no callback runs,
    as in rl_zoo3's ``enjoy``, the seat finds out at ``reset`` which wrappers are around it, and puts the wrapper around
    likenesses of them, through which it sees what the policy sees. It is then answered by the only model with questions that
    lives in this process, which is the one being enjoyed.

    :param qa: a QuestionAnswerer or the path of a saved one, to answer instead of the model
    :param options: of the wrapper
    """

    wrapper: ClassVar[type[VecQAWrapper]]

    def __init__(self, venv: VecEnv, *args: Any, qa: QA = None, **options: Any) -> None:
        if not isinstance(venv, VecEnv):
            raise QAError(
                f"{self._name()} got a {type(venv).__name__}; expected a VecEnv; name it under vec_env_wrapper, not under env_wrapper"
            )
        if options.get("unbound", "error") != "error":
            raise QAError(
                f'{self._name()} got unbound={options["unbound"]!r}; expected "error", as it finds an answerer by itself; leave it out'
            )
        super().__init__(venv)
        self._tap = _Tap(venv)
        self.seated = self.wrapper(self._tap, *args, **options)
        """The wrapper; it answers once it has been placed."""
        self._qa = as_answerer(self._name(), qa)
        self.seated.rule.own = self._qa is not None
        self._around: list[VecEnvWrapper] = []
        self._placed = False

    @classmethod
    def _name(cls) -> str:
        return f"sb3_qa.zoo.{cls.__name__}"

    def leave(self, venv: VecEnv, obs: Any = None) -> VecQAWrapper:
        """Put the wrapper around ``venv``, and leave the seat empty.

        :param obs: (n_envs, ...), which the agent is about to act on there; None before a reset
        :raises QAError: when its own answerer does not fit there
        """
        if obs is not None:
            self.seated.rule.started(obs)
        self._place(venv)
        return self.seated

    def reset(self) -> Any:
        obs = self._tap.obs = self.venv.reset()
        self._around = _around(self)
        if self._placed:
            self.seated.reset()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        if not self._placed:
            self._sit_down()
        self.seated.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        _, rewards, _, infos = self.seated.step_wait()
        for told, seen in zip(self._tap.infos, infos, strict=True):
            told.update({key: value for key, value in seen.items() if key.startswith("qa/")})
        return self._tap.obs, rewards, self._tap.dones, self._tap.infos

    def close(self) -> None:
        self.seated.rule.close()
        self.venv.close()

    def _place(self, venv: VecEnv) -> None:
        seated = self.seated
        seated.venv, seated.observation_space, self._placed = venv, venv.observation_space, True
        seated.rule.watch(seated)
        if self._qa is not None:
            seated.bind(self._qa)

    def _sit_down(self) -> None:
        """Nobody has put the wrapper elsewhere before the first step."""
        venv: VecEnv = self._tap
        for outer in self._around:
            venv = _likeness(self._name(), outer, venv)
        self._place(venv)
        if self._qa is None:
            normalized = any(isinstance(outer, VecNormalize) and outer.norm_obs for outer in self._around)
            self.seated.bind(QuestionAnswerer(_only_learner(self._name()), normalized=normalized))
        self.seated.reset()


class VecAnswerQuestions(Seat):
    """:class:`sb3_qa.wrappers.VecAnswerQuestions`, for ``vec_env_wrapper`` in rl_zoo3's hyperparameters."""

    wrapper = wrappers.VecAnswerQuestions


class VecShapeReward(Seat):
    """:class:`sb3_qa.wrappers.VecShapeReward`, for ``vec_env_wrapper`` in rl_zoo3's hyperparameters."""

    wrapper = wrappers.VecShapeReward


class VecVetoAction(Seat):
    """:class:`sb3_qa.wrappers.VecVetoAction`, for ``vec_env_wrapper`` in rl_zoo3's hyperparameters."""

    wrapper = wrappers.VecVetoAction


class _Tap(VecEnvWrapper):
    """The environment in the seat, as the likenesses around it see it: what it gave last is kept as it was."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.obs: Any = None
        self.dones: NDArray[np.bool_] = np.zeros(venv.num_envs, np.bool_)
        self.infos: list[dict[str, Any]] = []

    def reset(self) -> Any:
        """The seat has reset the environment already."""
        return self.obs

    def step_wait(self) -> VecEnvStepReturn:
        self.obs, rewards, self.dones, self.infos = self.venv.step_wait()
        return self.obs, rewards, self.dones, [dict(info) for info in self.infos]


def unseat(env: VecEnv, obs: Any = None) -> VecEnv:
    """The environment with the wrappers of all its seats outermost, in their order; the same one where there are no seats.

    :param obs: (n_envs, ...), which the agent is about to act on; None before a reset
    """
    seats: list[Seat] = []
    outer, inner = None, env
    while isinstance(inner, VecEnvWrapper):
        if isinstance(inner, Seat):
            seats.append(inner)
            if outer is None:
                env = inner.venv
            else:
                outer.venv = inner.venv
        else:
            outer = inner
        inner = inner.venv
    for seat in reversed(seats):
        env = seat.leave(env, obs)
    return env


def _around(env: VecEnv) -> list[VecEnvWrapper]:
    """The wrappers whose ``reset`` is under way around that of ``env``, innermost first.

    A wrapper is not told what it is wrapped in. Those around are the ones that are calling it.
    """
    found: list[VecEnvWrapper] = []
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, VecEnvWrapper) and caller.venv is (found[-1] if found else env):
            found.append(caller)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _likeness(name: str, outer: VecEnvWrapper, venv: VecEnv) -> VecEnv:
    """A wrapper around ``venv`` that makes the same observations as ``outer`` does."""
    if isinstance(outer, (Seat, VecQAWrapper, VecMonitor, VecCheckNan, VecVideoRecorder)):
        return venv
    if isinstance(outer, VecNormalize):
        if outer.training and outer.norm_obs:
            raise QAError(
                f"{name} stands inside a VecNormalize that is still learning its statistics, so it is always a step behind what the "
                "policy sees; expected to have been put outside of it; give the hyperparameters callback: sb3_qa.zoo.QACallback"
            )
        likeness = copy.copy(outer)  # with the same statistics, and without an environment
        likeness.norm_reward = False
        likeness.set_venv(venv)
        return likeness
    if isinstance(outer, VecFrameStack):
        stack = VecFrameStack(venv, outer.stacked_obs.n_stack)
        stack.stacked_obs = copy.deepcopy(outer.stacked_obs)  # whose channels may be stacked in another order
        stack.observation_space = outer.observation_space
        return stack
    if isinstance(outer, VecTransposeImage):
        return VecTransposeImage(venv)
    raise QAError(
        f"{name} stands inside {type(outer).__name__}, and cannot tell what observations that makes; expected VecNormalize, VecFrameStack "
        f"or VecTransposeImage; put it outside: {name.replace('.zoo.', '.wrappers.')}({type(outer).__name__}(env, ...), ...)"
    )


def _only_learner(name: str) -> Any:
    """The policy of the only model with questions that lives in this process.

    :raises QAError: when there is none, or there are several
    """
    alive: Sequence[Any] = list(LEARNERS)
    if len(alive) > 1:
        gc.collect()  # models lie in cycles of references
        alive = list(LEARNERS)
    if len(alive) != 1:
        raise QAError(
            f"{name} found {len(alive) or 'no'} models with questions in this process; expected one, to go by its answers; train with a "
            "policy of sb3_qa.policies and callback: sb3_qa.zoo.QACallback, or give the wrapper qa: PATH of a saved answerer"
        )
    return alive[0]
