"""Joint training without touching the algorithm: the question loss rides on the algorithm's own backward pass.

:func:`attach` leaves the output of the network as it is. In backward hooks also send the gradient of the question
loss into the head's weights, and into the latents, from where it flows through the trunk with the agent's own: one
forward, one backward, one ``optimizer.step()``. (Mixture-of-experts models attach their load-balancing losses by the same device.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sb3_qa.errors import QAError
from sb3_qa.head import QAHead
from sb3_qa.labels import LabelStore
from sb3_qa.panel import Panel
from sb3_qa.rare_events import Remembered

if TYPE_CHECKING:
    from sb3_qa.answerer import QuestionAnswerer

__all__ = ["JointTraining", "attach", "question_losses", "with_gradient"]

Floats = NDArray[np.float32]


def attach(
    output: torch.Tensor,
    latents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    head: nn.Parameter,
    d_head: torch.Tensor,
    *,
    of_last: bool = False,
) -> torch.Tensor:
    """Return ``output`` as it is; the backward pass that goes through it adds gradients on its way.

    They are added by hooks, in the one pass of the engine, before the trunk's own backward: a node of the graph in Python
    (``torch.autograd.Function``) does the same and costs more.

    :param output: what the algorithm goes on with
    :param latents: tensors of the graph of ``output``, each with the gradient to be added to its own
    :param head: a parameter outside of that graph
    :param d_head: its gradient, accumulated in ``head.grad``
    :param of_last: that ``output`` was computed of the last of the latents, so that one hook does for both
    """
    output = with_gradient(output)
    if of_last:
        *latents, (last, gradient) = latents
        last.register_hook(partial(_add_and_accumulate, head, d_head, gradient))
    else:
        output.register_hook(partial(_accumulate, head, d_head))
    for latent, gradient in latents:
        latent.register_hook(partial(torch.add, gradient))
    return output


def with_gradient(output: torch.Tensor) -> torch.Tensor:
    """``output``, such that the algorithm's backward pass can begin: that of a frozen agent, of which the head alone learns."""
    return output if output.requires_grad else output.detach().requires_grad_()


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor, grad_output: torch.Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _add_and_accumulate(
    parameter: nn.Parameter, d_parameter: torch.Tensor, gradient: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor:
    _accumulate(parameter, d_parameter, grad_output)
    return gradient + grad_output


def question_losses(head: QAHead | Panel, logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each target, averaged over the transitions: (n_targets,).

    Differentiable; the training itself uses the closed form of its gradient, :meth:`QAHead.gradients`.

    :param logits: (n, n_logits)
    :param y: (n, n_logits), targets of the cells
    :param weight: (n, n_logits), weights of the cells, 0 where the truth is not known
    """
    cells = []
    for start, stop, width in head.blocks:
        block = logits[:, start:stop]
        if width == 1:
            cells.append(torch.nn.functional.softplus(block) - y[:, start:stop] * block)
        else:
            cells.append(-y[:, start:stop] * block.unflatten(1, (-1, width)).log_softmax(-1).flatten(1))
    cell = weight * torch.cat(cells, dim=1)
    targets = head.targets if isinstance(head, Panel) else head.catalogue.targets
    return torch.stack([cell[:, t.start : t.stop].sum() / len(logits) for t in targets])


class JointTraining:
    """Holds the labels of the minibatch in flight, and joins the question loss to the pass that it belongs to.

    The loss is ``qa_coef`` times the mean over targets of their negative log-likelihood.

    **Gradient clipping.** Where the algorithm clips the norm of its gradient at ``max_grad_norm``, questions must not
    eat the agent's share of it. The head's own gradient is not part of that norm. What the questions send into the
    agent's parameters is clipped *by itself* at the same ``max_grad_norm`` before it is added. With g the agent's own
    gradient and c the limit, plain training applies g * min(1, c/|g|); joint training keeps at least
    g * min(1, c/(|g| + c)), so the agent never loses more than half of its step, whatever the questions, their number
    or ``qa_coef``. The norm is measured exactly, by a backward pass of its own, on one minibatch in
    ``MEASURE_EVERY`` (on the first always); in between it is taken to be proportional to the norm of the loss's
    gradient with respect to the latents. Without clipping, the gradient is exactly that of the sum of the losses.

    **Actor and critics** of SAC and its like have passes, backward passes and optimisers of their own, and each changes its
    parameters in place before the other has done so. Their questions are worked out once for each minibatch, in the pass of
    the critics on the buffer's own actions, from what both know at that time, before either has taken its step. The critics
    get their part of the gradient in their own backward pass; the actor's is kept for the actor's, which may come before
    that pass (SAC, TQC) or after it (TD3, DDPG, CrossQ), where it is not delayed to another minibatch.
    """

    MEASURE_EVERY = 32
    LOG_EVERY = 64

    def __init__(self, coef: float, trunk_gradient: float) -> None:
        self.coef = coef
        self.trunk_gradient = trunk_gradient
        self.every = 1
        """One minibatch in so many teaches the questions, the first among them."""
        self.store: LabelStore | None = None
        """Labels of what the buffer holds; None while nobody makes any."""
        self.learnt: Callable[[], bool] | None = None
        """Whether the buffer still holds just what the last ``learn()`` had labels for, once that has ended; None before and
        while it goes on."""
        self.max_grad_norm: float | None = None
        self.critic_only: str | None = None
        """The readout whose passes alone questions can join, see :data:`sb3_qa.taps.CRITIC_ONLY`."""
        self.observations: Any = None
        """What the algorithm was handed with the pending rows, where not all readouts are passed."""
        self.remember: Callable[[int], tuple[Sequence[torch.Tensor], Remembered] | None] | None = None
        """Draws so many transitions from a memory of rare events, and reads them."""
        self.reads_critics = False
        self.ahead: QuestionAnswerer | None = None
        """Reads the observations of a rollout before the agent acts on them; None of an agent that is not being trained so."""
        self.owed: torch.Tensor | None = None
        """The gradient of an actor's latent, when the pass that it belongs to is still to come."""
        self.passed_over = False
        """Whether the minibatch in flight teaches nothing."""
        self.n_handed_out = 0
        self.n_passes = 0
        self.losses: list[torch.Tensor] = []
        self._pending: NDArray[np.intp] | None = None
        self._real: NDArray[np.bool_] | None = None
        self._amplification = 0.0  # norm in the agent's parameters / norm at the latents, as last measured
        self._measured_norm = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> JointTraining:
        return JointTraining(self.coef, self.trunk_gradient)

    def __reduce__(self) -> tuple[Any, ...]:
        return JointTraining, (self.coef, self.trunk_gradient)

    def start(self, every: int) -> None:
        """Count minibatches from the first again, so that training goes on after loading as it would have without.

        :param every: one in so many teaches
        """
        self.every = every
        self.n_handed_out = self.n_passes = 0

    def hand_out(self, rows: NDArray[np.intp], observations: Any = None, real: NDArray[np.bool_] | None = None) -> None:
        """The buffer has just handed out these rows; the next pass with gradients is about them, unless :attr:`every` passes it over.

        :param real: which places of the batch hold them, in order, where the others are padding
        """
        self._pending, self.owed, self.passed_over = None, None, False
        if self.store is not None and self.coef and self.taught:
            self.passed_over = self.n_handed_out % self.every > 0
            self.n_handed_out += 1
            if not self.passed_over:
                self._pending = rows
                self._real = real
                self.observations = observations if self.critic_only or self.reads_critics else None

    @property
    def taught(self) -> bool:
        """Whether what the buffer holds has labels, or was what the last ``learn()`` had labels for."""
        return self.store is not None if self.learnt is None else self.learnt()

    @property
    def waiting(self) -> bool:
        """Whether labels wait for their pass."""
        return self._pending is not None

    def join(
        self,
        output: torch.Tensor,
        latents: Sequence[torch.Tensor],
        head: QAHead,
        agent_parameters: Callable[[], Iterable[torch.Tensor]],
        joined: int = 1,
    ) -> torch.Tensor:
        """Attach the question loss of the pending rows to ``output``.

        :param output: (n, ...), what the algorithm goes on with
        :param latents: of each readout, (n, dim), in the graph of ``output`` or of a pass whose backward is still to come; the
            first may have no graph where an actor's pass is still to come
        :param joined: how many batches the pass is about, the first of which is that of the pending rows
        :raises QAError: when the pass is not about as many transitions as were handed out
        """
        rows, self._pending = self._pending, None
        assert rows is not None and self.store is not None
        real, n_passed = self._real, output.shape[0]  # len() of a tensor is slow
        n = len(rows) if real is None else len(real)
        if n * joined != n_passed:
            raise QAError(
                f"the buffer handed out {n} transitions but the network was run on {n_passed}; expected the "
                "same, as labels belong to transitions; the algorithm may join or split its batches: please report it"
            )
        y, weight, features = self.store.batch(rows)
        panel = self.store.panel
        mean = 1.0 / (len(rows) * (self.store.n_asked or len(head.catalogue.targets)))
        weight *= np.float32(self.coef * mean)
        place = None if real is None else torch.as_tensor(real.nonzero()[0], device=output.device)
        read = list(latents)
        if place is not None:
            read = [latent.detach()[place] for latent in latents]
        elif n < n_passed:
            read = [latent[:n] for latent in latents]
        d_latents, d_flat = head.gradients(read, features, y, weight, panel)
        if self.n_passes % self.LOG_EVERY == 0:
            self.losses.append(self._losses(read, head, features, y, weight / np.float32(self.coef * mean), panel))
        if self.remember is not None and (more := self.remember(len(rows))) is not None:
            past, (_, features, y, weight) = more
            d_flat += head.gradients(past, features, y, weight * np.float32(self.coef * mean))[1]
        if place is not None:
            d_latents = [x.new_zeros(n, x.shape[1]).index_copy_(0, place, x) for x in d_latents]
        if n < n_passed:
            d_latents = [_padded(d, latent.shape[0]) for d, latent in zip(d_latents, latents, strict=True)]
        share, learning = self.trunk_gradient, [latent.requires_grad for latent in latents]
        if share and self.max_grad_norm is not None and any(learning):
            share = self._clip(latents, d_latents, share, agent_parameters)
        self.n_passes += 1
        if share and self.reads_critics and not learning[0]:
            self.owed = d_latents[0] * share
        sent = []
        if share:
            sent = [
                (latent, d if share == 1.0 else d * share)
                for latent, d, learns in zip(latents, d_latents, learning, strict=True)
                if learns
            ]
        return attach(output, sent, head.flat, d_flat, of_last=bool(sent) and learning[-1])

    def pay(self, latent: torch.Tensor) -> None:
        """Send the gradient that an actor is owed into its latent (n, dim), whose pass has come."""
        owed, self.owed = self.owed, None
        if owed is not None and latent.requires_grad and owed.shape == latent.shape:
            latent.register_hook(partial(torch.add, owed))

    @staticmethod
    @torch.no_grad()
    def _losses(
        latents: Sequence[torch.Tensor],
        head: QAHead,
        features: Floats | None,
        y: Floats,
        weight: Floats,
        panel: Panel | None,
    ) -> torch.Tensor:
        device = latents[0].device
        about = None if features is None else torch.as_tensor(features, device=device)
        read = [latent.detach() for latent in latents]
        if head.critic_dims:
            n_critics = len(head.critic_dims)
            about, read = torch.cat([about, *read[-n_critics:]], dim=1), read[:-n_critics]  # type: ignore[list-item]
        logits = head(torch.cat(read, dim=1), about, panel)
        arrays = logits.cpu(), torch.as_tensor(y), torch.as_tensor(weight)
        if panel is None:
            return question_losses(head, *arrays)
        losses = torch.full((len(head.catalogue.targets),), torch.nan)
        place = {target.start: n for n, target in enumerate(head.catalogue.targets)}
        losses[[place[target.start] for target in panel.original]] = question_losses(panel, *arrays)
        return losses

    def _clip(
        self,
        latents: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        share: float,
        parameters: Callable[[], Iterable[torch.Tensor]],
    ) -> float:
        """The share of the gradient that goes on into the agent's parameters, where its norm is ``max_grad_norm`` at most."""
        assert self.max_grad_norm is not None
        if self.n_passes % self.MEASURE_EVERY == 0:
            on = [n for n, latent in enumerate(latents) if latent.requires_grad]
            outputs, sent = [latents[n] for n in on], [gradients[n] for n in on]
            grads = torch.autograd.grad(outputs, list(parameters()), sent, retain_graph=True, allow_unused=True)
            norm = self._measured_norm = _norm([g for g in grads if g is not None])
            self._amplification = norm / max(_norm(gradients), 1e-30)
        elif self._measured_norm * share < self.max_grad_norm / 4:
            return share
        else:
            norm = _norm(gradients) * self._amplification
        return min(share, self.max_grad_norm / max(norm, 1e-30))


def _padded(gradient: torch.Tensor, n: int) -> torch.Tensor:
    """With rows of zeros up to ``n``."""
    if len(gradient) == n:
        return gradient
    return torch.cat([gradient, gradient.new_zeros(n - len(gradient), gradient.shape[1])])


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm()) if tensors else 0.0
