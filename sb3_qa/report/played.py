"""The episodes of a report: watched without interfering, then with the veto acting, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.evaluation import AnswerRecord, Episodes, run_episodes
from sb3_qa.questions import Instance, YesNo, nearest
from sb3_qa.scores import Interval, bootstrap_interval, wilson_interval
from sb3_qa.shadow import CatastropheOf, ShadowEpisodes, episode_record
from sb3_qa.truth import Fact, Step
from sb3_qa.wrappers import VecVetoAction

__all__ = ["MakeEnv", "Plan", "Played", "Threshold", "changed", "play", "thresholds", "warned"]

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
LEAD = 1  # the decision that leads into a catastrophe is the last whose flag counts, as in certify()


class MakeEnv(Protocol):
    """Makes environments as the policy sees them, seeded so that episode ``e`` has the seed ``seed + e``."""

    def __call__(self, n_envs: int, seed: int, render: str | bool) -> VecEnv: ...


@dataclass(frozen=True)
class Plan:
    """What is to be played.

    :param episodes: how many, of each kind
    :param seed: of the first episode
    :param n_envs: environments side by side
    :param question: the instance whose answer is the risk; the first yes/no question about ``{action}`` if None
    :param threshold: from which risk on an action is flagged, and vetoed
    :param catastrophe: an ``info`` key or a callable of a Step; the fact of that question if None
    :param deterministic: let the agent take the action that it likes best
    :param act: play the episodes a second time, with the veto acting
    :raises QAError: when a number is out of its range
    """

    episodes: int = 100
    seed: int = 0
    n_envs: int = 8
    question: str | None = None
    threshold: float = 0.5
    catastrophe: Fact | None = None
    deterministic: bool = False
    act: bool = True

    def __post_init__(self) -> None:
        for name in ("episodes", "n_envs"):
            if getattr(self, name) < 1:
                raise QAError(f"the report got {name}={getattr(self, name)}; expected at least 1; give e.g. 100")
        if not 0.0 <= self.threshold <= 1.0:
            raise QAError(f"the report got threshold={self.threshold}; expected one in [0, 1]; give e.g. 0.5")


@dataclass(frozen=True, eq=False)
class Played:
    """What was played."""

    plan: Plan
    qa: QuestionAnswerer
    risk: Instance | None
    """The question whose answer is the risk; None where none is about an action."""
    watched: Episodes
    """Nobody interfered."""
    acting: Episodes | None
    """From the same seeds, with the veto acting."""
    record: AnswerRecord
    """Of the watched ones."""


class Threshold(dict[str, Any]):
    """What a veto at one threshold would have met, in the watched episodes."""


def play(agent: Any, make: MakeEnv, plan: Plan) -> Played:
    """Play the episodes.

    :param agent: with ``predict`` as an SB3 model, and ``qa`` and ``model``, as :class:`sb3_qa.cli.agents.Agent`
    :raises QAError: when the question or the catastrophe is not there
    """
    qa: QuestionAnswerer = agent.qa
    risk = _risk(qa, plan.question)
    own = CatastropheOf(qa, agent.model, risk.key) if risk is not None and plan.catastrophe is None else None
    fact: Fact = plan.catastrophe or own or _never
    record = AnswerRecord(qa)

    def played(wrap: Callable[[VecEnv], VecEnv], kept: AnswerRecord | None) -> Episodes:
        env = wrap(make(min(plan.n_envs, plan.episodes), plan.seed, False))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(plan.seed)
                return run_episodes(
                    agent, env, plan.episodes, catastrophe=fact, deterministic=plan.deterministic, record=kept
                )
        finally:
            env.close()

    if risk is None:
        return Played(plan, qa, None, played(lambda env: env, record), None, record)
    key = risk.key
    watched = played(lambda env: VecVetoAction(env, key, plan.threshold, shadow=True, qa=qa), record)
    if own is not None:
        own.check_seen()
    acting = played(lambda env: VecVetoAction(env, key, plan.threshold, qa=qa), None) if plan.act else None
    return Played(plan, qa, risk, watched, acting, record)


def thresholds(played: Played) -> list[Threshold]:
    """For some thresholds, what a veto would have stopped: counts and 95 % Wilson intervals over the watched episodes."""
    grid = np.array(sorted({*GRID, played.plan.threshold}))
    watched = ShadowEpisodes(len(grid), {})
    watched.add([episode_record(trace, grid, LEAD, None) for trace in played.watched.traces])
    bad = watched.catastrophes
    columns = grid, bad - watched.misses, watched.false_alarms, watched.flagged_steps
    return [
        Threshold(
            threshold=threshold,
            warned=_share(n_warned, bad),
            n_warned=n_warned,
            false=_share(n_false, watched.episodes - bad),
            n_false=n_false,
            flags_per_1000=1000.0 * flags / max(watched.steps, 1),
        )
        for threshold, n_warned, n_false, flags in zip(*(column.tolist() for column in columns), strict=True)
    ]


def warned(played: Played) -> NDArray[np.bool_]:
    """Of each watched episode, whether a flag came in time: before its first catastrophe, or at all if it has none."""
    at = np.array([played.plan.threshold])
    return np.array([episode_record(trace, at, LEAD, None)["level"] > 0 for trace in played.watched.traces])


def changed(played: Played) -> dict[str, tuple[int, Interval]]:
    """What the veto did, seed by seed: counts, and means per episode with 95 % bootstrap intervals over episodes."""
    assert played.acting is not None
    before, after = played.watched, played.acting
    was, is_ = before.catastrophes > 0, after.catastrophes > 0
    vetoed = after.vetoes > 0
    counts = {"averted": was & ~is_, "brought about": ~was & is_, "disrupted": ~was & vetoed}
    told = {name: (int(where.sum()), bootstrap_interval(where.astype(float))) for name, where in counts.items()}
    difference = after.returns - before.returns
    quiet = difference[~was & vetoed]
    told["return"] = (len(difference), bootstrap_interval(difference))
    told["return of disrupted"] = (
        len(quiet),
        bootstrap_interval(quiet) if len(quiet) else Interval(np.nan, np.nan, np.nan),
    )
    return told


def _share(n: int, of: int) -> Interval:
    low, high = wilson_interval(n, of)
    return Interval(n / of if of else float("nan"), float(low), float(high))


def _risk(qa: QuestionAnswerer, key: str | None) -> Instance | None:
    fitting = {
        each.key: each
        for each in qa.catalogue.instances.values()
        if each.per_action and isinstance(each.question.answer, YesNo) and each.question.truth.operator != "steps_until"
    }
    if key is None:
        events = [each for each in fitting.values() if each.question.truth.operator == "eventually"]
        return next(iter([*events, *fitting.values()]), None)
    if key not in fitting:
        raise QAError(
            f"--question got {key!r}; expected a yes/no question about {{action}}, one of {nearest(key, fitting)}; leave it out to take "
            "the first"
        )
    return fitting[key]


def _never(step: Step) -> bool:
    return False
