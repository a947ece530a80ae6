"""n-way contrastive losses: which of the others belongs to this tuple of views?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.contrastive_logits import (
    full_lines,
    full_logits,
    line_logits,
    shuffle_logits,
)
from lightning_diag.functional.contrastive_similarity import (
    SIMILARITIES,
    check_views,
    context_similarity,
    mip_length,
    safe_normalize,
    tuple_similarity,
    without_autocast,
)

__all__ = [
    "NEGATIVES",
    "SIMILARITIES",
    "ContrastiveLoss",
    "context_similarity",
    "contrastive_loss",
    "full_lines",
    "full_logits",
    "line_logits",
    "mip_length",
    "pairwise_loss",
    "recall_at",
    "safe_normalize",
    "shuffle_logits",
    "tuple_similarity",
]

NEGATIVES = ("lines", "shuffle", "full")


class ContrastiveLoss(NamedTuple):
    """A contrastive loss, and what tells whether it has anything to go by.

    Attributes:
        loss: Mean over modalities and batch, in nats, shape ``()``; the logarithm of the batch size
            where nothing is told apart.
        losses: The same for each modality, shape ``(n,)``.
        accuracy: Share of rows in which the true tuple scores highest, for each modality, without a
            graph, shape ``(n,)``. Where m tuples tie for the highest, a row counts 1/m.
        positive: Mean similarity of true tuples, not scaled, without a graph, shape ``()``.
        negative: Mean similarity of the others, without a graph, shape ``()``; ``nan`` for a batch
            of one.
        spread: Standard deviation of the scaled logits in a row, mean over rows, for each modality,
            without a graph, shape ``(n,)``. Far below 1 the softmax is uniform whatever the
            encoders do, and hardly a gradient reaches them.
    """

    loss: Tensor
    losses: Tensor
    accuracy: Tensor
    positive: Tensor
    negative: Tensor
    spread: Tensor


def contrastive_loss(
    views: Sequence[Tensor],
    *,
    similarity: str = "mip",
    negatives: str = "lines",
    logit_scale: Tensor | float = 1.0,
    generator: torch.Generator | None = None,
    eps: float = 1e-8,
) -> ContrastiveLoss:
    r"""Cross-entropy of finding the true tuple of n views among others.

    .. math:: L = -\frac{1}{n B} \sum_k \sum_b \ln \mathrm{softmax}_j (\tau L_k[b, j])_{j = b}

    The views are taken as they are: normalize them before (`safe_normalize`; ``mip`` of more than
    two unit vectors also needs `mip_length`, or its logits vanish).

    Args:
        views: n views of the same B things, each ``(batch, features)``. A thing that is in the
            batch twice counts as its own negative.
        similarity: One of `SIMILARITIES`, see `tuple_similarity`.
        negatives: ``"lines"``: tuples that differ from a true one in one view, see `line_logits`;
            ``"shuffle"``: tuples of one view and others at random, see `shuffle_logits`;
            ``"full"``: the same number as ``"lines"``, by way of the tensor of all tuples, see
            `full_logits`.
        logit_scale: The factor :math:`\tau` on similarities, shape ``()``.
        generator: Draws the tuples of ``"shuffle"``.
        eps: Added under roots.

    Returns:
        The loss in single precision at least; under autocast too.

    Raises:
        ValueError: If `similarity` or `negatives` is not known, the views do not fit one another,
            or ``"shuffle"`` has no generator.

    Example:
        >>> x = torch.eye(4)
        >>> found = contrastive_loss([x, x, x], logit_scale=10.0)
        >>> found.loss, found.accuracy
        (tensor(0.0001), tensor([1., 1., 1.]))

    References:
        Saporta et al. 2024, Contrasting with Symile, https://arxiv.org/abs/2411.01053
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"`negatives` must be one of {NEGATIVES}, got {negatives!r}.")
    if negatives == "shuffle":
        if generator is None:
            raise ValueError('`generator` must be given for negatives "shuffle", got None.')
        logits = shuffle_logits(views, similarity, generator=generator, eps=eps)
    elif negatives == "full":
        logits = full_lines(full_logits(views, similarity, eps=eps))
    else:
        logits = line_logits(views, similarity, eps)
    return _cross_entropy(logits, logit_scale, len(views))


def pairwise_loss(views: Sequence[Tensor], *, logit_scale: Tensor | float = 1.0) -> ContrastiveLoss:
    r"""The baseline: CLIP's loss, as a mean over all pairs of views.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne k} -\frac{1}{B} \sum_b \ln \mathrm{softmax}_j
        (\tau\, x_i[b] \cdot x_k[j])_{j = b}

    It cannot see what only three or more views show together, such as an exclusive or.

    Args:
        views: n views of the same B things, each ``(batch, features)``, usually of length 1.
        logit_scale: The factor :math:`\tau` on products, shape ``()``.

    Returns:
        The loss in single precision at least; the entry of a modality is a mean over the pairs in
        which it is the one to be found.

    Raises:
        ValueError: If the views do not fit one another.

    Example:
        >>> pairwise_loss([torch.eye(4), torch.eye(4)], logit_scale=0.0).loss
        tensor(1.3863)

    References:
        Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision,
        figure 3, https://arxiv.org/abs/2103.00020
    """
    xs = check_views(views)
    with without_autocast(xs[0]):
        logits = [x @ y.T for k, y in enumerate(xs) for i, x in enumerate(xs) if i != k]
    return _cross_entropy(torch.stack(logits), logit_scale, len(xs))


def recall_at(logits: Tensor, k: int) -> Tensor:
    """How often the true tuple is among the k that score highest; ties are broken at random.

    Of m tuples that score alike, of which the first comes after g better ones, the true one is
    among the first k with probability ``(k - g) / m``, cut to 0 and 1: what a collapsed model
    gets is chance, k over the number of candidates, and not 1.

    Args:
        logits: Scores with the true tuples on the diagonals, ``(n, batch, batch)``.
        k: How many count, at least 1.

    Returns:
        Mean over the batch for each modality, 0 to 1, shape ``(n,)``. A true tuple whose score is
        ``nan`` is not found.

    Raises:
        ValueError: If `k` is less than 1.

    Example:
        >>> recall_at(torch.tensor([[[2.0, 1.0], [3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]), 1)
        tensor([0.5000, 0.5000])
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    true = logits.diagonal(dim1=1, dim2=2)[..., None]
    better = (logits > true).sum(-1)
    ties = (logits == true).sum(-1)
    return ((k - better) / ties.clamp(min=1)).clamp(0, 1).mul(ties > 0).mean(-1)


def _cross_entropy(logits: Tensor, scale: Tensor | float, modalities: int) -> ContrastiveLoss:
    """The loss of ``(m, batch, batch)`` with the true tuples on the diagonal, by modality."""
    scaled = scale * logits
    losses = -scaled.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(-1)
    losses = losses.view(modalities, -1).mean(1)
    with torch.no_grad():
        size = logits.shape[-1]
        positive = logits.diagonal(dim1=1, dim2=2).mean()
        negative = (
            (logits.mean() * size - positive) / (size - 1) if size > 1 else positive * torch.nan
        )
        spread = scaled.std(-1, correction=0).mean(-1)
    return ContrastiveLoss(
        loss=losses.mean(),
        losses=losses,
        accuracy=recall_at(scaled.detach(), 1).view(modalities, -1).mean(1),
        positive=positive,
        negative=negative,
        spread=spread.view(modalities, -1).mean(1),
    )
