"""What one measurement says of a sample of weight pairs: moments, correlation, clusters."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.blob_clusters import (
    SCALES,
    cluster_labels,
    even_choice,
    silhouette,
    spread,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Labels = NDArray[np.int64]
    Values = NDArray[np.float64]

__all__ = [
    "METHODS",
    "PRESETS",
    "BlobSettings",
    "BlobSummary",
    "adaptive_sample_size",
    "blob_metrics",
    "blob_settings",
    "blob_summaries",
    "sample_pairs",
]

METHODS = ("dbscan", "hdbscan")
_LEAST_SHARED = 12
_EARLY, _LATE = 0.3, 0.8
_LEAST_EARLY = 2000
_LARGEST = 3


class BlobSettings(NamedTuple):
    """How a sample of pairs is clustered.

    Attributes:
        scale: Unit of each axis, see `spread`.
        eps: Radius of a neighbourhood, in that unit.
        min_samples: Points that make a neighbourhood dense: a whole number, or a share of the
            sample, of which at least 12 points are asked.
        method: ``"dbscan"`` or ``"hdbscan"``.
    """

    scale: str
    eps: float
    min_samples: int | float
    method: str = "dbscan"

    def points(self, count: int) -> int:
        """`min_samples` as a number of points, for a sample of `count`."""
        if isinstance(self.min_samples, int):
            return self.min_samples
        return max(_LEAST_SHARED, round(self.min_samples * count))


PRESETS: Mapping[str, BlobSettings] = MappingProxyType(
    {
        "robust": BlobSettings("shorth", 2.0, 0.0045),
        "seed": BlobSettings("none", 0.1, 50),
    }
)
"""Settings by name. ``robust`` finds three blobs of 1 % each in 5000 pairs."""


class BlobSummary(NamedTuple):
    """The blobs of a sample of weight pairs.

    Attributes:
        correlation: Pearson's correlation; None where a side has no spread.
        encoder_mean: Mean of the first of each pair; None, as the next three, without pairs.
        encoder_std: Its deviation over the whole sample.
        decoder_mean: Mean of the second of each pair.
        decoder_std: Its deviation.
        clusters: Number of clusters.
        silhouette: Mean silhouette in scaled units, None below two clusters.
        centers: Means of the three largest clusters, in units of the weights; where there is no
            cluster, the mean of all pairs.
        stds: Deviations in these clusters.
        sizes: Points of every cluster, largest first.
        noise: Points in no cluster.
        pairs: Pairs that were used.
        nonfinite: Pairs that were left out, since one of the two is ``nan`` or infinite.
        labels: Cluster of each pair of the sample, shape ``(n,)``; -1 for noise, -2 for those
            left out.
        shown: Encoder weight, decoder weight and cluster of some of the pairs, for a picture.
    """

    correlation: float | None
    encoder_mean: float | None
    encoder_std: float | None
    decoder_mean: float | None
    decoder_std: float | None
    clusters: int
    silhouette: float | None
    centers: list[list[float]]
    stds: list[list[float]]
    sizes: list[int]
    noise: int
    pairs: int
    nonfinite: int
    labels: Tensor
    shown: list[tuple[float, float, int]]


def blob_settings(
    preset: str = "robust",
    *,
    scale: str | None = None,
    eps: float | None = None,
    min_samples: int | float | None = None,
    method: str = "dbscan",
) -> BlobSettings:
    """A preset with some of its values replaced.

    Args:
        preset: ``"robust"`` or ``"seed"``, which is that of the training guide this diagnostic
            comes from: unscaled, radius 0.1, 50 points.
        scale: See `spread`; None for the preset's, as for the next two.
        eps: Radius, above 0.
        min_samples: At least 1 point, or a share between 0 and 1.
        method: ``"dbscan"`` or ``"hdbscan"``.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> blob_settings(eps=1.5)
        BlobSettings(scale='shorth', eps=1.5, min_samples=0.0045, method='dbscan')
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if scale is not None and scale not in SCALES:
        raise ValueError(f"`scale` must be one of {', '.join(SCALES)}, got {scale!r}.")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    if eps is not None and not 0 < eps < float("inf"):
        raise ValueError(f"`eps` must be above 0, got {eps}.")
    if min_samples is not None:
        _check_min_samples(min_samples)
    base = PRESETS[preset]
    return BlobSettings(
        base.scale if scale is None else scale,
        base.eps if eps is None else eps,
        base.min_samples if min_samples is None else min_samples,
        method,
    )


def _check_min_samples(value: int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`min_samples` must be a number, got {value!r}.")
    share = isinstance(value, float)
    if (share and not 0 < value < 1) or (not share and value < 1):
        raise ValueError(
            "`min_samples` must be a whole number from 1 on or a share between 0 and 1, "
            f"got {value}."
        )


def adaptive_sample_size(size: int, progress: float) -> int:
    """Pairs to sample: half in the first 30 % of training (2000 at least), double after 80 %.

    Args:
        size: The size in between.
        progress: Share of the training that is done, 0 to 1.

    Example:
        >>> [adaptive_sample_size(5000, progress) for progress in (0.1, 0.5, 0.9)]
        [2500, 5000, 10000]
    """
    if progress < _EARLY:
        return max(size // 2, _LEAST_EARLY)
    return 2 * size if progress > _LATE else size


def sample_pairs(
    encoder: Tensor, decoder: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Pairs :math:`(W_{enc}[i, j], W_{dec}[j, i])`, drawn without replacement.

    Every hidden unit i and feature j make a pair: the weight from the feature to the unit, and
    that from the unit back to the feature.

    Args:
        encoder: Weight ``(h, d)``.
        decoder: Weight ``(d, h)``, on the same device.
        count: Pairs to draw; all of them, in order, where there are no more.
        generator: Source of randomness on that device; needed unless all pairs are taken.

    Returns:
        Double precision (single where the device has no other), shape ``(n, 2)``.

    Raises:
        ValueError: The shapes do not fit, or there is no generator to draw with.
    """
    if encoder.dim() != 2 or tuple(encoder.shape) != tuple(reversed(decoder.shape)):
        raise ValueError(
            "`encoder` must be (h, d) and `decoder` (d, h), "
            f"got {tuple(encoder.shape)} and {tuple(decoder.shape)}."
        )
    encoder, decoder = encoder.detach(), decoder.detach()
    wide = torch.float32 if encoder.device.type == "mps" else torch.float64
    if count >= encoder.numel():
        return torch.stack([encoder.reshape(-1), decoder.t().reshape(-1)], 1).to(wide)
    if generator is None:
        raise ValueError("`generator` must be given to draw a sample, got None.")
    index = _distinct(encoder.numel(), count, generator)
    row, column = index // encoder.shape[1], index % encoder.shape[1]
    return torch.stack([encoder[row, column], decoder[column, row]], 1).to(wide)


def _distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total`, in random order."""
    device = generator.device
    if count * 8 > total:
        return torch.randperm(total, generator=generator, device=device)[:count]
    # enough draws that, repetitions left out, too few remain once in more than 1e9 times
    repeated = count * count / total
    drawn = count + int(2 * repeated + 8 * repeated**0.5) + 10
    index = torch.randint(total, (drawn,), generator=generator, device=device).sort().values
    key = torch.rand(drawn, generator=generator, device=device)
    key[1:] += index[1:] == index[:-1]
    return index[key.argsort()[:count]]


def blob_metrics(
    pairs: Tensor,
    settings: BlobSettings = PRESETS["robust"],
    *,
    show: int = 0,
    silhouette_points: int = 600,
) -> BlobSummary:
    """Correlation, moments and clusters of weight pairs, on the host.

    The correlation says how the two sides go together, and nothing about health: where outer blobs
    lie on a diagonal, as they do when pairs specialise, it is strongly positive.

    Args:
        pairs: A sample in random order, shape ``(n, 2)``, on the host.
        settings: How to cluster.
        show: Most pairs to give back for a picture; rare clusters are shown before the others.
        silhouette_points: Most points that the silhouette compares.

    Returns:
        The summary; without finite pairs its means, deviations and centres are empty.

    Raises:
        ValueError: `pairs` is not ``(n, 2)``.

    Example:
        >>> pairs = torch.tensor([[0.0, 0.0], [0.1, 0.1], [2.0, 2.0], [2.1, 2.1]])
        >>> found = blob_metrics(pairs, blob_settings("seed", eps=0.2, min_samples=2))
        >>> found.clusters, found.sizes, found.noise
        (2, [2, 2], 0)
    """
    (summary,) = blob_summaries(
        pairs, [len(pairs)], settings, show=show, silhouette_points=silhouette_points
    )
    return summary


def blob_summaries(
    pairs: Tensor,
    counts: Sequence[int],
    settings: BlobSettings = PRESETS["robust"],
    *,
    show: int = 0,
    silhouette_points: int = 600,
) -> list[BlobSummary]:
    """`blob_metrics` of several samples that came to the host in one tensor.

    Args:
        pairs: The samples, one after the other, shape ``(n, 2)``.
        counts: Length of each sample.
        settings: How to cluster.
        show: See `blob_metrics`.
        silhouette_points: See `blob_metrics`.

    Returns:
        A summary for each sample.

    Raises:
        ValueError: `pairs` is not ``(n, 2)``.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"`pairs` must be (n, 2), got {tuple(pairs.shape)}.")
    left: Values = pairs.detach().double().numpy()
    found = []
    for count in counts:
        found.append(_summary(left[:count], settings, show, silhouette_points))
        left = left[count:]
    return found


def _summary(
    everything: "Values", settings: BlobSettings, show: int, silhouette_points: int
) -> BlobSummary:
    import numpy as np

    finite = np.isfinite(everything).all(1)
    points = everything[finite]
    labels = np.full(len(everything), -2)
    if not len(points):
        return _empty(torch.from_numpy(labels))
    # a difference of the largest numbers would overflow
    size = float(np.abs(points).max()) or 1.0
    scaled = points / size
    unit = spread(scaled, settings.scale) if settings.scale != "none" else 1 / size
    scaled = (scaled - np.median(scaled, 0)) / unit
    labels[finite] = found = cluster_labels(
        scaled, settings.method, settings.eps, settings.points(len(points))
    )
    sizes = np.bincount(found[found >= 0]).tolist()
    blobs = [points[found == blob] for blob in range(min(len(sizes), _LARGEST))]
    (encoder_mean, encoder_std), (decoder_mean, decoder_std) = map(_moments, points.T)
    return BlobSummary(
        correlation=_correlation(points[:, 0], points[:, 1]),
        encoder_mean=encoder_mean,
        encoder_std=encoder_std,
        decoder_mean=decoder_mean,
        decoder_std=decoder_std,
        clusters=len(sizes),
        silhouette=silhouette(scaled, found, silhouette_points),
        centers=[[_moments(side)[0] for side in blob.T] for blob in blobs or [points]],
        stds=[[_moments(side)[1] for side in blob.T] for blob in blobs],
        sizes=sizes,
        noise=int((found < 0).sum()),
        pairs=len(points),
        nonfinite=int(len(labels) - len(points)),
        labels=torch.from_numpy(labels),
        shown=_shown(points, found, show),
    )


def _empty(labels: Tensor) -> BlobSummary:
    return BlobSummary(
        correlation=None,
        encoder_mean=None,
        encoder_std=None,
        decoder_mean=None,
        decoder_std=None,
        clusters=0,
        silhouette=None,
        centers=[],
        stds=[],
        sizes=[],
        noise=0,
        pairs=0,
        nonfinite=len(labels),
        labels=labels,
        shown=[],
    )


def _shown(points: "Values", labels: "Labels", limit: int) -> list[tuple[float, float, int]]:
    if not limit:
        return []
    chosen = even_choice(labels, limit)
    x, y = points[chosen].T.tolist()
    return list(zip(x, y, labels[chosen].tolist(), strict=True))


def _moments(values: "Values") -> tuple[float, float]:
    """Mean and deviation, without overflow, and 0 where all values are equal."""
    size = float(abs(values).max()) or 1.0
    unit = values / size
    spread_out = float(unit.max()) > float(unit.min())
    return size * float(unit.mean()), size * float(unit.std()) if spread_out else 0.0


def _correlation(encoder: "Values", decoder: "Values") -> float | None:
    import numpy as np

    x, y = (side / (float(abs(side).max()) or 1.0) for side in (encoder, decoder))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    # each to its own size first: the square of a tiny deviation would be 0
    x, y = x / abs(x).max(), y / abs(y).max()
    return float(np.clip((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** 0.5, -1, 1))
