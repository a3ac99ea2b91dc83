"""Answers: distributions over yes/no, options or numbers, for a batch of observations (numpy, no torch)."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["Answer", "ChoiceAnswer", "NumberAnswer", "YesNoAnswer"]

Floats = NDArray[np.float32]


class Answer(NDArrayOperatorsMixin):
    """An answer to one question about a batch of observations.

    In arithmetic it stands for its point value, :attr:`value`: ``-2.0 * answer`` is an array.
    """

    understood_as: str = ""
    """The instance that the question was taken to ask, e.g. ``crash[k=7]``, whether it was taught or not."""
    familiarity: float = 1.0
    """How near that is to what was taught: 1 for what was, see :class:`~sb3_qa.understanding.Understanding`."""

    @property
    def value(self) -> Floats:
        """One number an observation (n_envs,): the probability of yes, the mean, or the index of the likeliest option."""
        raise NotImplementedError

    @property
    def entropy(self) -> Floats:
        """Entropy of the distribution in nats, of the shape of :attr:`value`."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.value, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Answer) for x in kwargs.get("out", ())):  # answer *= 2: an answer itself never changes
            del kwargs["out"]
        return getattr(ufunc, method)(*_plain(inputs), **_plain(kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*_plain(args), **_plain(kwargs))

    if not TYPE_CHECKING:  # a type checker knows better than that any name will do

        def __getattr__(self, name: str) -> Any:
            own = [each for each in (*vars(self), *dir(type(self))) if not each.startswith("_")]
            raise AttributeError(
                f"a {type(self).__name__} has no {name!r}; it has {', '.join(sorted(own))}", name=name, obj=self
            )

    def __bool__(self) -> bool:
        raise QAError(f"got {self!r} as a condition; expected a comparison; write e.g. answer.probability > 0.5")

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __len__(self) -> int:
        return len(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({np.array2string(np.asarray(self.value), precision=3, threshold=20)})"


class YesNoAnswer(Answer):
    """Answer to a yes/no question."""

    def __init__(self, probability: Floats) -> None:
        self.probability = probability
        """Probability of yes, shape (n_envs,), or (n_envs, n_actions) where every action was asked about."""

    @property
    def value(self) -> Floats:
        return self.probability

    @property
    def entropy(self) -> Floats:
        return _entropy(np.stack([self.probability, 1.0 - self.probability], axis=-1))


class ChoiceAnswer(Answer):
    """Answer to a question with options."""

    def __init__(self, options: tuple[Any, ...], probabilities: Floats) -> None:
        self.options = options
        self.probabilities = probabilities
        """Probability of each option, shape (n_envs, n_options), or (n_envs, n_actions, n_options)."""

    @property
    def value(self) -> Floats:
        return np.asarray(np.argmax(self.probabilities, axis=-1), np.float32)

    @property
    def best(self) -> NDArray[np.object_]:
        """The likeliest option of each observation."""
        options = np.empty(len(self.options), object)
        for n, option in enumerate(self.options):  # one by one, as an option may be a tuple
            options[n] = option
        best: NDArray[np.object_] = options[np.argmax(self.probabilities, axis=-1)]
        return best

    @property
    def entropy(self) -> Floats:
        return _entropy(self.probabilities)


class NumberAnswer(Answer):
    """Answer to a question about a number: a distribution over ``support``.

    :param support: (n_atoms,) ascending values
    :param probabilities: (n_envs, n_atoms), or (n_envs, n_actions, n_atoms)
    :param whole: whether only the values of the support are possible (a count of steps); otherwise the probability of
        an atom is spread evenly to half way to its neighbours
    """

    def __init__(self, support: Floats, probabilities: Floats, whole: bool = False) -> None:
        self.support = support
        self.probabilities = probabilities
        self._whole = whole

    @property
    def mean(self) -> Floats:
        """Expected value, shape (n_envs,) or (n_envs, n_actions), in the units of the fact."""
        # Not `@`, which was seen to warn, now and then, of invalid values that were not there.
        return np.asarray((self.probabilities * self.support).sum(axis=-1))

    @property
    def value(self) -> Floats:
        return self.mean

    @property
    def entropy(self) -> Floats:
        return _entropy(self.probabilities)

    def quantile(self, p: float) -> Floats:
        """The value that the number is at most with probability ``p``; shape as :attr:`mean`.

        :raises QAError: when ``p`` is not in [0, 1]
        """
        _check_probability(p, "quantile", "p")
        cdf = np.cumsum(self.probabilities, axis=-1, dtype=np.float64)
        cdf /= cdf[..., -1:]
        atom = np.argmax(cdf >= p - 1e-6, axis=-1)  # float32 probabilities are no better than that
        if self._whole:
            return np.asarray(self.support[atom])
        edges = np.concatenate([self.support[:1], (self.support[1:] + self.support[:-1]) / 2, self.support[-1:]])
        mass = np.take_along_axis(self.probabilities, atom[..., None], -1)[..., 0]
        before = np.take_along_axis(cdf, atom[..., None], -1)[..., 0] - mass
        part = np.clip((p - before) / np.maximum(mass, 1e-12), 0.0, 1.0)
        return np.asarray(edges[atom] + part * (edges[atom + 1] - edges[atom]), np.float32)

    def interval(self, level: float) -> tuple[Floats, Floats]:
        """Central interval that holds the number with probability ``level``: two arrays shaped as :attr:`mean`.

        :raises QAError: when ``level`` is not in [0, 1]
        """
        _check_probability(level, "interval", "level")
        return self.quantile((1.0 - level) / 2), self.quantile((1.0 + level) / 2)


def _check_probability(p: Any, method: str, name: str) -> None:
    if not isinstance(p, Real) or not 0.0 <= float(p) <= 1.0:
        raise QAError(f"{method} got {name}={p!r}; expected one probability in [0, 1]; give e.g. 0.9")


def _plain(x: Any) -> Any:
    """With arrays in place of answers."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_plain(value) for value in x)
    return x.value if isinstance(x, Answer) else x


def _entropy(probabilities: Floats) -> Floats:
    p = np.clip(probabilities, 1e-12, 1.0)
    return np.asarray(-(p * np.log(p)).sum(axis=-1), np.float32)
