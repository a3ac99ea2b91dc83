"""Rows made of a question's words: small networks that learn with the agent, so that words in new combinations can be answered.

A target's words are its text with the slots filled, but for the horizon of an event: all horizons share one survival curve,
and a horizon says where to read it. A curve has a row for every step, made of a few rows along it and interpolated in
the logarithm of the step; so has a histogram along its range. A choice has a row for each option, made of the question's
words and the option's.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from sb3_qa.encoders import initial_bias
from sb3_qa.errors import QAError
from sb3_qa.head import QAHead, Weights, _Answering
from sb3_qa.panel import Panel
from sb3_qa.questions import Catalogue, Choice, Question, Target

__all__ = ["EmbeddingEncoder", "LanguageHead", "StoredEmbeddings", "TextEncoder", "make_head", "tokenize", "words_of"]

WORD, NEAR, ENCODING = 32, 64, 256  # widths of a word, of a word with its neighbours, and of a text
PLACES = 48  # words of a text that are told apart by where they stand
KNOTS = 8  # rows that a histogram is interpolated between
ROW_SCALE, GAIN = 0.5, 4.0
"""Of rows and of the encoder's layers: their weights are learnt small and used large, so that a step of the optimiser moves
them as far as a row learnt by itself. Without, most of what an agent's features told was not read within thousands of steps."""
PADDING, UNKNOWN, NUMBER = 0, 1, 2
_TOKEN = re.compile(r"\{\w+\}|\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?|[^\w\s?.!,;:]")


def tokenize(text: str) -> list[str]:
    """Words, numbers and slots of a text, in lower case; its punctuation is dropped.

    >>> tokenize("Will I see a red ball within 7 steps?")
    ['will', 'i', 'see', 'a', 'red', 'ball', 'within', '7', 'steps']
    """
    return _TOKEN.findall(text.lower())


def words_of(target: Target) -> list[str]:
    """The texts that a target's rows are made of: one, or one for each option of a choice."""
    text = text_of(target.question, {**target.slots, **_open_horizon(target.question)})
    answer = target.question.answer
    return [f"{text} {option}" for option in answer.options] if isinstance(answer, Choice) else [text]


def text_of(question: Question, slots: dict[str, Any]) -> str:
    """The question's text with these slots filled; ``{action}`` stays."""
    text = question.text
    for name, value in {**slots, Question.ACTION: "{action}"}.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def _open_horizon(question: Question) -> dict[str, str]:
    horizon = question.truth.horizon
    return {horizon: "{" + horizon + "}"} if question.truth.is_event and isinstance(horizon, str) else {}


def hats(places: NDArray[np.float64], n_knots: int) -> NDArray[np.float32]:
    """Linear interpolation between knots at 0, 1, ..: weights (n_places, n_knots)."""
    return np.maximum(0.0, 1.0 - np.abs(np.clip(places, 0, n_knots - 1)[:, None] - np.arange(n_knots))).astype(
        np.float32
    )


class Encoder(ABC):
    """From texts to encodings (n_texts, ENCODING), by weights that lie in the head's flat parameter."""

    shapes: list[tuple[int, ...]]
    """Of its weights."""

    @abstractmethod
    def initial(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Its weights to begin with."""

    @abstractmethod
    def prepare(self, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """What the network reads of texts; it does not depend on weights."""

    @abstractmethod
    def encode(self, weights: Sequence[torch.Tensor], prepared: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(n_texts, ENCODING), in [-1, 1]"""


class TextEncoder(Encoder):
    """A small network over words, learnt with the agent: each word with its neighbours and its place, added up.

    Numbers are read as numbers, by the same weights, so that 7 lies between 5 and 10; other words have a vector each.

    :param texts: what is taught: their words are those it knows
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = sorted({word for text in texts for word in tokenize(text) if not _is_number(word)})
        self.vocabulary = {word: n + NUMBER + 1 for n, word in enumerate(words)}
        n_words = len(words) + NUMBER + 1
        self.shapes = [
            (n_words, WORD),
            (3, WORD),
            (PLACES, WORD),
            (3 * WORD, NEAR),
            (NEAR,),
            (NEAR, ENCODING),
            (ENCODING,),
        ]

    def initial(self, generator: torch.Generator) -> list[torch.Tensor]:
        spread = [0.5, 0.5, 0.15, 1 / math.sqrt(WORD), 0.0, 1 / math.sqrt(NEAR), 0.0]
        spread[3:] = [s / GAIN for s in spread[3:]]
        return [torch.randn(shape, generator=generator) * s for shape, s in zip(self.shapes, spread, strict=True)]

    def prepare(self, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Indices of words (n, length), features of numbers (n, length, 3), and shares of words in the sum (n, 1, length)."""
        tokens = [tokenize(text)[:PLACES] or [""] for text in texts]
        length = max(map(len, tokens))
        index = np.zeros((len(texts), length), np.int64)
        numbers = np.zeros((len(texts), length, 3), np.float32)
        share = np.zeros((len(texts), 1, length), np.float32)
        for n, words in enumerate(tokens):
            share[n, 0, : len(words)] = 1.0 / math.sqrt(len(words))
            for m, word in enumerate(words):
                if _is_number(word):
                    index[n, m] = NUMBER
                    size = math.log2(1.0 + float(word)) / 4.0
                    numbers[n, m] = size, size * size, 1.0 / (1.0 + float(word))
                else:
                    index[n, m] = self.vocabulary.get(word, UNKNOWN)
        return torch.from_numpy(index), torch.from_numpy(numbers), torch.from_numpy(share)

    def encode(self, weights: Sequence[torch.Tensor], prepared: tuple[torch.Tensor, ...]) -> torch.Tensor:
        words, number, place, near, near_bias, mix, mix_bias = weights
        index, numbers, share = prepared
        n, length = index.shape
        x = words[index] + numbers @ number + place[:length]
        x = x * (share.transpose(1, 2) > 0)
        edge = x.new_zeros(n, 1, WORD)
        wide = torch.cat([torch.cat([edge, x[:, :-1]], 1), x, torch.cat([x[:, 1:], edge], 1)], dim=2)
        summed = (share @ torch.tanh((wide @ near + near_bias) * GAIN)).squeeze(1)
        return torch.tanh((summed @ mix + mix_bias) * GAIN)

    def unknown(self, text: str) -> list[str]:
        """Words of a text that were never taught."""
        return [word for word in tokenize(text) if not _is_number(word) and word not in self.vocabulary]


class EmbeddingEncoder(Encoder):
    """A frozen model of sentences and a learnt projection of what it gives.

    :param embed: from n texts to (n, width), a tensor or an array
    :param texts: what is taught
    """

    def __init__(self, embed: Callable[[list[str]], Any], texts: Sequence[str]) -> None:
        self.embed = embed
        self._whitening: tuple[torch.Tensor, torch.Tensor] | None = None
        self.known: dict[str, int] = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        self.table = self._embedded(list(self.known))
        """Embeddings of what is taught; they are saved with the head, so that answers do not depend on the model being there."""
        self.shapes = [(self.table.shape[1], ENCODING), (ENCODING,)]

    def initial(self, generator: torch.Generator) -> list[torch.Tensor]:
        return [torch.randn(self.shapes[0], generator=generator) * 2.5, torch.zeros(ENCODING)]

    def prepare(self, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        rows = dict(zip(new, self._embedded(new), strict=True)) if new else {}
        return (self._whitened(torch.stack([rows[t] if t in rows else self.table[self.known[t]] for t in texts])),)

    def encode(self, weights: Sequence[torch.Tensor], prepared: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.tanh(prepared[0] @ weights[0] + weights[1])

    def _whitened(self, rows: torch.Tensor) -> torch.Tensor:
        """Relative to what is taught, and about as long as 1, with all directions in which taught texts differ of one size.

        A model of sentences sets templates apart widely and the values of their slots hardly. (By the symmetric square root,
        which is the same wherever it is worked out.)
        """
        if self._whitening is None or self._whitening[0] is not self.table:
            centred = (self.table - self.table.mean(0)).double()
            sizes, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
            rank = max(min(len(centred) - 1, len(sizes)), 1)
            floor = 0.01 * float(sizes.sum()) / rank + 1e-12
            matrix = axes @ ((sizes.clamp(min=0) + floor) * rank).rsqrt().diag() @ axes.T
            self._whitening = self.table, matrix.float()
        return (rows - self.table.mean(0)) @ self._whitening[1]

    def _embedded(self, texts: list[str]) -> torch.Tensor:
        rows = self.embed(texts)
        rows = torch.as_tensor(rows).detach().to(torch.float32).cpu()
        if rows.ndim != 2 or len(rows) != len(texts) or not bool(torch.isfinite(rows).all()):
            raise QAError(
                f"the qa_encoder gave an array of shape {tuple(rows.shape)} for {len(texts)} texts; expected finite numbers of shape "
                f"({len(texts)}, width); mend the callable"
            )
        return rows


class StoredEmbeddings:
    """Stands for a model of sentences in an answerer that was loaded: what it gave for taught texts is in the file.

    :param width: of the embeddings
    :param model: ``"sentence"`` where new texts are embedded by the model of that extra, if it is installed; None where it
        was a callable of the user's, which is in no file
    """

    def __init__(self, width: int, model: str | None) -> None:
        self.width, self.model = width, model
        self.loading = True

    def __call__(self, texts: list[str]) -> Any:
        if self.loading:  # they are about to be loaded
            return torch.zeros(len(texts), self.width)
        if self.model == "sentence":
            from sb3_qa.sentences import sentence_model

            return sentence_model()(texts)
        raise QAError(
            f"{texts[0]!r} is not one of the texts that were taught, and the encoder was a callable of the user's, which no file holds; "
            "expected a taught question; ask a live model"
        )


class _Inputs(NamedTuple):
    """What rows of a panel are made of, prepared once."""

    prepared: tuple[torch.Tensor, ...]
    parts: list[tuple[str, torch.Tensor, torch.Tensor | None]]
    """By kind: of which text each column is, and its weights on the rows along a curve or histogram."""
    order: torch.Tensor | None
    """From the columns kind by kind to those of the panel; None where they are the same."""
    base: torch.Tensor
    """Of each column of the panel: its place among the base rates of questions."""


class LanguageHead(QAHead):
    """A head whose rows are made of the words of its questions. See :class:`QAHead` for everything else.

    Rows are a linear function of a text's encoding, and every question has a bias of its own, whatever is in its slots;
    encoder, function and biases are learnt by the gradient of the rows. They lie in the head's flat parameter, and are
    averaged, saved and stepped with it.
    """

    pace = 1.0  # what makes rows from words is deeper than rows are

    def __init__(self, catalogue: Catalogue, *args: Any, **kwargs: Any) -> None:
        super().__init__(catalogue, *args, **kwargs)
        self.by_panels = True
        if isinstance(self.words, EmbeddingEncoder):
            self.register_buffer("embeddings", self.words.table)
            self.register_load_state_dict_post_hook(_embeddings_are_loaded)  # type: ignore[no-untyped-call]

    def _initial_readout(self, generator: torch.Generator) -> torch.Tensor:
        targets = self.catalogue.targets
        texts = [text for target in targets for text in words_of(target)]
        if callable(self.encoder):
            self.words: Encoder = EmbeddingEncoder(self.encoder, texts)
        elif self.encoder == "sentence":
            from sb3_qa.sentences import sentence_model

            self.words = EmbeddingEncoder(sentence_model(), texts)
        else:
            self.words = TextEncoder(texts)
        longest = max((t.width for t in targets if t.kind == "event"), default=1)
        self.n_knots = {"event": 1 + math.ceil(math.log2(longest)), "number": KNOTS, "yesno": 1, "choice": 1}
        self.kinds = sorted({target.kind for target in targets})
        makers = [(self.n_knots[kind] * (self.width + 1), ENCODING) for kind in self.kinds]
        self._base_of: dict[str, slice] = {}
        """Where the biases of a question lie, by its name: one for all steps of an event, one for each option or atom."""
        base: list[float] = []
        for target in sorted(self.catalogue.target_of.values(), key=lambda each: -each.width):
            if target.question.name not in self._base_of:
                biases = [initial_bias(target)] * _n_biases(target)
                self._base_of[target.question.name] = slice(len(base), len(base) + len(biases))
                base += biases
        self._row_shapes = [*self.words.shapes, *makers, (len(base),)]
        self._sizes = [math.prod(shape) for shape in self._row_shapes]
        first = [*self.words.initial(generator), *(torch.randn(s, generator=generator) * 0.01 for s in makers)]
        first.append(torch.tensor(base))
        self._everything: Panel | None = None
        return torch.cat([part.flatten() for part in first])

    def _write_biases(self, flat: torch.Tensor, biases: Mapping[int, Any]) -> None:
        """A question begins with the mean of the rates of all that was put in its slots."""
        rates: dict[str, list[torch.Tensor]] = {}
        for target in self.catalogue.targets:
            if target.start in biases:
                bias = torch.from_numpy(biases[target.start][: _n_biases(target)])
                rates.setdefault(target.question.name, []).append(bias.sigmoid() if len(bias) == 1 else bias.softmax(0))
        base = self._made_of(flat)[-1]
        for name, each in rates.items():
            rate = torch.stack(each).mean(0)
            base[self._base_of[name]] = rate.logit() if len(rate) == 1 else rate.log()

    def _made_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """What rows are made of, as views of the flat weights or of their first part: the encoder's, by kind, biases."""
        made_of = flat[: self._places[0][1]]
        return [w.view(s) for w, s in zip(made_of.split(self._sizes), self._row_shapes, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_everything": None}

    def _check_untaught(self, panel: Panel) -> None:
        pass  # it can tell from the words

    @property
    def everything(self) -> Panel:
        """The panel of all that is taught."""
        if self._everything is None:
            self._everything = Panel(self.catalogue.targets)
        return self._everything

    def readout_of(self, made_of: torch.Tensor, panel: Panel) -> torch.Tensor:
        inputs = self._prepared(panel)
        *parts, base = self._made_of(made_of)
        n_own = len(self.words.shapes)
        encodings = self.words.encode(parts[:n_own], inputs.prepared)
        makers = dict(zip(self.kinds, parts[n_own:], strict=True))
        rows = []
        for kind, text, along in inputs.parts:
            made = (encodings @ makers[kind].T).view(len(encodings), -1, self.width + 1)[text]
            rows.append(made.squeeze(1) if along is None else (along @ made).flatten(0, 1))
        readout = torch.cat(rows) if len(rows) > 1 else rows[0]
        if inputs.order is not None:
            readout = readout[inputs.order]
        return readout * ROW_SCALE + nn.functional.pad(base[inputs.base][:, None], (self.width, 0))

    def encodings(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encodings of texts by the weights that answer, (n, ENCODING)."""
        self._follow_by_hand()
        weights = self._made_of(self.average)
        prepared = tuple(x.to(self.average.device) for x in self.words.prepare(texts))
        with torch.no_grad():
            made: NDArray[np.float32] = self.words.encode(weights[: len(self.words.shapes)], prepared).cpu().numpy()
        return made

    def _prepared(self, panel: Panel) -> _Inputs:
        device = self.flat.device
        if panel.inputs is not None and panel.inputs[0] == device:
            inputs: _Inputs = panel.inputs[1]
            return inputs
        number: dict[str, int] = {}
        by_kind: dict[tuple[str, int], list[tuple[int, Target]]] = {}
        for target in panel.targets:
            for n, text in enumerate(words_of(target)):
                number.setdefault(text, len(number))
                width = 1 if target.kind == "choice" else target.width
                by_kind.setdefault((target.kind, width), []).append((n, target))
        parts: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []
        columns: list[NDArray[np.intp]] = []
        base = torch.zeros(panel.n_logits, dtype=torch.int64)
        for (kind, width), members in by_kind.items():
            texts = torch.tensor([number[words_of(target)[n]] for n, target in members])
            along = None
            if kind == "event":
                steps = np.log2(np.arange(1, width + 1))
                along = torch.from_numpy(hats(steps, self.n_knots[kind]))
            elif kind == "number":
                along = torch.from_numpy(hats(np.linspace(0.0, KNOTS - 1.0, width), KNOTS))
            for n, target in members:
                start = target.start + (n if kind == "choice" else 0)
                columns.append(np.arange(start, start + width))
            parts.append((kind, texts.to(device), None if along is None else along.to(device)))
        for target in panel.targets:
            place = self._base_of[target.question.name]
            base[target.start : target.stop] = torch.arange(place.start, place.stop)
        order = np.argsort(np.concatenate(columns), kind="stable")
        same = bool((order == np.arange(len(order))).all())
        prepared = tuple(x.to(device) for x in self.words.prepare(list(number)))
        inputs = _Inputs(prepared, parts, None if same else torch.from_numpy(order).to(device), base.to(device))
        panel.inputs = device, inputs
        return inputs

    def gradients(
        self, latents: Any, features: Any, y: Any, weight: Any, panel: Panel | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self._panel_gradients(panel or self.everything, latents, features, y, weight)

    def _readout(self, panel: Panel | None) -> tuple[torch.Tensor, int]:
        return super()._readout(panel or self.everything)

    def _layers_that_answer(self) -> tuple[list[tuple[Any, Any]], Any]:
        self._follow_by_hand()
        w: Weights = self.weights(self.average.cpu().numpy())
        return [(weight.T, bias) for weight, bias in w.layers], w.action

    def _that_answer(self) -> _Answering:
        return self._panel_that_answers(self.everything)


def make_head(
    encoder: Any,
    catalogue: Catalogue,
    latent_dim: int,
    action_space: spaces.Space[Any],
    net_arch: Sequence[int],
    seed: int = 0,
    critic_dims: Sequence[int] = (),
) -> QAHead:
    """The head for an encoder: ``"index"``, ``"text"``, ``"sentence"``, or a callable from texts to embeddings.

    :param critic_dims: see :class:`QAHead`
    :raises QAError: for any other
    """
    if isinstance(encoder, str) and encoder == "index":
        return QAHead(catalogue, latent_dim, action_space, net_arch, encoder, seed, critic_dims)
    if callable(encoder) or (isinstance(encoder, str) and encoder in ("text", "sentence")):
        return LanguageHead(catalogue, latent_dim, action_space, net_arch, encoder, seed, critic_dims)
    raise QAError(
        f"qa_encoder got {encoder!r}; expected 'index', 'text', 'sentence', or a callable from a list of texts to a tensor; leave it out"
    )


def _n_biases(target: Target) -> int:
    return 1 if target.kind in ("event", "yesno") else target.width


def _is_number(word: str) -> bool:
    return word[:1].isdigit()


def _embeddings_are_loaded(head: Any, incompatible_keys: Any) -> None:
    head.words.table = head.embeddings.cpu()
    if isinstance(head.words.embed, StoredEmbeddings):
        head.words.embed.loading = False
