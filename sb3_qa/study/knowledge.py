"""What an agent knew, by probes that are fitted afterwards; and a judge that shares nothing with it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import maybe_transpose

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.evaluation import AnswerRecord

__all__ = ["Knowledge", "probes"]

MOST_PROBED = 12_000  # decisions that probes are fitted to


class Knowledge(AnswerRecord):
    """Keeps what the agent knew too: its latents at every decision, and the observation, for probes of other kinds."""

    def __init__(self, qa: QuestionAnswerer) -> None:
        super().__init__(qa)
        self.kept: list[tuple[NDArray[Any], ...]] = []

    def step(self, obs: Any, steps: Any, episode: NDArray[np.intp], elapsed: NDArray[np.intp]) -> None:
        super().step(obs, steps, episode, elapsed)
        taps, counted = self.qa.policy.qa_taps, np.flatnonzero(episode >= 0)
        latents = taps.join(taps.read(self.qa.policy, maybe_transpose(obs, self.qa.policy.observation_space)))
        actions = np.stack([np.ravel(step.action) for step in steps]).astype(np.float32)
        space = self.qa.policy.action_space
        if hasattr(space, "n"):
            actions = np.eye(int(space.n), dtype=np.float32)[actions[:, 0].astype(np.intp) - int(space.start)]
        parts = latents, np.asarray(obs, np.float32).reshape(len(latents), -1), actions
        self.kept.append((episode[counted], elapsed[counted], *(part[counted] for part in parts)))

    def features(self, of_latents: bool) -> tuple[dict[tuple[int, int], int], NDArray[Any], NDArray[Any]]:
        """The row of each decision, by its episode and step; what was known, or seen, there; and the actions."""
        episode, elapsed, latents, obs, actions = (np.concatenate(column) for column in zip(*self.kept, strict=True))
        place = {pair: n for n, pair in enumerate(zip(episode.tolist(), elapsed.tolist(), strict=True))}
        return place, latents if of_latents else obs, actions


def probes(
    learn: Knowledge,
    test: Knowledge,
    keys: Iterable[str],
    *,
    of_latents: bool,
    taught: QuestionAnswerer | None = None,
) -> dict[str, dict[str, float]]:
    """Fit probes afterwards, with ample labels, on what the agent knew in ``learn``, and score the best of them in ``test``.

    For yes/no instances: logistic regression, gradient-boosted trees, and a head that was taught afterwards; which is best is
    decided by a fifth of ``learn`` that is held out, by episodes.

    :param of_latents: on the agent's latents; otherwise on observations, as a judge that shares nothing with it
    :param taught: the same agent with a head that was taught afterwards, on other episodes
    :return: by instance, the ``brier`` score and ``skill`` of the best probe and of the answers (``own_...``), the means of
        what both said (``said``, ``own_said``), and how often it was so (``frequency``)
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    wanted, table = set(keys), {}
    place, known, actions = learn.features(of_latents)
    test_place, test_known, test_actions = test.features(of_latents)
    if not of_latents:
        telling = _telling(known)
        known, test_known = known[:, telling], test_known[:, telling]
    scored = {each.instance.key: each for each in test.answered() if each.instance.key in wanted}
    by_head = [{} if taught is None else _said(record, taught, wanted) for record in (learn, test)]
    for each in learn.answered():
        key = each.instance.key
        if key not in scored:
            continue
        x, y, group = _inputs(each, place, known, actions), each.truth > 0.5, each.episode
        head = by_head[0].get(key)
        if len(y) > MOST_PROBED:
            chosen = rng.choice(len(y), MOST_PROBED, replace=False)
            x, y, group = x[chosen], y[chosen], group[chosen]
            head = None if head is None else head[chosen]
        there = scored[key]
        x_test, truth = _inputs(there, test_place, test_known, test_actions), there.truth > 0.5
        held = group % 5 == 0
        if min(np.bincount(y[~held], minlength=2).min(), np.bincount(y[held], minlength=2).min()) < 5:
            continue  # too rare to be learnt
        candidates = [
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
            HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=0),
        ]
        errors = []
        with warnings.catch_warnings():  # one that has not converged is judged by what is held out, as any other
            warnings.simplefilter("ignore", ConvergenceWarning)
            for candidate in candidates:
                candidate.fit(x[~held], y[~held])
                errors.append(np.mean((candidate.predict_proba(x[held])[:, 1] - y[held]) ** 2))
            if head is not None and np.mean((head[held] - y[held]) ** 2) < min(errors):
                said = by_head[1][key]
            else:
                said = candidates[int(np.argmin(errors))].fit(x, y).predict_proba(x_test)[:, 1]
        own: Any = there.answer
        constant = float(truth.mean() * (1.0 - truth.mean()))
        brier, own_brier = float(np.mean((said - truth) ** 2)), float(np.mean((own.probability - truth) ** 2))
        table[key] = {
            "brier": brier,
            "own_brier": own_brier,
            "skill": 1.0 - brier / constant if constant else math.nan,
            "own_skill": 1.0 - own_brier / constant if constant else math.nan,
            "said": float(said.mean()),
            "own_said": float(own.probability.mean()),
            "frequency": float(truth.mean()),
        }
    return table


def _said(record: AnswerRecord, qa: QuestionAnswerer, keys: Container[str]) -> dict[str, NDArray[np.float32]]:
    """The probabilities that somebody else gives in the same decisions, by yes/no instance."""
    other = copy.copy(record)
    other.qa = qa
    answered: Iterable[Any] = other.answered()
    return {each.instance.key: each.answer.probability for each in answered if each.instance.key in keys}


def _telling(seen: NDArray[Any]) -> NDArray[np.intp]:
    """Columns that vary, and of equal ones the first: of an image's pixels, a tenth may be left for trees to be grown on."""
    varying = np.flatnonzero((seen != seen[0]).any(axis=0))
    first: dict[bytes, int] = {}
    for column in varying.tolist():
        first.setdefault(np.ascontiguousarray(seen[:, column]).tobytes(), column)
    return np.array(list(first.values()), np.intp)


def _inputs(each: Any, place: Any, known: NDArray[Any], actions: NDArray[Any]) -> NDArray[Any]:
    pairs = zip(each.episode.tolist(), each.elapsed.tolist(), strict=True)
    rows = np.fromiter((place[pair] for pair in pairs), np.intp, len(each.episode))
    return np.concatenate([known[rows], actions[rows]], axis=1) if each.instance.per_action else known[rows]
