"""Packages that only some of this one needs: imported when they are, or told how to be installed."""

from __future__ import annotations

import importlib
from typing import Any

from sb3_qa.errors import QAError

__all__ = ["need"]


def need(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    :param module: e.g. ``"matplotlib.figure"``
    :param extra: of this package, which brings it
    :param what: who needs it, for the error
    :raises QAError: when it is not installed; one that is and fails at its own import raises its own error
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise QAError(
            f"{what} needs {package}, which is not installed; expected it; pip install 'sb3-qa[{extra}]'"
        ) from error
