"""Do answers gain from reading the critics of SAC and its like beside the actor?

Every run trains one agent and then holds its answers against fresh decisions: those the agent samples itself ("own"), and
ones where a uniformly random action was tried and the agent went on by itself ("tried", one decision in 25), which is what a
veto asks about. Beside the answers, probes are fitted with ample labels to the latents of the actor, of the critics at the
action, of both, and to observation and action themselves: what an agent knows is what can be read from it.

``python tests/bench/critics.py run --env hopper --arm plain actor both --seeds 4`` appends lines to critics.jsonl, skipping
those that are there; ``python tests/bench/critics.py report`` prints the tables of docs/critics.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.scores import auroc, brier, log_loss
from sb3_qa.truth import eventually

RESULTS = Path(__file__).with_name("critics.jsonl")
HORIZONS = (5, 20)
TRIED_EVERY = 25  # steps, more than the longest horizon, so that what follows is the agent's own doing
N_ENVS = 8
PROBES = (0,)  # hidden units of the probes: linear ones

Array = NDArray[Any]


class Case(NamedTuple):
    """What is learnt, and what is asked about."""

    env: str
    steps: int
    event: Callable[[Any, float, bool], bool]
    """From observation, reward and whether the episode terminated."""
    algorithm: Any = SAC
    net: int = 64


CASES = {
    "pendulum": Case("Pendulum-v1", 4_000, lambda obs, reward, terminated: abs(obs[2]) > 4),
    "lander": Case(
        "LunarLanderContinuous-v3", 6_000, lambda obs, reward, terminated: bool(terminated and reward <= -100)
    ),
    "hopper": Case("Hopper-v5", 4_000, lambda obs, reward, terminated: terminated),
    "hopper_td3": Case("Hopper-v5", 6_000, lambda obs, reward, terminated: terminated, TD3),
    "lander_256": Case(
        "LunarLanderContinuous-v3", 6_000, lambda obs, reward, terminated: bool(terminated and reward <= -100), SAC, 256
    ),
}
QUESTIONS = [
    Question(
        "Will it happen within {k} steps if I choose {action}?", eventually("event", within="k"), k=HORIZONS, name="act"
    ),
    Question("Will it happen within {k} steps?", eventually("event", within="k"), k=HORIZONS, name="state"),
]


class Events(gym.Wrapper[Any, Any, Any, Any]):
    """Tells in ``info["event"]`` whether what is asked about has come."""

    def __init__(self, case: Case) -> None:
        super().__init__(gym.make(case.env))
        self._event = case.event

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, "event": False}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        event = bool(self._event(obs, float(reward), terminated))
        return obs, reward, terminated, truncated, {**info, "event": event}


class Recording(NamedTuple):
    """Steps of an agent, arrays (n_steps, n_envs, ...)."""

    obs: Array
    actions: Array
    event: Array
    terminated: Array
    truncated: Array
    returns: list[float]


def trained(case: Case, arm: str, seed: int) -> tuple[Any, float]:
    """A trained agent, and the seconds of processor time it took."""
    env = DummyVecEnv([lambda: Events(case)])
    net: dict[str, Any] = dict(net_arch=[case.net, case.net])
    given = dict(learning_rate=1e-3, buffer_size=50_000, learning_starts=1000, seed=seed, batch_size=128)
    callback = None
    if arm == "plain":
        model = case.algorithm("MlpPolicy", env, policy_kwargs=net, **given)
    else:
        net["questions"] = QUESTIONS
        if arm == "actor":
            net["qa_readouts"] = ["actor.mu"]
        model, callback = case.algorithm(qa_policy(case.algorithm), env, policy_kwargs=net, **given), QACallback()
    started = time.process_time()
    model.learn(case.steps, callback=callback)
    return model, time.process_time() - started


def record(model: Any, case: Case, n_steps: int, seed: int, tries: bool) -> Recording:
    """Let the agent play on, with a random action now and then where ``tries``."""
    env = DummyVecEnv([lambda: Events(case) for _ in range(N_ENVS)])
    env.seed(10_000 + seed)
    env.action_space.seed(seed)
    model.set_random_seed(20_000 + seed)
    obs = env.reset()
    columns: list[list[Any]] = [[] for _ in range(5)]
    returns: list[float] = []
    running = np.zeros(N_ENVS)
    for t in range(n_steps):
        actions = model.predict(obs, deterministic=False)[0]
        for i in np.flatnonzero(tried_at(t)) if tries else ():
            actions[i] = env.action_space.sample()
        before = obs.copy()
        obs, rewards, dones, infos = env.step(actions)
        cut = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        event = np.array([info["event"] for info in infos])
        for column, value in zip(columns, (before, actions, event, dones & ~cut, cut), strict=True):
            column.append(value)
        running += rewards
        returns += running[dones].tolist()
        running[dones] = 0.0
    return Recording(*(np.stack(column) for column in columns), returns)


def tried_at(t: int) -> Array:
    """Which environments try a random action at that step."""
    return (t + 3 * np.arange(N_ENVS)) % TRIED_EVERY == TRIED_EVERY - 1


def outcomes(data: Recording, k: int) -> tuple[Array, Array]:
    """Whether the event came within ``k`` steps of each decision, and whether a whole window is known; (n_steps, n_envs)."""
    n = len(data.event)
    came, known, gone = np.zeros_like(data.event), np.ones_like(data.event), np.zeros_like(data.event)
    for j in range(k):
        rest = slice(0, max(n - j, 0))
        known[rest.stop :] = False
        came[rest] |= ~gone[rest] & data.event[j:]
        cut = ~gone[rest] & data.truncated[j:]
        known[rest] &= ~cut | (j == k - 1)
        gone[rest] |= data.terminated[j:] | data.truncated[j:]
    return came, known


def latents(model: Any, obs: Array, actions: Array) -> dict[str, Array]:
    """What probes read."""
    policy = model.policy
    with torch.no_grad():
        x = torch.as_tensor(obs, dtype=torch.float32)
        a = torch.as_tensor(policy.scale_action(actions), dtype=torch.float32)
        actor = (policy.actor.latent_pi if hasattr(policy.actor, "latent_pi") else policy.actor.mu[:-2])(x).numpy()
        critic = np.concatenate([q[:-1](torch.cat([x, a], 1)).numpy() for q in policy.critic.q_networks], axis=1)
    raw = np.concatenate([obs, a.numpy()], axis=1)
    return {
        "raw": raw,
        "actor": np.concatenate([actor, a.numpy()], axis=1),
        "critic": critic,
        "both": np.concatenate([actor, a.numpy(), critic], axis=1),
    }


def probe(x: Array, y: Array, units: int) -> Callable[[Array], Array]:
    """A logistic probe, or one with a layer of ``units``, fitted to standardised features: from features to probabilities."""
    torch.manual_seed(0)
    mean, scale = x.mean(0), x.std(0) + 1e-3
    a, target = torch.as_tensor((x - mean) / scale, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    net: Any = torch.nn.Linear(a.shape[1], 1)
    if units:
        net = torch.nn.Sequential(torch.nn.Linear(a.shape[1], units), torch.nn.Tanh(), torch.nn.Linear(units, 1))
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        penalty = sum((p**2).sum() for p in net.parameters()) * (3.0 / len(y))
        value = torch.nn.functional.binary_cross_entropy_with_logits(net(a)[:, 0], target) + penalty
        value.backward()
        return value

    optimizer.step(loss)

    def predict(x: Array) -> Array:
        with torch.no_grad():
            probability: Array = torch.sigmoid(
                net(torch.as_tensor((x - mean) / scale, dtype=torch.float32))[:, 0]
            ).numpy()
        return probability

    return predict


def scored(p: Array, y: Array) -> dict[str, float]:
    """Losses relative to those of the best constant (0 is perfect, 1 as bad as it), AUROC, and how often it happens."""
    rate = np.full(len(y), y.mean())
    if not 0 < y.mean() < 1:
        return {"rate": float(y.mean())}
    return {
        "rate": round(float(y.mean()), 4),
        "brier": round(brier(p, y) / brier(rate, y), 4),
        "log_loss": round(log_loss(p, y) / log_loss(rate, y), 4),
        "auroc": round(auroc(p, y), 4),
    }


def run(name: str, arm: str, seed: int) -> dict[str, Any]:
    """Train, answer, probe: one line of the results."""
    case = CASES[name]
    model, seconds = trained(case, arm, seed)
    model.policy.set_training_mode(False)
    line: dict[str, Any] = dict(env=name, arm=arm, seed=seed, seconds=round(seconds, 2))
    recordings = {kind: record(model, case, 1000, seed, kind == "tried") for kind in ("own", "tried")}
    line["return"] = round(statistics.mean(recordings["own"].returns), 2)
    qa = None if arm == "plain" else QuestionAnswerer.from_model(model)
    probes: dict[tuple[int, str, int], Callable[[Array], Array]] = {}
    for kind, data in recordings.items():
        asked = np.ones(data.event.shape, np.bool_)
        if kind == "tried":
            asked = np.stack([tried_at(t) for t in range(len(asked))])
        for k in HORIZONS:
            came, known = outcomes(data, k)
            use = asked & known
            obs, actions, y = data.obs[use], data.actions[use], came[use].astype(float)
            if qa is not None:
                line[f"{kind}/act/{k}"] = scored(qa.ask(f"act[k={k}]", obs, actions).probability, y)
                if kind == "own":
                    line[f"{kind}/state/{k}"] = scored(qa.ask(f"state[k={k}]", obs).probability, y)
            if kind == "own":  # probes learn what answers are learnt from: the agent's own decisions, in the first half
                half = len(y) // 2  # the steps are in order, so that the halves are of different episodes
                for what, x in latents(model, obs[:half], actions[:half]).items():
                    for units in PROBES:
                        probes[k, what, units] = probe(x, y[:half], units)
                obs, actions, y = obs[half:], actions[half:], y[half:]
            x_test = latents(model, obs, actions)
            for (horizon, what, units), predict in probes.items():
                if horizon == k:
                    line[f"probe{units}/{what}/{kind}/{k}"] = scored(predict(x_test[what]), y)
    return line


def lines() -> Iterator[dict[str, Any]]:
    """What has been measured."""
    if RESULTS.exists():
        yield from map(json.loads, RESULTS.read_text().splitlines())


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--env", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--arm", nargs="+", default=["plain", "actor", "both"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "report":
        return report()
    done = {(line["env"], line["arm"], line["seed"]) for line in lines()}
    for seed in args.seeds:
        for name in args.env:
            for arm in args.arm:
                if (name, arm, seed) not in done:
                    line = run(name, arm, seed)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(name, arm, seed, line["seconds"], flush=True)


def report() -> None:
    """Means over seeds, with 95 % t-intervals of paired differences."""
    measured = list(lines())
    for name in CASES:
        mine = [line for line in measured if line["env"] == name]
        if not mine:
            continue
        print(f"\n### {name}\n")
        for arm in ("plain", "actor", "critic", "both"):
            each = {line["seed"]: line for line in mine if line["arm"] == arm}
            if each:
                print(
                    arm,
                    "return",
                    mean_of([x["return"] for x in each.values()]),
                    "seconds",
                    mean_of([x["seconds"] for x in each.values()]),
                )
        keys = sorted({key for line in mine for key in line if "/" in key and not key.startswith("probe")})
        for key in keys:
            for metric in ("log_loss", "brier", "auroc"):
                print(
                    key,
                    metric,
                    *(
                        f"{arm} {mean_of(got)}"
                        for arm in ("actor", "critic", "both")
                        if (got := values(mine, arm, key, metric))
                    ),
                    "both-actor",
                    paired(mine, key, metric, "actor", "both"),
                )
        for arm in ("plain", "actor", "both"):
            for units in PROBES:
                for kind in ("own", "tried"):
                    for k in HORIZONS:
                        row = {
                            w: values(mine, arm, f"probe{units}/{w}/{kind}/{k}", "log_loss")
                            for w in ("raw", "actor", "critic", "both")
                        }
                        if row["raw"]:
                            print(
                                f"probe of {arm}, {units} units, {kind}, {k}:",
                                *(f"{w} {mean_of(v)}" for w, v in row.items()),
                            )


def values(mine: list[dict[str, Any]], arm: str, key: str, metric: str) -> list[float]:
    """One figure of every seed."""
    return [line[key][metric] for line in mine if line["arm"] == arm and metric in line.get(key, {})]


def mean_of(x: list[float]) -> str:
    """The mean."""
    return f"{statistics.mean(x):.3f}" if x else "-"


T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}


def paired(mine: list[dict[str, Any]], key: str, metric: str, a: str, b: str) -> str:
    """Mean difference b - a over the seeds of both, with its 95 % t-interval."""
    of = {
        arm: {x["seed"]: x[key][metric] for x in mine if x["arm"] == arm and metric in x.get(key, {})} for arm in (a, b)
    }
    d = [of[b][seed] - of[a][seed] for seed in of[a] if seed in of[b]]
    if len(d) < 2:
        return "-"
    mean, half = statistics.mean(d), T95[len(d) - 1] * statistics.stdev(d) / math.sqrt(len(d))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


if __name__ == "__main__":
    main()
