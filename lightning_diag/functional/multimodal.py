"""What a model that draws and describes is trained on: loss parts, image errors, caption scores."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CaptionScores",
    "CaptionScoresValue",
    "ImageErrors",
    "ImageErrorsValue",
    "LossShares",
    "caption_scores",
    "caption_scores_merge",
    "caption_scores_update",
    "caption_scores_value",
    "image_errors",
    "image_errors_merge",
    "image_errors_update",
    "image_errors_value",
    "loss_shares",
]

# elements worked on at once: temporaries are a few times this, however large the batch is
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 24


class LossShares(NamedTuple):
    """The loss that a model is trained on, and how much of it each part is.

    Attributes:
        total: Weighted sum of the parts, shape ``()``, in single precision or better. It has the
            parts' graph, so it can be the loss itself.
        weighted: Each part times its weight, shape ``()``, without a graph.
        shares: Each part's share of the whole, shape ``()``, without a graph.
    """

    total: Tensor
    weighted: dict[str, Tensor]
    shares: dict[str, Tensor]


class ImageErrors(NamedTuple):
    """Sums over pixels, from which the errors of any number of batches follow.

    Every field has the same shape ``(*)``, and the fields of disjoint batches or of ranks add up.

    Attributes:
        sum_sq: Sum of squared differences, in double precision.
        sum_abs: Sum of absolute differences, in double precision.
        elements: Number of elements.
        prediction_outside: How many elements of the prediction lie outside its range.
        target_outside: How many elements of the target lie outside its range.
    """

    sum_sq: Tensor
    sum_abs: Tensor
    elements: Tensor
    prediction_outside: Tensor
    target_outside: Tensor


class ImageErrorsValue(NamedTuple):
    """Errors of images, a mean over elements; ``nan`` where there is none.

    Attributes:
        mse: Mean squared error, in squared units of the result's range.
        l1: Mean absolute error, in units of the result's range.
        prediction_outside: Share of the prediction that lies outside its range, 0 to 1.
        target_outside: Share of the target that lies outside its range, 0 to 1.
    """

    mse: Tensor
    l1: Tensor
    prediction_outside: Tensor
    target_outside: Tensor


class CaptionScores(NamedTuple):
    """Sums over the tokens that are no padding, from which the scores of many batches follow.

    Every field has the same shape ``(*)``, and the fields of disjoint batches or of ranks add up.

    Attributes:
        hits: Number of tokens that have the largest logit.
        nll: Sum of negative log-likelihoods in nats, in double precision.
        entropy: Sum of the predictions' entropies in nats, in double precision.
        normalized_entropy: Sum of these, each over the logarithm of the vocabulary's size.
        tokens: Number of tokens.
    """

    hits: Tensor
    nll: Tensor
    entropy: Tensor
    normalized_entropy: Tensor
    tokens: Tensor


class CaptionScoresValue(NamedTuple):
    """Scores of captions, over the tokens that are no padding; ``nan`` where there is none.

    Attributes:
        accuracy: Share of tokens that have the largest logit, 0 to 1.
        perplexity: ``exp(nll)``: among how many equally likely tokens the model seems to choose.
        entropy: Mean entropy of the predictions in nats, whatever the right token is.
        normalized_entropy: Entropy over that of a uniform guess, 0 to 1.
        nll: Mean negative log-likelihood in nats, which is the cross-entropy loss.
        tokens: Number of tokens, as a floating point number, so that it can be logged.
    """

    accuracy: Tensor
    perplexity: Tensor
    entropy: Tensor
    normalized_entropy: Tensor
    nll: Tensor
    tokens: Tensor


def loss_shares(
    parts: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> LossShares:
    r"""Weighted sum of a loss's parts, and which of them the training is mostly about.

    .. math:: L = \sum_i w_i L_i, \qquad s_i = w_i L_i / \sum_j |w_j L_j|

    Shares of parts that are not negative add up to 1. A negative part has a negative share, and
    then the magnitudes add up to 1, so that parts which cancel do not hide each other. Every share
    is ``nan`` where all parts are zero or where one is ``nan``; next to an infinite part, whose own
    share is ``nan``, the finite ones have 0. The share of a mean is not the mean of shares: for
    an epoch, pass the epoch's mean of each part.

    Args:
        parts: The parts by name, not weighted yet, each of shape ``()``.
        weights: Weights by name; a part without one has weight 1.

    Returns:
        The total, the weighted parts and the shares, on the parts' device.

    Raises:
        ValueError: If there is no part, a part is no scalar, or a weight is not finite or has no
            part.
        TypeError: If a part is not of a floating type.

    Example:
        In a module's ``training_step``::

            losses = loss_shares({"image": image, "caption": caption}, {"caption": 0.5})
            self.log_dict({f"loss_share/{k}": v for k, v in losses.shares.items()})
            return losses.total

        >>> losses = loss_shares({"image": torch.tensor(0.3), "caption": torch.tensor(1.8)},
        ...                      {"caption": 0.5})
        >>> losses.total, losses.shares["caption"]
        (tensor(1.2000), tensor(0.7500))
    """
    weights = {} if weights is None else weights
    _check_parts(parts, weights)
    weighted = {name: _raised(part) * weights.get(name, 1.0) for name, part in parts.items()}
    values = {name: part.detach() for name, part in weighted.items()}
    whole = torch.stack([value.abs() for value in values.values()]).sum()
    shares = {name: value / whole for name, value in values.items()}
    first, *others = weighted.values()
    return LossShares(sum(others, start=first), values, shares)


def image_errors(
    prediction: Tensor,
    target: Tensor,
    *,
    prediction_range: tuple[float, float] = (-1.0, 1.0),
    target_range: tuple[float, float] = (0.0, 1.0),
    result_range: tuple[float, float] = (0.0, 1.0),
    clamp: bool = False,
) -> ImageErrorsValue:
    r"""Squared and absolute error of images, both brought to one range before they are compared.

    With :math:`x' = c + (d - c) (x - a) / (b - a)`, which takes the range ``(a, b)`` to the
    result's ``(c, d)``,

    .. math:: \mathrm{MSE} = \frac1n \sum (x' - y')^2, \qquad L_1 = \frac1n \sum |x' - y'|

    An image of a ``tanh`` lies in (-1, 1), one from a file mostly in (0, 1). A loss of the two as
    they are is no error of the image, and no number beside a metric that rescales. The ranges
    belong to the representation, not to the batch: they are not looked for in the data, and a
    value outside is no error, since that would need a read from the device. It is counted instead.

    Args:
        prediction: Real, shape ``(*)``, mostly ``(batch, channels, height, width)``.
        target: Real, of the same shape.
        prediction_range: What black and white are in the prediction.
        target_range: What they are in the target; ``(0, 255)`` for bytes.
        result_range: What they are where the two are compared.
        clamp: Whether values beyond black and white count as black and white, as on a screen.

    Returns:
        The errors in double precision (single where the device has no double), each of shape
        ``()``; ``nan`` where there is no element or one is ``nan``, which counts as outside.

    Raises:
        ValueError: If the shapes differ, or a range is not two finite numbers, low before high.
        TypeError: If a tensor is complex.

    Example:
        >>> black, grey = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 0.5)
        >>> mse, l1, *_ = image_errors(black, grey)
        >>> mse, l1
        (tensor(0.2500, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    state = image_errors_update(
        None,
        prediction,
        target,
        prediction_range=prediction_range,
        target_range=target_range,
        result_range=result_range,
        clamp=clamp,
    )
    return image_errors_value(state)


def image_errors_update(
    state: ImageErrors | None,
    prediction: Tensor,
    target: Tensor,
    *,
    prediction_range: tuple[float, float] = (-1.0, 1.0),
    target_range: tuple[float, float] = (0.0, 1.0),
    result_range: tuple[float, float] = (0.0, 1.0),
    clamp: bool = False,
) -> ImageErrors:
    """Add a batch of images to the sums, in double precision and in blocks.

    Args:
        state: The sums so far; None before the first batch.
        prediction: This and all that follows as for `image_errors`.
        target: The same shape.
        prediction_range: Black and white in the prediction.
        target_range: Black and white in the target.
        result_range: Black and white where the two are compared.
        clamp: Whether what lies beyond counts as black and white.

    Returns:
        The new sums, fields of shape ``()`` on the images' device.

    Raises:
        ValueError: As for `image_errors`.
        TypeError: As for `image_errors`.

    Example:
        In a module, with ``self.images = None`` in ``on_validation_epoch_start``, one line in
        ``validation_step`` and one in ``on_validation_epoch_end``::

            self.images = image_errors_update(self.images, prediction, target)
            self.log_dict(image_errors_value(self.images)._asdict())

        >>> images = None
        >>> for batch in (torch.zeros(1, 3, 2, 2), torch.ones(3, 3, 2, 2)):
        ...     images = image_errors_update(images, batch, torch.ones_like(batch))
        >>> image_errors_value(images).l1
        tensor(0.1250, dtype=torch.float64)
    """
    _check_images(prediction, target)
    _check_range("prediction_range", prediction_range)
    _check_range("target_range", target_range)
    _check_range("result_range", result_range)
    found = [
        _compared(x, y, prediction_range, target_range, result_range, clamp)
        for x, y in _blocks(prediction.detach(), target.detach())
    ]
    return functools.reduce(image_errors_merge, found if state is None else [state, *found])


def image_errors_merge(first: ImageErrors, second: ImageErrors) -> ImageErrors:
    """Sums of two disjoint sets of batches taken together.

    Args:
        first: Fields of shape ``(*)``.
        second: Fields of a shape that broadcasts with it.

    Returns:
        Fields of the common shape.
    """
    return ImageErrors(*(one + other for one, other in zip(first, second, strict=True)))


def image_errors_value(state: ImageErrors) -> ImageErrorsValue:
    """Errors of all the images whose sums these are.

    Args:
        state: Fields of shape ``(*)``. Those of all ranks, in a module, are
            ``ImageErrors(*(x.sum(0) for x in self.all_gather(state)))``.

    Returns:
        Fields of shape ``(*)``; ``nan`` where there was no element.
    """
    n = state.elements.to(state.sum_sq.dtype)
    return ImageErrorsValue(
        state.sum_sq / n,
        state.sum_abs / n,
        state.prediction_outside / n,
        state.target_outside / n,
    )


def caption_scores(logits: Tensor, tokens: Tensor, pad: int | None) -> CaptionScoresValue:
    r"""How well captions are predicted, and how sure the model is, padding left out of everything.

    Over the ``N`` positions whose token ``y`` is no padding, with :math:`p = softmax(logits)`,

    .. math::
        \mathrm{accuracy} = \frac1N \sum [\arg\max p = y], \qquad
        \mathrm{perplexity} = \exp\Bigl(-\frac1N \sum \ln p_y\Bigr), \qquad
        \mathrm{entropy} = -\frac1N \sum \sum_v p_v \ln p_v

    A guess among all ``V`` tokens has perplexity ``V``, entropy ``ln V`` and normalized entropy 1.
    Perplexity far above ``exp(entropy)`` is a model that is sure and wrong. Padding, of which a
    short caption is mostly made, is easy to predict: with it, all of these say little. The
    softmax is taken in single precision, in double if the logits are, under autocast too.

    Args:
        logits: Floating type, shape ``(batch, length, vocabulary)`` or ``(*, vocabulary)``.
        tokens: Integers, shape ``(batch, length)`` or ``(*)``. ``logits[:, t]`` predicts
            ``tokens[:, t]``: pass ``tokens[:, 1:]`` to a decoder that was fed ``tokens[:, :-1]``.
        pad: The token that is padding, inside the vocabulary or not (-100, say); None for none.

    Returns:
        The scores in double precision (single where the device has no double), each of shape
        ``()``. Without a token all but their number are ``nan``. Perplexity is ``inf`` where the
        right token has no probability, and beyond ``exp(709)`` (``exp(88)`` in single precision).
        Logits with ``nan`` or ``inf`` give ``nan``, as does a token outside the vocabulary, and are
        no hit; ``-inf`` rules a token out. Of equal logits, which are common in half precision,
        `torch.argmax` chooses one. Normalized entropy of a vocabulary of one is ``nan``.

    Raises:
        ValueError: If the shapes do not belong together, or the vocabulary is empty.
        TypeError: If the logits are not of a floating type, or tokens or `pad` no integers.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
        >>> scores = caption_scores(logits, torch.tensor([[1, 2, 0]]), pad=0)
        >>> scores.accuracy, scores.tokens
        (tensor(0.5000, dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    return caption_scores_value(caption_scores_update(None, logits, tokens, pad))


def caption_scores_update(
    state: CaptionScores | None, logits: Tensor, tokens: Tensor, pad: int | None
) -> CaptionScores:
    """Add a batch of captions to the sums, so that long captions count for more than short ones.

    Temporaries stay small whatever the vocabulary: the softmax is taken block by block.

    Args:
        state: The sums so far; None before the first batch.
        logits: As for `caption_scores`.
        tokens: As for `caption_scores`.
        pad: As for `caption_scores`.

    Returns:
        The new sums, fields of shape ``()`` on the logits' device.

    Raises:
        ValueError: As for `caption_scores`.
        TypeError: As for `caption_scores`.

    Example:
        In a module, with ``self.captions = None`` in ``on_validation_epoch_start``, one line in
        ``validation_step`` and one in ``on_validation_epoch_end``::

            self.captions = caption_scores_update(self.captions, logits, tokens, pad=0)
            self.log_dict(caption_scores_value(self.captions)._asdict())

        >>> captions = None
        >>> for tokens in (torch.tensor([[1, 1, 1]]), torch.tensor([[2, 0, 0]])):
        ...     logits = torch.tensor([0.0, 1.0, 0.0]).expand(1, 3, 3)
        ...     captions = caption_scores_update(captions, logits, tokens, pad=0)
        >>> caption_scores_value(captions).accuracy
        tensor(0.7500, dtype=torch.float64)
    """
    _check_captions(logits, tokens, pad)
    found = [_scored(x, y, pad) for x, y in _blocks(logits.detach(), tokens)]
    return functools.reduce(caption_scores_merge, found if state is None else [state, *found])


def caption_scores_merge(first: CaptionScores, second: CaptionScores) -> CaptionScores:
    """Sums of two disjoint sets of batches taken together.

    Args:
        first: Fields of shape ``(*)``.
        second: Fields of a shape that broadcasts with it.

    Returns:
        Fields of the common shape.
    """
    return CaptionScores(*(one + other for one, other in zip(first, second, strict=True)))


def caption_scores_value(state: CaptionScores) -> CaptionScoresValue:
    """Scores of all the captions whose sums these are.

    Args:
        state: Fields of shape ``(*)``. Those of all ranks, in a module, are
            ``CaptionScores(*(x.sum(0) for x in self.all_gather(state)))``.

    Returns:
        Fields of shape ``(*)``, see `caption_scores`.
    """
    n = state.tokens.to(state.nll.dtype)
    nll = state.nll / n
    return CaptionScoresValue(
        state.hits / n, nll.exp(), state.entropy / n, state.normalized_entropy / n, nll, n
    )


def _check_parts(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    if not parts:
        raise ValueError("`parts` must have at least one part, got none.")
    for name, part in parts.items():
        if part.ndim:
            raise ValueError(f"`parts` must be scalars, got shape {_shape(part)} for `{name}`.")
        if not part.is_floating_point():
            raise TypeError(f"`parts` must be of a floating type, got {part.dtype} for `{name}`.")
    for name, weight in weights.items():
        if name not in parts:
            known = ", ".join(f"`{part}`" for part in parts)
            raise ValueError(f"`weights` must belong to a part ({known}), got `{name}`.")
        if not math.isfinite(weight):
            raise ValueError(f"`weights` must be finite, got {weight} for `{name}`.")


def _check_images(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"`target` must have the prediction's shape {_shape(prediction)}, got {_shape(target)}."
        )
    for name, x in {"prediction": prediction, "target": target}.items():
        if x.is_complex():
            raise TypeError(f"`{name}` must be real, got {x.dtype}.")


def _check_range(name: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`{name}` must be two finite numbers, low before high, got {bounds}.")


def _check_captions(logits: Tensor, tokens: Tensor, pad: int | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be of a floating type, got {logits.dtype}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"`tokens` must be integers, got {tokens.dtype}.")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool)):
        raise TypeError(f"`pad` must be an integer or None, got {pad!r}.")
    if logits.ndim == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            "`logits` must have the tokens' shape and the vocabulary as last dimension, "
            f"got {_shape(logits)} for tokens of shape {_shape(tokens)}."
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"`logits` must have a vocabulary, got shape {_shape(logits)}.")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _raised(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _double(x: Tensor) -> torch.dtype:
    # Apple's accelerator has no double precision
    return torch.float32 if x.device.type == "mps" else torch.float64


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `x`, shape ``(rows, *)``, with the elements of `y` that they belong to; at least one.

    The samples are parted first, so that a slice of a longer batch is never copied as a whole.
    """
    row = x.shape[y.ndim :]
    if y.ndim == 0:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    elements = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, elements // row.numel())
    samples = max(1, rows // max(1, y.shape[1:].numel()))
    for xs, ys in zip(torch.split(x, samples), torch.split(y, samples), strict=True):
        flat = (xs.reshape(-1, *row), ys.reshape(-1))
        yield from zip(*(torch.split(part, rows) for part in flat), strict=True)


def _compared(
    x: Tensor,
    y: Tensor,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    result_range: tuple[float, float],
    clamp: bool,
) -> ImageErrors:
    x, y = x.to(_double(x)), y.to(_double(y))
    d = _rescaled(x, x_range, result_range, clamp) - _rescaled(y, y_range, result_range, clamp)
    return ImageErrors(
        d.square().sum(),
        d.abs().sum(),
        torch.full((), d.numel(), device=d.device),
        _outside(x, x_range),
        _outside(y, y_range),
    )


def _rescaled(
    x: Tensor, own: tuple[float, float], result: tuple[float, float], clamp: bool
) -> Tensor:
    (a, b), (c, d) = own, result
    scaled = c + (x - a) * ((d - c) / (b - a))
    return scaled.clamp(c, d) if clamp else scaled


def _outside(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return x.numel() - ((x >= low) & (x <= high)).sum()


def _scored(logits: Tensor, tokens: Tensor, pad: int | None) -> CaptionScores:
    """Sums over rows of logits ``(rows, vocabulary)`` and their tokens ``(rows,)``."""
    y = tokens.long()
    counted = torch.ones_like(y, dtype=torch.bool) if pad is None else y != pad
    vocabulary = logits.shape[-1]
    # gathering what is not there would end the process on a device, and asking would be a read
    known = (y >= 0) & (y < vocabulary)
    logp = torch.log_softmax(_raised(logits), dim=-1)
    nll = -logp.gather(-1, y.clamp(0, vocabulary - 1).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(known, nll, torch.nan)
    hits = (logits.argmax(-1) == y) & ~nll.isnan()
    p = logp.exp()
    # 0 times minus infinity, of a token that is ruled out, counts as 0
    h = -p.mul_(logp.clamp_(min=torch.finfo(logp.dtype).min)).sum(-1)
    wide = _double(logits)
    entropy = h.masked_fill(~counted, 0).sum(dtype=wide)
    return CaptionScores(
        (hits & counted).sum(),
        nll.masked_fill(~counted, 0).sum(dtype=wide),
        entropy,
        entropy / math.log(vocabulary),
        counted.sum(),
    )
