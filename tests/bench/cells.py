"""Runs that are kept, one line of JSON each, and not repeated."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["completed", "wanted_seeds"]


def wanted_seeds(doc: str, n: int, first: int = 0) -> range:
    """The seeds that the command line asks for; torch keeps to one thread from now on.

    :param doc: of the bench, whose first line says what it is
    :param n: how many, unless ``--seeds`` says otherwise
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=n)
    torch.set_num_threads(1)
    return range(first, first + parser.parse_args().seeds)


def completed(
    path: Path, names: Sequence[str], cells: Iterable[tuple[Any, ...]], run: Callable[..., dict[str, Any]]
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of all cells, by cell; those that are missing are run, and appended to the file.

    :param names: what each entry of a cell is called in its row
    :param run: from the entries of a cell to what was measured
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(row[name] for name in names): row for row in rows}
    for cell in cells:
        if cell not in done:
            done[cell] = row = {**dict(zip(names, cell, strict=True)), **run(*cell)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return done
