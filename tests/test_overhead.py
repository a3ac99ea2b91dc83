"""A guard against the worst: joint training must not become much slower than it was when last measured."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
ROOM = 1.5  # for a machine that does other things too


def test_a_flight_record_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import recorder

    ratio = min(recorder.measure("CartPole-v1", 1, 0.01, blocks=10, block=150) for _ in range(3))
    for name in ("recorder", "overhead"):
        del sys.modules[name]
    assert 0.9 < ratio < 1.15


def test_joint_training_is_about_as_fast_as_when_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import overhead

    rows = [json.loads(line) for line in overhead.HISTORY.read_text().splitlines()]
    measured = [row["ratio"] for row in rows if row["bench"] == "ppo_8q_live"][-1]
    case = overhead.CASES["ppo"]._replace(kwargs=dict(n_steps=128, n_epochs=4))
    for arm in (overhead.plain, overhead.joint):
        arm(case, 1024)
    clock = time.thread_time
    ratio = min(overhead.joint(case, 2048, clock) / overhead.plain(case, 2048, clock) for _ in range(3))
    del sys.modules["overhead"]
    assert 1.0 < ratio < measured * ROOM
