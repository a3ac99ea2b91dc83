"""Questions taught afterwards to an agent that has been trained: on its frozen trunk, or by fine-tuning it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_qa.errors import QAError
from sb3_qa.policies.mixin import EPS

__all__ = ["MutedMixin", "adopt", "anchor", "freeze", "muted_policy"]


class _WithLoss(torch.autograd.Function):
    """The identity on an output, whose backward pass sends no gradient into it, and the gradient of a loss in its place."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(grad_outputs[0]), grad_outputs[0].new_ones(())


class MutedMixin:
    """An actor-critic policy that learns from its questions alone: its own losses are computed and send no gradient.

    With :func:`anchor` it is held near the policy that it was.
    """

    anchored: tuple[Any, float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.optimizer.param_groups:  # type: ignore[attr-defined]
            group["eps"] = EPS

    def evaluate_actions(self, obs: Any, actions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions, *args, **kwargs)  # type: ignore[misc]
        loss = torch.zeros((), device=values.device)
        if self.anchored is not None:
            reference, coef = self.anchored
            masks = {"action_masks": kwargs["action_masks"]} if kwargs.get("action_masks") is not None else {}
            with torch.no_grad():
                before = reference.get_distribution(obs, **masks).distribution
            now = self.get_distribution(obs, **masks).distribution  # type: ignore[attr-defined]
            loss = coef * _kl(before, now)
        if log_prob.requires_grad:
            log_prob = _WithLoss.apply(log_prob, loss)  # type: ignore[no-untyped-call]
        if values.requires_grad:
            values.register_hook(torch.zeros_like)
        if entropy is not None and entropy.requires_grad:
            entropy.register_hook(torch.zeros_like)
        return values, log_prob, entropy


def _kl(before: Any, now: Any) -> torch.Tensor:
    """Mean KL(before || now) of torch distributions over a batch; of several dimensions their sum."""
    if isinstance(before, list):
        return torch.stack([_kl(a, b) for a, b in zip(before, now, strict=True)]).sum()
    divergence = torch.distributions.kl_divergence(before, now)
    return divergence.flatten(1).sum(1).mean() if divergence.dim() > 1 else divergence.mean()


_MADE: dict[type, type] = {}


def muted_policy(base: type[Any]) -> type[Any]:
    """The policy class that learns from its questions alone, to be given to ``qa_policy``."""
    if base not in _MADE:
        _MADE[base] = type(f"Muted{base.__name__}", (MutedMixin, base), {"__module__": __name__})
    return _MADE[base]


def adopt(policy: Any, trained: BasePolicy) -> None:
    """Give a policy with questions the weights of an agent, but for those of a head that it may have.

    :raises QAError: when the agents are not alike
    """
    own = {name: value for name, value in trained.state_dict().items() if "qa_head." not in name}
    missing, unexpected = policy.load_state_dict(own, strict=False)
    others = [name for name in missing if "qa_head." not in name]
    if others or unexpected:
        raise QAError(
            f"{type(policy).__name__} cannot take the weights of a {type(trained).__name__}: {[*others, *unexpected][:5]} differ; "
            "expected an agent of the same algorithm and arguments; train it so"
        )


def anchor(policy: Any, coef: float) -> None:
    """Hold a muted policy near what it is now, by ``coef`` times the KL divergence from it."""
    reference = copy.deepcopy(policy)
    for parameter in nn.Module.parameters(reference):
        parameter.requires_grad_(False)
    object.__setattr__(policy, "anchored", (reference, coef))  # no part of the policy's state


def freeze(policy: Any) -> None:
    """Let nothing but the head of a policy with questions learn."""
    # The losses of SAC and its like come to their backward pass by what they train alone: its gradients are zero there.
    by_gradient = hasattr(policy, "critic_target")
    for parameter in policy.parameters():
        if by_gradient:
            parameter.register_hook(torch.zeros_like)
        else:
            parameter.requires_grad_(False)
