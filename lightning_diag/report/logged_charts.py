"""The charts of a run for the loggers that take pictures."""

from collections.abc import Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diag.records.read_run import Run, read_run
from lightning_diag.report.charts import gradient_flow, training
from lightning_diag.report.page_parts import drawn
from lightning_diag.report.sections import sections
from lightning_diag.rules import diagnose

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["log_charts", "takes_charts"]

_KEY = "charts"
_ABOUT_THE_END = ("health", "health_alert", "notes", "overhead")  # written after the last step


def log_charts(run: str | Path | Run, loggers: Iterable[Any]) -> list[str]:
    """Hand the charts of a run, as pictures, to the loggers that take any.

    W&B and TensorBoard get them under ``charts/NAME`` at the last step that was measured, MLflow
    as artifacts of that name; other loggers have no place for pictures. Call it when training has
    ended, on rank 0: ``log_charts(run, trainer.loggers)``. No failure leaves this function.

    Args:
        run: The run's folder, or what `read_run` made of it.
        loggers: Lightning loggers.

    Returns:
        What failed, a line each.
    """
    takers = [(one, kind) for one in loggers if (kind := _kind(one)) is not None]
    if not takers:
        return []
    if find_spec("PIL") is None:
        return ["The charts need Pillow: pip install pillow."]
    failed: list[str] = []
    try:
        read = run if isinstance(run, Run) else read_run(run)
        step, pictures = _last_step(read), _pictures(read, failed)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # so call themselves the errors of what is written in Rust
        return [f"The charts could not be drawn: {type(error).__name__}: {error}"]
    for logger, kind in takers:
        try:
            for name, picture in pictures.items():
                _give(logger, kind, name, picture, step)
        except Exception as error:
            failed.append(f"{kind} took no chart: {type(error).__name__}: {error}")
    return failed


def takes_charts(logger: object) -> bool:
    """Whether `log_charts` has a way to give pictures to a logger."""
    return _kind(logger) is not None


def _kind(logger: object) -> str | None:
    names = {kind.__name__ for kind in type(logger).__mro__}
    known = ("WandbLogger", "TensorBoardLogger", "MLFlowLogger")
    return next((name for name in known if name in names), None)


def _pictures(run: Run, failed: list[str]) -> "dict[str, Image]":
    from PIL import Image

    there, charts = set(run.prefixes), {}
    if "grad" in there:
        charts["gradient_flow"] = gradient_flow(run, diagnose(run))
    if there & {"metrics", "loss"}:
        charts["training"] = training(run)
    for section in sections(run):
        charts |= section.charts
    pictures = {}
    for name, chart in charts.items():
        try:
            pictures[name] = Image.open(BytesIO(drawn(chart)[1])).convert("RGB")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            failed.append(f"The chart {name} could not be drawn: {type(error).__name__}.")
    return pictures


def _last_step(run: Run) -> int:
    measured = [prefix for prefix in run.prefixes if prefix not in _ABOUT_THE_END]
    steps = [run.frame(prefix)["step"].max() for prefix in measured]
    return max((one for one in steps if isinstance(one, int)), default=0)


def _give(logger: Any, kind: str, name: str, picture: "Image", step: int) -> None:  # noqa: ANN401
    key = f"{_KEY}/{name}"
    if kind == "WandbLogger":
        logger.log_image(key, [picture], step=step)
    elif kind == "TensorBoardLogger":
        import numpy as np

        logger.experiment.add_image(key, np.asarray(picture), step, dataformats="HWC")
    else:
        logger.experiment.log_image(logger.run_id, picture, f"{key}.png")
