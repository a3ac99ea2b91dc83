"""From questions to the rows that the head reads its answers with, and from actions to features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Target

__all__ = ["ActionFeatures", "initial_bias", "initial_rows"]


def initial_rows(
    encoder: str, catalogue: Catalogue, width: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n_logits, width) and biases (n_logits,) of the encoder ``"index"``: a row of its own for every logit."""
    if encoder != "index":
        raise QAError(
            f"qa_encoder got {encoder!r}; expected 'index' for rows of their own; make the head with make_head()"
        )
    rows = torch.randn(catalogue.n_logits, width, generator=generator) * 0.025  # logits start near their biases
    return rows, torch.cat([torch.full((target.width,), initial_bias(target)) for target in catalogue.targets])


def initial_bias(target: Target) -> float:
    """Of each logit of a target, before there are labels: anything is as likely as not.

    For the hazards h of an event that is within its horizon of K steps: 1 - (1 - h)^K = 1/2.
    """
    if target.kind != "event":
        return 0.0
    hazard = 1.0 - 0.5 ** (1.0 / target.width)
    return math.log(hazard / (1.0 - hazard))


class ActionFeatures:
    """Actions as vectors: one-hot for discrete parts, bits as they are, a box scaled to [-1, 1].

    :param space: the agent's action space
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        if isinstance(space, spaces.Discrete):
            self.n_features, self._start = int(space.n), int(space.start)
        elif isinstance(space, spaces.MultiDiscrete):
            self.n_features = int(space.nvec.sum())
            self._first = np.cumsum(space.nvec.ravel()) - space.nvec.ravel() - space.start.ravel()
        elif isinstance(space, (spaces.MultiBinary, spaces.Box)):
            self.n_features = math.prod(space.shape)
        else:
            raise QAError(
                f"questions about actions got the action space {space}; expected Discrete, MultiDiscrete, MultiBinary or "
                "Box; leave {action} out of the questions"
            )
        self._one_hot = np.eye(self.n_features, dtype=np.float32)

    def __call__(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """Features (..., n_features) of actions (..., *action_shape)."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            return self._one_hot.take(actions.astype(np.intp) - self._start, axis=0)
        flat = actions.reshape(*actions.shape[: actions.ndim - len(space.shape or ())], -1)
        if isinstance(space, spaces.MultiDiscrete):
            return np.asarray(self._one_hot[flat.astype(np.intp) + self._first].sum(axis=-2))
        if isinstance(space, spaces.Box):
            low, high = space.low.ravel(), space.high.ravel()
            flat = (flat - (high + low) / 2) / ((high - low) / 2)
        return flat.astype(np.float32)
