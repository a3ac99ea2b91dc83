"""rl_zoo3's tuned hyperparameters of SAC, with questions: ``--algo sac -conf sb3_qa.zoo.sac``."""

from typing import Any

from stable_baselines3 import SAC

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(SAC, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(SAC, "sac", __name__)
    raise AttributeError(name)
