"""Labels of an off-policy algorithm's transitions, made in blocks as their futures arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.buffers import as_seen, flatten_rows
from sb3_qa.callbacks.log import MOST_SCORED, compare_averages, room_until, score_questions
from sb3_qa.callbacks.rollout import Recorder
from sb3_qa.errors import QAError
from sb3_qa.hindsight import Hindsight
from sb3_qa.labels import EventTimes, LabelStore
from sb3_qa.questions import Target
from sb3_qa.replay import ReplayLabels
from sb3_qa.wrappers.shell import row

__all__ = ["Replay"]

Floats = NDArray[np.float32]

BLOCK = 32  # steps whose labels are made at once, where the buffer keeps at least four times as many


class Replay(Recorder):
    """What an off-policy algorithm collects, and the labels of what its replay buffer holds.

    Steps are recorded until the longest question about them is answered, or for as long as the buffer keeps them; then they
    are labelled, a block at a time. The labels are kept with the buffer, and saved and loaded with it.

    :param executed: put the action that a wrapper executed into the buffer, in place of the one the agent proposed
    """

    model: OffPolicyAlgorithm

    def __init__(self, model: OffPolicyAlgorithm, answerer: QuestionAnswerer, *, executed: bool) -> None:
        super().__init__(model, answerer)
        buffer = model.replay_buffer
        assert isinstance(buffer, (ReplayBuffer, DictReplayBuffer))
        self.buffer = buffer
        self.executed = executed
        self._block = max(1, min(BLOCK, buffer.buffer_size // 4))
        longest = max(self.catalogue.targets, key=_steps_needed)
        needed, room = _steps_needed(longest), buffer.buffer_size - self._block + 1
        if needed > room:
            raise QAError(
                f"question {longest.question.name!r} looks {needed} steps ahead and the replay buffer keeps {buffer.buffer_size} steps of "
                f"each environment; expected at least {needed - 1 + self._block}, as its truth would never be known; give a larger "
                "buffer_size"
            )
        # Where the longest question does not fit, events go on by the answerer's curve from half way. Two steps at least, so that
        # what is labelled has been stored.
        horizon = max(target.horizon or 1 for target in self.catalogue.targets)
        self._cut_short = horizon > room
        self._ahead = max(needed, room // 2) if self._cut_short else min(max(horizon, 2), room)
        self.store = ReplayLabels(
            self.catalogue.targets,
            buffer.buffer_size * buffer.n_envs,
            self._head.action_features,
            kept=getattr(buffer, "qa_labels", None),
        )
        self.store.curves = self._curves_after
        if isinstance(buffer, HerReplayBuffer):
            self.store.hindsight = Hindsight(
                self.catalogue.targets, self.reader, buffer, self._policy_sees, self._curves_of
            )
        buffer.qa_labels = self.store  # type: ignore[attr-defined]
        self._scored = model.num_timesteps
        self._events = [target for target in self.store.targets if target.kind == "event"]

    def _begins(self) -> NDArray[np.bool_]:
        return np.full(self.model.n_envs, self.model.num_timesteps == 0)

    def start(self) -> None:
        super().start()
        self._positions: list[int] = []

    def record(self, local: dict[str, Any]) -> None:
        """Take in one step, which the algorithm is about to put into its buffer."""
        position = self.buffer.pos
        n_envs = self.buffer.n_envs
        self.store.forget(position * n_envs, (position + 1) * n_envs)
        super().record(local)
        self._positions.append(position)
        if self.buffer.optimize_memory_usage:
            step = len(self._actions) - 1
            for env in np.flatnonzero(self._truncated[step]).tolist():
                self._keep_end(position, env, self._as_kept(self._last_obs[step, env]))
        if self.executed and any("qa/executed_action" in info for info in local["infos"]):
            local["buffer_actions"][:] = self._as_stored(self._actions[-1])
        if len(self._positions) >= self._ahead - 1 + self._block:
            if self._cut_short:
                self._keep_newest(local["new_obs"])
            self._label(len(self._positions) - self._ahead + 1)

    def finish(self) -> None:
        """Learning stops here: futures that are not known yet go on by the answerer's curve for the newest state."""
        if (
            self._positions and self._positions[-1] == self.buffer.pos
        ):  # the step that a callback stopped at is not stored
            self._drop(slice(-1, None))
        if not self._positions or not self._checked:  # or so little was recorded that facts may be told later
            return
        self._keep_newest(self.model._last_obs)
        self._label(len(self._positions))

    def _as_stored(self, actions: NDArray[Any]) -> NDArray[Any]:
        policy = self.answerer.policy
        if policy.squash_output:
            return policy.scale_action(actions)
        return actions

    def _label(self, n: int) -> None:
        """Label the first ``n`` steps of the recording, whose futures are known, and drop them from it."""
        times, values, cuts = self._truths()
        actions = flatten_rows(np.stack(self._actions[:n]))
        positions = np.array(self._positions)
        end_rows = np.append(positions[cuts.step] * self.buffer.n_envs + cuts.env, -1).astype(np.int32)
        features = self._head.action_features
        flat_times = [EventTimes(flatten_rows(each.known[:n]), flatten_rows(each.event[:n])) for each in times]
        flat_values = [flatten_rows(value[:n]) for value in values]
        self._begin_with(flat_times, flat_values)
        labels = LabelStore(
            self.store.targets,
            flat_times,
            flat_values,
            flatten_rows(end_rows[cuts.row[:n]]),
            [np.zeros((0, 0), np.float32)] * len(self._events),
            None if features is None else features(actions),
        )
        rows = flatten_rows(positions[:n, None] * self.buffer.n_envs + np.arange(self.buffer.n_envs))
        self.store.put(rows, labels, actions)
        if self.model.num_timesteps - self._scored >= MOST_SCORED and self._ahead > 1:
            self._score(labels, rows, actions, flatten_rows(room_until(cuts)[:n]))
        self._last_obs.clear()
        self._drop(slice(n))

    def _drop(self, steps: slice) -> None:
        for recorded in (
            self._state_facts,
            self._next_facts,
            self._terminated,
            self._truncated,
            self._actions,
            self._positions,
            self._left,
        ):
            del recorded[steps]

    def _score(
        self, labels: LabelStore, rows: NDArray[np.intp], actions: NDArray[Any], room: NDArray[np.int64]
    ) -> None:
        self._scored = self.model.num_timesteps
        reading = self.answerer.read(self._observations(self.buffer.observations, rows), keep=False)
        every = np.arange(len(rows))
        score_questions(self.model.logger, self.catalogue, labels, every, reading, actions, room, self.pictures)
        compare_averages(self._head, labels, every, reading, actions)

    def _observations(self, kept: Any, rows: NDArray[Any]) -> Any:
        """Observations that the buffer keeps, as the policy sees them."""
        return self._policy_sees(row(kept, np.divmod(rows, self.buffer.n_envs)))

    def _as_kept(self, obs: Any) -> Any:
        """Observations that the policy sees, as the buffer keeps them."""
        normalize = self.model._vec_normalize_env
        return obs if normalize is None else normalize.unnormalize_obs(obs)

    def _policy_sees(self, obs: Any) -> Any:
        obs = as_seen(self.model.observation_space, obs)
        return self.buffer._normalize_obs(obs, self.model._vec_normalize_env)

    def _keep_end(self, position: int, env: int, obs: Any) -> None:
        """The buffer may write the next episode's first state over the last one of this, which labels go on from."""
        self.store.ends[position * self.buffer.n_envs + env] = np.array(obs, self.buffer.observations.dtype)

    def _keep_newest(self, obs: Any) -> None:
        """The states that the environments are in, where labels are about to go on from them."""
        if self.buffer.optimize_memory_usage:
            obs, going = self._as_kept(obs), ~(self._terminated[-1] | self._truncated[-1])
            for env in np.flatnonzero(going).tolist():
                self._keep_end(self._positions[-1], env, obs[env])

    def _curves_after(self, rows: NDArray[Any]) -> list[Floats]:
        if self.buffer.optimize_memory_usage:
            obs = self._policy_sees(np.stack([self.store.ends[row] for row in rows.tolist()]))
        else:
            obs = self._observations(self.buffer.next_observations, rows)
        return self._curves_of(obs, self._events)

    def _curves_of(self, obs: Any, events: list[Target]) -> list[Floats]:
        return self._curves(self.answerer.read(obs, keep=False), events)


def _steps_needed(target: Target) -> int:
    """How many steps have to be seen before anything is known: events are learnt from each."""
    return 1 if target.kind == "event" else target.horizon or 1
