"""Every Python block of the README runs, one after the other, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md block {number + 1}", "exec"), namespace)
    assert (tmp_path / "lander.qa").exists()
    risk, vetoed, action = capsys.readouterr().out.split()
    assert 0.0 <= float(risk) <= 1.0
    assert vetoed in ("True", "False")
    assert action in "0123"


def test_readme_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
