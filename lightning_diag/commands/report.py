"""`lightning-diag report`: the analysis of a run, and an experiment that applies its findings."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lightning_diag.commands.composed import Compose, ComposedRun, Groups
from lightning_diag.commands.errors import UsageError
from lightning_diag.commands.runs import opened
from lightning_diag.commands.thresholds import check_thresholds, parsed_thresholds
from lightning_diag.report.experiment import experiment_yaml, in_a_line

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run
    from lightning_diag.rules.finding import Finding

__all__ = ["report"]


def report(
    path: Path,
    thresholds: Sequence[str],
    apply: Path | None,
    force: bool,
    compose: Compose,
    groups: Groups,
) -> int:
    """Write ``analysis/``, print the findings, and write the experiment if one is asked for.

    Args:
        path: The folder of the run.
        thresholds: ``RULE.THRESHOLD=NUMBER``, each one.
        apply: The file for the experiment.
        force: Whether that file may be overwritten.
        compose: What Hydra composes.
        groups: The groups and options that there are.

    Returns:
        The status for the shell.

    Raises:
        UsageError: The folder holds no run, or what was asked for cannot be done.
    """
    from rich.console import Console

    from lightning_diag.report import print_summary, write_report
    from lightning_diag.rules.run_thresholds import run_thresholds

    run, given = opened(path), parsed_thresholds(thresholds)
    check_thresholds(run.config)
    composed = None
    if apply is not None:
        _check_target(apply, force)
        composed = ComposedRun(run, compose, groups)
    written = write_report(run, run_thresholds(run.config, given))
    print_summary(written, Console())
    if apply is not None and composed is not None:
        _apply(run, written.findings, composed, apply)
    return written.exit_code


def _check_target(file: Path, force: bool) -> None:
    if file.suffix != ".yaml":
        raise UsageError(f"`--apply` must name a file that ends in .yaml, got `{file}`.")
    if file.exists() and not force:
        raise UsageError(f"`--apply` must name a new file; `{file}` exists, `--force` replaces it.")


def _apply(run: "Run", findings: "list[Finding]", composed: ComposedRun, file: Path) -> None:
    from lightning_diag.records.files import write_text
    from lightning_diag.rules.repair import changes, left_out

    made = changes(findings, run.config)
    for finding, reason in left_out(findings, run.config):
        where = f" ({_printable(finding.component)})" if finding.component else ""
        typer.echo(f"not applied: {finding.rule}{where}, {reason}")
    if not made:
        typer.echo(f"No override applies, so `{file}` is not written.")
        return
    title = f"The experiment of the run {run.path.resolve().name}, with what its findings ask for."
    text = experiment_yaml(
        composed.groups,
        composed.added,
        composed.body,
        made,
        title=title,
        kept=composed.kept,
        config=run.config,
    )
    write_text(file, text)
    typer.echo(f"written: {file}")
    for change in made:
        before, value = in_a_line(change.before), in_a_line(change.value)
        typer.echo(f"  {_printable(change.key)}: {before} -> {value} ({change.finding.rule})")
    for key in composed.kept:
        typer.echo(f"  {_printable(key)}: comes back with its group, the run did not have it")
    folder = ["--config-dir", composed.folder] if composed.folder else []
    command = ["lightning-diag", "train", *folder, f"experiment={file}"]
    typer.echo(f"next: {shlex.join(command)}")


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
