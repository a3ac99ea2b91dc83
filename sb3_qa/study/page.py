"""Markdown of the report: intervals as they are shown, tables, and what is folded away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sb3_qa.scores import Interval

__all__ = ["folded", "shown", "table"]


def shown(interval: Interval | None, digits: int) -> str:
    """An estimate with its interval, where there are enough runs for one."""
    if interval is None:
        return "–"
    around = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if np.isfinite(interval.low) else ""
    return f"{interval.estimate:.{digits}f}{around}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A table without the rows that tell nothing.

    :param names: columns at the left that say what a row is about
    """
    told = [row for row in rows if any(cell != "–" for cell in row[names:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *told])


def folded(summary: str, text: str) -> str:
    """Text that is read on demand."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"
