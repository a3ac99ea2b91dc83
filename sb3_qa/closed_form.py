"""The gradient of the question loss in closed form, in as few operations as it takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from sb3_qa.head import QAHead, Weights
    from sb3_qa.panel import PanelShapes

__all__ = ["ClosedForm"]

Array = Any  # a numpy array or a torch tensor


class _Part(NamedTuple):
    """The questions about states, or those about actions: what they read, and where the results go."""

    x: Array
    readout: Array
    logits: Array
    d_logits: Array
    d_readout: Array
    rows: Array
    d_x: Array


class _Layer(NamedTuple):
    """One of the head's own layers: its input, with and without the ones, and its weights both ways."""

    x: Array
    units: Array
    across: Array
    back: Array


class ClosedForm:
    """Forward and backward through a head, for batches of one size, with numpy or with torch.

    An operation costs more than its arithmetic here, and so does making arrays and views: they are made once, and every
    batch is worked out in them. Inputs of a layer end in a column of ones, for the bias; states are in the upper half of
    the last one and actions in the lower, where there are both.

    :param head: whose shapes these are, or the shapes of some of its questions
    :param weights: the head's, which may change in place
    :param xp: numpy or torch
    :param dims: widths of the readouts' latents
    :param like: an array of targets (n, n_logits)
    :param acted: whether there are questions about actions
    """

    def __init__(
        self, head: QAHead | PanelShapes, weights: Weights, xp: Any, dims: Sequence[int], like: Array, acted: bool
    ) -> None:
        new: Any = partial(np.empty, dtype=np.float32) if xp is np else partial(torch.empty, device=like.device)
        n, n_state, width, w = len(like), head.n_state, head.width, weights
        self.xp, self.weights, self.n, self.acted = xp, w, n, acted
        self.scale = head.scale
        self.softmaxes = [block for block in head.blocks if block[2] > 1]
        stops = list(itertools.accumulate(dims))
        self.places = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        self.both = acted and n_state > 0
        x = new((2 * n if self.both else n, width + 1))
        x[:, width] = 1.0 / head.scale  # logits are scaled, and the bias is not
        self.units = x[:, :width]
        self.units_of_states, self.units_of_actions = self.units[:n], self.units[-n:]
        self.inputs = [new((n, layer.shape[1])) for layer in w.hidden]
        for each in self.inputs:
            each[:, -1] = 1.0
        self.latents = [(self.inputs[0] if self.inputs else x)[:, place] for place in self.places]
        self.layers = [
            _Layer(each, each[:, :-1], layer.T, layer[:, :-1])
            for each, layer in zip(self.inputs, w.hidden, strict=True)
        ]
        self.hidden, self.added = new((n, width)), new((n, width))
        self.logits, self.d_logits = new((n, head.n_logits)), new((n, head.n_logits))
        self.one, self.half = new(()), new(())
        self.one[...], self.half[...] = 1.0, 0.5 * head.scale
        self.square, self.d_x = new((len(x), width)), new((len(x), width))
        self.d_states, self.d_actions = self.d_x[:n], self.d_x[-n:]
        self.d_flat = new(head.flat.shape)
        self.d = head.weights(self.d_flat)
        split = [(slice(0, n), slice(0, n_state)), (slice(n, 2 * n), slice(n_state, head.n_logits))]
        self.parts = [
            _Part(
                x[rows],
                w.readout[columns].T,
                self.logits[:, columns],
                self.d_logits[:, columns],
                self.d.readout[columns],
                w.readout[columns, :width],
                self.d_x[rows],
            )
            for rows, columns in (split if self.both else [(slice(0, n), slice(0, head.n_logits))])
        ]

    def __call__(
        self, latents: Sequence[Array], features: Array | None, y: Array, weight: Array
    ) -> tuple[list[Array], Array]:
        """See :meth:`QAHead.gradients`. What is returned is the caller's to keep, but for the second, which the next call
        writes over.
        """
        xp, n_layers, d_logits = self.xp, len(self.layers), self.d_logits
        for place, latent in zip(self.latents, latents, strict=True):
            place[...] = latent
        for k in range(n_layers - 1):
            xp.tanh(self.layers[k].x @ self.layers[k].across, out=self.layers[k + 1].units)
        if n_layers:
            xp.matmul(self.layers[-1].x, self.layers[-1].across, out=self.hidden)
            if self.both or features is None:
                xp.tanh(self.hidden, out=self.units_of_states)
            if features is not None:
                self.hidden += xp.matmul(features, self.weights.action, out=self.added)
                xp.tanh(self.hidden, out=self.units_of_actions)
        for part in self.parts:
            xp.matmul(part.x, part.readout, out=part.logits)
        self._probabilities()
        d_logits -= y
        d_logits *= weight
        d_logits *= self.scale
        for part in self.parts:
            xp.matmul(part.d_logits.T, part.x, out=part.d_readout)
            xp.matmul(part.d_logits, part.rows, out=part.d_x)
        if not n_layers:
            d_x = self.d_x * self.one
            return [d_x[:, place] for place in self.places], self.d_flat
        square, d_hidden = self.square, self.d_states
        xp.multiply(self.units, self.units, out=square)
        xp.subtract(self.one, square, out=square)  # of tanh
        self.d_x *= square
        if features is not None:
            xp.matmul(features.T, self.d_actions, out=self.d.action)
            if self.both:
                d_hidden += self.d_actions
        for k in range(n_layers - 1, -1, -1):
            layer = self.layers[k]
            xp.matmul(d_hidden.T, layer.x, out=self.d.hidden[k])
            d_hidden = d_hidden @ layer.back
            if k:
                d_hidden *= 1.0 - layer.units * layer.units
        return [d_hidden[:, place] for place in self.places], self.d_flat

    def _probabilities(self) -> None:
        """Sigmoid or softmax of each column of the logits, as its target asks, into ``d_logits``."""
        xp, out = self.xp, self.d_logits
        xp.multiply(self.logits, self.half, out=out)
        xp.tanh(out, out=out)  # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
        out *= 0.5
        out += 0.5
        for start, stop, width in self.softmaxes:
            block = (self.logits[:, start:stop] * self.scale).reshape(self.n, -1, width)
            block = xp.exp(block - xp.amax(block, -1)[..., None])
            out[:, start:stop] = (block / block.sum(-1)[..., None]).reshape(self.n, -1)
