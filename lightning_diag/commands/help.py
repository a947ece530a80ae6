"""What `lightning-diag --help` teaches, and the options that stand before a command."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["EPILOG", "debugging", "named_shell"]

EPILOG = """\
Examples:

\b
  lightning-diag train experiment=drivers trainer=quick run_dir=runs/first
  lightning-diag report runs/first --apply fixed.yaml
  lightning-diag train experiment=fixed.yaml run_dir=runs/second

\b
Exit status: 0 healthy or done, 1 an error, 2 wrong usage, 3 a warning or
nothing to judge by, 4 a critical finding. `COMMAND --help` says more.
"""


def debugging(command: object) -> dict[str, Any]:
    """Defaults for a command, or for each command of a group, with which it shows its errors.

    Args:
        command: What Typer made of them.
    """
    commands: Mapping[str, object] = getattr(command, "commands", {})
    return {name: debugging(one) for name, one in commands.items()} or {"debug": True}


def named_shell(arguments: Sequence[str]) -> None:
    """Let `--show-completion` and `--install-completion` take the name of a shell.

    Args:
        arguments: What follows the name of the program.
    """
    if len(arguments) > 1 and arguments[0] in ("--show-completion", "--install-completion"):
        # Typer takes a name only where it does not look for the shell itself
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
