"""Losses made up by hand, as rows of loss.jsonl, metrics.jsonl and collapse.jsonl."""

import math

import numpy as np

from tests.rules.planted import MadeUpRun


def loss_rows(losses, *, size=10, rates=None, norms=None, start=0):
    """The rows that CollapseStop writes of these losses, one a step; NaN is not finite."""
    losses = np.asarray(losses, dtype=float)
    rates = np.full(len(losses), 1e-3) if rates is None else np.asarray(rates, dtype=float)
    norms = np.ones(len(losses)) if norms is None else np.asarray(norms, dtype=float)
    rows = []
    for first in range(0, len(losses), size):
        part, now = losses[first : first + size], slice(first, first + size)
        kept = part[np.isfinite(part)]
        row = {
            "step": start + first + len(part) - 1,
            "epoch": 0,
            "component": None,
            "first_step": start + first,
            "steps": len(part),
            "loss": None,
            "loss_std": None,
            "loss_min": None,
            "loss_max": None,
            "loss_max_step": None,
            "nonfinite": len(part) - len(kept),
            "first_nonfinite": None,
            "gradient_norm": float(np.mean(norms[now])),
            "gradient_norm_max": float(np.max(norms[now])),
            "gradient_nonfinite": 0,
            "skipped": 0,
            "lr": float(rates[now][-1]),
            "lr_min": float(rates[now].min()),
            "lr_max": float(rates[now].max()),
        }
        if len(kept):
            row |= {
                "loss": float(kept.mean()),
                "loss_std": float(kept.std()),
                "loss_min": float(kept.min()),
                "loss_max": float(kept.max()),
                "loss_max_step": start + first + int(np.nanargmax(part)),
            }
        if len(kept) < len(part):
            row["first_nonfinite"] = start + first + int(np.argmin(np.isfinite(part)))
        rows.append(row)
    return rows


def metric_rows(values, name="train_loss", *, every=10, start=9, **more):
    """Rows of metrics.jsonl; a value that is not finite is null, with a count beside it."""
    rows = []
    for index, value in enumerate(values):
        finite = math.isfinite(value)
        row = {"step": start + index * every, "epoch": 0, name: float(value) if finite else None}
        row |= {} if finite else {f"{name}_nonfinite": 1}
        rows.append(row | {key: series[index] for key, series in more.items()})
    return rows


def loss_run(losses, *, validation=None, first_loss=True, **more):
    """A run of which only the losses are known; `validation` holds ``(step, value)``."""
    rows = {"loss": loss_rows(losses, **more)}
    if validation is not None:
        rows["metrics"] = [{"step": s, "epoch": 0, "val_loss": float(v)} for s, v in validation]
    if first_loss and more.get("start", 0) == 0 and math.isfinite(losses[0]):
        row = {"step": 0, "component": None, "event": 0, "kinds": None, "loss": float(losses[0])}
        rows["collapse"] = [row]
    return MadeUpRun(rows=rows)
