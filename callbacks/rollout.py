"""Facts and actions as they are collected, and the labels made of a rollout when it ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.base_rates import BaseRates
from sb3_qa.buffers import as_seen, flatten_rows
from sb3_qa.callbacks.log import MOST_SCORED, EpisodeLog, compare_averages, room_until, score_questions
from sb3_qa.callbacks.pictures import Pictures
from sb3_qa.errors import QAError
from sb3_qa.facts import FactReader, needs_steps
from sb3_qa.head import QAHead, survival
from sb3_qa.labels import Cuts, EventTimes, LabelStore, event_times, find_cuts, window_value, yes_or_no
from sb3_qa.limits import CutAges, cut_anyway
from sb3_qa.memory import Memory
from sb3_qa.panel import Panel
from sb3_qa.questions import Number, Target
from sb3_qa.rare_events import RareEventMemory, Remembered
from sb3_qa.sampling import SHARDS, SampledLabels, drawn
from sb3_qa.truth import Step
from sb3_qa.units import own_units
from sb3_qa.wrappers.shell import Rule, own_rewards, row, stack

__all__ = ["Recorder", "Rollout"]

Floats = NDArray[np.float32]
log = logging.getLogger(__name__)

MUCH = 0.2
"""The share of true answers outside of a number's range that is told of; a few are outliers."""
EVIDENCE = 1_000
"""Steps between comparisons of the head's averages, at least; a rollout may be short."""
POLICY_SAMPLES = 8  # actions that stand for the policy at a cut, where they cannot be listed


class Recorder:
    """Facts and actions as they are collected, step by step."""

    def __init__(self, model: BaseAlgorithm, answerer: QuestionAnswerer) -> None:
        self.model = model
        self.answerer = answerer
        self.catalogue = answerer.catalogue
        self._head: QAHead = answerer.policy.qa_head
        self.targets = self.catalogue.targets
        """What is being labelled."""
        self._needs_steps = any(needs_steps(question.truth.fact) for question in self.catalogue.questions)
        self.reader = FactReader(self.targets)
        self.episodes = EpisodeLog(model.n_envs)
        self.pictures: Pictures | None = None
        self._checked = False
        self._told_of: set[str] = set()
        self._known = self._begins()  # not where learn() is called again, in the middle of an episode
        windows = [t for t in self.catalogue.targets if t.kind != "event" and (t.horizon or 1) > 1]
        self._ages = CutAges(model.n_envs, self._known) if windows else None
        self._arrived = self._first_steps(self._reset_infos(), model._last_obs, range(model.n_envs))
        self._read_state()
        self.start()
        untaught = answerer.policy.qa_joint.coef > 0 and self._head.n_updates.item() == 0
        self._rates = BaseRates(self.targets) if untaught else None
        self._rates_at = 0.0

    def _begins(self) -> NDArray[np.bool_]:
        """Whether each environment is at the beginning of an episode."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin a recording; what is known of the current states stays."""
        self._state_facts: list[Floats] = []
        self._next_facts: list[Floats] = []
        self._terminated: list[NDArray[np.bool_]] = []
        self._truncated: list[NDArray[np.bool_]] = []
        self._actions: list[NDArray[Any]] = []
        self._left: list[NDArray[np.int64]] = []
        self._last_obs: dict[tuple[int, int], Any] = {}

    def _begin_with(self, times: Sequence[EventTimes], values: Sequence[Floats]) -> None:
        """Let a head that no label has taught begin with the base rates of these transitions, and of those before them."""
        if self._rates is None:
            return
        n_updates = self._head.n_updates.item()
        if self._rates.n_rows and n_updates != self._rates_at:  # it has begun to learn from those before
            self._rates = None
            return
        self._rates.add(times, values)
        self._rates_at = n_updates
        biases = self._rates.biases()
        for head in self.answerer.policy.qa_heads:
            head.begin_with(biases)

    def _read_state(self) -> None:
        """The facts of the states that the environments are in."""
        self._state = self._facts(self._arrived)
        self._state[~self._known] = np.nan

    def _facts(self, arrived: list[tuple[Mapping[str, Any], Step | None]]) -> Floats:
        steps = [step for _, step in arrived if step is not None]
        return self.reader.read([info for info, _ in arrived], steps if self._needs_steps else None)

    def record(self, local: dict[str, Any]) -> None:
        """Take in one step from the local variables of ``collect_rollouts``."""
        infos, dones = local["infos"], local["dones"]
        actions = Rule.executed(local.get("clipped_actions", local["actions"]), infos)
        ended = dones.nonzero()[0]
        truncated = np.zeros(len(dones), np.bool_)
        for i in ended.tolist():
            truncated[i] = infos[i].get("TimeLimit.truncated", False)
            if truncated[i]:
                self._last_obs[len(self._actions), i] = infos[i]["terminal_observation"]
        terminated = dones & ~truncated
        steps = self._steps(local, actions, terminated, truncated) if self._needs_steps else None
        facts = self.reader.read(infos, steps)
        self._arrived = [(info, None if steps is None else steps[i]) for i, info in enumerate(infos)]
        self._known = np.ones(len(infos), np.bool_)
        self._state_facts.append(self._state)
        self._next_facts.append(facts)
        self._terminated.append(terminated)
        self._truncated.append(truncated)
        self._actions.append(np.array(actions))
        if self._ages is not None:
            self._left.append(self._ages.step(terminated, truncated))
        self._state = facts
        self.episodes.step(infos, local["rewards"], dones)
        if len(ended):
            self._state = facts.copy()
            first = self._first_steps(self._reset_infos(), local["new_obs"], ended)
            for i, each in zip(ended.tolist(), first, strict=True):
                self._arrived[i] = each
            self._state[ended] = self._facts(first)
            if not self._checked:
                self.reader.check_seen(infos[ended[0]])
                self._checked = True

    def _steps(
        self, local: dict[str, Any], actions: NDArray[Any], terminated: NDArray[np.bool_], truncated: NDArray[np.bool_]
    ) -> list[Step]:
        infos = local["infos"]
        obs, rewards = self._raw_obs(local["new_obs"]), own_rewards(self.model.get_env(), local["rewards"], infos)
        done = terminated | truncated
        return [
            Step(
                self._raw_obs(info["terminal_observation"]) if done[i] else row(obs, i),
                actions[i],
                rewards[i],
                bool(terminated[i]),
                bool(truncated[i]),
                info,
            )
            for i, info in enumerate(infos)
        ]

    def _reset_infos(self) -> Sequence[Mapping[str, Any]]:
        env = self.model.get_env()
        assert env is not None
        infos: Sequence[Mapping[str, Any]] = env.unwrapped.reset_infos  # SB3's own wrappers do not pass them on
        return infos

    def log(self, logger: Any) -> None:
        """Log what the wrappers told."""
        self.episodes.log(logger)

    def _truths(self) -> tuple[list[EventTimes], list[Floats], Cuts]:
        """What became known of each target: of events and yes/no questions, and of choices and numbers; all (n_steps, n_envs)."""
        if not self._checked:
            self.reader.check_seen(self._arrived[0][0])
            self._checked = True
        facts, state_facts = np.stack(self._next_facts), np.stack(self._state_facts)
        terminated, truncated = np.stack(self._terminated), np.stack(self._truncated)
        times: list[EventTimes] = []
        values: list[Floats] = []
        for target, column in zip(self.targets, self.reader.column, strict=True):
            fact = facts[..., column]
            if target.kind == "event":
                times.append(event_times((fact == 1.0) == target.question.truth.event_when, terminated, truncated))
            else:
                value = self._window(target, fact, state_facts[..., column], terminated, truncated)
                self._check_range(target, value)
                times.append(yes_or_no(value)) if target.kind == "yesno" else values.append(value)
        return times, values, find_cuts(terminated, truncated)

    def _check_range(self, target: Target, value: Floats) -> None:
        """Tell, once, of a number that is often outside its range."""
        answer, name = target.question.answer, target.question.name
        if not isinstance(answer, Number) or name in self._told_of:
            return
        known = value[~np.isnan(value)]
        outside = np.count_nonzero((known < answer.low) | (known > answer.high))
        if outside > MUCH * max(len(known), 20):
            self._told_of.add(name)
            log.warning(
                "question %r: %d of %d true answers are outside of %s, from %.4g to %.4g, and count as its nearer end; give Number() a "
                "range that holds them",
                *(name, outside, len(known), answer, known.min(), known.max()),
            )

    def _window(self, target: Target, fact: Floats, now: Floats, terminated: Any, truncated: Any) -> Floats:
        """The truth of a window (n_steps, n_envs), nan where it is not known, or would not have been but for a termination."""
        value = window_value(target, fact, now, terminated, truncated)
        if self._ages is not None and target.horizon is not None:
            value[cut_anyway(terminated, truncated, np.stack(self._left), target.horizon)] = np.nan
        return value

    def _curves(self, reading: Reading, targets: list[Target], panel: Panel | None = None) -> list[Floats]:
        """Survival curves (n, width + 1) of event targets, of all questions or of a panel's, in the states read."""
        n_state = self._head.n_state if panel is None else panel.n_state
        shares, logits = None, None
        if any(
            target.question.per_action for target in targets
        ):  # what comes next is up to the policy: a mixture of its actions
            if isinstance(self.model.action_space, spaces.Discrete):
                shares = reading.shares()
                explored = getattr(self.model, "exploration_rate", 0.0)  # of an agent that is greedy otherwise
                shares = (1.0 - explored) * shares + explored / shares.shape[1]
                logits = reading.action_logits(panel=panel)
            else:
                actions = reading.sampled(POLICY_SAMPLES, seed=self.model.num_timesteps)
                shares = np.full(actions.shape[:2], 1.0 / POLICY_SAMPLES, np.float32)
                logits = reading.action_logits(actions, panel)
        curves = []
        about_states = reading.state_logits(panel) if any(not t.question.per_action for t in targets) else None
        for target in targets:
            if not target.question.per_action:
                assert about_states is not None
                curves.append(survival(about_states[:, target.start : target.stop]))
            else:
                assert logits is not None and shares is not None
                each = survival(logits[..., target.start - n_state : target.stop - n_state])
                curves.append(np.einsum("nm,nmk->nk", shares, each).astype(np.float32))
        return curves

    def _first_steps(
        self, infos: Sequence[Mapping[str, Any]], obs: Any, index: Iterable[int]
    ) -> list[tuple[Mapping[str, Any], Step | None]]:
        """Infos of resets, and steps of them where facts need steps."""
        if not self._needs_steps:
            return [(infos[i], None) for i in index]
        raw = self._raw_obs(obs)
        return [(infos[i], Step(row(raw, i), None, 0.0, False, False, infos[i])) for i in index]

    def _raw_obs(self, obs: Any) -> Any:
        """Observations as facts are about them: before SB3's wrappers."""
        return own_units(self.model.get_env(), obs)


class Rollout(Recorder):
    """One rollout of an on-policy algorithm, and the labels made of it."""

    model: OnPolicyAlgorithm

    def __init__(
        self, model: OnPolicyAlgorithm, answerer: QuestionAnswerer, memory: RareEventMemory | None = None
    ) -> None:
        self.memory = memory
        self._compared = 0
        self._sample: int = answerer.policy.qa_kwargs["qa_sample"]
        super().__init__(model, answerer)
        n = len(self.catalogue.targets)
        if memory is not None and n > self._sample:
            raise QAError(
                f"QACallback got a memory of rare events, and {n} things are learnt of which qa_sample={self._sample} are sampled at a "
                f"time; expected all of them; give policy_kwargs=dict(qa_sample={n}), or leave the memory out"
            )

    def _begins(self) -> NDArray[np.bool_]:
        return np.asarray(self.model._last_episode_starts, np.bool_)

    def start(self) -> None:
        super().start()
        self._read: list[Reading] = []
        """What wrappers have read of where each step has led, while they read ahead of the agent."""
        every = self.catalogue.targets
        if len(every) > SHARDS * self._sample:
            self.targets = drawn(every, self._sample, self.model.num_timesteps)
            self.reader = FactReader(self.targets)
            self._read_state()

    def record(self, local: dict[str, Any]) -> None:
        super().record(local)
        if self.answerer.reads_ahead:
            reading = self.answerer.ahead_of(obs_as_tensor(local["new_obs"], self.model.device))
            if reading is not None:
                self._read.append(reading.bare())

    def labels(self) -> LabelStore:
        """Labels of the rollout, in the order of the buffer's rows. Futures that are cut go on by the answerer's own curve."""
        times, values, cuts = self._truths()
        features = self._head.action_features
        self._flat_actions = flatten_rows(np.stack(self._actions))
        flat_times = [EventTimes(*(flatten_rows(x) for x in each)) for each in times]
        flat_values = [flatten_rows(value) for value in values]
        cut_row, about = flatten_rows(cuts.row), None if features is None else features(self._flat_actions)
        self._cuts = cuts
        self._begin_with(flat_times, flat_values)
        if len(self.targets) <= self._sample:
            self.store = LabelStore(self.targets, flat_times, flat_values, cut_row, self._continuations(cuts), about)
            if self.memory is not None:
                self._offer(self.memory)
            return self.store
        timed, valued = iter(flat_times), iter(flat_values)
        truth: dict[int, EventTimes | Floats] = {
            target.start: next(timed) if target.kind in ("event", "yesno") else next(valued) for target in self.targets
        }
        seed = self.model.num_timesteps
        order = np.random.default_rng([seed, 2]).permutation(len(self.targets))
        panels, shards = [], []
        for part in np.array_split(order, math.ceil(len(order) / self._sample)):
            panel = self._head.panel([self.targets[n] for n in part])
            told = [truth[target.start] for target in panel.original]
            each = [x for x in told if isinstance(x, EventTimes)], [x for x in told if not isinstance(x, EventTimes)]
            panels.append(panel)
            shards.append(LabelStore(panel.targets, *each, cut_row, self._continuations(cuts, panel), about))
        self.store = SampledLabels(panels, shards, seed)
        return self.store

    def _offer(self, memory: RareEventMemory) -> None:
        """Let a memory keep what it will of this rollout."""
        store, rare = self.store, memory.among(self.catalogue)
        event = np.any([store.times[t.start].event & (store.times[t.start].known <= t.width) for t in rare], axis=0)
        obs = self.model.rollout_buffer.observations
        flat = {key: flatten_rows(x) for key, x in obs.items()} if isinstance(obs, dict) else flatten_rows(obs)
        flat = as_seen(self.model.observation_space, flat)
        reading = self.answerer.read(flat, keep=False)
        logits = reading.state_logits()
        if any(target.question.per_action for target in rare):
            logits = np.concatenate([logits, reading.action_logits(self._flat_actions)], axis=1)
        risk = np.max([1.0 - survival(logits[:, t.start : t.stop])[:, -1] for t in rare], axis=0)
        y, weight = store.dense(np.arange(len(store)))
        others = np.ones(weight.shape[1], np.bool_)
        for target in rare:
            others[target.start : target.stop] = False
        weight[:, others] = 0.0
        memory.offer(flat, store.features, y, weight, event, risk)

    def remembered(self, n: int) -> tuple[list[torch.Tensor], Remembered] | None:
        """``n`` transitions out of the memory, and the latents that they have now."""
        more = None if self.memory is None else self.memory.sample(n)
        if more is None:
            return None
        policy: Any = self.model.policy
        latents = policy.qa_taps.read(policy, more.obs)
        return [torch.as_tensor(latents[index], device=policy.device) for index in policy.qa_taps.keep], more

    def log(self, logger: Any) -> None:
        """Log scores of answers about this rollout, given before they are trained on, and what the wrappers told."""
        super().log(logger)
        n_rows = len(self.store)
        rows = np.unique(np.linspace(0, n_rows - 1, min(n_rows, MOST_SCORED)).astype(np.intp))
        buffer = self.model.rollout_buffer
        env, step = np.divmod(rows, buffer.buffer_size)
        if len(self._read) == buffer.buffer_size:
            # What the first step was taken on was read by the weights before; where the last has led is not in the buffer.
            rows, env, step = rows[step > 0], env[step > 0], step[step > 0]
            reading = Reading.joined(self._read).part((step - 1) * buffer.n_envs + env)
        else:
            obs = as_seen(self.model.observation_space, row(buffer.observations, (step, env)))
            memory = Memory.of_buffer(buffer, step, env) if self.answerer.recurrent else None
            reading = self.answerer.read(obs, memory, keep=False)
        room = flatten_rows(room_until(self._cuts))[rows]
        actions = self._flat_actions[rows]
        score_questions(logger, self.catalogue, self.store, rows, reading, actions, room, self.pictures)
        if self.store.n_asked is None and self.model.num_timesteps - self._compared >= EVIDENCE:
            self._compared = self.model.num_timesteps
            # Last, as the reading may be of other weights than those that answer then.
            compare_averages(self._head, self.store, rows, reading, actions)

    def _continuations(self, cuts: Cuts, panel: Panel | None = None) -> list[Floats]:
        """For each event target, the survival curve (n_cuts, width + 1) of the states the futures are cut in."""
        targets = [target for target in (panel or self.catalogue).targets if target.kind == "event"]
        if not targets or not len(cuts.step):
            return [np.zeros((len(cuts.step), target.width + 1), np.float32) for target in targets]
        newest: Any = self.model._last_obs
        rows: list[Any] = []
        for place in zip(cuts.step.tolist(), cuts.env.tolist(), strict=True):
            rows.append(self._last_obs[place] if place in self._last_obs else row(newest, place[1]))
        memory = self._memory_after(cuts) if self.answerer.recurrent else None
        return self._curves(self.answerer.read(stack(rows), memory, keep=False), targets, panel)

    def _memory_after(self, cuts: Cuts) -> Memory:
        """What is remembered of each environment after the step that its future is cut at."""
        model: Any = self.model
        newest = Memory.given(model.policy, model.n_envs, model._last_lstm_states, None)
        inside = np.minimum(cuts.step + 1, model.rollout_buffer.buffer_size - 1)
        kept, last = Memory.of_buffer(model.rollout_buffer, inside, cuts.env).state, newest.part(cuts.env).state
        at_end = (cuts.step + 1 == model.rollout_buffer.buffer_size)[:, None]
        hidden, cell, hidden_vf, cell_vf = (np.where(at_end, b, a) for a, b in zip(kept, last, strict=True))
        return Memory((hidden, cell, hidden_vf, cell_vf), np.zeros(len(cuts.step), np.bool_))
