"""The answering head: latents of the agent in, logits of every question out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from sb3_qa.answers import Answer, ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.encoders import ActionEncoder, make_encoder
from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Choice, Instance, Number

__all__ = ["QAHead", "decode", "survival"]

Floats = NDArray[np.float32]


class QAHead(nn.Module):
    """Reads the agent's latents and answers; its own few units, and for questions about actions the action added in.

    ``hidden`` is what the head makes of the latents before its last non-linearity; a question about the state reads
    tanh(hidden), one about an action reads tanh(hidden + W a), so that what an action does may depend on the state.

    :param catalogue: the questions
    :param latent_dim: width of the latents (of all readouts together)
    :param action_space: the agent's
    :param net_arch: widths of the head's own layers; ``[]`` reads the latents directly (no questions about actions)
    :param encoder: how rows are made from questions
    :param seed: of the initial weights; no shared random stream is used
    """

    def __init__(
        self,
        catalogue: Catalogue,
        latent_dim: int,
        action_space: spaces.Space,
        net_arch: Sequence[int],
        encoder: str = "index",
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.catalogue = catalogue
        self.latent_dim = latent_dim
        self.n_state = catalogue.n_state_logits
        self.n_logits = catalogue.n_logits
        widths = [latent_dim, *net_arch]
        self.layers = nn.ModuleList(_linear(a, b, generator) for a, b in zip(widths, widths[1:], strict=False))
        self.encoder = make_encoder(encoder, catalogue, widths[-1], generator)
        self.action_encoder: ActionEncoder | None = None
        if self.n_state < self.n_logits:
            if not net_arch:
                raise QAError(
                    "qa_net_arch=[] got questions about {action}; expected at least one layer, where state and action meet; "
                    "give e.g. qa_net_arch=[64]"
                )
            self.action_encoder = ActionEncoder(action_space, widths[-1], generator)
        self.blocks = _blocks(catalogue)

    def hidden(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, latent_dim) -> (n, width), before the last non-linearity."""
        for n, layer in enumerate(self.layers):
            latents = layer(torch.tanh(latents) if n else latents)
        return latents

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last non-linearity; none where the head reads the latents themselves."""
        return torch.tanh(hidden) if len(self.layers) else hidden

    def state_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, n_state)."""
        weight, bias = self.encoder()
        return nn.functional.linear(self.activate(hidden), weight[: self.n_state], bias[: self.n_state])

    def action_logits(self, hidden: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Logits of the questions about actions.

        :param hidden: (n, width)
        :param actions: (n, *action_shape), or (n, m, *action_shape) for m candidates each
        :return: (n, n_logits - n_state), or (n, m, ...)
        """
        assert self.action_encoder is not None
        weight, bias = self.encoder()
        added = self.action_encoder(actions)
        if added.dim() == 3:
            hidden = hidden[:, None]
        return nn.functional.linear(torch.tanh(hidden + added), weight[self.n_state :], bias[self.n_state :])

    def forward(self, latents: torch.Tensor, actions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all questions, (n, n_logits): about the states and about the actions executed in them."""
        hidden = self.hidden(latents)
        if self.action_encoder is None:
            return self.state_logits(hidden)
        assert actions is not None
        about_action = self.action_logits(hidden, actions)
        return torch.cat([self.state_logits(hidden), about_action], dim=1) if self.n_state else about_action

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Sigmoid or softmax of each column of (n, n_logits), as its target asks."""
        parts = []
        for start, stop, width in self.blocks:
            block = logits[:, start:stop]
            parts.append(torch.sigmoid(block) if width == 1 else block.unflatten(1, (-1, width)).softmax(-1).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def decode(instance: Instance, logits: Floats) -> Answer:
    """The answer in the logits of an instance's target.

    :param logits: (..., width of the target)
    """
    answer = instance.question.answer
    truth = instance.question.truth
    if truth.is_event:
        assert instance.horizon is not None
        alive = survival(logits[..., : instance.horizon])
        if truth.operator == "steps_until":
            passed = np.concatenate([-np.diff(alive[..., :-1], axis=-1), alive[..., -2:-1]], axis=-1)
            return NumberAnswer(np.arange(1, instance.horizon + 1, dtype=np.float32), passed, whole=True)
        return YesNoAnswer(alive[..., -1] if truth.operator == "always" else 1.0 - alive[..., -1])
    if isinstance(answer, Choice):
        return ChoiceAnswer(answer.options, _softmax(logits))
    if isinstance(answer, Number):
        support = np.linspace(answer.low, answer.high, logits.shape[-1], dtype=np.float32)
        return NumberAnswer(support, _softmax(logits))
    return YesNoAnswer(1.0 - survival(logits)[..., -1])


def survival(hazard_logits: Floats) -> Floats:
    """Discrete-time survival curve S(j) = prod_{i<=j} (1 - h_i) of hazards h = sigmoid(logits).

    Source: Gensheimer and Narasimhan 2019, "A scalable discrete-time survival model for neural networks".

    :param hazard_logits: (..., K)
    :return: (..., K + 1), from S(0) = 1, never increasing
    """
    logits = np.asarray(hazard_logits, np.float64)
    log_alive = np.cumsum(-np.logaddexp(0.0, logits), axis=-1)  # log(1 - sigmoid(x)) = -softplus(x)
    return np.concatenate([np.ones((*logits.shape[:-1], 1), np.float32), np.exp(log_alive).astype(np.float32)], axis=-1)


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in))
        layer.bias.zero_()
    return layer


def _blocks(catalogue: Catalogue) -> list[tuple[int, int, int]]:
    """Runs of columns (start, stop, width) that are squashed alike; width 1 stands for sigmoids."""
    blocks: list[tuple[int, int, int]] = []
    for target in catalogue.targets:
        width = target.width if target.kind in ("choice", "number") else 1
        if blocks and blocks[-1][2] == width:
            blocks[-1] = (blocks[-1][0], target.stop, width)
        else:
            blocks.append((target.start, target.stop, width))
    return blocks
