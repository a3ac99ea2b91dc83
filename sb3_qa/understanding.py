"""From a text to what it asks: exactly, by a template with other words in its slots, or by its meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.errors import QAError
from sb3_qa.head import QAHead
from sb3_qa.language import EmbeddingEncoder, LanguageHead, TextEncoder, tokenize, words_of
from sb3_qa.questions import Catalogue, Instance, Question, nearest

__all__ = ["NotTaught", "Understanding", "Understood"]

FAMILIAR = 0.5  # what is less familiar is refused
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBER_WORDS = {word: str(n) for n, word in enumerate(_NUMBERS.split(" "))}
MEANT = 0.05  # by how much more similar a text must be with a value that it does not name than with any other
MENTIONED = 0.15  # what a slot's value counts for if a text names it, and against if not, in cosine similarity


class NotTaught(QAError):
    """A question about something that was never taught. ``nearest`` holds the taught instances most like it."""

    def __init__(self, message: str, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nearest = list(nearest)


class Understood(NamedTuple):
    """What a text was taken to ask."""

    instance: Instance
    action: str | None
    """The action that the text names."""
    familiarity: float
    """1 for what was taught, down to 0 for what has nothing to do with it."""


class Understanding:
    """Finds the instance that a text asks for.

    :param catalogue: the questions
    :param head: whose encoder generalises
    :param action_names: that texts may name
    """

    def __init__(self, catalogue: Catalogue, head: QAHead, action_names: Sequence[str] = ()) -> None:
        self.catalogue, self.head, self.action_names = catalogue, head, action_names
        self._every = {**catalogue.instances, **catalogue.held_out}
        self._texts: dict[str, list[Instance]] = {}
        for instance in self._every.values():
            self._texts.setdefault(instance.text.strip().lower(), []).append(instance)
        self._exact = [(q, _pattern(q, listed=True)) for q in catalogue.questions if q.per_action]
        self._open = [(q, _open_pattern(q)) for q in catalogue.questions]
        self._encoded: tuple[Any, NDArray[np.float32], float] | None = None
        self._embedded: tuple[list[Instance], NDArray[np.float32]] | None = None

    def understand(self, text: str) -> Understood:
        """The instance, the action named, and how familiar it is.

        :raises QAError: when the text fits several questions
        :raises NotTaught: when it fits none
        """
        if text in self._every:
            return self._told(self._every[text], None)
        text = text.strip()
        found = self._by_text(text)
        if len(found) > 1:
            keys = [instance.key for instance, _ in found]
            raise QAError(
                f"{text!r} is the text of {keys}; expected one of them; ask by its key, or put the slot into the text"
            )
        if found:
            return self._told(*found[0])
        if not isinstance(self.head, LanguageHead):
            raise NotTaught(self._message(text, [], "ask by an instance's key or its text"))
        parsed = self._by_key(text) or self._by_template(text)
        if parsed is not None:
            return parsed
        if isinstance(self.head.words, EmbeddingEncoder):
            return self._by_meaning(text)
        raise self._unknown(text)

    def _by_text(self, text: str) -> list[tuple[Instance, str | None]]:
        plain = text.strip().lower()
        found: list[tuple[Instance, str | None]] = [(i, None) for i in self._texts.get(plain, ())]
        if found:
            return found
        for question, pattern in self._exact:
            match = pattern.fullmatch(text.strip())
            if match is not None:
                groups = {key: value.lower() for key, value in match.groupdict().items()}
                action = match.group(Question.ACTION)
                found += [(i, action) for i in self._instances_of(question) if _fits(i, groups)]
        # Of what one template takes for the name of an action another may have words and slots.
        names = {"{action}", *(name.lower() for name in self.action_names)}
        return [each for each in found if each[1] is not None and each[1].lower() in names] or found

    def _instances_of(self, question: Question) -> list[Instance]:
        return [instance for instance in self._every.values() if instance.question is question]

    def _told(self, instance: Instance, action: str | None) -> Understood:
        if instance.taught or self.catalogue.target_of[instance.key].start >= 0:
            return Understood(instance, action, 1.0)
        return Understood(instance, action, self._familiarity(instance))

    # --- words of a template ------------------------------------------------------------------------------------------

    def _by_key(self, text: str) -> Understood | None:
        """``name[slot=value]`` with values that were not listed."""
        for question in self.catalogue.questions:
            said = re.fullmatch(
                re.escape(question.name) + "".join(rf"\[{s}=(?P<{s}>.+?)\]" for s in question.slots), text
            )
            values = (
                None if said is None else self._values(question, {k: v.lower() for k, v in said.groupdict().items()})
            )
            if values is not None:
                return self._new(text, question._instance(tuple(values.values())), None)
        return None

    def _new(self, text: str, instance: Instance, action: str | None) -> Understood:
        if instance.key in self._every:
            return self._told(self._every[instance.key], action)
        familiarity = self._familiarity(instance)
        if familiarity < FAMILIAR:
            raise self._unknown(text, familiarity)
        return Understood(instance, action, familiarity)

    def _by_template(self, text: str) -> Understood | None:
        words = _in_digits(text)
        fits: list[tuple[int, Instance, str | None]] = []
        for question, (pattern, literal) in self._open:
            match = pattern.fullmatch(words)
            if match is None:
                continue
            values = self._values(question, match.groupdict())
            if values is not None:
                action = match.groupdict().get(Question.ACTION)
                fits.append((literal, question._instance(tuple(values[slot] for slot in question.slots)), action))
        if not fits:
            return None
        most = max(literal for literal, *_ in fits)
        best = {instance.key: (instance, action) for literal, instance, action in fits if literal == most}
        if len(best) > 1:
            raise QAError(f"{text!r} may ask {list(best)}; expected one of them; ask by its key, or in its own words")
        return self._new(text, *next(iter(best.values())))

    def _values(self, question: Question, groups: Mapping[str, str]) -> dict[str, Any] | None:
        """Values of slots in the words they were given in, or None where one has no place there."""
        values: dict[str, Any] = {}
        for slot, listed in question.slots.items():
            said = groups.get(slot)
            if said is None:
                if len(listed) > 1:
                    return None
                values[slot] = listed[0]
                continue
            by_words = {_in_digits(str(value)): value for value in listed}
            said = _in_digits(said)
            if said in by_words:
                values[slot] = by_words[said]
            elif all(_is_real(value) for value in listed):
                if not re.fullmatch(r"\d+(\.\d+)?", said):
                    return None
                number = float(said)
                if slot == question.truth.horizon and (number < 1 or number != int(number)):
                    return None
                values[slot] = int(number) if number == int(number) else number
            elif re.fullmatch(r"\d+(\.\d+)?", said):
                return None  # no word
            elif isinstance(getattr(self.head, "words", None), EmbeddingEncoder):
                return None  # by its meaning, then
            else:
                values[slot] = said
        return values

    # --- how far from what was taught ---------------------------------------------------------------------------------

    def _familiarity(self, instance: Instance) -> float:
        """How near the encoding of an instance is to the nearest that was taught, for how near those are to each other.

        1 where it is as near as taught ones are to their own nearest (the median of them), 1/2 where it is twice as far. A
        number beyond those taught in its slot counts for no more than how far beyond it is; a word that was never
        taught for nothing.
        """
        target = self.catalogue.target_for(instance)
        if target.start >= 0:
            return 1.0
        head = self.head
        if not isinstance(head, LanguageHead):
            return 0.0
        texts = words_of(target)
        if isinstance(head.words, TextEncoder) and any(head.words.unknown(text) for text in texts):
            return 0.0
        taught, usual = self._taught_encodings(head)
        asked = head.encodings(texts)
        distance = float(np.linalg.norm(taught[None] - asked[:, None], axis=2).min(axis=1).max())
        near = 1.0 if distance <= usual else usual / distance
        return min(near, *(self._within(instance, slot) for slot in instance.slots), 1.0)

    def _within(self, instance: Instance, slot: str) -> float:
        value = instance.slots[slot]
        listed = [i.slots[slot] for i in self.catalogue.instances.values() if i.question is instance.question]
        if not _is_real(value) or not all(map(_is_real, listed)):
            return 1.0
        low, high = min(listed), max(listed)
        if low <= value <= high:
            return 1.0
        return float(high / value) if value > high > 0 else float((value + 1) / (low + 1)) if value >= 0 else 0.0

    def _taught_encodings(self, head: LanguageHead) -> tuple[NDArray[np.float32], float]:
        """Encodings of what is taught, and the median distance of each to the nearest other."""
        key = head.flat._version
        if self._encoded is None or self._encoded[0] != key:
            texts = list(dict.fromkeys(text for target in self.catalogue.targets for text in words_of(target)))
            if len(texts) > MOST_COMPARED:
                texts = texts[:: -(-len(texts) // MOST_COMPARED)]
            encodings = head.encodings(texts)
            apart = np.linalg.norm(encodings[:, None] - encodings[None], axis=2)
            np.fill_diagonal(apart, np.inf)
            usual = float(np.median(apart.min(axis=1))) if len(texts) > 1 else 0.0
            self._encoded = key, encodings, usual
        return self._encoded[1:]

    # --- meaning --------------------------------------------------------------------------------------------------------

    def _by_meaning(self, text: str) -> Understood:
        """The taught instance whose text means most the same: cosine similarity of their embeddings.

        A pretrained model hardly tells a number or a colour from another, so values of slots that the text names count
        beside it, and those that it does not name count against: among templates that differ by a slot the one without it is
        meant then. Among equals in that, similarity decides. The similarity is the familiarity. A text that leaves a
        slot open is refused: any value would do as well.
        """
        assert isinstance(self.head, LanguageHead) and isinstance(self.head.words, EmbeddingEncoder)
        words = self.head.words
        text, action = self._named_action(text)
        if self._embedded is None:
            instances = list(self._every.values())
            self._embedded = instances, _unit(words._embedded([instance.text for instance in instances]).numpy())
        instances, table = self._embedded
        similarity = table @ _unit(words._embedded([text]).numpy())[0]
        said = [*tokenize(text), *_in_digits(text).split(" ")]
        said += [word.removesuffix("s") for word in said]  # a plural names it too
        named: dict[tuple[str, str, Any], float] = {}
        for instance in instances:
            for slot, value in instance.slots.items():
                key = instance.question.name, slot, value
                if key not in named:
                    named[key] = _named(instance, slot, said)
        counts = [
            sum(2 * named[i.question.name, slot, value] - 1 for slot, value in i.slots.items()) for i in instances
        ]
        score = similarity + MENTIONED * np.array(counts)
        order = np.argsort(-score)
        best = instances[order[0]]
        familiarity = float(np.clip(similarity[order[0]], 0.0, 1.0))
        if familiarity < FAMILIAR:
            raise self._unknown(text, familiarity, [instances[n].text for n in order[:4]])
        for slot, value in best.slots.items():  # a value that is neither named nor meant was only picked
            others = [
                similarity[n] for n, i in enumerate(instances) if i.question is best.question and i.slots[slot] != value
            ]
            if others and not named[best.question.name, slot, value] and similarity[order[0]] - max(others) < MEANT:
                close = [instances[n].text for n in order[:4]]
                why = f"it leaves open which of {list(best.question.slots[slot])} is meant; name one"
                raise NotTaught(self._message(text, close, why), close)
        action = action if best.per_action else None
        if not best.taught:
            familiarity = min(familiarity, self._familiarity(best))
        return Understood(best, action, familiarity)

    def _named_action(self, text: str) -> tuple[str, str | None]:
        for name in sorted(self.action_names, key=len, reverse=True):
            pattern = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
            if not name.isdigit() and pattern.search(text):
                return pattern.sub("{action}", text), name
        return text, None

    def _unknown(self, text: str, familiarity: float = 0.0, close: Sequence[str] = ()) -> NotTaught:
        why = "none of what was taught is near enough to answer for it"
        words = getattr(self.head, "words", None)
        new = list(dict.fromkeys(words.unknown(text))) if isinstance(words, TextEncoder) else []
        if new:
            why = f"the words {new} were never taught"
        return NotTaught(self._message(text, close, f"{why} (familiarity {familiarity:.2f}); ask one of them"), close)

    def _message(self, text: str, close: Sequence[str], mend: str) -> str:
        known = [*self.catalogue.instances, *(instance.text for instance in self.catalogue.instances.values())]
        names = ", ".join(map(repr, close)) if close else nearest(text, known)
        return f"the answerer was not taught {text!r}; expected one of {names}; {mend}"


MOST_COMPARED = 2000  # taught texts that a new one is compared with


def _pattern(question: Question, *, listed: bool) -> re.Pattern[str]:
    """The text with a group for each slot, of the values listed, and for the action."""
    pattern, seen = re.escape(question.text), set()
    for slot in [*question.slots, Question.ACTION]:
        field = re.escape("{" + slot + "}")
        if field not in pattern:
            continue
        values = "|".join(re.escape(str(v)) for v in sorted(question.slots.get(slot, ()), key=lambda v: -len(str(v))))
        pattern = pattern.replace(field, f"(?P<{slot}>{values or '.+?'})", 1).replace(field, f"(?P={slot})")
        seen.add(slot)
    return re.compile(pattern.replace(r"\{\{", r"\{").replace(r"\}\}", r"\}"), re.IGNORECASE)


def _open_pattern(question: Question) -> tuple[re.Pattern[str], int]:
    """The words of the text with any words in its slots, and how many words are the text's own."""
    parts, seen, literal = [], set(), 0
    for word in tokenize(question.text):
        name = word[1:-1]
        if word.startswith("{"):
            slot = next(s for s in [*question.slots, Question.ACTION] if s.lower() == name)
            parts.append(f"(?P={slot})" if slot in seen else f"(?P<{slot}>.+?)")
            seen.add(slot)
        else:
            parts.append(re.escape(_in_digits(word)))
            literal += 1
    return re.compile(" ".join(parts)), literal


def _in_digits(text: str) -> str:
    """The words of a text, numbers in digits."""
    return " ".join(NUMBER_WORDS.get(word, word) for word in tokenize(text))


def _fits(instance: Instance, groups: Mapping[str, str]) -> bool:
    return all(str(instance.slots[slot]).lower() == said for slot, said in groups.items() if slot != Question.ACTION)


def _named(instance: Instance, slot: str, said: Sequence[str]) -> float:
    """How far a text names the value of a slot, 0 to 1: by the words that no other of its values has, or by all in a row."""
    value, others = instance.slots[slot], instance.question.slots[slot]
    words = tokenize(str(value))
    shared = {word for other in others if other != value for word in tokenize(str(other))}
    own = [word for word in words if word not in shared]
    if own:
        return sum(word in said for word in own) / len(own)
    if f" {' '.join(words)} " in f" {' '.join(said)} ":
        return 1.0
    return 0.5 * sum(word in said for word in words) / max(len(words), 1)


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
