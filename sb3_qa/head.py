"""The answering head: latents of the agent in, logits of every question out.

The head is small, and on small matrices the overhead of an operation counts more than its arithmetic; numpy's is a
fraction of torch's. So all weights live in one flat parameter (one tensor for the optimiser), answers are computed with
numpy, and the gradient of the loss in closed form, with numpy on the CPU and the same lines with torch elsewhere.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from sb3_qa.answers import Answer, ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.closed_form import ClosedForm
from sb3_qa.encoders import ActionFeatures, initial_rows
from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Choice, Instance, Number

__all__ = ["QAHead", "Weights", "decode", "survival"]

Floats = NDArray[np.float32]
Array = Any  # a numpy array or a torch tensor

LONGEST_AVERAGE = 500  # updates that answers are averaged over


class Weights(NamedTuple):
    """The head's weights: views into its flat parameter, or their gradients. Biases stand in the last columns."""

    readout: Array
    """(n_logits, width + 1)"""
    action: Array
    """(n_action_features, width)"""
    hidden: list[Array]
    """(n_out, n_in + 1) of each of the head's own layers."""

    @property
    def rows(self) -> Array:
        """(n_logits, width)"""
        return self.readout[:, :-1]

    @property
    def bias(self) -> Array:
        """(n_logits,)"""
        return self.readout[:, -1]

    @property
    def layers(self) -> list[tuple[Array, Array]]:
        """(n_out, n_in) and (n_out,) of each of the head's own layers."""
        return [(layer[:, :-1], layer[:, -1]) for layer in self.hidden]


class _Answering(NamedTuple):
    """The weights that answer, for numpy, each as a product takes it: transposed, beside its biases."""

    layers: list[tuple[Floats, Floats]]
    action: Floats
    states: tuple[Floats, Floats]
    """Of the questions about states."""
    actions: tuple[Floats, Floats]
    """Of those about actions."""
    bias: Floats
    """Of all questions."""


class QAHead(nn.Module):
    """Reads the agent's latents and answers; its own few units, and for questions about actions the action added in.

    ``hidden`` is what the head makes of the latents before its last non-linearity; a question about the state reads
    tanh(hidden), one about an action reads tanh(hidden + features(a) A), so that what an action does may depend on the
    state. Logits are scaled by 4/sqrt(width), so that a step of the optimiser moves an answer by as much whatever the
    width (arXiv 2011.14522); at 1/sqrt(width) answers about rare events stayed blunt for long.

    Answers are given with a running average of the weights, :attr:`average`: what an agent meets in one rollout pulls the
    weights to and fro, and the continuations of cut futures are answers too, which then change as slowly as those of a
    target network.

    :param catalogue: the questions
    :param latent_dim: width of the latents (of all readouts together)
    :param action_space: the agent's
    :param net_arch: widths of the head's own layers; ``[]`` reads the latents directly (no questions about actions)
    :param encoder: how rows are made from questions
    :param seed: of the initial weights; no shared random stream is used
    :param critic_dims: widths of the latents of critics; they belong to an action in a state, and are read as further features
        of the action
    """

    def __init__(
        self,
        catalogue: Catalogue,
        latent_dim: int,
        action_space: spaces.Space[Any],
        net_arch: Sequence[int],
        encoder: str = "index",
        seed: int = 0,
        critic_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.latent_dim = latent_dim
        self.critic_dims = list(critic_dims)
        self.of_target = False
        """Whether it belongs to a target network, see :meth:`target`."""
        self.n_state = catalogue.n_state_logits
        self.n_logits = catalogue.n_logits
        self.action_features: ActionFeatures | None = None
        if self.n_state < self.n_logits:
            if not net_arch:
                raise QAError(
                    "qa_net_arch=[] got questions about {action}; expected at least one layer, where state and action meet; "
                    "give e.g. qa_net_arch=[64]"
                )
            self.action_features = ActionFeatures(action_space)
        widths = [latent_dim, *net_arch]
        self.width = widths[-1]
        self.scale = 4.0 / math.sqrt(self.width)
        self.blocks = _blocks(catalogue)
        n_features = self.action_features.n_features if self.action_features else 0
        critic_dim = sum(critic_dims)
        shapes = [(self.n_logits, self.width + 1), (n_features + critic_dim, self.width)]
        shapes += [(n_out, n_in + 1) for n_in, n_out in itertools.pairwise(widths)]
        stops = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        self._places = list(zip([0, *stops], stops, shapes, strict=False))
        generator = torch.Generator().manual_seed(seed)
        rows, bias = initial_rows(encoder, catalogue, self.width, generator)
        parts = [torch.cat([rows, bias[:, None]], dim=1)]
        parts.append(torch.randn(n_features, self.width, generator=generator) / math.sqrt(2.0))
        parts.append(torch.randn(critic_dim, self.width, generator=generator) / math.sqrt(max(critic_dim, 1)))
        for n_out, n_in_and_bias in shapes[2:]:
            weight = torch.randn(n_out, n_in_and_bias - 1, generator=generator) / math.sqrt(n_in_and_bias - 1)
            parts.append(torch.cat([weight, torch.zeros(n_out, 1)], dim=1))
        self.flat = nn.Parameter(torch.cat([part.flatten() for part in parts]))
        self.average: torch.Tensor
        self.n_updates: torch.Tensor
        self.register_buffer("average", self.flat.detach().clone())
        self.register_buffer("n_updates", torch.zeros(()))  # a float, as all of a policy's state is; exact up to 2**24
        self._learning: tuple[int, Weights] | None = None  # views, and the place that they are of
        self._answering: tuple[int, _Answering] | None = None
        self._closed_form: ClosedForm | None = None
        self._followed = self.flat._version  # of the weights that the average has taken in
        self.register_load_state_dict_post_hook(_both_are_loaded)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_learning": None, "_answering": None, "_closed_form": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._followed = self.flat._version

    @property
    def version(self) -> int:
        """A number that changes whenever the weights do."""
        return self.flat._version  # the average follows it

    def follow(self) -> None:
        """Let the weights that answer follow those that learn, after a step of the optimiser.

        The average is over the last tenth of all updates, or the last ``LONGEST_AVERAGE`` of them: it settles while the
        agent does, and is there from the first update on.
        Source: the polynomial-decay averaging of Shamir and Zhang 2013 (arXiv 1212.1824).
        """
        self.n_updates.add_(1)
        share = max(10.0 / (10.0 + self.n_updates.item()), 1.0 / LONGEST_AVERAGE)
        flat, average = self.flat.detach(), self.average
        if flat.is_cpu:
            difference = flat.numpy() - (target := average.numpy())
            difference *= share
            target += difference
        else:
            average.lerp_(flat, share)
        self.__dict__["_followed"] = flat._version  # as attributes of a module are slow to be set

    def target(self) -> QAHead:
        """The head of a target network: a copy that answers by :attr:`flat`, which the algorithm moves with that network."""
        head = copy.deepcopy(self, {id(self.catalogue): self.catalogue})
        head.flat.requires_grad_(False)
        head.of_target = True
        return head

    def weights(self, flat: Array) -> Weights:
        """The weights in a flat array, as views."""
        readout, action, *hidden = [flat[start:stop].reshape(shape) for start, stop, shape in self._places]
        return Weights(readout, action, hidden)

    def _that_learn(self) -> Weights:
        """The weights that learn: views that follow every update, numpy's on the CPU."""
        flat = self.flat
        if self._learning is None or self._learning[0] != flat.data_ptr():
            self._learning = flat.data_ptr(), self.weights(flat.detach().numpy() if flat.is_cpu else flat.detach())
        return self._learning[1]

    def _that_answer(self) -> _Answering:
        """The weights that answer: views that follow every update on the CPU, copies that are renewed after each elsewhere."""
        flat, average = self.flat, self.average
        if self.of_target:  # moved by polyak_update(), which leaves the version as it was
            average.copy_(flat.detach())
            self._answering = None
        elif self._followed != flat._version:  # written by hand, not by an optimiser
            average.copy_(flat.detach())
            self._followed = flat._version
        key = average.data_ptr() if average.is_cpu else flat._version + average._version  # either may be loaded alone
        if self._answering is None or self._answering[0] != key:
            w, n = self.weights(average.cpu().numpy()), self.n_state
            layers = [(weight.T, bias) for weight, bias in w.layers]
            parts = (w.rows[:n].T, w.bias[:n]), (w.rows[n:].T, w.bias[n:])
            self._answering = key, _Answering(layers, w.action, *parts, w.bias)
        return self._answering[1]

    def hidden(self, latents: Floats) -> Floats:
        """(n, latent_dim) -> (n, width), before the last non-linearity."""
        for n, (across, bias) in enumerate(self._that_answer().layers):
            latents = (np.tanh(latents) if n else latents) @ across
            latents += bias
        return latents

    def state_logits(self, hidden: Floats) -> Floats:
        """(n, width) -> (n, n_state)."""
        w = self._that_answer()
        return self._logits(np.tanh(hidden) if w.layers else hidden, w.states)

    def action_logits(self, hidden: Floats, actions: NDArray[Any], critics: Floats | None = None) -> Floats:
        """Logits of the questions about actions.

        :param hidden: (n, width)
        :param actions: (n, *action_shape), or (n, m, *action_shape) for m candidates each
        :param critics: latents of the critics, if they are read: (n, sum(critic_dims)), or (n, m, ...)
        :return: (n, n_logits - n_state), or (n, m, ...)
        """
        w = self._that_answer()
        return self._logits(np.tanh(self._acted(w, hidden, actions, critics)), w.actions)

    def hazard_gradient(
        self, hidden: Floats, actions: NDArray[Any], start: int, stop: int, critics: Floats | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The cumulative hazard -log(1 - risk) of actions, and its gradient by their features, in closed form.

        The risk is 1 - prod_j (1 - sigmoid(l_j)), so that this is sum_j softplus(l_j): it has a slope even where the risk
        itself is so near to 1 that it has none.

        :param hidden: (n, width)
        :param actions: (n, *action_shape)
        :param start: first logit of the hazards, counted from the first question about actions
        :param stop: after the last
        :param critics: (n, critic_dim), held as they are
        :return: (n,), and (n, n_action_features)
        """
        w = self._that_answer()
        x = np.tanh(self._acted(w, hidden, actions, critics))
        across, bias = w.actions[0][:, start:stop], w.actions[1][start:stop]
        logits = (x @ across * self.scale + bias).astype(np.float64)
        hazard = np.logaddexp(0.0, logits).sum(axis=1)
        d_logits = np.exp(-np.logaddexp(0.0, -logits))
        d_hidden = (d_logits @ across.T * self.scale) * (1.0 - np.square(x))
        assert self.action_features is not None
        return hazard, d_hidden @ w.action[: self.action_features.n_features].T

    def step_logits(
        self, before: Floats, actions: NDArray[Any], after: Floats, critics: Floats | None = None
    ) -> Floats:
        """Logits of all questions (n, n_logits): about the states after, and about the actions taken in those before.

        :param before: (n, width)
        :param actions: (n, *action_shape)
        :param after: (n, width)
        :param critics: latents of the critics before, if they are read: (n, sum(critic_dims))
        """
        n, w = len(before), self._that_answer()
        x = np.tanh(np.concatenate([after, self._acted(w, before, actions, critics)]))
        logits = np.empty((n, self.n_logits), np.float32)
        np.matmul(x[:n], w.states[0], out=logits[:, : self.n_state])
        np.matmul(x[n:], w.actions[0], out=logits[:, self.n_state :])
        logits *= self.scale
        logits += w.bias
        return logits

    def _acted(self, w: _Answering, hidden: Floats, actions: NDArray[Any], critics: Floats | None) -> Floats:
        """``hidden`` with the actions added in: (n, width), or (n, m, width)."""
        assert self.action_features is not None
        features = self.action_features(actions)
        added: Floats = (features if critics is None else np.concatenate([features, critics], axis=-1)) @ w.action
        added += hidden[:, None] if added.ndim == 3 else hidden
        return added

    def _logits(self, x: Floats, readout: tuple[Floats, Floats]) -> Floats:
        logits: Floats = x @ readout[0]
        logits *= self.scale
        logits += readout[1]
        return logits

    def forward(self, latents: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all questions, (n, n_logits), about states and about the actions taken in them; differentiable.

        The plain statement of what the head learns; training takes :meth:`gradients` and answering numpy.

        :param latents: (n, latent_dim)
        :param features: (n, n_action_features) of the actions, with the latents of critics behind them if they are read
        """
        weights = self.weights(self.flat)
        hidden = latents
        for n, (weight, bias) in enumerate(weights.layers):
            hidden = nn.functional.linear(torch.tanh(hidden) if n else hidden, weight, bias)
        x = torch.tanh(hidden) if weights.layers else hidden
        x_action = x if features is None else torch.tanh(hidden + features @ weights.action)
        state, action = weights.rows[: self.n_state], weights.rows[self.n_state :]
        return torch.cat([x @ state.T, x_action @ action.T], dim=1) * self.scale + weights.bias

    def gradients(
        self, latents: Sequence[torch.Tensor], features: Array | None, y: Array, weight: Array
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Forward and backward through the head in closed form.

        The gradient of each cell's weighted cross-entropy is ``weight * (probability - y)``; the rest is the chain rule.

        :param latents: of each readout, (n, dim); those of critics come last
        :param features: (n, n_action_features) of the actions, numpy
        :param y: (n, n_logits), targets of the cells, numpy
        :param weight: (n, n_logits), weights of the cells with all factors of the loss, numpy
        :return: gradients of the latents, and of :attr:`flat`
        """
        if latents[0].device.type == "cpu":
            arrays: list[Array] = [latent.detach().numpy() for latent in latents]
            d_latents, d_flat = self._gradients(np, self._that_learn(), arrays, features, y, weight)
            return [torch.from_numpy(d_latent) for d_latent in d_latents], torch.from_numpy(d_flat.copy())
        arrays = [latent.detach() for latent in latents]
        moved = [None if x is None else torch.as_tensor(x, device=arrays[0].device) for x in (features, y, weight)]
        d_latents, d_flat = self._gradients(torch, self._that_learn(), arrays, *moved)
        return d_latents, d_flat.clone()

    def _gradients(
        self, xp: Any, w: Weights, latents: Sequence[Array], features: Array | None, y: Array, weight: Array
    ) -> tuple[list[Array], Array]:
        n_critics = len(self.critic_dims)
        if n_critics:
            latents, critics = latents[:-n_critics], latents[-n_critics:]
            features = xp.concatenate([features, *critics], 1)
        form, acted = self._closed_form, features is not None
        if form is None or form.weights is not w or form.n != len(y) or form.acted != acted:
            form = self._closed_form = ClosedForm(self, w, xp, [x.shape[1] for x in latents], y, acted)
        d_latents, d_flat = form(latents, features, y, weight)
        if n_critics:
            stops = list(itertools.accumulate(self.critic_dims, initial=-sum(self.critic_dims)))
            of_critics = [w.action[start : stop or None] for start, stop in itertools.pairwise(stops)]
            d_latents = [*d_latents, *(form.d_actions @ each.T for each in of_critics)]
        return d_latents, d_flat


def _share(n_updates: int) -> float:
    """Of the newest weights in the average."""
    return max(10.0 / (10.0 + n_updates), 1.0 / LONGEST_AVERAGE)


def _both_are_loaded(head: Any, incompatible_keys: Any) -> None:
    if not any(name.endswith("average") for name in incompatible_keys.missing_keys):  # else it starts from the weights
        head._followed = head.flat._version


def decode(instance: Instance, logits: Floats) -> Answer:
    """The answer in the logits of an instance's target.

    :param logits: (..., width of the target)
    """
    answer = instance.question.answer
    truth = instance.question.truth
    if truth.is_event:
        assert instance.horizon is not None
        logits = logits[..., : instance.horizon]
        if truth.operator == "steps_until":
            alive = survival(logits)
            passed = np.concatenate([-np.diff(alive[..., :-1], axis=-1), alive[..., -2:-1]], axis=-1)
            return NumberAnswer(np.arange(1, instance.horizon + 1, dtype=np.float32), passed, whole=True)
        return YesNoAnswer(survival(logits)[..., -1] if truth.operator == "always" else _comes(logits))
    if isinstance(answer, Choice):
        return ChoiceAnswer(answer.options, _softmax(logits))
    if isinstance(answer, Number):
        support = np.linspace(answer.low, answer.high, logits.shape[-1], dtype=np.float32)
        return NumberAnswer(support, _softmax(logits))
    return YesNoAnswer(_comes(logits))


def survival(hazard_logits: Floats) -> Floats:
    """Discrete-time survival curve S(j) = prod_{i<=j} (1 - h_i) of hazards h = sigmoid(logits).

    Source: Gensheimer and Narasimhan 2019, "A scalable discrete-time survival model for neural networks".

    :param hazard_logits: (..., K)
    :return: (..., K + 1), from S(0) = 1, never increasing
    """
    logits = np.asarray(hazard_logits, np.float64)
    log_alive = np.cumsum(-np.logaddexp(0.0, logits), axis=-1)  # log(1 - sigmoid(x)) = -softplus(x)
    return np.concatenate([np.ones((*logits.shape[:-1], 1), np.float32), np.exp(log_alive).astype(np.float32)], axis=-1)


def _comes(hazard_logits: Floats) -> Floats:
    """1 - S(K), precise where it is small."""
    with np.errstate(invalid="ignore"):  # a nan stays one, and whoever asked has to see it
        log_alive = -np.logaddexp(0.0, hazard_logits.astype(np.float64)).sum(axis=-1)
    return np.asarray(-np.expm1(log_alive), np.float32)


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


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
