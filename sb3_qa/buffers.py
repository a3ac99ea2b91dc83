"""Labels beside transitions: a rollout buffer that tells which rows it has just handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_qa.joint import JointTraining

__all__ = ["flatten_rows", "label_rows", "stop_labelling"]


def label_rows(buffer: RolloutBuffer, joint: JointTraining) -> None:
    """From now on, tell ``joint`` the rows of each minibatch. The buffer stays the object it is."""
    stop_labelling(buffer)
    buffer.__class__ = _labelled(type(buffer), joint)


def stop_labelling(buffer: RolloutBuffer) -> None:
    """Give the buffer its own class back."""
    buffer.__class__ = getattr(type(buffer), "labelled_base", type(buffer))


def _labelled(base: type[RolloutBuffer], joint: JointTraining) -> type[RolloutBuffer]:
    class Labelled(base):  # type: ignore[misc, valid-type]
        labelled_base = base

        def reset(self) -> None:
            joint.store = None  # labels of what is thrown away
            super().reset()

        def _get_samples(self, batch_inds: NDArray[np.intp], *args: Any, **kwargs: Any) -> Any:
            samples = super()._get_samples(batch_inds, *args, **kwargs)
            joint.hand_out(batch_inds)
            return samples

    return Labelled


def flatten_rows(array: NDArray[Any]) -> NDArray[Any]:
    """(n_steps, n_envs, ...) in the order of a rollout buffer's rows, which is environment by environment."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(array.shape[0] * array.shape[1], *array.shape[2:])
