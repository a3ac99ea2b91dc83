"""Answers against exactly known probabilities: the whole of joint training, from facts to the answers asked for."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.testing import ActionWalk, RandomWalk
from sb3_qa.truth import eventually

HORIZONS = list(range(1, 41))


class Unrewarded(gym.RewardWrapper[Any, Any]):
    def __init__(self) -> None:
        super().__init__(ActionWalk())

    def reward(self, reward: Any) -> float:
        return 0.0


def train(env: type, text: str, steps: int, seed: int, **kwargs: Any) -> PPO:
    """Rollouts of 16 steps, a time limit of 30, horizons up to 40: most long futures are cut."""
    question = Question(text, eventually("hit", within="k"), k=HORIZONS, name="hit")
    envs = DummyVecEnv([env for _ in range(16)])
    torch.set_num_threads(1)
    model = PPO(qa_policy(PPO), envs, n_steps=16, seed=seed, policy_kwargs=dict(questions=[question]), **kwargs)
    return model.learn(steps, callback=QACallback())


def answers(model: PPO, cells: int) -> np.ndarray:
    """Answers in all cells but the absorbing one, horizons last."""
    qa = QuestionAnswerer.from_model(model)
    obs = np.eye(cells, dtype=np.float32)[1:]
    return np.stack([qa.ask(f"hit[k={k}]", obs).probability for k in HORIZONS], axis=-1)


def check_random_walk(steps: int, seed: int) -> float:
    told = answers(train(RandomWalk, "Will I be at the edge within {k} steps?", steps, seed), 11)
    walk = RandomWalk()
    known = np.stack([walk.probability_within(k)[1:] for k in HORIZONS], axis=-1)
    assert (np.diff(told, axis=-1) >= 0).all(), "a longer horizon answered below a shorter one"
    return float(np.abs(told - known).mean())


def check_action_walk(steps: int, seed: int) -> float:
    # Nothing to gain but entropy: the policy stays where it is and tries both actions, so that there is one truth.
    text = "Will I be at the edge within {k} steps if I choose {action}?"
    model = train(Unrewarded, text, steps, seed, ent_coef=0.01, normalize_advantage=False)
    told = answers(model, 7)
    with torch.no_grad():
        policy = model.policy.get_distribution(torch.eye(7)).distribution.probs.numpy()
    walk = ActionWalk()
    known = np.stack([walk.probability_within(k, policy)[1:] for k in HORIZONS], axis=-1)
    assert told.shape == known.shape == (6, 2, 40)
    assert (np.diff(told, axis=-1) >= 0).all()
    # The action matters, and more the nearer the edge is.
    assert (known[0, 0] - known[0, 1]).max() > 0.2
    assert told[0, 0, 0] - told[0, 1, 0] > 0.15
    return float(np.abs(told - known).mean())


def test_random_walk_early() -> None:
    assert check_random_walk(30_000, seed=0) < 0.08


def test_action_walk_early() -> None:
    assert check_action_walk(30_000, seed=0) < 0.08


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_random_walk(seed: int) -> None:
    error = check_random_walk(150_000, seed)
    print(f"mean absolute error {error:.4f}")  # shown by `make test-slow ARGS=-rP`
    assert error <= 0.04


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_action_walk(seed: int) -> None:
    error = check_action_walk(150_000, seed)
    print(f"mean absolute error {error:.4f}")  # shown by `make test-slow ARGS=-rP`
    assert error <= 0.04
