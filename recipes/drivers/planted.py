"""Series with planted drivers: which body moves which target, by how much and when, is known."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recipes.drivers.series import Array, Series

__all__ = ["BODIES", "TARGETS", "Edges", "planted_series", "planted_signal"]

BODIES = 13
TARGETS = 4
DRIVERS = 3
_LAGS = (24, 48)
_PERIODS = (18.0, 240.0)
_WEIGHTS = (0.6, 0.3, 0.1)
_MEMORY = 24.0
_SPREAD = 0.63
_NOISE = 0.3


@dataclass(frozen=True)
class Edges:
    """The drivers of each target, the main one first; each field has shape ``(targets, 3)``.

    Attributes:
        body: Index of the body.
        lag: Hours from the body to the target.
        sign: 1 or -1.
    """

    body: npt.NDArray[np.int64]
    lag: npt.NDArray[np.int64]
    sign: Array


def planted_series(hours: int = 6000, seed: int = 0) -> tuple[Series, Edges, Array]:
    r"""Bodies that swing and wander, and targets that follow three of them each.

    .. math::
        x_b(t) = \sin(2 \pi t / P_b + \phi_b) + \sqrt{.5}\, u_b(t), \qquad
        y_m(t) = \sum_{k=1}^3 s_{mk} \sqrt{w_k} \tanh(x_{S_{mk}}(t - l_{mk})) / .63 + .3\, \epsilon

    where the periods :math:`P_b` run geometrically from 18 to 240 hours, :math:`u_b` is
    autoregressive of unit variance with a memory of 24 hours, w = (.6, .3, .1), and lags are drawn
    from 24 to 48 hours. A horizon of 24 hours therefore needs nothing of the bodies that is not
    observed yet, and :math:`u_b` keeps the history of a target from being enough.

    Args:
        hours: Length.
        seed: Of the generator; nothing else is random.

    Returns:
        The series, the planted edges, and the targets without their noise, ``(hours, targets)``.
    """
    generator = np.random.default_rng(seed)
    edges = _edges(generator)
    before = _LAGS[1]
    x = _bodies(generator, hours + before, before)
    signal = planted_signal(x, edges)
    y = signal + _NOISE * generator.standard_normal(signal.shape)
    series = Series(
        drivers=x[before:, :, None],
        targets=y,
        driver_names=tuple(f"body_{b}" for b in range(BODIES)),
        target_names=tuple(f"target_{m}" for m in range(TARGETS)),
    )
    return series, edges, signal


def planted_signal(x: Array, edges: Edges) -> Array:
    """What the bodies make of the targets, without noise.

    Args:
        x: The bodies, with 48 hours before the first of the targets, ``(48 + hours, bodies)``.
        edges: The planted edges.

    Returns:
        Shape ``(hours, targets)``.
    """
    before = _LAGS[1]
    hours = len(x) - before
    signal = np.zeros((hours, len(edges.body)))
    for m, k in np.ndindex(*edges.body.shape):
        begin = before - edges.lag[m, k]
        moved = np.tanh(x[begin : begin + hours, edges.body[m, k]]) / _SPREAD
        signal[:, m] += edges.sign[m, k] * np.sqrt(_WEIGHTS[k]) * moved
    return signal


def _edges(generator: np.random.Generator) -> Edges:
    body = np.stack([generator.choice(BODIES, DRIVERS, replace=False) for _ in range(TARGETS)])
    lag = generator.integers(_LAGS[0], _LAGS[1], size=body.shape, endpoint=True)
    sign = generator.choice([-1.0, 1.0], size=body.shape)
    return Edges(body, lag, sign)


def _bodies(generator: np.random.Generator, hours: int, before: int) -> Array:
    periods = np.geomspace(*_PERIODS, BODIES)
    phase = generator.uniform(0, 2 * np.pi, BODIES)
    a = np.exp(-1 / _MEMORY)
    u = generator.standard_normal((hours, BODIES))
    u[1:] *= np.sqrt(1 - a**2)
    for t in range(1, hours):
        u[t] += a * u[t - 1]
    times = np.arange(-before, hours - before)[:, None]
    swing: Array = np.sin(2 * np.pi * times / periods + phase) + np.sqrt(0.5) * u
    return swing
