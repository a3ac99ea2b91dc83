"""What is logged: scores of the answers, and what the wrappers told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from sb3_qa import scores
from sb3_qa.answerer import Reading
from sb3_qa.answers import Answer, ChoiceAnswer, YesNoAnswer
from sb3_qa.callbacks.pictures import Pictures
from sb3_qa.head import QAHead, decode
from sb3_qa.joint import question_losses
from sb3_qa.labels import Cuts, LabelStore
from sb3_qa.panel import Panel
from sb3_qa.questions import Catalogue, Instance

__all__ = ["EpisodeLog", "compare_averages", "room_until", "score_questions", "truths"]

MOST_INSTANCES = 48  # that answers are scored of, where there are many
MOST_SCORED = 2048  # transitions of a rollout that answers are scored on


class EpisodeLog:
    """Collects what wrappers tell in ``info``: flags, vetoes, raw and shaped return.

    :param n_envs: number of environments
    """

    def __init__(self, n_envs: int) -> None:
        self._returns = np.zeros((2, n_envs))
        self._clear()

    def _clear(self) -> None:
        self._flags: dict[str, list[bool]] = {"qa/catastrophe": [], "qa/vetoed": []}
        self._finished: list[NDArray[np.float64]] = []

    def step(self, infos: Sequence[Mapping[str, Any]], rewards: NDArray[Any], dones: NDArray[np.bool_]) -> None:
        """Take in one step of every environment, with the rewards the agent is given."""
        for key, told in self._flags.items():
            told.extend([info[key] for info in infos if key in info])
        if any("qa/raw_reward" in info for info in infos):
            for i, info in enumerate(infos):
                self._returns[:, i] += info.get("qa/raw_reward", rewards[i]), rewards[i]
                if dones[i]:
                    self._finished.append(self._returns[:, i].copy())
                    self._returns[:, i] = 0.0

    def log(self, logger: Any) -> None:
        """Record, and begin anew."""
        for key, name in (("qa/catastrophe", "qa/catastrophe_rate"), ("qa/vetoed", "qa/veto_rate")):
            if self._flags[key]:
                logger.record(name, float(np.mean(self._flags[key])))
        if self._finished:
            raw, shaped = np.mean(self._finished, axis=0)
            logger.record("qa/raw_return", float(raw))
            logger.record("qa/shaped_return", float(shaped))
        self._clear()


def score_questions(
    logger: Any,
    catalogue: Catalogue,
    store: LabelStore,
    rows: NDArray[np.intp],
    reading: Reading,
    actions: NDArray[Any],
    room: NDArray[np.int64],
    pictures: Pictures | None = None,
) -> None:
    """Score answers about transitions that the agent has not been trained on yet.

    A question's figures are the means over its instances.

    :param rows: (n,) of the store
    :param reading: of their observations
    :param actions: (n, *action_shape), as executed
    :param room: (n,) number of steps from each row to the cut its future runs into
    :param pictures: what is to be drawn of them
    """
    panel = None
    scored: dict[str, list[Instance]] = {}
    for each in catalogue.instances.values():
        scored.setdefault(each.question.name, []).append(each)
    if store.panel is not None:  # of many questions, some of those that this rollout was labelled with
        scored = _some(scored, catalogue, {*store.times, *store.values})
        panel = Panel(
            list({id(t): t for each in scored.values() for i in each for t in [catalogue.target_of[i.key]]}.values())
        )
    about_action = reading.action_logits(actions, panel) if store.features is not None else None
    about_states = reading.state_logits(panel)
    drawn: set[int] = set()
    offset = catalogue.n_state_logits if panel is None else panel.n_state
    for question in catalogue.questions:
        figures: dict[str, list[float]] = {}
        for instance in scored.get(question.name, []):
            target = catalogue.target_of[instance.key]
            target = target if panel is None else panel.place_of(target)
            if instance.per_action:
                assert about_action is not None
                logits = about_action[:, target.start - offset : target.stop - offset]
            else:
                logits = about_states[:, target.start : target.stop]
            truth = truths(instance, store, catalogue, rows, room)
            known = ~np.isnan(truth)
            if known.any():
                answer = decode(instance, logits[known])
                for name, figure in _figures(answer, truth[known]).items():
                    figures.setdefault(name, []).append(figure)
                if pictures is not None:
                    pictures.see(instance, answer, truth[known])
            if pictures is not None and target.kind == "event" and target.start not in drawn:
                drawn.add(target.start)  # horizons of one curve
                told = store.times[catalogue.target_of[instance.key].start]
                pictures.see_curves(instance, logits, told.known[rows], told.event[rows])
        for name, values in figures.items():
            finite = [value for value in values if np.isfinite(value)]
            if finite:
                logger.record(f"qa/{question.name}/{name}", float(np.mean(finite)))


@torch.no_grad()
def compare_averages(
    head: QAHead, store: LabelStore, rows: NDArray[np.intp], reading: Reading, actions: NDArray[Any]
) -> None:
    """Let those weights answer that foretell best what has come since they were learnt, see :meth:`QAHead.compare`.

    By what is known alone: how a future goes on beyond a cut is what the present weights say.

    :param rows: (n,) of the store
    :param reading: of their observations
    :param actions: (n, *action_shape), as executed
    """
    y, weight = (torch.from_numpy(each) for each in store.dense(rows, beyond=False))
    read = [None if x is None else torch.as_tensor(x, device=head.flat.device) for x in reading.inputs(actions)]

    def loss(flat: torch.Tensor) -> float:
        logits = functional_call(head, {"flat": flat}, tuple(read))
        return float(question_losses(head, logits.cpu(), y, weight).mean())

    head.compare(loss)


def _some(
    instances: Mapping[str, list[Instance]], catalogue: Catalogue, labelled: set[int]
) -> dict[str, list[Instance]]:
    """At most ``MOST_INSTANCES`` of those that have labels, shared out among the questions."""
    kept = {
        name: [instance for instance in each if catalogue.target_of[instance.key].start in labelled]
        for name, each in instances.items()
    }
    kept = {name: each for name, each in kept.items() if each}
    share = max(MOST_INSTANCES // max(len(kept), 1), 1)
    return {name: each[:: -(-len(each) // share)] for name, each in kept.items()}


def truths(
    instance: Instance, store: LabelStore, catalogue: Catalogue, rows: NDArray[np.intp], room: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What turned out to be true of each row, nan where it is not known.

    Rows whose window does not fit before the cut are left out whatever happened in it, as keeping only their early
    events would make events look frequent.

    :param room: (len(rows),) number of steps from each row to the cut its future runs into
    """
    target = catalogue.target_of[instance.key]
    if target.kind in ("choice", "number"):
        return store.values[target.start][rows]
    known, event = (each[rows] for each in store.times[target.start])
    if target.kind == "yesno":
        return np.where(known > 0, event, np.nan).astype(np.float32)
    assert instance.horizon is not None
    if instance.question.truth.operator == "steps_until":
        truth = np.minimum(known, instance.horizon).astype(np.float32)
        truth[~event] = instance.horizon
    else:
        happens = event & (known <= instance.horizon)
        truth = (happens if instance.question.truth.event_when else ~happens).astype(np.float32)
    truth[room < instance.horizon] = np.nan
    return truth


def _figures(answer: Answer, truth: NDArray[np.float32]) -> dict[str, float]:
    if isinstance(answer, YesNoAnswer):
        p = answer.probability
        return {
            "accuracy": float(np.mean((p > 0.5) == (truth > 0.5))),
            "brier": scores.brier(p, truth),
            "auroc": scores.auroc(p, truth),
            "base_rate": float(np.mean(truth)),
        }
    if isinstance(answer, ChoiceAnswer):
        p = answer.probabilities.astype(np.float64)
        option = truth.astype(np.intp)
        p /= p.sum(axis=1, keepdims=True)
        base_rate = np.bincount(option).max() / len(option)
        return {
            "accuracy": scores.accuracy(p, option),
            "brier": scores.brier_choice(p, option),
            "base_rate": float(base_rate),
        }
    return {"error": scores.absolute_error(answer.value, truth)}


def room_until(cuts: Cuts) -> NDArray[np.int64]:
    """Steps (n_steps, n_envs) from each row to where its future is cut, or to the end of the recording if its episode
    terminates before.
    """
    n_steps, n_envs = cuts.row.shape
    end = np.full((n_steps, n_envs), n_steps - 1)
    cut = cuts.row >= 0
    end[cut] = cuts.step[cuts.row[cut]]
    room: NDArray[np.int64] = end - np.arange(n_steps)[:, None] + 1
    return room
