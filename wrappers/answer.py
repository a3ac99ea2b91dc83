"""Tell the answers, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.values import PointValues
from sb3_qa.wrappers.shell import QA, Arrival, Info, QAWrapper, Rule, VecQAWrapper

__all__ = ["AnswerQuestions", "AnswerRule", "VecAnswerQuestions"]


class AnswerRule(Rule):
    """``info["qa/<instance>"]``: a question about the state is asked of the state arrived in, one about an action of the
    action executed. At a reset no action has been executed yet; the one the policy prefers stands for it.
    """

    def __init__(self, name: str, questions: Sequence[str] | None, qa: QA, unbound: str) -> None:
        super().__init__(name, qa, unbound)
        self.questions = questions
        self.values: PointValues | None = None

    def on_bind(self, qa: QuestionAnswerer) -> None:
        self.values = qa.values(qa.questions if self.questions is None else list(self.questions))

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        assert self.values is not None
        here = self.here
        about_action = self.values.of_actions(here, here.preferred()) if self.values.action_columns else None
        table = self.table(self.values.of_states(here) if self.values.state_columns else None, about_action)
        return [self.told(row) for row in table[index].tolist()]

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        table = self.answers(actions, arrival)
        for info, row in zip(arrival.infos, table.tolist(), strict=True):
            info.update(self.told(row))

    def answers(self, actions: NDArray[Any], arrival: Arrival) -> NDArray[np.float32]:
        """Point values (n, n_questions) of a step."""
        assert self.values is not None and self.qa is not None
        about_action = about_state = None
        if self.values.action_columns:
            about_action = self.values.of_actions(self.here, self.executed(actions, arrival.infos))
        if self.values.state_columns:
            about_state = self.values.of_states(self.qa.read(arrival.obs))
            ended = np.flatnonzero(arrival.done)
            if len(ended):
                about_state[ended] = self.values.of_states(self.qa.read(arrival.last_obs(ended), keep=False))
        return self.table(about_state, about_action)

    def table(self, about_state: NDArray[np.float32] | None, about_action: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Both kinds of answers in the order of the questions."""
        assert self.values is not None
        n = len(about_state if about_state is not None else about_action)  # type: ignore[arg-type]
        table = np.empty((n, len(self.values.keys)), np.float32)
        if about_state is not None:
            table[:, self.values.state_columns] = about_state
        if about_action is not None:
            table[:, self.values.action_columns] = about_action
        return table

    def told(self, row: list[float]) -> Info:
        """One row of the table as info entries."""
        assert self.values is not None
        return dict(zip([f"qa/{key}" for key in self.values.keys], row, strict=True))


class AnswerQuestions(QAWrapper, RecordConstructorArgs):
    """Put the answers into ``info`` at every step, reset included. Vector form: :class:`VecAnswerQuestions`.

    :param questions: keys of the instances to answer, all if None
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(
        self, env: gym.Env[Any, Any], questions: Sequence[str] | None = None, qa: QA = None, unbound: str = "error"
    ) -> None:
        RecordConstructorArgs.__init__(self, questions=questions, qa=qa, unbound=unbound)
        QAWrapper.__init__(self, env, AnswerRule("AnswerQuestions", questions, qa, unbound), qa)


class VecAnswerQuestions(VecQAWrapper):
    """Put the answers into each ``info`` at every step, and into ``reset_infos``. Single form: :class:`AnswerQuestions`.

    :param questions: keys of the instances to answer, all if None
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(self, venv: VecEnv, questions: Sequence[str] | None = None, qa: QA = None, unbound: str = "error") -> None:
        super().__init__(venv, AnswerRule("VecAnswerQuestions", questions, qa, unbound), qa)
