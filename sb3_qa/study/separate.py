"""A question-answerer that shares nothing with the agent: a network of its own, as large as the agent's, on the same labels."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

from sb3_qa.policies.mixin import EPS

__all__ = ["SeparateMixin", "separate_policy"]


class Twin(nn.Module):
    """Extractor and layers like those of an actor-critic policy, with initial weights of their own."""

    of_questions = True
    """What the agent's own parameters, whose gradient is clipped, do not include, see :class:`QAPolicyMixin`."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.features_extractor = policy.make_features_extractor()
        self.layers = MlpExtractor(
            self.features_extractor.features_dim, policy.net_arch, policy.activation_fn, device=policy.device
        )
        self.readout = nn.Linear(self.layers.latent_dim_pi + self.layers.latent_dim_vf, 1)
        if policy.ortho_init:
            for module in (self.features_extractor, self.layers):
                module.apply(lambda layer: policy.init_weights(layer, gain=2.0**0.5))


class SeparateMixin:
    """An actor-critic policy whose questions are answered by a :class:`Twin` of it. The agent is what it is without questions:
    the twin takes part in its passes, and nothing comes back from it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):  # so that the agent's stream goes on as without it
            torch.manual_seed(torch.initial_seed() % 2**31 + 1)
            self.twin = Twin(self).to(self.device)  # type: ignore[arg-type, attr-defined]
        group = {"params": list(self.twin.parameters()), "eps": EPS}
        self.optimizer.add_param_group(group)  # type: ignore[attr-defined]

    def _pass_twin(self, obs: Any) -> torch.Tensor:
        features = BaseModel.extract_features(self, obs, self.twin.features_extractor)  # type: ignore[arg-type]
        return self.twin.readout(torch.cat(self.twin.layers(features), dim=1))

    def evaluate_actions(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, *args, **kwargs)  # type: ignore[misc]
        return values + 0.0 * self._pass_twin(obs), log_prob, entropy  # so that the backward pass comes by

    def predict_values(self, obs: Any) -> torch.Tensor:
        values: torch.Tensor = super().predict_values(obs)  # type: ignore[misc]
        self._pass_twin(obs)
        return values


_MADE: dict[type, type] = {}


def separate_policy(base: type[ActorCriticPolicy]) -> type[ActorCriticPolicy]:
    """The policy class whose answerer is separate; give it to ``qa_policy`` with ``qa_readouts=["twin.readout"]``."""
    if base not in _MADE:
        _MADE[base] = type(f"Separate{base.__name__}", (SeparateMixin, base), {"__module__": __name__})
    return _MADE[base]
