"""Collapse: the few numbers of one step that tell whether a run is dead."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.moments import gathered, local_shard

__all__ = [
    "ABSENT",
    "BINS",
    "IGNORED",
    "PREDICTION_FIELDS",
    "STEP_FIELDS",
    "gradient_squares",
    "merge_predictions",
    "merge_steps",
    "no_predictions",
    "prediction_columns",
    "prediction_numbers",
    "prediction_rows",
    "step_numbers",
]

ABSENT = -1.0
BINS = 64
PREDICTION_FIELDS = (
    *("deviations", "freedom", "predictions", "odd_labels", "labels", "misses"),
    *("lowest", "highest", "lowest_label", "highest_label"),
)
STEP_FIELDS = (
    *("sum_sq", "tensors", "zero", "nan", "inf"),
    *("scale", "losses", "loss", *PREDICTION_FIELDS),
)
_SUMS, _ENDS = 6, 10
_COLUMNS = 64
IGNORED = -100


def gradient_squares(
    gradients: Sequence[Tensor | None], divisor: Tensor | float | None = None
) -> Tensor:
    r"""Squared Euclidean norm of each gradient, :math:`\sum_i (g_i / s)^2`.

    A finite gradient gives a finite number: beyond the largest square that its precision holds (on
    a CPU single, so a norm of 1.8e19), that one. A non-finite element shows as ``nan`` or ``inf``.

    Args:
        gradients: Gradients of ``n`` parameters: dense, sparse or distributed (this rank's share);
            None where there is none.
        divisor: What they are still multiplied by, shape ``()``.

    Returns:
        Double precision (single where the device has no double), shape ``(n,)``; -1 where there is
        no gradient.

    Example:
        >>> gradient_squares([torch.tensor([3.0, 4.0]), None])
        tensor([25., -1.], dtype=torch.float64)
    """
    present = [x for x in gradients if x is not None]
    if not present:
        return torch.full((len(gradients),), ABSENT, dtype=torch.float64)
    found = [x if type(x) is Tensor and _is_plain(x) else _stored(local_shard(x)) for x in present]
    with torch.no_grad():
        squares = _squares(found)
    if divisor is not None:
        squares = squares / divisor / divisor
    if len(found) == len(gradients):
        return squares
    # stacked, not indexed: an index would have to travel to the device, which waits for it
    absent, values = squares.new_full((), ABSENT), iter(squares.unbind())
    return torch.stack([absent if x is None else next(values) for x in gradients])


def prediction_numbers(logits: Tensor, targets: Tensor | None = None, most: int = 256) -> Tensor:
    r"""What a batch of predictions says about collapse, in numbers that add up over batches.

    The predicted class is the largest logit of a row, or, where a row has one logit, whether that
    is above zero. Labels are class indices (negative ones are ignored), or as many values as there
    are logits, of which the largest counts; values other than 0 and 1 are no labels. A row whose
    largest logit is not finite is left out.

    The variance is taken over the rows, column by column (divisor n - 1), and averaged over the
    columns that are finite, at most 64 of them; ``deviations`` is that mean times ``freedom``, the
    number of rows less one.

    Args:
        logits: Shape ``(n,)``, ``(n, classes)``, ``(n, classes, *)`` or ``(*, classes)``; the shape
            of `targets` decides between the last two.
        targets: Shape of `logits`, with or without the axis of classes. Others count as unknown.
        most: Rows to look at, evenly spread.

    Returns:
        `PREDICTION_FIELDS` (``predictions``, ``labels`` and ``misses``, where these differ, are
        numbers of rows, the ends are ``-lowest`` and ``highest`` class, ``-inf`` where there is
        none), then how often each class was predicted, modulo 64. Shape ``(10 + 64,)``.
    """
    x, labels = prediction_rows(logits.detach(), targets, most)
    if x.numel() == 0:
        return no_predictions(like=x)
    if x.shape[1] == 1:
        best, classes = x[:, 0], (x[:, 0] > 0).long()
    else:
        best, classes = x.max(1)
    valid = best.isfinite()
    spread = _deviations(x)
    found = _Labels(torch.zeros_like(classes), torch.zeros_like(valid), torch.zeros_like(valid))
    if labels is not None:
        found = _labels(labels, x.shape[1])
        valid = valid & ~found.ignored
    known = valid & ~found.odd if labels is not None else torch.zeros_like(valid)
    missed = known & (classes != found.classes)
    bins = torch.arange(BINS, device=x.device)
    counts = ((classes % BINS).unsqueeze(1) == bins) & valid.unsqueeze(1)
    sums = torch.stack([valid.sum(), (found.odd & valid).sum(), known.sum(), missed.sum()])
    ends = torch.stack([*_ends(classes, valid), *_ends(found.classes, known)])
    return torch.cat([spread, sums.to(spread), ends.to(spread), counts.sum(0).to(spread)])


def no_predictions(like: Tensor) -> Tensor:
    """The numbers of no predictions at all, which change nothing when they are merged.

    Args:
        like: Tensor that gives the device.

    Returns:
        Shape ``(10 + 64,)``.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    nothing = torch.zeros(_ENDS + BINS, dtype=wide, device=like.device)
    return torch.cat([nothing[:_SUMS], nothing[_SUMS:_ENDS] - torch.inf, nothing[_ENDS:]])


def merge_predictions(table: Tensor) -> Tensor:
    """The numbers of several batches, or ranks, taken together.

    Args:
        table: One row each, shape ``(m, 10 + 64)``, see `prediction_numbers`.

    Returns:
        Shape ``(10 + 64,)``.
    """
    sums, ends, counts = table[:, :_SUMS], table[:, _SUMS:_ENDS], table[:, _ENDS:]
    return torch.cat([sums.sum(0), ends.amax(0), counts.sum(0)])


def step_numbers(
    squares: Tensor,
    scale: Tensor,
    losses: Sequence[Tensor],
    predictions: Sequence[Tensor],
    *,
    divided_by: float = 1,
) -> Tensor:
    """All numbers of one step on one rank, in one vector whose size the parameters alone decide.

    Args:
        squares: Of ``n`` parameters, see `gradient_squares`.
        scale: What the loss was multiplied by, shape ``()``.
        losses: Loss of each micro-batch; a loss that is no single number is averaged.
        predictions: Numbers of each micro-batch, see `prediction_numbers`.
        divided_by: What the losses were divided by.

    Returns:
        Shape ``(3 + 10 + 64 + n,)``.
    """
    home = squares.device
    total = squares.new_zeros(2)
    if losses:
        each = torch.stack([_wide(_at(home, loss.detach())).mean() for loss in losses])
        total = torch.stack([each.sum() * divided_by, total.new_full((), len(losses))])
    batches = [_at(home, numbers) for numbers in predictions]
    merged = merge_predictions(torch.stack(batches)) if batches else no_predictions(like=squares)
    return torch.cat([scale.reshape(1).to(squares), total, merged, squares])


def merge_steps(values: Tensor) -> Tensor:
    """The numbers of all ranks as those of one step.

    Args:
        values: One row a rank, shape ``(ranks, 3 + 10 + 64 + n)``, see `step_numbers`. Squares of
            shards add up; a parameter has a gradient if any rank has a part of it.

    Returns:
        `STEP_FIELDS` (``loss`` is the mean of all ``losses``, over micro-batches and ranks), then
        the counts of classes; shape ``(18 + 64,)``.
    """
    width = 3 + _ENDS + BINS
    scale, (total, count) = values[0, 0], values[:, 1:3].sum(0).unbind()
    squares = values[:, width:]
    # a comparison with NaN is false: it is no missing gradient
    present = ~(squares < 0).all(0)
    norms = squares.clamp(min=0).sum(0)
    # a sum of finite parts is finite
    largest = torch.finfo(norms.dtype).max
    norms = torch.where(squares.isinf().any(0), norms, norms.clamp(max=largest))
    norms = torch.where(present, norms, 0)
    total_sq = norms.sum()
    capped = total_sq.clamp(max=largest)
    numbers = [
        torch.where(norms.isinf().any(), total_sq, capped),
        present.sum(),
        (present & (norms == 0)).sum(),
        norms.isnan().sum(),
        norms.isinf().sum(),
        scale,
        count,
        total / count,
    ]
    together = torch.stack([number.to(values) for number in numbers])
    return torch.cat([together, merge_predictions(values[:, 3:width])])


# ---- rows of predictions ----


class _Labels(NamedTuple):
    classes: Tensor
    ignored: Tensor
    odd: Tensor


def _labels(labels: Tensor, width: int) -> _Labels:
    """The class of each row, whether it is to be ignored, and whether it is no class at all."""
    no = torch.zeros(labels.shape[0], dtype=torch.bool, device=labels.device)
    if labels.dim() == 2:
        odd = ((labels != 0) & (labels != 1)).any(1)
        return _Labels(labels.to(torch.float32).argmax(1), no, odd)
    if labels.is_floating_point():
        odd = (labels != 0) & (labels != 1)
        return _Labels((labels > 0).long(), no, odd)
    if width == 1:
        return _Labels((labels > 0).long(), labels == IGNORED, no)
    return _Labels(labels.long(), labels < 0, no)


def _ends(classes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    numbers = classes.to(torch.float32)
    low = torch.where(valid, -numbers, -torch.inf).amax()
    return low, torch.where(valid, numbers, -torch.inf).amax()


def prediction_columns(x: Tensor) -> Tensor:
    """At most 64 columns of `x`, shape ``(n, classes)``, evenly spread, in double precision."""
    width = x.shape[1]
    return _wide(x if width <= _COLUMNS else x[:, :: math.ceil(width / _COLUMNS)])


def _deviations(x: Tensor) -> Tensor:
    """Mean variance of the columns times the degrees of freedom, and these; shape ``(2,)``."""
    freedom = x.shape[0] - 1
    wide = prediction_columns(x)
    if freedom == 0:
        return wide.new_zeros(2)
    variance = wide.var(0)
    mean = torch.where(variance.isfinite(), variance, torch.nan).nanmean()
    found = torch.stack([mean * freedom, mean.new_full((), freedom)])
    return torch.where(mean.isfinite(), found, 0)


def prediction_rows(
    logits: Tensor, targets: Tensor | None, most: int
) -> tuple[Tensor, Tensor | None]:
    """Logits ``(n, classes)`` and labels ``(n,)`` or ``(n, classes)`` of at most so many rows."""
    x = logits if logits.is_floating_point() else logits.to(torch.float32)
    t = None if targets is None else _at(x.device, targets.detach())
    if x.dim() <= 1:
        x = x.reshape(-1, 1)
        t = t.reshape(-1) if t is not None and t.numel() == x.shape[0] else None
    elif t is None:
        x = x.movedim(1, -1) if x.dim() > 3 else x
    elif t.shape == x.shape:
        x, t = x.movedim(1, -1), t.movedim(1, -1)
    elif t.shape == x.shape[:1] + x.shape[2:]:
        x = x.movedim(1, -1) if x.dim() > 2 else x
    elif t.shape != x.shape[:-1]:
        t = None
    places = math.prod(x.shape[:-1])
    while places > most:
        widest = max(range(x.dim() - 1), key=lambda axis: x.shape[axis])
        stride = min(x.shape[widest], math.ceil(places / most))
        every = (slice(None),) * widest + (slice(None, None, stride),)
        x, t = x[every], None if t is None else t[every]
        places = math.prod(x.shape[:-1])
    width = x.shape[-1]
    x = x if x.dim() == 2 else x.reshape(places, width)
    if t is None or t.dim() == 1:
        return x, t
    return x, t.reshape(places, width) if t.numel() != places else t.reshape(places)


# ---- small things ----


def _squares(found: list[Tensor]) -> Tensor:
    devices = {x.device for x in found}
    if len(devices) > 1:
        return gathered([_squares([x]) for x in found]).reshape(-1)
    (device,) = devices
    # a CPU takes nine times as long for double precision as for single, a GPU reads memory only
    single = device.type in ("cpu", "mps") and all(x.dtype != torch.float64 for x in found)
    kind = torch.float32 if single else torch.float64
    norms = torch.stack(torch._foreach_norm(found, 2, dtype=kind))
    if not single and all(x.dtype != torch.float64 for x in found):
        return norms.square()
    # squares of the same precision as the elements may be too large where no element is
    sums = torch.stack([x.sum(dtype=kind) for x in found])
    squares = norms.to(torch.float32 if device.type == "mps" else torch.float64).square()
    return torch.where(squares.isinf() & sums.isfinite(), torch.finfo(kind).max, squares)


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_complex()


def _stored(x: Tensor) -> Tensor:
    x = x.detach()
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _at(home: torch.device, x: Tensor) -> Tensor:
    return x if x.device == home else x.to(home)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()
