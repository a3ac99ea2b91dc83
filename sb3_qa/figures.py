"""Pictures: is the answerer calibrated, how risk goes through an episode, answers drawn on frames.

Everything here needs the extra ``sb3-qa[demo]``; nothing else in the package imports this module. Plots are drawn on axes
that are given, or on a figure of their own, and no global state of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sb3_qa.errors import QAError
from sb3_qa.extras import need
from sb3_qa.scores import Reliability

__all__ = ["draw_answers", "new_figure", "plot_numbers", "plot_reliability", "plot_risk", "plot_survival", "write_gif"]

_need = partial(need, extra="demo", what="sb3_qa.figures")

Frame = NDArray[np.uint8]
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito: told apart by everybody
ALARM, QUIET = "#d55e00", "#56b4e9"


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.8), **options: Any
) -> tuple[Any, Any]:
    """A matplotlib figure that belongs to no window, and its axes: an array (rows, columns), or one if there is one.

    :param size: width and height in inches
    :param options: of ``Figure.subplots``, e.g. ``width_ratios``
    """
    figure = _need("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, **options)


def plot_reliability(axes: Any, curves: Mapping[str, Reliability], title: str = "", least: int = 1) -> None:
    """Draw what was said against what happened; a calibrated answerer is on the diagonal (Murphy and Winkler 1977).

    Bars are 95 % Wilson intervals, the area of a point grows with the number of answers in its bin.

    :param axes: of matplotlib
    :param curves: by label, from :func:`sb3_qa.scores.reliability`
    :param least: bins with fewer answers are left out
    """
    if not curves:
        raise QAError("plot_reliability got no curves; expected at least one; give {label: scores.reliability(...)}")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=1)
    for n, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[n % len(COLOURS)]
        there = curve.count >= max(least, 1)
        x, y = curve.probability[there], curve.frequency[there]
        error = np.clip(np.stack([y - curve.low[there], curve.high[there] - y]), 0.0, None)
        axes.errorbar(x, y, error, color=colour, linewidth=1.2, elinewidth=1, zorder=2)
        size = 10 + 90 * np.sqrt(curve.count[there] / curve.count.sum())
        axes.scatter(x, y, size, color=colour, label=label, zorder=3, edgecolor="white", linewidth=0.5)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="probability answered", ylabel="how often it happened")
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def plot_risk(
    axes: Any,
    risk: ArrayLike,
    *,
    threshold: float | None = None,
    flagged: ArrayLike | None = None,
    vetoed: ArrayLike | None = None,
    catastrophe: ArrayLike | None = None,
    title: str = "",
) -> None:
    """Draw the risk of the proposed actions over one episode, with what came of it.

    :param axes: of matplotlib
    :param risk: (n_steps,)
    :param threshold: of the veto
    :param flagged: (n_steps,), whether the proposed action was judged catastrophic
    :param vetoed: (n_steps,), whether another was executed
    :param catastrophe: (n_steps,), whether it happened
    """
    height = np.asarray(risk, float)
    if height.ndim != 1 or not len(height):
        raise QAError(
            f"plot_risk got risk of shape {height.shape}; expected (n_steps,), at least one; give one episode"
        )
    step = np.arange(len(height))
    axes.fill_between(step, height, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(step, height, color=COLOURS[0], linewidth=1.2, label="risk of the proposed action")
    if threshold is not None:
        axes.axhline(threshold, color="0.4", linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    rugs = (("flagged, not vetoed", flagged, COLOURS[1], vetoed), ("vetoed", vetoed, ALARM, None))
    for label, marks, colour, but in rugs:
        at = np.flatnonzero(_marks(marks, len(height)) & ~_marks(but, len(height)))
        if len(at):
            axes.vlines(at, 1.03, 1.09, color=colour, linewidth=1, label=label, clip_on=False)
    at = np.flatnonzero(_marks(catastrophe, len(height)))
    if len(at):
        axes.scatter(at, height[at], 90, color="black", marker="X", label="catastrophe", zorder=4, clip_on=False)
    axes.set(xlim=(0, max(len(height) - 1, 1)), ylim=(0, 1.1), xlabel="step", ylabel="risk")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.97))


def plot_survival(
    axes: Any, groups: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]], title: str = ""
) -> None:
    """Draw survival curves answered (dashed) against what happened (solid, its 95 % interval shaded), by group of decisions.

    :param axes: of matplotlib
    :param groups: by label, each (said, seen, low, high) of shape (K + 1,), the share without the event after 0 .. K steps
    """
    lowest = 1.0
    for n, (label, curves) in enumerate(groups.items()):
        said, seen, low, high = (np.asarray(curve, float) for curve in curves)
        if said.ndim != 1 or not said.shape == seen.shape == low.shape == high.shape:
            raise QAError(
                f"plot_survival got curves of the shapes {[np.shape(curve) for curve in curves]}; expected all (K + 1,); give them up to "
                "one horizon"
            )
        step, colour = np.arange(len(said)), COLOURS[n % len(COLOURS)]
        axes.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step, seen, color=colour, linewidth=1.6, label=label)
        axes.plot(step, said, color=colour, linewidth=1.2, linestyle="--")
        lowest = np.nanmin(
            [lowest, np.nanmin(said), np.nanmin(seen), np.nanmin(low) if np.isfinite(low).any() else 1.0]
        )
    axes.plot([], [], color="0.3", linewidth=1.2, linestyle="--", label="answered")
    axes.plot([], [], color="0.3", linewidth=1.6, label="happened")
    bottom = max(lowest - 0.1 * (1.02 - lowest), -0.02)
    axes.set(
        ylim=(bottom, 1.0 + 0.05 * (1.0 - bottom)), xlabel="steps from the decision", ylabel="share still without it"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def plot_numbers(axes: Any, said: ArrayLike, truth: ArrayLike, title: str = "", bins: int = 12) -> None:
    """Draw numbers answered against true ones: for as many decisions a point, its mean and the middle 80 % of what was true.

    :param axes: of matplotlib
    :param said: (n,), means of the answers
    :param truth: (n,)
    """
    x, y = np.asarray(said, float), np.asarray(truth, float)
    groups = [part for part in np.array_split(np.argsort(x, kind="stable"), min(bins, max(len(x), 1))) if len(part)]
    if not groups:
        raise QAError("plot_numbers got no answers; expected at least one; score some decisions first")
    middle = np.array([x[part].mean() for part in groups])
    mean = np.array([y[part].mean() for part in groups])
    low, high = np.array([np.quantile(y[part], [0.1, 0.9]) for part in groups]).T
    ends = [min(middle.min(), low.min()), max(middle.max(), high.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, linestyle="--", zorder=1)
    axes.vlines(middle, low, high, color=COLOURS[0], linewidth=1.2, alpha=0.6, label="middle 80 % of the truth")
    axes.scatter(middle, mean, 24, color=COLOURS[0], zorder=3, label="mean of the truth")
    axes.set(xlabel="number answered", ylabel="number that was true")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def draw_answers(
    frame: Frame, answers: Sequence[tuple[str, float | None, str]], *, title: str = "", alarm: float = 1.0
) -> Frame:
    """Write answers under a frame: a line each of text, a bar, and a value.

    :param frame: (height, width, 3)
    :param answers: for each line its text, the length of its bar in [0, 1] (None for no bar), and its value as text
    :param title: a heading
    :param alarm: bars at least this long are in the colour of alarm
    :return: a taller frame, (height + panel, width, 3)
    """
    picture = np.asarray(frame)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        got = f"{picture.dtype} of shape {picture.shape}"
        raise QAError(
            f"draw_answers got a frame of {got}; expected uint8 of shape (height, width, 3); render rgb_array"
        )
    image, draw_on, fonts = _need("PIL.Image"), _need("PIL.ImageDraw"), _need("PIL.ImageFont")
    width = picture.shape[1]
    size = max(11, width // 27)
    font, line = fonts.load_default(size), int(size * 1.5)
    panel = image.new("RGB", (width, line * (len(answers) + bool(title)) + size), "#14171c")
    pen = draw_on.Draw(panel)
    y = size // 2
    if title:
        pen.text((size // 2, y), title, font=font, fill="#ffffff")
        y += line
    left, right = int(width * 0.56), int(width * 0.80)
    for text, share, value in answers:
        pen.text((size // 2, y), text, font=font, fill="#c8ccd4")
        if share is not None:
            loud = share >= alarm
            top, bottom = y + size // 6, y + size
            pen.rectangle((left, top, right, bottom), fill="#2a2f38")
            full = left + int((right - left) * min(max(share, 0.0), 1.0))
            if full > left:
                pen.rectangle((left, top, full, bottom), fill=ALARM if loud else QUIET)
        pen.text((right + size // 2, y), value, font=font, fill="#ffffff")
        y += line
    return np.concatenate([picture, np.asarray(panel)])


def write_gif(path: str | PathLike[str], frames: Sequence[Frame], fps: float = 12.5, colours: int = 64) -> None:
    """Write frames of one size as a GIF that repeats, with one palette for all of them.

    :param frames: each (height, width, 3)
    :param fps: frames a second; browsers show at most 50
    :param colours: fewer make a smaller file
    """
    if not len(frames):
        raise QAError("write_gif got no frames; expected at least one; record an episode first")
    image = _need("PIL.Image")
    some = [frames[n] for n in np.unique(np.linspace(0, len(frames) - 1, 8).astype(int))]
    palette = image.fromarray(np.concatenate(some)).quantize(colours)
    pictures = [image.fromarray(frame).quantize(palette=palette, dither=image.Dither.NONE) for frame in frames]
    times = [round(1000 / fps)] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=False)


def _marks(marks: ArrayLike | None, n: int) -> NDArray[np.bool_]:
    out = np.zeros(n, np.bool_) if marks is None else np.asarray(marks, np.bool_)
    if out.shape != (n,):
        raise QAError(f"plot_risk got marks of shape {out.shape} for {n} steps; expected {(n,)}; give one a step")
    return out
