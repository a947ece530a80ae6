"""`lightning-diag doctor`: what is installed, what it runs on, and what an extra misses."""

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from lightning_diag.commands.errors import plain_errors
from lightning_diag.commands.installing import in_words

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Need", "doctor", "needs"]

_NAME = "lightning-diag"
_BASE = "base"
_UNSHOWN = {"all"}
_USES = {
    _BASE: "callbacks, rules, report and command",
    "monitor": "the live page and its pictures",
    "recipes": "the experiments in recipes/ of a checkout",
    "wandb": "logging to Weights & Biases",
    "sweeps": "sweeps in parallel, by joblib or Slurm",
    "dev": "the tests of a checkout",
}


class Need(NamedTuple):
    """A package that an extra asks for.

    Attributes:
        package: Its name.
        wanted: Versions that will do, as in ``">=2.6"``; empty for any.
        found: The version that is installed; None where it is not.
        fits: Whether that will do.
    """

    package: str
    wanted: str
    found: str | None
    fits: bool


def needs() -> dict[str, list[Need]]:
    """What each extra asks for, and ``base`` for what all do, out of the package's own metadata."""
    found: dict[str, list[Need]] = {_BASE: []}
    for extra, requirement in _requirements():
        if extra not in _UNSHOWN:
            found.setdefault(extra, []).append(_need(requirement))
    return found


def doctor(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Print versions and devices, and what is missing for which extra.

    Exits with 0 where all that the package itself needs is there, and with 3 where it is not; a
    missing extra is no fault.
    """
    with plain_errors(debug):
        known = needs()
        _print_machine()
        for extra, packages in known.items():
            _print_extra(extra, packages)
        sound = all(one.fits for one in known[_BASE])
    raise typer.Exit(0 if sound else 3)


def _requirements() -> Iterator[tuple[str, "Requirement"]]:
    from packaging.requirements import Requirement

    for line in metadata.requires(_NAME) or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        rest = requirement.marker
        if extra is None and rest is not None and not rest.evaluate():
            continue
        yield (extra[1] if extra else _BASE), requirement


def _need(requirement: "Requirement") -> Need:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Need(requirement.name, str(requirement.specifier), None, False)
    # a local build such as 2.6.0+cpu counts as what it is a build of
    fits = requirement.specifier.contains(found.partition("+")[0], prereleases=True)
    return Need(requirement.name, str(requirement.specifier), found, fits)


def _print_machine() -> None:
    import torch

    from lightning_diag import lightning as door
    from lightning_diag.tuning.hardware import detect

    machine = detect()
    typer.echo(f"{_NAME} {metadata.version(_NAME)}, Python {platform.python_version()}")
    typer.echo(f"system: {platform.platform()}")
    typer.echo(f"torch {torch.__version__}, through {door.PACKAGE}")
    typer.echo(f"trains on: {machine.name}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(number)
            typer.echo(f"  cuda:{number} {seen.name}, {seen.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda is not None:
        typer.echo("  torch is built for CUDA, and sees no device: is there a driver?")
    typer.echo("")


def _print_extra(extra: str, packages: list[Need]) -> None:
    wrong = [one for one in packages if not one.fits]
    state = "complete" if not wrong else f"{len(wrong)} of {len(packages)} missing"
    use = _USES.get(extra, "")
    typer.echo(f"{extra}: {state}{f' ({use})' if use else ''}")
    for one in wrong:
        have = "is not installed" if one.found is None else f"is {one.found}"
        typer.echo(f"  {one.package} {have}; wanted {one.wanted or 'any version'}")
    if wrong:
        checkout = "." if extra == _BASE else f"'.[{extra}]'"
        typer.echo(f"  to have it: {in_words(checkout, [f'{n.package}{n.wanted}' for n in wrong])}")
