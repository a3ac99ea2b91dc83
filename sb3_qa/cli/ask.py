"""``python -m sb3_qa ask``: a conversation with an agent while it acts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from sb3_qa.cli.agents import as_seen_by, check_seed, load_agent, make_env
from sb3_qa.cli.conversation import Conversation
from sb3_qa.errors import QAError

HISTORY = Path("~/.sb3_qa_history")
HISTORY_LENGTH = 1000


@dataclass
class Args:
    """Step an environment in the terminal, and ask its agent what is, what will be, and what would be if."""

    model: Annotated[Path, tyro.conf.Positional]
    """A model written by model.save() (.zip), or an answerer written by qa.save() (.qa)."""
    env: str
    """The environment: a registered name, or module:Name-v0."""
    env_kwargs: str = "{}"
    """For gym.make, as JSON."""
    algorithm: str | None = None
    """The model's algorithm, e.g. ppo; found out if not given."""
    frame_stack: int = 1
    """How many observations the policy sees at once."""
    normalize: Path | None = None
    """Statistics written by VecNormalize.save()."""
    seed: int = 0
    """Of the first episode."""
    sample: bool = False
    """Let the agent sample its actions, as in training, instead of taking those it likes best."""
    show: bool = True
    """Show the environment after each step."""
    width: int = 60
    """Columns that a frame is drawn in."""


def main(argv: Sequence[str]) -> None:
    """Hold the conversation; ends with the input."""
    args = tyro.cli(Args, args=list(argv), prog="python -m sb3_qa ask")
    check_seed(args.seed)
    agent = load_agent(args.model, args.algorithm)
    env = make_env(args.env, args.env_kwargs, frame_stack=args.frame_stack, normalize=args.normalize)
    env = as_seen_by(agent, env)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    talk = Conversation(agent, env, console, deterministic=not args.sample, show=args.show, width=args.width)
    talk.begin(args.seed)
    for line in _lines(console, talk):
        try:
            if not talk.say(line):
                break
        except QAError as error:
            console.print(str(error), style="red", markup=False)
    env.close()


def _lines(console: Console, talk: Conversation) -> Iterator[str]:
    """What is typed, with history and completion; piped input is repeated, so that what comes out reads as a conversation."""
    typed = sys.stdin.isatty()
    history = HISTORY.expanduser()
    if typed:
        _complete(talk.completions, history)
    try:
        while True:
            try:
                line = input(talk.prompt)
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if not typed:
                console.print(line, markup=False)
            yield line
    finally:
        if typed:
            _keep(history)


def _complete(words: Sequence[str], history: Path) -> None:
    try:
        import readline
    except ImportError:  # not on Windows: typing works all the same
        return

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        fitting = [word for word in words if word.lower().startswith(line.lower())]
        return fitting[state] if state < len(fitting) else None

    readline.set_completer_delims("")  # what is completed is the whole line: questions have spaces
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    if history.exists():
        readline.read_history_file(history)


def _keep(history: Path) -> None:
    try:
        import readline

        readline.set_history_length(HISTORY_LENGTH)
        readline.write_history_file(history)
    except (ImportError, OSError):  # nowhere to keep it
        return
