"""The report as one HTML page: everything it shows is in it, it runs no script, and it asks for nothing."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np

from sb3_qa.figures import new_figure, plot_numbers, plot_reliability, plot_risk, plot_survival
from sb3_qa.report.moments import Clip, Moment
from sb3_qa.report.played import Played, changed, thresholds
from sb3_qa.report.tables import InstanceRow, QuestionPart
from sb3_qa.report.words import MEANING, POLICY, STYLE
from sb3_qa.scores import Interval

__all__ = ["About", "write_page"]


@dataclass(frozen=True)
class About:
    """What the page says of itself.

    :param model: the file
    :param env: the environment's name and arguments
    :param algorithm: whose model it is
    :param facts: further lines, by word
    """

    model: str
    env: str
    algorithm: str
    facts: dict[str, str]


def write_page(
    about: About,
    played: Played,
    parts: Sequence[QuestionPart],
    left_out: int,
    moments: Sequence[tuple[Moment, Clip | str]],
) -> str:
    """The whole page."""
    sections = [
        ("played", "What was played", _played(about, played)),
        ("veto", "What a veto would stop, and did", _veto(played)),
        ("moments", "The worst misses and false alarms", _moments(played, moments)),
        ("answers", "Answers against truth", _answers(parts, left_out)),
        ("numbers", "What each number is", _meanings()),
        ("limits", "What this does not show", _limits(played)),
    ]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    title = f"How well {about.model} answers"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><header><h1>{escape(title)}</h1><p>{escape(about.algorithm)} in <code>{escape(about.env)}</code></p></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def _played(about: About, played: Played) -> str:
    plan, watched = played.plan, played.watched
    seeds = f"{plan.seed} to {plan.seed + plan.episodes - 1}, one an episode"
    rows = [
        ["episodes", str(len(watched))],
        ["steps", str(int(watched.lengths.sum()))],
        ["seeds", seeds],
        [
            "actions",
            "those liked best" if plan.deterministic else "sampled, as in training (liked best, of an answerer alone)",
        ],
        ["return", _interval(watched.mean_return)],
        ["steps an episode", _interval(watched.mean_length)],
    ]
    if played.risk is not None:
        rows += [
            ["episodes with a catastrophe", f"{int((watched.catastrophes > 0).sum())} of {len(watched)}"],
            ["catastrophes in 1,000 steps", _interval(watched.catastrophes_per_1000)],
            ["the question of risk", f"{played.risk.key}: {played.risk.text}"],
            ["threshold", f"{plan.threshold:g}"],
        ]
    rows += [[word, value] for word, value in about.facts.items()]
    rows.append(["written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())])
    return _table("The watched episodes: nobody interfered", ["what", "value"], rows)


def _veto(played: Played) -> str:
    if played.risk is None:
        return (
            "<p>This agent has no yes-or-no question about <code>{action}</code>, so there is no risk of an action for a veto to go by. "
            "Give it one, for example <code>Question(&quot;Will I crash within 5 steps if I choose {action}?&quot;, ...)</code>.</p>"
        )
    n, bad = len(played.watched), int((played.watched.catastrophes > 0).sum())
    rows, marks = [], []
    for each in thresholds(played):
        share = [_interval(each["warned"], percent=True), _interval(each["false"], percent=True)]
        counts = [f"{each['n_warned']} of {bad}: {share[0]}", f"{each['n_false']} of {n - bad}: {share[1]}"]
        rows.append([f"{each['threshold']:g}", *counts, f"{each['flags_per_1000']:.3g}"])
        marks.append(each["threshold"] == played.plan.threshold)
    head = ["threshold", "warned in time", "flagged without need", "flags in 1,000 steps"]
    caption = "What a veto at each threshold would have met in the watched episodes (the report's threshold is marked)"
    text = _table(caption, head, rows, marks)
    if bad == 0:
        text += (
            f"<p>No episode had a catastrophe, so nothing is known about warnings. At most about {300 / n:.2g} % of episodes "
            "have one (95 % confidence, by the rule of three).</p>"
        )
    if played.acting is None:
        return text + "<p>The veto was not tried (<code>--no-act</code>).</p>"
    told = changed(played)
    named = {"averted": bad, "brought about": n - bad, "disrupted": n - bad}
    rows = [
        [name, f"{told[name][0]} of {of}", _interval(told[name][1], percent=True) + " of all episodes"]
        for name, of in named.items()
    ]
    rows.append(["return, with - without", f"{told['return'][0]} episodes", _interval(told["return"][1])])
    count, change = told["return of disrupted"]
    rows.append(["the same, of the disrupted", f"{count} episodes", _interval(change)])
    arms = [("without", played.watched), ("with the veto", played.acting)]
    both = [
        [
            *(name, _interval(arm.catastrophes_per_episode), _interval(arm.catastrophes_per_1000)),
            *(_interval(arm.mean_return), _interval(arm.vetoes_per_1000)),
        ]
        for name, arm in arms
    ]
    head = ["", "catastrophes an episode", "in 1,000 steps", "return", "vetoes in 1,000 steps"]
    return (
        text
        + _table(
            f"What a veto at {played.plan.threshold:g} did, from the same seeds", ["what", "episodes", "estimate"], rows
        )
        + _table("Without and with it", head, both)
    )


def _moments(played: Played, moments: Sequence[tuple[Moment, Clip | str]]) -> str:
    if played.risk is None:
        return "<p>Without a question about an action nothing is flagged, and nothing missed.</p>"
    text = ""
    kinds = (
        (
            "miss",
            "Misses",
            "Catastrophes with the least warning first: those never flagged, then by the highest risk answered before them.",
        ),
        (
            "false alarm",
            "False alarms",
            "Decisions with the highest risk after which nothing happened within the steps asked about.",
        ),
    )
    for kind, title, words in kinds:
        chosen = [(moment, clip) for moment, clip in moments if moment.kind == kind]
        text += f"<h3>{title}</h3><p>{words}</p>"
        if not chosen:
            text += "<p>There was none.</p>"
            continue
        text += '<div class="moments">' + "".join(_moment(played, *each) for each in chosen) + "</div>"
    return text


def _moment(played: Played, moment: Moment, clip: Clip | str) -> str:
    plan = played.plan
    flag = "flagged" if moment.flagged else "not flagged"
    word = "highest risk before it" if moment.kind == "miss" else "risk"
    words = (
        f"{word} {_percent(moment.risk)}, {flag} at {plan.threshold:g}. Episode {moment.episode} (seed {plan.seed + moment.episode}), "
        f"step {moment.step}."
    )
    trace = played.watched.traces[moment.episode]
    marks: dict[str, Any] = dict(threshold=plan.threshold, flagged=trace.flagged, catastrophe=trace.catastrophe)
    chart = _chart(lambda axes: plot_risk(axes, np.nan_to_num(trace.risk, nan=1.0), **marks), (4.6, 2.5))
    alt = f"{moment.kind} in episode {moment.episode}, around step {moment.step}"
    pictures = f"<p>No frames: {escape(clip)}.</p>" if isinstance(clip, str) else ""
    if isinstance(clip, Clip):
        size = f'width="{clip.size[0]}" height="{clip.size[1]}"'
        pictures = "".join(
            f'<img class="{name}" src="{_data(data, "webp")}" alt="{escape(alt)}, {what}" {size}>'
            for name, data, what in (("clip", clip.moving, f"{clip.frames} frames"), ("still", clip.still, "one frame"))
        )
    return f"<figure>{pictures}{_image(chart, f'risk over that episode; {alt}')}<figcaption>{escape(words)}</figcaption></figure>"


def _answers(parts: Sequence[QuestionPart], left_out: int) -> str:
    text = "<p>On episodes that were played for this report, not trained on. Dashed diagonals are where perfect answers lie.</p>"
    for part in parts:
        text += f'<section class="question"><h3>{escape(part.question.text)}</h3>'
        if part.rows:
            head = ["key", "decisions", "in truth", "error", "best constant", "error removed", "order", "calibration"]
            text += _table(f"{part.question.name}: {part.rows[0].measure}", head, map(_row, part.rows))
        if part.unscored:
            text += f"<p>No truth became known of: <code>{escape(', '.join(part.unscored))}</code>.</p>"
        if part.left_out:
            text += f"<p>{part.left_out} more of its instances are not shown.</p>"
        text += '<div class="charts">' + "".join(_charts(part)) + "</div>"
        if part.wrong:
            wrong = [[w.key, w.said, w.truth, str(w.episode), str(w.step)] for w in part.wrong]
            text += _table("The answer that was furthest off", ["key", "said", "in truth", "episode", "step"], wrong)
        text += "</section>"
    if left_out:
        text += f"<p>{left_out} more questions are not shown.</p>"
    return text


def _row(row: InstanceRow) -> list[str]:
    known = [_interval(row.error, 3), f"{row.constant:.3g}", _interval(row.skill, percent=True)]
    return [row.instance.key, str(row.count), row.happened, *known, *(_number(x) for x in (row.auroc, row.calibration))]


def _charts(part: QuestionPart) -> Iterable[str]:
    name = part.question.name
    if part.curves:
        chart = _chart(lambda axes: plot_reliability(axes, part.curves, "Said against happened", least=5), (4.6, 4.4))
        yield _figure(
            chart,
            f"reliability diagram of {name}",
            "Points on the diagonal: what was said is how often it happened. Bars: 95 %, were decisions independent; bins of "
            "fewer than 5 answers are left out.",
        )
    if part.numbers is not None:
        key, said, truth = part.numbers
        chart = _chart(lambda axes: plot_numbers(axes, said, truth, key), (4.6, 3.8))
        yield _figure(
            chart,
            f"numbers answered and true of {name}",
            "Each point stands for a twelfth of the decisions, by the number answered.",
        )
    for title, groups in part.survival:
        chart = _chart(partial(plot_survival, groups=groups, title=f"Survival: {title}"), (4.6, 3.8))
        yield _figure(
            chart,
            f"survival curves of {title}",
            "Decisions by the risk answered: dashed the curve answered, solid what happened (Kaplan-Meier), shaded its 95 % "
            "interval over episodes.",
        )


def _meanings() -> str:
    return _table(
        "Words of the tables above", ["word", "what it is"], [[word, words] for word, words in MEANING.items()]
    )


def _limits(played: Played) -> str:
    n = len(played.watched)
    items = [
        f"These are {n} episodes of one agent in one environment, seeds {played.plan.seed} to {played.plan.seed + n - 1}. Another training "
        "run, other seeds or another environment give other numbers.",
        "Intervals say how much other episodes of the same agent would differ. They say nothing about other agents, and where there was no "
        "event at all they are too narrow.",
        "A catastrophe that was flagged is not one that a veto averts: what is executed instead can fail too. What comes of a vetoed "
        "action is never seen, so false alarms are counted where nobody interfered.",
        "The worst moments are chosen because they are the worst; they are no sample.",
        "A threshold picked from the table above is a guess that looks good on these episodes; certify() gives one with a guarantee.",
    ]
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], marks: Sequence[bool] | None = None
) -> str:
    body = ""
    for n, row in enumerate(rows):
        cells = [f'<th scope="row" data-label="{escape(head[0])}"><span>{escape(row[0])}</span></th>']
        cells += [
            f'<td data-label="{escape(name)}"><span>{escape(cell)}</span></td>'
            for name, cell in zip(head[1:], row[1:], strict=True)
        ]
        chosen = ' class="chosen"' if marks is not None and marks[n] else ""
        body += f"<tr{chosen}>{''.join(cells)}</tr>"
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    kind = ' class="pairs"' if len(head) == 2 else ""
    return (
        f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    )


def _chart(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """An SVG of one chart, its text as text."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sb3_qa", "font.family": "sans-serif"}):
        figure, axes = new_figure(size=size)
        draw(axes)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _figure(chart: bytes, alt: str, words: str) -> str:
    return f"<figure>{_image(chart, alt)}<figcaption>{escape(words)}</figcaption></figure>"


def _image(chart: bytes, alt: str) -> str:
    return f'<img src="{_data(chart, "svg+xml")}" alt="{escape(alt)}">'


def _data(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _interval(value: Interval, digits: int = 3, *, percent: bool = False) -> str:
    if not np.isfinite(value.estimate):
        return "not known"
    scale, unit = (100.0, " %") if percent else (1.0, "")
    low, high = (f"{x * scale:.{digits}g}" if np.isfinite(x) else "?" for x in (value.low, value.high))
    return f"{value.estimate * scale:.{digits}g}{unit} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if np.isfinite(share) else "not finite"
