"""Where an SB3 agent keeps what it knows: the inputs of its last layers, the *readouts*."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_qa.errors import QAError

__all__ = ["READOUTS", "Taps"]

Floats = NDArray[np.float32]

READOUTS: dict[type[BasePolicy], tuple[str, ...]] = {
    ActorCriticPolicy: ("action_net", "value_net"),
}
"""Names of the readouts of each family of policies, in the order of its class hierarchy."""

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


class Taps:
    """Reads the latents of a policy, in passing (hooks on the readouts) or on request.

    :param policy: a policy of a family in :data:`READOUTS`
    :raises QAError: when its readouts cannot be found
    """

    def __init__(self, policy: BasePolicy) -> None:
        family = next((names for kind, names in READOUTS.items() if isinstance(policy, kind)), None)
        if family is None:
            raise QAError(
                f"qa_policy got {type(policy).__name__}; expected a subclass of "
                f"{', '.join(kind.__name__ for kind in READOUTS)}; use PPO or A2C, or derive the policy from one of these"
            )
        missing = [name for name in family if not isinstance(getattr(policy, name, None), nn.Module)]
        if missing:
            raise QAError(
                f"{type(policy).__name__} has no module {missing[0]!r}; expected the readouts {family}; name its last layers so"
            )
        self.names = family
        self._direct = all(_is_stock(type(policy), name) for name in _PASSES)
        self._dense = (_Dense(), _Dense()) if self._direct and _is_plain_mlp(policy) else None
        self.seen: list[torch.Tensor | None] = [None] * len(family)
        self._watched: list[torch.Tensor] = []
        # Two readouts of one and the same tensor (a shared extractor without layers of their own) count once.
        latents = self._by_evaluation(policy)
        self.keep = [n for n, x in enumerate(latents) if all(x is not other for other in latents[:n])]
        self.latent_dim = sum(latents[n].shape[-1] for n in self.keep)

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        return self._copy()

    def __getstate__(self) -> dict[str, Any]:
        dense = None if self._dense is None else (_Dense(), _Dense())
        return {**self.__dict__, "seen": [None] * len(self.names), "_watched": [], "_dense": dense}

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

    def clear(self) -> None:
        """Forget a pass."""
        self.seen = [None] * len(self.names)

    def read(self, policy: Any, obs: Any) -> list[Floats]:
        """Latents of each readout (n, dim) for a batch of observations, arrays or tensors; no gradients, no use of a random stream."""
        if self._dense is not None and isinstance(obs, np.ndarray):
            x = obs.reshape(len(obs), -1).astype(np.float32, copy=False)
            nets = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
            small = [dense(net, x) for dense, net in zip(self._dense, nets, strict=True)]
            if small[0] is not None and small[1] is not None:
                return [small[0], small[1]]
        training = policy.training
        if training:
            policy.set_training_mode(False)
        try:
            with torch.no_grad():
                return [latent.cpu().numpy() for latent in self._by_torch(policy, _tensors(policy, obs))]
        finally:
            if training:
                policy.set_training_mode(True)

    def _by_torch(self, policy: Any, obs: Any) -> list[torch.Tensor]:
        if not self._direct:
            return self._by_passes(policy, obs)
        features = policy.extract_features(obs)
        if policy.share_features_extractor:
            return list(policy.mlp_extractor(features))
        pi_features, vf_features = features
        return [policy.mlp_extractor.forward_actor(pi_features), policy.mlp_extractor.forward_critic(vf_features)]

    def distribution(self, policy: Any, obs: Any, latents: list[Floats]) -> Any:
        """The policy's distribution over actions, from latents that were read of these observations."""
        with torch.no_grad():
            if self._direct:
                return policy._get_action_dist_from_latent(torch.as_tensor(latents[0], device=policy.device))
            return policy.get_distribution(_tensors(policy, obs))

    def preferred(self, policy: Any, obs: Any, latents: list[Floats]) -> NDArray[Any]:
        """The actions (n, ...) the policy likes best."""
        if self._direct and isinstance(policy.action_space, spaces.Discrete):  # without building a distribution
            layer = policy.action_net
            own_hook_only = len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks
            step = _step_of(layer) if own_hook_only else None
            if isinstance(step, tuple):
                logits = latents[0] @ step[0]
                return np.argmax(logits if step[1] is None else logits + step[1], axis=1)
        with torch.no_grad():
            actions: NDArray[Any] = (
                self.distribution(policy, obs, latents).get_actions(deterministic=True).cpu().numpy()
            )
            return actions

    def version(self, policy: Any) -> int:
        """A number that changes whenever an optimiser, or a state that is loaded, changes the agent's weights."""
        if not self._watched:
            self._watched = list(policy.parameters())
        return sum([parameter._version for parameter in self._watched]) ^ self._watched[0].data_ptr()

    def _by_passes(self, policy: Any, obs: Any) -> list[torch.Tensor]:
        with _recording(policy, self.names) as seen:
            policy.get_distribution(obs)
            policy.predict_values(obs)
        return [seen[name] for name in self.names]

    def _by_evaluation(self, policy: Any) -> list[torch.Tensor]:
        """Run the pass that training uses, once, on a blank observation, to see what enters the readouts."""
        training = policy.training
        policy.train(False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _recording(policy, self.names) as seen:
            policy.evaluate_actions(
                _blank(policy.observation_space, policy.device), _blank_action(policy.action_space, policy.device)
            )
        policy.train(training)
        unread = [name for name in self.names if name not in seen]
        if unread:
            raise QAError(
                f"{type(policy).__name__}.evaluate_actions() does not call {unread[0]!r}; expected a pass through all of {self.names}, "
                "which is where the question loss joins; call it as a module"
            )
        return [seen[name] for name in self.names]


class _Dense:
    """A sequence of linear layers and activations, computed with numpy on the parameters where they lie.

    On a few units, torch takes several times as long to begin an operation as the arithmetic takes.
    """

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._steps: list[tuple[Floats, Floats | None] | Callable[[Floats], Floats]] = []

    def __call__(self, net: nn.Sequential, x: Floats) -> Floats | None:
        """(n, n_in) -> (n, n_out); None where the layers are others, are elsewhere than on the CPU, or have hooks."""
        key: list[Any] = []
        for layer in net._modules.values():
            assert layer is not None
            if layer._forward_hooks or layer._forward_pre_hooks:
                return None
            key.append(layer)
            key += [parameter.data_ptr() for parameter in layer._parameters.values() if parameter is not None]
        if key != self._key:
            steps = [_step_of(layer) for layer in net]
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


def _tensors(policy: Any, obs: Any) -> Any:
    return obs_as_tensor(obs, policy.device) if isinstance(obs, (np.ndarray, dict)) else obs


@contextmanager
def _recording(policy: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name] = args[0]

    handles = [operator.attrgetter(name)(policy).register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_stock(cls: type, name: str) -> bool:
    owner = next((c for c in cls.__mro__ if name in vars(c)), None)
    return owner is not None and owner.__module__.startswith("stable_baselines3.")


def _blank(space: spaces.Space[Any], device: torch.device) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _blank(value, device) for key, value in space.spaces.items()}
    return torch.as_tensor(np.zeros((1, *(space.shape or ())), space.dtype), device=device)


def _blank_action(space: spaces.Space[Any], device: torch.device) -> torch.Tensor:
    blank = torch.zeros((1, *(space.shape or ())), device=device)
    return blank.long() if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) else blank
