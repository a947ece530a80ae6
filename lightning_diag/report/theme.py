"""One look for all charts, on light and on dark ground."""

from typing import Any

__all__ = ["DASHES", "WARNING", "chart_config"]

WARNING = "#d55e00"
"""Colour of what is wrong, told from the others by colour-blind readers too."""

DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3))
"""Stroke patterns: five colours times two patterns tell ten components apart."""

_LIGHT = {"ink": "#1f2933", "quiet": "#52606d", "line": "#d9dee4", "ground": "#ffffff"}
_DARK = {"ink": "#e4e9ee", "quiet": "#a3b1bf", "line": "#38434f", "ground": "#161b21"}

# Okabe and Ito 2008, lightened on dark ground; vermilion is kept for what is wrong
_LIGHT_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#b5548c", "#56b4e9"]
_DARK_COLOURS = ["#4aa3df", "#f0b429", "#2fbf96", "#dd8dbb", "#9bd4f5"]


def chart_config(*, dark: bool = False) -> dict[str, Any]:
    """The Vega-Lite configuration of every chart."""
    tone = _DARK if dark else _LIGHT
    colours = _DARK_COLOURS if dark else _LIGHT_COLOURS
    font = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
    text = {"labelColor": tone["quiet"], "titleColor": tone["quiet"], "labelFontSize": 11}
    return {
        "background": tone["ground"],
        "font": font,
        "view": {"stroke": None},
        "range": {"category": colours * len(DASHES)},
        "axis": {
            **text,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "gridColor": tone["line"],
            "gridOpacity": 0.6,
            "domainColor": tone["line"],
            "tickColor": tone["line"],
            "titlePadding": 8,
        },
        "axisX": {"grid": False},
        "axisY": {"minExtent": 40},
        "legend": {
            **text,
            "labelFontSize": 12,
            "orient": "bottom",
            "columns": 4,
            "symbolStrokeWidth": 2.5,
            "symbolSize": 160,
            "labelLimit": 170,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
        },
        "title": {
            "anchor": "start",
            "color": tone["ink"],
            "subtitleColor": tone["quiet"],
            "fontSize": 15,
            "fontWeight": 600,
            "subtitleFontSize": 12,
            "subtitlePadding": 4,
            "offset": 12,
        },
        "text": {"color": tone["quiet"], "fontSize": 11},
        "line": {"strokeWidth": 1.8},
    }
