"""The answering head: latents of the agent in, logits of every question out.

The head is small, and on small matrices the overhead of an operation counts more than its arithmetic; numpy's is a
fraction of torch's. So all weights live in one flat parameter (one tensor for the optimiser), answers are computed with
numpy, and the gradient of the loss in closed form, with numpy on the CPU and the same lines with torch elsewhere.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from sb3_qa.panel import Panel, PanelShapes, blocks_of
from sb3_qa.questions import Catalogue, Choice, Instance, Number, Target

__all__ = ["QAHead", "Weights", "decode", "survival"]

Floats = NDArray[np.float32]
Array = Any  # a numpy array or a torch tensor

MOST_LOGITS = 512  # beyond, whoever asks for some questions does not pay for all
MOST_PANELS = 4096  # questions whose rows are kept, each asked by itself
SHARED_OUT_FROM = (
    2**20
)  # multiplications of a product; smaller ones cost less by numpy even where its BLAS shares them out
LONG_AVERAGE, SHORT_AVERAGE = 500, 30
"""Updates that answers are averaged over: many where little changes but what chance brings, few where the agent moves on."""
MEMORY_OF_EVIDENCE = 0.9
"""How much of what was known before stays, when the averages are compared anew."""


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
    target network. But latents change as the agent learns, and old weights do not fit them: so there are two averages, a long
    and a short one, and the one that has foretold what came last better answers, see :meth:`compare`.

    :param catalogue: the questions
    :param latent_dim: width of the latents (of all readouts together)
    :param action_space: the agent's
    :param net_arch: widths of the head's own layers; ``[]`` reads the latents directly (no questions about actions)
    :param encoder: how rows are made from questions: here each has its own, see :mod:`sb3_qa.language` for those made of words
    :param seed: of the initial weights; no shared random stream is used
    :param critic_dims: widths of the latents of critics; they belong to an action in a state, and are read as further features
        of the action
    """

    pace = 3.0
    """Its learning rate, in the agent's."""

    def __init__(
        self,
        catalogue: Catalogue,
        latent_dim: int,
        action_space: spaces.Space[Any],
        net_arch: Sequence[int],
        encoder: Any = "index",
        seed: int = 0,
        critic_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
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
        self.blocks = blocks_of(catalogue.targets)
        n_features = self.action_features.n_features if self.action_features else 0
        generator = torch.Generator().manual_seed(seed)
        readout = self._initial_readout(generator)
        critic_dim = sum(critic_dims)
        shapes = [tuple(readout.shape), (n_features + critic_dim, self.width)]
        shapes += [(n_out, n_in + 1) for n_in, n_out in itertools.pairwise(widths)]
        stops = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        self._places = list(zip([0, *stops], stops, shapes, strict=False))
        parts = [readout]
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
        self._learning: tuple[Any, Weights] | None = None  # views, and the place that they are of
        self._answering: tuple[int, _Answering] | None = None
        self._closed_form: ClosedForm | None = None
        self._kept: tuple[int, QAHead] | None = None
        self._panels: dict[Any, Panel] = {}
        self.by_panels = self.n_logits > MOST_LOGITS
        self._followed = self.flat._version  # of the weights that the average has taken in
        self._windows = (LONG_AVERAGE, SHORT_AVERAGE)  # of the average that answers, and of the other
        self._other: torch.Tensor | None = None
        self._evidence = 0.0  # by how much the other's loss has been smaller
        self.register_load_state_dict_post_hook(_both_are_loaded)  # type: ignore[no-untyped-call]

    def _initial_readout(self, generator: torch.Generator) -> torch.Tensor:
        """What rows are made of, to begin with: here the rows themselves and their biases, (n_logits, width + 1)."""
        rows, bias = initial_rows(self.encoder, self.catalogue, self.width, generator)
        return torch.cat([rows, bias[:, None]], dim=1)

    def __getstate__(self) -> dict[str, Any]:
        made = dict.fromkeys(("_learning", "_answering", "_closed_form", "_kept"))
        return {**self.__dict__, **made, "_panels": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._followed = self.flat._version

    @property
    def version(self) -> int:
        """A number that changes whenever the weights do."""
        return self.flat._version + self.average._version

    def begin_with(self, biases: Mapping[int, Floats]) -> None:
        """Let a head that has learnt nothing begin with these answers, see :class:`~sb3_qa.base_rates.BaseRates`.

        :param biases: of targets, by their first column, (width,)
        """
        with torch.no_grad():
            self._write_biases(self.flat.detach(), biases)
            self.average.copy_(self.flat)
        self.followed()

    def _write_biases(self, flat: torch.Tensor, biases: Mapping[int, Floats]) -> None:
        bias = self.weights(flat).bias
        for start, each in biases.items():
            bias[start : start + len(each)] = torch.from_numpy(each)

    def follow(self) -> None:
        """Let the weights that answer follow those that learn, after a step of the optimiser.

        An average is over the last tenth of all updates, or the last ``LONG_AVERAGE`` (``SHORT_AVERAGE``) of them: it settles
        while the agent does, and is there from the first update on.
        Source: the polynomial-decay averaging of Shamir and Zhang 2013 (arXiv 1212.1824).
        """
        self.n_updates.add_(1)
        tenth = 10.0 / (10.0 + self.n_updates.item())
        flat, other = self.flat, self._other
        if other is None or other.device != flat.device:
            self.__dict__["_other"] = other = self.average.clone()  # as attributes of a module are slow to be set
        learnt = flat.detach()
        for average, window in zip((self.average, other), self._windows, strict=True):
            average.lerp_(learnt, max(tenth, 1.0 / window))
        self.__dict__["_followed"] = flat._version

    def compare(self, loss: Callable[[torch.Tensor], float]) -> None:
        """Let the better average answer.

        :param loss: of weights in a flat array, on what has come since they were learnt
        """
        if self._other is None:
            return
        found = loss(self.average) - loss(self._other)
        if math.isfinite(found):
            self._evidence = MEMORY_OF_EVIDENCE * self._evidence + (1.0 - MEMORY_OF_EVIDENCE) * found
        if self._evidence > 0.0:
            answered = self.average.clone()
            self.average.copy_(self._other)
            self._other.copy_(answered)
            self._windows, self._evidence = self._windows[::-1], -self._evidence

    def _follow_by_hand(self) -> None:
        """Let the weights that answer be those that learn, where these were not written by an optimiser."""
        flat = self.flat
        if self.of_target:  # moved by polyak_update(), which leaves the version as it was
            self.average.copy_(flat.detach())
            self._answering = None
        elif self._followed != flat._version:
            self.average.copy_(flat.detach())
            self.followed()

    def followed(self) -> None:
        """The weights that answer have been written beside those that learn, and are not to follow them. The other average begins
        anew from them.
        """
        self._followed, self._other = self.flat._version, None

    def target(self) -> QAHead:
        """The head of a target network: a copy that answers by :attr:`flat`, which the algorithm moves with that network."""
        shared = [self.catalogue, getattr(self, "words", None)]  # a sentence model is large
        head = copy.deepcopy(self, {id(each): each for each in shared if each is not None})
        head.flat.requires_grad_(False)
        head.of_target = True
        return head

    def as_it_is(self) -> QAHead:
        """A head that goes on answering as this one does now, but for panels; the same one until the weights change."""
        self._follow_by_hand()
        version = self.version
        if self._kept is None or self._kept[0] != version:
            head = copy.copy(self)
            head._parameters = {"flat": nn.Parameter(self.flat.detach().clone(), requires_grad=False)}
            head._buffers = {**self._buffers, "average": self.average.clone()}
            head.of_target, head._followed = False, head.flat._version
            self._kept = version, head
        return self._kept[1]

    def weights(self, flat: Array) -> Weights:
        """The weights in a flat array, as views."""
        readout, action, *hidden = [flat[start:stop].reshape(shape) for start, stop, shape in self._places]
        return Weights(readout, action, hidden)

    def _that_learn(self, xp: Any) -> Weights:
        """The weights that learn, as numpy's or torch's: views that follow every update."""
        key = self.flat.data_ptr(), xp
        if self._learning is None or self._learning[0] != key:
            flat = self.flat.detach()
            self._learning = key, self.weights(flat.numpy() if xp is np else flat)
        return self._learning[1]

    def _best_for(self, n: int) -> Any:
        """Numpy or torch, for the gradient of a batch of ``n`` on the device of the weights.

        Numpy's operations take less time to begin. But a large product is shared out to threads by numpy's BLAS, and the threads of
        torch's own operations before and after it wait actively meanwhile: where both have several, each slows the other.
        """
        if not self.flat.is_cpu:
            return torch
        largest = n * self.width * max(self.latent_dim, self.width, self.n_logits)
        return torch if largest > SHARED_OUT_FROM and torch.get_num_threads() > 1 else np

    def _that_answer(self) -> _Answering:
        """The weights that answer: views that follow every update on the CPU, copies that are renewed after each elsewhere."""
        self._follow_by_hand()
        flat, average = self.flat, self.average
        key = average.data_ptr() if average.is_cpu else flat._version + average._version  # either may be loaded alone
        if self._answering is None or self._answering[0] != key:
            w, n = self.weights(average.cpu().numpy()), self.n_state
            layers = [(weight.T, bias) for weight, bias in w.layers]
            parts = (w.rows[:n].T, w.bias[:n]), (w.rows[n:].T, w.bias[n:])
            self._answering = key, _Answering(layers, w.action, *parts, w.bias)
        return self._answering[1]

    def panel_of(self, target: Target) -> Panel:
        """The panel of a single target, which is kept.

        :raises QAError: when it was not taught and the encoder cannot tell from its words
        """
        key = target.question.name, tuple(target.slots.items()), target.width
        if key not in self._panels:
            if len(self._panels) >= MOST_PANELS:
                self._panels.clear()
            self._panels[key] = self.panel([target])
        return self._panels[key]

    def panel(self, targets: Sequence[Target]) -> Panel:
        """A panel of some targets.

        :raises QAError: when one was not taught and the encoder cannot tell from its words
        """
        panel = Panel(targets)
        if not panel.taught:
            self._check_untaught(panel)
        return panel

    def _check_untaught(self, panel: Panel) -> None:
        names = [target.question.name for target in panel.original if target.start < 0]
        raise QAError(
            f"question {names[0]!r} was kept out of training with these slots, and qa_encoder='index' knows what it was taught alone; "
            "expected an encoder that reads words; give policy_kwargs=dict(qa_encoder='text')"
        )

    def readout_of(self, made_of: torch.Tensor, panel: Panel) -> torch.Tensor:
        """Rows and biases of a panel, (n_logits of the panel, width + 1), differentiable.

        :param made_of: what rows are made of, the first part of the flat weights
        """
        return made_of.view(self.n_logits, self.width + 1)[torch.from_numpy(panel.columns).to(made_of.device)]

    def _panel_that_answers(self, panel: Panel) -> _Answering:
        """The weights that answer a panel's questions; its rows are made once an update, when they are first asked for."""
        layers, action = self._layers_that_answer()
        key = self.version, self.average.data_ptr()
        if panel.answering is None or panel.answering[0] != key or self.of_target:
            with torch.no_grad():
                made = self.readout_of(self.average[: self._places[0][1]], panel).cpu().numpy()
            n, rows, bias = panel.n_state, made[:, :-1], made[:, -1].copy()
            parts = (rows[:n].T, bias[:n]), (rows[n:].T, bias[n:])
            panel.answering = key, _Answering(layers, action, *parts, bias)
        answering: _Answering = panel.answering[1]
        return answering

    def _layers_that_answer(self) -> tuple[list[tuple[Floats, Floats]], Floats]:
        w = self._that_answer()
        return w.layers, w.action

    def hidden(self, latents: Floats) -> Floats:
        """(n, latent_dim) -> (n, width), before the last non-linearity."""
        for n, (across, bias) in enumerate(self._layers_that_answer()[0]):
            latents = (np.tanh(latents) if n else latents) @ across
            latents += bias
        return latents

    def state_logits(self, hidden: Floats, panel: Panel | None = None) -> Floats:
        """(n, width) -> (n, n_state), of all questions or a panel's."""
        w = self._that_answer() if panel is None else self._panel_that_answers(panel)
        return self._logits(np.tanh(hidden) if w.layers else hidden, w.states)

    def action_logits(
        self, hidden: Floats, actions: NDArray[Any] | None, panel: Panel | None = None, critics: Floats | None = None
    ) -> Floats:
        """Logits of the questions about actions.

        :param hidden: (n, width)
        :param actions: (n, *action_shape), or (n, m, *action_shape) for m candidates each; None for all of a discrete space, where no
            critics are read
        :param panel: of which questions, all if None
        :param critics: latents of the critics, if they are read: (n, sum(critic_dims)), or (n, m, ...)
        :return: (n, n_logits - n_state), or (n, m, ...)
        """
        w = self._that_answer() if panel is None else self._panel_that_answers(panel)
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
        self,
        before: Floats,
        actions: NDArray[Any],
        after: Floats,
        panel: Panel | None = None,
        critics: Floats | None = None,
    ) -> Floats:
        """Logits of all questions (n, n_logits): about the states after, and about the actions taken in those before.

        :param before: (n, width)
        :param actions: (n, *action_shape)
        :param after: (n, width)
        :param panel: of which questions, all if None
        :param critics: latents of the critics before, if they are read: (n, sum(critic_dims))
        """
        n, of = len(before), self if panel is None else panel
        w = self._that_answer() if panel is None else self._panel_that_answers(panel)
        x = np.tanh(np.concatenate([after, self._acted(w, before, actions, critics)]))
        logits = np.empty((n, of.n_logits), np.float32)
        np.matmul(x[:n], w.states[0], out=logits[:, : of.n_state])
        np.matmul(x[n:], w.actions[0], out=logits[:, of.n_state :])
        logits *= self.scale
        logits += w.bias
        return logits

    def _acted(self, w: _Answering, hidden: Floats, actions: NDArray[Any] | None, critics: Floats | None) -> Floats:
        """``hidden`` with the actions added in: (n, width), or (n, m, width)."""
        assert self.action_features is not None
        if actions is None:  # each of a discrete space is a row
            assert isinstance(self.action_features.space, spaces.Discrete)
            return np.asarray(hidden[:, None] + w.action)
        features = self.action_features(actions)
        added: Floats = (features if critics is None else np.concatenate([features, critics], axis=-1)) @ w.action
        added += hidden[:, None] if added.ndim == 3 else hidden
        return added

    def _logits(self, x: Floats, readout: tuple[Floats, Floats]) -> Floats:
        logits: Floats = x @ readout[0]
        logits *= self.scale
        logits += readout[1]
        return logits

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor | None = None, panel: Panel | None = None
    ) -> torch.Tensor:
        """Logits of all questions, (n, n_logits), about states and about the actions taken in them; differentiable.

        The plain statement of what the head learns; training takes :meth:`gradients` and answering numpy.

        :param latents: (n, latent_dim)
        :param features: (n, n_action_features) of the actions, with the latents of critics behind them if they are read
        :param panel: of which questions, all if None
        """
        weights = self.weights(self.flat)
        readout, n_state = self._readout(panel)
        hidden = latents
        for n, (weight, bias) in enumerate(weights.layers):
            hidden = nn.functional.linear(torch.tanh(hidden) if n else hidden, weight, bias)
        x = torch.tanh(hidden) if weights.layers else hidden
        x_action = x if features is None else torch.tanh(hidden + features @ weights.action)
        state, action = readout[:n_state, :-1], readout[n_state:, :-1]
        return torch.cat([x @ state.T, x_action @ action.T], dim=1) * self.scale + readout[:, -1]

    def _readout(self, panel: Panel | None) -> tuple[torch.Tensor, int]:
        """Rows and biases as they are learnt, and how many of them are about states."""
        if panel is None:
            return self.weights(self.flat).readout, self.n_state
        return self.readout_of(self.flat[: self._places[0][1]], panel), panel.n_state

    def gradients(
        self,
        latents: Sequence[torch.Tensor],
        features: Array | None,
        y: Array,
        weight: Array,
        panel: Panel | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Forward and backward through the head in closed form.

        The gradient of each cell's weighted cross-entropy is ``weight * (probability - y)``; the rest is the chain rule.

        :param latents: of each readout, (n, dim); those of critics come last
        :param features: (n, n_action_features) of the actions, numpy
        :param y: (n, n_logits), targets of the cells, numpy
        :param weight: (n, n_logits), weights of the cells with all factors of the loss, numpy
        :param panel: of which questions, all if None
        :return: gradients of the latents, and of :attr:`flat`
        """
        if panel is not None:
            return self._panel_gradients(panel, latents, features, y, weight)
        xp = self._best_for(len(y))
        if xp is np:
            arrays: list[Array] = [latent.detach().numpy() for latent in latents]
            d_latents, d_flat = self._gradients(np, self._that_learn(np), arrays, features, y, weight)
            return [torch.from_numpy(d_latent) for d_latent in d_latents], torch.from_numpy(d_flat.copy())
        arrays = [latent.detach() for latent in latents]
        moved = [None if x is None else torch.as_tensor(x, device=arrays[0].device) for x in (features, y, weight)]
        d_latents, d_flat = self._gradients(torch, self._that_learn(torch), arrays, *moved)
        return d_latents, d_flat.clone()

    def _panel_gradients(
        self, panel: Panel, latents: Sequence[torch.Tensor], features: Array | None, y: Array, weight: Array
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As :meth:`gradients`; the closed form gives the gradient of the rows, and torch goes on into what they are made of."""
        flat, n_made_of = self.flat.detach(), self._places[0][1]
        made_of = flat[:n_made_of].requires_grad_()
        with torch.enable_grad():
            readout = self.readout_of(made_of, panel)
        by_numpy, acted = self._best_for(len(y)) is np, features is not None
        kept = panel.workspace
        key = len(y), acted, by_numpy, flat.device
        if kept is None or kept[0] != key:
            shapes = PanelShapes(panel, self.width, self.scale, flat[n_made_of:], partial(self._panel_weights, panel))
            weights = self._panel_weights(panel, shapes.flat.numpy() if by_numpy else shapes.flat)
            like = y if by_numpy else torch.as_tensor(y, device=flat.device)
            dims = [latent.shape[1] for latent in latents]
            form = ClosedForm(shapes, weights, np if by_numpy else torch, dims, like, acted)
            kept = panel.workspace = key, shapes, form
        _, shapes, form = kept
        n = shapes.n_readout
        shapes.flat[:n] = readout.detach().flatten()
        shapes.flat[n:] = flat[n_made_of:]
        if by_numpy:
            arrays: list[Array] = [latent.detach().numpy() for latent in latents]
            d_arrays, d_array = form(arrays, features, y, weight)
            d_latents, d_whole = [torch.from_numpy(each) for each in d_arrays], torch.from_numpy(d_array)
        else:
            moved = [None if x is None else torch.as_tensor(x, device=flat.device) for x in (features, y, weight)]
            d_latents, d_whole = form([latent.detach() for latent in latents], *moved)
        (d_made_of,) = torch.autograd.grad(readout, made_of, d_whole[:n].view_as(readout))
        return d_latents, torch.cat([d_made_of, d_whole[n:]])

    def _panel_weights(self, panel: Panel, flat: Array) -> Weights:
        """The weights in a flat array that begins with a panel's readout, as views."""
        n, begin = panel.n_logits * (self.width + 1), self._places[0][1]
        readout = flat[:n].reshape(panel.n_logits, self.width + 1)
        action, *hidden = [
            flat[n + start - begin : n + stop - begin].reshape(shape) for start, stop, shape in self._places[1:]
        ]
        return Weights(readout, action, hidden)

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


def _both_are_loaded(head: Any, incompatible_keys: Any) -> None:
    if not any(name.endswith("average") for name in incompatible_keys.missing_keys):  # else it starts from the weights
        head.followed()


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
