"""rl_zoo3's tuned hyperparameters of DQN, with questions: ``--algo dqn -conf sb3_qa.zoo.dqn``."""

from typing import Any

from stable_baselines3 import DQN

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(DQN, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(DQN, "dqn", __name__)
    raise AttributeError(name)
