"""rl_zoo3's tuned hyperparameters of A2C, with questions: ``--algo a2c -conf sb3_qa.zoo.a2c``."""

from typing import Any

from stable_baselines3 import A2C

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(A2C, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(A2C, "a2c", __name__)
    raise AttributeError(name)
