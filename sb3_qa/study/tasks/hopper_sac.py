"""MuJoCo's Hopper with SAC, on small networks and few steps; the catastrophe is a fall."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from stable_baselines3 import SAC
from stable_baselines3.common.utils import LinearSchedule

from sb3_qa.study.tasks import hopper

LIMIT = 120  # steps, about a second; on so small a budget few agents stay up for longer

TASK = replace(
    hopper.TASK,
    name="hopper_sac",
    title="Hopper, SAC (fall)",
    make=partial(hopper.make, LIMIT),
    algorithm=SAC,
    hyperparameters=dict(
        learning_starts=2_000,
        train_freq=8,
        gradient_steps=4,
        batch_size=256,
        learning_rate=LinearSchedule(1e-3, 2e-4, 1.0),
        gamma=0.98,
        tau=0.02,
    ),
    policy_kwargs=dict(net_arch=[64, 64]),
    timesteps=30_000,
    n_envs=1,
    reward={},  # a fresh agent for each arm's answers would take as long as the arm
    solved=250.0,
    quick=dict(timesteps=1_000, episodes=16, hyperparameters=dict(learning_starts=100, train_freq=2, batch_size=64)),
)
