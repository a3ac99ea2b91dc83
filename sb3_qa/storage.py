"""The file of a frozen answerer: safetensors, with a JSON description in its header.

Nothing in the file is executed: classes are looked up by name among those of stable-baselines3 and torch that are known
here, and those the caller passes. A digest over description and weights tells a damaged file from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from stable_baselines3.common import torch_layers
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_qa.errors import QAError
from sb3_qa.facts import FactOf
from sb3_qa.language import EmbeddingEncoder, StoredEmbeddings
from sb3_qa.policies import QAPolicyMixin, algorithms, qa_policy, stock_policies
from sb3_qa.policies.mixin import LEARNERS
from sb3_qa.question_file import fact_of_data
from sb3_qa.questions import AnswerKind, Choice, Number, Question, YesNo
from sb3_qa.truth import Truth

if TYPE_CHECKING:
    from sb3_qa.answerer import QuestionAnswerer

__all__ = ["all_weights", "load_answerer", "questions_digest", "save_answerer", "weights_digest"]

FORMAT = "sb3_qa answerer"
VERSION = 1
KEY = "sb3_qa"

_KNOWN: tuple[type, ...] = (
    *(policy for algorithm in algorithms() for policy in stock_policies(algorithm).values()),
    torch_layers.FlattenExtractor,
    torch_layers.NatureCNN,
    torch_layers.CombinedExtractor,
    *(
        getattr(torch.nn, name)
        for name in ("Tanh", "ReLU", "ELU", "GELU", "SiLU", "LeakyReLU", "Sigmoid", "Softplus", "Mish", "Identity")
    ),
)


def save_answerer(answerer: QuestionAnswerer, path: str | PathLike[str]) -> None:
    """Write an answerer's weights and description; the file appears whole or not at all."""
    if answerer.target:
        raise QAError(
            "save() got an answerer of target networks, which a file does not tell from the live ones; expected the live one; leave out "
            "target=True"
        )
    policy = answerer.policy
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in all_weights(policy).items()}
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "policy": _name_of(_base_of(type(policy))),
        "arguments": _arguments(policy),
        "observation_space": _space_to_json(policy.observation_space),
        "action_space": _space_to_json(policy.action_space),
        "questions": [_question_to_json(question) for question in answerer.catalogue.questions],
        "qa": {
            "qa_net_arch": policy.qa_kwargs["qa_net_arch"],
            "qa_encoder": _encoder_to_json(policy),
            "qa_readouts": policy.qa_kwargs["qa_readouts"],
        },
        "action_names": answerer.action_names,
        "normalized": answerer.normalized,
    }
    description["digest"] = _digest(description, weights)
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise QAError(
            f"the answerer cannot be written as JSON ({error}); expected plain values in policy_kwargs, options and slots; replace the "
            "objects by strings or numbers"
        ) from error
    temporary = Path(f"{os.fspath(path)}.part")
    temporary.write_bytes(safetensors_bytes(weights, {KEY: text}))
    os.replace(temporary, path)


def load_answerer(path: str | PathLike[str], device: str | torch.device, classes: Iterable[type]) -> QuestionAnswerer:
    """Read a file written by :func:`save_answerer`.

    :raises QAError: when it is missing, damaged, foreign, of a later version, or needs classes that were not passed
    """
    from sb3_qa.answerer import QuestionAnswerer

    description, weights = _read(path)
    try:
        stored = description["qa"].get("qa_encoder")
        if isinstance(stored, dict):  # a model of sentences, which need not be here; what it gave is in the weights
            description["qa"]["qa_encoder"] = StoredEmbeddings(stored["width"], stored["model"])
        known = {_name_of(cls): cls for cls in (*_KNOWN, *classes)}
        arguments = {key: _value_from_json(value, known, path) for key, value in description["arguments"].items()}
        base = _lookup(description["policy"], known, path)
        if not issubclass(base, BasePolicy):
            raise QAError(
                f"{os.fspath(path)} names the policy {description['policy']}, which is none; expected one; save it again"
            )
        if base in _KNOWN:  # a policy of somebody's own may not take the argument
            arguments["optimizer_class"] = _NoOptimizer
        with torch.random.fork_rng(devices=[]):
            policy: Any = qa_policy(base)(
                _space_from_json(description["observation_space"]),
                _space_from_json(description["action_space"]),
                _no_learning,
                questions=[_question_from_json(question) for question in description["questions"]],
                **description["qa"],
                **arguments,
            )
        own = {name: tensor for name, tensor in weights.items() if not _is_of_head(name)}
        heads = {
            name: weights[f"qa_head.{name.rpartition('.')[2]}"] for name in policy.state_dict() if _is_of_head(name)
        }
        policy.load_state_dict({**own, **heads})
    except QAError:
        raise
    except Exception as error:
        raise QAError(
            f"{os.fspath(path)} does not hold together ({type(error).__name__}: {error}); expected what save() wrote; save it again"
        ) from error
    LEARNERS.discard(policy)
    policy.to(device)
    policy.set_training_mode(False)
    for parameter in policy.state_dict(keep_vars=True).values():
        parameter.requires_grad_(False)
    return QuestionAnswerer(policy, description["action_names"], description["normalized"])


def _encoder_to_json(policy: Any) -> Any:
    """The encoder's name; for one that embeds texts, how wide, and where another text is to be embedded."""
    words = getattr(policy.qa_head, "words", None)
    if not isinstance(words, EmbeddingEncoder):
        return policy.qa_kwargs["qa_encoder"]
    model = "sentence" if policy.qa_kwargs["qa_encoder"] == "sentence" else getattr(words.embed, "model", None)
    return {"width": words.table.shape[1], "model": model}


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    name = os.fspath(path)
    if not Path(path).is_file():
        raise QAError(f"there is no file {name}; expected one written by QuestionAnswerer.save(); check the path")
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        if zipfile.is_zipfile(path):
            raise QAError(
                f"{name} is a .zip, as of a model that was saved; expected a file written by QuestionAnswerer.save(); write e.g. "
                f'QuestionAnswerer.from_model(PPO.load("{name}")).save("driver.qa")'
            ) from None
        raise QAError(
            f"{name} cannot be read ({error}); expected a whole file written by QuestionAnswerer.save(); copy or save it again"
        ) from error
    try:
        description = json.loads(metadata[KEY])
        if description["format"] != FORMAT:
            raise ValueError(description["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise QAError(
            f"{name} is a safetensors file but not an answerer's; expected one written by QuestionAnswerer.save()"
        ) from error
    if description.get("version") != VERSION:
        raise QAError(
            f"{name} has format version {description.get('version')}; expected {VERSION}; install the sb3_qa that wrote it"
        )
    digest = description.pop("digest", None)
    if digest != _digest(description, weights):
        raise QAError(
            f"{name} is damaged: its content does not match its digest; expected it as save() wrote it; copy or save it again"
        )
    return description, weights


def all_weights(policy: Any) -> dict[str, torch.Tensor]:
    """All weights by name, the parameters and buffers themselves: those of the head as ``qa_head.``, wherever it is kept, and
    no target's.
    """
    state = policy.state_dict(keep_vars=True)
    own = {name.replace("_orig_mod.", ""): x for name, x in state.items() if not _is_of_head(name)}
    return own | {f"qa_head.{name}": x for name, x in policy.qa_head.state_dict(keep_vars=True).items()}


def _is_of_head(name: str) -> bool:
    return ".qa_head." in f".{name}"


def _digest(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=repr).encode())
    for name in sorted(weights):
        array = weights[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def weights_digest(policy: Any, *, target: bool = False) -> str:
    """SHA-256 over a policy's weights, its head's among them: the same live, frozen, saved, and on every device.

    :param target: and over those of the head of its target network, which answers (the network's own are among the policy's)
    """
    state = all_weights(policy) if hasattr(policy, "qa_head") else policy.state_dict()
    if target:
        head = getattr(policy, policy.qa_target[1]).qa_head
        state |= {f"qa_head_target.{name}": x for name, x in head.state_dict(keep_vars=True).items()}
    return _digest({}, {name: tensor.detach().cpu() for name, tensor in state.items()})


def questions_digest(answerer: QuestionAnswerer) -> str:
    """SHA-256 over the questions as they stand in the file, in their order."""
    return _digest({"questions": [_question_to_json(question) for question in answerer.catalogue.questions]}, {})


def _base_of(policy_class: type) -> type:
    """The policy class without the questions."""
    return next(cls for cls in policy_class.__mro__ if not issubclass(cls, QAPolicyMixin) and cls is not QAPolicyMixin)


def _arguments(policy: Any) -> dict[str, Any]:
    given = dict(policy._get_constructor_parameters())
    if hasattr(policy, "share_features_extractor"):  # some leave it out of what they say they were constructed with
        given["share_features_extractor"] = policy.share_features_extractor
    dropped = {
        "observation_space",
        "action_space",
        "lr_schedule",
        "optimizer_class",
        "optimizer_kwargs",
        *policy.qa_kwargs,
    }
    kept = {key: value for key, value in given.items() if key not in dropped and value is not None}
    if isinstance(policy, ActorCriticPolicy) and not policy.use_sde:
        kept = {key: value for key, value in kept.items() if key not in ("squash_output", "full_std", "use_expln")}
    return {key: _value_to_json(value) for key, value in kept.items()}


def _value_to_json(value: Any) -> Any:
    if isinstance(value, type):
        return {"class": _name_of(value)}
    if isinstance(value, dict):
        return {"dict": {str(key): _value_to_json(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_value_to_json(item) for item in value]
    return value


def _value_from_json(value: Any, known: Mapping[str, type], path: Any) -> Any:
    if isinstance(value, dict) and "class" in value:
        return _lookup(value["class"], known, path)
    if isinstance(value, dict):
        return {key: _value_from_json(item, known, path) for key, item in value["dict"].items()}
    return [_value_from_json(item, known, path) for item in value] if isinstance(value, list) else value


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _lookup(name: str, known: Mapping[str, type], path: Any) -> type:
    if name not in known:
        short = name.rsplit(".", 1)[-1]
        raise QAError(
            f"{os.fspath(path)} was saved with the class {name}, which is not one of stable-baselines3's; expected it to be passed, as "
            f"nothing is imported on a file's word; write QuestionAnswerer.load(path, classes=[{short}])"
        )
    return known[name]


class _NoOptimizer(torch.optim.Optimizer):
    """What a frozen policy has for an optimiser. A real one imports torch's compiler: a second and 90 MB in every worker."""

    qa_joined = True  # its steps, which never come, need no hooks

    def __init__(self, params: Any, **options: Any) -> None:
        self.defaults: dict[str, Any] = {}
        self.param_groups: list[dict[str, Any]] = []
        self.state: Any = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Nothing is optimised."""


def _no_learning(progress_remaining: float) -> float:
    return 0.0


def _question_to_json(question: Question) -> dict[str, Any]:
    truth, answer = question.truth, question.answer
    fact: Any = truth.fact
    if isinstance(fact, FactOf):
        fact = fact.as_data()
    elif not isinstance(fact, str):
        fact = getattr(fact, "__name__", "callable")
    kind: dict[str, Any] = {"kind": "yesno"}
    if isinstance(answer, Choice):
        kind = {"kind": "choice", "options": list(answer.options)}
    elif isinstance(answer, Number):
        kind = {"kind": "number", "low": float(answer.low), "high": float(answer.high)}
    return {
        "text": question.text,
        "name": question.name,
        "slots": {name: list(values) for name, values in question.slots.items()},
        "answer": kind,
        **({"holdout": sorted(question.holdout)} if question.holdout else {}),
        "truth": {"operator": truth.operator, "fact": fact, "horizon": truth.horizon, "discount": truth.discount},
    }


def _question_from_json(data: dict[str, Any]) -> Question:
    kind = data["answer"]
    answer: AnswerKind = YesNo()
    if kind["kind"] == "choice":
        answer = Choice(*_hashable(kind["options"]))
    elif kind["kind"] == "number":
        answer = Number(kind["low"], kind["high"])
    truth = dict(data["truth"])
    if not isinstance(truth["fact"], str):
        truth["fact"] = fact_of_data(truth["fact"], f"question {data['name']!r}")
    return Question(
        data["text"], Truth(**truth), answer, data["name"], data.get("holdout", ()), **_hashable(data["slots"])
    )


def _hashable(value: Any) -> Any:
    """Options and slots with the tuples that JSON has made lists of; a list could not have been in them."""
    if isinstance(value, dict):
        return {key: _hashable(each) for key, each in value.items()}
    return tuple(_hashable(each) for each in value) if isinstance(value, list) else value


def _space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        return {
            "box": list(space.shape),
            "low": _bound(space.low),
            "high": _bound(space.high),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.Discrete):
        return {"discrete": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"multi_discrete": space.nvec.tolist(), "start": space.start.tolist(), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"multi_binary": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"dict": [[key, _space_to_json(value)] for key, value in space.spaces.items()]}
    raise QAError(
        f"the answerer has the space {space}; expected Box, Discrete, MultiDiscrete, MultiBinary or Dict; it cannot be saved"
    )


def _space_from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    if "box" in data:
        dtype = np.dtype(data["dtype"])
        low, high = (
            np.broadcast_to(np.array(data[b], dtype=object).astype(float), data["box"]) for b in ("low", "high")
        )
        return spaces.Box(low.astype(dtype), high.astype(dtype), tuple(data["box"]), dtype.type)
    if "discrete" in data:
        return spaces.Discrete(data["discrete"], start=data["start"])
    if "multi_discrete" in data:
        return spaces.MultiDiscrete(data["multi_discrete"], dtype=np.dtype(data["dtype"]).type, start=data["start"])
    if "multi_binary" in data:
        shape = data["multi_binary"]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    # In the order that it was made in, which is the order that features are in; a plain dictionary would be sorted.
    return spaces.Dict([(key, _space_from_json(value)) for key, value in data["dict"]])


def _bound(bound: np.ndarray[Any, Any]) -> Any:
    """One number where all are the same; infinities as words, which JSON has no numbers for."""
    flat = [float(x) if math.isfinite(x) else str(float(x)) for x in bound.ravel().tolist()]
    if len(set(flat)) == 1:
        return flat[0]
    return np.array(flat, dtype=object).reshape(bound.shape).tolist()
