"""Pictures hold what was given, refuse what cannot be drawn, and say what to install."""

import io
import subprocess
import sys

import numpy as np
import pytest

from sb3_qa import QAError
from sb3_qa.figures import draw_answers, new_figure, plot_reliability, plot_risk, write_gif
from sb3_qa.scores import reliability

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def test_reliability_draws_only_bins_that_hold_answers():
    _, axes = new_figure()
    plot_reliability(axes, {"crash": reliability([0.05, 0.05, 0.95], [0, 1, 1])}, "Calibration")
    points = axes.collections[-1].get_offsets()
    np.testing.assert_allclose(points, [[0.05, 0.5], [0.95, 1.0]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["crash"]


def test_risk_marks_vetoes_and_the_catastrophe():
    _, axes = new_figure()
    plot_risk(axes, [0.1, 0.6, 0.9], threshold=0.5, flagged=[0, 1, 1], vetoed=[0, 1, 0], catastrophe=[0, 0, 1])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["risk of the proposed action", "threshold 0.5", "flagged, not vetoed", "vetoed", "catastrophe"]


def test_a_figure_can_be_saved():
    figure, axes = new_figure(1, 2, size=(6, 3))
    plot_risk(axes[0], [0.1, 0.2])
    plot_reliability(axes[1], {"a": reliability([0.3], [1])})
    figure.savefig(file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


def test_answers_stand_under_the_frame_in_the_colour_of_alarm():
    frame = np.full((200, 300, 3), 7, np.uint8)
    lines = [("crash, FASTER?", 0.9, "0.90"), ("crash, SLOWER?", 0.1, "0.10"), ("speed", None, "25")]
    drawn = draw_answers(frame, lines, title="without veto", alarm=0.5)
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (300, 3) and drawn.shape[0] > 260
    assert (drawn[:200] == frame).all()
    panel = drawn[200:].reshape(-1, 3)
    orange, blue = ((panel == colour).all(axis=1).sum() for colour in ([0xD5, 0x5E, 0], [0x56, 0xB4, 0xE9]))
    assert orange > 5 * blue > 0


def test_a_gif_holds_all_frames(tmp_path):
    frames = [np.full((20, 30, 3), 30 * n, np.uint8) for n in range(8)]
    write_gif(tmp_path / "a.gif", frames, fps=10)
    with image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (30, 20)
        assert gif.info["duration"] == 100
        gif.seek(7)
        assert gif.info["duration"] == 2000  # the last one stays
        assert abs(int(np.asarray(gif.convert("RGB"))[0, 0, 0]) - 210) < 8


def test_what_cannot_be_drawn_is_refused(tmp_path):
    _, axes = new_figure()
    with pytest.raises(QAError, match=r"\(0,\)"):
        plot_risk(axes, [])
    with pytest.raises(QAError, match=r"\(2,\) for 3 steps"):
        plot_risk(axes, [0.1, 0.2, 0.3], vetoed=[True, False])
    with pytest.raises(QAError, match="no curves"):
        plot_reliability(axes, {})
    with pytest.raises(QAError, match="uint8"):
        draw_answers(np.zeros((4, 4, 3)), [])
    with pytest.raises(QAError, match="no frames"):
        write_gif(tmp_path / "b.gif", [])


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['matplotlib'] = None; from sb3_qa.figures import new_figure; new_figure()"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120)
    assert "needs matplotlib, which is not installed; expected it; pip install 'sb3-qa[demo]'" in done.stderr
