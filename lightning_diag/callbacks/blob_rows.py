"""From the summary of a sample of weight pairs to the rows that are written."""

from lightning_diag.callbacks.base import Row
from lightning_diag.functional.blob_metrics import BlobSettings, BlobSummary

__all__ = ["SEED_KEYS", "blob_row", "point_row"]

SEED_KEYS = (
    *("weight_correlation", "encoder_std", "decoder_std", "encoder_mean", "decoder_mean"),
    *("n_clusters_dbscan", "silhouette_score", "cluster_centers", "n_noise_points"),
    *("computation_time_ms", "n_pairs_analyzed"),
)
"""What an epoch's ``diagnostics`` in results.json hold."""

_LARGEST = 10


def blob_row(
    name: str,
    sides: tuple[str, str, int],
    summary: BlobSummary,
    settings: BlobSettings,
    milliseconds: float,
) -> Row:
    """The row of one pair of weights.

    Args:
        name: What the pair is called.
        sides: Names of the encoder and the decoder weight, and how many pairs they make.
        summary: Of the sample.
        settings: How it was clustered.
        milliseconds: What the measurement took.
    """
    pairs = summary.pairs
    return {
        "component": name,
        "encoder": sides[0],
        "decoder": sides[1],
        "weight_correlation": summary.correlation,
        "encoder_std": summary.encoder_std,
        "decoder_std": summary.decoder_std,
        "encoder_mean": summary.encoder_mean,
        "decoder_mean": summary.decoder_mean,
        "n_clusters_dbscan": summary.clusters,
        "silhouette_score": summary.silhouette,
        "cluster_centers": summary.centers,
        "cluster_stds": summary.stds,
        "cluster_shares": [size / pairs for size in summary.sizes[:_LARGEST]],
        "largest_share": summary.sizes[0] / pairs if summary.sizes else None,
        "n_noise_points": summary.noise,
        "noise_share": summary.noise / pairs if pairs else None,
        "computation_time_ms": milliseconds,
        "n_pairs_analyzed": pairs,
        "n_pairs": sides[2],
        "nonfinite": summary.nonfinite,
        "method": settings.method,
        "scale": settings.scale,
        "eps": settings.eps if settings.method == "dbscan" else None,
        "min_samples": settings.points(pairs),
    }


def point_row(name: str, summary: BlobSummary) -> Row:
    """Some of the pairs with their clusters, to five digits.

    Args:
        name: What the pair of weights is called.
        summary: Of a sample, of which something is shown.
    """
    encoder, decoder, cluster = zip(*summary.shown, strict=True)
    return {
        "component": name,
        "encoder": [float(f"{value:.5g}") for value in encoder],
        "decoder": [float(f"{value:.5g}") for value in decoder],
        "cluster": list(cluster),
    }
