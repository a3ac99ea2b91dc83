"""The reward of answers as a function of transitions: the ``RewardFn`` that imitation's wrappers and algorithms take."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.wrappers.shape import Rewards, ShapeRule, potential_shaping
from sb3_qa.wrappers.shell import Arrival, as_answerer

__all__ = ["QAReward"]

Floats = NDArray[np.float32]


class QAReward:
    """``reward_fn(state, action, next_state, done) -> (n,)``, as :class:`~sb3_qa.wrappers.VecShapeReward` would give.

    A question about the state is asked of ``next_state``, one about an action of ``action`` in ``state``. Only the reward made
    of answers is returned, as such a function is not told the environment's own.

    >>> reward_fn = QAReward("driver.qa", {"crash[k=5]": -1.0})  # doctest: +SKIP
    >>> RewardVecEnvWrapper(venv, reward_fn)  # doctest: +SKIP

    :param qa: a QuestionAnswerer, or the path of a saved one
    :param rewards: weights of instances, or a callable that makes (n,) rewards from a dict of their point values
    :param mode: "replace" (the weighted answers) or "potential" (gamma * Phi(s') - Phi(s) of them)
    :param gamma: for "potential", the agent's discount
    :param done_terminates: for "potential", whether ``done`` is a termination, after which Phi is 0. A function of a transition
        is not told a time limit from one: give False where episodes only ever end by a time limit, as imitation's do, and
        the agent's algorithm bootstraps there, as SB3's do
    :raises QAError: when anything does not fit, at once
    """

    def __init__(
        self,
        qa: QuestionAnswerer | str | PathLike[str],
        rewards: Rewards,
        mode: str = "replace",
        gamma: float | None = None,
        done_terminates: bool = True,
    ) -> None:
        if mode not in ("replace", "potential"):
            raise QAError(
                f'QAReward got mode={mode!r}; expected "replace" or "potential", as the environment\'s own reward is not told to it; '
                "give one of them"
            )
        answerer = as_answerer("QAReward", qa)
        if answerer is None:
            raise QAError("QAReward got qa=None; expected a QuestionAnswerer or the path of a saved one; give one")
        self.done_terminates = done_terminates
        self.rule = ShapeRule("QAReward", rewards, mode, gamma, answerer, "error")
        self.rule.bind(answerer)

    def __call__(self, state: Any, action: NDArray[Any], next_state: Any, done: NDArray[Any]) -> Floats:
        """Rewards of a batch of transitions.

        :param state: (n, *obs_shape), as the answerer's policy sees them
        :param action: (n, *action_shape); also (n, 1) for single numbers, as replay buffers hold them
        :param next_state: (n, *obs_shape); at the end of an episode its true last observation
        :param done: (n,), or (n, 1)
        :return: (n,)
        """
        rule = self.rule
        assert rule.qa is not None and rule.values is not None
        n = len(done)
        shape = (n, *(rule.qa.policy.action_space.shape or ()))
        action, done = np.asarray(action), np.asarray(done)
        if action.size != np.prod(shape) or done.size != n:
            raise QAError(
                f"QAReward got actions of the shape {action.shape} and done of {done.shape}; expected {shape} and {(n,)}; give one of "
                "each for every state"
            )
        action, done = action.reshape(shape).astype(rule.qa.policy.action_space.dtype), done.reshape(n).astype(np.bool_)
        before = Arrival(state, np.zeros(n, np.float32), np.zeros(n, np.bool_), done, [{} for _ in range(n)])
        after = Arrival(next_state, before.rewards, before.done, done, before.infos)
        rule.obs = state
        reward = rule.weigh(rule.answers(action, after))
        if rule.mode == "potential":  # about states only
            assert rule.discount is not None
            ends = done & self.done_terminates
            return potential_shaping(rule.weigh(rule.answers(action, before)), reward, ends, rule.discount)
        return np.array(reward, np.float32)
