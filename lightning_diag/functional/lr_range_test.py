"""Learning rates to try, and what the losses that they gave say about the best of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Suggestion",
    "diverged",
    "learning_rates",
    "lr_suggestion",
    "smoothed_both_ways",
    "smoothed_losses",
]

_FIRST = 10  # losses that tell what loss and noise there is at the start
_SIGMAS = 6.0  # of the first losses' noise: what a flat curve may climb
_ROUNDING = 1e-4  # of a loss, that single precision and its order of operations may leave
_NORMAL = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
_CLIMB = 0.25  # falls above its start, with which a loss has left its valley
# of the pairs of a loss at the start and one around the smallest, how many must have fallen; or by
# how much noise the smoothed loss must: of 1000 curves of pure noise, normal or heavy-tailed, about
# 5 get so far
_PAIRS = 0.9
_NOISES = 4.0
# with losses that are compared batch by batch: standard errors that the fall must be, and the share
# of what batches differ by anyway; or how often that, where the fall is too narrow for errors
_ERRORS = 4.0
_SIGNS = 4.0  # the same in a sign test, which looks at many more losses
_SHARE = 0.1
_SPREADS = 2.0


class Suggestion(NamedTuple):
    """The learning rate that a range test suggests.

    Attributes:
        lr: Learning rate, to two significant digits; None where the curve supports none.
        place: Index of its point on the curve; -1 without a suggestion.
        slope: Steepest descent of the smoothed loss, in units of loss by factor ``e`` of the
            learning rate; negative where the loss falls.
        noise: Standard deviation of the losses around the smoothed ones, in units of loss.
        fall: Smoothed loss at the start less the smallest one, in units of loss.
        confidence: ``"high"`` if all ten losses around the smallest one lie below all of the first
            ten; ``"medium"`` if 90 % of these pairs do, or if the fall is four times the noise;
            else ``"none"``. With `spread`: ``"high"`` from eight, ``"medium"`` from four standard
            errors, or four in the sign test of all losses before the smallest, if the fall is a
            tenth of `spread`; ``"medium"`` too if it is twice `spread`.
        reason: Why there is no suggestion, or what limits it; empty otherwise.
    """

    lr: float | None
    place: int
    slope: float
    noise: float
    fall: float
    confidence: str
    reason: str


def learning_rates(min_lr: float, max_lr: float, num_steps: int) -> list[float]:
    """Learning rates from the smallest to the largest, each the same factor above the last.

    ``lr_i = min_lr (max_lr / min_lr)^(i / (num_steps - 1))``

    Args:
        min_lr: The first.
        max_lr: The last.
        num_steps: How many.

    Returns:
        The learning rates.

    Example:
        >>> learning_rates(1e-3, 10.0, 5)
        [0.001, 0.01, 0.1, 1.0, 10.0]
    """
    ratio = math.log(max_lr / min_lr)
    rates = [min_lr * math.exp(ratio * i / (num_steps - 1)) for i in range(num_steps)]
    return [float(f"{rate:.12g}") for rate in rates]


def smoothed_losses(losses: Tensor, beta: float = 0.9) -> Tensor:
    """Exponential moving average of losses, free of the bias towards zero at its start.

    ``s_t = (1 - beta) sum_i beta^(t-i) l_i / (1 - beta^(t+1))``, counted from 0: the first value is
    the first loss, and a constant stays the same constant.

    Args:
        losses: Shape ``(n,)``.
        beta: Weight of the past, in [0, 1).

    Returns:
        Shape ``(n,)``, in double precision.

    Example:
        >>> smoothed_losses(torch.tensor([2.0, 2.0, 4.0]), beta=0.5)
        tensor([2.0000, 2.0000, 3.1429], dtype=torch.float64)

    References:
        Kingma and Ba (2015), "Adam", https://arxiv.org/abs/1412.6980, section 3 (bias correction).
    """
    values = losses.double()
    t = torch.arange(len(values), dtype=torch.float64, device=values.device)
    age = t.unsqueeze(1) - t
    weights = torch.where(age >= 0, torch.as_tensor(beta, dtype=torch.float64) ** age.abs(), 0.0)
    return weights @ values / weights.sum(1)


def smoothed_both_ways(losses: Tensor, beta: float = 0.9) -> Tensor:
    """Average of `smoothed_losses` from either end, which lags behind neither.

    A one-sided average shows a fall ``beta / (1 - beta)`` points late, and with it the learning
    rate that caused it.

    Args:
        losses: Shape ``(n,)``.
        beta: Weight of the points before and after, in [0, 1).

    Returns:
        Shape ``(n,)``, in double precision.

    Example:
        >>> smoothed_both_ways(torch.tensor([1.0, 2.0, 3.0]), beta=0.5)
        tensor([1.2857, 2.0000, 2.7143], dtype=torch.float64)
    """
    forward = smoothed_losses(losses, beta)
    backward = smoothed_losses(losses.flip(0), beta).flip(0)
    return (forward + backward) / 2


def diverged(losses: Tensor, beta: float = 0.9, spread: float | None = None) -> bool:
    """Whether losses, with the learning rate rising under them, have left for good.

    They have if one is not finite, or if the smoothed loss has climbed above its start by as much
    as it had fallen below it, and by six standard deviations of the first losses' noise at least.
    Start and noise are medians over the first ten losses, so one noisy loss at the beginning
    decides nothing; losses may be negative.

    Args:
        losses: Shape ``(n,)``.
        beta: Weight of the past in the smoothed loss, in [0, 1).
        spread: Where losses are compared batch by batch: what batches differ by, which then stands
            for the noise; see `lr_suggestion`.

    Returns:
        True if the test should stop. False for fewer than ten finite losses.

    Example:
        >>> falling = torch.linspace(2.0, 1.0, 30)
        >>> diverged(falling), diverged(torch.cat([falling, torch.full((20,), 9.0)]))
        (False, True)
    """
    values = losses.double()
    if not bool(values.isfinite().all()):
        return True
    if len(values) < _FIRST:
        return False
    start, noise = _start(values)
    if spread is not None:
        noise = torch.maximum(noise, torch.as_tensor(spread / 2, dtype=noise.dtype))
    noise = torch.maximum(noise, _ROUNDING * start.abs())
    # one odd loss among the first would stay in the average for long
    usual = values[:_FIRST].clamp(start - _SIGMAS * noise, start + _SIGMAS * noise)
    smooth = smoothed_losses(torch.cat([usual, values[_FIRST:]]), beta)
    fall = (start - smooth[_FIRST - 1 :].min()).clamp_min(0)
    return bool(smooth[-1] > start + torch.maximum(fall, _SIGMAS * noise))


def lr_suggestion(
    lrs: Tensor,
    losses: Tensor,
    *,
    beta: float = 0.9,
    skip_start: float = 0.05,
    skip_end: float = 0.02,
    spread: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Suggestion:
    """The learning rate at which the loss falls fastest as the learning rate grows.

    ``argmin_i ds_i / d ln(lr_i)``, ``s`` the losses smoothed from both ends, among the points
    before the smallest ``s``; some at either end are passed over. The derivative is taken by the
    logarithm, along which the rates are evenly spaced: by the rate itself it would always point to
    the smallest ones.

    A curve whose fall does not stand out of its noise supports no suggestion. Nor does one that
    still falls at its last point say how much further one may go: that is told in `reason`.

    Most noise of a loss is that batches differ. With `spread` the losses are taken to be compared
    batch by batch, so that this noise is gone: each is the loss of its batch less what the same
    batch gave before training. At the start they hardly vary then, and the fall is compared with
    its own standard error and with `spread`.

    Args:
        lrs: Learning rates, rising by a constant factor, shape ``(n,)``.
        losses: The loss under each, shape ``(n,)``; the first that is not finite ends the curve.
        beta: Weight of neighbours in the smoothed loss, in [0, 1).
        skip_start: Share of points passed over at the start.
        skip_end: Share of points passed over at the end.
        spread: Standard deviation of the losses that the batches gave before training, for losses
            that are compared batch by batch; None for losses as they are.
        bounds: Smallest and largest learning rate that may be suggested.

    Returns:
        The suggestion; its `lr` is None if there are too few points or the loss does not fall.

    Example:
        >>> lrs = torch.logspace(-6, 0, 100)
        >>> falls = 2 - 1.5 / (1 + (1e-3 / lrs)) + (lrs / 0.3) ** 2
        >>> lr_suggestion(lrs, falls).lr
        0.00093

    References:
        Smith (2017), "Cyclical learning rates for training neural networks",
        https://arxiv.org/abs/1506.01186, section 3.3 (the range test).
    """
    finite = losses.isfinite().long().cumprod(0).bool()
    values, rates = losses.double()[finite], lrs.double()[finite]
    if len(values) < 2 * _FIRST:
        return _none(f"the curve has {len(values)} finite points, and needs {2 * _FIRST}")
    whole = len(values)
    values = _first_valley(values, beta)
    rates = rates[: len(values)]
    if len(values) < 2 * _FIRST:
        return _none("the loss does not fall beyond its noise")
    s = smoothed_both_ways(values, beta)
    lowest = int(s.argmin())
    noise = float(_spread(torch.diff(values[: max(lowest, _FIRST)])) / math.sqrt(2))
    fall = float(s[:_FIRST].median() - s[lowest])
    if spread is None:
        below = _pairs_below(values, lowest)
        falls, surely = below >= _PAIRS or fall > _NOISES * noise, below == 1
    else:
        errors, signs = _errors_below(values, lowest), _signs_below(values, lowest)
        told = (errors > _ERRORS or signs > _SIGNS) and fall > _SHARE * spread
        falls = told or fall > _SPREADS * spread > 0
        surely = errors > 2 * _ERRORS
    first, last = round(skip_start * len(values)), len(values) - round(skip_end * len(values))
    last = min(last, lowest + 1)
    if not falls or last <= first:
        return _none("the loss does not fall beyond its noise", noise=noise, fall=fall)
    slopes = torch.gradient(s, spacing=(rates.log(),))[0]
    place = first + int(slopes[first:last].argmin())
    slope = float(slopes[place])
    if slope >= 0:
        return _none("the loss falls nowhere", slope=slope, noise=noise, fall=fall)
    suggested = float(f"{float(rates[place]):.2g}")
    reason = "the loss still falls at the largest rate" if lowest >= whole - 2 else ""
    low, high = bounds or (0.0, math.inf)
    if not low <= suggested <= high:
        reason = f"{suggested:g} lies outside of the bounds {low:g} to {high:g}"
        suggested = min(max(suggested, low), high)
    confidence = "high" if surely and not reason else "medium"
    return Suggestion(suggested, place, slope, noise, fall, confidence, reason)


def _first_valley(values: Tensor, beta: float) -> Tensor:
    """The curve up to where it has climbed above its start: what dips behind that is chance.

    What lies further above than the fall is deep counts as lying there, since it would reach back
    over its neighbours.
    """
    start, highest = values[:_FIRST].median(), values[:_FIRST].max()
    smooth = smoothed_losses(values, beta)
    fall = (start - smooth[_FIRST:].min()).clamp_min(0)
    above = smooth > start + _CLIMB * fall
    above[:_FIRST] = False
    end = int(above.int().argmax()) if bool(above.any()) else len(values)
    return values[:end].clamp(max=float(highest + fall))


def _pairs_below(values: Tensor, lowest: int) -> float:
    """Share of the pairs of a first loss and one around the smallest in which the latter is less.

    The statistic of the rank sum test, which needs no scale and minds no heavy tails.
    """
    begin = min(max(lowest - _FIRST // 2, 0), len(values) - _FIRST)
    later = values[max(begin, _FIRST) : begin + _FIRST]
    if len(later) < _FIRST // 2:
        return 0.0
    return float((later.unsqueeze(1) < values[:_FIRST]).double().mean())


def _errors_below(values: Tensor, lowest: int) -> float:
    """By how many standard errors the median around the smallest lies below that at the start."""
    begin = min(max(lowest - _FIRST // 2, 0), len(values) - _FIRST)
    later = values[max(begin, _FIRST) : begin + _FIRST]
    if len(later) < _FIRST // 2:
        return 0.0
    # of a median: sqrt(pi / 2) of that of a mean
    error = math.sqrt(math.pi / 2 / len(later)) * _spread(later)
    fall = float(values[:_FIRST].median() - later.median())
    return fall / float(error) if error > 0 else math.copysign(math.inf, fall)


def _signs_below(values: Tensor, lowest: int) -> float:
    """Standard errors of the sign test of all losses from the start to the smallest.

    A slow fall whose end is noisy shows in this, and not around the smallest loss.
    """
    way = values[_FIRST : lowest + 1]
    if len(way) < _FIRST:
        return 0.0
    below = float((way < values[:_FIRST].median()).double().sum())
    return (2 * below - len(way)) / math.sqrt(len(way))


def _start(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median and noise of the first losses."""
    first = values[:_FIRST]
    return first.median(), _spread(first)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation as the median absolute deviation gives it."""
    return _NORMAL * (x - x.median()).abs().median()


def _none(reason: str, slope: float = 0.0, noise: float = 0.0, fall: float = 0.0) -> Suggestion:
    return Suggestion(None, -1, slope, noise, fall, "none", reason)
