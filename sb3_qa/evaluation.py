"""Whole episodes, counted and paired: what an agent does, with a veto or without, and how good the answers are.

>>> episodes = run_episodes(model, venv, 100, catastrophe="crashed")  # doctest: +SKIP
>>> episodes.catastrophes_per_1000  # doctest: +SKIP
Interval(estimate=2.1, low=1.2, high=3.3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.answers import Answer, ChoiceAnswer, YesNoAnswer
from sb3_qa.callbacks.log import truths
from sb3_qa.errors import QAError
from sb3_qa.facts import FactReader
from sb3_qa.head import decode, survival
from sb3_qa.labels import EventTimes, LabelStore, event_times, find_cuts, window_value, yes_or_no
from sb3_qa.memory import Memory
from sb3_qa.questions import Instance, Target, nearest
from sb3_qa.scores import (
    Interval,
    absolute_error,
    accuracy,
    bootstrap_interval,
    brier_choice,
    ratio_interval,
    score,
)
from sb3_qa.truth import Fact, Step
from sb3_qa.units import own_units
from sb3_qa.wrappers.shell import VecQAWrapper, own_rewards, qa_wrappers, row
from sb3_qa.wrappers.substitutes import takes_masks
from sb3_qa.wrappers.surroundings import action_masks
from sb3_qa.wrappers.veto_rule import VetoRule

__all__ = [
    "AnswerRecord",
    "Answered",
    "Episodes",
    "EventCurves",
    "SeededEpisodes",
    "Trace",
    "run_episodes",
    "score_answers",
    "seeded_vec_env",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MOST_SCORED = 50_000  # decisions that answers are scored on; those of neighbouring steps are much alike


class Agent(Protocol):
    """Whatever acts as an SB3 model does."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], Any]: ...


@dataclass(frozen=True, eq=False)
class Trace:
    """One episode, step by step."""

    actions: NDArray[Any]
    """As executed, shape ``(n_steps, *action_shape)``."""
    rewards: Floats
    """The environment's own, shape (n_steps,)."""
    risk: Floats
    """``qa/risk`` of the proposed actions, shape (n_steps,); ``nan`` where no wrapper told it."""
    flagged: Bools
    """``qa/catastrophe``, shape (n_steps,)."""
    vetoed: Bools
    """``qa/vetoed``, shape (n_steps,)."""
    catastrophe: Bools
    """Whether the catastrophe was the case in the state the step led to, shape (n_steps,)."""
    truncated: bool
    """Whether a time limit ended it."""


@dataclass(frozen=True, eq=False)
class Episodes:
    """What happened in some episodes. Intervals are 95 % bootstrap intervals over episodes, which are independent."""

    traces: tuple[Trace, ...]

    def __len__(self) -> int:
        return len(self.traces)

    @property
    def returns(self) -> Floats:
        """Undiscounted sum of the environment's own rewards, shape (n_episodes,)."""
        return np.array([trace.rewards.sum() for trace in self.traces])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of steps, shape (n_episodes,)."""
        return self._counts("rewards", len)

    @property
    def catastrophes(self) -> NDArray[np.int64]:
        """Number of catastrophes, shape (n_episodes,)."""
        return self._counts("catastrophe", np.sum)

    @property
    def vetoes(self) -> NDArray[np.int64]:
        """Number of steps at which another action was executed, shape (n_episodes,)."""
        return self._counts("vetoed", np.sum)

    @property
    def flags(self) -> NDArray[np.int64]:
        """Number of steps at which the proposed action was judged catastrophic, shape (n_episodes,)."""
        return self._counts("flagged", np.sum)

    @property
    def mean_return(self) -> Interval:
        """Mean of :attr:`returns`."""
        return bootstrap_interval(self.returns)

    @property
    def mean_length(self) -> Interval:
        """Mean of :attr:`lengths`, in steps."""
        return bootstrap_interval(self.lengths)

    @property
    def catastrophes_per_episode(self) -> Interval:
        """Mean of :attr:`catastrophes`."""
        return bootstrap_interval(self.catastrophes)

    @property
    def catastrophes_per_1000(self) -> Interval:
        """Catastrophes per 1,000 steps."""
        return ratio_interval(self.catastrophes, self.lengths, scale=1000.0)

    @property
    def vetoes_per_1000(self) -> Interval:
        """Vetoes per 1,000 steps."""
        return ratio_interval(self.vetoes, self.lengths, scale=1000.0)

    @property
    def flags_per_1000(self) -> Interval:
        """Flags per 1,000 steps."""
        return ratio_interval(self.flags, self.lengths, scale=1000.0)

    def summary(self) -> dict[str, Interval]:
        """All intervals, by the names of the properties."""
        names = ("catastrophes_per_1000", "catastrophes_per_episode", "mean_return", "mean_length")
        return {name: getattr(self, name) for name in (*names, "flags_per_1000", "vetoes_per_1000")}

    def _counts(self, name: str, count: Callable[[Any], Any]) -> NDArray[np.int64]:
        return np.array([count(getattr(trace, name)) for trace in self.traces], np.int64)


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Gives every episode a seed of its own: the j-th reset (from 0) is seeded with ``first + j * stride``.

    Two agents then meet the same episodes, however long each of them takes for the ones before.
    """

    def __init__(self, env: gym.Env[Any, Any], first: int, stride: int = 1) -> None:
        super().__init__(env)
        self.next_seed, self.stride = first, stride

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset with the next seed; a seed that is given is passed over."""
        seed, self.next_seed = self.next_seed, self.next_seed + self.stride
        return self.env.reset(seed=seed, options=options)


def seeded_vec_env(make: Callable[[], gym.Env[Any, Any]], n_envs: int, seed: int) -> DummyVecEnv:
    """Environments in which episode ``e`` of :func:`run_episodes` is seeded with ``seed + e``.

    :param make: makes one environment
    """
    return DummyVecEnv([lambda i=i: SeededEpisodes(make(), seed + i, n_envs) for i in range(n_envs)])  # type: ignore[misc]


class Answered(NamedTuple):
    """Answers to an instance and what turned out to be true, over n decisions."""

    instance: Instance
    answer: Answer
    truth: NDArray[np.float32]
    """(n,): 0 or 1, the index of an option, or a number."""
    episode: NDArray[np.intp]
    """(n,), the episode that each decision is of."""
    elapsed: NDArray[np.intp]
    """(n,), the steps of that episode before it."""


class EventCurves(NamedTuple):
    """Survival curves answered for an event, and when it really came, over n decisions."""

    target: Target
    said: NDArray[np.float32]
    """(n, width + 1), probability of no event within 0 .. width steps."""
    known: NDArray[np.int64]
    """(n,), steps whose outcome is known: up to the event, up to where a time limit cut the episode, at most ``width``."""
    event: Bools
    """(n,), whether the last of them is the event."""
    episode: NDArray[np.intp]
    """(n,), the episode that each decision is of."""


class _Held(NamedTuple):
    """The decisions that answers are scored on, with labels and logits."""

    store: LabelStore
    rows: NDArray[np.intp]
    room: NDArray[np.int64]
    episode: NDArray[np.intp]
    elapsed: NDArray[np.intp]
    state_logits: NDArray[np.float32]
    action_logits: NDArray[np.float32] | None

    def logits(self, target: Target) -> NDArray[np.float32]:
        if not target.question.per_action:
            return self.state_logits[:, target.start : target.stop]
        assert self.action_logits is not None
        first = self.state_logits.shape[1]
        return self.action_logits[:, target.start - first : target.stop - first]


class AnswerRecord:
    """Keeps what is needed to hold answers against the truth, see :func:`score_answers`.

    :param qa: whose questions
    """

    def __init__(self, qa: QuestionAnswerer) -> None:
        self.qa = qa
        self.reader = FactReader(qa.catalogue)
        self._state: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._rows: list[tuple[Any, ...]] = []
        self._memory: Memory | None = None

    def begin(self, index: NDArray[np.intp], steps: Sequence[Step], n_envs: int) -> None:
        """Take in the first states of episodes, in the environments at ``index``."""
        facts = self.reader.read([step.info for step in steps], steps)
        if len(self._state) != n_envs:
            self._state = np.full((n_envs, facts.shape[1]), np.nan, np.float32)
            self._memory = Memory.blank(self.qa.policy, n_envs) if self.qa.recurrent else None
        self._state[index] = facts
        if self._memory is not None:
            self._memory.starts[index] = True

    def step(self, obs: Any, steps: Sequence[Step], episode: NDArray[np.intp], elapsed: NDArray[np.intp]) -> None:
        """Take in a step of all environments.

        :param obs: where the actions were chosen, as the policy sees it
        :param episode: (n_envs,), of each environment, -1 if it is not to be counted
        :param elapsed: (n_envs,), steps of that episode before this one
        """
        facts = self.reader.read([step.info for step in steps], steps)
        counted = np.flatnonzero(episode >= 0)
        ends = np.array([(step.terminated, step.truncated) for step in steps], np.bool_)[counted]
        seen = {key: value[counted] for key, value in obs.items()} if isinstance(obs, dict) else obs[counted]
        if self._memory is not None:  # what is remembered is too much to keep: read now
            reading = self.qa.read(obs, self._memory, keep=False)
            self._memory = reading.remembered(np.array([step.terminated or step.truncated for step in steps]))
            seen = reading.bare().part(counted)
        actions = np.stack([np.asarray(step.action) for step in steps])[counted]
        self._rows.append(
            (episode[counted], elapsed[counted], seen, actions, self._state[counted], facts[counted], ends)
        )
        self._state = facts

    def answers(self) -> Iterator[tuple[str, Answer, NDArray[np.float32]]]:
        """For each instance its key, the answers given, and what turned out to be true, all over the same decisions.

        A question about an action is asked about the one that was executed. Decisions so late in an episode that a time
        limit could have cut what they ask about are left out, whatever happened in them.
        """
        for each in self.answered():
            yield each.instance.key, each.answer, each.truth

    def answered(self) -> Iterator[Answered]:
        """As :meth:`answers`, with where in which episode each decision stands."""
        held = self._hold_against_truth()
        for instance in self.qa.catalogue.instances.values():
            truth = truths(instance, held.store, self.qa.catalogue, held.rows, held.room)
            truth = np.where(held.room < (instance.horizon or 0), np.float32(np.nan), truth)
            known = ~np.isnan(truth)
            logits = held.logits(self.qa.catalogue.target_of[instance.key])[known]
            yield Answered(instance, decode(instance, logits), truth[known], held.episode[known], held.elapsed[known])

    def event_curves(self) -> Iterator[EventCurves]:
        """For each event that is learnt, the curves answered and when the event really came, over all decisions."""
        held = self._hold_against_truth()
        for target in self.qa.catalogue.targets:
            if target.kind == "event":
                times = held.store.times[target.start]
                known = times.known[held.rows]
                at_most = np.minimum(known, target.width).astype(np.int64)
                comes = times.event[held.rows] & (known <= target.width)
                yield EventCurves(target, survival(held.logits(target)), at_most, comes, held.episode)

    def _hold_against_truth(self) -> _Held:
        if not self._rows:
            raise QAError("the AnswerRecord is empty; expected episodes in it; pass it to run_episodes(record=...)")
        parts = list(zip(*self._rows, strict=True))
        episode, elapsed, actions, state_facts, facts, ends = (np.concatenate(parts[n]) for n in (0, 1, 3, 4, 5, 6))
        self.reader.check_seen({})
        chosen = np.unique(np.linspace(0, len(episode) - 1, min(len(episode), MOST_SCORED)).astype(np.intp))
        store, rows, room = self._label(episode, elapsed, state_facts, facts, ends)
        reading = self._reading(parts[2], chosen)
        catalogue = self.qa.catalogue
        about_action = catalogue.n_state_logits < catalogue.n_logits
        action_logits = reading.action_logits(actions[chosen]) if about_action else None
        places = store, rows[chosen], room[chosen], episode[chosen], elapsed[chosen]
        return _Held(*places, reading.state_logits(), action_logits)

    def _reading(self, seen: Sequence[Any], chosen: NDArray[np.intp]) -> Reading:
        if isinstance(seen[0], Reading):
            return Reading.joined(seen).part(chosen)
        if isinstance(seen[0], dict):
            return self.qa.read({k: np.concatenate([part[k] for part in seen])[chosen] for k in seen[0]}, keep=False)
        return self.qa.read(np.concatenate(seen)[chosen], keep=False)

    def _label(
        self, episode: NDArray[np.intp], elapsed: NDArray[np.intp], state_facts: Any, facts: Any, ends: Bools
    ) -> tuple[LabelStore, NDArray[np.intp], NDArray[np.int64]]:
        """Labels in a grid of one column an episode, long enough that every window fits; each decision's row; its room."""
        catalogue = self.qa.catalogue
        longest = max([target.horizon or 1 for target in catalogue.targets])
        shape = (int(elapsed.max()) + 1 + longest, int(episode.max()) + 1)
        terminated, truncated = np.zeros((2, *shape), np.bool_)
        terminated[elapsed, episode], truncated[elapsed, episode] = ends[:, 0], ends[:, 1] & ~ends[:, 0]
        cuts = find_cuts(terminated, truncated)
        times: list[EventTimes] = []
        values: list[NDArray[np.float32]] = []
        for target, column in zip(catalogue.targets, self.reader.column, strict=True):
            fact, fact_now = np.full((2, *shape), np.nan, np.float32)
            fact[elapsed, episode], fact_now[elapsed, episode] = facts[:, column], state_facts[:, column]
            if target.kind == "event":
                each = event_times((fact == 1.0) == target.question.truth.event_when, terminated, truncated)
                times.append(EventTimes(each.known.ravel(), each.event.ravel()))
            else:
                value = window_value(target, fact, fact_now, terminated, truncated).ravel()
                times.append(yes_or_no(value)) if target.kind == "yesno" else values.append(value)
        unused = [np.zeros((len(cuts.step), t.width + 1), np.float32) for t in catalogue.targets if t.kind == "event"]
        store = LabelStore(catalogue.targets, times, values, cuts.row.ravel(), unused, None)
        limit = elapsed[ends[:, 1] & ~ends[:, 0]].min(initial=np.iinfo(np.int64).max - 1) + 1
        return store, elapsed * shape[1] + episode, limit - elapsed


def run_episodes(
    agent: Agent,
    venv: VecEnv,
    n_episodes: int,
    *,
    catastrophe: Fact,
    deterministic: bool = False,
    record: AnswerRecord | None = None,
) -> Episodes:
    """Let an agent play whole episodes.

    Episodes are allotted beforehand, ``e`` to environment ``e % n_envs``: taking whichever end first would favour
    short ones. An agent that takes masks of its actions is told the environment's own. A veto would mask what it objects to as
    well: nothing would be proposed that it could veto, and how often it interferes could not be counted; it is told them too, as no
    way out. Rewards are the environment's own (``qa/raw_reward``, or before ``VecNormalize``).

    :param agent: an SB3 model, or anything with its ``predict``
    :param venv: with the wrappers that are to be tried, bound to their answerer
    :param catastrophe: an ``info`` key or a callable of a :class:`~sb3_qa.truth.Step`, true when one has happened
    :param deterministic: take the likeliest action. By default actions are sampled, as in training: the answers learnt
        there are about the agent that samples
    :param record: keeps what :func:`score_answers` needs
    :return: the episodes in order
    :raises QAError: when ``n_episodes`` is below 1 or the catastrophe never appears in ``info``
    """
    if isinstance(n_episodes, bool) or not isinstance(n_episodes, (int, np.integer)) or n_episodes < 1:
        raise QAError(f"run_episodes got n_episodes={n_episodes!r}; expected a whole number, at least 1; give e.g. 100")
    n_envs = venv.num_envs
    agent = _told_masks(agent, venv)
    raw = _Raw(venv)
    judge = _Judge(catastrophe)
    episode, elapsed = np.arange(n_envs), np.zeros(n_envs, np.intp)
    open_steps: list[list[tuple[Any, ...]]] = [[] for _ in range(n_envs)]
    finished: dict[int, Trace] = {}
    obs, state, starts = venv.reset(), None, np.ones(n_envs, np.bool_)
    if record is not None:
        record.begin(np.arange(n_envs), raw.first(obs, range(n_envs)), n_envs)
    while len(finished) < n_episodes:
        actions, state = agent.predict(obs, state=state, episode_start=starts, deterministic=deterministic)
        before = _copied(obs)
        obs, rewards, starts, infos = venv.step(actions)
        steps = raw.steps(obs, actions, rewards, starts, infos)
        if record is not None:
            record.step(before, steps, np.where(episode < n_episodes, episode, -1), elapsed)
        for i, step in enumerate(steps):
            if episode[i] < n_episodes:
                told = infos[i]
                risk, flag, veto = (told.get(f"qa/{key}", default) for key, default in _TOLD)
                open_steps[i].append((step.action, step.reward, risk, flag, veto, judge(step)))
        ended = np.flatnonzero(starts)
        for i in ended[episode[ended] < n_episodes].tolist():
            action, reward, risk, flag, veto, bad = (np.array(column) for column in zip(*open_steps[i], strict=True))
            finished[int(episode[i])] = Trace(
                action, reward.astype(float), risk.astype(float), flag, veto, bad, steps[i].truncated
            )
            open_steps[i] = []
        elapsed += 1
        elapsed[ended] = 0
        episode[ended] += n_envs
        if record is not None and len(ended):
            record.begin(ended, raw.first(obs, ended), n_envs)
    judge.check_seen()
    return Episodes(tuple(finished[e] for e in range(n_episodes)))


def _told_masks(agent: Agent, venv: VecEnv) -> Agent:
    """The agent, told which actions the environments allow, where it asks for that and they tell it."""
    if not takes_masks(agent) or not venv.unwrapped.has_attr("action_masks"):
        return agent
    around = [wrapper for wrapper, _ in qa_wrappers(venv) if isinstance(wrapper, VecQAWrapper)]
    rules = [wrapper.rule for wrapper in around if isinstance(wrapper.rule, VetoRule)]

    class Masked:
        def predict(
            self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
        ) -> Any:
            masks = action_masks(venv.unwrapped)
            for rule in rules:
                rule.masks(masks)
            return agent.predict(observation, state, episode_start, deterministic, action_masks=masks)  # type: ignore[call-arg]

    return Masked()


_TOLD = (("risk", float("nan")), ("catastrophe", False), ("vetoed", False))


def score_answers(record: AnswerRecord) -> dict[str, dict[str, float]]:
    """Score every instance on what a record holds, beside the best constant answer to the same decisions.

    :return: by instance. Of a yes/no question what :func:`sb3_qa.scores.score` gives; of a choice ``accuracy``, ``brier``
        and those of a constant that answers the frequencies, ``constant_accuracy``, ``constant_brier``; of a number
        ``error`` (mean absolute, in the units of the fact) and ``constant_error``, that of the median; of all ``count``
    """
    table: dict[str, dict[str, float]] = {}
    for key, answer, truth in record.answers():
        if not len(truth):
            continue
        if isinstance(answer, YesNoAnswer):
            table[key] = score(answer.probability, truth)
        elif isinstance(answer, ChoiceAnswer):
            option = truth.astype(np.intp)
            p = answer.probabilities.astype(np.float64)
            p /= p.sum(axis=1, keepdims=True)
            constant = np.broadcast_to(np.bincount(option, minlength=p.shape[1]) / len(option), p.shape)
            table[key] = {"accuracy": accuracy(p, option), "constant_accuracy": accuracy(constant, option)}
            table[key] |= {"brier": brier_choice(p, option), "constant_brier": brier_choice(constant, option)}
        else:
            constant = np.full_like(truth, np.median(truth))
            table[key] = {"error": absolute_error(answer.value, truth)}
            table[key] |= {"constant_error": absolute_error(constant, truth)}
        table[key]["count"] = float(len(truth))
    return table


class _Raw:
    """Steps as the environment itself sees them: before shaping and before ``VecNormalize``."""

    def __init__(self, venv: VecEnv) -> None:
        self.venv = venv

    def first(self, obs: Any, index: Any) -> list[Step]:
        infos: Sequence[Mapping[str, Any]] = self.venv.unwrapped.reset_infos  # SB3's wrappers do not pass them on
        raw = self._obs(obs)
        return [Step(row(raw, i), None, 0.0, False, False, infos[i]) for i in index]

    def steps(self, obs: Any, actions: Any, rewards: Any, dones: Any, infos: Sequence[dict[str, Any]]) -> list[Step]:
        raw = self._obs(obs)
        rewards, steps = own_rewards(self.venv, rewards, infos), []
        for i, info in enumerate(infos):
            cut = bool(dones[i]) and bool(info.get("TimeLimit.truncated", False))
            arrived = self._obs(info["terminal_observation"]) if dones[i] else row(raw, i)
            action = info.get("qa/executed_action", actions[i])
            steps.append(Step(arrived, action, rewards[i], bool(dones[i]) and not cut, cut, info))
        return steps

    def _obs(self, obs: Any) -> Any:
        return own_units(self.venv, obs)


class _Judge:
    """Reads the catastrophe of a step."""

    def __init__(self, fact: Fact) -> None:
        if not (callable(fact) or (isinstance(fact, str) and fact)):
            raise QAError(
                f"run_episodes got catastrophe={fact!r}; expected the name of an info key or a callable of a Step; "
                'give e.g. catastrophe="crashed"'
            )
        self.fact = fact
        self.seen = False
        self.keys: list[str] = []

    def __call__(self, step: Step) -> bool:
        if callable(self.fact):
            self.seen = True
            return bool(self.fact(step))
        if self.fact in step.info:
            self.seen = True
        else:
            self.keys = [key for key in step.info if not key.startswith("qa/")]
        return bool(step.info.get(self.fact, False))

    def check_seen(self) -> None:
        if not self.seen:
            raise QAError(
                f"the catastrophe {self.fact!r} never appeared in info; expected one of "
                f"{nearest(str(self.fact), self.keys) or 'its keys'}; name another key, or give a callable of a Step"
            )


def _copied(obs: Any) -> Any:
    return {key: np.array(value) for key, value in obs.items()} if isinstance(obs, dict) else np.array(obs)
