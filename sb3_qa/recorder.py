"""The flight recorder: evidence of flags, vetoes and catastrophes, in one SQLite file of a bounded size.

``write`` commits before it returns, in write-ahead mode: what it has taken in is in the file when the process is killed
a moment later. A commit is not forced to the disk, though; should the machine lose its power, the newest commits can be
missing and the file opens all the same. :class:`~sb3_qa.flight_log.FlightLog` reads it, and so does any SQLite client:
numbers and JSON in columns, arrays as numpy's npy bytes. Nothing in it is executable.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["Batch", "Chunk", "Event", "FlightRecorder", "pack", "unpack"]

log = logging.getLogger(__name__)

FORMAT = 1
APPLICATION = 0x73623371  # "sb3q", so that a file of somebody else's is not written into
RETRY = 10.0  # seconds until a file that could not be written to is tried again
WAIT = 5.0  # seconds to wait for another process that writes
COMPRESSED_FROM = 4096  # bytes
LOOK_EVERY = 16  # writes between looks at the size
AT_ONCE = 100  # numbers of events that are taken at once, so that several processes do not wait for each other
SCHEMA = """
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY AUTOINCREMENT, started REAL, process INTEGER, about TEXT);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, run INTEGER, time REAL, env INTEGER, episode INTEGER, step INTEGER,
    seed TEXT, since_seed INTEGER, flagged INTEGER, vetoed INTEGER, let_through INTEGER, probability REAL,
    withheld INTEGER, no_safe_action INTEGER, catastrophe INTEGER, terminated INTEGER, truncated INTEGER,
    risk REAL, executed_risk REAL, proposed TEXT, executed TEXT, answers TEXT, compared BLOB, outcome INTEGER);
CREATE TABLE IF NOT EXISTS chunks (
    event INTEGER, first INTEGER, length INTEGER, names TEXT, data BLOB, PRIMARY KEY (event, first));
INSERT OR IGNORE INTO counts VALUES ('format', 1), ('dropped', 0), ('lost', 0), ('next', 1);
"""


class Event(NamedTuple):
    """A step with a flag, a veto, a catastrophe, or (where it cannot be known what is one) a termination."""

    id: int
    run: int
    time: float
    """Seconds since 1970, UTC."""
    env: int
    episode: int
    """Of this environment in this run, from 0."""
    step: int
    """Of the episode, from 0: the decision that was judged."""
    seed: str | None
    """What the environment was last seeded with; its own choice may have more than 64 bits."""
    since_seed: int
    """Episodes that have ended since."""
    flagged: bool
    vetoed: bool
    let_through: bool
    probability: float
    """With which the proposed action was to be executed."""
    withheld: bool
    """A veto was not carried out, because of a budget or a cooldown."""
    no_safe_action: bool
    catastrophe: bool | None
    """Whether it is known to have happened in this step."""
    terminated: bool
    truncated: bool
    risk: float | None
    """Of the proposed action; None where it was not finite."""
    executed_risk: float | None
    proposed: str
    """JSON."""
    executed: str
    answers: str
    """JSON: answers to all questions in the state of the decision; about an action, of each of ``compared``."""
    compared: bytes
    """Arrays: the ``risks`` (m,) of all actions, or of the ``actions`` (m, *action_shape) that were compared."""


class Chunk(NamedTuple):
    """Some consecutive steps around an event."""

    event: int
    first: int
    """Step of the episode."""
    length: int
    arrays: Mapping[str, NDArray[Any]]


class Batch:
    """What is to be written in one transaction."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.chunks: list[Chunk] = []
        self.outcomes: list[tuple[int, int]] = []
        """(1 if the catastrophe came within the question's horizon, 0 if not; the event)."""
        self.about: tuple[int, Mapping[str, Any]] | None = None
        """What is now known of a run."""


_INSERT = f"INSERT INTO events ({', '.join(Event._fields)}) VALUES ({', '.join('?' * len(Event._fields))})"
# An open connection must not be used, and not even closed, on the other side of a fork: it is kept out of reach.
_OF_PARENTS: list[sqlite3.Connection] = []


class FlightRecorder:
    """Writes a flight record. Several wrappers, threads and processes may write into one file.

    >>> VecVetoAction(env, ..., record=FlightRecorder("flight.sqlite", before=20, frames=True))  # doctest: +SKIP

    :param path: of the file, which is added to if there is one. It must be on a local disk; beside it stand ``-wal`` and
        ``-shm`` while it is open
    :param before: steps kept before an event
    :param after: steps kept after it
    :param max_mb: most megabytes (of 10^6 bytes) of the file; the oldest events are dropped, and counted, those of a larger file when it
        is opened
    :param frames: keep a picture of each of these steps, too: every step is rendered
    :param delay: seconds that an event may wait to be committed, as it costs less to commit several at once; with 0 it is
        in the file before the step returns
    :raises QAError: when an argument is out of range, or the file cannot be opened, or is not a flight record
    """

    path: str
    before: int
    after: int
    max_mb: float
    frames: bool
    delay: float
    lost: int
    """Events that could not be written, since the last that could; those for a file that was deleted or renamed are among them."""

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        before: int = 10,
        after: int = 10,
        max_mb: float = 256.0,
        frames: bool = False,
        delay: float = 0.2,
    ) -> None:
        if not isinstance(path, (str, PathLike)):
            raise QAError(f'FlightRecorder got path={path!r}; expected the path of a file; give e.g. "flight.sqlite"')
        for name, value in (("before", before), ("after", after)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise QAError(
                    f"FlightRecorder got {name}={value!r}; expected a number of steps, at least 0; give e.g. 10"
                )
        if isinstance(max_mb, bool) or not isinstance(max_mb, Real) or not 1.0 <= max_mb < float("inf"):
            raise QAError(f"FlightRecorder got max_mb={max_mb!r}; expected megabytes, at least 1; give e.g. 256")
        if isinstance(delay, bool) or not isinstance(delay, Real) or not 0.0 <= delay < float("inf"):
            raise QAError(f"FlightRecorder got delay={delay!r}; expected seconds, at least 0; give e.g. 0.2")
        self.delay = float(delay)
        self.path = os.path.abspath(os.fspath(path))
        self.before, self.after, self.max_mb, self.frames = int(before), int(after), float(max_mb), bool(frames)
        self.lost = 0
        self._clear()
        try:
            self._open()
        except sqlite3.Error as error:
            raise QAError(
                f"the flight record {self.path} cannot be opened ({error}); expected a flight record, or a new file in a folder that "
                "can be written to; give another path"
            ) from error

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._file: tuple[int, int] | None = None  # which one is open
        self._writes = 0
        self._wait_until = 0.0
        self._said = False
        self._numbers = iter(range(0))

    def __getstate__(self) -> dict[str, Any]:
        names = ("path", "before", "after", "max_mb", "frames", "delay")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lost=0)
        self._clear()

    def begin_run(self, about: Mapping[str, Any]) -> int:
        """Begin a run: one wrapper's recording.

        :param about: what is to be known of it, as JSON takes it
        :return: its number, or 0 if it could not be written down
        """
        with self._lock:
            try:
                db = self._open()
                row = (time.time(), os.getpid(), json.dumps(about, default=str))
                return int(
                    db.execute("INSERT INTO runs (started, process, about) VALUES (?, ?, ?)", row).lastrowid or 0
                )
            except sqlite3.Error as error:
                self._failed(error, 0)
                return 0

    def next_event(self) -> int:
        """A number for an event, higher than those before; 0 if none can be had, and the event is lost."""
        with self._lock:
            number = next(self._numbers, 0)
            if number:
                return number
            if not self._resting():
                try:
                    db = self._open()
                    db.execute("BEGIN IMMEDIATE")
                    (first,) = db.execute("SELECT value FROM counts WHERE name = 'next'").fetchone()
                    db.execute("UPDATE counts SET value = ? WHERE name = 'next'", (first + AT_ONCE,))
                    db.execute("COMMIT")
                    self._numbers = iter(range(first, first + AT_ONCE))
                    return next(self._numbers)
                except sqlite3.Error as error:
                    self._failed(error, 1)
                    return 0
            self.lost += 1
            return 0

    def write(self, batch: Batch) -> bool:
        """Write a batch, and commit it. It never raises because of the file: whoever vetoes goes on vetoing.

        :return: whether it is written; that it could not be is logged, once
        """
        with self._lock:
            if self._resting():
                self.lost += len(batch.events)
                return False
            try:
                db = self._open()
                try:
                    self._transaction(db, batch)
                except sqlite3.OperationalError as error:
                    if "full" not in str(error):
                        raise
                    self._make_room(db, 0.5)  # it is the limit, or else the disk
                    self._transaction(db, batch)
            except (sqlite3.Error, OverflowError) as error:
                self._failed(error, len(batch.events))
                return False
            if self._said:
                log.warning("the flight record %s is written to again; %d events were lost", self.path, self.lost)
                self._said = False
            self.lost = 0
            self._writes += 1
            if self._writes % LOOK_EVERY == 0:
                with suppress(sqlite3.Error):  # what was written is written; there is another time
                    if self._used(db) > 0.9 * self.max_mb * 1e6:
                        self._make_room(db, 0.8)
            return True

    def close(self) -> None:
        """Close the file; it is opened again when something is written."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                try:
                    self._connection.close()
                except sqlite3.Error as error:
                    self._failed(error, 0)
            self._connection = None

    def _transaction(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(_INSERT, batch.events)
            chunks = [
                (event, first, length, _names(tuple(arrays)), pack(arrays.values()))
                for event, first, length, arrays in batch.chunks
            ]
            db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?)", chunks)
            if batch.outcomes:
                db.executemany("UPDATE events SET outcome = ? WHERE id = ?", batch.outcomes)
            if batch.about:
                run, about = batch.about
                db.execute("UPDATE runs SET about = ? WHERE id = ?", (json.dumps(about, default=str), run))
            if self.lost:
                db.execute("UPDATE counts SET value = value + ? WHERE name = 'lost'", (self.lost,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _resting(self) -> bool:
        """Whether the file could not be written to a moment ago."""
        return self._said and time.monotonic() < self._wait_until

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._process == os.getpid():
            if _identity(self.path) != self._file:  # what is written now, nobody would find
                with suppress(sqlite3.Error):  # all that is known goes into a file that was renamed
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                raise sqlite3.OperationalError("it was deleted or renamed while it was open")
            return self._connection
        if self._connection is not None:
            _OF_PARENTS.append(self._connection)
        db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            self._set_up(db)
        except BaseException:
            db.close()
            raise
        self._connection, self._process, self._file = db, os.getpid(), _identity(self.path)
        return db

    def _set_up(self, db: sqlite3.Connection) -> None:
        # In this order: another process may be making the file, and its tables and its number are committed at once.
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if tables and application != APPLICATION:
            raise sqlite3.DatabaseError("it is a database of something else")
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA max_page_count = {int(self.max_mb * 1e6 / size)}")
        db.execute("PRAGMA journal_size_limit = 4194304")
        _patiently(db, "PRAGMA journal_mode = WAL")  # which does not wait by itself for another that does the same
        if not tables:
            _patiently(db, "BEGIN IMMEDIATE")
            for statement in filter(str.strip, SCHEMA.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute("COMMIT")
        (version,) = db.execute("SELECT value FROM counts WHERE name = 'format'").fetchone()
        if version != FORMAT:
            raise sqlite3.DatabaseError(f"its format is {version}, and {FORMAT} is written here")
        self._shrink(db)

    def _shrink(self, db: sqlite3.Connection) -> None:
        """Give back the space of a file that was written with a larger bound. If another process holds it up, the file stays
        as large as it is for now, and room is made by the next writes.
        """
        most, size = int(self.max_mb * 1e6), db.execute("PRAGMA page_size").fetchone()[0]
        with suppress(sqlite3.Error, OSError):
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            if max(pages * size, os.path.getsize(self.path)) <= most:
                return
            self._make_room(db, 0.8)
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute(f"PRAGMA max_page_count = {most // size}")  # which could not be lower than what there was

    def _used(self, db: sqlite3.Connection) -> int:
        """Bytes in use; pages that were freed will be used again."""
        count, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((count - free) * size)

    def _make_room(self, db: sqlite3.Connection, share: float) -> None:
        """Drop the oldest events until no more than this share of the file is in use."""
        while self._used(db) > share * self.max_mb * 1e6:
            first, last = db.execute("SELECT min(id), max(id) FROM events").fetchone()
            if first is None or first == last:
                return
            upto = first + max((last - first) // 10, 1) - 1
            db.execute("BEGIN IMMEDIATE")
            try:
                dropped = db.execute("DELETE FROM events WHERE id <= ?", (upto,)).rowcount
                db.execute("DELETE FROM chunks WHERE event <= ?", (upto,))
                db.execute("UPDATE counts SET value = value + ? WHERE name = 'dropped'", (dropped,))
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _failed(self, error: Exception, n_events: int) -> None:
        self.lost += n_events
        self._wait_until = time.monotonic() + RETRY
        if not self._said:
            self._said = True
            log.error(
                "the flight record %s cannot be written to (%s); flags and vetoes go on, UNRECORDED; it is tried again every %g s",
                self.path,
                error,
                RETRY,
            )


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another of its name; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _patiently(db: sqlite3.Connection, statement: str) -> None:
    deadline = time.monotonic() + WAIT
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def pack(arrays: Any) -> bytes:
    """Arrays as npy bytes, one after the other; compressed (zlib) where they are many."""
    parts = []
    for array in arrays:
        array = np.asarray(array, order="C")
        parts += [_header(array.dtype.str, array.shape), array.tobytes()]
    data = b"".join(parts)
    return zlib.compress(data, 1) if len(data) >= COMPRESSED_FROM else data


def unpack(names: Sequence[str], data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of :func:`pack` by name; the last names may be of none."""
    data = data if data[:6] == b"\x93NUMPY" else zlib.decompress(data)
    file = io.BytesIO(data)
    return {name: np.load(file, allow_pickle=False) for name in names if file.tell() < len(data)}


@lru_cache(maxsize=64)
def _names(names: tuple[str, ...]) -> str:
    return json.dumps(names)


@lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What ``numpy.save`` writes in front of an array; made once, as it takes longer than the rest."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()
