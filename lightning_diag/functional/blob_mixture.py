"""Gaussian mixtures of weight pairs, chosen by BIC, and how Gaussian a blob is."""

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

__all__ = ["GaussianHealth", "Mixture", "gaussian_health", "gaussian_mixture"]

_LEAST = 8
_TAILS = (6.0, 10.0, 14.0)
_PROJECTIONS = 20
_GRADES = (("excellent", 0.03, 0.015, 0.5), ("good", 0.05, 0.025, 1.0), ("moderate", 0.1, 0.05, 2))


class Mixture(NamedTuple):
    """The Gaussian mixture with the lowest BIC.

    Attributes:
        components: Its number of components.
        bic: The criterion of the best fit with 1, 2, ... components.
        weights: Share of each component, largest first.
        means: Centres, in the units of the points, shape ``(components, 2)``.
        covariances: Shape ``(components, 2, 2)``.
    """

    components: int
    bic: list[float]
    weights: list[float]
    means: list[list[float]]
    covariances: list[list[list[float]]]


class GaussianHealth(NamedTuple):
    r"""How far a cloud of points is from the Gaussian with its mean and covariance.

    With :math:`y` the whitened points, :math:`\|y\|^2` of a Gaussian is :math:`\chi^2_2`.

    Attributes:
        points: How many.
        mean: Centre, shape ``(2,)``.
        covariance: Shape ``(2, 2)``.
        radial_ks: Largest distance between the distribution of :math:`\|y\|^2` and
            :math:`1 - e^{-r^2/2}` (Kolmogorov-Smirnov).
        tails: Points with :math:`\|y\|^2` above 6, 10 and 14, over the number expected: 1 for a
            Gaussian.
        direction: Length of the mean unit vector (Rayleigh's R): 0 where no direction prevails.
        anderson_darling: Mean Anderson-Darling statistic of 20 projections.
        mardia: :math:`|E\|y\|^4 - 8|`, Mardia's excess kurtosis.
        grade: ``excellent``, ``good``, ``moderate`` or ``poor``. Small clouds differ by chance
            alone: the first distance is about :math:`0.8/\sqrt{n}` for a true Gaussian.
    """

    points: int
    mean: list[float]
    covariance: list[list[float]]
    radial_ks: float
    tails: list[float]
    direction: float
    anderson_darling: float
    mardia: float
    grade: str


def gaussian_mixture(
    points: "Values", most: int = 5, seed: int = 0, labels: "Values | None" = None
) -> Mixture | None:
    r"""The Gaussian mixture of 1 to `most` components with the lowest BIC.

    :math:`\mathrm{BIC} = k \ln n - 2 \ln L`. Each number of components is fitted from random
    beginnings and, where it is that of the clusters, from their centres too, since a beginning
    by chance seldom meets a rare blob.

    Args:
        points: Finite, shape ``(n, 2)``.
        most: Largest number of components.
        seed: Of the beginnings; no global generator is used.
        labels: Cluster of each point, -1 for none.

    Returns:
        The best mixture, or None with fewer than 8 points or an axis without spread.

    References:
        G. Schwarz, 1978, Estimating the Dimension of a Model,
        https://doi.org/10.1214/aos/1176344136
    """
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    middle, unit = points.mean(0, keepdims=True), points.std(0, keepdims=True)
    if len(points) < _LEAST or not (unit > 1e-12 * np.abs(points).max(0)).all():
        return None
    scaled = (points - middle) / unit
    names = [] if labels is None else np.unique(labels[labels >= 0]).tolist()
    centers = [scaled[labels == name].mean(0) for name in names]
    criteria: list[float] = []
    best: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for number in range(1, min(most, len(points) // 2) + 1):
            fits = [GaussianMixture(number, n_init=2, init_params="k-means++", random_state=seed)]
            if number == len(centers):
                fits.append(GaussianMixture(number, means_init=centers, random_state=seed))
            fitted = [fit.fit(scaled) for fit in fits]
            criterion, model = min(
                ((float(fit.bic(scaled)), fit) for fit in fitted), key=lambda pair: pair[0]
            )
            # the density per unit of the points themselves
            criteria.append(criterion + 2 * len(points) * float(np.log(unit).sum()))
            if criteria[-1] <= min(criteria):
                best = model
    order = np.argsort(-best.weights_)
    return Mixture(
        components=len(order),
        bic=criteria,
        weights=best.weights_[order].tolist(),
        means=(best.means_[order] * unit + middle).tolist(),
        covariances=(best.covariances_[order] * (unit.T @ unit)).tolist(),
    )


def gaussian_health(points: "Values", limit: int = 20_000) -> GaussianHealth | None:
    """How far a cloud of points is from a Gaussian.

    Args:
        points: Finite, in random order, shape ``(n, 2)``.
        limit: Points that the Anderson-Darling statistic looks at.

    Returns:
        The distances, or None with fewer than 8 points or points on a line.

    References:
        K. V. Mardia, 1970, Measures of multivariate skewness and kurtosis,
        https://doi.org/10.1093/biomet/57.3.519; T. W. Anderson and D. A. Darling, 1954, A test of
        goodness of fit, https://doi.org/10.1080/01621459.1954.10501232
    """
    import numpy as np

    unit = points.std(0) if len(points) >= _LEAST else np.zeros(2)
    if not (unit > 0).all():
        return None
    scaled = (points - points.mean(0)) / unit
    scaled = scaled - scaled.mean(0)
    correlation = scaled.T @ scaled / len(scaled)
    values, axes = np.linalg.eigh(correlation)
    if values[0] <= 1e-12:
        return None
    y = scaled @ (axes / np.sqrt(values)) @ axes.T
    squares = (y * y).sum(1)
    expected = -np.expm1(-np.sort(squares) / 2)
    steps = np.arange(len(y) + 1) / len(y)
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    length = np.sqrt(squares)
    direction = float(np.hypot(*(y[length > 0] / length[length > 0, None]).sum(0)) / len(y))
    angles = np.arange(_PROJECTIONS) * math.pi / _PROJECTIONS
    rays = np.stack([np.cos(angles), np.sin(angles)])
    normality = _anderson_darling(y[:limit] @ rays)
    return GaussianHealth(
        points=len(points),
        mean=points.mean(0).tolist(),
        covariance=(correlation * np.outer(unit, unit)).tolist(),
        radial_ks=float(distance),
        tails=[float((squares > tail).mean() / math.exp(-tail / 2)) for tail in _TAILS],
        direction=direction,
        anderson_darling=normality,
        mardia=float(abs((squares * squares).mean() - 8)),
        grade=_grade(float(distance), direction, normality),
    )


def _anderson_darling(values: "Values") -> float:
    """Mean over columns of the statistic of each against the normal with its moments."""
    import numpy as np

    ordered = torch.from_numpy(np.sort((values - values.mean(0)) / values.std(0, ddof=1), 0))
    count = len(values)
    weights = torch.arange(1, 2 * count, 2, dtype=torch.float64).unsqueeze(1) / count
    below, above = torch.special.log_ndtr(ordered), torch.special.log_ndtr(-ordered.flip(0))
    statistics: Values = (-count - (weights * (below + above)).sum(0)).numpy()
    return float(statistics.mean())


def _grade(distance: float, direction: float, normality: float) -> str:
    for name, *limits in _GRADES:
        found = (distance, direction, normality)
        if all(value < limit for value, limit in zip(found, limits, strict=True)):
            return str(name)
    return "poor"
