"""What a recurrent policy remembers: the state of its LSTMs, for each environment.

A reading of observations goes on from a :class:`Memory`, and gives the one that the next observations are read with.
Nothing is changed on the way, so however often an observation is read, it is remembered once. Policies without an LSTM
have no memory: where one would stand, ``None`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["Memory", "is_recurrent", "lstm_arguments"]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
State = tuple[Floats, Floats, Floats, Floats]


def is_recurrent(policy: Any) -> bool:
    """Whether the policy is one of sb3-contrib's with an LSTM."""
    return hasattr(policy, "lstm_actor")


def lstm_arguments(policy: Any) -> dict[str, Any]:
    """What such a policy was constructed with, which its own list of arguments leaves out."""
    return dict(
        lstm_hidden_size=policy.lstm_actor.hidden_size,
        n_lstm_layers=policy.lstm_actor.num_layers,
        shared_lstm=policy.shared_lstm,
        enable_critic_lstm=policy.enable_critic_lstm,
        lstm_kwargs=policy.lstm_kwargs,
    )


class Memory:
    """What is remembered of ``n`` environments when their next observations are read.

    :param state: hidden and cell state of the actor's LSTM, then of the critic's (of the actor's again, where the critic
        has none), each (n_layers, n, size)
    :param starts: (n,), which of the observations are the first of an episode, where nothing is remembered
    """

    __slots__ = ("starts", "state")

    def __init__(self, state: State, starts: Bools) -> None:
        self.state = state
        self.starts = starts

    @classmethod
    def blank(cls, policy: Any, n: int) -> Memory:
        """At the start of episodes."""
        layers, _, size = policy.lstm_hidden_state_shape
        zeros = np.zeros((layers, n, size), np.float32)
        return cls((zeros, zeros, zeros, zeros), np.ones(n, np.bool_))

    @classmethod
    def given(cls, policy: Any, n: int, state: Any, episode_start: Any) -> Memory:
        """From what people hand over, as they do to ``predict()``.

        :param state: None for the start of an episode; ``((hidden, cell), (hidden, cell))`` of actor and critic, arrays or
            tensors, as RecurrentPPO keeps it; or ``(hidden, cell)`` as ``predict()`` returns it, where the critic has no
            LSTM of its own
        :param episode_start: (n,), or one for all; None for no
        :raises QAError: when they are of other shapes, or the critic's state is missing
        """
        starts = np.asarray(False if episode_start is None else episode_start).astype(np.bool_)
        if starts.shape not in ((), (n,)):
            raise QAError(
                f"episode_start got the shape {starts.shape}; expected {(n,)} for {n} observations; give one flag each"
            )
        starts = np.array(np.broadcast_to(starts, (n,)))
        memory = cls.blank(policy, n)
        if state is None:
            return cls(memory.state, starts)
        nested = isinstance(state, (tuple, list)) and len(state) == 2 and isinstance(state[0], (tuple, list))
        parts = [_array(part) for part in ([*state[0], *state[1]] if nested else state)]
        if len(parts) == 2 and policy.lstm_critic is not None:
            raise QAError(
                "state= got the state of the actor's LSTM alone, which is all that predict() returns, and this policy's critic has an LSTM "
                "of its own; expected both; keep state = qa.remember(obs, state, episode_start) beside the one for predict()"
            )
        parts = parts * 2 if len(parts) == 2 else parts
        shape = memory.state[0].shape
        if len(parts) != 4 or any(part.shape != shape for part in parts):
            raise QAError(
                f"state= got arrays of the shapes {[part.shape for part in parts]}; expected ((hidden, cell), (hidden, cell)) of {shape}: "
                "(n_layers, n_envs, size); pass what qa.remember() returned for as many observations"
            )
        return cls((parts[0], parts[1], parts[2], parts[3]), starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Memory):
            return NotImplemented
        pairs = [(self.starts, other.starts), *zip(self.state, other.state, strict=True)]
        return all(a is b or np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # what holds arrays is no key

    def part(self, index: Any) -> Memory:
        """Of some of the environments."""
        hidden, cell, hidden_vf, cell_vf = (part[:, index] for part in self.state)
        return Memory((hidden, cell, hidden_vf, cell_vf), self.starts[index])

    def tensors(self, device: torch.device) -> tuple[Any, torch.Tensor]:
        """``RNNStates`` and episode starts, as the policy's own passes take them."""
        from sb3_contrib.common.recurrent.type_aliases import RNNStates  # there, as the policy is one of its

        hidden, cell, hidden_vf, cell_vf = (
            torch.as_tensor(np.ascontiguousarray(part), device=device) for part in self.state
        )
        starts = torch.as_tensor(self.starts, dtype=torch.float32, device=device)
        return RNNStates((hidden, cell), (hidden_vf, cell_vf)), starts

    @staticmethod
    def of_buffer(buffer: Any, step: NDArray[np.intp], env: NDArray[np.intp]) -> Memory:
        """That RecurrentPPO acted with at places of its rollout, (n,) each; before the buffer has handed out minibatches."""
        kept = (buffer.hidden_states_pi, buffer.cell_states_pi, buffer.hidden_states_vf, buffer.cell_states_vf)
        hidden, cell, hidden_vf, cell_vf = (part[step, :, env].swapaxes(0, 1) for part in kept)
        return Memory((hidden, cell, hidden_vf, cell_vf), buffer.episode_starts[step, env].astype(np.bool_))

    @staticmethod
    def joined(parts: Sequence[Memory]) -> Memory:
        """Of all environments of all of them."""
        hidden, cell, hidden_vf, cell_vf = (
            np.concatenate(each, axis=1) for each in zip(*(part.state for part in parts), strict=True)
        )
        return Memory((hidden, cell, hidden_vf, cell_vf), np.concatenate([part.starts for part in parts]))


def _array(part: Any) -> Floats:
    return np.asarray(part.detach().cpu() if isinstance(part, torch.Tensor) else part, np.float32)
