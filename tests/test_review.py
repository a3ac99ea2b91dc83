"""The command line: ``python -m sb3_qa review``, as people call it."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from test_recorder import an_event
from test_veto import ACTIONS
from wrapping import make_qa, run_vec, toys

from sb3_qa.__main__ import COMMANDS, main
from sb3_qa.flight_log import FlightLog
from sb3_qa.recorder import FlightRecorder
from sb3_qa.wrappers import VecVetoAction

RUN = {"wrapper": "VecVetoAction", "question": "crash", "threshold": 0.5, "on_veto": "safest", "shadow": False}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("flight") / "flight.sqlite"
    env = VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=make_qa(), record=path, let_through=0.3)
    run_vec(env, ACTIONS[:, :2])
    env.close()
    return path


def shell(*arguments):
    """What the command prints, run as a process of its own and piped."""
    command = [sys.executable, "-m", "sb3_qa", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, done.stdout, done.stderr


def test_list_and_event_in_a_process(path):
    status, out, err = shell("review", path, "--last", 1000)
    assert (status, err) == (0, "")
    assert "\x1b" not in out  # no colours
    assert max(map(len, out.splitlines())) <= 140
    log = FlightLog(path)
    events = log.events()
    listed = [int(number) for number in re.findall(r"^ *(\d+)  20\d\d-", out, re.MULTILINE)]
    assert listed == [event.id for event in events]
    assert f"{len(events)} events" in out
    assert "VecVetoAction on crash[k=3], threshold 0.5, on_veto safest" in out
    assert re.search(r"false alarms: \d+ % of flags \[\d+, \d+\], estimated from those let through", out)
    status, out, err = shell("review", path, "--event", events[5].id)
    assert (status, err) == (0, "")
    assert out.startswith(f"event {events[5].id}: {', '.join(events[5].kinds)}")
    assert f"environment {events[5].env}, episode {events[5].episode}, step {events[5].step}" in out
    assert f"{events[5].risk:.3f}" in out
    assert re.search(rf"^\* +{events[5].step} ", out, re.MULTILINE)
    for key in events[5].answers:
        assert key in out


def test_only_some(path, capsys):
    log = FlightLog(path)
    for kind in ("veto", "catastrophe", "let through"):
        assert main(["review", str(path), "--only", kind, "--last", "500"]) == 0
        out = capsys.readouterr().out
        listed = {int(number) for number in re.findall(r"^ *(\d+)  20\d\d-", out, re.MULTILINE)}
        expected = {event.id for event in log.events() if kind in [each.lower() for each in event.kinds]}
        assert listed == expected
        assert 0 < len(listed) < len(log)


def test_a_seed_that_an_environment_chose(tmp_path, capsys):
    recorder = FlightRecorder(tmp_path / "f.sqlite")
    batch, seed = an_event(recorder, run=recorder.begin_run(RUN)), 10**38 + 7
    batch.events[0] = batch.events[0]._replace(seed=str(seed), since_seed=12)
    batch.outcomes.append((0, batch.events[0].id))
    recorder.write(batch)
    assert main(["review", recorder.path]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert re.search(r"100000…\+12 .* veto +none *$", out, re.MULTILINE)
    assert main(["review", recorder.path, "--event", str(batch.events[0].id)]) == 0
    assert f"{seed}+12 (12 episodes after it)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "bogus"), r"--only got 'bogus'; expected one of \['flag', 'veto', .*'catastrophe'"),
        (("--last", "-3"), "--last got -3; expected a number of events, at least 0"),
        (("--frames", "x.npy"), "--frames got 'x.npy' and no event; expected one"),
    ],
)
def test_options_that_say_nothing_are_refused(path, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:  # as tyro leaves
        main(["review", str(path), *arguments])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and not said.out


def test_frames(tmp_path, capsys):
    recorder = FlightRecorder(tmp_path / "f.sqlite")
    batch = an_event(recorder, run=recorder.begin_run({}))
    number = batch.events[0].id
    batch.chunks[0].arrays["frames"] = np.full((1, 2, 3, 3), 7, np.uint8)
    recorder.write(batch)
    assert main(["review", recorder.path, "--event", str(number), "--frames", str(tmp_path / "x.npy")]) == 0
    assert "1 frames written" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), batch.chunks[0].arrays["frames"])


def test_what_is_not_there(path, tmp_path, capsys):
    assert main(["review", str(tmp_path / "none.sqlite")]) == 1
    assert "there is no flight record" in capsys.readouterr().err
    assert main(["review", str(path), "--event", "100000"]) == 1
    assert "has no event 100000; expected a number from 1 to" in capsys.readouterr().err
    assert main(["revue"]) == 2
    err = capsys.readouterr().err
    assert "there is no command 'revue'" in err and all(name in err for name in COMMANDS)
    assert main([]) == main(["--help"]) == 0
    assert "usage: python -m sb3_qa COMMAND" in capsys.readouterr().out


def test_an_extra_that_is_missing(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "sb3_qa.cli.review", raising=False)
    assert main(["review", str(path)]) == 1
    assert "the command line needs tyro, which is not installed; pip install 'sb3-qa[cli]'" in capsys.readouterr().err
