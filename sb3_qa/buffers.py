"""Labels beside transitions: buffers that tell which rows they have just handed out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer, RolloutBuffer

from sb3_qa.errors import QAError
from sb3_qa.hindsight import VirtualGoals
from sb3_qa.joint import JointTraining
from sb3_qa.replay import ReplayLabels

__all__ = ["as_seen", "flatten_rows", "label_rows", "still_holds", "stop_labelling"]


def label_rows(buffer: BaseBuffer, joint: JointTraining) -> None:
    """From now on, tell ``joint`` the rows of each minibatch. The buffer stays the object it is.

    :raises QAError: for one that is built otherwise than SB3's
    """
    stop_labelling(buffer)
    if not isinstance(buffer, (RolloutBuffer, ReplayBuffer)) or not isinstance(buffer.actions, np.ndarray):
        raise QAError(
            f"QACallback got a {type(buffer).__name__}; expected a buffer that keeps actions in an array self.actions and takes them by "
            "(position, environment), as labels belong to places; derive its class from SB3's ReplayBuffer or DictReplayBuffer"
        )
    if isinstance(buffer, RolloutBuffer):
        buffer.__class__ = _labelled_rollouts(type(buffer), joint)
    else:
        buffer.__class__ = _labelled_replays(type(buffer), joint)  # type: ignore[assignment]
        buffer.actions = buffer.actions.view(_Watched)


def stop_labelling(buffer: BaseBuffer) -> None:
    """Give the buffer its own class back."""
    buffer.__class__ = getattr(type(buffer), "labelled_base", type(buffer))
    actions = getattr(buffer, "actions", None)
    if isinstance(actions, _Watched):
        buffer.actions = actions.view(np.ndarray)  # type: ignore[attr-defined]


def still_holds(buffer: BaseBuffer) -> Callable[[], bool]:
    """Return what tells whether a buffer still holds the transitions that it holds now."""
    which, actions, filled = weakref.ref(buffer), weakref.ref(buffer.actions), (buffer.pos, buffer.full)  # type: ignore[attr-defined]

    def unchanged() -> bool:
        now: Any = which()
        return now is not None and now.actions is actions() and (now.pos, now.full) == filled

    return unchanged


def _labelled_rollouts(base: type[RolloutBuffer], joint: JointTraining) -> type[RolloutBuffer]:
    class Labelled(base):  # type: ignore[misc, valid-type]
        labelled_base = base

        def reset(self) -> None:
            joint.store = None  # labels of what is thrown away
            super().reset()

        def _get_samples(self, batch_inds: NDArray[np.intp], *args: Any, **kwargs: Any) -> Any:
            samples = super()._get_samples(batch_inds, *args, **kwargs)
            if hasattr(self, "pad_and_flatten"):  # of a recurrent policy: sequences, made equally long
                padded = self.pad_and_flatten(batch_inds + 1).cpu().numpy()
                joint.hand_out(padded[padded > 0] - 1, samples.observations, padded > 0)
            else:
                joint.hand_out(batch_inds, samples.observations)
            return samples

    return Labelled


class _Watched(np.ndarray[Any, Any]):
    """The actions of a replay buffer, which remember the places that they were taken from.

    A buffer draws some of them inside of its sampling; what it takes the actions by is what it has drawn.
    """

    def __array_finalize__(self, obj: Any) -> None:
        self.taken: list[tuple[NDArray[np.intp], NDArray[np.intp]]] | None = None
        """Places, while a minibatch is sampled."""

    def __getitem__(self, index: Any) -> Any:
        if self.taken is not None and isinstance(index, tuple) and len(index) > 1 and isinstance(index[0], np.ndarray):
            self.taken.append(index[:2])
        return self.view(np.ndarray)[index]


def _labelled_replays(base: type[BaseBuffer], joint: JointTraining) -> type[BaseBuffer]:
    class Labelled(base):  # type: ignore[misc, valid-type]
        labelled_base = base

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            taken = self.actions.taken = []
            self._n_virtual = 0
            self._virtual_goals: list[VirtualGoals] = []
            try:
                samples = super().sample(*args, **kwargs)
            finally:
                self.actions.taken = None
            rows = _rows_of(taken, self.n_envs)
            if len(rows) != len(samples.actions):
                raise QAError(
                    f"{base.__name__} handed out {len(samples.actions)} transitions but took actions from {len(rows)} places; expected "
                    "the same, as labels belong to transitions; let it index self.actions by (position, environment)"
                )
            virtual = np.arange(len(rows)) >= len(rows) - self._n_virtual  # they come last
            joint.hand_out(np.where(virtual, ~rows, rows), samples.observations)
            if isinstance(joint.store, ReplayLabels):
                joint.store.virtual = self._virtual_goals[0] if len(self._virtual_goals) == 1 else None
            return samples

        def _get_virtual_samples(self, batch_indices: NDArray[np.intp], *args: Any, **kwargs: Any) -> Any:
            self._n_virtual += len(batch_indices)  # of other goals, and so of other truths
            return super()._get_virtual_samples(batch_indices, *args, **kwargs)

        def _sample_goals(self, batch_indices: NDArray[np.intp], env_indices: NDArray[np.intp]) -> Any:
            goals = super()._sample_goals(batch_indices, env_indices)
            self._virtual_goals.append(VirtualGoals(batch_indices, env_indices, goals))
            return goals

        def __reduce_ex__(self, protocol: Any) -> Any:
            plain = _blank(base)  # it is pickled as what it was
            plain.__dict__.update(self.__dict__, actions=self.actions.view(np.ndarray))
            return _blank, (base,), plain.__getstate__()

    return Labelled


def _blank(base: Any) -> Any:
    return base.__new__(base)


def _rows_of(taken: list[tuple[NDArray[np.intp], NDArray[np.intp]]], n_envs: int) -> NDArray[np.intp]:
    rows = [np.ravel(position * n_envs + env) for position, env in taken]
    return np.concatenate(rows) if rows else np.zeros(0, np.intp)


def as_seen(space: spaces.Space[Any], kept: Any) -> Any:
    """Observations out of a buffer, as the policy sees them: buffers keep the number of a discrete space as (n, 1)."""
    if isinstance(space, spaces.Dict):
        return {key: as_seen(space.spaces[key], value) for key, value in kept.items()}
    return kept.reshape(len(kept), *(space.shape or ()))


def flatten_rows(array: NDArray[Any]) -> NDArray[Any]:
    """(n_steps, n_envs, ...) in the order of a rollout buffer's rows, which is environment by environment."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(array.shape[0] * array.shape[1], *array.shape[2:])
