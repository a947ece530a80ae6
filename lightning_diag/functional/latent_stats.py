"""Latent statistics: does a representation keep its dimensions, and its samples apart?"""

from math import gcd, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.moments import Moments, quick_moments

__all__ = [
    "COLUMNS",
    "Spectrum",
    "effective_rank",
    "gram_matrix",
    "latent_rows",
    "latent_values",
    "mean_cosine",
    "participation",
    "relative_std",
    "spectrum",
]

COLUMNS = (
    *Moments._fields,
    *("rows", "norm", "std_min", "std_mean", "mean_cosine", "dead_dimensions", "second_moment"),
)
_DEAD = 0.01
# rounding of some operations on single precision numbers, relative to their size
_ROUNDING = 1e-6


class Spectrum(NamedTuple):
    """Eigenvalues of the covariance of a representation, and what is made of them.

    Attributes:
        effective_rank: See `effective_rank`, shape ``()``.
        participation: See `participation`, shape ``()``.
        top_share: Share of the largest eigenvalue in the variance, shape ``()``.
    """

    effective_rank: Tensor
    participation: Tensor
    top_share: Tensor


def latent_rows(x: Tensor, max_rows: int, pooling: str = "none") -> Tensor:
    """A representation as a matrix with one row for each vector.

    Args:
        x: ``(batch, features)``; ``(batch, positions, features)``, of which each position is a row,
            or the mean over positions; ``(batch, channels, ...)`` with four dimensions or more,
            pooled over all that follows the channels; or ``(batch,)``, rows of one feature.
        max_rows: Most rows; of more, evenly spaced ones are taken, with a stride that has no
            divisor in common with the number of positions, so that all positions occur.
        pooling: ``"none"`` or ``"mean"``, for three dimensions.

    Returns:
        Shape ``(rows, features)``, in single precision at least.

    Raises:
        ValueError: If `pooling` is not known or `max_rows` is less than 2.

    Example:
        >>> latent_rows(torch.zeros(8, 16, 4), max_rows=50).shape
        torch.Size([50, 4])
    """
    if pooling not in ("none", "mean"):
        raise ValueError(f'`pooling` must be "none" or "mean", got {pooling!r}.')
    if max_rows < 2:
        raise ValueError(f"`max_rows` must be at least 2, got {max_rows}.")
    x = x.detach()
    if x.dim() < 2:
        x = x.reshape(-1, 1)
    positions = 1
    if x.dim() == 3 and pooling == "none":
        positions = x.shape[1]
        x = x.reshape(-1, x.shape[-1])
    # taken before it is converted or pooled
    z = _spread(x, max_rows, positions)
    z = z if z.dtype in (torch.float32, torch.float64) else z.float()
    if z.dim() == 3:
        return z.mean(1)
    return z.flatten(2).mean(2) if z.dim() > 3 else z


def latent_values(z: Tensor) -> Tensor:
    r"""All numbers of a representation but its spectrum, at once.

    With :math:`u_i = z_i / \|z_i\|`: the smallest and the mean standard deviation of a dimension of
    :math:`u` over the rows (Chen & He), which is :math:`1 / \sqrt d` where the rows point
    everywhere alike and 0 where they all point the same way; the mean cosine, see `mean_cosine`;
    and how many dimensions of :math:`z` are dead, which is to deviate by less than one hundredth of
    what the most varied tenth does. The global standard deviation sees nothing of that: around zero
    it is :math:`\|z\| / \sqrt d`, also where all rows are the same.

    Args:
        z: Shape ``(rows, features)``. Rows with an element that is not finite count in the moments
            alone (which are then ``nan``), and in their `nonfinite`.

    Returns:
        Shape ``(14,)``, the columns of `COLUMNS`: the fields of `Moments` of all elements; number
        of finite rows; mean norm; the two deviations; mean cosine; dead dimensions; mean squared
        norm. Double precision (single where the device has no double); ``nan`` where there is no
        finite row, and for the mean cosine where there is only one.

    References:
        Chen, He 2021, Exploring Simple Siamese Representation Learning, figure 2,
        https://arxiv.org/abs/2011.10566
    """
    stats, _ = quick_moments([z])
    wide = stats.sum.dtype
    stats = stats._replace(nonfinite=torch.count_nonzero(z - z).to(wide).view(1))
    z, kept = _finite_rows(z)
    rows = kept.sum()
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    units = torch.where(norms > 0, z / norms, 0)
    deviation = _column_std(units, kept, rows)
    moment = z.to(wide).square().sum() / rows
    dead = _dead_dimensions(_column_std(z, kept, rows), moment)
    here = [
        rows,
        norms.sum() / rows,
        deviation.amin(),
        deviation.mean(),
        mean_cosine(z),
        torch.where(rows > 0, dead, torch.nan),
        moment,
    ]
    return torch.cat([*stats, torch.stack([x.to(wide) for x in here])])


def mean_cosine(z: Tensor) -> Tensor:
    r"""Mean cosine between two different rows: 1 where all point the same way, 0 where at random.

    .. math:: \frac{\|\sum_i u_i\|^2 - n}{n (n - 1)}, \quad u_i = z_i / \|z_i\|

    which takes O(rows x features) instead of a comparison of all pairs.

    Args:
        z: Shape ``(rows, features)``, finite; rows of zeros have no direction and do not count.

    Returns:
        Shape ``()``; ``nan`` for less than two rows.

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor(0.3333, dtype=torch.float64)
    """
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    units = torch.where(norms > 0, z / norms, 0).to(wide)
    # what rounding leaves of their unit length
    n, own = torch.count_nonzero(norms).to(wide), units.square().sum()
    pairs = n * (n - 1)
    return torch.where(pairs > 0, (units.sum(0).square().sum() - own) / pairs, torch.nan)


def relative_std(deviation: Tensor, features: int) -> Tensor:
    r"""Mean deviation of a dimension over that of rows that point everywhere alike.

    Args:
        deviation: Mean standard deviation of a dimension of unit rows, shape ``(*)``.
        features: Number of dimensions ``d``.

    Returns:
        :math:`\sqrt d` times the deviation, shape ``(*)``: about 1 for isotropic rows, 0 for a
        collapse.
    """
    return deviation * sqrt(features)


def gram_matrix(z: Tensor, max_rows: int, positions: int = 1) -> Tensor:
    """What the spectrum of the covariance is computed from, the smaller of its two forms.

    Args:
        z: Shape ``(rows, features)``; rows that are not finite are left out.
        max_rows: Most rows; of more, evenly spaced ones are taken.
        positions: After how many rows the same position comes again, see `latent_rows`.

    Returns:
        The covariance ``(features, features)``, or the products of the centred rows
        ``(rows, rows)`` over their number, which has the same eigenvalues but for zeros. In double
        precision (single where the device has no double).
    """
    z, kept = _finite_rows(_spread(z, max_rows, positions))
    # double, which nobody's setting turns into something shorter
    z = z if z.device.type == "mps" else z.double()
    rows = kept.sum()
    c = torch.where(kept, z - z.sum(0) / rows, 0)
    product = torch.mm(c.T, c) if c.shape[0] > c.shape[1] else torch.mm(c, c.T)
    return product / rows


def spectrum(gram: Tensor, second_moment: Tensor) -> Spectrum:
    """The shape of a representation from its `gram_matrix`.

    Eigenvalues below what rounding makes of the mean squared norm count as zero: rows that are all
    the same have rank 0, and not that of their rounding errors.

    Args:
        gram: Shape ``(k, k)``.
        second_moment: Mean squared norm of the rows, shape ``()``.

    Returns:
        Numbers in double precision; ``nan`` where the matrix is not finite.
    """
    wide = gram if gram.device.type == "mps" else gram.double()
    sound = wide.isfinite().all()
    values = torch.linalg.eigvalsh(torch.where(sound, wide, 0)).clamp(min=0)
    # a variance is a square, and so is what rounding makes of it
    values = torch.where(values > _ROUNDING**2 * second_moment, values, 0)
    total = values.sum()
    share = torch.where(total > 0, values.amax() / total, torch.nan)
    found = Spectrum(effective_rank(values), participation(values), share)
    return Spectrum(*(torch.where(sound, number, torch.nan) for number in found))


def effective_rank(values: Tensor) -> Tensor:
    r"""Number of dimensions that carry the variance, :math:`\exp(-\sum_k p_k \ln p_k)`.

    With :math:`p = \lambda / \sum \lambda`: ``d`` where all directions vary alike, 1 where one
    alone does, in between otherwise.

    Args:
        values: Eigenvalues of the covariance, not negative, shape ``(k,)``.

    Returns:
        Shape ``()``; 0 where nothing varies.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0, 0.0])).round(decimals=4)
        tensor(2.)

    References:
        Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality; there of
        singular values, here of their squares.
    """
    total = values.sum()
    p = values / total
    entropy = -torch.where(p > 0, p * p.log(), 0).sum()
    return torch.where(total > 0, entropy.exp(), 0)


def participation(values: Tensor) -> Tensor:
    r"""Number of dimensions that carry the variance, :math:`(\sum \lambda)^2 / \sum \lambda^2`.

    Stricter than `effective_rank`: small eigenvalues hardly count.

    Args:
        values: Eigenvalues of the covariance, not negative, shape ``(k,)``.

    Returns:
        Shape ``()``; 0 where nothing varies.

    Example:
        >>> participation(torch.tensor([2.0, 2.0, 0.0, 0.0]))
        tensor(2.)
    """
    total = values.sum()
    p = values / total
    return torch.where(total > 0, 1 / p.square().sum(), 0)


def _spread(x: Tensor, most: int, positions: int) -> Tensor:
    """At most so many rows, evenly spaced, and not always at the same position."""
    stride = max(1, len(x) // most)
    while gcd(stride, positions) > 1:
        stride -= 1
    return x[::stride][:most]


def _finite_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with zeros in rows that are not finite, and which are, ``(rows, 1)``."""
    kept = z.isfinite().all(1, keepdim=True)
    return torch.where(kept, z, 0), kept


def _dead_dimensions(deviation: Tensor, moment: Tensor) -> Tensor:
    # not the largest, nor the mean: few dimensions may be much larger than all others
    features = len(deviation)
    usual = deviation.sort().values[int(0.9 * (features - 1))]
    rounding = _ROUNDING * (moment / features).sqrt()
    return torch.count_nonzero(deviation <= torch.maximum(_DEAD * usual, rounding.to(usual)))


def _column_std(z: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    # centred first: the difference of two large squares would leave nothing of a small deviation
    centred = torch.where(kept, z - z.sum(0) / rows, 0)
    return (centred.square().sum(0) / rows).sqrt()
