"""What stands under and over lines: steps, where something began, what is usual."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.report.theme import WARNING

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Onset", "band_layer", "mark_layer", "onset_layer", "step_axis"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_USUAL = "#009e73"
_NEARLY_ALL = 0.95
_LEFT_HALF = 0.55  # further right, words stand on the left of the line
_TICKS = 8


class Onset(NamedTuple):
    """When something began, and how long it was seen.

    Attributes:
        first: The step at which it began.
        last: The last step at which it was seen.
        words: As in ``"began at step 40"``.
    """

    first: float
    last: float
    words: str


def step_axis(edges: Sequence[float]) -> "alt.Axis":
    """An axis of steps, whose ticks are whole numbers and each but once.

    Args:
        edges: First and last step.
    """
    import altair as alt

    low, high = math.ceil(edges[0]), math.floor(edges[1])
    # of so few steps Vega also marks halves, and rounding makes two of the same number
    ticks: dict[str, Any] = {"values": [*range(low, high + 1)]} if 0 <= high - low < _TICKS else {}
    return alt.Axis(
        format=",d", tickMinStep=1, labelOverlap=True, labelFlush=True, tickCount=_TICKS, **ticks
    )


def onset_layer(plot: Chart, onset: Onset, edges: tuple[float, float], *, named: bool) -> Chart:
    """A plot with a line where something began, and a shade over the steps at which it was seen.

    Args:
        plot: A layered chart whose horizontal axis is ``x``.
        onset: When.
        edges: First and last step of the axis.
        named: Whether to write the words above the line.
    """
    import altair as alt

    low, high = edges
    first, last = (min(max(step, low), high) for step in (onset.first, onset.last))
    base = alt.Chart({"values": [{"x": first, "until": last, "label": onset.words}]})
    span = base.mark_rect(color=WARNING, opacity=0.08).encode(x="x:Q", x2="until:Q")
    line = base.mark_rule(color=WARNING, strokeWidth=2).encode(x="x:Q")
    # a shade over the whole plot would say nothing
    layers = [span, plot, line] if last - first < _NEARLY_ALL * (high - low) else [plot, line]
    if named:
        left = first <= low + _LEFT_HALF * (high - low)
        text = base.mark_text(
            align="left" if left else "right", dx=-1 if left else 1, y=-8, fontWeight="bold"
        )
        layers.append(text.encode(x="x:Q", text="label:N"))
    return alt.layer(*layers)


def band_layer(band: tuple[float, float], up: "alt.Y") -> Chart:
    """The usual range as a shade behind the lines.

    Args:
        band: Its ends.
        up: The vertical axis.
    """
    import altair as alt

    base = alt.Chart({"values": [{"y": band[0], "top": band[1]}]})
    return base.mark_rect(color=_USUAL, opacity=0.1, clip=True).encode(y=up, y2="top:Q")


def mark_layer(label: str, steps: Sequence[float], across: "alt.X", height: int) -> Chart:
    """Marks at an edge of a plot, for values that no axis can show.

    Args:
        label: What was seen; it stands at the lower edge if it begins with ``zero``.
        steps: Where.
        across: The horizontal axis.
        height: Of the plot, in pixels.
    """
    import altair as alt

    low = label.startswith("zero")
    base = alt.Chart({"values": [{"x": step, "what": label} for step in steps]})
    shape = "triangle-down" if low else "cross"
    marks = base.mark_point(shape=shape, size=45, filled=True, color=WARNING, opacity=0.85)
    tips = [alt.Tooltip("x:Q", title="step"), alt.Tooltip("what:N")]
    return marks.encode(x=across, y=alt.value(height - 4 if low else 4), tooltip=tips)
