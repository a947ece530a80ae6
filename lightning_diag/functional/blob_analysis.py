"""All weight pairs of a model at leisure, after training."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.blob_mixture import (
    GaussianHealth,
    Mixture,
    gaussian_health,
    gaussian_mixture,
)
from lightning_diag.functional.blob_summary import (
    PRESETS,
    BlobSettings,
    BlobSummary,
    blob_metrics,
    sample_pairs,
)

__all__ = ["BlobAnalysis", "full_analysis"]

_LARGEST = 10


class BlobAnalysis(NamedTuple):
    """What all pairs of two weights say.

    Attributes:
        summary: As of a sample, but of all pairs.
        mixture: The Gaussian mixture with the lowest BIC; None where there is none.
        health: How Gaussian each of the ten largest clusters is, in their order; None for one
            that is too small or flat.
    """

    summary: BlobSummary
    mixture: Mixture | None
    health: list[GaussianHealth | None]


def full_analysis(
    weights: Mapping[str, tuple[Tensor, Tensor]],
    settings: BlobSettings = PRESETS["robust"],
    *,
    max_components: int = 5,
    mixture_points: int = 20_000,
    seed: int = 0,
) -> dict[str, BlobAnalysis]:
    """Clusters of all weight pairs, and Gaussian mixtures by BIC.

    Takes seconds for half a million pairs; made for the end of a training, not for its steps.

    Args:
        weights: Name to encoder ``(h, d)`` and decoder ``(d, h)``.
        settings: How to cluster.
        max_components: Largest number of Gaussians to try.
        mixture_points: Most pairs, drawn at random, that the mixtures are fitted to.
        seed: Of that draw and of the mixtures; no global generator is used.

    Returns:
        An analysis for each name.

    Raises:
        ValueError: Shapes do not fit, or a number is below 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> encoder = torch.randn(20, 30, generator=generator)
        >>> decoder = torch.randn(30, 20, generator=generator)
        >>> found = full_analysis({"net": (encoder, decoder)})["net"]
        >>> found.summary.pairs, found.summary.clusters, found.mixture.components
        (600, 1, 1)
    """
    for name, value in (("max_components", max_components), ("mixture_points", mixture_points)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return {
        name: _analysis(encoder, decoder, settings, max_components, mixture_points, seed)
        for name, (encoder, decoder) in weights.items()
    }


def _analysis(
    encoder: Tensor,
    decoder: Tensor,
    settings: BlobSettings,
    max_components: int,
    mixture_points: int,
    seed: int,
) -> BlobAnalysis:
    pairs = sample_pairs(encoder, decoder, encoder.numel()).to("cpu")
    # in random order, of which any beginning is a sample
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    summary = blob_metrics(pairs, settings)
    points, labels = pairs.double().numpy(), summary.labels.numpy()
    points, labels = points[labels > -2], labels[labels > -2]
    if not len(points):
        return BlobAnalysis(summary, None, [])
    part = slice(mixture_points)
    return BlobAnalysis(
        summary,
        gaussian_mixture(points[part], max_components, seed, labels[part]),
        [
            gaussian_health(points[labels == blob])
            for blob in range(min(summary.clusters, _LARGEST))
        ],
    )
