"""``python -m sb3_qa report``: episodes played, and one HTML page about the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.cli.agents import Agent, as_seen_by, load_agent, make_env
from sb3_qa.errors import QAError
from sb3_qa.extras import need

__all__ = ["main", "write_report"]


@dataclass
class Args:
    """Play episodes and write one HTML page: answers against truth, what a veto stops, the worst misses and false alarms."""

    model: Annotated[Path, tyro.conf.Positional]
    """A model written by model.save() (.zip), or an answerer written by qa.save() (.qa)."""
    env: str
    """The environment: a registered name, or module:Name-v0."""
    out: Path = Path("report.html")
    """Where the page goes."""
    episodes: int = 100
    """Episodes without interference; as many again with the veto acting."""
    seed: int = 1000
    """Of the first episode. Take seeds that the agent was not trained with."""
    question: str | None = None
    """The yes/no instance about {action} that is the risk; the first one if not given."""
    threshold: float = 0.5
    """From which risk on an action is flagged and vetoed."""
    catastrophe: str | None = None
    """The info key that tells a catastrophe; the fact of the question if not given."""
    act: bool = True
    """Play again with the veto acting."""
    clips: int = 3
    """Misses, and false alarms, to be shown."""
    n_envs: int = 8
    """Environments side by side."""
    deterministic: bool = False
    """Take the actions liked best. Answers are about the agent that samples them, as in training."""
    env_kwargs: str = "{}"
    """For gym.make, as JSON."""
    algorithm: str | None = None
    """The model's algorithm, e.g. ppo; found out if not given."""
    frame_stack: int = 1
    """How many observations the policy sees at once."""
    normalize: Path | None = None
    """Statistics written by VecNormalize.save()."""


def main(argv: Sequence[str]) -> None:
    """Write the page, and say where."""
    args = tyro.cli(Args, args=list(argv), prog="python -m sb3_qa report")
    size = write_report(args)
    Console(highlight=False, soft_wrap=True).print(
        f"{args.out}: {args.episodes} episodes from seed {args.seed}, {size / 1e6:.1f} MB", markup=False
    )


def write_report(args: Args) -> int:
    """Play, and write the page.

    :return: its size in bytes
    :raises QAError: when something is missing, before anything is played where that can be known
    """
    for module in ("matplotlib", "PIL"):
        need(module, "cli,demo", "the report")
    from sb3_qa.report.moments import choose, film
    from sb3_qa.report.page import About, write_page
    from sb3_qa.report.played import Plan, play
    from sb3_qa.report.tables import question_parts

    if args.clips < 0:
        raise QAError(f"--clips got {args.clips}; expected at least 0; give e.g. 3")
    if not args.out.absolute().parent.is_dir():
        raise QAError(
            f"--out got {str(args.out)!r}; expected a folder that is there; make {str(args.out.parent)!r} first"
        )
    fields = ("episodes", "seed", "n_envs", "question", "threshold", "catastrophe", "deterministic", "act")
    plan = Plan(**{name: getattr(args, name) for name in fields})
    agent = load_agent(args.model, args.algorithm)
    make = partial(_make, args, agent)
    played = play(agent, make, plan)
    parts, left_out = question_parts(played)
    moments = [(moment, film(played, moment, make)) for moment in choose(played, args.clips)]
    kwargs = "" if json.loads(args.env_kwargs) == {} else f" {args.env_kwargs}"
    name = type(agent.model or agent.qa.policy).__name__
    about = About(args.model.name, f"{args.env}{kwargs}", name, {"questions": str(len(agent.qa.questions))})
    page = write_page(about, played, parts, left_out, moments).encode()
    temporary = args.out.with_name(f"{args.out.name}.part")
    temporary.write_bytes(page)
    temporary.replace(args.out)
    return len(page)


def _make(args: Args, agent: Agent, n_envs: int, seed: int, render: str | bool) -> VecEnv:
    env = make_env(
        args.env,
        args.env_kwargs,
        frame_stack=args.frame_stack,
        normalize=args.normalize,
        render=render,
        n_envs=n_envs,
        seed=seed,
    )
    return as_seen_by(agent, env)
