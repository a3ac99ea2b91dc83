"""rl_zoo3's tuned hyperparameters of CrossQ, with questions: ``--algo crossq -conf sb3_qa.zoo.crossq``."""

from typing import Any

from sb3_contrib import CrossQ

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(CrossQ, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(CrossQ, "crossq", __name__)
    raise AttributeError(name)
