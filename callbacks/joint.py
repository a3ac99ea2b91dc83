"""The callback that makes joint training happen: it records facts, makes labels, binds wrappers and logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from os import PathLike
from typing import Any, Literal, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_qa.answerer import QuestionAnswerer, names_in
from sb3_qa.buffers import label_rows, still_holds, stop_labelling
from sb3_qa.callbacks.pictures import Pictures, draws, log_hparams
from sb3_qa.callbacks.replay import Replay
from sb3_qa.callbacks.rollout import Recorder, Rollout
from sb3_qa.errors import QAError
from sb3_qa.policies import QAPolicyMixin
from sb3_qa.question_file import dump_questions
from sb3_qa.questions import Catalogue
from sb3_qa.rare_events import RareEventMemory
from sb3_qa.taps import CRITIC_ONLY, of_family, plain
from sb3_qa.units import observation_normalizer
from sb3_qa.wrappers.shape import ShapeRule
from sb3_qa.wrappers.shell import QAWrapper, VecQAWrapper, check_around, qa_wrappers

__all__ = ["QACallback", "bind_wrappers", "eval_callbacks"]

log = logging.getLogger(__name__)

PASSES = 3  # over each transition that teach, at least, where an algorithm makes as many
LOSSES = 8  # measured minibatches that an off-policy algorithm's losses are averaged over for the log


class QACallback(BaseCallback):
    """Trains the questions of a policy made by :func:`sb3_qa.policies.qa_policy` together with the agent.

    It records the facts of every step, makes labels of them beside the transitions, and binds the question-answering
    wrappers of the training environment and of the eval environments of its sibling callbacks. It logs, for each
    question, ``qa/<name>/loss``, ``accuracy`` or ``error``, ``brier``, ``auroc`` and ``base_rate`` (of answers given
    before they were trained on), and catastrophe and veto rates, raw and shaped return where wrappers tell them.

    Pass it to ``learn``, by itself or in a list of callbacks. Should ``train()`` be called by hand afterwards, on what that
    ``learn`` has collected, the agent learns alone; on anything newer it is refused.

    :param verbose: as in SB3
    :param store: with a replay buffer, which action is stored where a wrapper executed another one: the "proposed", as the
        environment answered to it, or the "executed"
    :param figures: environment steps between figures for TensorBoard: ``qa/<name>/reliability`` and ``qa/<name>/survival``, of
        the same answers as the scores; 0 for none. Needs matplotlib
    :param hparams: tell TensorBoard's HParams of the agent's and the questions' hyperparameters
    :param memory: of rare events, for an on-policy algorithm: keeps answering well about catastrophes that the agent has learnt
        to avoid, see :class:`~sb3_qa.rare_events.RareEventMemory`
    """

    def __init__(
        self,
        verbose: int = 0,
        store: Literal["proposed", "executed"] = "proposed",
        memory: RareEventMemory | None = None,
        *,
        figures: int = 0,
        hparams: bool = False,
    ) -> None:
        super().__init__(verbose)
        if store not in ("proposed", "executed"):
            raise QAError(f'QACallback got store={store!r}; expected "proposed" or "executed"; give one of them')
        if memory is not None and not isinstance(memory, RareEventMemory):
            raise QAError(
                f"QACallback got memory={memory!r}; expected a RareEventMemory, or None; write memory=RareEventMemory()"
            )
        self.store = store
        self.memory = memory
        self.hparams = hparams
        self.pictures = Pictures(figures) if figures else None
        self._recorder: Recorder | None = None

    @property
    def _policy(self) -> QAPolicyMixin:
        return cast(QAPolicyMixin, plain(self.model.policy))

    def _init_callback(self) -> None:
        if not hasattr(self.model.policy, "qa_head"):
            name = type(self.model).__name__
            raise QAError(
                f"QACallback got a model whose {type(self.model.policy).__name__} has no questions; expected one made by qa_policy(); "
                f"write {name}(qa_policy({name}), env, policy_kwargs=dict(questions=[...]))"
            )
        if not isinstance(self.model, (OnPolicyAlgorithm, OffPolicyAlgorithm)):
            raise QAError(
                f"QACallback got {type(self.model).__name__}; expected an algorithm with a rollout or replay buffer; use e.g. PPO or SAC"
            )
        # The model is saved with its questions, not with the path of a file that may change or be elsewhere, nor with what a class
        # says that may say something else when it is loaded.
        given, policy = self.model.policy_kwargs, self._policy
        made = {
            name: value for name, value in policy.qa_kwargs.items() if given.get(name) is None and policy.departs(name)
        }
        if isinstance(given.get("questions"), (str, PathLike)):
            made["questions"] = dump_questions(policy.qa_head.catalogue.questions)
        if made:
            self.model.policy_kwargs = {**given, **made}
        if self.store == "executed" and not isinstance(self.model, OffPolicyAlgorithm):
            raise QAError(
                f'QACallback got store="executed" with {type(self.model).__name__}; expected an algorithm with a replay buffer, as an '
                "on-policy one learns from what it proposed; leave it out"
            )

        if self.memory is not None:
            if not isinstance(self.model, OnPolicyAlgorithm):
                raise QAError(
                    f"QACallback got a memory of rare events with {type(self.model).__name__}; expected an on-policy algorithm, as a "
                    "replay buffer remembers by itself; leave it out, or give a larger buffer_size"
                )
            if self._policy.qa_taps.recurrent:
                raise QAError(
                    "QACallback got a memory of rare events with a policy that has an LSTM; expected one without, as a transition says "
                    "nothing without what came before it; leave it out"
                )
            self.memory.check(self._policy.qa_head.catalogue)

    def _on_training_start(self) -> None:
        if self.parent is not None:
            outer = type(self.parent).__name__
            raise QAError(
                f"QACallback stands inside {outer}, which calls it once in a while; expected a call at every step, as facts are recorded "
                f"step by step; put it beside: callback=[QACallback(), {outer}(...)]"
            )
        model = self.model
        if isinstance(model, OnPolicyAlgorithm):
            _check_horizons(self._policy.qa_head.catalogue, model.n_steps)
        # With the model, which may be loaded without an environment: `from_model` looks there.
        env = model.get_env()
        model.qa_normalized = observation_normalizer(env) is not None  # type: ignore[attr-defined]
        model.qa_action_names = names_in(env)  # type: ignore[attr-defined]
        answerer = QuestionAnswerer.from_model(model)
        bind_wrappers(env, answerer, model.gamma)  # type: ignore[attr-defined]
        _check_same_observations(env, model._last_obs)
        for sibling in eval_callbacks(self.locals.get("callback")):
            bind_wrappers(sibling.eval_env, answerer, model.gamma)  # type: ignore[attr-defined]
        joint = self._policy.qa_joint
        limit = getattr(model, "max_grad_norm", None)
        joint.max_grad_norm = float(limit) if limit is not None and np.isfinite(limit) and limit > 0 else None
        joint.critic_only = of_family(CRITIC_ONLY, type(model))
        self._policy.qa_join()  # parts may have been replaced, or an optimiser copied without its hooks
        compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.policy.modules())
        if compiled:
            # What questions send into the trunk is measured by a backward pass of its own, after which the graph is needed.
            from torch._functorch import config

            config.donated_buffer = False
        if hasattr(model.policy, "_orig_mod"):  # compiled as a whole: it would count the head among what SB3 clips
            object.__setattr__(model.policy, "parameters", self._policy.parameters)
        joint.ahead = answerer if not compiled and self._policy.qa_taps.can_read_ahead(self._policy) else None
        joint.reads_critics = self._policy.qa_critics is not None
        joint.learnt = None
        joint.start(_every(model, self._policy.qa_kwargs["qa_every"]))
        label_rows(self._buffer, joint)
        if isinstance(model, OnPolicyAlgorithm):
            self._recorder = Rollout(model, answerer, self.memory)
            joint.remember = self._recorder.remembered if self.memory is not None else None
        else:
            assert isinstance(model, OffPolicyAlgorithm)
            replay = Replay(model, answerer, executed=self.store == "executed")
            self._recorder, joint.store = replay, replay.store
        if self.pictures is not None and draws(self.logger):
            self._recorder.pictures = self.pictures
            self.pictures.start(self.num_timesteps)
        if self.hparams:
            log_hparams(self.logger, model)

    @property
    def _buffer(self) -> BaseBuffer:
        on_policy = isinstance(self.model, OnPolicyAlgorithm)
        buffer: BaseBuffer = getattr(self.model, "rollout_buffer" if on_policy else "replay_buffer")
        return buffer

    def _on_rollout_start(self) -> None:
        if self._recorder is None:  # collect_rollouts() was called by hand, without learn()
            self._on_training_start()
        if isinstance(self._recorder, Rollout):
            self._recorder.start()

    def _on_step(self) -> bool:
        assert self._recorder is not None
        self._recorder.record(self.locals)
        return True

    def _on_rollout_end(self) -> None:
        assert self._recorder is not None
        joint = self._policy.qa_joint
        catalogue = self._policy.qa_head.catalogue
        if isinstance(self._recorder, Rollout):
            joint.store = self._recorder.labels()
        elif len(joint.losses) < LOSSES:
            return  # some hundred minibatches are logged together
        self._recorder.log(self.logger)
        if self._recorder.pictures is not None:
            self._recorder.pictures.log(self.logger, self.num_timesteps)
        if joint.losses:  # of the update before
            losses = torch.stack(joint.losses)
            means = (losses.nanmean(dim=0) if losses.isnan().any() else losses.mean(dim=0)).tolist()
            joint.losses.clear()
            for question in catalogue.questions:
                own = [
                    loss for target, loss in zip(catalogue.targets, means, strict=True) if target.question is question
                ]
                if not np.isnan(own).all():  # else none of its instances was drawn
                    self.logger.record(
                        f"qa/{question.name}/loss", float(np.nanmean(own) if np.isnan(own).any() else np.mean(own))
                    )

    def _on_training_end(self) -> None:
        joint = self._policy.qa_joint
        joint.passed_over, joint.ahead = False, None
        if isinstance(self._recorder, Replay):
            self._recorder.finish()  # and whoever calls train() by hand goes on learning from the same transitions
        else:
            stop_labelling(self._buffer)
            joint.store, joint.remember = None, None
        joint.learnt = still_holds(self._buffer)
        self._recorder = None


def bind_wrappers(env: VecEnv | None, answerer: QuestionAnswerer, gamma: float | None = None) -> None:
    """Let ``answerer`` answer in every wrapper of ``env`` that was not given an answerer of its own.

    :param gamma: the agent's discount, for potential-based shaping that was not given one
    :raises QAError: when a wrapper does not see what the policy sees
    """
    for wrapper, around in reversed(list(qa_wrappers(env))):  # innermost first: outer ones repeat what inner ones tell
        rule = wrapper.rule
        if rule.own:
            continue
        check_around(wrapper, around)
        if isinstance(rule, ShapeRule) and rule.gamma is None:
            rule.discount = gamma
        wrapper.bind(answerer)
    _check_workers(env)


def _check_workers(env: VecEnv | None) -> None:
    """Look for wrappers in other processes, which cannot be bound from here.

    :raises QAError: when one needs an answerer; one that lets steps pass without is warned of
    """
    if env is None or not isinstance(env.unwrapped, SubprocVecEnv):
        return
    wrapped = [i for i, found in enumerate(env.env_is_wrapped(QAWrapper)) if found]
    lacking = {each for each in env.get_attr("unbound", wrapped) if each} if wrapped else set()
    message = (
        "a wrapper inside of a sub-process has no answerer, and cannot be given the one that learns here; expected one; put it outside: "
        'VecVetoAction(SubprocVecEnv(...)), or give it qa="saved.qa" or qa=answerer.share()'
    )
    if "error" in lacking:
        raise QAError(message)
    if lacking:
        log.warning("%s. Until then every step passes it", message)


def _check_same_observations(env: VecEnv | None, seen: Any) -> None:
    """Refuse wrappers inside something that changes the values of observations, though not their shape.

    :param seen: what the policy is about to act on
    """
    for wrapper, around in qa_wrappers(env):
        obs = wrapper.rule.obs
        if wrapper.rule.own or not isinstance(wrapper, VecQAWrapper) or obs is None or seen is None:
            continue
        pairs = [(obs[key], seen[key]) for key in obs] if isinstance(obs, dict) else [(obs, seen)]
        if any(a.shape == b.shape and not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs):
            name, outer = type(wrapper).__name__, type(around[0]).__name__ if around else "an environment"
            raise QAError(
                f"{name} stands inside {outer}, and sees other values than the policy does; expected the same observations; put "
                f"it outside: {name}({outer}(env, ...), ...)"
            )


def eval_callbacks(callback: Any) -> Iterator[Any]:
    """Callbacks that hold an ``eval_env``, e.g. an EvalCallback."""
    if isinstance(getattr(callback, "eval_env", None), VecEnv):
        yield callback
    children = [
        *getattr(callback, "callbacks", []),
        *(getattr(callback, name, None) for name in ("callback", "callback_after_eval")),
    ]
    for child in children:
        if isinstance(child, BaseCallback):
            yield from eval_callbacks(child)


def _check_horizons(catalogue: Catalogue, n_steps: int) -> None:
    """Windows other than events need all of their steps within one rollout; say so instead of never learning them."""
    for target in catalogue.targets:
        if target.kind != "event" and target.horizon is not None and target.horizon > n_steps:
            name, operator = target.question.name, target.question.truth.operator
            raise QAError(
                f"question {name!r} asks {operator}() over {target.horizon} steps, a rollout has n_steps={n_steps}; expected no more, as "
                f"its truth would never be known; give the algorithm n_steps={target.horizon * 4} or ask about fewer steps"
            )


def _every(model: BaseAlgorithm, given: int | None) -> int:
    """Of how many minibatches one teaches the questions."""
    delay = getattr(model, "policy_delay", 1)
    if given is None:  # a replay buffer hands out as often, but there what teaches more rarely is known later
        return max(1, getattr(model, "n_epochs", 1) // PASSES)
    if math.gcd(given, delay) > 1:
        raise QAError(
            f"qa_every got {given} with policy_delay={delay}; expected numbers without a common factor, as the minibatches that teach "
            f"would never be those in which the actor takes a step; give qa_every={given - 1}, or leave it out"
        )
    return given
