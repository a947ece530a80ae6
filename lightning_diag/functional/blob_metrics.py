"""Do weight pairs form blobs? The functions of the diagnostic, in one place."""

from lightning_diag.functional.blob_analysis import BlobAnalysis, full_analysis
from lightning_diag.functional.blob_clusters import (
    cluster_labels,
    density_labels,
    silhouette,
    spread,
)
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
    adaptive_sample_size,
    blob_metrics,
    blob_settings,
    blob_summaries,
    sample_pairs,
)

__all__ = [
    "PRESETS",
    "BlobAnalysis",
    "BlobSettings",
    "BlobSummary",
    "GaussianHealth",
    "Mixture",
    "adaptive_sample_size",
    "blob_metrics",
    "blob_settings",
    "blob_summaries",
    "cluster_labels",
    "density_labels",
    "full_analysis",
    "gaussian_health",
    "gaussian_mixture",
    "sample_pairs",
    "silhouette",
    "spread",
]
