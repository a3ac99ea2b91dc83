"""``python -m sb3_qa review flight.sqlite``: what a flight record holds, and one event of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sb3_qa.errors import QAError
from sb3_qa.flight_log import KINDS, FlightEvent, FlightLog, Window
from sb3_qa.scores import false_alarm_rate

__all__ = ["main"]

WIDTH = 120  # of what is piped
DIGITS = 10  # of a seed, where it is longer shown whole only with --event; environments choose some of 39


@dataclass(frozen=True)
class Options:
    """List the flags, vetoes and catastrophes of a flight record, or show one of them."""

    path: Annotated[str, tyro.conf.Positional]
    """the flight record, as written by VecVetoAction(..., record=path)"""
    event: int | None = None
    """show this one, with the steps around it"""
    last: int = 40
    """list as many, the newest"""
    only: str | None = None
    """list only those of a kind: flag, veto, "let through", withheld, "no safe action", catastrophe or terminated"""
    frames: str | None = None
    """with --event, write its frames to this .npy file, (n, height, width, 3)"""


def main(argv: list[str]) -> None:
    """Print the list, or the event."""
    options = tyro.cli(Options, args=argv, prog="python -m sb3_qa review")
    try:
        _check(options)
    except QAError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH, no_color=True)
    with FlightLog(options.path) as log:
        if options.event is None:
            _list(console, log, options)
        else:
            _show(console, log, options.event, options.frames)


def _check(options: Options) -> None:
    """Refuse options that say nothing.

    :raises QAError: naming them
    """
    kinds = [kind.lower() for kind in KINDS]
    if options.only is not None and options.only.lower() not in kinds:
        raise QAError(f"--only got {options.only!r}; expected one of {kinds}; write e.g. --only veto")
    if options.last < 0:
        raise QAError(f"--last got {options.last}; expected a number of events, at least 0; write e.g. --last 40")
    if options.frames is not None and options.event is None:
        raise QAError(
            f"--frames got {options.frames!r} and no event; expected one, whose frames to write; write --event NUMBER"
        )


def _list(console: Console, log: FlightLog, options: Options) -> None:
    events, counts = log.events(), log.counts
    for number, run in log.runs().items():
        console.print(
            f"run {number}, {_when(run['started'])} UTC, process {run['process']}: {run['wrapper']} on {run['question']}, threshold "
            f"{run['threshold']:g}, on_veto {run['on_veto']}{', shadow' if run['shadow'] else ''}",
            markup=False,
        )
    flags = log.flags()
    tally = [
        f"{len(events)} events",
        f"{len(flags['outcome'])} flags",
        f"{sum(event.vetoed for event in events)} vetoes",
        f"{sum(bool(event.catastrophe) for event in events)} catastrophes",
        *(f"{n} {word}" for word, n in counts.items() if n),
    ]
    console.print(", ".join(tally))
    if any(event.let_through for event in events):
        rate = false_alarm_rate(flags["outcome"], flags["probability"], flags["executed"], episode=flags["episode"])
        console.print(
            f"false alarms: {100 * rate.estimate:.0f} % of flags [{100 * rate.low:.0f}, {100 * rate.high:.0f}], "
            "estimated from those let through",
            markup=False,
        )
    chosen = [event for event in events if options.only is None or options.only.lower() in map(str.lower, event.kinds)]
    table = Table(box=None, pad_edge=False)
    for name in (
        "event",
        "time",
        "env",
        "episode",
        "step",
        "seed",
        "risk",
        "then",
        "proposed",
        "executed",
        "what",
        "came",
    ):
        left = name in ("time", "proposed", "executed", "what", "came")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "what")
    for event in chosen[-options.last :] if options.last > 0 else []:
        table.add_row(
            *(
                str(event.id),
                _when(event.time),
                str(event.env),
                str(event.episode),
                str(event.step),
                _short_seed(event),
            ),
            *(_number(event.risk), _number(event.executed_risk), _action(event.proposed), _action(event.executed)),
            *(", ".join(event.kinds), _outcome(event)),
            style="bold red" if event.catastrophe else None,
        )
    console.print(table)
    if len(chosen) > options.last > 0:
        console.print(f"({len(chosen) - options.last} earlier ones are not shown: --last {len(chosen)})")


def _show(console: Console, log: FlightLog, number: int, frames: str | None) -> None:
    event = log.event(number)
    window = log.window(number)
    run = log.runs().get(event.run, {})
    console.print(f"event {event.id}: {', '.join(event.kinds)}", style="bold", markup=False)
    lines = {
        "when": f"{_when(event.time)} UTC, run {event.run}, environment {event.env}, episode {event.episode}, step {event.step}",
        "seed": f"{_seed(event)} ({event.since_seed} episodes after it)" if event.seed is not None else "not known",
        "question": f"{run.get('question', '?')}, threshold {run.get('threshold', float('nan')):g}",
        "proposed": f"{_action(event.proposed)}, risk {_number(event.risk)}",
        "executed": f"{_action(event.executed)}, risk {_number(event.executed_risk)}, with probability of the proposed one "
        f"{event.probability:g}",
        "came of it": _outcome(event) or "-",
    }
    for word, line in lines.items():
        console.print(f"  {word:<11} {line}", markup=False, soft_wrap=True)
    actions = [_action(plain.tolist()) for plain in event.actions] if event.actions is not None else None
    order = np.argsort(np.where(np.isfinite(event.risks), event.risks, np.inf), kind="stable")
    console.print(f"\nrisks of {len(event.risks)} actions, from the safest")
    told = [f"{actions[i] if actions else i}: {_number(float(event.risks[i]))}" for i in order[:12].tolist()]
    console.print("  " + "   ".join(told) + ("   ..." if len(order) > 12 else ""), markup=False)
    console.print("\nanswers before the action (of each action compared, for questions about one)")
    for key, answer in event.answers.items():
        several = isinstance(answer, list)
        shown = [_answer(each) for each in (answer if several else [answer])]
        console.print(f"  {key:<24} {'  '.join(shown[:12])}{'  ...' if len(shown) > 12 else ''}", markup=False)
    if window is None:
        console.print("\nno steps were recorded around it")
    else:
        _steps(console, event, window)
    if frames is not None:
        if window is None or window.frames is None:
            console.print(
                "\nno frames were recorded: VecVetoAction(..., record=FlightRecorder(path, frames=True)) does"
            )
        else:
            np.save(frames, window.frames, allow_pickle=False)
            console.print(f"\n{len(window.frames)} frames written to {frames}", markup=False)


def _steps(console: Console, event: FlightEvent, window: Window) -> None:
    console.print("\nsteps around it (* the event)")
    table = Table(box=None, pad_edge=False)
    for name in ("", "step", "proposed", "executed", "risk", "reward", "observation"):
        table.add_column(
            name, justify="right" if name in ("step", "risk", "reward") else "left", no_wrap=name != "observation"
        )
    for i, step in enumerate(window.step.tolist()):
        table.add_row(
            *("*" if step == event.step else "", str(step), _action(window.proposed[i].tolist())),
            *(_action(window.executed[i].tolist()), _number(float(window.risk[i])), f"{window.reward[i]:.3g}"),
            _observation({k: v[i] for k, v in window.obs.items()} if isinstance(window.obs, dict) else window.obs[i]),
            style="bold" if step == event.step else None,
        )
    if window.last_obs is not None:
        table.add_row("", "end", "", "", "", "", _observation(window.last_obs))
    console.print(table)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _number(value: float | None) -> str:
    return "?" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _seed(event: FlightEvent) -> str:
    return "?" if event.seed is None else f"{event.seed}+{event.since_seed}" if event.since_seed else str(event.seed)


def _short_seed(event: FlightEvent) -> str:
    digits = "" if event.seed is None else str(event.seed)
    return _seed(event) if len(digits) <= DIGITS else _seed(event).replace(digits, f"{digits[:6]}…")


def _outcome(event: FlightEvent) -> str:
    return {True: "catastrophe", False: "none", None: ""}[event.outcome]


def _action(action: Any) -> str:
    if isinstance(action, list):
        return f"({', '.join(_action(each) for each in action)})"
    return f"{action:.3g}" if isinstance(action, float) else str(action)


def _answer(answer: Any) -> str:
    return f"{answer:.3g}" if isinstance(answer, float) else "?" if answer is None else str(answer)


def _observation(obs: Any) -> str:
    if isinstance(obs, dict):
        return "; ".join(f"{key} {_observation(value)}" for key, value in obs.items())
    if obs.size > 12:
        return f"{'x'.join(map(str, obs.shape))} {obs.dtype}, mean {obs.mean():.3g}"
    return " ".join(f"{value:.3g}" for value in obs.ravel().tolist())
