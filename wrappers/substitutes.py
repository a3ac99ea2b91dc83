"""What is executed instead of a vetoed action: candidates, a few gradient steps on their risk, or another policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.errors import QAError
from sb3_qa.wrappers.shell import plain, row, same_observations

if TYPE_CHECKING:
    from sb3_qa.answerer import Reading

__all__ = [
    "Fallback",
    "OnVeto",
    "all_actions",
    "allowed",
    "candidates",
    "check_fallback",
    "choices",
    "is_catastrophe",
    "refined",
    "safest",
    "takes_masks",
]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
CANDIDATES = 32  # of each source, where actions cannot be listed
LISTED = 256  # as many combinations of discrete parts are all looked at
FIRST_STEP = 0.5  # of the gradient steps, in units of half the box's width


@runtime_checkable
class Fallback(Protocol):
    """A policy that acts instead: an SB3 model, or anything with its ``predict``."""

    def predict(self, observation: Any, *, deterministic: bool) -> tuple[Any, Any]:
        """Actions (n, *action_shape) for observations (n, ...), and a state that is not looked at."""


OnVeto = str | Fallback | Callable[[Any, Any], Any]


def is_catastrophe(risk: Floats, threshold: float) -> Bools:
    """Risk >= threshold; a risk that is not finite counts as a catastrophe (fail closed)."""
    return ~(np.isfinite(risk) & (risk < threshold))


def safest(risk: Floats, preference: Floats | None = None, threshold: float = 0.0) -> NDArray[np.intp]:
    """Index of the candidate to take: the preferred one under the threshold, or else the one of the lowest risk.

    A risk that is not finite is higher than any other.

    :param risk: (n, m)
    :param preference: (n, m), e.g. the policy's log-probabilities; without, only the risk counts
    :return: (n,)
    """
    finite = np.where(np.isfinite(risk), risk, np.inf)
    lowest = np.argmin(finite, axis=1)
    if preference is None:
        return lowest
    allowed = ~is_catastrophe(risk, threshold)
    # What is allowed stays above what is not, even at a probability of 0.
    preferred = np.argmax(np.where(allowed, np.maximum(preference, np.finfo(np.float32).min), -np.inf), axis=1)
    return np.where(allowed.any(axis=1), preferred, lowest)


def all_actions(space: spaces.Space[Any]) -> NDArray[Any] | None:
    """Every action, (m, *action_shape), where there are few enough to look at each."""
    if isinstance(space, spaces.Discrete):
        return np.arange(space.start, space.start + space.n)
    if isinstance(space, spaces.MultiDiscrete) and np.prod(space.nvec, dtype=float) <= LISTED:
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in space.nvec.ravel()], indexing="ij"), -1)
        return grid.reshape(-1, *space.shape) + space.start
    if isinstance(space, spaces.MultiBinary) and 2 ** int(np.prod(space.shape)) <= LISTED:
        n = int(np.prod(space.shape))
        return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).reshape(-1, *space.shape)
    return None


def choices(space: spaces.Space[Any]) -> NDArray[np.intp] | None:
    """How many choices each part of an action has; None where they cannot be listed."""
    if isinstance(space, spaces.Discrete):
        return np.array([space.n], np.intp)
    if isinstance(space, spaces.MultiDiscrete):
        return np.asarray(space.nvec.ravel(), np.intp)
    return np.full(int(np.prod(space.shape)), 2) if isinstance(space, spaces.MultiBinary) else None


def allowed(space: spaces.Space[Any], masks: Bools, options: NDArray[Any]) -> Bools:
    """Which options (n, m, *action_shape) the environment's masks allow: (n, m).

    :param masks: (n, n_choices), those of the parts of an action after each other
    """
    sizes = choices(space)
    assert sizes is not None
    n, m = options.shape[:2]
    parts = (options - getattr(space, "start", 0)).reshape(n, m, -1).astype(np.intp) + np.cumsum(sizes) - sizes
    return np.asarray(masks[np.arange(n)[:, None, None], parts].all(axis=2))


def takes_masks(agent: Any) -> bool:
    """Whether an agent's ``predict`` takes ``action_masks``, as MaskablePPO's does."""
    return "action_masks" in inspect.signature(agent.predict).parameters


def candidates(
    here: Reading, actions: NDArray[Any], space: spaces.Space[Any], rng: np.random.Generator, *, anywhere: bool = True
) -> NDArray[Any]:
    """Of actions that cannot be listed: the proposed one, some of the policy's, and some from the whole space.

    :param here: of n states
    :param actions: (n, *action_shape), as proposed
    :param space: is sampled from, so a copy of the agent's
    :param anywhere: otherwise those from the space are the policy's, too
    :return: (n, m, *action_shape)
    """
    n, shape = len(actions), space.shape or ()
    own = here.sampled(CANDIDATES * (1 if anywhere else 2), int(rng.integers(2**31)))
    if not anywhere:
        return np.concatenate([actions[:, None], own.astype(actions.dtype)], axis=1)
    if isinstance(space, spaces.Box):
        others = rng.uniform(space.low, space.high, (n, CANDIDATES, *shape))
    else:
        space.seed(int(rng.integers(2**31)))
        others = np.stack([[space.sample() for _ in range(CANDIDATES)] for _ in range(n)])
    return np.concatenate([actions[:, None], own, others.astype(actions.dtype)], axis=1)


def refined(here: Reading, question: str, actions: NDArray[Any], space: spaces.Box, steps: int) -> NDArray[Any]:
    """Continuous actions of a lower risk, by gradient descent from these; never of a higher one.

    Each step goes against the gradient of the risk, by a share of the box that is halved wherever it did not help, and
    back into the box (projected gradient descent with backtracking). Only the head's action part is differentiated: the
    observation has been read.

    :param here: of n states
    :param question: key of a yes/no instance about the action
    :param actions: (n, *action_shape), where to start
    :return: (n, *action_shape)
    """
    shape = actions.shape
    middle, half = ((space.high + space.low) / 2).ravel(), ((space.high - space.low) / 2).ravel()

    def action(at: NDArray[Any]) -> NDArray[Any]:  # clipped, as what is scaled there and back may leave the box
        scaled = (at * half + middle).reshape(shape)
        return np.clip(scaled, space.low, space.high).astype(actions.dtype)

    start = (actions.reshape(len(actions), -1).astype(np.float64) - middle) / half
    best = start.copy()
    lowest, gradient = here.hazard_gradient(question, actions)
    size = np.full((len(actions), 1), FIRST_STEP)
    for _ in range(steps):
        slope = np.abs(gradient).max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            direction = np.where(slope > 0, gradient / slope, 0.0)
        tried = np.clip(best - size * direction, -1.0, 1.0)
        risk, slopes = here.hazard_gradient(question, action(tried))
        better = risk < lowest  # never so of what is not finite
        best[better], lowest[better], gradient[better] = tried[better], risk[better], slopes[better]
        size[~better] /= 2
    changed = action(best)
    unchanged = (best == start).all(axis=1)
    changed[unchanged] = actions[unchanged]
    return changed


def called(
    name: str,
    on_veto: Any,
    obs: Any,
    rows: NDArray[np.intp],
    proposed: NDArray[Any],
    space: Any,
    masks: Bools | None = None,
) -> NDArray[Any]:
    """What a fallback policy or a callable executes instead in the environments at ``rows``: (len(rows), *action_shape).

    :param masks: (n, n_choices) of all environments, see :func:`allowed`; told to a policy that takes them
    :raises QAError: when that is no action of the space, or one that the masks forbid, and not the proposed one; what is outside
        of a box is clipped, as SB3 does
    """
    shape = proposed[rows].shape
    if isinstance(on_veto, Fallback):
        told = {} if masks is None or not takes_masks(on_veto) else {"action_masks": masks[rows]}
        given, _ = on_veto.predict(row(obs, rows), deterministic=True, **told)
        if np.shape(given) != shape:
            raise QAError(
                f"{name}'s fallback policy gave actions of shape {np.shape(given)}; expected {shape}, of {space}; give one for each "
                "observation"
            )
    else:
        given = [on_veto(row(obs, i), plain(proposed[i])) for i in rows.tolist()]
    for one in given:
        if np.shape(one) != shape[1:] or np.asarray(one).dtype.kind not in "biuf":
            raise _no_action(name, on_veto, one, space)
    actions = np.asarray(given)
    if isinstance(space, spaces.Box):
        actions = np.clip(actions, space.low, space.high)
    within = _within(actions, space).reshape(len(actions), -1).all(axis=1)
    if not within.all():
        raise _no_action(name, on_veto, given[int(np.argmin(within))], space)
    if masks is not None:
        fine = allowed(space, masks[rows], actions[:, None])[:, 0] | ~masks[rows].any(axis=1)
        fine |= (actions == proposed[rows]).reshape(len(actions), -1).all(axis=1)
        if not fine.all():
            raise _no_action(
                name, on_veto, given[int(np.argmin(fine))], space, " that the environment's action_masks() allow"
            )
    return actions.astype(proposed.dtype)


def _within(actions: NDArray[Any], space: spaces.Space[Any]) -> Bools:
    """Which parts (n, *action_shape) of actions can be taken."""
    if isinstance(space, spaces.Box):
        return np.isfinite(actions)
    low = getattr(space, "start", 0)
    n = space.n if isinstance(space, spaces.Discrete) else getattr(space, "nvec", 2)
    return (actions >= low) & (actions < low + n) & (actions == np.floor(actions))


def _no_action(name: str, on_veto: Any, given: Any, space: spaces.Space[Any], more: str = "") -> QAError:
    by = "fallback policy" if isinstance(on_veto, Fallback) else "on_veto callable"
    return QAError(f"{name}'s {by} gave {given!r}; expected an action of {space}{more}; return one")


def check_fallback(
    name: str, on_veto: Any, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> None:
    """Refuse a fallback policy that was trained on other observations or actions, or that needs a memory.

    :raises QAError: naming both spaces
    """
    if not isinstance(on_veto, Fallback):
        return
    seen, taken = getattr(on_veto, "observation_space", None), getattr(on_veto, "action_space", None)
    if seen is not None and not same_observations(seen, observation_space):
        raise QAError(
            f"{name} sees {observation_space} but its fallback policy (on_veto) sees {seen}; expected the same; give one that was "
            "trained in this environment, with the same wrappers"
        )
    if taken is not None and taken != action_space:
        raise QAError(
            f"{name} has the action space {action_space} but its fallback policy's (on_veto) is {taken}; expected the same; give "
            "one that was trained in this environment"
        )
    if any(hasattr(policy, "lstm_actor") for policy in (on_veto, getattr(on_veto, "policy", None))):
        raise QAError(
            f"{name} got a recurrent fallback policy, which would have to see every step; expected one without a memory; train "
            "it with e.g. PPO"
        )
