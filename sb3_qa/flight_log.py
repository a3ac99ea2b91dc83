"""Reading a flight record: which flags, vetoes and catastrophes there were, and what stood around each.

>>> log = FlightLog("flight.sqlite")  # doctest: +SKIP
>>> log.events()[-1].risk, log.window(log.events()[-1].id).obs  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_qa.errors import QAError
from sb3_qa.recorder import APPLICATION, FORMAT, Event, unpack

__all__ = ["FlightEvent", "FlightLog", "Window"]

KINDS = ("flag", "veto", "let through", "withheld", "no safe action", "CATASTROPHE", "terminated")


@dataclass(frozen=True)
class FlightEvent:
    """An event, as :class:`~sb3_qa.recorder.Event` has it, with what was JSON there as it was."""

    id: int
    run: int
    time: float
    env: int
    episode: int
    step: int
    seed: int | None
    since_seed: int
    flagged: bool
    vetoed: bool
    let_through: bool
    probability: float
    withheld: bool
    no_safe_action: bool
    catastrophe: bool | None
    terminated: bool
    truncated: bool
    risk: float | None
    executed_risk: float | None
    proposed: Any
    executed: Any
    answers: dict[str, Any]
    """By instance: a number or an option, or a list of them, one for each of the actions compared."""
    risks: NDArray[np.float32]
    """(m,), of all actions, or of those compared."""
    actions: NDArray[Any] | None
    """(m, *action_shape), the actions compared; None for all of a discrete space."""
    outcome: bool | None
    """Of a flag: whether the catastrophe came within the question's horizon; None where that is not known."""

    @property
    def kinds(self) -> list[str]:
        """What happened, in words."""
        held = (
            self.flagged and not (self.vetoed or self.let_through or self.withheld),
            self.vetoed,
            self.let_through,
            self.withheld,
            self.no_safe_action,
            bool(self.catastrophe),
            self.terminated and self.catastrophe is None,
        )
        return [word for word, holds in zip(KINDS, held, strict=True) if holds]


@dataclass(frozen=True)
class Window:
    """Consecutive steps of one episode around an event."""

    step: NDArray[np.int64]
    """(n,), of the episode."""
    obs: Any
    """(n, ...), where each action was chosen; a dict of them for Dict observations."""
    proposed: NDArray[Any]
    executed: NDArray[Any]
    risk: NDArray[np.float32]
    reward: NDArray[np.float32]
    frames: NDArray[np.uint8] | None
    """(n, height, width, 3), where they were recorded of all."""
    last_obs: Any
    """The state that ended the episode, if it ended here."""


class FlightLog:
    """A flight record, opened for reading; it may be written to meanwhile.

    :raises QAError: when there is none at this path
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        if not os.path.isfile(self.path):
            raise QAError(
                f"there is no flight record {self.path}; expected a file written by VecVetoAction(..., record=path); check the path"
            )
        try:
            self._db = _opened(self.path)
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            counts = dict(self._db.execute("SELECT name, value FROM counts")) if application == APPLICATION else {}
        except sqlite3.Error as error:
            raise QAError(f"{self.path} cannot be read ({error}); expected a flight record; check the path") from error
        if counts.get("format") != FORMAT:
            raise QAError(
                f"{self.path} is not a flight record of format {FORMAT}; expected a file written by VecVetoAction(..., record=path); "
                "check the path"
            )

    def __enter__(self) -> FlightLog:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def __len__(self) -> int:
        (n,) = self._db.execute("SELECT count(*) FROM events").fetchone()
        return int(n)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def counts(self) -> dict[str, int]:
        """Events that were ``dropped`` for others, as the file is bounded, and ``lost``, as it could not be written to."""
        found = dict(self._db.execute("SELECT name, value FROM counts"))
        return {name: int(found[name]) for name in ("dropped", "lost")}

    def runs(self) -> dict[int, dict[str, Any]]:
        """What is known of each run: when it ``started``, its ``process``, and the options of the veto.

        Beside them stand the ``digests`` (SHA-256) of the answerer's ``weights`` and ``questions`` when it began, as a certificate
        has them, and, where the threshold is a certificate, its ``claim``.
        """
        rows = self._db.execute("SELECT id, started, process, about FROM runs ORDER BY id")
        return {row[0]: {"started": row[1], "process": row[2], **json.loads(row[3])} for row in rows}

    def events(self) -> list[FlightEvent]:
        """All events, in the order of their time."""
        return [_event(row) for row in self._db.execute(f"{_SELECT} ORDER BY time, id")]

    def event(self, number: int) -> FlightEvent:
        """One event.

        :raises QAError: when there is none of this number
        """
        row = self._db.execute(f"{_SELECT} WHERE id = ?", (number,)).fetchone()
        if row is None:
            first, last = self._db.execute("SELECT min(id), max(id) FROM events").fetchone()
            known = "none, as it is empty" if first is None else f"a number from {first} to {last}"
            raise QAError(f"{self.path} has no event {number}; expected {known}; list them without a number")
        return _event(row)

    def window(self, number: int, before: int | None = None, after: int | None = None) -> Window | None:
        """The steps around an event, as far as they were recorded without a gap; None if none were.

        :param before: at most as many steps before it; None for all there are
        :param after: and after it
        """
        event = self.event(number)
        rows = self._db.execute(
            "SELECT chunks.first, chunks.length, chunks.names, chunks.data FROM chunks JOIN events ON events.id = chunks.event "
            "WHERE events.run = ? AND events.env = ? AND events.episode = ? ORDER BY chunks.first, chunks.length",
            (event.run, event.env, event.episode),
        )
        pieces: list[dict[str, Any]] = []
        last: Any = None
        upto = None
        for first, length, names, data in rows:
            if upto is not None and first != upto:  # a gap
                if upto > event.step:
                    break
                pieces, last = [], None
            arrays = unpack(json.loads(names), data)
            last = {name: array for name, array in arrays.items() if name.split("/")[0] == "last"} or last
            if length:
                arrays["step"] = np.arange(first, first + length)
                pieces.append(arrays)
            upto = first + length
        pieces = [piece for piece in pieces if "risk" in piece]
        if not pieces or upto is None or upto <= event.step:
            return None
        names_of_all = [
            name for name in pieces[0] if all(name in piece for piece in pieces) and not name.startswith("last")
        ]
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in names_of_all}
        low = 0 if before is None else event.step - before
        high = upto if after is None else event.step + after + 1
        chosen = (whole["step"] >= low) & (whole["step"] < high)
        whole = {name: array[chosen] for name, array in whole.items()}
        columns = {name: whole[name] for name in ("step", "proposed", "executed", "risk", "reward")}
        ending = None if last is None or high < upto else _joined(last, "last")
        return Window(obs=_joined(whole, "obs"), frames=whole.get("frames"), last_obs=ending, **columns)

    def flags(self) -> dict[str, NDArray[Any]]:
        """Of every flag what :func:`sb3_qa.scores.false_alarm_rate` takes, by the names of its arguments.

        No outcome is told of flags that stand so near an environment's time limit that it would cut them off, *whatever came of
        them*: of these only the catastrophes would be known.
        """
        rows = self._db.execute(
            "SELECT outcome, probability, vetoed, run, env, episode, step FROM events WHERE flagged ORDER BY id"
        ).fetchall()
        episodes: dict[Any, int] = {}
        runs = self.runs()

        def outcome(row: Any) -> float:
            about = runs.get(row[3], {})
            limit, horizon = about.get("time_limits", {}).get(str(row[4])), about.get("horizon")
            cut = limit is not None and horizon is not None and row[6] + horizon > limit
            return float("nan") if row[0] is None or cut else float(row[0])

        return {
            "outcome": np.array([outcome(row) for row in rows], float),
            "probability": np.array([row[1] for row in rows], float),
            "executed": np.array([not row[2] for row in rows], np.bool_),
            "episode": np.array([episodes.setdefault(row[3:6], len(episodes)) for row in rows], np.int64),
        }


_COLUMNS = [*Event._fields, "outcome"]
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM events"
_BOOLS = (
    "flagged",
    "vetoed",
    "let_through",
    "withheld",
    "no_safe_action",
    "catastrophe",
    "terminated",
    "truncated",
    "outcome",
)


def _event(row: Any) -> FlightEvent:
    found = dict(zip(_COLUMNS, row, strict=True))
    for name in _BOOLS:
        found[name] = None if found[name] is None else bool(found[name])
    for name in ("proposed", "executed", "answers"):
        found[name] = json.loads(found[name])
    found["seed"] = None if found["seed"] is None else int(found["seed"])
    arrays = unpack(("risks", "actions"), found.pop("compared"))
    return FlightEvent(**found, risks=arrays["risks"], actions=arrays.get("actions"))


def _joined(arrays: dict[str, Any], name: str) -> Any:
    """Observations as they were: a dict of them, or one array."""
    if name in arrays:
        return arrays[name]
    return {key.split("/", 1)[1]: array for key, array in arrays.items() if key.startswith(f"{name}/")}


def _opened(path: str) -> sqlite3.Connection:
    """For reading only; what a killed process left in the write-ahead log is read too."""
    uri = f"file:{path.replace('?', '%3f').replace('#', '%23')}"
    db = sqlite3.connect(f"{uri}?mode=ro", uri=True)
    try:
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError:
        db.close()
        if os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal"):
            raise
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)  # of a folder that cannot be written to
