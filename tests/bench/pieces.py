"""What single pieces cost: a veto in a rollout, a call of a frozen answerer, parameters, labels, and growth with the agent.

    python tests/bench/pieces.py --plot docs/images/trunk.png

CPU time of the process on one torch thread; what is compared runs in turns. Rows are printed with their targets, and appended
to the history beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: threads of its products would wait for each other

import numpy as np
import torch
from overhead import CASES, HISTORY, QUESTIONS, environment, joint, plain
from recorder import Rollout, upright
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_qa import QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.figures import new_figure
from sb3_qa.policies import qa_policy
from sb3_qa.wrappers import VecVetoAction

WIDTHS = {64: 32, 256: 16, 1024: 4, 4096: 1}
"""Of two layers, and how many rollouts are timed: what happens once, when learning begins, is not to count."""

IMAGES = {"NatureCNN": "ppo_cnn", "IMPALA's ResNet": "ppo_resnet"}


class Row(NamedTuple):
    """A figure with its target."""

    name: str
    what: str
    figure: float
    target: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.figure >= self.target if self.at_least else self.figure <= self.target


def agent(policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    """An untrained PPO with the eight questions."""
    case = CASES["ppo_cnn" if policy == "CnnPolicy" else "ppo"]
    policy_kwargs = dict(questions=QUESTIONS, **kwargs)
    return PPO(qa_policy(PPO, policy), environment(case), seed=0, policy_kwargs=policy_kwargs)


def veto_in_a_rollout(blocks: int = 30, block: int = 200) -> Iterator[Row]:
    """Steps of 8 environments and the policy that acts in them, with every action's risk at each step, and without."""
    model = agent()
    qa = QuestionAnswerer.from_model(model)
    bare = environment(CASES["ppo"])
    watched = VecVetoAction(environment(CASES["ppo"]), "fall", 0.999, qa=qa)
    arms = {name: Rollout(model, env, upright) for name, env in (("without", bare), ("with", watched))}
    for arm in arms.values():
        arm.steps(block)
    ratios = []
    for _ in range(blocks):
        times = {name: arm.steps(block)[1] for name, arm in arms.items()}
        ratios.append(times["with"] / times["without"])
    yield Row("veto_in_a_rollout", "rollout with a veto / without", statistics.median(ratios), 1.05)


def frozen_answerer() -> Iterator[Row]:
    """One question of a saved answerer, by the call and by the batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pole.qa"
        QuestionAnswerer.from_model(agent()).save(path)
        qa = QuestionAnswerer.load(path)
    extractor, head = qa.policy.mlp_extractor, qa.policy.qa_head
    weights = [
        layer.weight.detach().numpy().T for net in (extractor.policy_net, extractor.value_net) for layer in net[::2]
    ]
    learnt = head.weights(head.flat.detach().numpy())
    across, rows = learnt.layers[0][0].T, learnt.rows.T

    def products(obs: Any) -> Any:
        latents = np.concatenate([obs @ weights[0] @ weights[1], obs @ weights[2] @ weights[3]], axis=1)
        return latents @ across @ rows[:, :1]

    one = np.zeros(4, np.float32)
    many = np.random.default_rng(0).standard_normal((1024, 4)).astype(np.float32)
    beyond = _quickest(lambda: qa.ask("middle", one).probability) - _quickest(lambda: products(one[None]))
    yield Row("ask_one", "microseconds of a call of ask() beyond its matrix products", 1e6 * beyond, 60.0)
    seconds = _quickest(lambda: qa.ask("middle", many).probability, number=20)
    yield Row("ask_1024", "million answers a second in batches of 1,024", 1024e-6 / seconds, 1.0, at_least=True)


def _quickest(call: Callable[[], Any], number: int = 200) -> float:
    """Seconds a call, in the best of many short runs: what it takes when nothing else goes on."""
    return min(timeit.repeat(call, timer=time.thread_time, number=number, repeat=40)) / number


def sizes(model: Any) -> tuple[int, int]:
    """Parameters of the agent, and of the head."""
    own, head = model.policy.parameters(), model.policy.qa_head.parameters()
    return sum(p.numel() for p in own), sum(p.numel() for p in head)


def parameters() -> Iterator[Row]:
    """Those of the head, in percent of the agent's."""
    for policy, target in (("CnnPolicy", 2.0), ("MlpPolicy", 10.0)):
        own, added = sizes(agent(policy))
        yield Row(f"parameters_{policy}", f"% of parameters added to {policy}, by default", 100 * added / own, target)


def memory_of_labels() -> Iterator[Row]:
    """Bytes that are kept for a transition and an event question; the agent's own observations and actions are not counted."""
    events = [question for question in QUESTIONS if question.truth.is_event]
    for name, algorithm, kwargs in (
        ("replay", DQN, dict(buffer_size=10_000, learning_starts=100)),
        ("rollout", PPO, dict(n_steps=256, n_epochs=1)),
    ):
        model = algorithm(
            qa_policy(algorithm), environment(CASES["dqn"]), seed=0, policy_kwargs=dict(questions=events), **kwargs
        )
        kept = _Kept()
        model.learn(1500, callback=[QACallback(), kept])
        yield Row(f"labels_{name}", f"bytes an event question and transition, {name}", kept.most / len(events), 16.0)


class _Kept(BaseCallback):
    """Looks how many bytes there are for a transition."""

    most = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        store: Any = self.model.policy.qa_joint.store
        arrays = {id(array): array.nbytes for array in _arrays(vars(store))}
        self.most = max(self.most, sum(arrays.values()) / len(store))


def _arrays(kept: Any) -> Iterator[Any]:
    """All arrays in what is kept; in place of views, what they are of."""
    if isinstance(kept, np.ndarray):
        yield kept if kept.base is None else kept.base
    elif isinstance(kept, dict):
        yield from _arrays(list(kept.values()))
    elif isinstance(kept, (list, tuple)):
        for each in kept:
            yield from _arrays(each)
    elif type(kept).__module__.startswith("sb3_qa") and hasattr(kept, "__dict__"):
        yield from _arrays(vars(kept))


def growth_with_the_agent(pairs: int) -> list[dict[str, Any]]:
    """Joint / plain training, and the parameters added, of ever wider networks of two layers, and of networks for images."""
    narrow = CASES["ppo"]._replace(kwargs=dict(n_steps=32))
    cases = {
        str(width): narrow._replace(policy_kwargs=dict(net_arch=[width, width]), steps=8 * 32 * rollouts)
        for width, rollouts in WIDTHS.items()
    } | {name: CASES[of] for name, of in IMAGES.items()}
    grown = []
    for name, case in cases.items():
        arms = [partial(arm, case, case.steps, time.process_time) for arm in (joint, plain)]
        ratios = [arms[0]() / arms[1]() for _ in range(1 + pairs)][1:]  # the first is a warm-up
        own, added = sizes(agent(case.policy, **case.policy_kwargs))
        grown.append(dict(trunk=name, ratio=round(statistics.median(ratios), 4), own=own, added=added))
        print(
            f"trunk {name}: joint / plain {grown[-1]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {100 * added / own:.1f} % of "
            "parameters added",
            flush=True,
        )
    return grown


def plot(grown: list[dict[str, Any]], path: Path) -> None:
    """What questions add, against the size of the agent."""
    figure, panels = new_figure(1, 2, size=(9, 3.6))
    for marker, names in (("o-", [str(width) for width in WIDTHS]), ("s", list(IMAGES))):
        rows = [row for row in grown if row["trunk"] in names]
        own = [row["own"] for row in rows]
        panels[0].plot(own, [row["ratio"] for row in rows], marker)
        panels[1].plot(own, [100 * row["added"] / row["own"] for row in rows], marker)
    for row in grown:
        label = f"2 x {row['trunk']}" if row["trunk"].isdigit() else row["trunk"]
        panels[0].annotate(
            label, (row["own"], row["ratio"]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    panels[0].axhline(1.0, color="grey", lw=0.8)
    panels[0].set(xscale="log", ylabel="CPU time of training, joint / plain")
    panels[0].margins(x=0.15, y=0.15)
    panels[1].set(xscale="log", yscale="log", ylabel="parameters added, % of the agent's")
    for axis in panels:
        axis.set(xlabel="parameters of the agent")
    figure.savefig(path)


def main() -> None:
    """Measure, print, and append to the history."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="of plain and joint training, for each network")
    parser.add_argument("--plot", type=Path, help="draw the growth with the agent")
    parser.add_argument("--no-history", action="store_true", help="do not append to history.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    history = []
    for piece in (parameters, memory_of_labels, frozen_answerer, veto_in_a_rollout):
        for row in piece():
            bound, verdict = "least" if row.at_least else "most", "met" if row.met else "missed"
            print(f"{row.what}: {row.figure:.3g}; target at {bound} {row.target:g}: {verdict}", flush=True)
            history.append(dict(bench=row.name, figure=round(row.figure, 4), target=row.target, met=row.met))
    grown = growth_with_the_agent(args.pairs)
    history.append(dict(bench="trunk", grown=grown))
    if args.plot:
        plot(grown, args.plot)
    if not args.no_history:
        with HISTORY.open("a") as file:
            for each in history:
                file.write(json.dumps({"date": time.strftime("%Y-%m-%d"), **each}) + "\n")


if __name__ == "__main__":
    main()
