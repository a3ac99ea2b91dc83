"""``python -m sb3_qa COMMAND``: the commands, each in a module of its own that is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from sb3_qa.errors import QAError

COMMANDS = {
    "ask": ("sb3_qa.cli.ask", "step an environment in the terminal and ask its agent questions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for bad usage, 1 for input that is refused."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        usage = "\n".join(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items())
        text = f"usage: python -m sb3_qa COMMAND ...\n\n{usage}\n\n`python -m sb3_qa COMMAND --help` tells more.\n"
        asked = bool(argv) and argv[0] in ("-h", "--help")
        wrong = f"there is no command {argv[0]!r}\n\n" if argv and not asked else ""
        (sys.stdout if asked else sys.stderr).write(wrong + text)
        return 0 if asked else 2
    try:
        command = importlib.import_module(COMMANDS[argv[0]][0])
        code: int = command.main(argv[1:])
        return code
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "tyro"):
            raise
        sys.stderr.write(f"the command line needs {error.name}; install the extra: pip install 'sb3-qa[cli]'\n")
        return 1
    except QAError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
