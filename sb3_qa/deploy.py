"""Frozen answerers for machines without this package: ONNX, and programs of ``torch.export``.

Inputs are observations as the policy sees them (normalised and stacked where the agent was trained so), outputs the answers by instance.
Everything here needs the extra ``sb3-qa[deploy]`` for ONNX, and torch alone for ``.pt2``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from sb3_qa.answers import ChoiceAnswer, NumberAnswer
from sb3_qa.errors import QAError
from sb3_qa.extras import need
from sb3_qa.head import decode
from sb3_qa.questions import Instance
from sb3_qa.storage import questions_digest, weights_digest

if TYPE_CHECKING:
    from sb3_qa.answerer import QuestionAnswerer

__all__ = ["OPSET", "AnswererModule", "describe", "export"]

OPSET = 18
"""Of the ONNX operators that files are written with."""

STATE = ("hidden", "cell", "hidden_vf", "cell_vf")


class AnswererModule(nn.Module):
    """An answerer as a function of tensors, in torch operations alone.

    ``forward`` takes the tensors of :attr:`inputs` and returns those of :attr:`outputs`, in their order:

    - ``obs`` (n, *shape), or ``obs.<key>`` for each part of a Dict
    - ``action`` (n, *action_shape), of a space other than Discrete, where there are questions about actions
    - with an LSTM ``hidden``, ``cell``, ``hidden_vf``, ``cell_vf``, each (n_layers, n, size), and ``episode_start`` (n,); the
      states come out again as ``next_...``

    An answer to yes/no is a probability (n,), to others probabilities (n, n_options); about the actions of a discrete space there
    is one for each, (n, n_actions) or (n, n_actions, n_options).

    :param answerer: whose weights are copied as they are now
    :raises QAError: for an action space that an action cannot be an input of, and a policy with passes of its own
    """

    def __init__(self, answerer: QuestionAnswerer) -> None:
        super().__init__()
        policy = _copied(answerer.policy).to("cpu")
        policy.set_training_mode(False)
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        self.policy = policy
        self.recurrent = answerer.recurrent
        catalogue = answerer.catalogue
        self.instances: list[Instance] = list(catalogue.instances.values())
        self.targets = [catalogue.target_of[each.key] for each in self.instances]
        self.outputs = [each.key for each in self.instances]
        space, self.discrete = policy.action_space, isinstance(policy.action_space, spaces.Discrete)
        self.about_actions = any(each.per_action for each in self.instances)
        if self.about_actions and not isinstance(space, (spaces.Discrete, spaces.Box)):
            raise QAError(
                f"the answerer is asked about actions of {space}; expected Discrete or Box to be exported; leave {{action}} out of its "
                "questions, or ask it where this package is"
            )
        if not answerer.target and self.recurrent and type(policy).__name__ not in _LSTM_POLICIES:
            raise QAError(
                f"the answerer is of a {type(policy).__name__}, whose LSTM runs in passes of its own; expected sb3-contrib's RecurrentPPO"
            )
        observed = policy.observation_space
        self.keys = list(observed.spaces) if isinstance(observed, spaces.Dict) else None
        self.inputs = ["obs"] if self.keys is None else [f"obs.{key}" for key in self.keys]
        if self.about_actions and not self.discrete:
            self.inputs.append("action")
        if self.recurrent:
            self.inputs += [*STATE, "episode_start"]
            self.outputs += [f"next_{name}" for name in STATE]
        answering = answerer.policy.qa_head._that_answer()
        self.n_layers, self.n_state, self.scale = len(answering.layers), policy.qa_head.n_state, policy.qa_head.scale
        tensors = {"action": answering.action, "states": answering.states[0], "states_bias": answering.states[1]}
        tensors |= {"actions": answering.actions[0], "actions_bias": answering.actions[1]}
        for n, (across, bias) in enumerate(answering.layers):
            tensors |= {f"layer_{n}": across, f"layer_{n}_bias": bias}
        if self.about_actions and isinstance(space, spaces.Box):
            tensors |= {"low": space.low.ravel(), "high": space.high.ravel()}
        for name, array in tensors.items():
            self.register_buffer(f"qa_{name}", torch.tensor(array, dtype=torch.float32))

    def example(self, n: int = 2) -> tuple[torch.Tensor, ...]:
        """Inputs of a batch of ``n``, all zero."""
        observed, policy = self.policy.observation_space, self.policy
        parts = [observed] if self.keys is None else [observed.spaces[key] for key in self.keys]
        zeros = [np.zeros((n, *(part.shape or ())), part.dtype) for part in parts]
        blank = [torch.as_tensor(each) for each in zeros]
        if "action" in self.inputs:
            blank.append(torch.zeros(n, *policy.action_space.shape))
        if self.recurrent:
            layers, _, size = policy.lstm_hidden_state_shape
            blank += [torch.zeros(layers, n, size) for _ in STATE] + [torch.zeros(n)]
        return tuple(blank)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        obs: Any = given["obs"] if self.keys is None else {key: given[f"obs.{key}"] for key in self.keys}
        after: list[torch.Tensor] = []
        if self.recurrent:
            latents, after = self._recall(obs, [given[name] for name in STATE], given["episode_start"])
        else:
            latents = self.policy.qa_taps.tensors(self.policy, obs)
        hidden = torch.cat([latents[n] for n in self.policy.qa_taps.keep], dim=1)
        for part in [obs] if self.keys is None else obs.values():
            if (
                part.is_floating_point()
            ):  # where it is infinite nothing is known, though behind a tanh all would be finite
                hidden = hidden + (part.flatten(1) * 0).sum(dim=1, keepdim=True)
        for n in range(self.n_layers):
            hidden = (torch.tanh(hidden) if n else hidden) @ self._of(f"layer_{n}") + self._of(f"layer_{n}_bias")
        x = torch.tanh(hidden) if self.n_layers else hidden
        about_states = x @ self._of("states") * self.scale + self._of("states_bias")
        about_actions = self._act(obs, hidden, given.get("action")) if self.about_actions else about_states
        answers = []
        for instance, target in zip(self.instances, self.targets, strict=True):
            offset, logits = (self.n_state, about_actions) if instance.per_action else (0, about_states)
            answers.append(_decoded(instance, logits[..., target.start - offset : target.stop - offset]))
        return (*answers, *after)

    def _of(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self, f"qa_{name}")
        return tensor

    def _act(self, obs: Any, hidden: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
        """Logits of the questions about actions: (n, n_actions, n_logits) of all, or (n, n_logits) of the one given."""
        if action is None:
            acted = hidden[:, None] + self._of("action")
        else:
            low, high = self._of("low"), self._of("high")
            features = (action.flatten(1) - (high + low) / 2) / ((high - low) / 2)
            if self.policy.qa_critics:
                features = torch.cat([features, *self._criticised(obs, action, features)], dim=1)
            acted = hidden + features @ self._of("action")
        return torch.tanh(acted) @ self._of("actions") * self.scale + self._of("actions_bias")

    def _criticised(self, obs: Any, action: torch.Tensor, scaled: torch.Tensor) -> list[torch.Tensor]:
        """Latents of the critics."""
        critic = self.policy.critic
        acts = scaled if self.policy.squash_output else action.flatten(1)
        features = critic.extract_features(obs, critic.features_extractor)
        latents = []
        for network in critic.q_networks:
            layers = list(network)
            last = max(n for n, layer in enumerate(layers) if isinstance(layer, nn.Linear))
            x = torch.cat([features, acts], dim=1)
            for layer in layers[:last]:
                x = layer(x)
            latents.append(x)
        return latents

    def _recall(
        self, obs: Any, state: list[torch.Tensor], starts: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Latents of the readouts, and the next state; one step of sb3-contrib's passes, which look at the flags one by one."""
        policy = self.policy
        features = policy.extract_features(obs)
        pi, vf = (features, features) if policy.share_features_extractor else features
        hidden, cell, hidden_vf, cell_vf = [part * (1.0 - starts)[None, :, None] for part in state]
        out, (hidden, cell) = policy.lstm_actor(pi[None], (hidden, cell))
        if policy.lstm_critic is not None:
            out_vf, (hidden_vf, cell_vf) = policy.lstm_critic(vf[None], (hidden_vf, cell_vf))
            latent_vf = out_vf[0]
        else:
            hidden_vf, cell_vf = hidden + 0.0, cell + 0.0  # as outputs of their own
            latent_vf = out[0] if policy.shared_lstm else policy.critic(vf)
        extractor = policy.mlp_extractor
        return [extractor.forward_actor(out[0]), extractor.forward_critic(latent_vf)], [
            hidden,
            cell,
            hidden_vf,
            cell_vf,
        ]


_LSTM_POLICIES = (
    "RecurrentActorCriticPolicy",
    "RecurrentActorCriticCnnPolicy",
    "RecurrentMultiInputActorCriticPolicy",
)


def _copied(policy: Any) -> Any:
    """A copy, right after training too: distributions then hold tensors of a graph, which cannot be copied and are shared."""
    held = [module.action_dist for module in policy.modules() if hasattr(module, "action_dist")]
    return copy.deepcopy(policy, {id(each): copy.copy(each) for each in held})


def _decoded(instance: Instance, logits: torch.Tensor) -> torch.Tensor:
    """As :func:`sb3_qa.head.decode`: a probability, or probabilities."""
    truth = instance.question.truth
    if truth.is_event:
        assert instance.horizon is not None
        log_alive = -nn.functional.softplus(logits[..., : instance.horizon])
        if truth.operator == "steps_until":
            alive = torch.exp(torch.cumsum(log_alive, dim=-1))
            alive = torch.cat([torch.ones_like(alive[..., :1]), alive], dim=-1)
            return torch.cat([alive[..., :-2] - alive[..., 1:-1], alive[..., -2:-1]], dim=-1)
        alive = torch.exp(log_alive.sum(dim=-1))
        return alive if truth.operator == "always" else 1.0 - alive
    if logits.shape[-1] == 1:
        return torch.sigmoid(logits[..., 0])
    return torch.softmax(logits, dim=-1)


def describe(answerer: QuestionAnswerer, module: AnswererModule) -> dict[str, Any]:
    """What inputs and outputs mean, and of which answerer they are, as plain data."""
    answers = []
    for instance, target in zip(module.instances, module.targets, strict=True):
        told: dict[str, Any] = {"output": instance.key, "text": instance.text, "per_action": instance.per_action}
        answer = decode(instance, torch.zeros(1, target.stop - target.start).numpy())
        if isinstance(answer, ChoiceAnswer):
            told["options"] = list(answer.options)
        elif isinstance(answer, NumberAnswer):
            told["values"] = [float(value) for value in answer.support]
        answers.append(told)
    return {
        "inputs": module.inputs,
        "answers": answers,
        "action_names": answerer.action_names,
        "normalized": answerer.normalized,
        "weights_digest": weights_digest(answerer.policy),
        "questions_digest": questions_digest(answerer),
    }


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Distributions, which some policies build on the way, do not look at numbers that are not there yet."""
    kind: Any = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)


def export(answerer: QuestionAnswerer, path: str | PathLike[str]) -> None:
    """Write a frozen answerer as ``.onnx`` (opset :data:`OPSET`) or ``.pt2`` (``torch.export``); the batch may be of any size.

    What inputs and outputs mean is in the file: ``metadata_props["sb3_qa"]`` of ONNX, the extra file ``sb3_qa.json`` of torch, as JSON
    (:func:`describe`).

    :raises QAError: for another suffix, without what ONNX needs, and for what :class:`AnswererModule` refuses
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".onnx", ".pt2"):
        raise QAError(f"export got {str(path)!r}; expected a name ending in .onnx or .pt2; rename it")
    if answerer.target:
        raise QAError(
            "export got an answerer of target networks; expected the live one; use QuestionAnswerer.from_model(model)"
        )
    if suffix == ".onnx":
        for needed in ("onnx", "onnxscript"):
            need(needed, "deploy", str(path))
    module = AnswererModule(answerer).eval()
    batch = torch.export.Dim("batch", min=1)
    axes = tuple({1: batch} if name in STATE else {0: batch} for name in module.inputs)
    told = json.dumps(describe(answerer, module))
    with torch.no_grad(), warnings.catch_warnings(), _unvalidated():
        warnings.simplefilter("ignore")  # torch's own, about what will be deprecated in its exporter
        program = torch.export.export(module, module.example(3), dynamic_shapes=(axes,), strict=False)
        if suffix == ".pt2":
            torch.export.save(program, str(path), extra_files={"sb3_qa.json": told})
            return
        onnx = torch.onnx.export(
            program,
            input_names=module.inputs,
            output_names=module.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert onnx is not None
    onnx.model.metadata_props["sb3_qa"] = told
    onnx.save(str(path), external_data=False)
