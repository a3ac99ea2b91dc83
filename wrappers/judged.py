"""What a veto decides in a step, and what it tells of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_qa.wrappers.restraint import Decision
from sb3_qa.wrappers.shell import Info

__all__ = ["Judged", "verdict"]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Judged(NamedTuple):
    """What was decided in one step, of n environments."""

    proposed: NDArray[Any]
    executed: NDArray[Any]
    """As far as this wrapper decides."""
    risk: Floats
    """(n,), of the proposed actions."""
    flagged: Bools
    any_flagged: bool
    vetoed: Bools
    unsafe: Bools
    """No action is under the threshold."""
    options: NDArray[Any] | None
    """(n, m, *action_shape), the actions that were compared; None for one, or for all of a discrete space."""
    risks: Floats | None
    """(n, m), theirs."""
    substitute_flagged: Bools | None
    decision: Decision | None


def verdict(risk: float, flagged: bool, vetoed: bool, proposed: Any, executed: Any, unsafe: bool) -> Info:
    """What every veto tells."""
    return {
        "qa/risk": risk,
        "qa/catastrophe": flagged,
        "qa/vetoed": vetoed,
        "qa/proposed_action": proposed,
        "qa/executed_action": executed,
        "qa/no_safe_action": unsafe,
    }
