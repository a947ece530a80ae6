"""`lightning-diag clip-value`: a clip value from the gradient norms of a run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.tuning.clip_value import ClipSuggestion, suggest_clip_values

__all__ = ["clip_value"]


def clip_value(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    percentile: Annotated[
        float,
        typer.Option(help="Of the norms: 95 guards against the odd step, 10 is AutoClip's."),
    ] = 95.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line each.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Suggest a clip value from the gradient norms that RUN has recorded.

    Prints the value, the reason, and the override for the next `lightning-diag train`.
    Exits with 0 where there is a value, 3 where there is none, 2 on wrong usage.
    """
    with plain_errors(debug):
        try:
            found = suggest_clip_values(run, percentile)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from error
        for suggestion in found:
            typer.echo(_as_json(suggestion) if as_json else _in_words(suggestion))
    if not any(suggestion.value for suggestion in found):
        raise typer.Exit(3)


def _as_json(suggestion: ClipSuggestion) -> str:
    return json.dumps({**asdict(suggestion), "overrides": suggestion.overrides})


def _in_words(suggestion: ClipSuggestion) -> str:
    value = "no clip value" if suggestion.value is None else f"clip at {suggestion.value:g}"
    whose = "" if suggestion.optimizer is None else f"optimizer {suggestion.optimizer}: "
    lines = [f"{whose}{value}", suggestion.reason]
    if suggestion.overrides:
        lines.append(" ".join(f"{key}={value}" for key, value in suggestion.overrides.items()))
    elif suggestion.value is not None:
        lines.append(
            "With several optimizers the Trainer does not clip: call `clip_gradients` in the "
            "module's `on_before_optimizer_step`."
        )
    return "\n".join(lines)
