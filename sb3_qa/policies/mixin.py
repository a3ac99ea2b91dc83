"""What a policy needs to answer questions: a head, taps on its readouts, and the loss joined to its own training pass."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import nn

from sb3_qa.critics import CRITICS, TARGETS, Critics
from sb3_qa.errors import QAError
from sb3_qa.facts import check_facts
from sb3_qa.head import MOST_LOGITS, QAHead
from sb3_qa.joint import JointTraining, with_gradient
from sb3_qa.language import make_head
from sb3_qa.memory import is_recurrent, lstm_arguments
from sb3_qa.policies.distributions import lean
from sb3_qa.policies.own import OwnParameters
from sb3_qa.question_file import QuestionSource, load_questions
from sb3_qa.questions import Catalogue, nearest
from sb3_qa.taps import SMALL, Taps, going_on_from, is_stock, of_family, readout

__all__ = ["QAPolicyMixin"]

T = TypeVar("T", bound=Callable[..., Any])

DEFAULTS: dict[str, Any] = {
    "questions": None,
    "qa_coef": 0.1,
    "qa_trunk_gradient": 1.0,
    "qa_net_arch": [32],
    "qa_encoder": "index",
    "qa_sample": 64,
    "qa_every": None,
    "action_names": None,
    "qa_readouts": None,
}
"""Of the arguments of policies that are about questions."""

EPS = 1e-8
"""Of Adam, for what learns from questions alone: a mean over many of them has a small gradient beside SB3's 1e-5."""

FASTEST = 0.01
"""The learning rate that none of a head exceeds, unless the agent's does."""

SWITCHED = {name: (live,) for name, (live, _) in TARGETS.items()} | dict.fromkeys(CRITICS, ("actor", "critic"))
"""The networks of families with a replay buffer that change between training and evaluation; their targets do not."""

UNSAID: Any = object()
"""Of an argument that is left to the class: None is refused where it says nothing."""

LEARNERS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Policies of models, made or loaded in this process; those of answerers from files are none."""


class QAPolicyMixin:
    """Adds a question-answering head to an SB3 policy. Use it through :func:`sb3_qa.policies.qa_policy`.

    ``parameters()`` yields the agent's own parameters, which is what SB3 clips the gradient of; the head's are
    ``qa_head.parameters()``. ``named_parameters()``, ``state_dict()`` and the optimiser hold both.

    What is not given is that of the class, so that a class derived from one of these may hold what it is to be made with, where
    ``policy_kwargs`` are overwritten (as by rl_zoo3's ``-optimize``)::

        class Driver(QAMlpPolicy):
            questions = "questions.toml"
            qa_coef = 0.5

    :param questions: what is to be answered: a list of questions, or a question file, see :mod:`sb3_qa.question_file`
    :param qa_coef: weight of the question loss in the sum of losses, as ``vf_coef``; 0 switches it off; 0.1 by default
    :param qa_trunk_gradient: how much of its gradient shapes the trunk: 1 (joint, the default) to 0 (the head only listens)
    :param qa_net_arch: widths of the head's own layers; [32] by default
    :param qa_encoder: how the head's rows are made from questions: "index" (the default: each instance has its own), "text" (from its
        words, by a small network that learns with the agent), "sentence" (by a pretrained model of sentences, frozen, and a learnt
        projection), or a callable of your own from a list of texts to a tensor (n_texts, width), in place of that model
    :param qa_sample: how many targets (questions with one value of every slot; an event's horizons are one) a gradient step asks,
        drawn at random, where there are more than that, 64 by default; with a rollout buffer
    :param qa_every: one minibatch in so many teaches the questions, and the others cost nothing; by default so many that each transition
        teaches three times or more where the algorithm goes through all of them as often (PPO's ``n_epochs=10``: 3), and else 1;
        without a common factor with ``policy_delay`` (of TD3 and CrossQ), as else the actor would never be shaped
    :param action_names: names of the actions of a discrete action space, for texts; found in the environment if it has them
    :param qa_readouts: names of the policy's last layers, whose inputs the head reads, e.g. ``["actor.mu"]``; known for the
        algorithms of SB3 and sb3-contrib
    """

    qa_head: QAHead
    action_space: spaces.Space[Any]
    observation_space: spaces.Space[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("qa_") and name not in DEFAULTS and not hasattr(QAPolicyMixin, name):
                raise QAError(
                    f"class {cls.__qualname__} got {name}, which no policy takes; expected one of {nearest(name, DEFAULTS)}; rename it"
                )

    def __init__(
        self,
        *args: Any,
        questions: QuestionSource | None = None,
        qa_coef: float = UNSAID,
        qa_trunk_gradient: float = UNSAID,
        qa_net_arch: Sequence[int] = UNSAID,
        qa_encoder: str | Callable[[list[str]], Any] = UNSAID,
        qa_sample: int = UNSAID,
        qa_every: int | None = None,
        action_names: Sequence[str] | None = None,
        qa_readouts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name.startswith("qa_"):
                raise QAError(
                    f"{type(self).__name__} got {name}, which no policy takes; expected one of {nearest(name, DEFAULTS)}; rename it"
                )
        questions, action_names = self._given("questions", questions), self._given("action_names", action_names)
        qa_coef, qa_trunk_gradient = (
            self._given("qa_coef", qa_coef),
            self._given("qa_trunk_gradient", qa_trunk_gradient),
        )
        qa_net_arch, qa_encoder = self._given("qa_net_arch", qa_net_arch), self._given("qa_encoder", qa_encoder)
        qa_sample, qa_readouts = self._given("qa_sample", qa_sample), self._given("qa_readouts", qa_readouts)
        qa_every = self._given("qa_every", qa_every)
        if questions is None:
            raise QAError(
                f"{type(self).__name__} got no questions; expected a list of Question; give policy_kwargs=dict(questions=[...]), or, where "
                "those are overwritten (as by rl_zoo3's -optimize), name a policy of sb3_qa.zoo, as sb3_qa.zoo.ppo.MlpPolicy, or a class "
                "of your own: class Mine(QAMlpPolicy): questions = [...]"
            )
        questions = load_questions(questions)
        _check_number("qa_coef", qa_coef, 0.0, float("inf"))
        _check_number("qa_trunk_gradient", qa_trunk_gradient, 0.0, 1.0)
        _check_whole("qa_sample", qa_sample)
        if qa_every is not None:
            _check_whole("qa_every", qa_every)
        catalogue = Catalogue(questions)
        _check_extractor(super().__init__, *args, **kwargs)
        super().__init__(*args, **kwargs)
        for owner in (self, getattr(self, "actor", None)):
            lean(getattr(owner, "action_dist", None))
        check_facts(catalogue.questions, self.observation_space)
        self.qa_kwargs: dict[str, Any] = dict(
            questions=list(questions),
            qa_coef=qa_coef,
            qa_trunk_gradient=qa_trunk_gradient,
            qa_net_arch=list(qa_net_arch),
            qa_encoder=qa_encoder,
            qa_sample=int(qa_sample),
            qa_every=None if qa_every is None else int(qa_every),
            action_names=None if action_names is None else list(action_names),
            qa_readouts=None if qa_readouts is None else list(qa_readouts),
        )
        self.action_names = self._checked_names(self.qa_kwargs["action_names"])
        self.qa_joint = JointTraining(qa_coef, qa_trunk_gradient)
        self.qa_taps = Taps(self, qa_readouts)  # type: ignore[arg-type]
        self.qa_critics: Critics | None = None
        few = isinstance(qa_encoder, str) and qa_encoder == "index" and catalogue.n_logits <= MOST_LOGITS
        if qa_readouts is None and few and catalogue.n_state_logits < catalogue.n_logits:  # they know about actions
            self.qa_critics = Critics(self) or None  # type: ignore[arg-type]
        seed = torch.initial_seed() % 2**63  # what the agent was seeded with, without drawing from its stream
        self.qa_head = make_head(
            qa_encoder,
            catalogue,
            self.qa_taps.latent_dim,
            self.action_space,
            list(qa_net_arch),
            seed,
            self.qa_critics.dims if self.qa_critics else (),
        )
        self.qa_head.to(super().device)  # type: ignore[misc]
        self.qa_target = of_family(TARGETS, type(self))
        """Names of the network that carries the head and of its target, which carries a target head."""
        if self.qa_target is not None:
            live, target = (getattr(self, name) for name in self.qa_target)
            head = self.qa_head
            live.qa_head, target.qa_head = head, head.target()
            del self.qa_head  # as a part of the policy itself: each weight has one name in its state
            object.__setattr__(self, "qa_head", head)
            for network in (live, target):  # which by itself is saved and loaded as what it was
                network._register_state_dict_hook(_without_head)
                network.register_load_state_dict_pre_hook(_with_own_head)
        self.qa_join()
        LEARNERS.add(self)

    def qa_join(self) -> None:
        """Tap the readouts and join the optimiser, where a new one of them has been put in; done again, it changes nothing."""
        tapped = _tapped if self.qa_critics is None else _tapped_actor
        self._qa_tap(tapped, self.qa_taps.names)
        self._qa_tap(_tapped_critic, self.qa_critics.names if self.qa_critics else ())
        self.qa_taps.watch_anew()
        self._qa_join_optimizer()

    def _qa_tap(self, tapped: Callable[..., Any], names: Sequence[str]) -> None:
        for index, name in enumerate(names):
            module = readout(self, name)  # type: ignore[arg-type]
            if not any(getattr(hook, "func", None) is tapped for hook in module._forward_hooks.values()):
                module.register_forward_hook(partial(tapped, self, index))

    def _qa_join_optimizer(self) -> None:
        """The head is a group of its own: the same optimiser, by the implementation that is fastest for a few small tensors, at a
        learning rate of its own (:func:`_pace`), and with an epsilon small enough for a mean over many questions.
        """
        optimizer: Any = getattr(self, "optimizer", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            _step_together(optimizer)
        else:  # SAC and its like have one for each network, and the head learns with the network it reads
            actor, critic = self.actor, self.critic  # type: ignore[attr-defined]
            for network in (actor, critic):
                if isinstance(getattr(network, "optimizer", None), torch.optim.Optimizer):
                    _step_together(network.optimizer)
            optimizer = (critic if self.qa_critics else actor).optimizer
        if not any(p is self.qa_head.flat for group in optimizer.param_groups for p in group["params"]):
            optimizer.add_param_group(self._qa_group(optimizer))
        if not getattr(optimizer, "qa_joined", False):
            optimizer.register_step_pre_hook(partial(_refuse_untaught, self))
            optimizer.register_step_pre_hook(partial(_pace, self))
            optimizer.register_step_post_hook(partial(_follow, self))
            optimizer.register_load_state_dict_pre_hook(partial(_with_group_of_head, self))
            optimizer.qa_joined = True  # a copy of an optimiser has neither hooks nor this

    def _qa_group(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        group: dict[str, Any] = {"params": list(self.qa_head.parameters())}
        options = optimizer.defaults
        if (
            isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
            and options["foreach"] is None
            and options["fused"] is None
        ):
            group["fused"] = not (options["differentiable"] or options["capturable"])
        elif "foreach" in options and options["foreach"] is None and not options.get("fused"):
            group["foreach"] = True
        if "eps" in optimizer.defaults:
            group["eps"] = min(optimizer.defaults["eps"], EPS)
        return group

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the agent's own. What wrappers have just read of the same observations, while it is being trained, is not computed again."""
        answerer, reading = self.qa_joint.ahead, None
        if answerer is not None and not (torch.is_grad_enabled() or self.training):  # type: ignore[attr-defined]
            reading = answerer.ahead_of(obs)
        if reading is None or reading.ahead is None:
            return super().forward(obs, *args, **kwargs)  # type: ignore[misc]
        with going_on_from(self, reading.ahead.latents):
            return super().forward(obs, *args, **kwargs)  # type: ignore[misc]

    @property
    def qa_heads(self) -> list[QAHead]:
        """The head, and that of the target network if there is one."""
        return [self.qa_head, *([] if self.qa_target is None else [getattr(self, self.qa_target[1]).qa_head])]

    @property
    def device(self) -> torch.device:
        """As SB3's, which looks for a parameter whenever ``predict()`` is called; the head is where the agent is."""
        head = self.__dict__.get("qa_head", self._modules.get("qa_head"))  # type: ignore[attr-defined]
        device: torch.device = super().device if head is None else head.flat.device  # type: ignore[misc]
        return device

    def set_training_mode(self, mode: bool) -> None:
        """As SB3's, which ``predict()`` calls each time, and which takes about as long as the pass itself: layers that have no way of
        their own to change modes are told, not asked.
        """
        modules = [self._modules[name] for name in _switched(type(self))]  # type: ignore[attr-defined, arg-type]
        for module in modules:  # which grow
            modules += [child for child in module._modules.values() if child is not None]
        told = all(_is_told(type(module)) for module in modules)  # type: ignore[arg-type]
        if not modules or not isinstance(mode, bool) or not told:
            super().set_training_mode(mode)  # type: ignore[misc]
            return
        for module in modules:
            module.__dict__["training"] = mode
        self.__dict__["training"] = mode

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The agent's own parameters. SB3 clips their gradient; the head's must not count, see :class:`JointTraining`."""
        if not recurse:
            return super().parameters(recurse=False)  # type: ignore[misc]
        own: OwnParameters = self.__dict__.setdefault("_qa_own", OwnParameters())  # asked for before anything is set
        return own(self)  # type: ignore[arg-type]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        lstm = lstm_arguments(self) if is_recurrent(self) else {}
        return {**super()._get_constructor_parameters(), **lstm, **self.qa_kwargs}  # type: ignore[misc]

    def _given(self, name: str, value: Any) -> Any:
        """An argument, or the attribute of the class in its place, or the default. Not of ``self``: a function would be bound."""
        unsaid = value is UNSAID or (value is None and DEFAULTS[name] is None)
        return getattr(type(self), name, DEFAULTS[name]) if unsaid else value

    def departs(self, name: str) -> bool:
        """Whether an argument about questions is, or may become, another than the default of these policies."""
        return hasattr(type(self), name) or self.qa_kwargs[name] != DEFAULTS[name]

    def _checked_names(self, names: list[str] | None) -> list[str] | None:
        n = getattr(self.action_space, "n", None)
        if names is not None and len(names) != n:
            raise QAError(
                f"action_names got {len(names)} names; expected {n} for {self.action_space}; name every action once"
            )
        if names is not None and len(set(names)) != len(names):
            raise QAError(f"action_names got {names}; expected names that differ; name every action by its own")
        return names


@functools.cache
def _switched(cls: type) -> tuple[str, ...]:
    """Names of the networks whose mode changes with that of a policy of these, where SB3's own method changes it."""
    names = of_family(SWITCHED, cls)
    return names if names is not None and is_stock(cls, "set_training_mode") else ()


@functools.cache
def _is_told(cls: type) -> bool:
    """Whether a module of this class has no way of its own to change between training and evaluation."""
    changes = getattr(cls, "set_training_mode", BaseModel.set_training_mode)
    own: Any = cls
    stock = own.__setattr__ is nn.Module.__setattr__ and own.train is nn.Module.train
    return bool(stock and changes is BaseModel.set_training_mode)


def _without_head(network: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the head out of the state of a network that is asked for its own, as ``q_net.save()`` does."""
    if not prefix:
        for name in [name for name in state if name.startswith("qa_head.")]:
            del state[name]


def _with_own_head(network: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Such a state leaves the head as it is."""
    if not prefix:
        for name, tensor in network.qa_head.state_dict().items():
            state.setdefault(f"qa_head.{name}", tensor)


def _outside_of_graphs(hook: T) -> T:
    """A compiled network pauses at this hook: labels are no part of its graph.

    It is marked as by ``torch.compiler.disable``, which would bring the compiler in: a second and 70 MB for everybody.
    """
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


@_outside_of_graphs
def _tapped(
    policy: Any, index: int, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    joint: JointTraining = policy.qa_joint
    if policy.qa_taps.passing is not None:
        policy.qa_taps.passing[index] = args[0], output
    if not (joint.waiting and torch.is_grad_enabled()):
        return with_gradient(output) if joint.passed_over and torch.is_grad_enabled() else None
    if joint.critic_only:
        alone = policy.qa_taps.names[index] == joint.critic_only
        latents = policy.qa_taps.note_alone(index, args[0], policy, joint.observations) if alone else None
    else:
        latents = policy.qa_taps.note(index, args[0])
    return None if latents is None else joint.join(output, latents, policy.qa_head, policy.parameters)


@_outside_of_graphs
def _tapped_actor(
    policy: Any, index: int, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    joint: JointTraining = policy.qa_joint
    if policy.qa_taps.passing is not None:
        policy.qa_taps.passing[index] = args[0], output
    if torch.is_grad_enabled():
        if joint.waiting:
            policy.qa_taps.seen[index] = args[0]
        else:
            joint.pay(args[0])


@_outside_of_graphs
def _tapped_critic(
    policy: Any, index: int, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    joint: JointTraining = policy.qa_joint
    critics, taps = policy.qa_critics, policy.qa_taps
    if critics.passing is not None:
        critics.passing[index] = args[0]
    if not (joint.waiting and torch.is_grad_enabled()):
        return with_gradient(output) if joint.passed_over and torch.is_grad_enabled() else None
    critics.seen[index] = args[0]
    if any(latent is None for latent in critics.seen):
        return None
    actor = taps.seen[0]
    if actor is None:  # its pass is still to come
        with torch.no_grad():
            actor = taps.tensors(policy, joint.observations)[0]
    latents = [actor, *critics.seen]
    taps.clear()
    critics.clear()
    return joint.join(output, latents, policy.qa_head, policy.parameters, critics.joined)


def _step_together(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam step the few small tensors of an agent by operations on all of them: the same numbers, bit for bit, in less time."""
    if type(optimizer) is not torch.optim.Adam:
        return
    for group in optimizer.param_groups:
        chosen = [group.get(name) for name in ("foreach", "fused", "differentiable", "capturable")]
        small = sum(parameter.numel() for parameter in group["params"]) <= SMALL
        if small and chosen == [None, None, False, False]:
            group["foreach"] = True


def _refuse_untaught(policy: Any, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    joint: JointTraining = policy.qa_joint
    if not joint.taught:
        raise QAError(
            "a policy with questions is being trained without a QACallback, so they would never be learnt; expected one in "
            "learn(); write model.learn(..., callback=QACallback()), beside other callbacks in a list, not inside one of them"
        )


def _pace(policy: Any, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Let the head learn faster than the agent, whose learning rate SB3 has just given both.

    An agent's steps are short, so that its policy keeps up with its data. A head has nothing to break: its answers are averaged over
    many updates, and a slow one's are about an agent that has gone on changing since. One that is taught more rarely takes longer steps.
    """
    head, group = policy.qa_head, optimizer.param_groups[-1]
    if group["params"][0] is head.flat:
        rate = optimizer.param_groups[0]["lr"]
        group["lr"] = max(rate, min(head.pace * policy.qa_joint.every * rate, FASTEST))


def _follow(policy: Any, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if policy.qa_head.flat.grad is not None:  # else there was nothing to learn in this step
        policy.qa_head.follow()


def _with_group_of_head(policy: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Take in the state of an optimiser without the head, of a plain agent or of one that was put in by hand."""
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(saved) != len(own) - 1 or own[-1]["params"][0] is not policy.qa_head.flat:
        return None
    first = sum(len(group["params"]) for group in saved)
    options = {key: value for key, value in own[-1].items() if key != "params"}
    group = {**options, "params": list(range(first, first + len(own[-1]["params"])))}
    return {**state, "param_groups": [*saved, group]}


def _check_extractor(construct: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse observations of several parts where they would be read as one; SB3 does, of "MlpPolicy" and "CnnPolicy" by name."""
    parameters = inspect.signature(construct).parameters
    default = parameters["features_extractor_class"].default if "features_extractor_class" in parameters else None
    extractor = kwargs.get("features_extractor_class", default)
    space = kwargs.get("observation_space", args[0] if args else None)
    if isinstance(space, spaces.Dict) and extractor in (FlattenExtractor, NatureCNN):
        raise QAError(
            f"a policy with {extractor.__name__} got the observation space {space}; expected a single Box, Discrete, MultiDiscrete or "
            'MultiBinary; use the algorithm\'s MultiInputPolicy: qa_policy(algorithm, "MultiInputPolicy") or "QAMultiInputPolicy"'
        )


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        expected = f"a number from {low:g} to {high:g}" if high < float("inf") else f"a number, at least {low:g}"
        raise QAError(f"policy_kwargs got {name}={value!r}; expected {expected}; give e.g. {name}={min(high, 1.0)}")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        given = DEFAULTS[name] or 2
        raise QAError(
            f"policy_kwargs got {name}={value!r}; expected a whole number, at least 1; give e.g. {name}={given}"
        )
