"""Command line: ``python -m sb3_qa COMMAND``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from sb3_qa.errors import QAError

COMMANDS = {
    "ask": "step an environment in the terminal, and ask its agent questions",
    "report": "play episodes and write one HTML page about the answers",
    "review": "list the flags, vetoes and catastrophes of a flight record, and show one",
    "study": "measure whether joint training is as cheap and as good as hoped, and report it",
}
"""Each is a module of :mod:`sb3_qa.cli` with ``main(argv)``, imported when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 2 for bad usage, 1 for input that is refused."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    usage = "usage: python -m sb3_qa COMMAND ...\n\n" + "".join(
        f"  {each:<10} {what}\n" for each, what in COMMANDS.items()
    )
    if name in ("-h", "--help"):
        sys.stdout.write(f"{usage}\npython -m sb3_qa COMMAND --help says more\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"there is no command {name!r}\n\n{usage}")
        return 2
    try:
        importlib.import_module(f"sb3_qa.cli.{name}").main(rest)
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich"):
            raise
        sys.stderr.write(f"the command line needs {error.name}, which is not installed; pip install 'sb3-qa[cli]'\n")
        return 1
    except QAError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
