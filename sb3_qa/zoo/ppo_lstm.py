"""rl_zoo3's tuned hyperparameters of RecurrentPPO, with questions: ``--algo ppo_lstm -conf sb3_qa.zoo.ppo_lstm``."""

from typing import Any

from sb3_contrib import RecurrentPPO

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(RecurrentPPO, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(RecurrentPPO, "ppo_lstm", __name__)
    raise AttributeError(name)
