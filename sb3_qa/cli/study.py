"""``python -m sb3_qa study``: run cells of the study's grid, and make the report of what has been run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from sb3_qa.study.arms import ARMS
from sb3_qa.study.report import write_report
from sb3_qa.study.run import finished, grid, run_grid
from sb3_qa.study.task import task_names

__all__ = ["main"]


@dataclass(frozen=True)
class Options:
    """Run the cells of a grid that have no result yet; then write the report of all results there are."""

    task: list[str] = field(default_factory=task_names)
    """tasks; see sb3_qa.study.tasks"""
    arm: list[str] = field(default_factory=lambda: list(ARMS))
    """arms; see sb3_qa.study.arms"""
    seed: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """seeds of the training runs"""
    labels: list[float] = field(default_factory=lambda: [1.0])
    """shares of the steps that have labels"""
    out: Path = Path("docs/study")
    """folder of results.jsonl, of the report and of its figures"""
    models: Path = Path("outputs/study")
    """folder of the agents without questions, which several arms begin with"""
    workers: int = 1
    """processes on this machine"""
    ray: str | None = None
    """address of a Ray cluster ("auto": the one that is running), in place of processes"""
    quick: bool = False
    """runs of seconds, which show that the machinery works and nothing else"""
    report: bool = True
    """write the report"""


def main(argv: list[str]) -> None:
    """Run what is missing, and write the report."""
    options = tyro.cli(Options, args=argv, prog="python -m sb3_qa study")
    console = Console(highlight=False)
    cells = [
        cell._replace(quick=options.quick) for cell in grid(options.task, options.arm, options.seed, options.labels)
    ]
    path = options.out / "results.jsonl"
    run_grid(cells, path, options.models, workers=options.workers, ray=options.ray, tell=console.print)
    if options.report:
        console.print(f"{write_report(finished(path), options.out)} tells what came of it")
