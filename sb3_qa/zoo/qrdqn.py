"""rl_zoo3's tuned hyperparameters of QRDQN, with questions: ``--algo qrdqn -conf sb3_qa.zoo.qrdqn``."""

from typing import Any

from sb3_contrib import QRDQN

from sb3_qa.zoo.tuned import policies, tuned

globals().update(policies(QRDQN, __name__))


def __getattr__(name: str) -> Any:
    # Not at import: a model that has learnt is loaded where rl_zoo3 need not be installed.
    if name == "hyperparams":
        return tuned(QRDQN, "qrdqn", __name__)
    raise AttributeError(name)
