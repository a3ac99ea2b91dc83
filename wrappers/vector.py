"""The wrappers for ``gymnasium.vector``, under the names of the single forms and with their behaviour.

Infos are gymnasium's: for each key an array over the environments, and under ``_key`` a mask of those that told it. Which
step belongs to which episode depends on how the environments reset themselves (``metadata["autoreset_mode"]``):

- ``NEXT_STEP``: the step after an episode's end ignores the action and resets. Nothing is vetoed or shaped in it, and what is
  told with it is told of the first state, as by ``reset``.
- ``SAME_STEP``: the last step is told of in ``infos["final_info"]``, the first state of the next episode in ``infos``.
- ``DISABLED``: ``reset(options={"reset_mask": ...})`` begins new episodes, and tells of them, where the mask says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.sharing import SharedAnswerer
from sb3_qa.wrappers.answer import AnswerRule, Asked
from sb3_qa.wrappers.shape import Rewards, ShapeRule
from sb3_qa.wrappers.shell import (
    QA,
    Arrival,
    Info,
    Rule,
    as_answerer,
    check_spaces,
    plain,
    refuse_normalized,
    row,
)
from sb3_qa.wrappers.substitutes import OnVeto
from sb3_qa.wrappers.veto_rule import Record, VetoRule

__all__ = ["AnswerQuestions", "ShapeReward", "VectorQAWrapper", "VetoAction"]

MODES = ("NextStep", "SameStep", "Disabled")


class VectorQAWrapper(VectorWrapper[Any, Any, Any, Any, Any]):
    """Shell for a gymnasium vector environment."""

    def __init__(self, env: VectorEnv[Any, Any, Any], rule: Rule, qa: QA) -> None:
        if not isinstance(env, VectorEnv):
            what = "gymnasium.Env" if isinstance(env, gym.Env) else type(env).__name__
            other = f"sb3_qa.wrappers.{rule.name}" if isinstance(env, gym.Env) else f"sb3_qa.wrappers.Vec{rule.name}"
            raise QAError(
                f"sb3_qa.wrappers.vector.{rule.name} got a {what}; expected a gymnasium.vector.VectorEnv; wrap it in {other}"
            )
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        self.mode = str(getattr(mode, "value", mode))
        if self.mode not in MODES:
            raise QAError(
                f'{rule.name} got {env}, whose metadata["autoreset_mode"] is {mode!r}; expected how its environments reset themselves, as '
                'the answers at the end of an episode depend on it; set env.metadata["autoreset_mode"] = AutoresetMode.NEXT_STEP, or '
                "what it does"
            )
        self.rule = rule
        self._resetting = np.zeros(env.num_envs, np.bool_)  # whose next step ignores the action and resets
        self._first_infos: Info | None = None  # what was told at the reset, until the first step
        space = copy.deepcopy(env.single_action_space)
        space.seed(0)
        self._any_action: Any = space.sample()
        answerer = as_answerer(rule.name, qa)
        if answerer is not None:
            self.bind(answerer)
        rule.watch(self)

    def close(self, **kwargs: Any) -> None:
        self.rule.close()
        super().close(**kwargs)

    def bind(self, qa: QuestionAnswerer | SharedAnswerer) -> None:
        """Let ``qa`` answer from now on; it must know observations like these environments'.

        :raises QAError: when it does not
        """
        if isinstance(qa, SharedAnswerer):
            qa = qa.open()
        name = type(self).__name__
        refuse_normalized(name, f"Vec{name}", qa)
        check_spaces(name, qa, self.single_observation_space, self.single_action_space)
        self.rule.bind(qa)
        if self.rule.obs is not None:  # bound after a reset: tell now what the reset could not
            told = self.rule.begin(np.arange(self.num_envs))
            if self._first_infos is not None:
                _tell(self._first_infos, told)

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: Info | None = None) -> tuple[Any, Info]:
        mask = (options or {}).get("reset_mask")  # which the environment takes out of the options
        each = None if seed is None or isinstance(seed, int) else list(seed)
        first = seed if each is None else next((one for one in each if one is not None), None)
        if first is not None:
            self.rule.seed(first, each)  # type: ignore[arg-type]
        obs, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        new = np.ones(self.num_envs, np.bool_) if mask is None else np.array(mask, np.bool_)
        self.rule.started(_copied(obs), None if mask is None else new)
        self._resetting &= ~new
        self._first_infos = infos = dict(infos)
        if self.rule.qa is not None:
            self._tell_first(infos, _rows(infos, self.num_envs), new)
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, Info]:
        rule, idle = self.rule, self._resetting
        self._first_infos = None
        if not rule.ready():
            obs, rewards, terminated, truncated, infos = self.env.step(actions)
            rule.passed(_copied(obs))
            self._note_ends(terminated | truncated)
            return obs, rewards, terminated, truncated, infos
        given = np.asarray(actions)
        rule.acting = ~idle
        chosen = rule.act(_put(given, idle, self._any_action))
        obs, rewards, terminated, truncated, infos = self.env.step(_put(chosen, idle, given[idle]))
        done = terminated | truncated
        infos = dict(infos)
        told = _rows(infos, self.num_envs, whole=True)
        if self.mode == "SameStep" and done.any():
            last = _rows(infos.get("final_info", {}), self.num_envs, whole=True)
            steps = [last[i] if over else told[i] for i, over in enumerate(done)]
            self._take_final_obs(infos, steps, done)
        else:
            steps = [{} if no else one for one, no in zip(told, idle, strict=True)]
        rewards = np.asarray(rewards)
        begun = {"SameStep": done, "NextStep": idle}.get(self.mode, np.zeros_like(done))
        arrival = Arrival(_copied(obs), rewards, done, terminated, steps, rule.remembered(begun))
        rule.arrive(chosen, arrival)
        rule.moved(arrival)
        self._note_ends(done)
        if self.mode == "SameStep" and done.any():
            infos["final_info"] = dict(infos.get("final_info", {}))
            infos["_final_info"] = done.copy()
            _tell(infos["final_info"], [one if over else {} for one, over in zip(steps, done, strict=True)])
            self._tell_first(infos, [{} if over else one for one, over in zip(steps, done, strict=True)], done)
        else:
            self._tell_first(infos, steps, idle)
        return obs, np.where(idle, rewards, arrival.rewards), terminated, truncated, infos

    def _tell_first(self, infos: Info, told: list[Info], new: NDArray[np.bool_]) -> None:
        """Tell what was told of steps, and of the first states of those environments that are in a new episode."""
        if new.any():
            here = _rows(infos, self.num_envs)
            for i, first in zip(new.nonzero()[0].tolist(), self.rule.begin(new.nonzero()[0]), strict=True):
                told[i] = here[i] | first
        _tell(infos, told)

    def _note_ends(self, done: NDArray[np.bool_]) -> None:
        self._resetting = np.array(done) if self.mode == "NextStep" else np.zeros(self.num_envs, np.bool_)

    def _take_final_obs(self, infos: Info, steps: list[Info], done: NDArray[np.bool_]) -> None:
        if "final_obs" not in infos:
            raise QAError(
                f'{type(self).__name__} got the end of an episode without infos["final_obs"]; expected the last observation there, as '
                "autoreset_mode is SAME_STEP; mend the environment, or use NEXT_STEP"
            )
        for i in done.nonzero()[0]:
            steps[i]["terminal_observation"] = row(infos["final_obs"], i)


class AnswerQuestions(VectorQAWrapper):
    """Put the answers into ``infos`` at every step, reset included, see :class:`sb3_qa.wrappers.AnswerQuestions`.

    >>> import gymnasium as gym
    >>> envs = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    >>> envs = AnswerQuestions(envs, ["crash[k=5]"], qa="driver.qa")  # doctest: +SKIP
    >>> envs.reset(seed=0)[1]["qa/crash[k=5]"]  # doctest: +SKIP
    array([0.02, 0.01, 0.04])
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        questions: Asked = None,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        super().__init__(env, AnswerRule("AnswerQuestions", questions, qa, unbound), qa)


class ShapeReward(VectorQAWrapper):
    """Make the reward of answers, see :class:`sb3_qa.wrappers.VecShapeReward`, which says what the arguments mean."""

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        rewards: Rewards,
        mode: str = "add",
        gamma: float | None = None,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        super().__init__(env, ShapeRule("ShapeReward", rewards, mode, gamma, qa, unbound), qa)


class VetoAction(VectorQAWrapper):
    """Veto actions judged catastrophic, see :class:`sb3_qa.wrappers.VecVetoAction`, which says what the arguments mean."""

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        question: str,
        threshold: float | Certificate,
        on_veto: OnVeto = "safest",
        shadow: bool = False,
        penalty: float = 0.0,
        seed: int = 0,
        qa: QA = None,
        unbound: str = "error",
        *,
        candidates: str = "all",
        refine: int | None = None,
        cooldown: int = 0,
        budget: int | None = None,
        let_through: float = 0.0,
        record: Record = None,
    ) -> None:
        rule = VetoRule(
            "VetoAction",
            question,
            threshold,
            on_veto,
            shadow,
            penalty,
            seed,
            qa,
            unbound,
            candidates=candidates,
            refine=refine,
            cooldown=cooldown,
            budget=budget,
            let_through=let_through,
            record=record,
        )
        super().__init__(env, rule, qa)


def _copied(obs: Any) -> Any:
    """In memory of its own: with ``copy=False`` the next observations are written over these."""
    return {key: np.array(value) for key, value in obs.items()} if isinstance(obs, dict) else np.array(obs)


def _put(actions: NDArray[Any], where: NDArray[np.bool_], value: Any) -> NDArray[Any]:
    """A copy of the actions with others in some environments, or the actions themselves if there are none."""
    if not where.any():
        return actions
    actions = actions.copy()
    actions[where] = value
    return actions


def _rows(infos: Info, n: int, whole: bool = False) -> list[Info]:
    """What question-answering wrappers further in have told of each environment.

    :param whole: what the environments have told too, but for dictionaries
    """
    rows: list[Info] = [{} for _ in range(n)]
    for key in _told(infos) if whole else _keys(infos):
        for i in np.flatnonzero(infos.get(f"_{key}", np.ones(n, np.bool_))).tolist():
            value = infos[key][i]
            rows[i][key] = plain(value) if isinstance(value, (np.generic, np.ndarray)) else value
    return rows


def _told(infos: Info) -> list[str]:
    return [key for key, value in infos.items() if f"_{key}" in infos and isinstance(value, np.ndarray)]


def _tell(infos: Info, rows: list[Info]) -> None:
    """Put what is told of each environment into vector infos: arrays, of zeros where nothing is told, and masks."""
    for key in dict.fromkeys(key for one in rows for key in _keys(one)):
        blank = np.zeros_like(next(one[key] for one in rows if key in one))
        infos[key] = np.array([one.get(key, blank) for one in rows])
        infos[f"_{key}"] = np.array([key in one for one in rows])


def _keys(info: Iterable[str]) -> list[str]:
    return [key for key in info if key.startswith("qa/")]
