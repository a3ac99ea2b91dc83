"""rl_zoo3's tuned hyperparameters of TD3, with questions: ``--algo td3 -conf sb3_qa.zoo.td3``."""

from typing import Any

from stable_baselines3 import TD3

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(TD3, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(TD3, "td3", __name__)
    raise AttributeError(name)
