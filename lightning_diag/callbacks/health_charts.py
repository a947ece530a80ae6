"""The charts of a run for its loggers, drawn when training has ended."""

from time import perf_counter
from typing import Literal

from lightning_diag.callbacks.run import run_logger
from lightning_diag.lightning import Trainer

__all__ = ["SECONDS_OF_DRAWING", "Charts", "are_wanted", "give_charts"]

Charts = bool | Literal["auto"]

SECONDS_OF_DRAWING = 5.0
"""What drawing takes, about."""


def are_wanted(charts: Charts, seconds: float, budget: float) -> bool:
    """Whether charts are to be drawn; ``"auto"``: where it takes little of the training's time.

    Args:
        charts: What was asked for.
        seconds: How long the training took.
        budget: The share of it that drawing may take.

    Example:
        >>> are_wanted("auto", seconds=60.0, budget=0.01), are_wanted("auto", 3600.0, 0.01)
        (False, True)
    """
    return charts is True or (charts == "auto" and budget * seconds >= SECONDS_OF_DRAWING)


def give_charts(trainer: Trainer) -> tuple[str, Literal["info", "warning"]] | None:
    """Hand the charts of the run to the loggers that take pictures.

    Returns:
        What is to be said of it, and how grave that is; None where no logger takes any.
    """
    # the one thing that is drawn in training: what draws is loaded when it is needed
    from lightning_diag.report.logged_charts import log_charts, takes_charts

    run = run_logger(trainer)
    takers = [logger for logger in trainer.loggers if takes_charts(logger)]
    if run is None or not takers:
        return None
    began = perf_counter()
    failed = log_charts(run.path, takers)
    if failed:
        return " ".join(failed), "warning"
    names = ", ".join(type(logger).__name__ for logger in takers)
    return f"{names} got the charts in {perf_counter() - began:.1f} s.", "info"
