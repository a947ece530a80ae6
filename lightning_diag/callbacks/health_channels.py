"""How a finding reaches people: the terminal, and loggers that carry text or alerts."""

from typing import Any

from lightning_diag.lightning import Trainer, rank_zero_warn
from lightning_diag.rules.finding import Finding

__all__ = ["say", "send"]

_STYLES = {"critical": "bold red", "warning": "bold yellow", "info": "cyan"}


def say(trainer: Trainer, finding: Finding) -> None:
    """Print a finding, above the progress bar where there is one."""
    from rich.console import Console
    from rich.text import Text

    title, lines = _words(finding)
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print("\n".join([title, *lines]))
        return
    console = Console(stderr=True)
    console.print(Text(title, _STYLES[finding.severity]))
    for line in lines:
        console.print(Text(line))


def send(trainer: Trainer, finding: Finding, step: int) -> None:
    """Give a finding to the loggers that have a place for it; one that fails is passed over."""
    title, lines = _words(finding)
    for logger in trainer.loggers:
        there: Any = logger
        # also those that people derive from them
        kinds = {kind.__name__ for kind in type(logger).__mro__}
        try:
            if "WandbLogger" in kinds:
                level = {"critical": "ERROR", "warning": "WARN"}.get(finding.severity, "INFO")
                there.experiment.alert(title=title[:64], text="\n".join(lines), level=level)
            elif "TensorBoardLogger" in kinds:
                text = "  \n".join([f"**{title}**", *lines])
                there.experiment.add_text("health/alert", text, step)
            elif "MLFlowLogger" in kinds:
                place = f"health/alert-{step}-{finding.rule}.txt"
                there.experiment.log_text(there.run_id, "\n".join([title, *lines]), place)
        except Exception as error:
            name = type(logger).__name__
            rank_zero_warn(f"{name} took no alert: {type(error).__name__}: {error}")


def _words(finding: Finding) -> tuple[str, list[str]]:
    where = finding.component or "the whole model"
    since = "" if finding.first_step is None else f", since step {finding.first_step}"
    title = f"{finding.severity.upper()} {finding.issue}: {where}{since}"
    lines = [finding.message, f"Try: {finding.suggestion}"]
    if finding.caused_by:
        lines.append(f"Probably caused by: {finding.caused_by.replace('_', ' ')}.")
    return title, [line for line in lines if line]
