"""Hundreds of templated questions about a MiniGrid room, and how well new wordings of them are answered.

    pip install 'sb3-qa[demo,minigrid]'          # and sentence, for the paraphrases
    python examples/language.py

A PPO agent learns to find the goal in a room with twenty random objects and three doors; its answerer learns about 500
questions made of templates: colour x object x distance x direction x horizon, comparisons in both orders, the state of doors.
About 340 others are kept out of training (`Question(holdout=...)`) and asked afterwards, of states that the agent then meets:

- combination: a quarter of colour x object x direction x distance, and of door state x distance or direction
- comparison: a half of all ordered pairs of objects
- distance, horizon: 3 and 5 cells where 1, 2, 4 and 6 are taught, 7 steps where 5 and 10 are
- object: three objects that are named in comparisons alone, and in no other template; the hardest

Written down before the five runs: the unit is a run (a seed); a figure is the mean over runs of the mean over instances of the
share of right answers (probability above 1/2), with a 95 % t interval over runs. The claim for "text" is that held-out instances,
all of the above together, are answered at most 3 points worse than taught ones of the same templates, and for "sentence" that
paraphrases are answered at most 5 points worse than the exact texts of the same instances (what is refused counts as right half of
the time). Accuracy rewards saying no to what is rare, so the mean of the accuracy on states where the truth is yes and
where it is no (balanced) stands beside it, with two controls: the best constant answer to each instance, and the same encoder
trained on blank observations. Settings were chosen on seed 0; the runs are seeds 101 to 105.

One line a run is appended to outputs/language/runs.jsonl; runs that are there are not repeated. The tables are results.md.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are small: more threads would wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gymnasium as gym
import numpy as np
import torch
import tyro
from paraphrases import PARAPHRASES, UNTAUGHT
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.labels import event_times, find_cuts, window_after
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, eventually, now, table

try:
    from minigrid.core.constants import IDX_TO_COLOR, OBJECT_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Ball, Box, Door, Goal, Key
    from minigrid.minigrid_env import MiniGridEnv
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed; install it with: pip install 'sb3-qa[demo,minigrid]'") from error

COLORS = ["red", "green", "blue", "yellow", "purple", "grey"]
KINDS = ["ball", "key", "box"]
THINGS = [f"{color} {kind}" for color in COLORS for kind in KINDS]
SIDES = ["to my left", "to my right", "straight ahead"]
DISTANCES = [1, 2, 3, 4, 5, 6]
STATES = ["open", "closed", "locked"]
KIND_OF = {OBJECT_TO_IDX[kind]: kind for kind in KINDS}
FAR = 99
HELD_OUT = ("held out", "combination", "comparison", "distance", "horizon", "object")


class Room(MiniGridEnv):
    """A room of 9 x 9 free cells with a goal, twenty objects and three doors, all in random places."""

    def __init__(self) -> None:
        super().__init__(MissionSpace(lambda: "reach the goal"), grid_size=11, max_steps=64, see_through_walls=True)

    def _gen_grid(self, width: int, height: int) -> None:
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        for _ in range(3):
            state = self._rand_int(0, 3)
            self.place_obj(Door(self._rand_elem(COLORS), is_open=state == 0, is_locked=state == 2))
        for _ in range(20):
            self.place_obj(self._rand_elem([Ball, Key, Box])(self._rand_elem(COLORS)))
        self.place_obj(Goal())
        self.place_agent()
        self.mission = "reach the goal"


class Facts(gym.Wrapper[Any, Any, Any, Any]):
    """What is seen as one-hot cells with their places, and the facts of it as arrays over slot values."""

    def __init__(self, env: MiniGridEnv, blank: bool = False) -> None:
        super().__init__(env)
        self.blank = blank
        self.observation_space = gym.spaces.Box(0.0, 1.0, (49, 11 + 6 + 3 + 14), np.float32)
        self.places = np.concatenate([np.repeat(np.eye(7), 7, axis=0), np.tile(np.eye(7), (7, 1))], axis=1)
        self.hot = [np.eye(n, dtype=np.float32) for n in (11, 6, 3)]

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return self._seen(obs["image"]), {**info, **facts_of(obs["image"])}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(obs["image"]), reward, terminated, truncated, {**info, **facts_of(obs["image"])}

    def _seen(self, image: np.ndarray) -> np.ndarray:
        if self.blank:
            return np.zeros(self.observation_space.shape, np.float32)
        cells = image.reshape(49, 3)
        parts = [hot[cells[:, n]] for n, hot in enumerate(self.hot)]
        return np.concatenate([*parts, self.places], axis=1).astype(np.float32)


def facts_of(image: np.ndarray) -> dict[str, np.ndarray]:
    """Facts of a view (7, 7, 3), in which the agent stands at (3, 6) and looks along decreasing rows."""
    things = np.full((len(THINGS), len(SIDES)), FAR)  # steps to the nearest one on each side
    doors = np.full((len(STATES), len(SIDES)), FAR)
    kinds = image[..., 0]
    for x, y in np.argwhere((kinds >= OBJECT_TO_IDX["door"]) & (kinds <= OBJECT_TO_IDX["box"])).tolist():
        kind, color, state = image[x, y].tolist()
        side, away = 0 if x < 3 else 1 if x > 3 else 2, abs(x - 3) + 6 - y
        if kind == OBJECT_TO_IDX["door"]:
            doors[state, side] = min(doors[state, side], away)
        elif kind in KIND_OF and away:  # where the agent stands is what it carries
            thing = THINGS.index(f"{IDX_TO_COLOR[color]} {KIND_OF[kind]}")
            things[thing, side] = min(things[thing, side], away)
    distance = things.min(axis=1)
    limits = np.array(DISTANCES)
    grid = (len(COLORS), len(KINDS))
    return {
        "seen": (distance < FAR).reshape(grid),
        "near": (distance[:, None] <= limits).reshape(*grid, -1),
        "side": (things < FAR).reshape(*grid, -1),
        "reach": (things[..., None] <= limits).reshape(*grid, len(SIDES), -1),
        "nearer": distance[:, None] < distance[None, :],
        "door": doors.min(axis=1) < FAR,
        "door_near": doors.min(axis=1)[:, None] <= limits,
        "door_side": doors < FAR,
    }


# Objects that are named in comparisons alone, and numbers between those taught.
NEVER = [dict(color="red", kind="key"), dict(color="blue", kind="ball"), dict(color="yellow", kind="box")]
BETWEEN = [dict(d=3), dict(d=5)]
AXES = dict(color=COLORS, kind=KINDS)


def drawn(n: int, share: float) -> list[int]:
    """A share of n, the same each time."""
    return sorted(np.random.default_rng(0).permutation(n)[: round(share * n)].tolist())


def questions() -> list[Question]:
    """The templates."""
    pairs = [dict(first=a, second=b) for a in THINGS for b in THINGS if a != b]
    same = [dict(first=thing, second=thing) for thing in THINGS]  # no question, and not asked
    sectors = [dict(color=c, kind=k, side=s, d=d) for c in COLORS for k in KINDS for s in SIDES for d in (2, 4, 6)]
    doors = [dict(state=state, d=d) for state in STATES for d in DISTANCES]
    return [
        Question("Is there a {color} {kind} in view?", now(table("seen", **AXES)), name="seen", holdout=NEVER, **AXES),
        Question(
            "Is there a {color} {kind} within {d} cells of me?",
            now(table("near", **AXES, d=DISTANCES)),
            name="near",
            holdout=[*NEVER, *BETWEEN],
            **AXES,
            d=DISTANCES,
        ),
        Question(
            "Is a {color} {kind} {side}?",
            now(table("side", **AXES, side=SIDES)),
            name="side",
            holdout=NEVER,
            **AXES,
            side=SIDES,
        ),
        Question(
            "Is a {color} {kind} {side} and within {d} cells?",
            now(table("reach", **AXES, side=SIDES, d=DISTANCES)),
            name="reach",
            holdout=[*NEVER, *(sectors[n] for n in drawn(len(sectors), 0.25))],
            **AXES,
            side=SIDES,
            d=[2, 4, 6],
        ),
        Question(
            "Is the {first} nearer to me than the {second}?",
            now(table("nearer", first=THINGS, second=THINGS)),
            name="nearer",
            holdout=[*(pairs[n] for n in drawn(len(pairs), 0.5)), *same],
            first=THINGS,
            second=THINGS,
        ),
        Question(
            "Will I see a {color} {kind} within {k} steps?",
            eventually(table("seen", **AXES), within="k"),
            name="will_see",
            holdout=[*NEVER, dict(k=7)],
            **AXES,
            k=[2, 5, 7, 10],
        ),
        Question(
            "Will a {color} {kind} be in view in exactly {k} steps?",
            after(table("seen", **AXES), steps="k"),
            name="later",
            holdout=[*NEVER, dict(k=7)],
            **AXES,
            k=[1, 2, 5, 7, 10],
        ),
        Question(
            "Is there a door in view that is {state}?", now(table("door", state=STATES)), name="door", state=STATES
        ),
        Question(
            "Is a door that is {state} within {d} cells of me?",
            now(table("door_near", state=STATES, d=DISTANCES)),
            name="door_near",
            holdout=[doors[n] for n in drawn(len(doors), 0.25)],
            state=STATES,
            d=DISTANCES,
        ),
        Question(
            "Is a door that is {state} {side}?",
            now(table("door_side", state=STATES, side=SIDES)),
            name="door_side",
            holdout=[dict(state="locked", side="to my left"), dict(state="open", side="straight ahead")],
            state=STATES,
            side=SIDES,
        ),
    ]


def kinds_of_holdout(name: str, slots: dict[str, Any], taught: bool) -> list[str]:
    """Which figures an instance of a template counts in."""
    if taught:
        return ["taught"]
    if "first" in slots:
        return [] if slots["first"] == slots["second"] else ["held out", "comparison"]
    if any(slots.get("color") == never["color"] and slots.get("kind") == never["kind"] for never in NEVER):
        return ["held out", "object"]
    if slots.get("k") == 7:
        return ["held out", "horizon"]
    return ["held out", "distance" if name == "near" else "combination"]


class Objects(BaseFeaturesExtractor):
    """The same small network for everything that is seen but floor and wall, added up, and the walls."""

    def __init__(self, space: gym.spaces.Box, width: int = 256) -> None:
        super().__init__(space, width)
        n_cells, n = space.shape
        self.each = torch.nn.Sequential(
            torch.nn.Linear(n, 128), torch.nn.ReLU(), torch.nn.Linear(128, width), torch.nn.ReLU()
        )
        self.walls = torch.nn.Linear(n_cells, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        there = obs[..., OBJECT_TO_IDX["door"] : OBJECT_TO_IDX["goal"] + 1].sum(-1) > 0
        walls = self.walls(obs[..., OBJECT_TO_IDX["wall"]])
        return self.norm(walls.index_add(0, there.nonzero()[:, 0], self.each(obs[there])))


@dataclass
class Args:
    seeds: int = 5
    """Runs of each arm."""
    first_seed: int = 101
    """Of the first run; settings were chosen on seed 0."""
    arms: tuple[str, ...] = ("text", "sentence", "blank")
    """"text" and "sentence" are encoders, "blank" is "text" with nothing to see."""
    timesteps: int = 24_576
    """Environment steps of a run; a third of them with blank observations."""
    eval_steps: int = 400
    """Steps of each of 8 environments that answers are scored on."""
    out: Path = Path("outputs/language")
    """Where results go."""


def make_env(blank: bool) -> Any:
    return lambda: Monitor(Facts(Room(), blank))


def train(arm: str, seed: int, timesteps: int) -> tuple[Any, QuestionAnswerer]:
    """An agent and its answerer."""
    env = DummyVecEnv([make_env(arm == "blank")] * 16)
    kwargs = dict(
        questions=questions(),
        qa_encoder="text" if arm == "blank" else arm,
        qa_net_arch=[128],
        qa_every=1,
        qa_coef=4.0,
        features_extractor_class=Objects,
        net_arch=[],
    )
    model = PPO(
        qa_policy(PPO),
        env,
        seed=seed,
        n_steps=256,
        batch_size=128,
        n_epochs=8,
        ent_coef=0.01,
        learning_rate=lambda left: 2e-3 * min(1.0, 2.0 * left),
        policy_kwargs=kwargs,
    )
    model.learn(timesteps // 3 if arm == "blank" else timesteps, callback=QACallback())
    return model, QuestionAnswerer.from_model(model)


def meet(model: Any, seed: int, n_steps: int, blank: bool) -> dict[str, np.ndarray]:
    """States that the agent meets: observations, facts of them and of those they led to, and ends of episodes."""
    env = DummyVecEnv([make_env(blank)] * 8)
    env.seed(10_000 + seed)
    obs, infos = env.reset(), env.reset_infos
    torch.manual_seed(seed)
    keys = list(facts_of(np.zeros((7, 7, 3), int)))
    rows: dict[str, list[Any]] = {name: [] for name in ("obs", "terminated", "truncated")}
    rows |= {f"{when} {key}": [] for key in keys for when in ("now", "next")}
    for _ in range(n_steps):
        rows["obs"].append(obs.copy())
        for key in keys:
            rows[f"now {key}"].append([info[key] for info in infos])
        obs, _, dones, infos = env.step(model.predict(obs)[0])
        cut = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        rows["truncated"].append(dones & cut)
        rows["terminated"].append(dones & ~cut)
        for key in keys:
            rows[f"next {key}"].append([info[key] for info in infos])
        infos = [env.reset_infos[i] if done else info for i, (done, info) in enumerate(zip(dones, infos, strict=True))]
    return {name: np.array(row) for name, row in rows.items()}


def truth_of(instance: Any, met: dict[str, np.ndarray]) -> np.ndarray:
    """1, 0, or nan where it is not known, (n_steps * n_envs,)."""
    truth = instance.question.truth
    source, place = truth.fact.source, truth.fact.index(instance.slots)
    here, there = (
        met[f"{when} {source}"].reshape(*met["terminated"].shape, -1)[..., place] for when in ("now", "next")
    )
    ends = met["terminated"], met["truncated"]
    if truth.operator == "now":
        return here.astype(np.float32).ravel()
    if truth.operator == "after":
        return window_after(there.astype(np.float32), *ends, instance.horizon, 0.0).ravel()
    times, cuts = event_times(there, *ends), find_cuts(*ends)
    happens = (times.event & (times.known <= instance.horizon)).astype(np.float32)
    room = (
        np.where(cuts.row >= 0, cuts.step[cuts.row] if len(cuts.step) else 0, len(there))
        - np.arange(len(there))[:, None]
    )
    happens[room + 1 < instance.horizon] = np.nan
    return happens.ravel()


def right(probability: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Shares of right answers to one instance: of all, balanced, and by the best constant."""
    known = ~np.isnan(truth)
    said, true = probability[known] > 0.5, truth[known] > 0.5
    hit = said == true
    sides = [hit[true == side].mean() for side in (True, False) if (true == side).sum() >= 5]
    balanced = float(np.mean(sides)) if len(sides) == 2 else float("nan")
    return {"accuracy": float(hit.mean()), "balanced": balanced, "constant": float(max(true.mean(), 1 - true.mean()))}


def score(qa: QuestionAnswerer, met: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Figures of groups of instances: taught, held out, and kinds of those."""
    obs = met["obs"].reshape(-1, *met["obs"].shape[2:])
    instances = {**qa.catalogue.instances, **qa.catalogue.held_out}
    values = qa.values(list(instances)).of_states(qa.read(obs, keep=False))
    groups: dict[str, list[dict[str, float]]] = {}
    for column, instance in enumerate(instances.values()):
        figures = right(values[:, column], truth_of(instance, met))
        for name in kinds_of_holdout(instance.question.name, dict(instance.slots), instance.taught):
            groups.setdefault(name, []).append(figures)
            groups.setdefault(f"{name}: {instance.question.name}", []).append(figures)
    return {name: _mean(rows) for name, rows in groups.items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    return {**means, "instances": len(rows)}


def score_paraphrases(qa: QuestionAnswerer, met: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of answers to other wordings and to the exact texts of the same instances, and how they were understood."""
    obs = met["obs"].reshape(-1, *met["obs"].shape[2:])
    exact, other, understood, familiarity = [], [], 0, []
    for key, text in PARAPHRASES:
        truth = truth_of(qa.catalogue.find(key), met)
        exact.append(right(qa.ask(key, obs).probability, truth))
        try:
            answer = qa.ask(text, obs)
        except QAError:  # refused: as good as a wrong answer half of the time
            other.append({"accuracy": 0.5, "balanced": 0.5, "constant": exact[-1]["constant"]})
            continue
        understood += answer.understood_as == key
        familiarity.append(answer.familiarity)
        other.append(right(answer.probability, truth))
    refused = 0
    for text in UNTAUGHT:
        try:
            qa.ask(text, obs[:1])
        except QAError:
            refused += 1
    return {
        "exact": _mean(exact),
        "paraphrase": _mean(other),
        "understood": understood,
        "answered": len(familiarity),
        "of": len(PARAPHRASES),
        "least_familiar": min(familiarity, default=None),
        "untaught_refused": refused,
        "untaught": len(UNTAUGHT),
    }


def gap(scores: dict[str, dict[str, float]], group: str, figure: str) -> float:
    """Of a figure: that of taught instances less that of a group of held-out ones, template by template, in points."""
    parts = {name.split(": ")[1]: each for name, each in scores.items() if name.startswith(f"{group}: ")}
    weight = np.array([each["instances"] for each in parts.values()])
    worse = np.array([scores[f"taught: {template}"][figure] - each[figure] for template, each in parts.items()])
    known = ~np.isnan(worse)
    return float(100 * (worse * weight)[known].sum() / weight[known].sum())


def interval(values: list[float]) -> str:
    """Mean and 95 % t interval over runs."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return f"{mean:.1f} (1 run)"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(n, 2.0)
    half = t * float(np.std(values, ddof=1)) / n**0.5
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def report(rows: list[dict[str, Any]]) -> str:
    """The tables, in percent and points."""
    lines = [
        "| arm | instances | accuracy | balanced | best constant | taught less these, accuracy | balanced |",
        "|" + "---|" * 7,
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row["scores"] for row in rows if row["arm"] == arm]
        for group in ("taught", *HELD_OUT):
            figures = [
                interval([100 * scores[group][figure] for scores in mine])
                for figure in ("accuracy", "balanced", "constant")
            ]
            gaps = ["", ""]
            if group != "taught":
                gaps = [
                    interval([gap(scores, group, figure) for scores in mine]) for figure in ("accuracy", "balanced")
                ]
            lines.append(f"| {arm} | {group}: {mine[0][group]['instances']} | {' | '.join([*figures, *gaps])} |")
    told = [row["paraphrases"] for row in rows if "paraphrases" in row]
    if told:
        lines += ["", "| paraphrases | |", "|---|---|"]
        for figure in ("accuracy", "balanced"):
            for name in ("exact", "paraphrase"):
                lines.append(f"| {figure}, {name} | {interval([100 * each[name][figure] for each in told])} |")
            worse = [100 * (each["exact"][figure] - each["paraphrase"][figure]) for each in told]
            lines.append(f"| {figure}, exact less paraphrase | {interval(worse)} |")
        first = told[0]
        lines.append(
            f"| understood as meant | {first['understood']} of {first['of']}, {first['of'] - first['answered']} refused |"
        )
        lines.append(f"| never taught, refused | {first['untaught_refused']} of {first['untaught']} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    done = (
        {(r["arm"], r["seed"], r["timesteps"]) for r in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else set()
    )
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in args.arms:
            if (arm, seed, args.timesteps) in done:
                continue
            started = time.process_time()
            model, qa = train(arm, seed, args.timesteps)
            met = meet(model, seed, args.eval_steps, arm == "blank")
            row = {"arm": arm, "seed": seed, "timesteps": args.timesteps, "scores": score(qa, met)}
            if arm == "sentence":
                row["paraphrases"] = score_paraphrases(qa, met)
            row["return"] = float(np.mean([ep["r"] for ep in model.ep_info_buffer])) if model.ep_info_buffer else None
            row["cpu_seconds"] = round(time.process_time() - started, 1)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            (args.out / "results.md").write_text(report([json.loads(line) for line in path.read_text().splitlines()]))
            print(arm, seed, {k: v for k, v in row["scores"].items() if ":" not in k}, row["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
