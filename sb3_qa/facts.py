"""Facts that are written as data; and recording facts while an agent acts, read once a step for all environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Choice, Number, Question, Target, YesNo, nearest
from sb3_qa.truth import Fact, Step, Table, fact_slots

__all__ = ["COMPARISONS", "FactOf", "FactReader", "check_facts", "fact_of_slots", "needs_steps"]

COMPARISONS = ("above", "below", "equals")

# Values that are taken as they are, by the kind of answer.
_COMMON: dict[type, frozenset[type]] = {
    YesNo: frozenset([bool, np.bool_]),
    Number: frozenset([float, int, np.float32, np.float64]),
}


@dataclass(frozen=True)
class FactOf:
    """A fact that is written as data: an entry of the observation, of ``info`` or of the step, perhaps compared.

    >>> FactOf(obs=(1,), above=0.5)(Step(np.array([0.0, 0.7]), 0, 0.0, False, False, {}))
    True

    :param obs: index into the observation
    :param key: of a dictionary of observations
    :param info: key of ``info``; the fact is absent where the key is
    :param step: "reward", "terminated" or "truncated"
    """

    obs: tuple[int, ...] | None = None
    key: str | None = None
    info: str | None = None
    step: str | None = None
    above: float | None = None
    below: float | None = None
    equals: Any = None

    def __call__(self, step: Step) -> Any:
        value = self._value(step)
        if value is None or not self.compared:
            return value
        return bool(
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.equals is None or value == self.equals)
        )

    @property
    def compared(self) -> bool:
        """Whether the fact is a comparison, and so true or false."""
        return any(getattr(self, name) is not None for name in COMPARISONS)

    def _value(self, step: Step) -> Any:
        if self.step is not None:
            return getattr(step, self.step)
        if self.info is not None:
            return step.info.get(self.info)
        entry = np.asarray(step.obs if self.key is None else step.obs[self.key])[self.obs or ()]
        return entry.item()

    def as_data(self) -> dict[str, Any]:
        """How it is written in a file."""
        data: dict[str, Any] = {}
        if self.obs is not None:
            index = self.obs[0] if len(self.obs) == 1 else list(self.obs)
            data = {"obs": index} if self.key is None else {"obs": self.key, "index": index}
        data |= {name: value for name in ("info", "step") if (value := getattr(self, name)) is not None}
        return data | {name: value for name in COMPARISONS if (value := getattr(self, name)) is not None}


def check_facts(questions: Iterable[Question], space: spaces.Space[Any]) -> None:
    """Refuse facts about entries that the observations of this space do not have.

    :raises QAError: naming question, entry and space
    """
    for question in questions:
        fact = question.truth.fact
        if not isinstance(fact, FactOf) or fact.obs is None:
            continue
        where = f"question {question.name!r} got the fact {fact.as_data()}"
        part: spaces.Space[Any] | None = space
        if isinstance(space, spaces.Dict):
            if fact.key not in space.spaces:
                raise QAError(
                    f"{where}; expected a key of the observations, one of {nearest(str(fact.key), space.spaces)}; write obs = "
                    f'"{next(iter(space.spaces))}", index = ...'
                )
            part = space.spaces[str(fact.key)]
        elif fact.key is not None:
            raise QAError(f"{where}, and observations are no dictionary but {space}; expected an index; write obs = 0")
        shape = (part.shape if part is not None else None) or ()
        inside = len(fact.obs) == len(shape) and all(-n <= i < n for i, n in zip(fact.obs, shape, strict=True))
        if not inside and not (fact.obs == () and np.prod(shape) == 1):
            raise QAError(
                f"{where}; expected an index of one number in observations of the shape {shape}; give {len(shape)} whole number(s) "
                "that lie in it"
            )


def fact_of_slots(fact: Fact, slots: Mapping[str, Any]) -> str | Callable[[Step], Any]:
    """The fact of these slot values: the key of an info, or a callable of a :class:`Step` alone."""
    given = {name: slots[name] for name in fact_slots(fact) if name in slots}
    if isinstance(fact, str):
        return fact.format(**given)
    return (lambda step: fact(step, **given)) if given else fact


class Signal:
    """One fact of one question, as a float: 0/1, the index of an option, or a number; nan where it is not there."""

    def __init__(self, target: Target) -> None:
        self.question = target.question
        self.fact = target.question.truth.fact
        self.answer = YesNo() if target.question.truth.is_event else target.question.answer
        self._common = next((types for kind, types in _COMMON.items() if isinstance(self.answer, kind)), frozenset())
        self.seen = False
        self.key: str | None = None
        self.call: Callable[[Step], Any] | None = None
        self.table = self.fact if isinstance(self.fact, Table) else None
        self.place = 0 if self.table is None else self.table.index(target.slots)
        slots = {name: target.slots[name] for name in fact_slots(self.fact) if name in target.slots}
        if self.table is None:
            bound = fact_of_slots(self.fact, slots)
            if isinstance(bound, str):
                self.key = bound
            else:
                self.call = bound
        self.identity = (
            (self.key or (id(self.fact), *map(repr, slots.items())), self.answer)
            if self.table is None
            else (id(self.table), self.place, self.answer)
        )
        options = self.answer.options if isinstance(self.answer, Choice) else ()
        self._index = {option: n for n, option in enumerate(options)}
        if not any(isinstance(option, Real) for option in options):  # else 0 could be an option or an index
            self._index |= {n: n for n in range(len(options))}

    def read(self, step: Step) -> float:
        """The value of a callable fact."""
        assert self.call is not None
        try:
            value = self.call(step)
        except KeyError:  # as an absent info key
            return float("nan")
        except Exception as error:
            if step.action is None:  # a reset has no action and perhaps no info: the fact is not known there
                return float("nan")
            raise QAError(
                f"the fact of question {self.question.name!r} raised {type(error).__name__}: {error}; expected a value "
                f"for every step; mend the callable (info had {sorted(step.info)})"
            ) from error
        return self.convert([value])[0]

    def check(self, values: NDArray[np.float32]) -> None:
        """Refuse values of a table, (n,), that are none of the answer's."""
        known = values[~np.isnan(values)]
        if isinstance(self.answer, YesNo):
            wrong = known[(known != 0.0) & (known != 1.0)]
        elif isinstance(self.answer, Choice):
            wrong = np.array([value for value in known.tolist() if value not in self._index])
        else:
            wrong = known[~np.isfinite(known)]
        if len(wrong):
            self._convert(wrong[0].item())

    def convert(self, values: list[Any]) -> list[float]:
        """Values of a fact as floats; None, where it is absent, as nan."""
        if self._common.issuperset(map(type, values)) and all(map(math.isfinite, values)):  # nothing to be done
            self.seen = True
            return values
        return [float("nan") if value is None else self._convert(value) for value in values]

    def _convert(self, value: Any) -> float:
        self.seen = True
        if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if isinstance(self.answer, Choice):
            try:
                return float(self._index[value])
            except (KeyError, TypeError):  # TypeError: not hashable
                options = self.answer.options
                index = " or its index" if len(self._index) > len(options) else ""
                self._refuse(value, f"one of the options {options}{index}", "add the option or mend the fact")
        try:
            if isinstance(value, (str, bytes, np.ndarray)):  # which float() takes, or used to
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            self._refuse(value, "a single number or bool", "return a scalar")
        if isinstance(self.answer, YesNo) and number not in (0.0, 1.0):
            self._refuse(value, "True or False", "compare it with something, or ask for a Number(low, high)")
        if isinstance(self.answer, Number) and not math.isfinite(number):
            self._refuse(value, "a finite number", "return None where it has no value")
        return number

    def _refuse(self, value: Any, expected: str, mend: str) -> NoReturn:
        raise QAError(f"the fact of question {self.question.name!r} gave {value!r}; expected {expected}; {mend}")


def needs_steps(fact: Fact) -> bool:
    """Whether a fact is made of a whole :class:`Step`, and not of an info alone."""
    return not isinstance(fact.source if isinstance(fact, Table) else fact, str)


class FactReader:
    """Reads the facts that a catalogue's targets need.

    :param targets: what is learnt, or a catalogue
    """

    def __init__(self, targets: Sequence[Target] | Catalogue) -> None:
        self.signals: list[Signal] = []
        self._tables: list[tuple[Table, NDArray[np.intp], NDArray[np.intp]]] = []
        self.column: list[int] = []
        """For each target, the column of the facts it is about."""
        columns: dict[Any, int] = {}
        for target in targets.targets if isinstance(targets, Catalogue) else targets:
            signal = Signal(target)
            if signal.identity not in columns:
                columns[signal.identity] = len(self.signals)
                self.signals.append(signal)
            self.column.append(columns[signal.identity])
        self.n_facts = len(self.signals)
        tables: dict[int, list[int]] = {}
        for n, signal in enumerate(self.signals):
            if signal.table is not None:
                tables.setdefault(id(signal.table), []).append(n)
        for members in tables.values():
            table = self.signals[members[0]].table
            assert table is not None
            places = np.array([self.signals[n].place for n in members], np.intp)
            self._tables.append((table, np.array(members, np.intp), places))
        self._alone = [(n, signal) for n, signal in enumerate(self.signals) if signal.table is None]
        self.needs_steps = any(needs_steps(signal.fact) for signal in self.signals)

    def read(self, infos: Sequence[Mapping[str, Any]], steps: Sequence[Step] | None = None) -> NDArray[np.float32]:
        """Facts of one step of every environment.

        :param infos: of each environment
        :param steps: of each environment, where :attr:`needs_steps`
        :return: (n_envs, n_facts), nan where a fact is not known
        """
        columns = []
        for _, signal in self._alone:
            if signal.key is None:
                assert steps is not None
                columns.append([signal.read(step) for step in steps])
            else:
                key = signal.key
                columns.append(signal.convert([info.get(key) for info in infos]))
        alone = np.array(columns, np.float32).T
        if not self._tables:
            return alone
        facts = np.full((len(infos), self.n_facts), np.nan, np.float32)
        if self._alone:
            facts[:, [n for n, _ in self._alone]] = alone
        for table, members, places in self._tables:
            for i, info in enumerate(infos):
                step = Step(None, None, 0.0, False, False, info) if steps is None else steps[i]
                values = _read_table(table, step)
                if values is not None:
                    facts[i, members] = values[places]
            self._check_table(members, facts)
        return facts

    def _check_table(self, members: NDArray[np.intp], facts: NDArray[np.float32]) -> None:
        """Tables are checked as a whole, and a column by itself only where something is amiss."""
        block = facts[:, members]
        known = ~np.isnan(block)
        plain = (block == 0.0) | (block == 1.0) | ~known
        for n in members[~plain.all(axis=0)].tolist():
            self.signals[n].check(facts[:, n])
        if not self.signals[members[0]].seen or not self.signals[members[-1]].seen:
            for n in members[known.any(axis=0)].tolist():
                self.signals[n].seen = True

    def check_seen(self, info: Mapping[str, Any]) -> None:
        """Refuse to go on when a fact has not been there once since the start.

        :param info: a recent info, whose keys are named in the error
        :raises QAError: naming the question, the fact and the keys that are there
        """
        for signal in self.signals:
            if not signal.seen:
                keys = [key for key in info if not key.startswith("qa/")]
                got = f"info had {nearest(str(signal.key or ''), keys)}" if keys else "info was empty"
                if signal.key in keys:
                    got = "it was None whenever it was there"
                what = (
                    f"{signal.table}"
                    if signal.table
                    else f"the fact {signal.key!r}"
                    if signal.key
                    else "the callable fact (it gave None or a KeyError)"
                )
                mend = f"lambda step: step.info.get({signal.key or '...'!r}, False)"
                raise QAError(
                    f"{what} of question {signal.question.name!r} never appeared; {got}; expected it at least once by now; name a key "
                    f"that is there, or give a callable if it is told only now and then, e.g. {mend}"
                )


def _read_table(table: Table, step: Step) -> NDArray[Any] | None:
    try:
        values: NDArray[Any] | None = table.read(step)
        return values
    except KeyError:  # as an absent info key
        return None
    except QAError:
        raise
    except Exception as error:
        if step.action is None and not isinstance(table.source, str):  # a reset, of which less is known
            return None
        raise QAError(
            f"{table} raised {type(error).__name__}: {error}; expected an array for every step; mend the callable"
        ) from error
