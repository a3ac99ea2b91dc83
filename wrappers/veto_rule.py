"""The rule of a veto: which actions are judged catastrophic, what is executed instead, and what is told of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.named import function_named, is_function_name
from sb3_qa.questions import YesNo
from sb3_qa.recorder import FlightRecorder
from sb3_qa.taps import of_family
from sb3_qa.wrappers.answer import AnswerRule
from sb3_qa.wrappers.evidence import Evidence
from sb3_qa.wrappers.guard import guard_of
from sb3_qa.wrappers.judged import Judged, verdict
from sb3_qa.wrappers.restraint import Restraint
from sb3_qa.wrappers.shell import QA, Arrival, Info, no_action, plain_rows
from sb3_qa.wrappers.substitutes import (
    Bools,
    Fallback,
    Floats,
    OnVeto,
    all_actions,
    allowed,
    called,
    candidates,
    check_fallback,
    choices,
    is_catastrophe,
    refined,
    safest,
)
from sb3_qa.wrappers.surroundings import Fact, action_masks, masking

__all__ = ["Record", "VetoRule"]

log = logging.getLogger(__name__)

Record = str | PathLike[str] | FlightRecorder | None

ONE_ACTION = {"TD3Policy": True}  # and DDPG's
"""Families whose policies draw no actions."""

REFINED = {"all": 5, "policy": 0}
"""Gradient steps on the risk by default, by where candidates are from: such a step leads to where the policy does not go."""


class VetoRule(AnswerRule):
    """Judge the proposed action; replace it when it is judged catastrophic, unless only watching.

    Beside that it tells the answer to its question as :class:`~sb3_qa.wrappers.answer.AnswerRule` does.
    """

    question: str
    threshold: float
    on_veto: OnVeto
    shadow: bool
    penalty: float
    candidates: str
    refine: int
    restraint: Restraint
    evidence: Evidence | None
    rng: np.random.Generator
    space: spaces.Space[Any]
    _seed: int
    _fact: Fact | None
    """Whether the catastrophe happens, where that is watched."""
    _env: Any
    """What an SB3 wrapper wraps, which may normalise observations."""
    _listed: NDArray[Any] | None
    _judged: Judged | None
    _possible: Bools | None
    _masking: Any
    """Whom to ask which actions the environment allows; None where nobody tells."""
    _here: Reading | None
    _arrived: Any
    _ended: Bools
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
        *,
        candidates: str = "all",
        refine: int | None = None,
        cooldown: int = 0,
        budget: int | None = None,
        let_through: float = 0.0,
        record: Record = None,
    ) -> None:
        super().__init__(name, [question], qa, unbound)
        self.guard = guard_of(name, question, threshold, shadow)
        limit: Any = threshold if self.guard is None else self.guard.certificate.threshold
        if isinstance(limit, bool) or not isinstance(limit, Real) or not 0.0 <= float(limit) <= 1.0:
            raise QAError(
                f"{name} got threshold={threshold!r}; expected a probability in [0, 1], or a Certificate; give e.g. 0.3"
            )
        if isinstance(on_veto, str) and is_function_name(on_veto):
            on_veto = function_named(on_veto, f"{name}, on_veto,")
        if isinstance(on_veto, type) or not (
            callable(on_veto) or isinstance(on_veto, Fallback) or on_veto in ("safest", "policy")
        ):
            raise QAError(
                f'{name} got on_veto={on_veto!r}; expected "safest", "policy" or a callable (obs, proposed_action) -> action, '
                "or a model with predict(); give one of them"
            )
        if isinstance(penalty, bool) or not isinstance(penalty, Real) or not 0.0 <= penalty < np.inf:
            raise QAError(
                f"{name} got penalty={penalty!r}; expected a number, at least 0; it is taken from the reward of a vetoed step"
            )
        if not isinstance(candidates, str) or candidates not in REFINED:
            raise QAError(f'{name} got candidates={candidates!r}; expected "all" or "policy"; give one of them')
        if refine is None:
            refine = REFINED[candidates]
        if isinstance(refine, bool) or not isinstance(refine, Integral) or refine < 0:
            raise QAError(f"{name} got refine={refine!r}; expected a number of gradient steps, at least 0; give e.g. 5")
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            raise QAError(f"{name} got seed={seed!r}; expected a whole number, at least 0; give e.g. 0")
        self.question = question
        self.threshold = float(limit)
        self.on_veto = on_veto
        self.shadow = bool(shadow)
        self.penalty = float(penalty)
        self.candidates = candidates
        self.refine = int(refine)
        self._seed = int(seed)
        self.rng = np.random.default_rng(self._seed)
        self.restraint = Restraint(name, cooldown, budget, let_through, self._seed)
        self.evidence = None
        self._fact = self._env = self._masking = None
        if record is not None:
            about: dict[str, Any] = {
                "threshold": self.threshold,
                "on_veto": _word(on_veto),
                "shadow": self.shadow,
                "seed": self._seed,
                "candidates": self.candidates,
                "refine": self.refine,
                "cooldown": self.restraint.cooldown,
                "budget": self.restraint.budget,
                "let_through": self.restraint.let_through,
            }
            if self.guard is not None:
                about["claim"] = self.guard.certificate.claim
            self.evidence = Evidence(name, _as_recorder(name, record), question, about)
        self.space = spaces.Discrete(1)
        self._listed = None
        self._judged = None
        self._here = None  # what the risks of this step were read from
        self._possible = None  # actions the environment allows in this step, where it was asked
        self._arrived = None  # the observations of the last step, and where an episode ended in it
        self._ended = np.zeros(0, np.bool_)
        self._warned = False

    @property
    def _by_other(self) -> bool:
        """Whether a fallback policy or a callable says what is executed instead."""
        return not isinstance(self.on_veto, str)

    def seed(self, seed: int, each: Sequence[int | None] | None = None) -> None:
        self.rng = np.random.default_rng([self._seed, seed])
        self.restraint.seed(seed)
        if self.evidence is not None:
            self.evidence.seed(seed if each is None else each)

    def watch(self, env: Any) -> None:
        """Look around in the environment that is wrapped.

        :param env: the wrapper itself
        :raises QAError: when a fallback policy does not fit it, or it has no frames to record
        """
        spaces_of_one = [
            getattr(env, f"single_{name}", getattr(env, name)) for name in ("observation_space", "action_space")
        ]
        check_fallback(self.name, self.on_veto, *spaces_of_one)
        self._masking = None if choices(spaces_of_one[1]) is None else masking(env)
        self._env = getattr(env, "venv", None)  # of SB3's; the wrapper itself would hold itself, and what it has loaded
        if self.guard is not None and self.qa is not None:
            self.guard.bind(self.qa, self._env)
        if self.evidence is not None:
            self.evidence.watch(env)

    def close(self) -> None:
        """Write down what is left of the evidence."""
        if self.evidence is not None:
            self.evidence.close()

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
        if not instance.per_action and not self._by_other:
            raise QAError(
                f"{self.name} got {self.question!r}, which is not about an action, so no action can be told safer; expected {{action}} in "
                "its text; or give on_veto a callable (obs, proposed_action) -> action or a model"
            )
        if self.guard is not None:
            self.guard.bind(qa, self._env)
        if self.guard is not None or self.evidence is not None:
            given = None if self.guard is None else self.guard.certificate.catastrophe
            slots = instance.slots if given is None else {}
            self._fact = Fact(self.name, instance.question.truth.fact if given is None else given, slots)
        super().on_bind(qa)
        # A copy, as it will be sampled from, and the agent's own random stream is left alone.
        self.space = copy.deepcopy(qa.policy.action_space)
        self._listed = all_actions(self.space)
        if self.candidates == "policy" and self._listed is None and of_family(ONE_ACTION, type(qa.policy)):
            raise QAError(
                f'{self.name} got candidates="policy" and an answerer of {type(qa.policy).__name__}, which takes one action in each state; '
                'expected a policy that draws its actions, so that there are some to compare; give candidates="all"'
            )
        if self.evidence is not None:
            self.evidence.bind(qa)

    def risk(self, actions: NDArray[Any] | None) -> Floats:
        """Risk (n,) of actions, or (n, m) of candidates or of all actions."""
        assert self.values is not None
        here = self._here = self.here
        if self.values.any_action:
            return self.values.of_actions(here, actions)[..., 0]
        return self.values.of_states(here)[:, 0]

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        n = len(self.here)
        if (
            self.obs is self._arrived
        ):  # not a reset of all: those at the start of an episode, or the answerer is another
            index_of_starts = index[self._ended[index]]
            self._ended[index] = False
        else:
            index_of_starts, self._ended = index, np.zeros(n, np.bool_)
        self.restraint.start(index_of_starts, n)
        if self.evidence is not None:
            self.evidence.start(index_of_starts, n)
        nobody = no_action(self.space)
        rewards = {"qa/raw_reward": 0.0, "qa/shaping_reward": 0.0} if self.penalty else {}
        table = self.at_first(index)
        told = self.told(table)
        for i, info, (risk,) in zip(index.tolist(), told, table.tolist(), strict=True):
            info.update(verdict(risk, False, False, nobody, nobody, False), **rewards, **self.restraint.told(i, None))
            if self._by_other:
                info["qa/substitute_catastrophe"] = False
        if self.guard is not None:
            self.guard.begin(index_of_starts)
            for info in told:
                info["qa/alarm"] = self.guard.monitor.alarm
        return told

    def act(self, actions: NDArray[Any]) -> NDArray[Any]:
        if self.guard is not None:
            self.guard.check(self.qa)
        options, risks = None, None
        if self._listed is not None and self._about_action:
            options = None if isinstance(self.space, spaces.Discrete) else self._spread(self._listed)
            risks = self.risk(options)
            risk = risks[np.arange(len(actions)), self._index(actions)]
        else:
            risk = self.risk(actions)
        flagged = self.judge(risk) & self.acting
        vetoed = unsafe = np.zeros(len(actions), np.bool_)
        decision, substitute_flagged, executed = None, None, actions
        rows = np.flatnonzero(flagged)
        if len(rows):
            if self._possible is None and self._masking is not None:
                self._possible = self._asked()
            if self._about_action:
                if risks is None:
                    options, risks = self._options(actions)
                self._complain(risks[rows])
            unsafe = flagged & self._none_safe(risk, risks, options)
        if len(rows) and not self.shadow:
            executed = actions.copy()
            executed[rows] = self._replacement(rows, actions, options, risks).reshape(actions[rows].shape)
            vetoed = (executed != actions).reshape(len(actions), -1).any(axis=1)
        if self.restraint.active:
            decision = self.restraint.decide(vetoed)
            executed = np.where(_like_rows(decision.carried_out, actions), executed, actions)
            vetoed = decision.carried_out
        if self._by_other and vetoed.any():
            substitute_flagged = vetoed & is_catastrophe(self.risk(executed), self.threshold)
        self._possible = None
        if self.evidence is not None:
            self.evidence.look()
        self._judged = Judged(
            actions,
            executed,
            risk,
            flagged,
            bool(len(rows)),
            vetoed,
            unsafe,
            options,
            risks,
            substitute_flagged,
            decision,
        )
        return executed

    def judge(self, risk: Floats) -> Bools:
        """Which proposed actions (n,) are flagged."""
        return is_catastrophe(risk, self.threshold)

    def masks(self, possible: Bools) -> Bools:
        """Which actions (n, n_actions) may be sampled: those that would not be vetoed, or else the safest; all that are
        possible, where nothing is known of any.

        :param possible: (n, n_actions), those the environment allows
        """
        if self.shadow or not self.ready() or not self._about_action or not isinstance(self.space, spaces.Discrete):
            return possible
        self._possible = possible
        risk = np.where(possible, self.risk(None), np.float32(np.inf))
        masks: Bools = ~is_catastrophe(risk, self.threshold)
        none = np.flatnonzero(~masks.any(axis=1))
        masks[none, safest(risk)[none]] = True
        blind = ~np.isfinite(risk).any(axis=1)
        masks[blind] = possible[blind]
        if self.restraint.active:
            free = self.restraint.held_back(len(masks))
            masks[free] = possible[free]
        return masks

    def replace(self, actions: NDArray[Any], options: NDArray[Any], risk: Floats) -> NDArray[Any]:
        """For each environment the candidate (n, *action_shape) to execute instead.

        :param options: (n, m, *action_shape)
        :param risk: (n, m)
        """
        # The copy is for torch, which warns of arrays that cannot be written to.
        preference = self.here.preference(np.array(options)) if self.on_veto == "policy" else None
        best = safest(risk, preference, self.threshold)
        rows = np.arange(len(best))
        chosen = np.array(options[rows, best])
        blind = ~np.isfinite(risk).any(axis=1)  # nothing is known to be safer: there is no reason to prefer any
        chosen[blind] = actions[blind]
        return chosen

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        judged = self._judged
        assert judged is not None
        proposed, risk, flagged, vetoed = judged.proposed, judged.risk, judged.flagged, judged.vetoed
        executed = self.executed(actions, arrival.infos)
        known = self._about_action and np.array_equal(executed, proposed)  # the risk is the answer, then
        answers = self.told(risk[:, None] if known else self.answers(actions, arrival))
        rows = zip(
            arrival.infos,
            answers,
            risk.tolist(),
            flagged.tolist(),
            vetoed.tolist(),
            plain_rows(proposed),
            plain_rows(executed),
            judged.unsafe.tolist(),
            strict=True,
        )
        by_other = self._by_other
        for i, (info, told, r, flag, veto, before, after, unsafe) in enumerate(rows):
            # What a veto further in has told of this step stays told.
            flag = flag or bool(info.get("qa/catastrophe", False))
            veto = veto or bool(info.get("qa/vetoed", False))
            unsafe = unsafe or bool(info.get("qa/no_safe_action", False))
            info.update(told, **verdict(r, flag, veto, before, after, unsafe))
            if judged.decision is not None:
                info.update(self.restraint.told(i, judged.decision))
            if by_other:
                info["qa/substitute_catastrophe"] = bool(
                    judged.substitute_flagged is not None and judged.substitute_flagged[i]
                )
        happened = None if self._fact is None else self._fact.of(arrival, executed, self._env)
        if self.guard is not None:
            self.guard.watch(flagged, arrival, happened)
        if self.penalty:
            raw = arrival.rewards
            arrival.rewards = (raw - self.penalty * vetoed).astype(raw.dtype)
            self.tell_rewards(raw, arrival)
        if len(self._ended) != len(flagged):
            self._ended = np.zeros(len(flagged), np.bool_)
        self._ended |= arrival.done
        self._arrived = arrival.obs
        if self.evidence is not None:
            self.evidence.arrive(self._here or self.here, self.obs, judged, executed, arrival, happened)

    @property
    def _about_action(self) -> bool:
        assert self.values is not None
        return self.values.any_action

    def _options(self, actions: NDArray[Any]) -> tuple[NDArray[Any], Floats]:
        """Candidates (n, m, *action_shape) where actions cannot be listed, and their risk; of a box, the last is the best one
        refined.
        """
        options = candidates(self.here, actions, self.space, self.rng, anywhere=self.candidates == "all")
        risks = self.risk(options)
        if self.refine and isinstance(self.space, spaces.Box):
            best = options[np.arange(len(options)), safest(risks)]
            better = refined(self.here, self.question, best, self.space, self.refine)[:, None]
            options = np.concatenate([options, better], axis=1)
            risks = np.concatenate([risks, self.risk(better)], axis=1)
        return options, risks

    def _asked(self) -> Bools:
        """Which choices (n, n_choices) the environment allows."""
        masks, sizes = action_masks(self._masking), choices(self.space)
        assert sizes is not None
        if masks.shape[1] != sizes.sum():
            raise QAError(
                f"{self.name} got action_masks() with {masks.shape[1]} entries; expected {sizes.sum()}, one for each choice in "
                f"{self.space}; mend the environment"
            )
        return masks

    def _allowed(self, options: NDArray[Any] | None) -> Bools | None:
        """Which options (n, m, *action_shape), or which of all actions, the environment allows, where it was asked: (n, m)."""
        if self._possible is None:
            return None
        if options is None:
            assert self._listed is not None
            options = self._spread(self._listed)
        return allowed(self.space, self._possible, options)

    def _none_safe(self, risk: Floats, risks: Floats | None, options: NDArray[Any] | None) -> Bools:
        """Where no action that could be taken is under the threshold."""
        if risks is None:  # all actions are alike
            return is_catastrophe(risk, self.threshold)
        bad = is_catastrophe(risks, self.threshold)
        possible = self._allowed(options)
        if possible is not None:
            bad = bad | ~possible
        return np.asarray(bad.all(axis=1))

    def _replacement(
        self, rows: NDArray[np.intp], actions: NDArray[Any], options: NDArray[Any] | None, risks: Floats | None
    ) -> NDArray[Any]:
        """What would be executed instead in the environments at ``rows``."""
        if self._by_other:
            instead, asked = actions.copy(), rows
            # SB3's models refuse a whole batch for one observation that is not finite: there the proposal stays.
            if isinstance(self.on_veto, (BaseAlgorithm, BasePolicy)):
                asked = rows[np.isfinite(self.here.hidden[rows]).all(axis=1)]
            if len(asked):
                instead[asked] = called(self.name, self.on_veto, self.obs, asked, actions, self.space, self._possible)
            return instead[rows]
        assert self._listed is not None or options is not None
        assert risks is not None
        if options is None:
            assert self._listed is not None
            options = self._spread(self._listed)
        possible = self._allowed(options)
        if possible is not None:  # what the environment forbids is no way out
            risks = np.where(possible, risks, np.float32(np.inf))
        return self.replace(actions, options, risks)[rows]

    def _spread(self, listed: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(listed, (len(self.here), *listed.shape))

    def _index(self, actions: NDArray[Any]) -> NDArray[np.intp]:
        assert self._listed is not None
        if isinstance(self.space, spaces.Discrete) and actions.dtype.kind in "iu":
            index = actions - self.space.start
            if ((index >= 0) & (index < self.space.n)).all():
                return index
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


def _like_rows(chosen: Bools, actions: NDArray[Any]) -> Bools:
    """(n,) as (n, 1, ...), to stand beside actions."""
    return chosen.reshape(-1, *[1] * (actions.ndim - 1))


def _as_recorder(name: str, record: Any) -> FlightRecorder:
    if not isinstance(record, (str, PathLike, FlightRecorder)):
        raise QAError(f'{name} got record={record!r}; expected a path or a FlightRecorder; give e.g. "flight.sqlite"')
    return record if isinstance(record, FlightRecorder) else FlightRecorder(record)


def _word(on_veto: OnVeto) -> str:
    """How ``on_veto`` stands in a record."""
    return on_veto if isinstance(on_veto, str) else getattr(on_veto, "__name__", type(on_veto).__name__)
