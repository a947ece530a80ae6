"""The tuples that an n-way contrastive loss compares: one view exchanged, shuffled, or all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_diag.functional.contrastive_similarity import (
    check_similarity,
    check_views,
    context_similarity,
    tuple_similarity,
)

__all__ = ["full_lines", "full_logits", "line_logits", "shuffle_logits"]

_EPS = 1e-8


def line_logits(views: Sequence[Tensor], similarity: str, eps: float = _EPS) -> Tensor:
    r"""Similarities of all tuples that differ from a true one in a single view.

    .. math:: L_k[b, j] = S(x_1[b], \dots, x_k[j], \dots, x_n[b])

    These are the lines of the full tensor of :math:`B^n` tuples that run through its diagonal, and
    the only ones that its cross-entropy with the diagonal as target depends on. They take O(n B²)
    memory, beside :math:`B^n`. ``mip`` and ``norm`` take O(n B² F) operations; ``leave_one_out``
    and ``gram``, which need the product of a candidate with each other view by itself, O(n² B² F),
    and n times the memory where gradients are wanted.

    Args:
        views: n views of the same B things, each ``(batch, features)``.
        similarity: One of `SIMILARITIES`, see `tuple_similarity`.
        eps: Added under roots.

    Returns:
        Shape ``(n, batch, batch)``, in single precision at least: view that is exchanged, true
        tuple, candidate. The diagonals hold the true tuples.

    Raises:
        ValueError: If `similarity` is not known or the views do not fit one another.

    Example:
        >>> line_logits([torch.eye(3)[:2]] * 3, "mip").shape
        torch.Size([3, 2, 2])
    """
    check_similarity(similarity)
    xs = check_views(views)
    lines = [
        context_similarity([*xs[:k], *xs[k + 1 :]], x, similarity, eps) for k, x in enumerate(xs)
    ]
    return torch.stack(lines)


def shuffle_logits(
    views: Sequence[Tensor],
    similarity: str,
    *,
    generator: torch.Generator,
    eps: float = _EPS,
) -> Tensor:
    r"""Similarities of each view with its own tuple, and with tuples of other views at random.

    In row b and column j of :math:`L_k` stand :math:`x_k[b]` and, from j, one tuple of the other
    views, each of them put into a random order; on the diagonal stands the true tuple. The line
    form exchanges one view alone; here all the others are exchanged, and do not fit each other.

    One of the others, the one that follows k, keeps its order. The tuples are as random as before,
    and no column outside the diagonal holds a true tuple (which for two views would otherwise
    happen in every row); two views give what CLIP compares.

    Args:
        views: n views of the same B things, each ``(batch, features)``.
        similarity: One of `SIMILARITIES`, see `tuple_similarity`.
        generator: Draws the orders, on the CPU or on the device of the views.
        eps: Added under roots.

    Returns:
        Shape ``(n, batch, batch)``, in single precision at least: anchor's view, anchor, tuple of
        the others.

    Raises:
        ValueError: If `similarity` is not known or the views do not fit one another.

    Example:
        >>> views = [torch.eye(3)[:2]] * 3
        >>> shuffle_logits(views, "mip", generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2, 2])

    References:
        Saporta et al. 2024, Contrasting with Symile (its O(N) negatives),
        https://arxiv.org/abs/2411.01053
    """
    check_similarity(similarity)
    xs = check_views(views)
    size = len(xs[0])
    true = tuple_similarity(xs, similarity, eps)
    diagonal = torch.eye(size, dtype=torch.bool, device=xs[0].device)
    rows = []
    for k, x in enumerate(xs):
        others = [*xs[k + 1 :], *xs[:k]]
        orders = [
            torch.randperm(size, generator=generator, device=generator.device) for _ in others[1:]
        ]
        mixed = [z[order.to(z.device)] for z, order in zip(others[1:], orders, strict=True)]
        found = context_similarity([others[0], *mixed], x, similarity, eps).T
        rows.append(torch.where(diagonal, true, found))
    return torch.stack(rows)


def full_logits(
    views: Sequence[Tensor], similarity: str, *, max_elements: int = 1 << 24, eps: float = _EPS
) -> Tensor:
    r"""Similarities of all :math:`B^n` tuples that can be made of n views: for tests and tiny B.

    Args:
        views: n views of the same B things, each ``(batch, features)``.
        similarity: One of `SIMILARITIES`, see `tuple_similarity`.
        max_elements: Most numbers of a tensor, :math:`B^n F`.
        eps: Added under roots.

    Returns:
        Shape ``(batch, ..., batch)`` with n dimensions, in single precision at least.

    Raises:
        ValueError: If the tensor would be too large, `similarity` is not known, or the views do not
            fit one another.

    Example:
        >>> full_logits([torch.eye(3)[:2]] * 4, "mip").shape
        torch.Size([2, 2, 2, 2])
    """
    xs = check_views(views)
    size, features = xs[0].shape
    elements = size ** len(xs) * features
    if elements > max_elements:
        raise ValueError(
            f"The full form must not need more than {max_elements} elements (`max_elements`), got "
            f"{size}^{len(xs)} x {features} = {elements}; `line_logits` gives the same loss."
        )
    spread = []
    for k, x in enumerate(xs):
        shape = [1] * len(xs)
        shape[k] = size
        spread.append(x.view(*shape, features))
    return tuple_similarity(spread, similarity, eps)


def full_lines(full: Tensor) -> Tensor:
    """The lines of a full tensor that run through its diagonal, as `line_logits` has them.

    Args:
        full: Shape ``(batch, ..., batch)`` with n dimensions.

    Returns:
        Shape ``(n, batch, batch)``.

    Example:
        >>> full_lines(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[[1., 3.],
                 [2., 4.]],
        <BLANKLINE>
                [[1., 2.],
                 [3., 4.]]])
    """
    lines = []
    b = torch.arange(len(full), device=full.device)
    for k in range(full.dim()):
        index = [b[:, None]] * full.dim()
        index[k] = b[None, :]
        lines.append(full[tuple(index)])
    return torch.stack(lines)
