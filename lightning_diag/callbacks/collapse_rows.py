"""The numbers of a step on a CPU: rows are read as they are, and counted in plain Python.

There each small tensor operation costs more than counting some rows. What comes out is what
`step_numbers` and `merge_steps` give.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from math import inf, isfinite, isinf, isnan, nan
from operator import ne

import torch
from torch import Tensor

from lightning_diag.functional.collapse_stop import (
    BINS,
    IGNORED,
    PREDICTION_FIELDS,
    prediction_columns,
    prediction_rows,
)

__all__ = ["RawRows", "as_read", "raw_rows", "step_values"]

_MOST_ROWS = 1024
_SUMS = 6
_NOTHING = [0.0] * _SUMS + [-inf] * (len(PREDICTION_FIELDS) - _SUMS) + [0.0] * BINS
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class RawRows:
    """The rows of one micro-batch, and how they are to be understood.

    Attributes:
        tensors: Variances of the columns, largest logits, then classes (where there are several
            logits), then labels (where they are known).
        columns: Number of variances.
        rows: Number of rows.
        width: Number of logits of a row.
        labels: ``"no"``, ``"float"`` or ``"index"``.
    """

    tensors: list[Tensor]
    columns: int
    rows: int
    width: int
    labels: str

    def count(self, read: Sequence[float]) -> list[float]:
        """What `prediction_numbers` gives, from the values of `tensors` on the host."""
        end = self.columns + self.rows
        variances, best = [v for v in read[: self.columns] if isfinite(v)], read[self.columns : end]
        if self.width == 1:
            classes: Sequence[float] = [float(x > 0) for x in best]
        else:
            classes, end = read[end : end + self.rows], end + self.rows
        valid = [isfinite(x) for x in best]
        labels, odd = self._labels(read[end : end + self.rows])
        if labels:
            valid = [yes and label is not None for yes, label in zip(valid, labels, strict=True)]
        if not all(valid):
            classes = list(compress(classes, valid))
            labels, odd = list(compress(labels, valid)), list(compress(odd, valid))
        number_odd, predicted = sum(odd), classes
        if number_odd:
            known = [not one for one in odd]
            labels, predicted = list(compress(labels, known)), list(compress(classes, known))
        targets = [label for label in labels if label is not None]
        mean = sum(variances) / len(variances) if variances else nan
        freedom = self.rows - 1 if isfinite(mean) else 0
        bins = [0.0] * BINS
        for which, times in Counter(classes).items():
            bins[int(which) % BINS] += times
        return [
            *(mean * freedom if freedom else 0.0, freedom, len(classes), number_odd, len(targets)),
            sum(map(ne, predicted, targets)) if targets else 0,
            *_ends(classes),
            *_ends(targets),
            *bins,
        ]

    def _labels(self, read: Sequence[float]) -> tuple[Sequence[float | None], list[bool]]:
        """The class of each row, None where it is to be ignored, and whether it is none at all."""
        if self.labels == "no":
            return (), []
        if self.labels == "float":
            return [float(x > 0) for x in read], [x not in (0, 1) for x in read]
        if self.width == 1:
            return [None if x == IGNORED else float(x > 0) for x in read], []
        return read if min(read) >= 0 else [None if x < 0 else x for x in read], []


def raw_rows(logits: Tensor, targets: Tensor | None, most: int) -> RawRows | None:
    """The rows of a micro-batch, nothing read of them; None where tensors count them better.

    Args:
        logits: See `prediction_numbers`.
        targets: See there.
        most: Rows to look at.
    """
    if most > _MOST_ROWS or logits.device.type != "cpu":
        return None
    x, labels = prediction_rows(logits.detach(), targets, most)
    rows = x.shape[0]
    if x.numel() == 0 or (labels is not None and labels.dim() == 2):
        return None
    variances = prediction_columns(x).var(0) if rows > 1 else x.new_zeros(0)
    width = x.shape[1]
    tensors = [variances, *((x[:, 0],) if width == 1 else x.max(1))]
    kind = "no"
    if labels is not None:
        kind = "float" if labels.is_floating_point() else "index"
        tensors.append(labels)
    return RawRows(tensors, variances.shape[0], rows, width, kind)


def step_values(
    read: Sequence[float],
    squares: int,
    losses: int,
    batches: Sequence[RawRows | None],
    *,
    divided_by: float = 1,
) -> list[float]:
    """All numbers of a step, in the order of `merge_steps`.

    Args:
        read: The scale, then as many squares, as many losses, and the rows of each micro-batch
            (or its numbers, where there is None), as one list.
        squares: How many squares; -1 where there is no gradient.
        losses: How many losses.
        batches: The micro-batches.
        divided_by: What the losses were divided by.
    """
    start = 1 + squares
    found = [x for x in read[1:start] if not x < 0]
    nans, infs = sum(map(isnan, found)), sum(map(isinf, found))
    total = sum(found)
    # all elements are finite: so is their norm
    total = _LARGEST if total == inf and not infs else total
    loss = sum(read[start : start + losses]) * divided_by / losses if losses else nan
    start += losses
    counted = []
    for batch in batches:
        size = len(_NOTHING) if batch is None else sum(t.numel() for t in batch.tensors)
        part, start = read[start : start + size], start + size
        counted.append(list(part) if batch is None else batch.count(part))
    merged = _merged(counted) if counted else _NOTHING
    return [total, len(found), found.count(0.0), nans, infs, read[0], losses, loss, *merged]


def as_read(pieces: Sequence[Tensor]) -> Tensor:
    """All pieces in one vector of double precision."""
    return torch.cat([piece.reshape(-1) for piece in pieces]).double()


def _merged(batches: list[list[float]]) -> list[float]:
    if len(batches) == 1:
        return batches[0]
    last = len(PREDICTION_FIELDS)
    columns = list(zip(*batches, strict=True))
    return [
        max(column) if _SUMS <= place < last else sum(column)
        for place, column in enumerate(columns)
    ]


def _ends(classes: Sequence[float]) -> tuple[float, float]:
    return (-min(classes), max(classes)) if classes else (-inf, -inf)
