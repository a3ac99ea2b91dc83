"""Veto actions that are judged catastrophic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.questions import YesNo
from sb3_qa.wrappers.answer import AnswerRule
from sb3_qa.wrappers.guard import guard_of, recorded_threshold
from sb3_qa.wrappers.shell import QA, Arrival, Info, QAWrapper, VecQAWrapper, no_action, plain, recorded, row

__all__ = ["RandomVetoRule", "VecRandomVeto", "VecVetoAction", "VetoAction", "VetoRule", "is_catastrophe", "safest"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
OnVeto = str | Callable[[Any, Any], Any]
CANDIDATES = 32  # of each source, where actions cannot be listed
LISTED = 256  # as many combinations of discrete parts are all looked at


def is_catastrophe(risk: Floats, threshold: float) -> Bools:
    """Risk >= threshold; a risk that is not finite counts as a catastrophe (fail closed)."""
    return ~(np.isfinite(risk) & (risk < threshold))


def safest(risk: Floats, preference: Floats | None = None, threshold: float = 0.0) -> NDArray[np.intp]:
    """Index of the candidate to take: the preferred one under the threshold, or else the one of the lowest risk.

    A risk that is not finite is higher than any other.

    :param risk: (n, m)
    :param preference: (n, m), e.g. the policy's log-probabilities; without, only the risk counts
    :return: (n,)
    """
    finite = np.where(np.isfinite(risk), risk, np.inf)
    lowest = np.argmin(finite, axis=1)
    if preference is None:
        return lowest
    allowed = ~is_catastrophe(risk, threshold)
    # What is allowed stays above what is not, even at a probability of 0.
    preferred = np.argmax(np.where(allowed, np.maximum(preference, np.finfo(np.float32).min), -np.inf), axis=1)
    return np.where(allowed.any(axis=1), preferred, lowest)


class VetoRule(AnswerRule):
    """Judge the proposed action; replace it when it is judged catastrophic, unless only watching.

    Beside that it tells the answer to its question as :class:`~sb3_qa.wrappers.answer.AnswerRule` does.
    """

    question: str
    threshold: float
    on_veto: OnVeto
    shadow: bool
    penalty: float
    rng: np.random.Generator
    _seed: int
    _warned: bool

    def __init__(
        self,
        name: str,
        question: str,
        threshold: float | Certificate,
        on_veto: OnVeto,
        shadow: bool,
        penalty: float,
        seed: int,
        qa: QA,
        unbound: str,
    ) -> None:
        super().__init__(name, [question], qa, unbound)
        self.guard = guard_of(name, question, threshold, shadow)
        limit: Any = threshold if self.guard is None else self.guard.certificate.threshold
        if isinstance(limit, bool) or not isinstance(limit, Real) or not 0.0 <= float(limit) <= 1.0:
            raise QAError(
                f"{name} got threshold={threshold!r}; expected a probability in [0, 1], or a Certificate; give e.g. 0.3"
            )
        if not (callable(on_veto) or on_veto in ("safest", "policy")):
            raise QAError(
                f'{name} got on_veto={on_veto!r}; expected "safest", "policy" or a callable (obs, proposed_action) -> action'
            )
        if isinstance(penalty, bool) or not isinstance(penalty, Real) or not penalty >= 0.0:
            raise QAError(
                f"{name} got penalty={penalty!r}; expected a number, at least 0; it is taken from the reward of a vetoed step"
            )
        self.question = question
        self.threshold = float(limit)
        self.on_veto = on_veto
        self.shadow = shadow
        self.penalty = float(penalty)
        self._seed = seed
        self.rng = np.random.default_rng(seed)
        self.space: spaces.Space[Any] = spaces.Discrete(1)
        self._listed: NDArray[Any] | None = None
        self._step: tuple[NDArray[Any], Floats, Bools, Bools] | None = None
        self._warned = False

    def seed(self, seed: int) -> None:
        self.rng = np.random.default_rng([self._seed, seed])

    def on_bind(self, qa: QuestionAnswerer) -> None:
        instance = qa.catalogue.find(self.question)
        if not isinstance(instance.question.answer, YesNo):
            raise QAError(
                f"{self.name} got {self.question!r}, answered by {instance.question.answer}; expected a yes/no question"
            )
        if instance.question.truth.operator == "always":
            raise QAError(
                f"{self.name} got {self.question!r}, where yes is good news; expected one where yes is the catastrophe; ask eventually()"
            )
        if not instance.per_action and not callable(self.on_veto):
            raise QAError(
                f"{self.name} got {self.question!r}, which is not about an action, so no action can be told safer; expected {{action}} in "
                "its text; or give on_veto a callable (obs, proposed_action) -> action"
            )
        if self.guard is not None:
            self.guard.bind(qa)
        super().on_bind(qa)
        # A copy, as it will be sampled from, and the agent's own random stream is left alone.
        self.space = copy.deepcopy(qa.policy.action_space)
        self._listed = _all_actions(self.space)

    def risk(self, actions: NDArray[Any] | None) -> Floats:
        """Risk (n,) of actions, or (n, m) of candidates or of all actions."""
        assert self.values is not None
        if self.values.any_action:
            return self.values.of_actions(self.here, actions)[..., 0]
        return self.values.of_states(self.here)[:, 0]

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        nobody = no_action(self.space)
        rewards = {"qa/raw_reward": 0.0, "qa/shaping_reward": 0.0} if self.penalty else {}
        table = self.at_first(index)
        verdicts = [_verdict(risk, False, False, nobody, nobody) for (risk,) in table.tolist()]
        infos = [{**told, **verdict, **rewards} for told, verdict in zip(self.told(table), verdicts, strict=True)]
        if self.guard is not None:
            self.guard.begin(index, infos)
        return infos

    def act(self, actions: NDArray[Any]) -> NDArray[Any]:
        if self.guard is not None:
            self.guard.check(self.qa)
        proposed = actions
        candidates, risk = None, None
        if self._listed is not None and self._about_action:
            risk = self.risk(None if isinstance(self.space, spaces.Discrete) else self._spread(self._listed))
            risk_of_proposed = risk[np.arange(len(actions)), self._index(actions)]
        else:
            risk_of_proposed = self.risk(actions)
        flagged = self.judge(risk_of_proposed)
        vetoed = np.zeros(len(actions), np.bool_)
        rows = np.flatnonzero(flagged)
        if len(rows) and not self.shadow:
            if callable(self.on_veto):
                replacement = np.stack([self._called(i, actions[i]) for i in rows.tolist()])
            else:
                candidates = self._spread(self._listed) if self._listed is not None else self._candidates(actions)
                risk = self.risk(candidates) if risk is None else risk
                self._complain(risk[rows])
                replacement = self.replace(actions, candidates, risk)[rows]
            actions = actions.copy()
            actions[rows] = replacement.reshape(actions[rows].shape)
            vetoed = (actions != proposed).reshape(len(actions), -1).any(axis=1)
        self._step = (proposed, risk_of_proposed, flagged, vetoed)
        return actions

    def judge(self, risk: Floats) -> Bools:
        """Which proposed actions (n,) are flagged."""
        return is_catastrophe(risk, self.threshold)

    def masks(self, possible: Bools) -> Bools:
        """Which actions (n, n_actions) may be sampled: those that would not be vetoed, or else the safest.

        :param possible: (n, n_actions), those the environment allows
        """
        if self.shadow or not self.ready() or not self._about_action:
            return possible
        risk = self.risk(None)
        masks: Bools = possible & ~is_catastrophe(risk, self.threshold)
        none = np.flatnonzero(~masks.any(axis=1))
        masks[none, safest(np.where(possible, risk, np.inf))[none]] = True
        return masks

    def replace(self, actions: NDArray[Any], candidates: NDArray[Any], risk: Floats) -> NDArray[Any]:
        """For each environment the candidate to execute instead."""
        # The copy is for torch, which warns of arrays that cannot be written to.
        preference = self.here.preference(np.array(candidates)) if self.on_veto == "policy" else None
        best = safest(risk, preference, self.threshold)
        rows = np.arange(len(best))
        chosen = np.array(candidates[rows, best])
        blind = ~np.isfinite(risk).any(axis=1)  # nothing is known to be safer: there is no reason to prefer any
        chosen[blind] = actions[blind]
        return chosen

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        assert self._step is not None
        proposed, risk, flagged, vetoed = self._step
        executed = self.executed(actions, arrival.infos)
        known = self._about_action and np.array_equal(executed, proposed)  # the risk is the answer, then
        answers = self.told(risk[:, None] if known else self.answers(actions, arrival))
        rows = zip(arrival.infos, answers, risk.tolist(), flagged.tolist(), vetoed.tolist(), strict=True)
        for i, (info, told, r, flag, veto) in enumerate(rows):
            veto = veto or bool(info.get("qa/vetoed", False))
            info.update(told, **_verdict(r, flag, veto, plain(proposed[i]), plain(executed[i])))
        if self.guard is not None:
            self.guard.watch(flagged, arrival)
        if self.penalty:
            raw = arrival.rewards
            arrival.rewards = (raw - self.penalty * vetoed).astype(raw.dtype)
            self.tell_rewards(raw, arrival)

    @property
    def _about_action(self) -> bool:
        assert self.values is not None
        return self.values.any_action

    def _called(self, i: int, proposed: Any) -> NDArray[Any]:
        """What the callable of a user executes instead."""
        assert callable(self.on_veto)
        given = self.on_veto(row(self.obs, i), plain(proposed))
        if np.shape(given) != np.shape(proposed):
            raise QAError(
                f"{self.name}'s on_veto callable gave {given!r}; expected an action of {self.space}; return one"
            )
        return np.asarray(given, proposed.dtype)

    def _candidates(self, actions: NDArray[Any]) -> NDArray[Any]:
        """(n, m, *action_shape): the proposed action, some of the policy's, and some from the whole space."""
        n, shape = len(actions), self.space.shape or ()
        own = self.here.sampled(CANDIDATES, int(self.rng.integers(2**31)))
        if isinstance(self.space, spaces.Box):
            anywhere = self.rng.uniform(self.space.low, self.space.high, (n, CANDIDATES, *shape))
        else:
            self.space.seed(int(self.rng.integers(2**31)))
            anywhere = np.stack([[self.space.sample() for _ in range(CANDIDATES)] for _ in range(n)])
        return np.concatenate([actions[:, None], own, anywhere.astype(actions.dtype)], axis=1)

    def _spread(self, listed: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(listed, (len(self.here), *listed.shape))

    def _index(self, actions: NDArray[Any]) -> NDArray[np.intp]:
        assert self._listed is not None
        same = (actions.reshape(len(actions), 1, -1) == self._listed.reshape(1, len(self._listed), -1)).all(axis=2)
        if not same.any(axis=1).all():
            raise QAError(
                f"{self.name} got the actions {actions.tolist()}; expected ones in {self.space}; note that SB3's policies count from 0"
            )
        return np.argmax(same, axis=1)

    def _complain(self, risk: Floats) -> None:
        if not self._warned and not np.isfinite(risk).any(axis=1).all():
            self._warned = True
            log.error(
                "%s: the answers to %r are not finite; flagged as catastrophes, and no action can be told safer",
                self.name,
                self.question,
            )


class RandomVetoRule(VetoRule):
    """The control: as many vetoes, at random, of actions nobody judged. A random other action is executed."""

    def __init__(self, name: str, question: str, rate: float, seed: int, qa: QA, unbound: str) -> None:
        super().__init__(name, question, 1.0, "safest", False, 0.0, seed, qa, unbound)
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0.0 <= rate <= 1.0:
            raise QAError(f"{name} got rate={rate!r}; expected the share of steps to veto, in [0, 1]; give e.g. 0.05")
        self.rate: float = float(rate)

    def judge(self, risk: Floats) -> Bools:
        return self.rng.random(len(risk)) < self.rate

    def replace(self, actions: NDArray[Any], candidates: NDArray[Any], risk: Floats) -> NDArray[Any]:
        other = (candidates != actions[:, None]).reshape(*candidates.shape[:2], -1).any(axis=2)
        pick = np.argmax(self.rng.random(other.shape) * other, axis=1)
        return np.array(candidates[np.arange(len(pick)), pick])


class VetoAction(QAWrapper, RecordConstructorArgs):
    """Veto actions judged catastrophic. Vector form: :class:`VecVetoAction`, which says what the arguments mean."""

    def __init__(
        self,
        env: gym.Env[Any, Any],
        question: str,
        threshold: float | Certificate,
        on_veto: OnVeto = "safest",
        shadow: bool = False,
        penalty: float = 0.0,
        seed: int = 0,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            question=question,
            threshold=recorded_threshold(threshold),
            on_veto=on_veto,
            shadow=shadow,
            penalty=penalty,
            seed=seed,
            qa=recorded(qa),
            unbound=unbound,
        )
        rule = VetoRule("VetoAction", question, threshold, on_veto, shadow, penalty, seed, qa, unbound)
        QAWrapper.__init__(self, env, rule, qa)


class VecVetoAction(VecQAWrapper):
    """Veto actions judged catastrophic. Single form: :class:`VetoAction`.

    Every ``info`` (and ``reset_infos``) tells ``qa/risk`` (of the proposed action), ``qa/catastrophe`` (judged so),
    ``qa/vetoed`` (another action was executed), ``qa/proposed_action`` and ``qa/executed_action``, and the answer to the
    question as :class:`VecAnswerQuestions` does: about the executed action. A risk that is not finite counts as a catastrophe.

    :param question: key of a yes/no instance about ``{action}``, yes being the catastrophe
    :param threshold: an action is judged catastrophic when its risk is at least this: a number, or a
        :class:`~sb3_qa.certificate.Certificate`. The latter refuses an answerer that is not the one certified, now and
        as soon as its weights change; and if the fact is an ``info`` key, ``qa/alarm`` tells whether catastrophes
        without a flag have come more often than certified (:class:`~sb3_qa.monitor.MissMonitor`; ``rule.guard.monitor``)
    :param on_veto: what is executed instead: the "safest" action; by "policy", the most preferred one under the
        threshold, or else the safest; or a callable ``(obs, proposed_action) -> action``. Continuous actions are
        judged over candidates from the policy and from the action space
    :param shadow: flag and tell, but never interfere
    :param penalty: taken from the reward of a vetoed step
    :param seed: of the candidates
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    """

    def __init__(
        self,
        venv: VecEnv,
        question: str,
        threshold: float | Certificate,
        on_veto: OnVeto = "safest",
        shadow: bool = False,
        penalty: float = 0.0,
        seed: int = 0,
        qa: QA = None,
        unbound: str = "error",
    ) -> None:
        super().__init__(
            venv, VetoRule("VecVetoAction", question, threshold, on_veto, shadow, penalty, seed, qa, unbound), qa
        )

    @property
    def _masking(self) -> bool:
        """Whether there are actions that can be listed."""
        return isinstance(self.action_space, spaces.Discrete)

    def has_attr(self, attr_name: str) -> bool:
        return (attr_name == "action_masks" and self._masking) or super().has_attr(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """As any wrapper's, but for ``action_masks``, which sb3-contrib's MaskablePPO asks for: no action that would be vetoed
        is in them, beside those that the environment itself masks.
        """
        if method_name != "action_masks" or not self._masking:
            return super().env_method(method_name, *args, indices=indices, **kwargs)
        rule = self.rule
        assert isinstance(rule, VetoRule) and isinstance(self.action_space, spaces.Discrete)
        possible = np.ones((self.num_envs, int(self.action_space.n)), np.bool_)
        if self.venv.has_attr("action_masks"):
            possible = np.array(self.venv.env_method("action_masks"), np.bool_)
        masks = rule.masks(possible)
        return [masks[i] for i in self._get_indices(indices)]


class VecRandomVeto(VecQAWrapper):
    """The control to hold a veto against: vetoes a random share of actions and executes a random other one.

    Tells the same keys as :class:`VecVetoAction`.

    :param question: the question whose answers are told (and not used)
    :param rate: share of steps to veto
    """

    def __init__(
        self, venv: VecEnv, question: str, rate: float, seed: int = 0, qa: QA = None, unbound: str = "error"
    ) -> None:
        super().__init__(venv, RandomVetoRule("VecRandomVeto", question, rate, seed, qa, unbound), qa)


def _verdict(risk: float, flagged: bool, vetoed: bool, proposed: Any, executed: Any) -> Info:
    return {
        "qa/risk": risk,
        "qa/catastrophe": flagged,
        "qa/vetoed": vetoed,
        "qa/proposed_action": proposed,
        "qa/executed_action": executed,
    }


def _all_actions(space: spaces.Space[Any]) -> NDArray[Any] | None:
    """Every action, (m, *action_shape), where there are few enough to look at each."""
    if isinstance(space, spaces.Discrete):
        return np.arange(space.start, space.start + space.n)
    if isinstance(space, spaces.MultiDiscrete) and np.prod(space.nvec, dtype=float) <= LISTED:
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in space.nvec.ravel()], indexing="ij"), -1)
        return grid.reshape(-1, *space.shape) + space.start
    if isinstance(space, spaces.MultiBinary) and 2 ** int(np.prod(space.shape)) <= LISTED:
        n = int(np.prod(space.shape))
        return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).reshape(-1, *space.shape)
    return None
