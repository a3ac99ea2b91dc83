"""Cells of the study's grid: each is an independent job, whose result is a line of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_qa.errors import QAError
from sb3_qa.evaluation import AnswerRecord
from sb3_qa.extras import need
from sb3_qa.study.arms import ARMS, plain_agent, train_arm
from sb3_qa.study.knowledge import Knowledge, probes
from sb3_qa.study.measure import (
    CALIBRATION_SEED,
    TEST_SEED,
    answers,
    oracle_veto,
    play,
    reward_of_answers,
    shadowed,
    summary,
    vetoes,
)
from sb3_qa.study.task import load_task

__all__ = ["Cell", "finished", "grid", "run_cell", "run_grid"]

Result = dict[str, Any]


class Cell(NamedTuple):
    """One run: an arm of a task, with a seed and a share of the labels."""

    task: str
    arm: str
    seed: int
    labels: float = 1.0
    quick: bool = False
    """A run of seconds, which shows that the machinery works and nothing else."""


def grid(tasks: Sequence[str], arms: Sequence[str], seeds: Iterable[int], labels: Sequence[float]) -> list[Cell]:
    """Cells of a grid, seed by seed, so that whatever is reached in time is balanced.

    Fewer labels make a difference to arms that answer only, and arms that are not there for an algorithm are left out.
    """
    on_policy = {name: issubclass(load_task(name).algorithm, OnPolicyAlgorithm) for name in tasks}
    cloned = {name for name in tasks if load_task(name).oracle is not None}
    return [
        Cell(task, arm, seed, share)
        for seed in seeds
        for task in tasks
        for share in labels
        for arm in arms
        if (share == 1.0 or (ARMS[arm].questions and not ARMS[arm].punished and on_policy[task]))
        and (on_policy[task] or not ARMS[arm].on_policy)
        and (arm != "oracle" or task in cloned)
    ]


def run_cell(cell: Cell, models: str | None = None) -> Result:
    """Train and measure one cell.

    :param models: folder of the plain agents that arms begin with
    :return: what :mod:`sb3_qa.study.measure` tells, as JSON takes it
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    task = load_task(cell.task)
    task = task.quickly() if cell.quick else task
    folder = None if models is None else Path(models)
    trained = train_arm(task, cell.arm, cell.seed, labels=cell.labels, folder=folder)
    result: Result = cell._asdict() | {
        "timesteps": task.timesteps,
        "train_seconds": trained.seconds,
        "parameters": trained.parameters,
        "curve": trained.curve,
        "solved_at": next((steps for steps, mean in trained.curve if mean >= task.solved), None),
    }
    qa, model = trained.answerer, trained.model
    if cell.arm == "oracle":
        result["oracle"] = oracle_veto(task, model)
        result["play"] = result["oracle"]["none"]
    elif qa is None:
        result["play"] = summary(play(task, model, TEST_SEED))
    else:
        learn, test = Knowledge(qa), Knowledge(qa)
        calm = play(task, model, CALIBRATION_SEED, shadowed(task, qa), learn)
        reference = play(task, model, TEST_SEED, shadowed(task, qa), test)
        result["play"] = summary(reference)
        result["answers"] = answers(test)
        if ARMS[cell.arm].shapes_agent:  # about the episodes of the plain one as well
            common = AnswerRecord(qa)
            play(task, plain_agent(task, cell.seed, folder), TEST_SEED, record=common)
            result["answers_common"] = answers(common)
        if cell.labels == 1.0:
            yes_no = [key for key, scores in result["answers"].items() if "brier_skill" in scores]
            if cell.arm in ("joint", "detached", "finetune"):
                taught = train_arm(task, "probe", cell.seed, before=model).answerer
                result["probes"] = probes(learn, test, yes_no, of_latents=True, taught=taught)
            if cell.arm in ("joint", "shaped"):
                result["judge"] = probes(learn, test, [task.risk], of_latents=False)
            result["vetoes"] = vetoes(task, model, qa, calm)
            if task.reward and not ARMS[cell.arm].punished:
                result["reward"] = reward_of_answers(task, trained, cell.seed)
    result["seconds"] = time.perf_counter() - started
    return _finite(result)


def _finite(value: Any) -> Any:
    """JSON has no nan: a score that the data cannot settle is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finished(path: Path) -> list[Result]:
    """Results in a file of JSON lines; a line that was being written when the power went is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_grid(
    cells: Sequence[Cell],
    path: Path,
    models: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run the cells that have no result yet, and add each result to the file as it comes.

    :param path: of the results, JSON lines
    :param models: folder of the plain agents
    :param workers: processes on this machine
    :param ray: address of a Ray cluster ("auto" for the one that is running), in place of processes
    :param tell: is told of each cell that is finished
    :return: all results of these cells
    :raises QAError: when the file holds something else
    """
    done = {_of(result): result for result in finished(path)}
    _repair(path)
    missing = [cell for cell in cells if cell not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    jobs = _on_ray(missing, str(models), ray) if ray is not None else _in_processes(missing, str(models), workers)
    for cell, result in jobs:
        if cell in done:
            continue
        done[cell] = result
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tell(f"{cell.task} {cell.arm} seed {cell.seed} labels {cell.labels:g}: {result['seconds']:.0f} s")
    return [done[cell] for cell in cells]


def _of(result: Result) -> Cell:
    try:
        return Cell(*(result[name] for name in Cell._fields))
    except (KeyError, TypeError) as error:
        raise QAError(
            f"the results hold a line without {error}; expected results of this study; give another path"
        ) from error


def _repair(path: Path) -> None:
    """Cut off half a line, so that what follows does not continue it."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def _in_processes(cells: Sequence[Cell], models: str, workers: int) -> Iterator[tuple[Cell, Result]]:
    if workers <= 1:
        yield from ((cell, run_cell(cell, models)) for cell in cells)
        return
    waiting, attempts = list(cells), 0
    while waiting:
        attempts += 1
        try:
            # A process for each cell: what one leaves behind (a Java machine, random streams) is no other's.
            with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
                futures = {pool.submit(run_cell, cell, models): cell for cell in waiting}
                for future in as_completed(futures):
                    result = future.result()
                    waiting.remove(futures[future])
                    yield futures[future], result
        except BrokenProcessPool:  # one was killed: those without a result are run again
            if attempts >= 3:
                raise


def _on_ray(cells: Sequence[Cell], models: str, address: str) -> Iterator[tuple[Cell, Result]]:
    ray = need("ray", "study", "the study, with ray=...,")
    if not ray.is_initialized():
        ray.init(address=address)
    remote: Any = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=False)(run_cell)
    running = {remote.remote(cell, models): cell for cell in cells}
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            yield running.pop(reference), ray.get(reference)
