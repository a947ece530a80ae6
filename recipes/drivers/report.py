"""The table that stands at the end of a run."""

from recipes.drivers.data import SeriesData
from recipes.drivers.scores import Scores, drivers_found

__all__ = ["comparison"]

_STAGES = {"val": "validation", "test": "test"}
_HEADS = {
    "history": "ridge, history",
    "planted": "ridge, planted",
    "all": "ridge, all",
    "ceiling": "ceiling",
}


def comparison(stage: str, data: SeriesData, scores: Scores) -> str:
    """R2 by target beside that of ridge and the ceiling, and where attention goes.

    Args:
        stage: ``val`` or ``test``.
        data: The data, set up.
        scores: What the forecaster reached.

    Returns:
        Several lines.
    """
    if data.series is None:
        raise ValueError("`data` must be set up, got data without a series.")
    baselines = data.baselines(stage)
    bodies = data.series.driver_names
    head = ["target", "R2", *(_HEADS[name] for name in baselines), "attention"]
    table = [head]
    for m, target in enumerate(data.series.target_names):
        numbers = [scores.r2[m], *(r2[m] for r2 in baselines.values())]
        weight, best = scores.attention[m].topk(min(3, len(bodies)))
        pairs = zip(best.tolist(), weight.tolist(), strict=True)
        looked = ", ".join(f"{bodies[b]} {share:.2f}" for b, share in pairs)
        if data.edges is not None:
            planted = ", ".join(bodies[b] for b in data.edges.body[m])
            looked = f"{looked} (planted: {planted})"
        table.append([target, *(f"{float(x):.3f}" for x in numbers), looked])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    if data.edges is not None:
        top1, recall = drivers_found(scores.attention, data.edges)
        count = len(data.edges.body)
        lines.append(
            f"attention: main driver first in {round(top1 * count)} of {count} targets, "
            f"recall@3 {recall:.2f}"
        )
    return "\n".join([f"R2 on {_STAGES[stage]}, and where attention goes:", *lines])
