"""Tell the answers, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.errors import QAError
from sb3_qa.question_file import is_question_file, load_questions
from sb3_qa.questions import nearest
from sb3_qa.values import PointValues
from sb3_qa.wrappers.shell import QA, Arrival, Info, QAWrapper, Rule, VecQAWrapper
from sb3_qa.wrappers.specification import as_data, recorded

__all__ = ["AnswerQuestions", "AnswerRule", "Asked", "VecAnswerQuestions"]

Asked = Sequence[str] | str | PathLike[str] | None


class AnswerRule(Rule):
    """``info["qa/<instance>"]``: a question about the state is asked of the state arrived in, one about an action of the
    action executed. At a reset no action has been executed yet; the one the policy prefers stands for it.
    """

    def __init__(self, name: str, questions: Asked, qa: QA, unbound: str) -> None:
        super().__init__(name, qa, unbound)
        self.texts: dict[str, str] = {}
        if is_question_file(questions):
            instances = [instance for question in load_questions(questions) for instance in question.instances]
            self.texts = {instance.key: instance.text for instance in instances}
            questions = list(self.texts)
        keys = None if questions is None or isinstance(questions, (str, PathLike)) else list(questions)
        if questions is not None and (keys is None or not all(isinstance(key, str) for key in keys)):
            raise QAError(
                f"{name} got questions={questions!r}; expected a list of instances' keys, a question file, or None for all; write e.g. "
                '["crash[k=5]"]'
            )
        self.questions = keys
        self.values: PointValues | None = None
        self._info_keys: list[str] = []
        self._first: tuple[Any, NDArray[np.intp], NDArray[np.float32]] | None = None
        """Where a step has begun episodes: its observations, which environments, and their point values."""

    def bind(self, qa: QuestionAnswerer) -> None:
        known = {*qa.catalogue.instances, *qa.catalogue.held_out}
        unknown = [key for key in self.questions or [] if key not in known]
        if unknown:
            meant = next((key for key, each in qa.catalogue.instances.items() if each.text == unknown[0]), None)
            if meant is not None:
                raise QAError(
                    f"{self.name} got the text {unknown[0]!r}; expected the key of an instance; write {meant!r}"
                )
            raise QAError(
                f"{self.name} got an answerer that was not taught {', '.join(map(repr, unknown))}; there is no question {unknown[0]!r}; "
                f"expected one of {nearest(unknown[0], qa.questions)}; ask one of its questions, or give the answerer that learnt these"
            )
        for key, text in self.texts.items():
            if qa.catalogue.find(key).text != text:
                raise QAError(
                    f"{self.name} got an answerer whose {key!r} is {qa.catalogue.find(key).text!r}; expected {text!r}, as in the "
                    "question file; give the answerer that learnt from it"
                )
        super().bind(qa)

    def on_bind(self, qa: QuestionAnswerer) -> None:
        self.values = qa.values(qa.questions if self.questions is None else self.questions)
        self._info_keys = [f"qa/{key}" for key in self.values.keys]

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        return self.told(self.at_first(index))

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        for info, told in zip(arrival.infos, self.told(self.answers(actions, arrival)), strict=True):
            info.update(told)

    def at_first(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Point values (len(index), n_questions) where nothing has been done yet."""
        assert self.values is not None
        known, self._first = self._first, None
        if known is not None and known[0] is self.obs and np.array_equal(known[1], index):
            return known[2]
        here = self.here.part(index)
        return self.values.of_step(here, here.preferred() if self.values.any_action else None, here)

    def answers(self, actions: NDArray[Any], arrival: Arrival) -> NDArray[np.float32]:
        """Point values (n, n_questions) of a step."""
        assert self.values is not None and self.qa is not None
        here = there = self.here
        self._first = None
        executed = self.executed(actions, arrival.infos)
        if not self.values.any_state:
            return self.values.of_step(here, executed, there)
        ended = arrival.done.nonzero()[0]
        if not len(ended):
            return self.values.of_step(here, executed, self.qa.read(arrival.obs, arrival.memory))
        memory = None
        if here.memory is not None:  # of a recurrent policy: nothing has begun anew there
            memory = here.part(ended).remembered(np.zeros(len(ended), np.bool_))
        there, last = self.qa.read_both(arrival.obs, arrival.memory, arrival.last_obs(ended), memory)
        first, there = there.part(ended), there.with_states(ended, last)
        if not first.can_be_joined:
            return self.values.of_step(here, executed, there)
        # What is asked where the next episodes begin, asked at once.
        if self.values.any_action:
            executed = np.concatenate([executed, first.preferred()])
        table = self.values.of_step(Reading.joined([here, first]), executed, Reading.joined([there, first]))
        self._first = arrival.obs, ended, table[len(here) :]
        return table[: len(here)]

    def told(self, table: NDArray[np.float32]) -> list[Info]:
        """Answers as entries of infos."""
        return [dict(zip(self._info_keys, row, strict=True)) for row in table.tolist()]


class AnswerQuestions(QAWrapper, RecordConstructorArgs):
    """Put the answers into ``info`` at every step, reset included. Vector form: :class:`VecAnswerQuestions`.

    :param questions: keys of the instances to answer, a question file to answer all of, or None for all
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(self, env: gym.Env[Any, Any], questions: Asked = None, qa: QA = None, unbound: str = "error") -> None:
        rule = AnswerRule("AnswerQuestions", questions, qa, unbound)
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, questions=as_data(rule.questions), qa=recorded(qa), unbound=unbound
        )
        QAWrapper.__init__(self, env, rule, qa)


class VecAnswerQuestions(VecQAWrapper):
    """Put the answers into each ``info`` at every step, and into ``reset_infos``. Single form: :class:`AnswerQuestions`.

    :param questions: keys of the instances to answer, a question file to answer all of, or None for all
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(self, venv: VecEnv, questions: Asked = None, qa: QA = None, unbound: str = "error") -> None:
        super().__init__(venv, AnswerRule("VecAnswerQuestions", questions, qa, unbound), qa)
