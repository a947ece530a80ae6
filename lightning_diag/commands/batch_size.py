"""`lightning-diag batch-size`: an experiment with several batch sizes, measured and compared."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
import yaml

from lightning_diag.commands.errors import UsageError
from lightning_diag.records import write_json, write_text
from lightning_diag.records.files import write_bytes

__all__ = ["Asked", "asked", "batch_size"]

_WHOLE = {"epochs"}
_NUMBERS = {"memory_limit_gib", "timeout_s", "spare"}
_INTERRUPTED = 130  # what a shell returns after Ctrl-C


@dataclass(frozen=True)
class Asked:
    """What the command line asked for.

    Args:
        batch_sizes: Sizes to try.
        options: Arguments of `profile_batch_sizes`.
        output: The Markdown file; None for one in a new folder.
        hydra: All that is left, for Hydra.
    """

    batch_sizes: tuple[int, ...]
    options: Mapping[str, Any]
    output: Path | None
    hydra: tuple[str, ...]


def asked(arguments: Sequence[str]) -> Asked:
    """Sort the arguments of the command into its own and those of Hydra.

    Args:
        arguments: Such as `batch_sizes=[16,32]`, `epochs=3`, `experiment=NAME`.

    Raises:
        UsageError: One of its own is missing, or not of its kind.

    Example:
        >>> found = asked(["experiment=tiny", "batch_sizes=[16,32]", "epochs=3"])
        >>> found.batch_sizes, found.options, found.hydra
        ((16, 32), {'epochs': 3}, ('experiment=tiny',))
    """
    names = {"batch_sizes", "output", *_WHOLE, *_NUMBERS}
    own: dict[str, str] = {}
    hydra = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if equals and name in names:
            own[name] = text
        else:
            hydra.append(argument)
    sizes = _sizes(own.pop("batch_sizes", None))
    output = own.pop("output", None)
    if output is not None and Path(output).suffix != ".md":
        raise UsageError(f"`output` must name a file that ends in .md, got `{output}`.")
    options = {name: _number(name, text) for name, text in own.items() if text != "null"}
    return Asked(sizes, options, Path(output) if output else None, tuple(hydra))


def _sizes(text: str | None) -> tuple[int, ...]:
    rule = "`batch_sizes` must be a list of whole numbers, as in `batch_sizes=[16,32,64]`"
    if text is None:
        raise UsageError(f"{rule}; it was not given.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    found = value if isinstance(value, list) else [value]
    if not found or not all(type(one) is int and one >= 1 for one in found):
        raise UsageError(f"{rule}, got `{text}`.")
    return tuple(found)


def _number(name: str, text: str) -> int | float:
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise UsageError(f"`{name}` must be {kind}, got `{text}`.") from None


def batch_size(
    arguments: Sequence[str],
    compose: Callable[[Sequence[str]], tuple[str, Mapping[str, Any]]],
    make: Callable[..., tuple[Mapping[str, Any], Any, Any]],
) -> int:
    """Profile the batch sizes of an experiment, and write profile.md, profile.png, profile.json.

    Args:
        arguments: What the user typed.
        compose: Hydra's arguments to the name of the experiment, and the further arguments of
            `make`; called once, to find mistakes before any process starts.
        make: As in `profile_batch_sizes`.

    Returns:
        The status for the shell: 0, 1 where no size was measured, 130 after Ctrl-C.

    Raises:
        UsageError: An argument is wrong.
    """
    from lightning_diag.tuning.batch_size import profile_batch_sizes

    wanted = asked(arguments)
    title, further = compose(wanted.hydra)
    output = wanted.output or _folder(title) / "profile.md"
    typer.echo(f"measuring into {output}")
    try:
        rows = profile_batch_sizes(
            make,
            wanted.batch_sizes,
            arguments=further,
            output=output,
            title=title,
            tell=typer.echo,
            **wanted.options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    _write(rows, output, title, wanted.options.get("spare", 0.15))
    if any(row.status == "interrupted" for row in rows):
        return _INTERRUPTED
    return 0 if any(row.status == "ok" for row in rows) else 1


def _folder(title: str) -> Path:
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("runs", f"batch-size-{title.replace(os.sep, '-')}-{now}")


def _write(rows: Sequence[Any], output: Path, title: str, spare: float) -> None:
    from lightning_diag.report.batch_size import batch_size_chart, batch_size_picture
    from lightning_diag.tuning.batch_size import markdown, recommend

    chosen = recommend(rows, spare=spare)
    plain = [asdict(row) for row in rows]
    memory = min((row.device_memory_gb for row in rows if row.device_memory_gb), default=None)
    chart = batch_size_chart(
        plain,
        title=f"Batch sizes: {title}",
        chosen=chosen.batch_size,
        most_memory_gb=memory * (1 - spare) if memory else None,
    )
    picture = output.with_suffix(".png")
    write_bytes(picture, batch_size_picture(chart))
    write_text(output, markdown(rows, title=title, recommendation=chosen, picture=picture.name))
    stored = {"title": title, "spare": spare, "recommendation": asdict(chosen), "profiles": plain}
    write_json(output.with_suffix(".json"), stored)
    found = "no batch size can be recommended" if chosen.batch_size is None else chosen.batch_size
    typer.echo(f"optimal batch size: {found}. {chosen.reasons[0]}")
    typer.echo(f"wrote {output}, {picture.name}, {output.with_suffix('.json').name}")
