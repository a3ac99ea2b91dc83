"""From questions to rows of the head, and from actions to what the head adds to its hidden units."""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Target

__all__ = ["ActionEncoder", "IndexEncoder", "make_encoder"]


class IndexEncoder(nn.Module):
    """A row of weights of its own for every logit.

    :param catalogue: the questions
    :param width: number of features a row reads
    :param generator: source of the initial weights, so that no shared random stream is used
    """

    def __init__(self, catalogue: Catalogue, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(catalogue.n_logits, width, generator=generator) * (0.01 / math.sqrt(width)))
        self.bias = nn.Parameter(torch.cat([_initial_bias(target) for target in catalogue.targets]))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n_logits, width) and biases (n_logits,)."""
        return self.weight, self.bias


def make_encoder(name: str, catalogue: Catalogue, width: int, generator: torch.Generator) -> nn.Module:
    """Build the encoder that ``policy_kwargs["qa_encoder"]`` names."""
    if name != "index":
        raise QAError(f"qa_encoder got {name!r}; expected 'index'; leave it out")
    return IndexEncoder(catalogue, width, generator)


def _initial_bias(target: Target) -> torch.Tensor:
    # An event starts as likely as not within its horizon: 1 - (1 - h)^K = 1/2.
    hazard = 1.0 - 0.5 ** (1.0 / target.width)
    return torch.full((target.width,), math.log(hazard / (1.0 - hazard)) if target.kind == "event" else 0.0)


class ActionEncoder(nn.Module):
    """A linear map of an action's features: one-hot for discrete parts, bits, or the box scaled to [-1, 1].

    :param space: the agent's action space
    :param width: number of hidden units the action is added to
    """

    def __init__(self, space: spaces.Space, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        if isinstance(space, spaces.Discrete):
            self.n_features = int(space.n)
        elif isinstance(space, spaces.MultiDiscrete):
            self.n_features = int(space.nvec.sum())
            first = np.concatenate([[0], np.cumsum(space.nvec.ravel())[:-1]])
            self.register_buffer("_first", torch.as_tensor(first), persistent=False)
        elif isinstance(space, spaces.MultiBinary):
            self.n_features = math.prod(space.shape)
        elif isinstance(space, spaces.Box):
            self.n_features = math.prod(space.shape)
            low, high = (torch.as_tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
            self.register_buffer("_middle", (high + low) / 2, persistent=False)
            self.register_buffer("_half", (high - low) / 2, persistent=False)
        else:
            raise QAError(
                f"questions about actions got the action space {space}; expected Discrete, MultiDiscrete, MultiBinary or Box; "
                "leave {action} out of the questions"
            )
        self.weight = nn.Parameter(torch.randn(self.n_features, width, generator=generator) / math.sqrt(2.0))

    @property
    def n_actions(self) -> int | None:
        """Number of actions that can be listed one by one, None if there are too many (or infinitely many)."""
        return int(self.space.n) if isinstance(self.space, spaces.Discrete) else None

    def features(self, actions: torch.Tensor) -> torch.Tensor:
        """Features (..., n_features) of actions (..., *action_shape)."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            return nn.functional.one_hot(actions.long() - int(space.start), self.n_features).to(self.weight.dtype)
        flat = actions.flatten(actions.dim() - len(space.shape or ()))
        if isinstance(space, spaces.MultiDiscrete):
            start = torch.as_tensor(space.start.ravel(), device=flat.device)
            index = flat.long() - start + self._first
            return torch.zeros(*flat.shape[:-1], self.n_features, device=flat.device).scatter_(-1, index, 1.0)
        flat = flat.to(self.weight.dtype)
        return flat if isinstance(space, spaces.MultiBinary) else (flat - self._middle) / self._half

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        """What actions (..., *action_shape) add to the hidden units: (..., width)."""
        if isinstance(self.space, spaces.Discrete):
            return nn.functional.embedding(actions.long() - int(self.space.start), self.weight)
        return self.features(actions) @ self.weight
