"""Functions by name, ``"package.module:function"``, for files and specifications that hold plain data only."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from sb3_qa.errors import QAError

__all__ = ["FunctionName", "function_named", "is_function_name", "name_of"]

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*")


class FunctionName(str):
    """The name of a function that is at hand: plain data to JSON, and the function itself to whoever takes it in this process.

    Of a lambda, a method of an object, or a function inside another the name is in angle brackets: nobody can import it.
    """

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> FunctionName:
        """Name a function."""
        module = getattr(function, "__module__", None) or "unknown"
        path = getattr(function, "__qualname__", None) or type(function).__qualname__
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        name = super().__new__(cls, f"{module}:{path}" if found is function else f"{module}:<{path}>")
        name.function = function
        return name

    def __deepcopy__(self, memo: Any) -> FunctionName:
        return self  # a method may belong to what cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionName, (self.function,)


def is_function_name(text: Any) -> bool:
    """Whether this is written as ``"package.module:function"``.

    >>> is_function_name("my_env.facts:off_road"), is_function_name("crashed")
    (True, False)
    """
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def function_named(name: str, where: str) -> Callable[..., Any]:
    """The function of that name; its module is imported.

    :param where: who asks, for the error
    :raises QAError: when there is none
    """
    if isinstance(name, FunctionName):
        return name.function
    module_name, _, path = name.partition(":")
    if not is_function_name(name) or "<" in path:
        raise QAError(
            f"{where} got {name!r}, which names no function that can be imported; expected one at the top of a module; define it there "
            'with def, and write "package.module:function"'
        )
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise QAError(
            f"{where} got {name!r}, and importing {module_name!r} raised {type(error).__name__}: {error}; expected a module that can be "
            "imported; install it, or put its folder on PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise QAError(
                f"{where} got {name!r}; expected a function in {module_name!r}, which has no {part!r}; mend it"
            )
        found = getattr(found, part)
    if not callable(found):
        raise QAError(f"{where} got {name!r}, which is {type(found).__name__} {found!r}; expected a function; name one")
    function: Callable[..., Any] = found
    return function


def name_of(function: Callable[..., Any], where: str) -> str:
    """The name that a function can be imported by.

    :raises QAError: for a lambda, a method of an object, a function inside another
    """
    name = FunctionName(function)
    if "<" in name:
        raise QAError(
            f"{where} got {function!r}, which cannot be written down as data; expected a function that can be imported; define it at the "
            "top of a module with def"
        )
    return str(name)
