"""SB3's distributions of actions, with fewer steps on the way to the same numbers, bit for bit.

On the few numbers of a minibatch, most of the time of ``torch.distributions`` goes into ceremony: each of its objects checks its
parameters and each value that it is asked about by several operations, and computes what it has not been asked for inside a context.
What is here does the same arithmetic in the same order, and looks for what those checks would refuse in one number each. Where it
finds such a thing, torch's own object is asked, and refuses it.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.distributions as of_torch
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)

__all__ = ["lean"]

NO_SHAPE = torch.Size()
HALF_LOG_TWO_PI = math.log(math.sqrt(2 * math.pi))


class Categorical(of_torch.Categorical):
    """Of logits (n, k) on the CPU."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = self._param = logits - logits.logsumexp(dim=-1, keepdim=True)
        self._num_events = logits.shape[1]
        self._batch_shape, self._event_shape = logits.shape[:1], NO_SHAPE

    @cached_property
    def probs(self) -> torch.Tensor:
        if self.logits.requires_grad and not torch.is_grad_enabled():
            with torch.enable_grad():  # it may be asked for again where gradients are wanted
                return self.logits.softmax(dim=-1)
        return self.logits.softmax(dim=-1)

    def sample(self, sample_shape: Any = NO_SHAPE) -> torch.Tensor:
        if sample_shape != NO_SHAPE:
            return super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return torch.multinomial(self.probs, 1, True).reshape(-1)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if value.dtype is torch.int64 and value.shape == self._batch_shape:
            try:
                return self.logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)
            except RuntimeError:  # out of range
                pass
        return super().log_prob(value)  # type: ignore[no-untyped-call]


class Normal(of_torch.Normal):
    """Of a mean and a standard deviation (n, k) on the CPU."""

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        self.loc, self.scale = loc, scale
        self._batch_shape, self._event_shape = loc.shape, NO_SHAPE

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        variance, log_scale = self.scale**2, self.scale.log()
        told = -((value - self.loc) ** 2) / (2 * variance) - log_scale - HALF_LOG_TWO_PI
        if math.isfinite(told.detach().sum().item()):
            return told
        return super().log_prob(value)  # type: ignore[no-untyped-call]


def _suits(parameter: torch.Tensor) -> bool:
    """Whether it may be looked into here: not where that would wait for another device, nor in a graph that is being compiled."""
    return parameter.device.type == "cpu" and parameter.dim() == 2 and not torch.compiler.is_compiling()


def _categorical(logits: torch.Tensor) -> of_torch.Categorical:
    if _suits(logits):
        light = Categorical(logits)
        if math.isfinite(light.logits.detach().sum().item()):
            return light
    return of_torch.Categorical(logits=logits)


class _LeanCategorical(CategoricalDistribution):
    def proba_distribution(self, action_logits: torch.Tensor) -> Any:
        self.distribution = _categorical(action_logits)
        return self


class _LeanMultiCategorical(MultiCategoricalDistribution):
    def proba_distribution(self, action_logits: torch.Tensor) -> Any:
        self.distribution = [_categorical(split) for split in torch.split(action_logits, list(self.action_dims), dim=1)]
        return self


class _LeanDiagGaussian(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions: torch.Tensor, log_std: torch.Tensor) -> Any:
        scale = torch.ones_like(mean_actions) * log_std.exp()
        if _suits(scale) and scale.detach().min().item() > 0 and math.isfinite(mean_actions.detach().sum().item()):
            self.distribution = Normal(mean_actions, scale)
        else:
            self.distribution = of_torch.Normal(mean_actions, scale)
        return self


class _LeanSquashedDiagGaussian(SquashedDiagGaussianDistribution, _LeanDiagGaussian):
    pass


LEAN: dict[type[Distribution], type[Distribution]] = {
    kind.__mro__[1]: kind
    for kind in (_LeanCategorical, _LeanMultiCategorical, _LeanDiagGaussian, _LeanSquashedDiagGaussian)
}


def lean(distribution: Distribution | None) -> None:
    """Let a distribution of SB3's own be the lean one of its kind from now on; others stay what they are."""
    if distribution is not None:
        distribution.__class__ = LEAN.get(type(distribution), type(distribution))
