"""Questions as data: from a TOML, YAML or JSON file, or from plain dictionaries, and back.

.. code-block:: toml

    [[questions]]
    name = "crash"
    text = "Will I crash within {k} steps if I choose {action}?"
    truth = { eventually = "crashed", within = "k" }
    k = [1, 5, 10]

    [[questions]]
    name = "speed"
    text = "How fast am I going?"
    truth = { now = { obs = 3 } }
    answer = { number = [0, 40] }

An entry has the arguments of :class:`~sb3_qa.Question`: ``text``, ``name``, each slot's values, ``truth`` as one operator of
:mod:`sb3_qa.truth` with its fact and its options, and ``answer`` as ``"yes/no"`` (which may be left out),
``{ choice = ["left", "right"] }`` or ``{ number = [low, high] }``. A fact is one of

- ``"crashed"``: a key of ``info``, which may hold slots
- ``"package.module:function"``: a function of a :class:`~sb3_qa.Step`, which is imported
- ``{ obs = 3 }``, ``{ obs = [0, 1] }``, ``{ obs = "key", index = 3 }``: an entry of the observation arrived in
- ``{ info = "speed" }``, ``{ step = "terminated" }``: a key of ``info``, a field of the step (``reward``, ``terminated``, ``truncated``)

where the last two kinds can be compared: ``above``, ``below``, ``equals``, all of which must hold then.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

from sb3_qa import truth as operators
from sb3_qa.errors import QAError
from sb3_qa.extras import need
from sb3_qa.facts import COMPARISONS, FactOf
from sb3_qa.named import function_named, is_function_name, name_of
from sb3_qa.questions import AnswerKind, Catalogue, Choice, Number, Question, YesNo
from sb3_qa.truth import Fact, Truth

__all__ = ["QuestionSource", "dump_questions", "fact_of_data", "is_question_file", "load_questions"]

QuestionSource = str | PathLike[str] | Mapping[str, Any] | Sequence[Question | Mapping[str, Any]]
"""A question file, what stands in one, or a list of questions and of entries."""

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
OPERATORS = {name: getattr(operators, name) for name in operators.__all__ if name.islower()}
STEP_FIELDS = ("reward", "terminated", "truncated")
Plain = (str, bool, int, float)


def is_question_file(source: Any) -> TypeGuard[str | PathLike[str]]:
    """Whether this is the path of a question file, by its suffix."""
    return isinstance(source, (str, PathLike)) and Path(source).suffix.lower() in SUFFIXES


def load_questions(source: QuestionSource) -> list[Question]:
    """Questions from a file, or from what would stand in one; a list may hold questions that are made already.

    :raises QAError: naming the file, the entry, what was got and expected, and the mend
    """
    if isinstance(source, (str, PathLike)):
        where, entries = os.fspath(source), _read(Path(source))
    elif isinstance(source, (Mapping, list, tuple)) and not all(isinstance(entry, Question) for entry in source):
        where, entries = "questions", source
    else:  # there is nothing to be made of it
        return source  # type: ignore[return-value]
    if isinstance(entries, Mapping):
        _only(entries, ("questions",), where, 'write [[questions]] above each, or "questions:" above a list')
        entries = entries.get("questions")
    if not isinstance(entries, (list, tuple)) or not entries:
        raise QAError(f"{where} holds {entries!r}; expected a list of questions; write [[questions]] above each")
    questions = [_question(entry, f"{where}, question {n}") for n, entry in enumerate(entries, 1)]
    try:
        Catalogue(questions)
    except QAError as error:
        raise QAError(f"{where}: {error}") from None
    return questions


def dump_questions(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Questions as plain data, for JSON, YAML or TOML; :func:`load_questions` makes them of it again.

    :raises QAError: for a fact that is a lambda, and for options and slots that are not words or numbers
    """
    return [_entry(question) for question in questions]


def _read(path: Path) -> Any:
    name = os.fspath(path)
    if path.suffix.lower() not in SUFFIXES:
        raise QAError(
            f"questions got {name!r}; expected a list of Question, or a file ending in {', '.join(SUFFIXES)}; rename it"
        )
    if not path.is_file():
        raise QAError(f"there is no file {name} in {Path.cwd()}; expected a question file; check the path")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".toml":
            return _toml().loads(text)
        return json.loads(text) if path.suffix.lower() == ".json" else _yaml(text, name)
    except QAError:
        raise
    except (ValueError, OSError) as error:  # TOMLDecodeError, JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise QAError(f"{name} cannot be read ({error}); expected {path.suffix[1:].upper()}; mend that line") from None


def _toml() -> Any:
    for module in ("tomllib", "tomli"):  # the first since Python 3.11
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    raise QAError("a TOML file needs Python 3.11, or tomli; expected one; pip install 'sb3-qa[files]'")


def _yaml(text: str, name: str) -> Any:
    yaml = need("yaml", "files", f"{name}, unless it is TOML or JSON,")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QAError(f"{name} cannot be read ({error}); expected YAML; mend that line") from None


def _question(entry: Any, where: str) -> Question:
    if isinstance(entry, Question):
        return entry
    if not isinstance(entry, Mapping):
        raise QAError(f"{where} is {entry!r}; expected a table with text and truth; write text = ..., truth = ...")
    entry = dict(entry)
    label = entry.get("name", entry.get("text"))
    where = f"{where} ({label!r})" if label is not None else where
    for key in ("text", "truth"):
        if key not in entry:
            raise QAError(f"{where} has {sorted(map(str, entry))}; expected a {key} too; write {key} = ...")
    truth, answer = _truth(entry.pop("truth"), where), _answer(entry.pop("answer", None), where)
    text, name = entry.pop("text"), entry.pop("name", None)
    clash = [key for key in entry if key == "self" or not isinstance(key, str)]
    if clash:
        raise QAError(f"{where} got the key {clash[0]!r}; expected the name of a slot; rename it")
    try:
        return Question(text, truth, answer, name, **entry)
    except QAError as error:
        raise QAError(f"{where}: {error}") from None


def _truth(data: Any, where: str) -> Truth:
    named = [key for key in data if key in OPERATORS] if isinstance(data, Mapping) else []
    if len(named) != 1:
        raise QAError(
            f"{where} got truth = {data!r}; expected one operator, of {', '.join(OPERATORS)}, with its fact; write e.g. "
            'truth = { eventually = "crashed", within = 5 }'
        )
    operator = OPERATORS[named[0]]
    options = {
        key: parameter.default is inspect.Parameter.empty
        for key, parameter in inspect.signature(operator).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    _only(data, (named[0], *options), f"{where}, truth", "leave it out")
    missing = [key for key, needed in options.items() if needed and key not in data]
    if missing:
        raise QAError(
            f"{where} got {named[0]} without {missing[0]}; expected a number of steps, or a slot's name; add it"
        )
    try:
        return operator(fact_of_data(data[named[0]], where), **{key: data[key] for key in options if key in data})
    except QAError as error:
        raise QAError(f"{where}: {error}") from None


def fact_of_data(data: Any, where: str) -> Fact:
    """The fact that is written so.

    :param where: which question it is of, for the error
    :raises QAError: when it is none
    """
    if isinstance(data, str):
        return function_named(data, f"{where}, fact") if is_function_name(data) else data
    sources = [key for key in data if key in ("obs", "info", "step")] if isinstance(data, Mapping) else []
    if len(sources) != 1:
        raise QAError(
            f'{where} got the fact {data!r}; expected the name of an info key, "package.module:function", or a table with one of obs, '
            "info and step; write e.g. { obs = 3, above = 0.5 }"
        )
    source, given = sources[0], data[sources[0]]
    _only(data, (source, *(("index",) if source == "obs" else ()), *COMPARISONS), f"{where}, fact", "leave it out")
    for name in ("above", "below"):
        if name in data and (isinstance(data[name], bool) or not isinstance(data[name], Real)):
            raise QAError(f"{where} got {name} = {data[name]!r}; expected a number; give e.g. {name} = 0.5")
    if "equals" in data and not isinstance(data["equals"], Plain):
        raise QAError(f"{where} got equals = {data['equals']!r}; expected a word, a number or a bool; give one")
    comparisons = {name: data[name] for name in COMPARISONS if name in data}
    if source == "step":
        if given not in STEP_FIELDS:
            raise QAError(f"{where} got step = {given!r}; expected one of {', '.join(STEP_FIELDS)}; give one of them")
        return FactOf(step=given, **comparisons)
    if source == "info":
        if not isinstance(given, str) or not given or (comparisons and operators.fields(given, where)):
            raise QAError(
                f"{where} got info = {given!r}; expected a key of info, without slots where compared; name one"
            )
        return FactOf(info=given, **comparisons) if comparisons else given
    key = given if isinstance(given, str) else None
    if key is None and "index" in data:
        raise QAError(f"{where} got obs = {given!r} and index; expected the key of a dictionary in obs; drop index")
    index = data.get("index", ()) if key is not None else given
    index = index if isinstance(index, (list, tuple)) else (index,)
    if any(isinstance(i, bool) or not isinstance(i, Integral) for i in index):
        raise QAError(f"{where} got the index {index!r} into obs; expected whole numbers; give e.g. obs = 3, or [0, 1]")
    return FactOf(obs=tuple(int(i) for i in index), key=key, **comparisons)


def _answer(data: Any, where: str) -> AnswerKind:
    if data is None or data == "yes/no":
        return YesNo()
    try:
        if isinstance(data, Mapping) and list(data) == ["choice"] and isinstance(data["choice"], (list, tuple)):
            return Choice(*data["choice"])
        if isinstance(data, Mapping) and list(data) == ["number"] and isinstance(data["number"], (list, tuple)):
            low, high = data["number"] if len(data["number"]) == 2 else (None, None)
            return Number(low, high)  # type: ignore[arg-type]
    except QAError as error:
        raise QAError(f"{where}: {error}") from None
    raise QAError(
        f'{where} got answer = {data!r}; expected "yes/no", {{ choice = ["left", "right"] }} or {{ number = [low, high] }}; write one'
    )


def _only(data: Mapping[str, Any], known: Sequence[str], where: str, mend: str) -> None:
    unknown = [key for key in data if key not in known]
    if unknown:
        raise QAError(f"{where} got the key {unknown[0]!r}; expected {', '.join(known)}; {mend}")


def _entry(question: Question) -> dict[str, Any]:
    truth, answer, where = question.truth, question.answer, f"question {question.name!r}"
    written: dict[str, Any] = {truth.operator: _fact_as_data(truth.fact, where)}
    for name in inspect.signature(OPERATORS[truth.operator]).parameters:
        if name == "discount":
            written |= {} if truth.discount == 1.0 else {"discount": truth.discount}
        elif name != "fact":
            written[name] = truth.horizon
    entry: dict[str, Any] = {"name": question.name, "text": question.text, "truth": written}
    if isinstance(answer, Choice):
        entry["answer"] = {"choice": list(answer.options)}
    elif isinstance(answer, Number):
        entry["answer"] = {"number": [answer.low, answer.high]}
    if question.holdout:
        entry["holdout"] = sorted(question.holdout)
    entry |= {slot: list(values) for slot, values in question.slots.items()}
    for values in [
        *(entry[slot] for slot in question.slots),
        *([answer.options] if isinstance(answer, Choice) else []),
    ]:
        for value in values:
            if not isinstance(value, Plain):
                raise QAError(f"{where} holds {value!r}; expected words and numbers, to be written down; replace it")
    return entry


def _fact_as_data(fact: Fact, where: str) -> Any:
    if isinstance(fact, FactOf):
        return fact.as_data()
    if isinstance(fact, str):
        return {"info": fact} if is_function_name(fact) else fact
    return name_of(fact, f"{where}, fact")
