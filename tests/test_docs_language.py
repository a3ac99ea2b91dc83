"""The Python of docs/language.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "language.md"


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(GUIDE), "exec"), {"__name__": "guide"})
    understood, familiarity, refusal = capsys.readouterr().out.splitlines()
    assert understood == "beyond[side=left][edge=1.0][k=7]"
    assert 0.5 <= float(familiarity) <= 1.0
    assert "was not taught" in refusal and "fire" in refusal
