"""Facts of a step, and the operators that turn them into the truth of a question.

Time is counted in decisions. At ``t`` the agent sees ``s_t`` and acts; the step (or reset) that *produced* ``s_t``
carries the fact ``f(s_t)``. Every operator but :func:`now` looks at the states *after* the decision,
``s_{t+1} .. s_{t+k}``; they are the bounded operators of temporal logic (Koymans 1990, "Specifying real-time
properties with metric temporal logic") over those states.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import FunctionType
from typing import Any, NamedTuple

import cloudpickle  # SB3's, which saves models with it
import numpy as np

from sb3_qa.errors import QAError

__all__ = [
    "Fact",
    "Step",
    "Table",
    "Truth",
    "after",
    "always",
    "eventually",
    "lowest",
    "now",
    "peak",
    "steps_until",
    "table",
    "total",
]


class Step(NamedTuple):
    """What is known once a state has been arrived in: the argument of a callable fact.

    At a reset ``action`` is None, ``reward`` is 0.0, both flags are False, and ``info`` is what ``reset`` returned.
    """

    obs: Any
    """The state arrived in (of one environment); on the last step of an episode, the true last observation."""
    action: Any
    """The action as it was executed."""
    reward: float
    """The environment's own reward, before any shaping or normalisation."""
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Table:
    """Facts of all slot values at once: an array with an axis for each slot. Made by :func:`table`."""

    def __init__(self, source: str | Callable[[Step], Any], axes: Mapping[str, Sequence[Any]]) -> None:
        self.source = source
        self.axes = {slot: tuple(values) for slot, values in axes.items()}
        self.shape = tuple(len(values) for values in self.axes.values())
        self._places = {slot: {value: n for n, value in enumerate(values)} for slot, values in self.axes.items()}

    def index(self, slots: Mapping[str, Any]) -> int:
        """Where the fact of these slot values stands in the flattened array."""
        place = 0
        for slot, size in zip(self.axes, self.shape, strict=True):
            if slots[slot] not in self._places[slot]:
                raise QAError(
                    f"table() got the slot {slot}={slots[slot]!r}; expected one of {list(self.axes[slot])}; list it in table()"
                )
            place = place * size + self._places[slot][slots[slot]]
        return place

    def read(self, step: Step) -> Any:
        """The array of a step, flattened: (n_facts,)."""
        if not isinstance(self.source, str):
            values = np.asarray(self.source(step))
        elif self.source not in step.info:
            return None
        else:
            values = np.asarray(step.info[self.source])
        if values.shape != self.shape or values.dtype.kind not in "biuf":
            raise QAError(
                f"table({self.source!r}) got an array of shape {values.shape}, {values.dtype}; expected numbers of shape {self.shape}, "
                f"an axis for each of {list(self.axes)}; mend what is told"
            )
        return values.ravel()

    def __call__(self, step: Step, **slots: Any) -> Any:
        """The fact of one combination of slot values, None where it is not told."""
        values = self.read(step)
        return None if values is None else values[self.index(slots)].item()

    def __repr__(self) -> str:
        return f"table({self.source!r}, {', '.join(f'{slot}={list(values)!r}' for slot, values in self.axes.items())})"


Fact = str | Callable[..., Any]
"""The name of an ``info`` key, which may hold slots (``"near_{car}"``), or a callable of a :class:`Step`, to which the slots
that it has arguments for are passed too (``lambda step, car: ...``). In an event, a fact that is not there counts as false."""


@dataclass(frozen=True)
class Truth:
    """How the truth of a question becomes known: an operator over a fact, made by the functions of this module.

    Two functions of the same code are the same fact, so that a question is equal to itself once it has been saved and loaded.
    """

    operator: str
    fact: Fact
    horizon: int | str | None = None
    discount: float = 1.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Truth):
            return NotImplemented
        rest = (self.operator, self.horizon, self.discount) == (other.operator, other.horizon, other.discount)
        return rest and _same_fact(self.fact, other.fact)

    def __hash__(self) -> int:
        fact = self.fact
        return hash((self.operator, self.horizon, self.discount, getattr(fact, "__code__", fact)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self.operator, _packed(self.fact), self.horizon, self.discount)

    def __deepcopy__(self, memo: dict[int, Any]) -> Truth:
        return replace(self, fact=copy.deepcopy(self.fact, memo))

    @property
    def is_event(self) -> bool:
        """Whether the answer is the time of an event, learnt as a survival curve."""
        return self.operator in ("eventually", "always", "steps_until")

    @property
    def event_when(self) -> bool:
        """The value of the fact that is the event: ``always(f)`` ends when f becomes false."""
        return self.operator != "always"


def now(fact: Fact) -> Truth:
    """f(s_t): the fact that arrived with the state the question is asked in.

    >>> now("speed").operator
    'now'
    """
    return _truth("now", fact)


def after(fact: Fact, *, steps: int | str) -> Truth:
    """f(s_{t+k}). When the episode has ended by then a yes/no question is answered no, any other has no truth."""
    return _truth("after", fact, steps, "steps")


def eventually(fact: Fact, *, within: int | str) -> Truth:
    """Whether f holds in any of s_{t+1} .. s_{t+k}. A termination ends the future: no event comes after it."""
    return _truth("eventually", fact, within, "within")


def always(fact: Fact, *, during: int | str) -> Truth:
    """Whether f holds in all of s_{t+1} .. s_{t+k} (as many of them as there are, if the episode terminates)."""
    return _truth("always", fact, during, "during")


def steps_until(fact: Fact, *, cap: int | str) -> Truth:
    """min(T, k) where T is the first step at which f holds in s_{t+T}; k if it does not within k steps."""
    return _truth("steps_until", fact, cap, "cap")


def total(fact: Fact, *, over: int | str, discount: float = 1.0) -> Truth:
    """Sum over j = 1..k of discount**(j-1) * f(s_{t+j}), up to a termination."""
    if isinstance(discount, bool) or not isinstance(discount, Real) or not 0.0 < discount <= 1.0:
        raise QAError(
            f"total() got discount={discount!r}; expected a number in (0, 1]; give discount=0.99 or leave it out"
        )
    return _truth("total", fact, over, "over", float(discount))


def peak(fact: Fact, *, over: int | str) -> Truth:
    """The largest of f(s_{t+1}) .. f(s_{t+k}), up to a termination."""
    return _truth("peak", fact, over, "over")


def lowest(fact: Fact, *, over: int | str) -> Truth:
    """The smallest of f(s_{t+1}) .. f(s_{t+k}), up to a termination."""
    return _truth("lowest", fact, over, "over")


def table(source: str | Callable[[Step], Any], **axes: Sequence[Any]) -> Table:
    """A fact of many slot values, told as one array: thousands of questions cost a look-up each, and not a call.

    >>> near = table("near", color=["red", "green"], kind=["ball", "key"])
    >>> near.index(dict(color="green", kind="ball"))
    2

    :param source: the ``info`` key of an array with an axis for each slot, or a callable of a :class:`Step` that returns one
    :param axes: for each slot, in the order of the array's axes, the values along it
    """
    if not (callable(source) or (isinstance(source, str) and source)):
        raise QAError(
            f"table() got {source!r}; expected an info key or a callable of a Step; give e.g. table('near', ...)"
        )
    for slot, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise QAError(f"table() got {slot}={values!r}; expected the values along that axis; list them")
        if len(set(values)) < len(values):
            raise QAError(f"table() got {slot}={values!r}; expected each value once; drop the second")
    if not axes:
        raise QAError("table() got no axes; expected a slot for each axis of the array; give e.g. color=COLORS")
    return Table(source, axes)


def _truth(operator: str, fact: Fact, horizon: int | str | None = None, word: str = "", discount: float = 1.0) -> Truth:
    if not (callable(fact) or (isinstance(fact, str) and fact)):
        raise QAError(
            f"{operator}() got {fact!r} as a fact; expected the name of an info key or a callable of a Step; "
            f'give e.g. {operator}("crashed"...) or {operator}(lambda step: step.terminated...)'
        )
    if word and isinstance(horizon, str) and not horizon.isidentifier():
        raise QAError(
            f"{operator}({word}=...) got {horizon!r}; expected a whole number of steps, or the name of a slot; give e.g. {word}=5"
        )
    if word and not isinstance(horizon, str):
        horizon = check_horizon(horizon, f"{operator}({word}=...)")
    return Truth(operator, fact, horizon, discount)


def fields(text: str, what: str = "a question's text") -> list[str]:
    """Names of the slots in the braces of ``text``, or raise :class:`QAError`."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise QAError(
            f"{what} got {text!r}, whose braces do not match ({error}); expected {{slot}}; close it, or double a literal brace"
        ) from None
    for name in names:
        if not name.isidentifier():
            raise QAError(
                f"{what} got {text!r} with {{{name}}}; expected the name of a slot in braces; name it, or double a literal brace"
            )
    return names


def _same_fact(a: Fact, b: Fact) -> bool:
    if not (isinstance(a, FunctionType) and isinstance(b, FunctionType)):
        return bool(a == b)
    if a is b:
        return True
    if a.__code__ != b.__code__ or (a.__module__, a.__qualname__) != (b.__module__, b.__qualname__):
        return False
    try:
        kept = [
            (f.__defaults__, f.__kwdefaults__, [cell.cell_contents for cell in f.__closure__ or ()]) for f in (a, b)
        ]
        return bool(kept[0] == kept[1])
    except ValueError:  # a cell not filled yet, or arrays, which have no one truth value
        return False


class _ByValue(NamedTuple):
    """A fact that no import finds, as a lambda: pickle alone, which ``policy.save()`` relies on, refuses those."""

    pickled: bytes


def _packed(fact: Fact) -> Fact | _ByValue:
    try:
        pickle.dumps(fact)
    except Exception:  # pickle raises what it likes
        return _ByValue(cloudpickle.dumps(fact))
    return fact


def _unpacked(operator: str, fact: Fact | _ByValue, horizon: int | str | None, discount: float) -> Truth:
    return Truth(operator, pickle.loads(fact.pickled) if isinstance(fact, _ByValue) else fact, horizon, discount)


def fact_slots(fact: Fact) -> list[str]:
    """Names of the slots that a fact can take: in the braces of an info key, or a callable's arguments after the step."""
    if isinstance(fact, str):
        return fields(fact, "a fact")
    if isinstance(fact, Table):
        return list(fact.axes)
    try:
        arguments = list(inspect.signature(fact).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return []
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [argument.name for argument in arguments[1:] if argument.kind in by_keyword]


def check_horizon(value: Any, where: str) -> int:
    """Return ``value`` as a whole number of steps, or raise :class:`QAError`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < 1:
        kind = "" if isinstance(value, Integral) else ", or the name of a slot"
        raise QAError(
            f"{where} got a horizon of {value!r}; expected a whole number of steps, at least 1{kind}; give 1 or more"
        )
    return int(value)
