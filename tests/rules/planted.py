"""Traces made up by hand: rows as GradientHealth writes them, with the answer known."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

COUNTS = {"embedding": 50_000, "encoder": 200_000, "head": 400}


@dataclass
class MadeUpRun:
    """What the rules and the report use of a run, held in memory."""

    rows: dict[str, list[dict]] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    path: Path = Path("made-up")

    @property
    def prefixes(self):
        return tuple(self.rows)

    def frame(self, prefix):
        rows = self.rows.get(prefix, [])
        empty = pl.DataFrame(schema={"step": pl.Int64, "epoch": pl.Int64, "component": pl.String})
        return pl.DataFrame(rows, infer_schema_length=None) if rows else empty


def component_row(step, component, l2, *, count=1000, **more):
    row = {
        "step": step,
        "epoch": 0,
        "time": 1.7e9 + step,
        "attempt": 0,
        "component": component,
        "count": count,
        "l2": None if l2 is None else float(l2),
        "nonfinite": 0,
        "tensors": 4,
        "missing": 0,
        "frozen": 0,
    }
    return {**row, **more}


def whole_row(step, parts, **more):
    known = [part["l2"] for part in parts if part["l2"] is not None]
    norm = math.sqrt(sum(l2**2 for l2 in known))
    bad = sum(part["nonfinite"] for part in parts)
    row = {**component_row(step, None, norm), "count": sum(part["count"] for part in parts)}
    row.update(
        nonfinite=bad,
        has_nan=int(bad > 0),
        has_inf=0,
        global_norm=norm,
        max_norm=max(known, default=0.0),
        min_norm=min(known, default=0.0) / 2,
        mean_norm=norm / 2,
        dominant=max(parts, key=lambda part: part["l2"] or 0.0)["component"],
        skipped=0,
        skipped_total=0,
    )
    return {**row, **more}


def trace(norms, *, every=10, counts=None, clip=None, zeros=None, whole=True):
    """Rows from ``{component: [norm per measured step]}``, with the whole model's row beside."""
    rows = []
    length = len(next(iter(norms.values())))
    for index in range(length):
        parts = [
            component_row(index * every, name, series[index], count=(counts or {}).get(name, 1000))
            for name, series in norms.items()
        ]
        for part in parts:
            if zeros and part["component"] in zeros:
                part["zeros"] = zeros[part["component"]]
        if whole:
            row = whole_row(index * every, parts)
            if clip is not None:
                coefficient = min(1.0, clip / max(row["l2"], 1e-12))
                row.update(clip_algorithm="norm", clip_value=clip, clip_coefficient=coefficient)
                row["clipped"] = int(coefficient < 1.0)
            parts = [*parts, row]
        rows += parts
    return rows


def noise(rng, length, centre, spread=0.3):
    """Log-normal noise around `centre`, the shape that norms of small batches have."""
    return centre * np.exp(rng.normal(0.0, spread, length))


def run_of(rows, **more):
    return MadeUpRun(rows={"grad": rows}, **more)
