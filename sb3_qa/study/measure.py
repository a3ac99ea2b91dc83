"""What is measured of a trained arm: how it plays, how good its answers are, what its veto averts, what its reward teaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.bounds import fixed_sequence
from sb3_qa.evaluation import AnswerRecord, Episodes, run_episodes, score_answers, seeded_vec_env
from sb3_qa.shadow import ShadowEpisodes, episode_record
from sb3_qa.study.arms import Trained, train_arm
from sb3_qa.study.oracle import oracle_vec_env
from sb3_qa.study.task import Task
from sb3_qa.wrappers import VecRandomVeto, VecShapeReward, VecVetoAction

__all__ = [
    "CALIBRATION_SEED",
    "CONFIDENCE",
    "MISS_RATE",
    "RATES",
    "TEST_SEED",
    "answers",
    "certified_threshold",
    "flagging_threshold",
    "oracle_veto",
    "play",
    "reward_of_answers",
    "shadowed",
    "summary",
    "vetoes",
]

CALIBRATION_SEED, TEST_SEED = 50_000, 10_000  # of the first episode; training uses small seeds
RATES = (0.02, 0.05, 0.10)
"""Shares of the steps that are flagged in episodes without a veto, at which the arms' vetoes are compared."""
MISS_RATE, CONFIDENCE = 0.2, 0.95
"""Of the certified thresholds at which they are compared too."""
GRID = 1.0 / (1.0 + np.exp(-np.linspace(-8.0, 8.0, 321)))  # thresholds, evenly spread in the odds

Wrap = Callable[[VecEnv], VecEnv]


def play(
    task: Task, model: BaseAlgorithm, seed: int, wrap: Wrap | None = None, record: AnswerRecord | None = None
) -> Episodes:
    """Let a model play the task's number of episodes, with sampled actions, as in training.

    :param seed: of the first episode, and of the actions
    :param wrap: puts a veto around the environments
    """
    venv = task.evaluation_env(seed)
    return _played(task, model, seed, venv if wrap is None else wrap(venv), task.episodes, record)


def oracle_veto(task: Task, model: BaseAlgorithm) -> dict[str, dict[str, float]]:
    """Episodes in the task's Python environments, without a veto and with that of its oracle, from the same seeds."""
    n = task.oracle_episodes
    free = seeded_vec_env(task.make, task.n_envs, TEST_SEED)
    vetoed = oracle_vec_env(task, model, task.n_envs, TEST_SEED)
    return {
        name: summary(_played(task, model, TEST_SEED, venv, n)) for name, venv in (("none", free), ("veto", vetoed))
    }


def _played(
    task: Task, model: BaseAlgorithm, seed: int, venv: VecEnv, n: int, record: AnswerRecord | None = None
) -> Episodes:
    torch.manual_seed(seed)
    episodes = run_episodes(model, venv, n, catastrophe=task.catastrophe, record=record)
    venv.close()
    return episodes


def summary(episodes: Episodes) -> dict[str, float]:
    """Means over episodes; the share with a catastrophe; steps vetoed per step; catastrophe-free episodes with a veto."""
    bad = episodes.catastrophes > 0
    calm = ~bad
    return {
        "episodes": len(episodes),
        "return": float(episodes.returns.mean()),
        "length": float(episodes.lengths.mean()),
        "catastrophes": float(bad.mean()),
        "veto_rate": float(episodes.vetoes.sum() / episodes.lengths.sum()),
        "disrupted": float((episodes.vetoes[calm] > 0).mean()) if calm.any() else math.nan,
    }


def answers(record: AnswerRecord) -> dict[str, dict[str, float]]:
    """Scores of each instance, with its ``skill``: the share of a constant answer's error that the answers remove.

    The error is the Brier score of yes/no questions and choices, and the absolute error of numbers.
    """
    table = score_answers(record)
    for scores in table.values():
        name = "brier" if "brier" in scores else "error"
        constant = scores[f"constant_{name}"]
        scores["skill"] = 1.0 - scores[name] / constant if constant > 0 else math.nan
    return table


def certified_threshold(episodes: Episodes, miss_rate: float = MISS_RATE, window: int | None = None) -> float | None:
    """The highest threshold that :func:`sb3_qa.certify` would claim from these episodes, which no veto was in; None if none.

    :param window: how many steps before a catastrophe a flag may stand to count; None for any number
    """
    watched = ShadowEpisodes(len(GRID), {})
    watched.add([episode_record(trace, GRID, 1, window) for trace in episodes.traces])
    index = fixed_sequence(watched.misses, watched.catastrophes, miss_rate, CONFIDENCE) - 1
    return float(GRID[index]) if index >= 0 else None


def flagging_threshold(risks: NDArray[np.float32], rate: float) -> float:
    """The lowest threshold that flags at most a share of the steps, whose risks (n,) may be equal in many of them.

    >>> flagging_threshold(np.float32([0.1, 0.2, 0.2, 0.5]), 0.5)
    0.5
    """
    ordered = np.sort(risks)
    values, first = np.unique(ordered, return_index=True)
    fits = values[len(ordered) - first <= rate * len(ordered) + 1e-9]
    return float(fits[0] if len(fits) else np.nextafter(values[-1], np.inf, dtype=risks.dtype))


def vetoes(task: Task, model: BaseAlgorithm, qa: QuestionAnswerer, calm: Episodes) -> list[dict[str, Any]]:
    """Episodes under a veto by an arm's answers, and under as many vetoes at random.

    :param calm: episodes without a veto, in which the risks were told: thresholds are chosen by them
    :return: a row for each of :data:`RATES` and for the certified threshold
    """
    risks = np.concatenate([trace.risk for trace in calm.traces])
    wanted: list[tuple[str, float | None]] = [(f"{rate:g}", flagging_threshold(risks, rate)) for rate in RATES]
    wanted.append(("certified", certified_threshold(calm)))
    rows = []
    for name, threshold in wanted:
        row: dict[str, Any] = {"at": name, "threshold": threshold}
        if threshold is not None:
            ask: dict[str, Any] = dict(question=task.risk, qa=qa)
            limit = min(max(threshold, 1e-6), 1.0)
            row["flagged"] = float((risks >= limit).mean())
            vetoed = play(task, model, TEST_SEED, partial(VecVetoAction, threshold=limit, **ask))
            row["veto"] = summary(vetoed)
            chance = partial(VecRandomVeto, rate=row["veto"]["veto_rate"], seed=0, **ask)
            row["random"] = summary(play(task, model, TEST_SEED, chance))
        rows.append(row)
    return rows


def shadowed(task: Task, qa: QuestionAnswerer) -> Wrap:
    """What tells the risks, and never interferes."""
    return partial(VecVetoAction, question=task.risk, threshold=1.0, shadow=True, qa=qa)


def reward_of_answers(task: Task, trained: Trained, seed: int) -> dict[str, Any]:
    """Train a fresh agent on a reward made of an arm's answers alone, and judge it by the environment's own."""
    env = VecShapeReward(task.training_env(seed + 500), rewards=dict(task.reward), mode="replace", qa=trained.answerer)
    fresh = train_arm(task, "plain", seed + 500, env=env)
    return summary(play(task, fresh.model, TEST_SEED)) | {"seconds": fresh.seconds}
