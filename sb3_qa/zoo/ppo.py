"""rl_zoo3's tuned hyperparameters of PPO, with questions: ``--algo ppo -conf sb3_qa.zoo.ppo``."""

from typing import Any

from stable_baselines3 import PPO

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(PPO, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(PPO, "ppo", __name__)
    raise AttributeError(name)
