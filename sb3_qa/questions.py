"""What can be asked: questions, the kinds of answer they have, and their instances.

>>> from sb3_qa import Question
>>> from sb3_qa.truth import eventually
>>> crash = Question("Will I crash within {k} steps if I choose {action}?", eventually("crashed", within="k"), k=[1, 5], name="crash")
>>> [instance.key for instance in crash.instances]
['crash[k=1]', 'crash[k=5]']
>>> crash.instances[1].text
'Will I crash within 5 steps if I choose {action}?'
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from sb3_qa.errors import QAError
from sb3_qa.truth import Table, Truth, check_horizon, fact_slots, fields

__all__ = ["Catalogue", "Choice", "Instance", "Number", "Question", "Target", "YesNo"]

NAME_LENGTH = 24  # "qa/<name>/accuracy" must fit in the 36 characters that SB3's loggers keep of a key
NUMBER_ATOMS = 32
UNTAUGHT = -1  # the first column of a target that no columns are trained for
# Names that are taken: what wrappers tell in info as "qa/<key>" themselves, and the arguments of Question.
JUDGED = ("risk", "catastrophe", "vetoed", "proposed_action", "executed_action", "no_safe_action")
RESTRAINED = ("substitute_catastrophe", "veto_withheld", "vetoes_left", "let_through", "let_through_probability")
TOLD = (*JUDGED, *RESTRAINED, "raw_reward", "shaping_reward", "alarm")
ARGUMENTS = ("self", "text", "truth", "answer", "name", "holdout")


@dataclass(frozen=True)
class YesNo:
    """A question answered by a probability."""


@dataclass(frozen=True, init=False)
class Choice:
    """A question answered by one of several options: ``Choice("left", "middle", "right")``.

    The fact may give the option itself, or its index where no option is a number.
    """

    options: tuple[Any, ...]

    def __init__(self, *options: Hashable) -> None:
        if len(options) == 1 and isinstance(options[0], (list, tuple)):
            raise QAError(
                f"Choice got one list, {options[0]!r}; expected its options one by one; write Choice(*options)"
            )
        options = _plain(options)
        if None in options:
            raise QAError(
                f"Choice got {options!r}; expected other options than None, as a fact that is None is one that was not told; write 'none'"
            )
        if len(options) < 2 or not _all_differ(options, "Choice"):
            raise QAError(
                f"Choice got {options!r}; expected at least two different options; add an option or ask a YesNo()"
            )
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Number:
    """A question answered by a number in [low, high], in the fact's own units. A fact outside counts as the near end."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for bound in (self.low, self.high):
            if isinstance(bound, bool) or not isinstance(bound, Real) or not math.isfinite(bound):
                raise QAError(f"Number got the bound {bound!r}; expected two finite numbers; give e.g. Number(0, 40)")
        if self.low >= self.high:
            raise QAError(f"Number got low={self.low}, high={self.high}; expected low < high; swap or widen them")


AnswerKind = YesNo | Choice | Number
_YES_NO = YesNo()


@dataclass(frozen=True)
class Instance:
    """One question with one value for every slot."""

    key: str
    """``name[slot=value]``, or the question's name if it has no slots: the key in ``info`` and of ``ask``."""
    text: str
    """The question's words with the slots filled; ``{action}`` stays."""
    question: Question
    slots: Mapping[str, Any]
    horizon: int | None

    @property
    def per_action(self) -> bool:
        """Whether the answer depends on the action chosen."""
        return self.question.per_action

    @property
    def taught(self) -> bool:
        """Whether it takes part in training."""
        return self.key not in self.question.holdout


@dataclass(frozen=True, init=False)
class Question:
    """A question that is learnt together with the agent.

    :param text: what is asked; ``{slot}`` stands for each value listed for that slot, the reserved ``{action}`` makes
        the question one about the action chosen
    :param truth: how its truth becomes known, see :mod:`sb3_qa.truth`
    :param answer: ``YesNo()``, ``Choice(...)`` or ``Number(low, high)``; ``steps_until`` needs none
    :param name: key in logs and ``info``, at most 24 letters, digits, ``_``, ``-``, dots or blanks; made from the text if not given
    :param holdout: instances that are kept out of training, to measure how well they are answered from the words alone: a list
        of keys or of slot values (``[dict(color="red", kind="ball")]``), or a share of all (horizons of an event are not told
        apart, as they share a curve), drawn so that every value of every slot stays taught
    :param slots: the values of each slot
    :raises QAError: when anything does not fit, at once
    """

    text: str
    truth: Truth
    answer: AnswerKind
    name: str
    slots: Mapping[str, tuple[Any, ...]] = field(hash=False)
    holdout: frozenset[str] = frozenset()
    """Keys of the instances that are kept out of training."""
    ACTION: ClassVar[str] = "action"

    def __init__(
        self,
        text: str,
        truth: Truth,
        answer: AnswerKind = _YES_NO,
        name: str | None = None,
        holdout: float | Sequence[str | Mapping[str, Any]] = (),
        **slots: Iterable[Any],
    ) -> None:
        if not isinstance(text, str) or not text.strip():
            raise QAError(f"Question got the text {text!r}; expected words; write what is asked")
        where = f"question {name or text!r}"
        if not isinstance(truth, Truth):
            raise QAError(
                f"{where} got truth={truth!r}; expected an operator of sb3_qa.truth; wrap the fact, e.g. now({truth!r})"
            )
        if isinstance(answer, type) and issubclass(answer, (YesNo, Choice, Number)):
            raise QAError(
                f"{where} got the class {answer.__name__}; expected an answer made of it; call it: {answer.__name__}(...)"
            )
        if not isinstance(answer, (YesNo, Choice, Number)):
            raise QAError(
                f"{where} got answer={answer!r}; expected YesNo(), Choice(...) or Number(low, high); give one of them"
            )
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "truth", truth)
        object.__setattr__(self, "name", _check_name(name if name is not None else _slug(text), where))
        object.__setattr__(self, "slots", _check_slots(text, truth, slots, where))
        object.__setattr__(self, "answer", _check_answer(truth, answer, self._longest_horizon(), where))
        self._check_instances(where)
        object.__setattr__(self, "holdout", held_out(self, holdout, where))

    @property
    def per_action(self) -> bool:
        """Whether the text has the slot ``{action}``."""
        return self.ACTION in fields(self.text)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Every combination of slot values, in the order given."""
        return tuple(self._instance(values) for values in itertools.product(*self.slots.values()))

    def _instance(self, values: tuple[Any, ...]) -> Instance:
        slots = dict(zip(self.slots, values, strict=True))
        key = self.name + "".join(f"[{slot}={value}]" for slot, value in slots.items())
        words = string.Formatter().vformat(self.text, (), {**slots, self.ACTION: "{action}"})
        horizon = self.truth.horizon
        return Instance(key, words, self, slots, slots[horizon] if isinstance(horizon, str) else horizon)

    def _check_instances(self, where: str) -> None:
        fact = self.truth.fact
        try:
            for instance in self.instances:
                if isinstance(fact, str):
                    fact.format(**instance.slots)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise QAError(
                f"{where} got a format that its slots do not fit ({type(error).__name__}: {error}); expected {{slot}}; leave the format out"
            ) from None
        if self.instances[0].key in TOLD:
            raise QAError(
                f"{where} got name={self.name!r}, as which wrappers tell 'qa/{self.name}' themselves; expected another; give name=..."
            )
        if isinstance(fact, Table):
            for slot in fact.axes:
                if slot not in self.slots:
                    raise QAError(
                        f"{where} got a table over {slot!r}, which is no slot of it; expected one; give {slot}=[...]"
                    )
            for instance in self.instances:
                fact.index(instance.slots)
        elif not isinstance(fact, str):
            try:
                inspect.signature(fact).bind(None, **{name: 0 for name in fact_slots(fact) if name in self.slots})
            except TypeError as error:
                raise QAError(
                    f"{where} got a fact that cannot be called ({error}); expected a callable of a Step and slots; mend its arguments"
                ) from None
            except ValueError:  # a builtin, whose arguments are not known
                pass

    def _longest_horizon(self) -> int | None:
        horizon = self.truth.horizon
        return max(self.slots[horizon]) if isinstance(horizon, str) else horizon

    def __repr__(self) -> str:
        return f"Question({self.text!r}, name={self.name!r})"


@dataclass(frozen=True)
class Target:
    """One thing that is learnt: a distribution that one or more instances read their answers from.

    All horizons of an event are read from one survival curve, so that they cannot contradict each other.
    """

    question: Question
    slots: Mapping[str, Any]
    kind: str
    """``event`` (hazards of steps 1..width), ``yesno``, ``choice`` (options) or ``number`` (atoms)."""
    width: int
    """Number of logits."""
    horizon: int | None
    start: int
    """First logit in the head's columns; the targets about actions come last. ``UNTAUGHT`` where it has none."""

    @property
    def stop(self) -> int:
        """One past the last logit."""
        return self.start + self.width


class Catalogue:
    """The compiled form of a list of questions: instances people ask for, targets that are learnt.

    :param questions: at least one; names must differ
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        if isinstance(questions, Question) or not isinstance(questions, (list, tuple)) or not questions:
            raise QAError(f"questions got {questions!r}; expected a list of Question; write questions=[crash, speed]")
        for question in questions:
            if not isinstance(question, Question):
                raise QAError(
                    f"questions holds {question!r}; expected only Question objects; make it with Question(...)"
                )
        names = [question.name for question in questions]
        for name in names:
            if names.count(name) > 1:
                raise QAError(
                    f"questions got the name {name!r} {names.count(name)} times; expected each once; give name=..."
                )
        self.questions = tuple(questions)
        every = [instance for question in questions for instance in question.instances]
        self.instances: dict[str, Instance] = {i.key: i for i in every if i.taught}
        """What is taught, by key."""
        self.held_out: dict[str, Instance] = {i.key: i for i in every if not i.taught}
        """What is kept out of training."""
        self.targets: list[Target] = []
        self.target_of: dict[str, Target] = {}
        self._make_targets()
        self.n_logits = sum(target.width for target in self.targets)
        self.n_state_logits = sum(target.width for target in self.targets if not target.question.per_action)

    def _make_targets(self) -> None:
        members: dict[Any, list[Instance]] = {}
        for instance in self.instances.values():
            members.setdefault(_target_id(instance), []).append(instance)
        # Order of columns: state before action, sigmoids before softmaxes, softmaxes of a width together: each is a slice.
        drafts = []
        for instances in members.values():
            first = instances[0]
            kind, width = _kind_and_width(first, max(i.horizon or 0 for i in instances))
            drafts.append(
                (
                    first.per_action,
                    kind in ("choice", "number"),
                    width * (kind in ("choice", "number")),
                    kind,
                    width,
                    instances,
                )
            )
        start = 0
        for *_, kind, width, instances in sorted(drafts, key=lambda draft: draft[:3]):
            first = instances[0]
            target = Target(
                first.question, first.slots, kind, width, max(i.horizon or 0 for i in instances) or None, start
            )
            self.targets.append(target)
            self.target_of.update({instance.key: target for instance in instances})
            start += width
        taught = {id_: self.target_of[instances[0].key] for id_, instances in members.items()}
        for instance in self.held_out.values():
            self.target_of[instance.key] = self._target_beside(instance, taught.get(_target_id(instance)))

    def _target_beside(self, instance: Instance, taught: Target | None) -> Target:
        """The target of an instance that is not taught: the curve of a taught one that is as long, or one of its own."""
        if taught is not None and (instance.horizon or 0) <= taught.width:
            return taught
        kind, width = _kind_and_width(instance, instance.horizon or 0)
        return Target(instance.question, instance.slots, kind, width, instance.horizon, UNTAUGHT)

    def target_for(self, instance: Instance) -> Target:
        """The target of an instance, also of one with other values in its slots than any that was listed."""
        known = self.target_of.get(instance.key)
        if known is not None:
            return known
        id_ = _target_id(instance)
        taught = next((self.target_of[i.key] for i in self.instances.values() if _target_id(i) == id_), None)
        return self._target_beside(instance, taught)

    def find(self, key: str) -> Instance:
        """Return the instance of that key, taught or held out.

        :raises QAError: naming the nearest keys, if there is none
        """
        if key in self.instances or key in self.held_out:
            return self.instances.get(key) or self.held_out[key]
        raise QAError(
            f"there is no question {key!r}; expected one of {nearest(key, self.instances)}; ask by an instance's key or its text"
        )


def nearest(word: str, known: Iterable[str], most: int = 6) -> str:
    """The names in ``known`` most like ``word``, for an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=most, cutoff=0.3) or known[:most]
    rest = f" (and {len(known) - len(close)} more)" if len(known) > len(close) else ""
    return ", ".join(repr(name) for name in close) + rest


def held_out(question: Question, holdout: Any, where: str) -> frozenset[str]:
    """Keys of the instances that ``holdout`` names, see :class:`Question`."""
    instances = question.instances
    if isinstance(holdout, Real) and not isinstance(holdout, bool):
        if not 0.0 <= float(holdout) < 1.0:
            raise QAError(f"{where} got holdout={holdout!r}; expected a share in [0, 1); give e.g. holdout=0.2")
        return _drawn(instances, float(holdout)) if holdout else frozenset()
    if isinstance(holdout, (str, bytes)) or not isinstance(holdout, Iterable):
        raise QAError(f"{where} got holdout={holdout!r}; expected a share, or a list of keys; give e.g. holdout=0.2")
    keys: set[str] = set()
    for item in holdout:
        if isinstance(item, Mapping):
            found = {i.key for i in instances if all(i.slots.get(s) == v for s, v in item.items()) and item}
        else:
            found = {i.key for i in instances if i.key == item}
        if not found:
            raise QAError(
                f"{where} got holdout with {item!r}; expected keys of its instances, or values of its slots; "
                f"nearest are {nearest(str(item), [i.key for i in instances])}"
            )
        keys |= found
    if len(keys) == len(instances):
        raise QAError(f"{where} got a holdout of all its instances; expected some to be taught; leave one out of it")
    return frozenset(keys)


def _drawn(instances: Sequence[Instance], share: float) -> frozenset[str]:
    members: dict[Any, list[Instance]] = {}
    for instance in instances:
        members.setdefault(_target_id(instance), []).append(instance)
    groups = list(members.values())
    wanted = round(share * len(groups))
    left = Counter(value for group in groups for value in group[0].slots.items())
    keys: list[str] = []
    for n in np.random.default_rng(len(groups)).permutation(len(groups)):
        values = list(groups[n][0].slots.items())
        if wanted and all(left[value] > 1 for value in values):
            left.subtract(values)
            keys += [instance.key for instance in groups[n]]
            wanted -= 1
    return frozenset(keys)


def _plain(values: Iterable[Any]) -> tuple[Any, ...]:
    """Without numpy's scalars, which JSON does not know."""
    return tuple(value.item() if isinstance(value, np.generic) else value for value in values)


def _all_differ(values: tuple[Any, ...], where: str) -> bool:
    try:
        return len(set(values)) == len(values)
    except TypeError:
        raise QAError(
            f"{where} got {list(values)!r}; expected values that are hashable; give words, numbers or tuples"
        ) from None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:NAME_LENGTH].strip("_") or "question"


def _check_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(rf"[\w\-. ]{{1,{NAME_LENGTH}}}", name) or name != name.strip():
        raise QAError(
            f"{where} got name={name!r}; expected 1 to {NAME_LENGTH} letters, digits, '_', '-', '.' or spaces, as it is a key in logs; "
            "shorten or respell it"
        )
    return name


def _check_slots(text: str, truth: Truth, slots: Mapping[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
    horizon = truth.horizon
    wanted = [name for name in dict.fromkeys(fields(text)) if name != Question.ACTION]
    if Question.ACTION in slots or horizon == Question.ACTION:
        raise QAError(
            f"{where} got the slot 'action' as one with values; expected none: it stands for every action; leave it out"
        )
    if truth.is_event and horizon in fact_slots(truth.fact):
        raise QAError(
            f"{where} got a fact with the slot {horizon!r}, which is its horizon; expected one event for all horizons, as they are "
            "read from one curve; give the fact another slot"
        )
    used = [*wanted, *([horizon] if isinstance(horizon, str) else [])]
    for name in [*used, *(fact_slots(truth.fact) if isinstance(truth.fact, str) else [])]:
        if name in ARGUMENTS:
            raise QAError(
                f"{where} got the slot {name!r}; expected a name that is no argument of Question() itself; rename the slot"
            )
        if name not in slots:
            raise QAError(
                f"{where} got values for {sorted(slots) or 'no slots'}; expected some for the slot {name!r}; give {name}=[...]"
            )
    checked: dict[str, tuple[Any, ...]] = {}
    for name, values in slots.items():
        if name not in wanted and name != horizon:
            raise QAError(
                f"{where} got the slot {name!r}, which its text does not use; expected {wanted or 'no slots'}; write {{{name}}} or drop it"
            )
        given = values
        if isinstance(given, (str, Real)):
            values = (given,)
        values = _plain(values) if isinstance(values, Iterable) else ()
        words = {str(value) for value in values}  # of which keys are made
        if not values or not _all_differ(values, f"{where}, slot {name!r},") or len(words) < len(values):
            raise QAError(
                f"{where} got {name}={given!r}; expected at least one value, each once; list them, e.g. {name}=[1, 5]"
            )
        if name == horizon:
            values = tuple(check_horizon(value, f"{where}, slot {name!r},") for value in values)
        checked[name] = values
    return checked


def _check_answer(truth: Truth, answer: AnswerKind, horizon: int | None, where: str) -> AnswerKind:
    operator = truth.operator
    if operator in ("eventually", "always") and not isinstance(answer, YesNo):
        raise QAError(f"{where} got answer={answer!r}; expected YesNo() for {operator}(); leave answer out")
    if operator == "steps_until":
        assert horizon is not None
        if isinstance(answer, YesNo):
            return Number(0, horizon)
        if not isinstance(answer, Number) or answer.low > 1 or answer.high < horizon:
            raise QAError(
                f"{where} got answer={answer!r}; expected Number(0, {horizon}) for steps_until(cap={horizon}); leave answer out"
            )
    if operator in ("total", "peak", "lowest") and not isinstance(answer, Number):
        raise QAError(
            f"{where} got answer={answer!r}; expected Number(low, high) for {operator}(); give the range of the fact"
        )
    return answer


def _target_id(instance: Instance) -> Any:
    truth = instance.question.truth
    if truth.is_event and isinstance(truth.horizon, str):
        return instance.question.name, tuple(value for slot, value in instance.slots.items() if slot != truth.horizon)
    return instance.key


def _kind_and_width(instance: Instance, horizon: int) -> tuple[str, int]:
    answer = instance.question.answer
    if instance.question.truth.is_event:
        return "event", horizon
    if isinstance(answer, Choice):
        return "choice", len(answer.options)
    return ("number", NUMBER_ATOMS) if isinstance(answer, Number) else ("yesno", 1)
