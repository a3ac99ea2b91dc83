"""Veto actions that are judged catastrophic."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.certificate import Certificate
from sb3_qa.recorder import FlightRecorder
from sb3_qa.wrappers.shell import QA, QAWrapper, VecQAWrapper
from sb3_qa.wrappers.specification import as_data, recorded, recorded_threshold
from sb3_qa.wrappers.substitutes import OnVeto, is_catastrophe, safest
from sb3_qa.wrappers.veto_rule import Record, VetoRule

__all__ = ["VecVetoAction", "VetoAction", "VetoRule", "is_catastrophe", "safest"]


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
        *,
        candidates: str = "all",
        refine: int | None = None,
        cooldown: int = 0,
        budget: int | None = None,
        let_through: float = 0.0,
        record: Record = None,
    ) -> None:
        more: dict[str, Any] = dict(
            candidates=candidates, refine=refine, cooldown=cooldown, budget=budget, let_through=let_through
        )
        rule = VetoRule(
            "VetoAction", question, threshold, on_veto, shadow, penalty, seed, qa, unbound, record=record, **more
        )
        RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            question=question,
            threshold=as_data(recorded_threshold(threshold)),
            on_veto=as_data(on_veto),
            shadow=shadow,
            penalty=as_data(penalty),
            seed=as_data(seed),
            qa=recorded(qa),
            unbound=unbound,
            record=record.path if isinstance(record, FlightRecorder) else recorded(record),
            **more,
        )
        QAWrapper.__init__(self, env, rule, qa)


class VecVetoAction(VecQAWrapper):
    """Veto actions judged catastrophic. Single form: :class:`VetoAction`.

    Every ``info`` (and ``reset_infos``) tells ``qa/risk`` (of the proposed action), ``qa/catastrophe`` (judged so),
    ``qa/vetoed`` (another action was executed), ``qa/proposed_action``, ``qa/executed_action`` and ``qa/no_safe_action``
    (no action is under the threshold), and the answer to the question as :class:`VecAnswerQuestions` does: about the
    executed action. A risk that is not finite counts as a catastrophe. Around another veto, ``qa/catastrophe``, ``qa/vetoed``
    and ``qa/no_safe_action`` tell of either of them, ``qa/risk`` of this one. What the environment's ``action_masks()`` forbid is
    not executed instead of another action.

    :param question: key of a yes/no instance about ``{action}``, yes being the catastrophe
    :param threshold: an action is judged catastrophic when its risk is at least this: a number, or a
        :class:`~sb3_qa.certificate.Certificate`. The latter refuses an answerer that is not the one certified, now and
        as soon as its weights change; and if the fact is an ``info`` key, ``qa/alarm`` tells whether catastrophes
        without a flag have come more often than certified (:class:`~sb3_qa.monitor.MissMonitor`; ``rule.guard.monitor``)
    :param on_veto: what is executed instead: the "safest" action; by "policy", the most preferred one under the
        threshold, or else the safest; a callable ``(obs, proposed_action) -> action``; or a model (anything with SB3's
        ``predict``), whose action is executed, as in Recovery RL (arXiv 2010.15920), even where it is judged catastrophic
        itself. ``qa/substitute_catastrophe`` tells of a model or a callable that it is. Continuous actions are judged over
        ``candidates``
    :param shadow: flag and tell, but never interfere
    :param penalty: taken from the reward of a vetoed step
    :param seed: of the candidates, and of what is let through
    :param qa: a QuestionAnswerer, the path of a saved one, or None to be bound later
    :param unbound: what to do at a step without an answerer: "error" or "pass"
    :param candidates: where continuous actions are compared: "all", the policy's and any of the space, or "policy", the policy's alone,
        of which answers know more
    :param refine: gradient steps that lower the risk of the best candidate, of continuous actions: by default 5, or 0 with
        ``candidates="policy"``
    :param cooldown: steps after a veto in which there is no other
    :param budget: most vetoes an episode. What they hold back is still flagged; ``qa/veto_withheld`` tells of it, and
        ``qa/vetoes_left`` of the budget
    :param let_through: probability with which a veto is not carried out, for simulations: only so is it seen what comes of
        flagged actions. ``qa/let_through`` tells of it, and ``qa/let_through_probability`` with what probability the
        proposed action was to be executed; :func:`sb3_qa.scores.false_alarm_rate` makes use of both
    :param record: path of a flight record to write flags, vetoes and catastrophes to, or a
        :class:`~sb3_qa.recorder.FlightRecorder`
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
        *,
        candidates: str = "all",
        refine: int | None = None,
        cooldown: int = 0,
        budget: int | None = None,
        let_through: float = 0.0,
        record: Record = None,
    ) -> None:
        rule = VetoRule(
            "VecVetoAction",
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
        super().__init__(venv, rule, qa)

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
