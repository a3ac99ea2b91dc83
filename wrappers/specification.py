"""Arguments of wrappers as they stand in an environment's specification, which is JSON."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import Certificate
from sb3_qa.errors import QAError
from sb3_qa.named import FunctionName
from sb3_qa.questions import nearest
from sb3_qa.recorder import FlightRecorder
from sb3_qa.sharing import SharedAnswerer

__all__ = ["as_data", "recorded", "recorded_threshold", "specified"]


def recorded(qa: Any) -> str | None:
    """``qa=`` as it stands in an environment's spec: a path; an answerer at hand is to be bound again."""
    return os.fspath(qa) if isinstance(qa, (str, PathLike)) else None


def recorded_threshold(threshold: Any) -> Any:
    """``threshold=`` as it stands in an environment's spec, which is JSON."""
    if isinstance(threshold, Certificate):
        return {**threshold.to_dict(), "mismatch": threshold.mismatch}
    return threshold


def as_data(value: Any) -> Any:
    """An argument as it stands in an environment's spec: plain data, with functions, and models that act, by their names."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return FunctionName(value) if callable(value) or hasattr(value, "predict") else value


def specified(wrapper: type, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``wrapper_spec``, as plain data.

    :raises QAError: when the wrapper does not take them, or they cannot be written as JSON
    """
    name, takes = wrapper.__name__, dict(inspect.signature(wrapper).parameters)
    del takes["env"]
    for key in kwargs:
        if key not in takes:
            raise QAError(f"{name}.wrapper_spec got {key}=; expected one of {nearest(key, takes)}; rename it")
    for key, parameter in takes.items():
        if parameter.default is parameter.empty and key not in kwargs:
            raise QAError(f"{name}.wrapper_spec got no {key}; expected one; give {key}=...")
    told: dict[str, Any] = {}
    for key, value in kwargs.items():
        if isinstance(value, (QuestionAnswerer, SharedAnswerer)):
            raise QAError(
                f"{name}.wrapper_spec got {key}={type(value).__name__}; expected a path, as a specification holds plain data; save it, "
                f'qa.save("driver.qa"), and give {key}="driver.qa"'
            )
        if isinstance(value, (FlightRecorder, PathLike)):
            value = value.path if isinstance(value, FlightRecorder) else os.fspath(value)
        told[key] = as_data(recorded_threshold(value))
        try:
            json.dumps(told[key])
        except (TypeError, ValueError) as error:
            raise QAError(
                f"{name}.wrapper_spec got {key}={value!r}, which cannot be written as JSON ({error}); expected plain data; give numbers, "
                "texts, lists, and mappings of them, or wrap the environment by hand"
            ) from None
    return told
