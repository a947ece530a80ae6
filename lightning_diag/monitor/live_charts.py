"""The charts of the live page: those of the report, and which record files each is drawn from."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.report.charts import gradient_flow, training
from lightning_diag.report.sections.attention import head_entropy
from lightning_diag.report.sections.blobs import blob_history
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from lightning_diag.records.followed_run import FollowedRun

__all__ = ["CHARTS", "Draw", "LiveChart", "chart_spec"]

Draw = Callable[["FollowedRun", Sequence[Finding]], Any]
"""From a run and its findings to an Altair chart; None where there is nothing to draw."""


class LiveChart(NamedTuple):
    """A chart, and what it is drawn from.

    Attributes:
        files: Names of the record files; without rows in any of them there is no chart.
        draw: What draws it.
        also: Names of further files of which it shows something.
    """

    files: tuple[str, ...]
    draw: Draw
    also: tuple[str, ...] = ()


def _of_section(section: str, chart: str) -> Draw:
    """One chart of a section of the report."""

    def draw(run: "FollowedRun", findings: Sequence[Finding]) -> Any:  # noqa: ANN401
        home = importlib.import_module(f"lightning_diag.report.sections.{section}")
        made = getattr(home, f"{section}_section")(run)
        return None if made is None else made.charts.get(chart)

    return draw


CHARTS: Mapping[str, LiveChart] = {
    "training": LiveChart(("metrics", "loss"), lambda run, _: training(run)),
    "gradient_flow": LiveChart(("grad",), gradient_flow),
    "update_ratio": LiveChart(("update",), _of_section("updates", "update_ratio")),
    "attention_entropy": LiveChart(("attention",), _of_section("attention", "attention_entropy")),
    "attention_heads": LiveChart(
        ("attention_head",), lambda run, _: head_entropy(run.frame("attention_head"))
    ),
    "activations": LiveChart(("activation",), _of_section("activations", "activations")),
    "latents": LiveChart(("latent",), _of_section("latents", "latents")),
    "blob_history": LiveChart(("blob",), lambda run, _: blob_history(run), ("metrics", "loss")),
    "blobs": LiveChart(("blob_sample",), _of_section("blobs", "blobs"), ("blob",)),
    "hardware": LiveChart(("hardware",), _of_section("hardware", "hardware")),
}
"""The charts by name, in the order of the page."""


def chart_spec(
    draw: Draw, run: "FollowedRun", findings: Sequence[Finding]
) -> dict[str, Any] | None:
    """A chart as a Vega-Lite specification; None where there is nothing to draw.

    Args:
        draw: What draws it.
        run: The run.
        findings: What was found in it.
    """
    chart = draw(run, findings)
    if chart is None:
        return None
    # looking at every point takes longer than all the rest
    points = chart["datasets"]
    points = points if isinstance(points, dict) else {}
    chart["datasets"] = {}
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec["datasets"] = {**spec.get("datasets", {}), **points}
    return spec
