"""Memory of rare events, so that an agent that has become safe does not forget what catastrophes look like.

Once an agent avoids a catastrophe its rollouts hold none, and what a network is no longer shown it unlearns until the agent
walks into it again (the Sisyphean curse of Lipton et al. 2016, arXiv 1611.01211). Kept transitions are learnt from beside the new ones.

Keeping only the catastrophes would teach that such states always end in one. Which states are kept may depend on the
state as it pleases: no weight that is a function of the state alone changes what is true *given* the state. What may not bend
is the share of outcomes among states that look alike. So a transition without the event is kept with a probability
``emphasis``, a function of what was answered about it; one with the event is kept for certain and weighs ``emphasis`` in its
place (inverse probability weighting, Horvitz and Thompson 1952). Both kinds are kept by reservoir sampling (Vitter 1985),
uniform over all that was offered, and weigh as much together as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.bounds import check_whole
from sb3_qa.errors import QAError
from sb3_qa.questions import Catalogue, Target

__all__ = ["RareEventMemory", "Remembered"]

Floats = NDArray[np.float32]
Rows = dict[str, NDArray[Any]]  # columns of one length


class Remembered(NamedTuple):
    """Transitions out of the memory."""

    obs: Any
    """(n, ...), or a dict of such"""
    features: Floats | None
    """(n, n_action_features) of the actions executed"""
    y: Floats
    """(n, n_logits), targets of the cells"""
    weight: Floats
    """(n, n_logits), weights of the cells, with that of the transition in the mean"""


class RareEventMemory:
    """Transitions before rare events, and others that looked as risky, to be learnt from again.

    For on-policy algorithms, whose rollouts are thrown away; a replay buffer is a memory already:

    >>> from sb3_qa.callbacks import QACallback
    >>> callback = QACallback(memory=RareEventMemory(["crash"]))

    The remembered transitions teach the head; the trunk is shaped by the new ones alone. What happened *then* happened under
    the policy of then: answers about actions and the near future profit, those about a distant future are drawn
    towards what the agent used to be, the more so the larger ``weight``. Observations are kept as the policy saw them, with
    ``VecNormalize`` by the statistics of then. ``model.save`` does not save it: keep the object (it can be pickled), and pass it to
    the next ``learn``.

    :param questions: names of the event questions (``eventually``, ``always``, ``steps_until``) whose events are rare; all if None
    :param capacity: transitions kept, half of them with an event and half without
    :param weight: of the remembered transitions in the question loss, relative to a minibatch of new ones
    :param floor: smallest probability with which a transition without an event is kept
    :param seed: of what is kept and replayed; no shared random stream is used
    :raises QAError: for a number out of its range, or questions that are not names
    """

    def __init__(
        self,
        questions: Sequence[str] | None = None,
        *,
        capacity: int = 8192,
        weight: float = 1.0,
        floor: float = 0.01,
        seed: int = 0,
    ) -> None:
        if isinstance(questions, str):
            raise QAError(
                f"RareEventMemory got questions={questions!r}; expected names in a list; write [{questions!r}]"
            )
        names = None if questions is None else list(questions) if isinstance(questions, Iterable) else []
        if names is not None and not (names and all(isinstance(name, str) for name in names)):
            raise QAError(
                f"RareEventMemory got questions={questions!r}; expected a list of names, at least one; leave it out for all"
            )
        capacity = check_whole("RareEventMemory", "capacity", capacity, 2)
        if not _is_number(weight) or not 0.0 < weight < float("inf"):
            raise QAError(f"RareEventMemory got weight={weight!r}; expected a number above 0; give e.g. weight=1.0")
        if not _is_number(floor) or not 0.0 < floor <= 1.0:
            raise QAError(f"RareEventMemory got floor={floor!r}; expected above 0, at most 1; give e.g. floor=0.01")
        self.questions = names
        self.weight = float(weight)
        self.floor = float(floor)
        self._rng = np.random.default_rng(check_whole("RareEventMemory", "seed", seed, 0))
        self._with, self._without = _Reservoir(capacity // 2), _Reservoir(capacity - capacity // 2)
        self._asked: list[tuple[str, str, int, int]] = []  # what the columns of the labels are about

    def __len__(self) -> int:
        return len(self._with) + len(self._without)

    @property
    def n_events(self) -> int:
        """Transitions in the memory that an event came after."""
        return len(self._with)

    def check(self, catalogue: Catalogue) -> None:
        """Refuse questions that have no rare events, or are others than those that what is remembered was labelled by.

        :raises QAError: naming those that have
        """
        asked = [
            (target.question.name, target.question.text, target.start, target.width) for target in catalogue.targets
        ]
        if len(self) and self._asked and asked != self._asked:
            now, then = (list(dict.fromkeys(name for name, *_ in each)) for each in (asked, self._asked))
            raise QAError(
                f"RareEventMemory got questions {now}, and what it holds was labelled by {then}, or by other horizons; expected the same "
                "in the same order; give it those, or begin with a new memory"
            )
        self._asked = asked
        known = [target.question.name for target in catalogue.targets if target.kind == "event"]
        wrong = [name for name in self.questions or () if name not in known]
        if wrong or not known:
            raise QAError(
                f"RareEventMemory got {wrong or 'a policy without questions about events'}; expected names of questions with eventually(), "
                f"always() or steps_until(), which are {known}; name some of those, or ask one"
            )

    def among(self, catalogue: Catalogue) -> list[Target]:
        """The targets whose events are kept."""
        names = self.questions
        return [t for t in catalogue.targets if t.kind == "event" and (names is None or t.question.name in names)]

    def emphasis(self, risk: Floats) -> Floats:
        """How much states of that risk, in [0, 1], are to count."""
        return np.clip(np.nan_to_num(risk, nan=1.0), self.floor, 1.0).astype(np.float32)

    def offer(
        self, obs: Any, features: Floats | None, y: Floats, weight: Floats, event: NDArray[np.bool_], risk: Floats
    ) -> None:
        """Take in transitions; which of them are kept is drawn.

        :param obs: (n, ...), or a dict of such
        :param features: (n, n_action_features) of the actions, None where no question is about them
        :param y: (n, n_logits)
        :param weight: (n, n_logits)
        :param event: (n,), whether one of the rare events came
        :param risk: (n,), the probability of one, as answered when the transition was made
        """
        emphasis = self.emphasis(risk)
        kept = np.flatnonzero(event | (self._rng.random(len(event)) < emphasis))
        columns: Rows = {f"obs/{key}": value for key, value in obs.items()} if isinstance(obs, dict) else {"obs": obs}
        columns |= {"y": y, "weight": weight} | ({} if features is None else {"features": features})
        columns["share"] = np.where(event, emphasis, np.float32(1.0))
        for reservoir, rows in ((self._with, kept[event[kept]]), (self._without, kept[~event[kept]])):
            reservoir.offer({name: column[rows] for name, column in columns.items()}, self._rng)

    def sample(self, n: int) -> Remembered | None:
        """``n`` transitions, half of them with an event, weighted so that they stand for all that were offered.

        None before the first event: there is nothing rare to be remembered yet.
        """
        if not len(self._with):
            return None
        parts = [(self._with, n // 2 or 1)] + ([(self._without, n - (n // 2 or 1))] if len(self._without) else [])
        total = sum(reservoir.n_offered * reservoir.mean_share for reservoir, _ in parts)
        drawn: list[Rows] = []
        for reservoir, size in parts:
            rows = reservoir.take(self._rng.integers(len(reservoir), size=size))
            rows["weight"] = rows["weight"] * (rows.pop("share") * (reservoir.n_offered * n / (size * total)))[:, None]
            drawn.append(rows)
        columns = {name: np.concatenate([rows[name] for rows in drawn]) for name in drawn[0]}
        y, weight, features = columns.pop("y"), columns.pop("weight"), columns.pop("features", None)
        obs = {name.removeprefix("obs/"): column for name, column in columns.items()}
        weight *= np.float32(self.weight)
        return Remembered(obs["obs"] if "obs" in columns else obs, features, y, weight.astype(np.float32, copy=False))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class _Reservoir:
    """A uniform sample of all rows that were ever offered."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n_offered = 0
        self._columns: Rows = {}
        self._sum_of_shares = 0.0

    def __len__(self) -> int:
        return min(self.n_offered, self.capacity)

    @property
    def mean_share(self) -> float:
        """Of all rows that were offered."""
        return self._sum_of_shares / max(self.n_offered, 1)

    def offer(self, rows: Rows, rng: np.random.Generator) -> None:
        n = len(rows["share"])
        if not self._columns:
            self._columns = {
                name: np.zeros((self.capacity, *column.shape[1:]), column.dtype) for name, column in rows.items()
            }
        number = self.n_offered + np.arange(n)
        place = np.where(number < self.capacity, number, rng.integers(0, number + 1))
        for name, column in rows.items():
            inside = place < self.capacity
            self._columns[name][place[inside]] = column[inside]  # of two at one place the later one stays
        self.n_offered += n
        self._sum_of_shares += float(rows["share"].sum())

    def take(self, index: NDArray[np.intp]) -> Rows:
        return {name: column[index] for name, column in self._columns.items()}
