"""Answers against exactly known probabilities: the whole of joint training, from facts to the answers asked for."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
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


class Pushed(gym.ActionWrapper[Any, Any, Any]):
    """Walks by a continuous action, for SAC."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def action(self, action: Any) -> Any:
        return np.int64(action[0] > 0.0)


def train_off_policy(
    algorithm: Any, env: Any, text: str, steps: int, seed: int, qa_every: int | None = None, **kwargs: Any
) -> Any:
    """From a replay buffer: a time limit of 30, horizons up to 40."""
    question = Question(text, eventually("hit", within="k"), k=HORIZONS, name="hit")
    envs = DummyVecEnv([env for _ in range(16)])
    torch.set_num_threads(1)
    model = algorithm(
        qa_policy(algorithm),
        envs,
        seed=seed,
        learning_rate=1e-3,
        batch_size=256,
        train_freq=1,
        buffer_size=50_000,
        learning_starts=1000,
        policy_kwargs=dict(questions=[question], net_arch=[64, 64], qa_every=qa_every),
        **kwargs,
    )
    return model.learn(steps, callback=QACallback())


def answers(model: Any, cells: int) -> np.ndarray:
    """Answers in all cells but the absorbing one, horizons last."""
    qa = QuestionAnswerer.from_model(model)
    obs = np.eye(cells, dtype=np.float32)[1:]
    return np.stack([qa.ask(f"hit[k={k}]", obs).probability for k in HORIZONS], axis=-1)


def check_random_walk(steps: int, seed: int, algorithm: Any = PPO, qa_every: int | None = None) -> float:
    text = "Will I be at the edge within {k} steps?"
    if algorithm is PPO:
        told = answers(train(RandomWalk, text, steps, seed), 11)
    else:
        env: Any = (lambda: Pushed(RandomWalk())) if algorithm is SAC else RandomWalk
        told = answers(train_off_policy(algorithm, env, text, steps, seed, qa_every), 11)
    walk = RandomWalk()
    known = np.stack([walk.probability_within(k)[1:] for k in HORIZONS], axis=-1)
    assert (np.diff(told, axis=-1) >= 0).all(), "a longer horizon answered below a shorter one"
    return float(np.abs(told - known).mean())


def check_action_walk_off_policy(steps: int, seed: int) -> float:
    # An agent that always explores takes both actions alike, so that there is one truth.
    text = "Will I be at the edge within {k} steps if I choose {action}?"
    explore = dict(exploration_initial_eps=1.0, exploration_final_eps=1.0)
    told = answers(train_off_policy(DQN, Unrewarded, text, steps, seed, **explore), 7)
    return action_walk_error(told, np.full((7, 2), 0.5))


def check_action_walk(steps: int, seed: int) -> float:
    # Nothing to gain but entropy: the policy stays where it is and tries both actions, so that there is one truth.
    text = "Will I be at the edge within {k} steps if I choose {action}?"
    model = train(Unrewarded, text, steps, seed, ent_coef=0.01, normalize_advantage=False)
    told = answers(model, 7)
    with torch.no_grad():
        policy = model.policy.get_distribution(torch.eye(7)).distribution.probs.numpy()
    return action_walk_error(told, policy)


def action_walk_error(told: np.ndarray, policy: np.ndarray) -> float:
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


def test_random_walk_off_policy_early() -> None:
    assert check_random_walk(15_000, seed=0, algorithm=DQN) < 0.08


# Each with the steps it gets, its bound, and its seeds; `make test-slow ARGS=-rP` shows the errors.
LONG = [
    *((check_random_walk, (150_000, seed), 0.04) for seed in range(5)),
    *((check_action_walk, (150_000, seed), 0.04) for seed in range(5)),
    *((check_random_walk, (48_000, seed, algorithm), 0.06) for algorithm in (DQN, SAC) for seed in range(3)),
    *((check_action_walk_off_policy, (48_000, seed), 0.06) for seed in range(3)),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "check, given, bound",
    LONG,
    ids=["-".join([c.__name__, *(getattr(x, "__name__", str(x)) for x in g)]) for c, g, _ in LONG],
)
def test_known_answers(check: Any, given: tuple[Any, ...], bound: float) -> None:
    error = check(*given)
    print(f"mean absolute error {error:.4f}")
    assert error <= bound
