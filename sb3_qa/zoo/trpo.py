"""rl_zoo3's tuned hyperparameters of TRPO, with questions: ``--algo trpo -conf sb3_qa.zoo.trpo``."""

from typing import Any

from sb3_contrib import TRPO

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(TRPO, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(TRPO, "trpo", __name__)
    raise AttributeError(name)
