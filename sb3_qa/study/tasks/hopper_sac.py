"""MuJoCo's Hopper with SAC, on small networks and few steps; the catastrophe is a fall."""

from __future__ import annotations

from dataclasses import replace

from stable_baselines3 import SAC

from sb3_qa.study.tasks import hopper

TASK = replace(
    hopper.TASK,
    name="hopper_sac",
    title="Hopper, SAC (fall)",
    algorithm=SAC,
    hyperparameters=dict(
        learning_starts=2_000, train_freq=2, gradient_steps=2, batch_size=128, learning_rate=1e-3, gamma=0.99
    ),
    policy_kwargs=dict(net_arch=[64, 64]),
    timesteps=40_000,
    n_envs=1,
    solved=500.0,
    quick=dict(timesteps=1_000, episodes=16, hyperparameters=dict(learning_starts=100, train_freq=2, batch_size=64)),
)
