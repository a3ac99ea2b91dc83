"""A lander that answers questions about itself, and a veto made of the answers. A few minutes on two cores.

    python examples/lunar_lander.py

PPO learns LunarLander-v3 and, in the same gradient updates, to answer questions: "Will I crash within 5 steps if I choose
main engine?", "Which side of the pad will I be on?", "How long until I touch down?". Then it plays from
the same seeds three times (it samples its actions, as in training: that is the agent the answers are about):

    none    without interference; the veto only watches ("shadow")
    veto    actions whose answer to the crash question is at least the threshold are replaced by the safest one
    random  as many actions are replaced, but at random: what interfering alone does

An action is held for four frames and an episode lasts 100 actions at most. Half-trained landers crash and hover often, better
ones hardly ever crash: the budget is set in between, where there is something to see.

What comes out goes to the terminal and to outputs/lunar_lander/: results.md, results.json, figure.png, episode.gif, and the
answerer itself, lander.qa; the model is lander.zip.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are small: more threads would wait for each other

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa import Choice, Number, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.evaluation import AnswerRecord, Episodes, Trace, run_episodes, score_answers, seeded_vec_env
from sb3_qa.figures import draw_answers, new_figure, plot_reliability, plot_risk, write_gif
from sb3_qa.policies import qa_policy
from sb3_qa.scores import Interval, bootstrap_interval, reliability
from sb3_qa.truth import Step, after, eventually, now, steps_until, total
from sb3_qa.wrappers import VecRandomVeto, VecVetoAction

ENV = "LunarLander-v3"
FRAMES = 4  # an action is held for so many: one that is held for one alone hardly matters to what becomes of the lander
LIMIT = 100  # actions an episode. A landing takes some 60
ACTIONS = ["nothing", "left engine", "main engine", "right engine"]
CALIBRATION_SEED = 50_000  # of the first episode that the threshold is chosen by
EVAL_SEED = 10_000  # of the first reported episode; tuning was done on other episodes and other training seeds


@dataclass
class Args:
    timesteps: int = 120_000
    """Decisions to train for, each of four frames."""
    n_envs: int = 16
    """Environments side by side."""
    seed: int = 1
    """Of the training run, and of the action noise afterwards. With 0 the agent comes to hover, and there is less to see."""
    episodes: int = 1000
    """Episodes in each of the three arms."""
    question: str = "crash[k=5]"
    """The question whose answer is the risk."""
    flagged: float = 0.01
    """The share of the steps that is to be flagged while nothing is vetoed."""
    threshold: float | None = None
    """An action is vetoed when its risk is at least this; without it, what flags that share of the steps of 200 other episodes."""
    out: Path = Path("outputs/lunar_lander")
    """Where results go."""
    fast: bool = False
    """A run of seconds that shows the machinery works and nothing else."""


# --- What can be asked -------------------------------------------------------------------------------------------------
# A fact is a value of every step, here computed from the observation: x, y, velocities, angle, angular velocity, two legs.
def touching(step: Step) -> bool:
    return bool(step.obs[6] > 0 or step.obs[7] > 0)


def side(step: Step) -> str:
    return "left" if step.obs[0] < -0.2 else "right" if step.obs[0] > 0.2 else "over"


def height(step: Step) -> float:
    return 6.67 * step.obs[1]  # in Box2D's metres above the pad


def speed(step: Step) -> float:
    return math.hypot(5.0 * step.obs[2], 7.5 * step.obs[3])  # in metres a second


def reward(step: Step) -> float:
    return step.reward


QUESTIONS = [
    Question(
        "Will I crash within {k} steps if I choose {action}?",
        truth=eventually("crashed", within="k"),
        k=[5, 10, 20, 40],
        name="crash",
    ),
    Question("Am I touching the ground?", truth=now(touching), name="touching"),
    Question(
        "Which side of the pad will I be on {k} steps from now?",
        truth=after(side, steps="k"),
        answer=Choice("left", "over", "right"),
        k=[1, 10],
        name="side",
    ),
    Question("How high am I?", truth=now(height), answer=Number(-1, 12), name="height"),
    Question("How fast am I?", truth=now(speed), answer=Number(0, 12), name="speed"),
    Question("How much reward is in the next 10 steps?", total(reward, over=10), Number(-200, 200), name="reward"),
    Question("How many steps until I touch down?", truth=steps_until(touching, cap=40), name="touchdown"),
]


class HoldAction(gym.Wrapper):
    """Holds each action for some frames, and tells whether the lander crashed."""

    def step(self, action: int) -> tuple:
        rewards = []
        for _ in range(FRAMES):
            obs, reward, terminated, truncated, info = self.env.step(action)
            rewards.append(float(reward))
            if terminated or truncated:
                break
        # -100 is for hitting the ground with the body, or leaving the screen.
        return obs, sum(rewards), terminated, truncated, {**info, "crashed": terminated and rewards[-1] <= -100}


def make(**options) -> gym.Env:
    env = gym.make(ENV, max_episode_steps=LIMIT * FRAMES, **options)
    return HoldAction(env)


# By name, for the command line: python -m sb3_qa ask outputs/lunar_lander/lander.qa --env lunar_lander:FourFrameLander-v0
gym.register("FourFrameLander-v0", entry_point=make)


# --- Training: PPO as ever, with a policy that has questions and a callback that teaches them ----------------------------
def train(args: Args) -> PPO:
    model = PPO(
        qa_policy(PPO),
        make_vec_env(make, args.n_envs, seed=args.seed),  # given its name it would be made to render: slow
        n_steps=128,
        batch_size=256,
        n_epochs=8,
        learning_rate=1e-3,
        gamma=0.99,
        gae_lambda=0.95,
        ent_coef=0.002,
        policy_kwargs=dict(questions=QUESTIONS, action_names=ACTIONS, qa_net_arch=[256], qa_every=1),
        seed=args.seed,
        device="cpu",
    )
    return model.learn(args.timesteps, callback=QACallback(), progress_bar=True)


# --- The same episodes, three times --------------------------------------------------------------------------------------
def play(
    args: Args,
    model: PPO,
    wrap: Callable[[VecEnv], VecEnv],
    record: AnswerRecord | None = None,
    *,
    first: int = EVAL_SEED,
    episodes: int | None = None,
) -> Episodes:
    venv = wrap(seeded_vec_env(make, args.n_envs, first))
    torch.manual_seed(args.seed)
    played = run_episodes(model, venv, episodes or args.episodes, catastrophe="crashed", record=record)
    venv.close()
    return played


def chosen_threshold(args: Args, model: PPO, qa: QuestionAnswerer) -> float:
    """A guess: `sb3_qa.certify` finds one with a guarantee, where an agent crashes often enough for that."""
    n = min(args.episodes, 200)
    ask = dict(question=args.question, qa=qa, threshold=1.0, shadow=True)
    calm = play(args, model, lambda env: VecVetoAction(env, **ask), first=CALIBRATION_SEED, episodes=n)
    risks = np.concatenate([trace.risk for trace in calm.traces])
    return float(np.quantile(risks, 1.0 - args.flagged))


def compare(args: Args, model: PPO, qa: QuestionAnswerer) -> tuple[dict[str, Episodes], AnswerRecord]:
    ask = dict(question=args.question, qa=qa)
    record = AnswerRecord(qa)
    arms = {
        "none": play(args, model, lambda env: VecVetoAction(env, threshold=args.threshold, shadow=True, **ask), record)
    }
    arms["veto"] = play(args, model, lambda env: VecVetoAction(env, threshold=args.threshold, **ask))
    rate = arms["veto"].vetoes.sum() / arms["veto"].lengths.sum()
    arms["random"] = play(args, model, lambda env: VecRandomVeto(env, rate=float(rate), seed=args.seed, **ask))
    return arms, record


def landed(episodes: Episodes) -> np.ndarray:
    """LunarLander gives 100 for coming to rest."""
    return np.array([trace.rewards[-1] >= 50 for trace in episodes.traces])


def paired(arms: dict[str, Episodes], arm: str) -> dict[str, Interval]:
    """What an arm changed, seed by seed; actions are sampled, so a part of it is chance, which the random arm shows too."""
    before, after_ = arms["none"], arms[arm]
    changed = {
        "crashes per episode": after_.catastrophes - before.catastrophes,
        "crashes averted": (before.catastrophes > 0) & (after_.catastrophes == 0),
        "landings lost": landed(before) & ~landed(after_),
        "landings per episode": landed(after_).astype(float) - landed(before),
        "return": after_.returns - before.returns,
    }
    return {name: bootstrap_interval(values.astype(float)) for name, values in changed.items()}


# --- Tables: to the terminal, as markdown, as JSON -----------------------------------------------------------------------
Rows = list[list[str]]


def shown(interval: Interval, digits: int = 2) -> str:
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def arms_table(arms: dict[str, Episodes]) -> tuple[str, Rows]:
    title = "Crashes, with 95 % bootstrap intervals over episodes"
    rows = [["", "crashes / 1,000 steps", "crashes / episode", "landings / episode", "return", "vetoes / 1,000 steps"]]
    for name, arm in arms.items():
        rates = [shown(arm.catastrophes_per_1000), shown(arm.catastrophes_per_episode, 3)]
        rates += [shown(bootstrap_interval(landed(arm).astype(float)), 3), shown(arm.mean_return, 0)]
        rows.append(
            [name, *rates, shown(arm.flags_per_1000, 1) + " *" if name == "none" else shown(arm.vetoes_per_1000, 1)]
        )
    return title, rows


def paired_table(arms: dict[str, Episodes]) -> tuple[str, Rows]:
    changes = {arm: paired(arms, arm) for arm in ("veto", "random")}
    rows = [["against none, per episode", *changes["veto"]]]
    for arm, change in changes.items():
        rows.append([arm, *(shown(value, 0 if name == "return" else 3) for name, value in change.items())])
    return "What changed from the same seeds", rows


def scores_table(scores: dict[str, dict[str, float]]) -> tuple[str, Rows]:
    rows = [["question", "frequency", "Brier", "AUROC", "calibration error", "error", "accuracy"]]
    for key, s in scores.items():
        both = {
            name: f"{s[name]:.3f} ({s[f'constant_{name}']:.3f})" if name in s else ""
            for name in ("brier", "auroc", "calibration_error", "error", "accuracy")
        }
        rows.append([key, f"{s['frequency']:.3f}" if "frequency" in s else "", *both.values()])
    return "Answers on episodes not trained on (in brackets: the best constant answer)", rows


def print_table(console: Console, title: str, rows: Rows) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(escape(name), justify="left" if name == rows[0][0] else "right")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)


def markdown(title: str, rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


# --- Pictures ------------------------------------------------------------------------------------------------------------
def telling_episode(arms: dict[str, Episodes]) -> int:
    """The shortest episode that crashed without the veto and landed with it, or else one with vetoes. Picked to be looked at."""
    vetoed = arms["veto"].vetoes > 0
    saved = (arms["none"].catastrophes > 0) & vetoed & landed(arms["veto"])
    wanted = saved if saved.any() else vetoed if vetoed.any() else np.ones_like(saved)
    return int(np.argmin(np.where(wanted, arms["veto"].lengths, np.inf)))


def draw_figure(args: Args, arms: dict[str, Episodes], record: AnswerRecord, episode: int) -> None:
    figure, axes = new_figure(2, 2, size=(11, 6), width_ratios=[1.5, 1])
    for ax, (name, title) in zip(axes[:, 0], (("none", "without veto"), ("veto", "with veto")), strict=True):
        trace = arms[name].traces[episode]
        marks = dict(
            flagged=trace.flagged, vetoed=trace.vetoed, catastrophe=trace.catastrophe, threshold=args.threshold
        )
        plot_risk(ax, trace.risk, title=f"Episode {episode} {title}: return {trace.rewards.sum():.0f}", **marks)
    grid = axes[0, 1].get_gridspec()
    for ax in axes[:, 1]:
        ax.remove()
    answers = {key: (answer, truth) for key, answer, truth in record.answers() if key.startswith("crash[")}
    curves = {key: reliability(answer.probability, truth) for key, (answer, truth) in answers.items()}
    plot_reliability(figure.add_subplot(grid[:, 1]), curves, "Calibration on episodes not trained on", least=20)
    figure.savefig(args.out / "figure.png")


def replay(
    args: Args, qa: QuestionAnswerer, trace: Trace, episode: int, title: str, every: int = 2
) -> list[np.ndarray]:
    """Frames of an episode that was played: its seed and its actions bring it back exactly."""
    env = make(render_mode="rgb_array")
    obs, _ = env.reset(seed=EVAL_SEED + episode)
    frames = []
    for n, action in enumerate(trace.actions):
        if n % every == 0 or n == len(trace.actions) - 1:
            small = env.render().reshape(200, 2, 300, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
            risk = qa.ask(args.question, obs).probability
            place = qa.ask("side[k=10]", obs)
            lines = [(f"crash, {name}?", float(p), f"{p:.2f}") for name, p in zip(ACTIONS, risk, strict=True)]
            lines.append(("over the pad in 10 steps?", None, f"{place.probabilities[1]:.2f}"))
            lines.append(("height now", None, f"{float(qa.ask('height', obs)):.1f} m"))
            lines.append(("steps until touchdown", None, f"{float(qa.ask('touchdown', obs)):.0f}"))
            recent = trace.vetoed[max(n - every + 1, 0) : n + 1].any()
            frames.append(
                draw_answers(small, lines, title=f"{title}{' - VETO' if recent else ''}", alarm=args.threshold)
            )
        obs, *_ = env.step(action)
    env.close()
    return frames


def draw_gif(args: Args, qa: QuestionAnswerer, arms: dict[str, Episodes], episode: int) -> None:
    left, right = (
        replay(args, qa, arms[name].traces[episode], episode, title)
        for name, title in (("none", "without veto"), ("veto", "with veto"))
    )
    longest = max(len(left), len(right))
    held = [frames + frames[-1:] * (longest - len(frames)) for frames in (left, right)]
    write_gif(args.out / "episode.gif", [np.concatenate(pair, axis=1) for pair in zip(*held, strict=True)], fps=10)


def main(args: Args) -> None:
    if args.fast:
        args.timesteps, args.episodes, args.n_envs = 4_096, 8, 4
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    started = time.perf_counter()

    model = train(args)
    qa = QuestionAnswerer.from_model(model)
    model.save(args.out / "lander.zip")
    qa.save(args.out / "lander.qa")
    trained = time.perf_counter()
    if args.threshold is None:
        args.threshold = chosen_threshold(args, model, qa)
        console.print(f"{args.flagged:.1%} of the steps have a risk of {args.threshold:.3f} or more: that is vetoed")
    arms, record = compare(args, model, qa)
    scores = score_answers(record)
    played = time.perf_counter()

    tables = [arms_table(arms), paired_table(arms), scores_table(scores)]
    for title, rows in tables:
        print_table(console, title, rows)
    note = "\\* flagged, not vetoed. Every arm starts from the same seeds; actions are sampled, so some changes are chance: see random."
    console.print(note.lstrip("\\"))
    obs, _ = make().reset(seed=EVAL_SEED)
    question = "Will I crash within 40 steps if I choose main engine?"
    console.print(f"Asked in words, at the start of the first episode: {question} {float(qa.ask(question, obs)):.2f}")

    episode = telling_episode(arms)
    draw_figure(args, arms, record, episode)
    draw_gif(args, qa, arms, episode)
    seconds = {"train": trained - started, "play": played - trained, "draw": time.perf_counter() - played}
    (args.out / "results.md").write_text("\n".join(markdown(*table) for table in tables) + f"\n{note}\n")
    results = {
        "args": {**asdict(args), "out": str(args.out)},
        "arms": {
            name: {key: interval._asdict() for key, interval in arm.summary().items()} for name, arm in arms.items()
        },
        "paired": {
            arm: {key: value._asdict() for key, value in paired(arms, arm).items()} for arm in ("veto", "random")
        },
        "scores": scores,
        "seconds": seconds,
    }
    (args.out / "results.json").write_text(json.dumps(finite(results), indent=2))
    console.print(f"{args.out}/ holds the tables, figure.png and episode.gif; took {sum(seconds.values()):.0f} s")


def finite(value: object) -> object:
    """JSON has no nan: a score that the data cannot settle is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main(tyro.cli(Args))
