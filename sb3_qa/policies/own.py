"""The agent's own parameters: all but those of the questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sb3_qa.head import QAHead

__all__ = ["OwnParameters"]


class OwnParameters:
    """Lists a module's parameters in the order of ``nn.Module.parameters()``, each once, but for those of the head, and of other
    parts that say to be ``of_questions``.

    SB3 asks for them at every gradient step. Where to look is remembered, as walking through all modules takes longer, until
    one of them is added, removed or replaced. A copy remembers nothing.
    """

    def __init__(self) -> None:
        self._children: list[tuple[dict[str, Any], list[Any]]] = []
        self._parameters: list[dict[str, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnParameters, ()

    def __call__(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters of ``module``, which is the same at each call."""
        if torch.compiler.is_dynamo_compiling():  # which follows references, and would meet modules by two ways
            return _each_once(each._parameters for each in _own(module))
        if not self._children or any(list(modules.values()) != before for modules, before in self._children):
            own = list(_own(module))
            self._children = [(each._modules, list(each._modules.values())) for each in own]
            self._parameters = [each._parameters for each in own if each._parameters]
        return _each_once(self._parameters)


def _each_once(parts: Iterable[dict[str, Any]]) -> Iterator[nn.Parameter]:
    return iter({id(p): p for parameters in parts for p in parameters.values() if p is not None}.values())


def _own(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module._modules.values():
        if child is not None and not isinstance(child, QAHead) and not getattr(child, "of_questions", False):
            yield from _own(child)
