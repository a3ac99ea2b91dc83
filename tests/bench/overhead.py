"""How much slower is an agent that also answers? Joint against plain training, paired.

One torch thread (or ``--threads``), the same optimiser (but for the row that says "fused": torch's fused Adam on the joint side,
equal to float error), and default hyperparameters but for shorter rollouts of the images. Policies with questions buy some of the time
back: Adam steps small tensors together, and distributions of actions take fewer steps, both bit for bit as in SB3. The row that says
"alike" gives the plain agent that too, so that its figure is what the questions cost. In those that say "rarely" one minibatch in eight
(seven) teaches the questions. The joint agent has eight yes/no questions, one of them about the action, and a wrapper answers all of
them live at every step. Plain and joint runs alternate, now one first and now the other, so that drifts of the machine's speed hit both;
the figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_qa import Question
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.policies.distributions import lean
from sb3_qa.truth import after, always, eventually, now
from sb3_qa.wrappers import VecAnswerQuestions

QUESTIONS = [
    Question("Will I fall within 10 steps if I choose {action}?", eventually("fallen", within=10), name="fall"),
    Question("Will I fall within 20 steps?", eventually("fallen", within=20), name="fall_later"),
    Question("Will I stay in the middle for 10 steps?", always("middle", during=10), name="stay"),
    Question("Am I in the middle?", now("middle"), name="middle"),
    Question("Do I lean left?", now("leans_left"), name="leans_left"),
    Question("Do I move left?", now("moves_left"), name="moves_left"),
    Question("Will I lean left in 5 steps?", after("leans_left", steps=5), name="lean_soon"),
    Question("Will I move left within 5 steps?", eventually("moves_left", within=5), name="move_soon"),
]
Clock = Callable[[], float]
HISTORY = Path(__file__).with_name("history.jsonl")


class Facts(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose info tells the facts, in both arms alike."""

    def facts(self, obs: Any, fallen: bool) -> dict[str, bool]:
        return {"fallen": fallen, "middle": abs(obs[0]) < 0.5, "leans_left": obs[-2] < 0, "moves_left": obs[1] < 0}

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, **self.facts(obs, False)}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, **self.facts(obs, terminated)}


class Pictures(gym.ObservationWrapper[Any, Any, Any]):
    """Four frames of noise, 84 x 84, in place of observations: what is seen does not matter to the clock."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self._frames = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), np.uint8)
        self._n = 0

    def observation(self, observation: Any) -> Any:
        self._n += 1
        return self._frames[self._n % 8]


class ResNet(BaseFeaturesExtractor):
    """The residual network of IMPALA (Espeholt et al. 2018, arXiv 1802.01561), of 15 convolutions."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 256)
        layers: list[nn.Module] = []
        channels, side = observation_space.shape[:2]
        for wider in (16, 32, 32):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
            layers += [Residual(wider), Residual(wider)]
            channels, side = wider, (side + 1) // 2
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(channels * side * side, 256), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs)


class Residual(nn.Module):
    """Two convolutions whose output is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.layers = nn.Sequential(nn.ReLU(), convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Case(NamedTuple):
    """What is timed."""

    algorithm: type[BaseAlgorithm]
    env: str
    n_envs: int
    steps: int
    target: float
    policy: str = "MlpPolicy"
    kwargs: dict[str, Any] = {}
    policy_kwargs: dict[str, Any] = {}
    own: dict[str, Any] = {}
    """Further ones of the joint policy alone."""
    lean: bool = False
    """Whether the plain agent has the distributions of policies with questions too: the same numbers in less time."""


CASES = {
    "ppo": Case(PPO, "CartPole-v1", 8, 49_152, 1.05),
    "ppo_alike": Case(
        PPO, "CartPole-v1", 8, 49_152, 1.05, policy_kwargs=dict(optimizer_kwargs=dict(foreach=True)), lean=True
    ),
    "ppo_fused": Case(PPO, "CartPole-v1", 8, 49_152, 1.00, own=dict(optimizer_kwargs=dict(fused=True))),
    "ppo_cnn": Case(PPO, "CartPole-v1", 8, 1024, 1.02, "CnnPolicy", dict(n_steps=64)),
    "ppo_resnet": Case(
        PPO,
        "CartPole-v1",
        8,
        256,
        1.02,
        "CnnPolicy",
        dict(n_steps=32),
        policy_kwargs=dict(features_extractor_class=ResNet),
    ),
    "dqn": Case(DQN, "CartPole-v1", 1, 15_000, 1.05),
    "sac": Case(SAC, "Pendulum-v1", 1, 1000, 1.05),
    "td3": Case(TD3, "Pendulum-v1", 1, 1500, 1.05),
    "sac_rarely": Case(SAC, "Pendulum-v1", 1, 1000, 1.05, own=dict(qa_every=8)),
    "td3_rarely": Case(TD3, "Pendulum-v1", 1, 1500, 1.05, own=dict(qa_every=7)),
}


def environment(case: Case) -> VecEnv:
    """The environments of both arms."""

    def wrapped(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        return Pictures(Facts(env)) if case.policy == "CnnPolicy" else Facts(env)

    return make_vec_env(case.env, case.n_envs, seed=0, wrapper_class=wrapped)


def plain(case: Case, steps: int, clock: Clock = time.perf_counter) -> float:
    """Seconds that the algorithm takes."""
    model: Any = case.algorithm(
        case.policy, environment(case), seed=0, policy_kwargs=dict(case.policy_kwargs), **case.kwargs
    )
    if case.lean:
        lean(model.policy.action_dist)
    started = clock()
    model.learn(steps)
    return clock() - started


def joint(case: Case, steps: int, clock: Clock = time.perf_counter) -> float:
    """Seconds that it takes with the questions."""
    policy, env = qa_policy(case.algorithm, case.policy), VecAnswerQuestions(environment(case))
    asked = dict(case.policy_kwargs, **case.own, questions=QUESTIONS)
    model: Any = case.algorithm(policy, env, seed=0, policy_kwargs=asked, **case.kwargs)
    started = clock()
    model.learn(steps, callback=QACallback())
    return clock() - started


def measure(name: str, case: Case, pairs: int, steps: int) -> dict[str, Any]:
    """Run the pairs, print the figure, and return the line for the history."""
    warm_up = min(steps, 300)
    threads = torch.get_num_threads()
    plain(case, warm_up), joint(case, warm_up)
    ratios = []
    for n in range(pairs):
        if n % 2:
            after_, before = joint(case, steps), plain(case, steps)
        else:
            before, after_ = plain(case, steps), joint(case, steps)
        ratios.append(after_ / before)
        print(f"{name} pair {n + 1}: plain {before:.2f} s, joint {after_:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    print(
        f"{name}: joint / plain, {case.policy}, {case.n_envs} x {case.env}, 8 yes/no questions answered live, {threads} thread(s): "
        f"median {ratio:.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {pairs} pairs); target at most {case.target:.2f}: "
        f"{'met' if ratio <= case.target else 'missed'}\n",
        flush=True,
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "bench": f"{name}_8q_live" + ("" if threads == 1 else f"_{threads}_threads"),
        "ratio": round(ratio, 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "pairs": pairs,
        "steps": steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Measure, and append the figures to the history beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="the cases to measure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="environment steps of a run, in place of each case's own")
    parser.add_argument("--no-history", action="store_true", help="do not append to history.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only:
        row = measure(name, CASES[name], args.pairs, args.steps or CASES[name].steps)
        if not args.no_history:
            with HISTORY.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
