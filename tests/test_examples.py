"""The examples run as a person runs them: as scripts, from another folder, and write what they say they write."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(example: str, folder: Path, *arguments: str, timeout: float) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(EXAMPLES / example), "--out", str(folder / "out"), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout
    )
    assert done.returncode == 0, f"{example} failed:\n{done.stdout}"
    return done.stdout


def check_arms(arms: dict, n_steps_at_least: float) -> None:
    """Every figure is a finite number inside its interval."""
    assert list(arms) == ["none", "veto", "random"]
    for figures in arms.values():
        for name, interval in figures.items():
            assert all(math.isfinite(value) for value in interval.values()), name
            assert interval["low"] <= interval["estimate"] <= interval["high"], name
        assert figures["mean_length"]["estimate"] >= n_steps_at_least
    assert arms["none"]["vetoes_per_1000"]["estimate"] == 0  # shadow mode never interferes


@pytest.mark.timeout(240)
def test_lunar_lander(tmp_path):
    pytest.importorskip("Box2D")
    printed = run("lunar_lander.py", tmp_path, "--fast", timeout=200)
    results = json.loads((tmp_path / "out/results.json").read_text())
    check_arms(results["arms"], n_steps_at_least=10)
    assert {"crash[k=5]", "crash[k=40]", "touching", "side[k=10]", "height", "touchdown"} <= set(results["scores"])
    for key, scores in results["scores"].items():
        assert scores["count"] > 0, key
        judged = [value for name, value in scores.items() if name in ("brier", "error", "accuracy")]
        assert judged and all(math.isfinite(value) and value >= 0 for value in judged), key
        assert key in printed  # square brackets survive rich
    words = (tmp_path / "out/results.md").read_text()
    assert "| veto |" in words and "| crash[k=20] |" in words and "nan" not in words.split("## Answers")[0]
    assert (tmp_path / "out/figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/episode.gif").read_bytes().startswith(b"GIF8")
    assert (tmp_path / "out/episode.gif").stat().st_size < 3_000_000
    assert (tmp_path / "out/lander.qa").stat().st_size > 1000
    assert "Will I crash within 40 steps if I choose main engine?" in printed


@pytest.mark.timeout(240)
def test_cleanrl_ppo(tmp_path):
    """Taught from a question file first; then with its answerer given, and environments in processes of their own."""
    short = ("--total-timesteps", "512", "--num-steps", "64", "--num-envs", "4")
    run("cleanrl_ppo.py", tmp_path, "--teach-timesteps", "1024", *short, timeout=200)
    history = json.loads((tmp_path / "out/results.json").read_text())["history"]
    assert [row["steps"] for row in history] == [256, 512]
    for row in history:
        assert 8 < row["return"] == row["length"] < 100
        assert 0.0 < row["risk"] < 1.0 and math.isfinite(row["shaping"]) and row["shaping"] != 0.0
    given = ("--qa", "out/driver.qa", "--async-envs", "--threshold", "0.0")
    printed = run("cleanrl_ppo.py", tmp_path, *given, *short, timeout=200)
    assert printed.count("return") == 2
    again = json.loads((tmp_path / "out/results.json").read_text())["history"]
    assert all(row["vetoed"] > 0.1 for row in again)  # everything is vetoed that is not the safest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_highway(tmp_path):
    pytest.importorskip("envpool")
    pytest.importorskip("highway_env")
    printed = run(
        "highway.py", tmp_path, "--timesteps", "8192", "--episodes", "32", "--python-episodes", "4", timeout=500
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["roads"]) == ["envpool", "highway-env"]
    for road in results["roads"].values():
        check_arms(road["arms"], n_steps_at_least=3)
        assert {"crash[k=5]", "speed", "lane[k=1]"} <= set(road["scores"])
    assert "Will I crash within 5 steps if I choose FASTER?" in printed
    assert "| highway-env | veto |" in (tmp_path / "out/results.md").read_text()


def test_highway_says_what_to_install(tmp_path):
    """Without envpool the example names the command that installs it, and not a traceback."""
    if importlib.util.find_spec("envpool"):
        (tmp_path / "envpool.py").write_text("raise ModuleNotFoundError('no envpool', name='envpool')")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "highway.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "pip install 'sb3-qa[demo,highway]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.timeout(240)
def test_language(tmp_path):
    """One short run, which is not repeated, and its table."""
    pytest.importorskip("minigrid")
    arguments = ["--seeds", "1", "--arms", "text", "--timesteps", "8192", "--eval-steps", "60"]
    assert "text 101" in run("language.py", tmp_path, *arguments, timeout=200)
    (row,) = map(json.loads, (tmp_path / "out/runs.jsonl").read_text().splitlines())
    scores = row["scores"]
    assert scores["taught"]["instances"] == 501 and scores["held out"]["instances"] == 339
    assert all(0.4 < scores[group]["accuracy"] <= 1.0 for group in ("taught", "held out", "object", "comparison"))
    assert scores["taught"]["balanced"] > 0.5
    assert "| text | held out: 339 |" in (tmp_path / "out/results.md").read_text()
    assert "text 101" not in run("language.py", tmp_path, *arguments, timeout=60)
