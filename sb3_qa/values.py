"""Point values of many instances at once: the fast path of wrappers and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.head import decode
from sb3_qa.questions import UNTAUGHT, Catalogue

if TYPE_CHECKING:
    from sb3_qa.answerer import Reading
    from sb3_qa.head import QAHead

__all__ = ["PointValues"]

Floats = NDArray[np.float32]


class PointValues:
    """Reads one number an instance: a probability, a mean, or the index of the likeliest option.

    :param catalogue: the questions
    :param keys: instances, in the order of the columns returned
    :param head: who answers; where it has many more questions, it is only asked these
    :raises QAError: for a key that is not there
    """

    def __init__(self, catalogue: Catalogue, keys: Sequence[str], head: QAHead | None = None) -> None:
        instances = [catalogue.find(key) for key in keys]
        self.keys = list(keys)
        target_of = {instance.key: catalogue.target_for(instance) for instance in instances}
        self.n_state, self.panel = catalogue.n_state_logits, None
        untaught = any(target.start == UNTAUGHT for target in target_of.values())
        if head is not None and instances and (head.by_panels or untaught):
            self.panel = head.panel(list({id(target): target for target in target_of.values()}.values()))
            self.n_state = self.panel.n_state
            mine = {id(o): t for o, t in zip(self.panel.original, self.panel.targets, strict=True)}
            target_of = {key: mine[id(target)] for key, target in target_of.items()}
        self.about_action = np.array([instance.per_action for instance in instances], bool)
        self.any_state, self.any_action = not self.about_action.all(), bool(self.about_action.any())
        # Sigmoids: 1 - prod(1 - h) over a run of columns, of which a plain yes/no has one.
        runs, self._rest = [], []
        for column, instance in enumerate(instances):
            target, operator = target_of[instance.key], instance.question.truth.operator
            if target.kind == "yesno" or (target.kind == "event" and operator != "steps_until"):
                length = instance.horizon if target.kind == "event" else 1
                assert length is not None
                runs.append((column, target.start, target.start + length, operator == "always"))
            else:
                self._rest.append((column, instance, target.start, target.stop))
        self._columns, first, last = (np.array([run[n] for run in runs], np.intp) for n in range(3))
        self._start, self._stop = (int(first.min()), int(last.max())) if runs else (0, 0)
        """Between which columns all runs lie, and where each does in between."""
        self._first, self._last = first - self._start, last - self._start
        self._sign = np.array([1.0 if run[3] else -1.0 for run in runs])
        self._offset = np.array([1.0 if run[3] else 0.0 for run in runs])

    def of_states(self, reading: Reading) -> Floats:
        """(n, n_keys), when all are about states: asked of the states read."""
        return self._read(reading.state_logits(self.panel))

    def of_actions(self, reading: Reading, actions: NDArray[Any] | None = None) -> Floats:
        """(n, n_keys), when all are about actions: asked of these in the states read.

        For candidates (n, m, *action_shape), or None for all of a discrete space: (n, m, n_keys).
        """
        return self._read(reading.action_logits(actions, self.panel), self.n_state)

    def of_states_and_actions(
        self, reading: Reading, index: NDArray[np.intp], actions: NDArray[Any] | None
    ) -> tuple[Floats, Floats]:
        """All at once, of the states at ``index``: those about states, (n, n_keys about states), and those about actions,
        (n, m, n_keys about actions).

        :param actions: candidates (n, m, *action_shape), or None for all of a discrete space
        """
        about_state, about_action = reading.all_logits(index, actions, self.panel)
        m = about_action.shape[1]
        logits = np.zeros((len(index), 1 + m, self.n_state + about_action.shape[2]), np.float32)
        logits[:, 1:, self.n_state :] = about_action
        logits[:, 0, : self.n_state] = about_state
        values = self._read(logits)
        n = len(self.keys) - int(self.about_action.sum())  # those about states come first
        return values[:, 0, :n], values[:, 1:, n:]

    def of_step(self, before: Reading, actions: NDArray[Any] | None, after: Reading) -> Floats:
        """(n, n_keys): about the actions taken in the states before, and about the states after."""
        if not self.any_action:
            return self.of_states(after)
        if not self.any_state:
            return self.of_actions(before, actions)
        assert actions is not None
        return self._read(before.step_logits(actions, after, self.panel))

    def _read(self, logits: Floats, skipped: int = 0) -> Floats:
        """From all columns but the first ones, which are skipped."""
        if len(self._columns):
            # log(1 - sigmoid(x)) = -softplus(x), summed up along the columns: a run is a difference of two sums.
            hazards = logits[..., self._start - skipped : self._stop - skipped]
            alive = np.zeros((*hazards.shape[:-1], hazards.shape[-1] + 1))
            np.cumsum(np.logaddexp(np.float32(0.0), hazards), axis=-1, out=alive[..., 1:])
            gone = np.expm1(alive.take(self._first, axis=-1) - alive.take(self._last, axis=-1))  # -P(it comes)
            gone *= self._sign
            gone += self._offset
            if not self._rest:
                return gone.astype(np.float32)
        values = np.empty((*logits.shape[:-1], len(self.keys)), np.float32)
        if len(self._columns):
            values[..., self._columns] = gone
        for column, instance, start, stop in self._rest:
            values[..., column] = decode(instance, logits[..., start - skipped : stop - skipped]).value
        return values
