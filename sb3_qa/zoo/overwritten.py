"""What rl_zoo3 was given about questions and does not pass on."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from typing import Any

from sb3_qa.policies.mixin import DEFAULTS

__all__ = ["overwritten"]

MANAGER = "rl_zoo3.exp_manager.ExperimentManager"


def overwritten() -> dict[str, Any]:
    """The arguments about questions among ``policy_kwargs`` that are lost on the way to the model that is being made.

    ``-optimize`` and ``--trial-id`` put ``policy_kwargs`` of their own, with the widths that were tried, in the place of those of
    the hyperparameters. rl_zoo3 passes nothing else on to a policy, so they are taken from whoever is calling: its
    ``ExperimentManager``, which still has them or can read them again. Empty where nothing is overwritten.
    """
    manager = _manager()
    if manager is None:
        return {}
    if manager.optimize_hyperparameters:
        given = manager._hyperparams.get("policy_kwargs")
    elif manager.storage and manager.study_name and manager.trial_id:
        before = copy.copy(manager)
        before.trial_id = None
        with contextlib.redirect_stdout(io.StringIO()):  # which it prints to
            given = before.read_hyperparameters()[0].get("policy_kwargs")
        if isinstance(given, str):
            given = eval(given)  # as rl_zoo3 does
    else:
        return {}
    return {name: value for name, value in (given or {}).items() if name in DEFAULTS}


def _manager() -> Any:
    """The ``ExperimentManager`` that is making a model, if it is one."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if any(f"{kind.__module__}.{kind.__name__}" == MANAGER for kind in type(caller).__mro__):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
