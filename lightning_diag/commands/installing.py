"""What to type for packages that are missing."""

import shlex
from collections.abc import Sequence

__all__ = ["in_words"]


def in_words(checkout: str, packages: Sequence[str]) -> str:
    """How to install it: this package may be a checkout, and may be on no index.

    Args:
        checkout: What stands for the extra in the folder of a checkout, ready for a shell.
        packages: What is missing, with the versions that will do.

    Example:
        >>> in_words("'.[wandb]'", ["wandb>=0.19"])
        "pip install -e '.[wandb]' in a checkout, elsewhere pip install 'wandb>=0.19'"
    """
    return f"pip install -e {checkout} in a checkout, elsewhere pip install {shlex.join(packages)}"
