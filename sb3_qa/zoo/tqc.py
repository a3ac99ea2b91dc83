"""rl_zoo3's tuned hyperparameters of TQC, with questions: ``--algo tqc -conf sb3_qa.zoo.tqc``."""

from typing import Any

from sb3_contrib import TQC

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(TQC, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(TQC, "tqc", __name__)
    raise AttributeError(name)
