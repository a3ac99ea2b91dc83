"""Point values of many instances at once: the fast path of wrappers and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.head import decode
from sb3_qa.questions import Catalogue, Instance

if TYPE_CHECKING:
    from sb3_qa.answerer import Reading

__all__ = ["PointValues"]

Floats = NDArray[np.float32]


class PointValues:
    """Reads one number an instance: a probability, a mean, or the index of the likeliest option.

    :param catalogue: the questions
    :param keys: instances, in the order of the columns returned
    :raises QAError: for a key that is not there
    """

    def __init__(self, catalogue: Catalogue, keys: Sequence[str]) -> None:
        instances = [catalogue.find(key) for key in keys]
        self.keys = list(keys)
        self.state_columns = [n for n, instance in enumerate(instances) if not instance.per_action]
        self.action_columns = [n for n, instance in enumerate(instances) if instance.per_action]
        self._state = _Block(catalogue, [instances[n] for n in self.state_columns], 0)
        self._action = _Block(catalogue, [instances[n] for n in self.action_columns], catalogue.n_state_logits)

    def of_states(self, reading: Reading) -> Floats:
        """(n, len(state_columns)): the questions about states, asked of the states read."""
        return self._state.read(reading.state_logits())

    def of_actions(self, reading: Reading, actions: NDArray[Any] | None = None) -> Floats:
        """(n, len(action_columns)): the questions about actions, asked of these in the states read.

        For candidates (n, m, *action_shape), or None for all of a discrete space: (n, m, len(action_columns)).
        """
        return self._action.read(reading.action_logits(actions))


class _Block:
    def __init__(self, catalogue: Catalogue, instances: Sequence[Instance], offset: int) -> None:
        # 1 - prod(1 - h) over a run of columns; a plain yes/no is a run of one: 1 - (1 - p).
        runs, self._rest = [], []
        for column, instance in enumerate(instances):
            target = catalogue.target_of[instance.key]
            start = target.start - offset
            if target.kind == "yesno" or (target.kind == "event" and instance.question.truth.operator != "steps_until"):
                runs.append((column, start, start + (instance.horizon if target.kind == "event" else 1), instance.question.truth.operator))  # type: ignore[operator]
            else:
                self._rest.append((column, instance, start, start + target.width))
        self._n = len(instances)
        self._columns = [run[0] for run in runs]
        self._start = [run[1] for run in runs]
        self._stop = [run[2] for run in runs]
        self._end = max(self._stop, default=0)
        self._always = np.array([run[3] == "always" for run in runs], bool)

    def read(self, logits: Floats) -> Floats:
        values = np.empty((*logits.shape[:-1], self._n), np.float32)
        if self._columns:
            alive = np.zeros((*logits.shape[:-1], self._end + 1))
            np.cumsum(-np.logaddexp(0.0, logits[..., : self._end], dtype=np.float64), axis=-1, out=alive[..., 1:])
            survive = np.exp(alive[..., self._stop] - alive[..., self._start])
            values[..., self._columns] = np.where(self._always, survive, 1.0 - survive)
        for column, instance, start, stop in self._rest:
            values[..., column] = decode(instance, logits[..., start:stop]).value
        return values
