"""Some of the questions, put to the head by themselves: those of a gradient step, of a wrapper, or a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sb3_qa.questions import UNTAUGHT, Target

__all__ = ["Panel", "PanelShapes", "blocks_of"]


class Panel:
    """Targets side by side, in columns of their own, and what the head keeps for them between updates.

    :param targets: of one catalogue, taught or not
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        # As in a catalogue: states before actions, sigmoids before softmaxes, softmaxes of a width together.
        order = sorted(range(len(targets)), key=lambda n: _place(targets[n]))
        self.original = [targets[n] for n in order]
        self.targets: list[Target] = []
        """The same with their columns in this panel."""
        start = 0
        for target in self.original:
            self.targets.append(replace(target, start=start))
            start += target.width
        self.n_logits = start
        self.n_state = sum(target.width for target in self.targets if not target.question.per_action)
        self.blocks = blocks_of(self.targets)
        self.taught = all(target.start != UNTAUGHT for target in self.original)
        columns = [np.arange(target.start, target.stop) for target in self.original]
        self.columns: NDArray[np.intp] = np.concatenate(columns) if self.taught else np.zeros(0, np.intp)
        """The head's columns, where all are taught."""
        self.inputs: Any = None
        self.workspace: Any = None
        self.answering: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def place_of(self, target: Target) -> Target:
        """A target of the catalogue, with its columns in this panel."""
        for original, mine in zip(self.original, self.targets, strict=True):
            if original is target:
                return mine
        raise KeyError(target)


class PanelShapes:
    """What :class:`~sb3_qa.closed_form.ClosedForm` has to know of a head, for the questions of a panel.

    :param panel: the questions
    :param width: of the head's last layer
    :param scale: of its logits
    :param like: the head's weights behind the readout
    :param split: from a flat array, the panel's readout first, to weights
    """

    def __init__(self, panel: Panel, width: int, scale: float, like: torch.Tensor, split: Any) -> None:
        self.n_state, self.n_logits, self.blocks = panel.n_state, panel.n_logits, panel.blocks
        self.width, self.scale = width, scale
        self.n_readout = self.n_logits * (width + 1)
        self.flat = torch.zeros(self.n_readout + len(like), device=like.device)
        self.weights = split


def _place(target: Target) -> tuple[bool, bool, int]:
    softmax = target.kind in ("choice", "number")
    return target.question.per_action, softmax, target.width * softmax


def blocks_of(targets: Sequence[Target]) -> list[tuple[int, int, int]]:
    """Runs of columns (start, stop, width) that are squashed alike; width 1 stands for sigmoids."""
    blocks: list[tuple[int, int, int]] = []
    for target in targets:
        width = target.width if target.kind in ("choice", "number") else 1
        if blocks and blocks[-1][2] == width:
            blocks[-1] = (blocks[-1][0], target.stop, width)
        else:
            blocks.append((target.start, target.stop, width))
    return blocks
