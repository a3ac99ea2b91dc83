"""Policy classes with a question-answering head, for any SB3 or sb3-contrib algorithm or policy class."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Sequence
from typing import Any

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)

from sb3_qa.errors import QAError
from sb3_qa.policies.mixin import QAPolicyMixin
from sb3_qa.taps import REFUSED, of_family

__all__ = [
    "QACnnPolicy",
    "QAMlpPolicy",
    "QAMultiInputPolicy",
    "QAPolicyMixin",
    "algorithms",
    "qa_policy",
    "stock_policies",
]

_MADE: dict[type[BasePolicy], type[BasePolicy]] = {}


def qa_policy(
    algorithm_or_policy_class: type[BaseAlgorithm] | type[BasePolicy], base: str = "MlpPolicy"
) -> type[BasePolicy]:
    """Return the policy class that also answers questions.

    The class is the same object for the same argument, can be pickled, and takes ``questions`` and the other ``qa_``
    arguments (see :class:`~sb3_qa.policies.mixin.QAPolicyMixin`) beside everything its base takes.

    :param algorithm_or_policy_class: an SB3 algorithm, e.g. ``PPO``, or a policy class, e.g. one of your own
    :param base: for an algorithm, which of its policies: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"; of RecurrentPPO they
        are those with an LSTM ("MlpLstmPolicy", ...)
    :raises QAError: when no such policy exists, or it cannot be taught
    """
    given = algorithm_or_policy_class
    if isinstance(given, type) and issubclass(given, BaseAlgorithm):
        for policy_class in given.policy_aliases.values():
            _refuse(policy_class)
        recurrent = base.replace("Policy", "LstmPolicy")  # what RecurrentPPO has in place of it
        base = recurrent if base not in given.policy_aliases and recurrent in given.policy_aliases else base
        if base not in given.policy_aliases:
            raise QAError(
                f"qa_policy got base={base!r} for {given.__name__}; expected one of {sorted(given.policy_aliases)}; give base=..."
            )
        policy_class = given.policy_aliases[base]
    elif isinstance(given, type) and issubclass(given, BasePolicy):
        policy_class = given
    else:
        raise QAError(f"qa_policy got {given!r}; expected an SB3 algorithm or policy class; write e.g. qa_policy(PPO)")
    if issubclass(policy_class, QAPolicyMixin):
        return policy_class
    _refuse(policy_class)
    if policy_class not in _MADE:
        _MADE[policy_class] = _make(policy_class)
    return _MADE[policy_class]


def _refuse(policy_class: type[BasePolicy]) -> None:
    reason = of_family(REFUSED, policy_class)
    if reason is not None:
        raise QAError(f"qa_policy got {policy_class.__name__}; expected another, as {reason}")


def _make(policy_class: type[BasePolicy]) -> type[BasePolicy]:
    metaclass = _metaclass_of(type(policy_class))
    name = _free_name(f"QA{policy_class.__name__}")
    # `vars(mixin)` is inherited; only the qualified name has to be found in this module, for pickle and for people. Its plain
    # name is that of its base, as algorithms ask for their policies by it: PPO recommends the CPU for an "ActorCriticPolicy".
    namespace = {"__module__": __name__, "__qualname__": name, "__doc__": policy_class.__doc__}
    made = metaclass(policy_class.__name__, (QAPolicyMixin, policy_class), namespace)
    setattr(sys.modules[__name__], name, made)
    return made


_METACLASSES: dict[type, type] = {}


def _metaclass_of(base: type) -> type:
    """A metaclass whose classes are pickled as a call of :func:`qa_policy`, so that a user's own base travels with them."""
    if base not in _METACLASSES:
        made = type(f"QA{base.__name__}", (base,), {})
        reduce: Callable[[Any], Any] = _reduce
        copyreg.pickle(made, reduce)
        _METACLASSES[base] = made
    return _METACLASSES[base]


def _reduce(policy_class: type[BasePolicy]) -> str | tuple[Any, ...]:
    for base, made in _MADE.items():
        if made is policy_class:
            return qa_policy, (base,)
    return policy_class.__qualname__  # a subclass somebody wrote by hand: by its name, as any class


def _free_name(name: str) -> str:
    module = sys.modules[__name__]
    names: Sequence[str] = [name, *(f"{name}_{n}" for n in range(2, 1000))]
    return next(n for n in names if not hasattr(module, n))


def algorithms() -> list[type[BaseAlgorithm]]:
    """The algorithms that can be taught: those of SB3, and of sb3-contrib where it is installed."""
    found: list[type[BaseAlgorithm]] = [A2C, DDPG, DQN, PPO, SAC, TD3]
    try:
        from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
    except ImportError:
        return found
    return [*found, CrossQ, MaskablePPO, QRDQN, RecurrentPPO, TQC, TRPO]


def stock_policies(algorithm: type[BaseAlgorithm]) -> dict[str, type[BasePolicy]]:
    """The policies that come with an algorithm, by the names it has for them."""
    return {name: policy for name, policy in algorithm.policy_aliases.items() if not issubclass(policy, QAPolicyMixin)}


def _refused(policy_class: type[BasePolicy]) -> type[BasePolicy]:
    """What stands for a policy that cannot be taught: to be made, it says why."""

    class Refused(policy_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _refuse(policy_class)

    return Refused


def _add_aliases() -> None:
    """Let algorithms take "QAMlpPolicy", "QACnnPolicy" and "QAMultiInputPolicy" by name."""
    try:
        from sb3_contrib import ARS
    except ImportError:
        pass
    else:
        ARS.policy_aliases = {**ARS.policy_aliases, **{f"QA{n}": _refused(p) for n, p in ARS.policy_aliases.items()}}
    for algorithm in algorithms():
        mine = {f"QA{name}": qa_policy(policy) for name, policy in stock_policies(algorithm).items()}
        algorithm.policy_aliases = {**algorithm.policy_aliases, **mine}


QAMlpPolicy = qa_policy(ActorCriticPolicy)
QACnnPolicy = qa_policy(ActorCriticCnnPolicy)
QAMultiInputPolicy = qa_policy(MultiInputActorCriticPolicy)
_add_aliases()
