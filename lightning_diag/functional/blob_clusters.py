"""Clusters of points in the plane: exact DBSCAN in a tenth of the time, HDBSCAN, silhouette."""

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Points = NDArray[np.float64]
    Labels = NDArray[np.int64]


SCALES = ("none", "zscore", "mad", "shorth")
_QUARTER = 0.25
_FLOOR = 0.3
_NEIGHBOURS = 10
_BRUTE_FORCE = 100_000
_CELLS = 2.0**30


def spread(points: "Points", scale: str) -> "Points":
    r"""The unit of length of each axis, in which points are clustered.

    ``none``: 1. ``zscore``: the standard deviation. ``mad``: :math:`1.4826\,\mathrm{MAD}`.
    ``shorth``: the shortest interval that holds a quarter of the values, over the length it has
    for a normal distribution of deviation 1 (0.637), at least 0.3 of the standard deviation.

    The last is for blobs: rare ones far away do not stretch it, as they do the standard deviation,
    and with several of equal size it is the width of one, where the MAD is the distance between
    them. The floor keeps it from shrinking to a spike of (nearly) equal values.

    Args:
        points: Finite, shape ``(n, 2)``.
        scale: One of `SCALES`.

    Returns:
        Shape ``(2,)``, positive: 1 where all values of an axis are equal.

    Raises:
        ValueError: `scale` is unknown.

    References:
        P. J. Rousseeuw and A. M. Leroy, 1988, A robust scale estimator based on the shortest half,
        https://doi.org/10.1111/j.1467-9574.1988.tb01224.x (here of a quarter).
    """
    import numpy as np

    if scale not in SCALES:
        raise ValueError(f"`scale` must be one of {', '.join(SCALES)}, got {scale!r}.")
    ones = np.ones(points.shape[1])
    if scale == "none" or not len(points):
        return ones
    std: Points = np.std(points, 0)
    width = std
    if scale == "mad":
        width = 1.482602 * np.median(np.abs(points - np.median(points, 0)), 0)
    elif scale == "shorth":
        ordered = np.sort(points, 0)
        held = int(np.ceil(_QUARTER * len(points)))
        shortest = (ordered[held - 1 :] - ordered[: len(points) - held + 1]).min(0)
        normal = 2 * NormalDist().inv_cdf(0.5 + _QUARTER / 2)
        width = np.maximum(shortest / normal, _FLOOR * std)
    # rounding leaves a deviation of its own to values that are all equal
    alike = np.ptp(points, 0) <= 1e-12 * np.abs(points).max(0)
    width = np.where(width > 0, width, std)
    return np.where(alike | (width <= 0), ones, width)


def cluster_labels(points: "Points", method: str, eps: float, min_samples: int) -> "Labels":
    """Number of each point's cluster, the largest 0, and -1 for noise.

    Args:
        points: Finite and scaled, shape ``(n, 2)``.
        method: ``"dbscan"`` or ``"hdbscan"``, which does not use `eps`.
        eps: Radius of a neighbourhood.
        min_samples: Points in the neighbourhood of a core point, itself among them.

    Returns:
        Shape ``(n,)``.
    """
    import numpy as np

    if method == "hdbscan":
        labels = hierarchy_labels(points, min_samples)
    else:
        labels = density_labels(points, eps, min_samples)
    if labels.max(initial=-1) < 0:
        return labels
    sizes = np.bincount(labels[labels >= 0])
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(labels >= 0, rank[labels], -1)


def hierarchy_labels(points: "Points", min_samples: int) -> "Labels":
    """HDBSCAN with clusters of at least `min_samples` points; a single cluster is an answer too.

    Args:
        points: Shape ``(n, 2)``.
        min_samples: Size of the smallest cluster; half of it estimates density.

    Returns:
        Shape ``(n,)``, -1 for noise.

    References:
        R. Campello, D. Moulavi and J. Sander, 2013, Density-Based Clustering Based on Hierarchical
        Density Estimates, https://doi.org/10.1007/978-3-642-37456-2_14
    """
    import numpy as np
    from sklearn.cluster import HDBSCAN

    least = max(2, min_samples)
    if len(points) < least:
        return np.full(len(points), -1)
    if not np.ptp(points, 0).any():
        # sklearn's tree has no height then
        return np.zeros(len(points), dtype=np.int64)
    density = max(1, min(least // 2, len(points)))
    model = HDBSCAN(
        min_cluster_size=least, min_samples=density, allow_single_cluster=True, copy=True
    )
    return np.asarray(model.fit(points).labels_, dtype=np.int64)


def density_labels(points: "Points", eps: float, min_samples: int) -> "Labels":
    """DBSCAN of points in the plane, exact, without listing all neighbours.

    A point is a core point if `min_samples` points, itself among them, lie within `eps`; core
    points within `eps` of one another share a cluster; another point belongs to the cluster of
    its nearest core point within `eps`, and is noise if there is none.

    Neighbourhoods of a blob that holds nearly everything have thousands of members, and listing
    them is what makes the textbook algorithm slow. Here a grid of cells with diagonal `eps` says
    what is obvious (a full cell has only core points, and they share a cluster), a few nearest
    neighbours of each point say nearly all of the rest, and what is still apart is compared.

    Args:
        points: Finite, shape ``(n, 2)``.
        eps: Radius, above 0.
        min_samples: 1 or more.

    Returns:
        Shape ``(n,)``, -1 for noise.

    References:
        M. Ester, H.-P. Kriegel, J. Sander and X. Xu, 1996, A Density-Based Algorithm for
        Discovering Clusters, https://dl.acm.org/doi/10.5555/3001460.3001507. The grid is that of
        A. Gunawan, 2013, A faster algorithm for DBSCAN.
    """
    import numpy as np
    from sklearn.neighbors import KDTree

    count = len(points)
    labels = np.full(count, -1)
    if count < min_samples:
        return labels
    tree = KDTree(points)
    cell, crowd = _cells(points, eps)
    near = min(min_samples, _NEIGHBOURS)
    distance, neighbour = tree.query(points, k=near)
    is_core = (crowd >= min_samples) | (distance[:, -1] <= eps)
    if near < min_samples:
        doubtful = np.flatnonzero(is_core & (crowd < min_samples))
        if len(doubtful):
            around = tree.query_radius(points[doubtful], eps, count_only=True)
            is_core[doubtful] = around >= min_samples
    core = np.flatnonzero(is_core)
    if not len(core):
        return labels
    labels[core] = _joined(points, core, cell[core], neighbour[core], distance[core], eps)
    rest = np.flatnonzero(~is_core)
    if len(rest):
        distance, nearest = KDTree(points[core]).query(points[rest], k=1)
        labels[rest] = np.where(distance[:, 0] <= eps, labels[core[nearest[:, 0]]], -1)
    return labels


def _cells(points: "Points", eps: float) -> "tuple[Labels, Labels]":
    """Number of each point's cell, whose diagonal is just below `eps`, and points in that cell."""
    import numpy as np

    side = eps / 2**0.5 * (1 - 1e-9)
    low = points.min(0)
    extent = (points.max(0) - low) / side
    if not (extent < _CELLS).all():
        return np.arange(len(points)), np.ones(len(points), dtype=np.int64)
    place = ((points - low) / side).astype(np.int64)
    code = place[:, 0] * (int(extent[1]) + 2) + place[:, 1]
    _, cell, sizes = np.unique(code, return_inverse=True, return_counts=True)
    return cell, sizes[cell]


def _joined(
    points: "Points",
    core: "Labels",
    cell: "Labels",
    neighbour: "Labels",
    distance: "Points",
    eps: float,
) -> "Labels":
    """Cluster of each core point."""
    import numpy as np

    count = len(core)
    own = np.arange(count)
    place = np.full(len(points), -1)
    place[core] = own
    first = np.full(len(points), -1)
    first[cell] = own
    start, end = np.repeat(own, neighbour.shape[1]), place[neighbour.ravel()]
    close = (end >= 0) & (distance.ravel() <= eps)
    group = _components(count, np.append(start[close], own), np.append(end[close], first[cell]))
    names, group = np.unique(group, return_inverse=True)
    one, other = _touching(points[core], group, eps)
    if len(one):
        _, group = np.unique(_components(len(names), one, other)[group], return_inverse=True)
    return group


def _components(count: int, start: "Labels", end: "Labels") -> "Labels":
    """Smallest node that each of `count` nodes is connected to."""
    import numpy as np

    label = np.arange(count)
    while True:
        before, label = label, label.copy()
        least = np.minimum(before[start], before[end])
        for target in (start, end, before[start], before[end]):
            np.minimum.at(label, target, least)
        label = label[label]
        if (label == before).all():
            return label


def _touching(points: "Points", group: "Labels", eps: float) -> "tuple[Labels, Labels]":
    """Pairs of groups with points within `eps` of one another."""
    import numpy as np
    from sklearn.neighbors import KDTree

    left = np.arange(len(points))
    pairs: list[Any] = [np.empty((2, 0), dtype=np.int64)]
    while True:
        names, sizes = np.unique(group[left], return_counts=True)
        if len(names) < 2:
            break
        largest = names[sizes.argmax()]
        inside = group[left] == largest
        rest = left[~inside]
        if len(rest) * len(left) <= _BRUTE_FORCE:
            x, y = ((points[rest, None, axis] - points[left, axis]) / eps for axis in range(2))
            with np.errstate(over="ignore"):
                one, other = np.nonzero(x * x + y * y <= 1)
            pairs.append(np.stack([group[rest[one]], group[left[other]]]))
            break
        distance, _ = KDTree(points[left[inside]]).query(points[rest], k=1)
        touched = np.unique(group[rest[distance[:, 0] <= eps]])
        pairs.append(np.stack([touched, np.full(len(touched), largest)]))
        left = rest
    one, other = np.concatenate(pairs, 1)
    return one, other


def silhouette(points: "Points", labels: "Labels", limit: int = 600) -> float | None:
    r"""Mean silhouette :math:`(b - a) / \max(a, b)` of the clustered points.

    :math:`a` is the mean distance of a point to the others of its cluster and :math:`b` that to
    the nearest other cluster; a point that is alone has 0. It is estimated from `limit` points: of
    each cluster the same number, as far as it has so many, so that rare clusters are not left to
    chance; clusters then count by their size.

    Args:
        points: In the order of a random sample, shape ``(n, 2)``.
        labels: Shape ``(n,)``; points with -1 are left out.
        limit: Most points to compare.

    Returns:
        -1 to 1, or None where there are fewer than two clusters.

    References:
        P. J. Rousseeuw, 1987, Silhouettes, https://doi.org/10.1016/0377-0427(87)90125-7
    """
    import numpy as np

    names, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if len(names) < 2:
        return None
    share = _shares(sizes, limit)
    chosen = even_choice(labels, limit, names)
    x, y = points[chosen].T
    across, up = x[:, None] - x, y[:, None] - y
    apart = np.sqrt(across * across + up * up)
    starts = np.concatenate([[0], np.cumsum(share)[:-1]])
    sums = np.add.reduceat(apart, starts, axis=1)
    own = np.repeat(np.arange(len(names)), share)
    here = np.arange(len(chosen))
    a = sums[here, own] / np.maximum(share[own] - 1, 1)
    sums /= share
    sums[here, own] = np.inf
    b = sums.min(1)
    larger = np.maximum(a, b)
    value = np.where((share[own] > 1) & (larger > 0), (b - a) / np.where(larger > 0, larger, 1), 0)
    return float(np.average(np.add.reduceat(value, starts) / share, weights=sizes))


def even_choice(labels: "Labels", limit: int, names: "Labels | None" = None) -> "Labels":
    """Indices of the first points of each cluster: the same number of all that have so many.

    Args:
        labels: Cluster of each point.
        limit: About how many to choose; each cluster has two, or all of its points.
        names: The clusters to choose from, by default all that occur.

    Returns:
        The indices, cluster by cluster.
    """
    import numpy as np

    names = np.unique(labels) if names is None else names
    order = [np.flatnonzero(labels == name) for name in names]
    share = _shares(np.array([len(places) for places in order], dtype=np.int64), limit)
    chosen = [places[:most] for places, most in zip(order, share, strict=True)]
    return np.concatenate([np.empty(0, dtype=np.int64), *chosen])


def _shares(sizes: "Labels", limit: int) -> "Labels":
    """How many points of each cluster, `limit` in all unless there are very many clusters."""
    import numpy as np

    share = np.zeros_like(sizes)
    for place, index in enumerate(np.argsort(sizes)):
        left = (limit - share.sum()) // (len(sizes) - place)
        share[index] = min(sizes[index], max(2, left))
    return share
