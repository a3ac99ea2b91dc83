"""Where an SB3 agent keeps what it knows: the inputs of its last layers, the *readouts*."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_qa.errors import QAError
from sb3_qa.memory import Memory, is_recurrent

__all__ = [
    "CRITIC_ONLY",
    "READOUTS",
    "REFUSED",
    "Ahead",
    "Taps",
    "going_on_from",
    "is_stock",
    "of_family",
    "plain",
    "readout",
]

Floats = NDArray[np.float32]
T = TypeVar("T")

READOUTS: dict[str, tuple[str, ...]] = {
    "ActorCriticPolicy": ("action_net", "value_net"),  # PPO, A2C, TRPO
    "MaskableActorCriticPolicy": ("action_net", "value_net"),
    "RecurrentActorCriticPolicy": ("action_net", "value_net"),
    "DQNPolicy": ("q_net.q_net",),
    "QRDQNPolicy": ("quantile_net.quantile_net",),
    "SACPolicy": ("actor.mu",),
    "TD3Policy": ("actor.mu",),  # DDPG's as well
    "TQCPolicy": ("actor.mu",),
    "CrossQPolicy": ("actor.mu",),
}
"""The readouts of each family of policies, by the name of its class, as sb3-contrib need not be installed. Of a sequence of
layers its last linear one is meant."""

SEQUENCES = {
    "DQNPolicy": ("q_net", "q_net"),
    "QRDQNPolicy": ("quantile_net", "quantile_net"),
    "SACPolicy": ("actor", "latent_pi"),
    "TD3Policy": ("actor", "mu"),
    "TQCPolicy": ("actor", "latent_pi"),
}
"""The network of families with one readout, and its sequence of layers up to it, which :class:`_Dense` computes."""

SMALL = 100_000
"""Up to so many parameters of an agent, operations cost more by being called than by their arithmetic."""

CRITIC_ONLY = {"TRPO": "value_net"}
"""Algorithms whose actor takes steps that no loss can be added to, with the readout that the questions are joined at."""

REFUSED = {
    "ARSPolicy": "ARS moves its weights at random, and there is no gradient that questions could be learnt by; use PPO or SAC",
}
"""Families that cannot be taught, and what to do instead."""

# What ActorCriticPolicy computes its latents with; a subclass that replaces any of it is read through its own passes.
_PASSES = (
    "forward",
    "evaluate_actions",
    "get_distribution",
    "predict_values",
    "extract_features",
    "_build_mlp_extractor",
)


ACTIVATIONS: dict[type[nn.Module], Callable[[Floats], Floats]] = {
    nn.Tanh: np.tanh,
    nn.ReLU: partial(np.maximum, np.float32(0.0)),
    nn.Identity: np.asarray,
}
"""What :class:`_Dense` computes beside linear layers."""


class Ahead(NamedTuple):
    """What has been read of observations that the policy acts on next."""

    obs: dict[str, torch.Tensor]
    latents: list[torch.Tensor]
    """Of each readout, (n, dim)."""

    def is_of(self, obs: Any) -> bool:
        """Whether it is of these tensors, which lie in memory alike, so that the same would be computed.

        Images of one channel that were transposed in between do not: that channel's stride tells torch which kernel to use.
        """
        parts = _parts(obs)
        return parts.keys() == self.obs.keys() and all(
            (each.dtype, each.stride()) == (own.dtype, own.stride()) and torch.equal(each, own)
            for each, own in ((parts[key], own) for key, own in self.obs.items())
        )


class Taps:
    """Reads the latents of a policy, in passing (hooks on the readouts) or on request.

    :param policy: a policy of a family in :data:`READOUTS`
    :param names: of its readouts, for a policy of another family
    :raises QAError: when its readouts cannot be found
    """

    def __init__(self, policy: BasePolicy, names: Sequence[str] | None = None) -> None:
        family = _readouts_of(policy, names)
        self.names = family
        self._actor_critic = hasattr(policy, "evaluate_actions")
        self.recurrent = is_recurrent(policy)
        self._direct = (
            self._actor_critic
            and not self.recurrent
            and family == of_family(READOUTS, type(policy))
            and all(is_stock(type(policy), name) for name in _PASSES)
        )
        self._sequence = _plain_sequence(policy) if names is None else None
        self._greedy = self._direct or (self._sequence == SEQUENCES["DQNPolicy"] and _takes_the_best(policy))
        """Whether the largest output of the first readout is the action the policy likes best, where actions can be counted."""
        if self._direct and _is_plain_mlp(policy):
            self._dense: tuple[_Dense, ...] | None = (_Dense(), _Dense())
        else:
            self._dense = (_Dense(),) if self._sequence else None
        self.seen: list[torch.Tensor | None] = [None] * len(family)
        self.passing: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        """What enters and leaves each readout, while a pass is recorded."""
        self._watched: list[torch.Tensor] = []
        # Two readouts of one and the same tensor (a shared extractor without layers of their own) count once.
        latents = self._by_evaluation(policy)
        self.keep = [n for n, x in enumerate(latents) if not any(_is_same(x, other) for other in latents[:n])]
        self.latent_dim = sum(latents[n].shape[-1] for n in self.keep)

    @property
    def is_dense(self) -> bool:
        """Whether observations are numbers that go into SB3's own dense layers as they are."""
        return self._dense is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        return self._copy()

    def __getstate__(self) -> dict[str, Any]:
        dense = None if self._dense is None else tuple(_Dense() for _ in self._dense)
        return {**self.__dict__, "seen": [None] * len(self.names), "_watched": [], "passing": None, "_dense": dense}

    def _copy(self) -> Taps:
        taps = Taps.__new__(Taps)
        taps.__dict__.update(self.__getstate__())
        return taps

    def join(self, latents: list[Floats]) -> Floats:
        """Latents of the readouts, each (n, dim), as one array (n, latent_dim)."""
        kept = [latents[n] for n in self.keep]
        return kept[0] if len(kept) == 1 else np.concatenate(kept, axis=1)

    def note(self, index: int, latent: torch.Tensor) -> list[torch.Tensor] | None:
        """Take the latent that just entered readout ``index``; the latents of all, once the pass has reached every one."""
        self.seen[index] = latent
        latents = [x for x in self.seen if x is not None and len(x) == len(latent)]
        if len(latents) < len(self.names):
            return None
        self.clear()
        return [latents[n] for n in self.keep]

    def note_alone(self, index: int, latent: torch.Tensor, policy: Any, obs: Any) -> list[torch.Tensor]:
        """Latents of all readouts where a pass reaches only one of them; the others are read without a gradient."""
        with torch.no_grad():
            latents = self.tensors(policy, obs)
        latents[index] = latent
        return [latents[n] for n in self.keep]

    def clear(self) -> None:
        """Forget a pass."""
        self.seen = [None] * len(self.names)

    def read(self, policy: Any, obs: Any) -> list[Floats]:
        """Latents of each readout (n, dim) for a batch of observations, arrays or tensors; no gradients, no use of a random stream."""
        if self._dense is not None and isinstance(obs, np.ndarray):
            x = obs.reshape(len(obs), -1).astype(np.float32, copy=False)
            small = [dense(layers, x) for dense, layers in zip(self._dense, self._layers(policy), strict=True)]
            latents = [latent for latent in small if latent is not None]
            if len(latents) == len(small):
                return latents
        with torch.no_grad(), _evaluating(policy):
            tensors = _tensors(policy, obs)
            tensors, blind = (tensors, None) if self._direct else _blinded(tensors)
            return [latent.cpu().numpy() for latent in _not_known(self.tensors(policy, tensors), blind)]

    def can_read_ahead(self, policy: Any) -> bool:
        """Whether the policy's own pass can go on from latents that have been read, and :meth:`read` has no faster way."""
        if not self._direct or policy.device.type != "cpu":
            return False
        return not self.is_dense or sum(parameter.numel() for parameter in policy.parameters()) > SMALL

    def read_ahead(self, policy: Any, obs: Any) -> Ahead:
        """As :meth:`read`, by the very operations that the policy's own pass does."""
        tensors = _tensors(policy, obs)
        with torch.no_grad(), _evaluating(policy):
            # Copies, as an environment may write its next observations over these.
            return Ahead({key: each.clone() for key, each in _parts(tensors).items()}, self.tensors(policy, tensors))

    def recall(self, policy: Any, obs: Any, memory: Memory) -> tuple[list[Floats], Memory]:
        """As :meth:`read`, of a recurrent policy with its memory; and the memory that these observations are part of.

        The policy's own pass is run, so that latents and states are those that it acts with.
        """
        with torch.no_grad(), _evaluating(policy):
            latents, states = self._by_forward(policy, _tensors(policy, obs), memory)
        hidden, cell, hidden_vf, cell_vf = (part.cpu().numpy() for pair in states for part in pair)
        after = Memory((hidden, cell, hidden_vf, cell_vf), np.zeros(len(memory.starts), np.bool_))
        return [latent.cpu().numpy() for latent in latents], after

    def _by_forward(self, policy: Any, obs: Any, memory: Memory) -> tuple[list[torch.Tensor], Any]:
        states, starts = memory.tensors(policy.device)
        obs, blind = _blinded(obs)
        with _recording(policy, self.names) as seen:
            states = policy.forward(obs, states, starts, deterministic=True)[-1]
        return _not_known(self._all_of(seen, policy, "forward"), blind), states

    def read_target(self, policy: Any, obs: Any, live: str, target: str) -> list[Floats]:
        """As :meth:`read`, from a target network where it has the readouts, else from the live one.

        :param live: name of the network that learns
        :param target: name of the one that follows it
        """
        if not all(name.startswith(f"{live}.") for name in self.names):
            return self.read(policy, obs)
        network, names = getattr(policy, target), tuple(name.partition(".")[2] for name in self.names)
        with torch.no_grad(), _evaluating(policy), _recording(network, names) as seen:
            network(_tensors(policy, obs))
        return [seen[name].cpu().numpy() for name in names]

    def _layers(self, policy: Any) -> list[list[nn.Module]]:
        """Layers from the observations to each readout, of a policy of dense layers."""
        if self._sequence is None:
            extractor = policy.mlp_extractor
            return [_layers_of(extractor.policy_net), _layers_of(extractor.value_net)]
        owner, name = self._sequence
        layers = _layers_of(getattr(getattr(policy, owner), name))
        if self.names[0] == f"{owner}.{name}":  # the readout is the last linear layer of the same sequence
            layers = layers[: max(n for n, layer in enumerate(layers) if isinstance(layer, nn.Linear))]
        return [layers]

    def tensors(self, policy: Any, obs: Any) -> list[torch.Tensor]:
        """Latents of each readout (n, dim) for a batch of tensors, as the policy computes them."""
        if not self._direct:
            return self._by_passes(policy, obs)
        features = policy.extract_features(obs)
        if policy.share_features_extractor:
            return list(policy.mlp_extractor(features))
        pi_features, vf_features = features
        return [policy.mlp_extractor.forward_actor(pi_features), policy.mlp_extractor.forward_critic(vf_features)]

    def distribution(self, policy: Any, obs: Any, latents: list[Floats]) -> Any:
        """The policy's distribution over actions, from latents that were read of these observations; where those are not
        finite, what it is of zeros.
        """
        if self._direct or self.recurrent:  # which cannot be asked again without its memory
            latent, _ = _blinded(torch.as_tensor(latents[0], device=policy.device))
            return policy._get_action_dist_from_latent(latent)
        obs, _ = _blinded(_tensors(policy, obs))
        return policy.get_distribution(obs)

    def preferred(self, policy: Any, obs: Any, latents: list[Floats]) -> NDArray[Any]:
        """The actions (n, ...) the policy likes best.

        :param latents: that were read of these observations; none, if they are to be read anew
        """
        if self._greedy and latents and isinstance(policy.action_space, spaces.Discrete):  # without a pass
            layer = policy.action_net if self._direct else readout(policy, self.names[0])
            own_hook_only = len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks
            step = _step_of(layer) if own_hook_only else None
            if isinstance(step, tuple):
                logits = latents[0] @ step[0]
                return np.argmax(logits if step[1] is None else logits + step[1], axis=1)
        return self._drawn(policy, obs, latents, 1, deterministic=True)[:, 0]

    def sampled(self, policy: Any, obs: Any, latents: list[Floats], n: int) -> NDArray[Any]:
        """``n`` actions for each observation, (n_obs, n, ...), drawn as the policy draws them."""
        return self._drawn(policy, obs, latents, n, deterministic=False)

    def _drawn(self, policy: Any, obs: Any, latents: list[Floats], n: int, *, deterministic: bool) -> NDArray[Any]:
        with torch.no_grad(), _evaluating(policy):
            if self._actor_critic:
                draw: Callable[[], torch.Tensor] = partial(
                    self.distribution(policy, obs, latents).get_actions, deterministic=deterministic
                )
            else:
                draw = partial(policy._predict, _blinded(_tensors(policy, obs))[0], deterministic=deterministic)
            return np.stack([draw().cpu().numpy() for _ in range(n)], axis=1)

    def shares(self, policy: Any, obs: Any, latents: list[Floats]) -> Floats:
        """How often (n, n_actions) the policy takes each action of a discrete space; all or nothing where it is greedy."""
        if self._actor_critic:
            with torch.no_grad():
                shares: Floats = self.distribution(policy, obs, latents).distribution.probs.cpu().numpy()
                return shares
        return np.eye(int(policy.action_space.n), dtype=np.float32)[self.preferred(policy, obs, latents)]

    def preference(self, policy: Any, obs: Any, latents: list[Floats], actions: NDArray[Any]) -> Floats:
        """How much the policy likes each of the candidates (n, m, ...), as it counts and scales actions itself: (n, m).

        The log-probability; for agents that have none, the value of a discrete action, and for a continuous one the nearness
        to the action that the policy would take.
        """
        with torch.no_grad(), _evaluating(policy):
            if isinstance(policy.action_space, spaces.Box):
                actions = actions.reshape(*actions.shape[:2], -1)  # as the policy has them
            if self._actor_critic:
                distribution = self.distribution(policy, obs, latents)
                columns = [torch.as_tensor(actions[:, j], device=policy.device) for j in range(actions.shape[1])]
                return np.stack([distribution.log_prob(column).cpu().numpy() for column in columns], axis=1)
            if isinstance(policy.action_space, spaces.Discrete):
                with self._recording_pass() as seen:
                    policy._predict(_tensors(policy, obs), deterministic=True)
                values = seen[0][1].reshape(len(actions), -1, int(policy.action_space.n)).mean(dim=1).cpu().numpy()
                return np.asarray(np.take_along_axis(values, actions, axis=1), np.float32)
            best = self.preferred(policy, obs, latents)
            return np.asarray(-np.square(actions - best[:, None]).sum(-1), np.float32)

    def version(self, policy: Any) -> int:
        """A number that changes whenever an optimiser, or a state that is loaded, changes the agent's weights."""
        if not self._watched:
            self._watched = list(policy.parameters())
        return sum([parameter._version for parameter in self._watched]) ^ self._watched[0].data_ptr()

    def watch_anew(self) -> None:
        """Find the agent's weights anew, as some may be others now."""
        self._watched = []

    def _by_passes(self, policy: Any, obs: Any) -> list[torch.Tensor]:
        with self._recording_pass() as seen:
            if self._actor_critic:
                policy.get_distribution(obs)
                policy.predict_values(obs)
            else:
                policy._predict(obs, deterministic=True)
        return [seen[index][0] for index in range(len(self.names))]

    @contextmanager
    def _recording_pass(self) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """By the hooks that are there for good: a compiled network does not notice those put in later."""
        seen = self.passing = {}
        try:
            yield seen
        finally:
            self.passing = None

    def _by_evaluation(self, policy: Any) -> list[torch.Tensor]:
        """Run the policy once, on a blank observation, to see what enters the readouts."""
        obs = _blank(policy.observation_space, policy.device)
        called = "evaluate_actions" if self._actor_critic else "_predict"
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            _evaluating(policy),
            _recording(policy, self.names) as seen,
        ):
            if self.recurrent:
                return self._by_forward(policy, obs, Memory.blank(policy, 1))[0]
            if self._actor_critic:
                policy.evaluate_actions(obs, _blank_action(policy.action_space, policy.device))
            else:
                policy._predict(obs, deterministic=True)
        return self._all_of(seen, policy, called)

    def _all_of(self, seen: dict[str, torch.Tensor], policy: Any, called: str) -> list[torch.Tensor]:
        unread = [name for name in self.names if name not in seen]
        if unread:
            raise QAError(
                f"{type(policy).__name__}.{called}() does not call {unread[0]!r}; expected a pass through all of {self.names}, "
                "which is where the question loss joins; call it as a module"
            )
        return [seen[name] for name in self.names]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are one tensor, or one is the other detached (where critic and actor share an LSTM)."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def of_family(table: Mapping[str, T], cls: type) -> T | None:
    """What a table of families, by the names of their classes, says about a class or the nearest of its bases."""
    return next((table[kind.__name__] for kind in cls.__mro__ if kind.__name__ in table), None)


def readout(policy: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name, or the last linear layer of it where it is a sequence of layers.

    :raises QAError: when there is none
    """
    try:
        module = operator.attrgetter(name)(policy)
    except AttributeError:
        module = None
    module = plain(module)
    if isinstance(module, nn.Sequential):
        module = next((plain(layer) for layer in reversed(module) if isinstance(plain(layer), nn.Linear)), None)
    if not isinstance(module, nn.Module):
        known = [name for name, child in policy.named_modules() if name and isinstance(child, nn.Linear)]
        raise QAError(
            f"{type(policy).__name__} has no module {name!r}; expected one of its last layers; its linear layers are {known}; "
            "name those in policy_kwargs=dict(qa_readouts=[...])"
        )
    return module


def plain(module: Any) -> Any:
    """The module that was compiled, where ``torch.compile`` has made this one."""
    parts = getattr(module, "_modules", None)  # a module is slow to say that it has no such attribute
    return parts.get("_orig_mod", module) if parts else module


def _layers_of(sequence: nn.Module) -> list[nn.Module]:
    return [plain(layer) for layer in plain(sequence)._modules.values()]


def _readouts_of(policy: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the readouts: as given, or those of the policy's family."""
    if names is None:
        names = of_family(READOUTS, type(policy))
    if names is None:
        linear = [name for name, child in policy.named_modules() if name and isinstance(child, nn.Linear)]
        raise QAError(
            f"qa_policy got {type(policy).__name__}, and does not know where it keeps its readouts; expected a subclass of one of "
            f"{', '.join(READOUTS)}, or their names; its linear layers are {linear}: give policy_kwargs=dict(qa_readouts=[...])"
        )
    for name in names:
        readout(policy, name)
    return tuple(names)


class _Known(NamedTuple):
    """Stands for the layers of an actor-critic policy whose latents are known."""

    actor: torch.Tensor
    critic: torch.Tensor

    def __call__(self, features: None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor, self.critic

    def forward_actor(self, features: None) -> torch.Tensor:
        return self.actor

    def forward_critic(self, features: None) -> torch.Tensor:
        return self.critic


def _no_features(obs: Any) -> tuple[None, None]:
    return None, None


@contextmanager
def going_on_from(policy: Any, latents: list[torch.Tensor]) -> Iterator[None]:
    """Let a pass of a policy that can be read ahead begin behind its latents, which are known."""
    own, modules = policy.__dict__, policy._modules
    layers, modules["mlp_extractor"] = modules["mlp_extractor"], _Known(*latents)
    own["extract_features"] = _no_features
    try:
        yield
    finally:
        modules["mlp_extractor"] = layers
        del own["extract_features"]


class _Dense:
    """A sequence of linear layers and activations, computed with numpy on the parameters where they lie.

    On a few units, torch takes several times as long to begin an operation as the arithmetic takes.
    """

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._steps: list[tuple[Floats, Floats | None] | Callable[[Floats], Floats]] = []

    def __call__(self, layers: list[nn.Module], x: Floats) -> Floats | None:
        """(n, n_in) -> (n, n_out); None where the layers are others, are elsewhere than on the CPU, or have hooks."""
        key: list[Any] = []
        for layer in layers:
            if layer._forward_hooks or layer._forward_pre_hooks:
                return None
            key.append(layer)
            key += [parameter.data_ptr() for parameter in layer._parameters.values() if parameter is not None]
        if key != self._key:
            steps = [_step_of(layer) for layer in layers]
            if None in steps:
                return None
            self._key, self._steps = key, [step for step in steps if step is not None]
        for step in self._steps:
            if isinstance(step, tuple):
                x = x @ step[0]
                if step[1] is not None:
                    x += step[1]
            else:
                x = step(x)
        return x


def _step_of(layer: nn.Module) -> tuple[Floats, Floats | None] | Callable[[Floats], Floats] | None:
    if type(layer) is not nn.Linear:
        return ACTIVATIONS.get(type(layer))
    weight, bias = layer.weight.detach(), layer.bias
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return weight.numpy().T, None if bias is None else bias.detach().numpy()


def _is_plain_mlp(policy: Any) -> bool:
    """Whether observations are numbers that go into SB3's own MLP as they are."""
    space = policy.observation_space
    names = (
        ["features_extractor"]
        if policy.share_features_extractor
        else ["pi_features_extractor", "vf_features_extractor"]
    )
    plain = all(type(getattr(policy, name)) is FlattenExtractor for name in names)
    return (
        plain
        and type(policy.mlp_extractor) is MlpExtractor
        and isinstance(space, spaces.Box)
        and space.dtype.kind == "f"
    )


def _plain_sequence(policy: Any) -> tuple[str, str] | None:
    """Where SB3's own dense layers go from the observations, which are numbers, to the one readout of a policy."""
    place = of_family(SEQUENCES, type(policy))
    space = policy.observation_space
    if place is None or not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return None
    owner, name = place
    network = getattr(policy, owner)
    stock = all(is_stock(type(network), each) for each in ("forward", "extract_features"))
    if not stock or type(network.features_extractor) is not FlattenExtractor:
        return None
    return place if isinstance(getattr(network, name, None), nn.Sequential) else None


def _takes_the_best(policy: Any) -> bool:
    """Whether a policy of DQN's family takes the action of the largest value, as DQN does."""
    return all(is_stock(type(each), "_predict") for each in (policy, policy.q_net))


def _parts(obs: Any) -> dict[str, torch.Tensor]:
    return obs if isinstance(obs, dict) else {"": obs}


def _tensors(policy: Any, obs: Any) -> Any:
    return obs_as_tensor(obs, policy.device) if isinstance(obs, (np.ndarray, dict)) else obs


def _blinded(obs: Any) -> tuple[Any, torch.Tensor | None]:
    """Tensors with zeros in the rows that are not finite, as a policy refuses a whole batch for one of them; and which rows
    those are, (n,), None where there are none.
    """
    parts = [part for part in _parts(obs).values() if part.is_floating_point()]
    if all(math.isfinite(part.sum()) for part in parts):  # one operation; where it is too large, a look at each row
        return obs, None
    blind = torch.stack([~torch.isfinite(part.flatten(1)).all(dim=1) for part in parts]).any(dim=0)
    blinded = {}
    for key, part in _parts(obs).items():
        blinded[key] = part.clone()
        blinded[key][blind] = 0
    return (blinded if isinstance(obs, dict) else blinded[""]), blind


def _not_known(latents: list[torch.Tensor], blind: torch.Tensor | None) -> list[torch.Tensor]:
    """The latents of what was blinded: nans, so that no answer is finite there."""
    if blind is None:
        return latents
    return [latent.masked_fill(blind.to(latent.device)[:, None], math.nan) for latent in latents]


@contextmanager
def _recording(policy: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name] = args[0]

    handles = [readout(policy, name).register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(policy: Any) -> Iterator[None]:
    """Layers as they are for evaluation; afterwards each as it was, also where an algorithm has switched some by hand."""
    before = [module for module in policy.modules() if module.training] if policy.training else []
    if before:
        policy.train(False)
    try:
        yield
    finally:
        for module in before:
            module.training = True


def is_stock(cls: type, name: str) -> bool:
    """Whether a method is SB3's own; that of our policies, around it, aside."""
    owners = (c.__module__ for c in cls.__mro__ if name in vars(c) and not c.__module__.startswith("sb3_qa.policies"))
    return next(owners, "").startswith(("stable_baselines3.", "sb3_contrib."))


def _blank(space: spaces.Space[Any], device: torch.device) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _blank(value, device) for key, value in space.spaces.items()}
    return torch.as_tensor(np.zeros((1, *(space.shape or ())), space.dtype), device=device)


def _blank_action(space: spaces.Space[Any], device: torch.device) -> torch.Tensor:
    """An action as a buffer holds it, flat; a whole number has no dimension of its own."""
    blank = torch.zeros((1, math.prod(space.shape)) if space.shape else (1,), device=device)
    return blank.long() if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) else blank
