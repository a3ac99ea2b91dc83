"""What critics know of an action in a state, and the target networks that continuations are read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_qa.taps import _Dense, _evaluating, _layers_of, _recording, _tensors, is_stock, of_family, plain, readout

__all__ = ["CRITICS", "TARGETS", "Critics"]

Floats = NDArray[np.float32]

CRITICS = {"SACPolicy": 1, "TD3Policy": 1, "TQCPolicy": 1, "CrossQPolicy": 2}
"""Families whose critics, ``critic.qf0`` and so on, read a state and an action; with how many batches a training pass of theirs
joins, the first of which is the one from the replay buffer."""

TARGETS = {
    "DQNPolicy": ("q_net", "q_net_target"),
    "QRDQNPolicy": ("quantile_net", "quantile_net_target"),
    "SACPolicy": ("critic", "critic_target"),
    "TD3Policy": ("actor", "actor_target"),
    "TQCPolicy": ("critic", "critic_target"),
}
"""Families with target networks: the network that carries the head, and its target, which carries a target head."""


class Critics:
    """Reads the critics of a policy at actions: the inputs of their last layers.

    :param policy: of any family; one without critics has none to be read
    """

    def __init__(self, policy: BasePolicy) -> None:
        joined = of_family(CRITICS, type(policy))
        critic: Any = policy.critic if joined else nn.Module()
        self.names = tuple(f"critic.{name}" for name, _ in critic.named_children() if name.startswith("qf"))
        """Of their modules."""
        self.joined = joined or 1
        self.dims = [_width_into(readout(policy, name)) for name in self.names]
        self._dense = [_Dense() for _ in self.names]
        self.clear()

        self.passing: dict[int, torch.Tensor] | None = None

    def clear(self) -> None:
        """Forget a pass."""
        self.seen: list[torch.Tensor | None] = [None] * len(self.names)

    def __bool__(self) -> bool:
        return bool(self.names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Critics:
        critics = Critics.__new__(Critics)
        critics.__dict__.update(self.__getstate__())
        return critics

    def __getstate__(self) -> dict[str, Any]:
        dense = [_Dense() for _ in self.names]
        return {**self.__dict__, "_dense": dense, "seen": [None] * len(self.names), "passing": None}

    def read(self, policy: Any, obs: Any, actions: NDArray[Any], critic: Any = None) -> Floats:
        """What the critics make of actions, (n, critic_dim), or (n, m, critic_dim).

        :param obs: (n, ...), arrays or tensors
        :param actions: (n, *action_shape), or (n, m, *action_shape) for m candidates each, as the environment takes them
        :param critic: to be read in place of ``policy.critic``, its target
        """
        critic = policy.critic if critic is None else critic
        shape = actions.shape[: actions.ndim - len(policy.action_space.shape)]
        acts = policy.scale_action(actions) if policy.squash_output else actions
        acts = np.asarray(acts, np.float32).reshape(np.prod(shape, dtype=int), -1)
        times = len(acts) // max(shape[0], 1)
        networks = [getattr(critic, name.partition(".")[2]) for name in self.names]
        latents = self._read_dense(policy, obs, acts, times, networks)
        if latents is None:
            latents = self._read(policy, obs, acts, times, critic)
        return np.concatenate(latents, axis=1).reshape(*shape, -1)

    def _read_dense(
        self, policy: Any, obs: Any, acts: Floats, times: int, networks: Sequence[nn.Module]
    ) -> list[Floats] | None:
        """The latents (n, dim) of each critic, if all of them are dense layers and observations are numbers."""
        if not (policy.qa_taps.is_dense and isinstance(obs, np.ndarray)):
            return None
        x = obs.reshape(len(obs), -1).astype(np.float32, copy=False)
        x = np.concatenate([x if times == 1 else np.repeat(x, times, axis=0), acts], axis=1)
        latents = []
        for dense, network in zip(self._dense, networks, strict=True):
            layers = _layers_of(network)
            latent = dense(layers[: max(n for n, layer in enumerate(layers) if isinstance(layer, nn.Linear))], x)
            if latent is None:
                return None
            latents.append(latent)
        return latents

    def _read(self, policy: Any, obs: Any, acts: Floats, times: int, critic: Any) -> list[Floats]:
        with torch.no_grad(), _evaluating(policy), self._recording(policy, critic) as seen:
            given = torch.as_tensor(acts, device=policy.device)
            if is_stock(
                type(plain(critic)), "forward"
            ):  # its extractor need not see an observation once for every candidate
                features = critic.extract_features(_tensors(policy, obs), critic.features_extractor)
                for network in critic.q_networks:
                    network(torch.cat([_repeated(features, times), given], dim=1))
            else:
                critic(_repeated(_tensors(policy, obs), times), given)
        return [latent.cpu().numpy() for _, latent in sorted(seen.items())]

    @contextmanager
    def _recording(self, policy: Any, critic: Any) -> Iterator[dict[int, torch.Tensor]]:
        """Latents by index; those of the live critic by the hooks that are there for good, see :meth:`Taps._recording_pass`."""
        if critic is policy.critic:
            seen = self.passing = {}
            try:
                yield seen
            finally:
                self.passing = None
            return
        with _recording(critic, tuple(name.partition(".")[2] for name in self.names)) as by_name:
            found: dict[int, torch.Tensor] = {}
            yield found
            found.update(enumerate(by_name.values()))


def _width_into(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _repeated(x: Any, times: int) -> Any:
    if isinstance(x, dict):
        return {key: _repeated(value, times) for key, value in x.items()}
    return x if times == 1 else x.repeat_interleave(times, dim=0)
