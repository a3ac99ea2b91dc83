"""rl_zoo3's tuned hyperparameters of DDPG, with questions: ``--algo ddpg -conf sb3_qa.zoo.ddpg``."""

from typing import Any

from stable_baselines3 import DDPG

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(DDPG, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(DDPG, "ddpg", __name__)
    raise AttributeError(name)
