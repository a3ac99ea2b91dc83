"""rl_zoo3's tuned hyperparameters, with a question about the end of the episode for every environment, and its policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_qa.extras import need
from sb3_qa.policies import QAPolicyMixin, qa_policy, stock_policies
from sb3_qa.zoo.overwritten import overwritten

__all__ = ["QUESTIONS", "policies", "tuned"]

QUESTIONS = [
    {
        "name": "end",
        "text": "Will the episode terminate within {k} steps if I choose {action}?",
        "truth": {"eventually": {"step": "terminated"}, "within": "k"},
        "k": [1, 5, 20],
    }
]
"""What can be asked of every environment."""

CALLBACK = "sb3_qa.zoo.QACallback"


class Kept(QAPolicyMixin):
    """Takes what ``policy_kwargs`` say of questions where rl_zoo3 overwrites them, see :func:`overwritten`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**overwritten(), **kwargs})


def policies(algorithm: type[BaseAlgorithm], module: str) -> dict[str, type[BasePolicy]]:
    """An algorithm's policies, by its names for them, with a question of their own where none are given.

    :param module: where they are to be found again, by pickle
    """
    made: dict[str, type[BasePolicy]] = {}
    for name, stock in stock_policies(algorithm).items():
        base = qa_policy(stock)
        namespace = {"__module__": module, "__qualname__": name, "__doc__": stock.__doc__, "questions": QUESTIONS}
        metaclass: Any = type(base)
        made[name] = metaclass(base.__name__, (Kept, base), namespace)  # algorithms ask for their policies by that name
    return made


def tuned(algorithm: type[BaseAlgorithm], file: str, module: str) -> dict[str, dict[str, Any]]:
    """rl_zoo3's hyperparameters by environment, with the policies of ``module`` and the callback that teaches them.

    :param file: name of rl_zoo3's file, without its ending
    :raises QAError: when rl_zoo3 is not installed
    """
    folder = Path(str(need("rl_zoo3", "zoo", module).__file__)).parent / "hyperparams"
    entries = need("yaml", "zoo", module).safe_load((folder / f"{file}.yml").read_text(encoding="utf-8"))
    return {name: _with_questions(entry, algorithm, module) for name, entry in entries.items()}


def _with_questions(entry: dict[str, Any], algorithm: type[BaseAlgorithm], module: str) -> dict[str, Any]:
    if entry.get("policy") not in stock_policies(algorithm):
        return entry  # nothing that this algorithm could be run with
    given = entry.get("callback") or []
    return {
        **entry,
        "policy": f"{module}.{entry['policy']}",
        "callback": [CALLBACK, *(given if isinstance(given, list) else [given])],
    }
