"""How alike are n views of one thing? Four similarities of a tuple, and safe normalization."""

import functools
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = [
    "SIMILARITIES",
    "check_similarity",
    "check_views",
    "context_similarity",
    "mip_length",
    "safe_normalize",
    "tuple_similarity",
    "without_autocast",
]

SIMILARITIES = ("mip", "norm", "leave_one_out", "gram")
_EPS = 1e-8
# what half precision can hold decides how steep a normalization may be
_LENGTH_EPS = 1e-6
_HALF_LENGTH_EPS = 1e-3


def safe_normalize(x: Tensor, dim: int = -1, eps: float | None = None) -> Tensor:
    r"""Vectors of length 1, with values and gradients that are finite for every finite input.

    .. math:: x / \max(\|x\|, \varepsilon)

    Below :math:`\varepsilon` the function is linear, so a vector of zeros comes back as zeros and
    gets the gradient of the result over :math:`\varepsilon`, the steepest there is; a vector
    shorter than :math:`\varepsilon` comes back shorter than 1. Lengths are computed in single
    precision at least, and relative to the largest element, so that 1e-30 and 1e30 are squared
    without becoming 0 or infinity.

    Args:
        x: Vectors along `dim`, shape ``(*, features, *)``.
        dim: The dimension that is normalized over.
        eps: Shortest length that is told from zero; by default 1e-6, and 1e-3 in half precision,
            where 1e-6 would let gradients of 0.1 overflow.

    Returns:
        Shape and type of `x`. Vectors with an element that is infinite or ``nan`` hold ``nan``.

    Raises:
        ValueError: If `eps` is not above 0.

    Example:
        >>> safe_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if eps is None:
        eps = _HALF_LENGTH_EPS if x.dtype == torch.float16 else _LENGTH_EPS
    if not eps > 0:
        raise ValueError(f"`eps` must be above 0, got {eps}.")
    wide = _wide(x)
    # the result does not depend on this scale, and so no gradient is lost with it
    scale = wide.detach().abs().amax(dim, keepdim=True).clamp(min=eps)
    u = wide / scale
    square = u.square().sum(dim, keepdim=True)
    return (u * torch.maximum(square, (eps / scale).square()).rsqrt()).to(x.dtype)


def mip_length(views: int, features: int) -> float:
    r"""Length that views should have, so that their multilinear inner product keeps its size.

    .. math:: F^{1/2 - 1/n}

    The product of n equal unit vectors of random direction is about
    :math:`(n - 1)!! / F^{n/2 - 1}` for even n: for six views of 512 features 6e-5, which a softmax
    cannot tell from 0, and which leaves no gradient. With this length in place of 1 it is
    :math:`(n - 1)!!`, whatever F is. For two views the length is 1, and the product the cosine.

    Args:
        views: Number of views ``n``.
        features: Number of features ``F``.

    Example:
        >>> round(mip_length(6, 512), 6), mip_length(2, 512)
        (8.0, 1.0)
    """
    return float(features ** (0.5 - 1 / views))


def tuple_similarity(views: Sequence[Tensor], similarity: str, eps: float = _EPS) -> Tensor:
    r"""How alike the views of a tuple :math:`x_1 \dots x_n` are, large where they agree.

    With :math:`s = \sum_i x_i` and :math:`G_{ij} = x_i \cdot x_j`:

    - ``mip``: :math:`\sum_z \prod_i x_{iz}`, the multilinear inner product. For two views the dot
      product. It alone sees dependence that no pair of views shows, as in an exclusive or.
    - ``norm``: :math:`\sqrt{\|s\|^2 + \varepsilon}`. For unit vectors
      :math:`\sqrt{n + 2 \sum_{i<j} \cos_{ij}}`, the sum of pairwise cosines in another guise.
    - ``leave_one_out``: :math:`\sum_i x_i \cdot (s - x_i) / \sqrt{\|s - x_i\|^2 + \varepsilon}`,
      each view beside the sum of the others.
    - ``gram``: :math:`-\sqrt{\det G + \varepsilon}`, minus the volume that the views span. It takes
      unit vectors, since short ones span little, and does not see signs: -x and x span nothing. Nor
      do three views of which two are parallel, whatever the third is: the more the views agree, the
      less is left to tell tuples apart by.

    The epsilon stands inside the roots, which are infinitely steep at 0 without it.

    Args:
        views: At least two tensors, each ``(*, features)``; their leading dimensions broadcast.
        similarity: One of `SIMILARITIES`.
        eps: Added under roots, in squared units of the views (``gram``: to the power 2n).

    Returns:
        Shape ``(*)``, in single precision at least.

    Raises:
        ValueError: If `similarity` is not known or there are less than two views.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> tuple_similarity([x, x, x], "norm")
        tensor([3., 3.])

    References:
        ``mip``: Saporta et al. 2024, Contrasting with Symile,
        https://arxiv.org/abs/2411.01053; ``gram``: Cicchetti et al. 2025, Gramian Multimodal
        Representation Learning and Alignment, https://arxiv.org/abs/2412.11959
    """
    check_similarity(similarity)
    if len(views) < 2:
        raise ValueError(f"`views` must be at least 2 tensors, got {len(views)}.")
    xs = [_wide(x) for x in views]
    with without_autocast(xs[0]):
        if similarity == "mip":
            return _product(xs).sum(-1)
        if similarity == "gram":
            det, _ = _determinant_and_adjugate(_gram(xs))
            return -_root(det.to(xs[0].dtype), eps)
        s = functools.reduce(operator.add, xs)
        if similarity == "norm":
            return _root(s.square().sum(-1), eps)
        parts = [(x * (s - x)).sum(-1) / _root((s - x).square().sum(-1), eps) for x in xs]
        return functools.reduce(operator.add, parts)


def context_similarity(
    others: Sequence[Tensor], y: Tensor, similarity: str, eps: float = _EPS
) -> Tensor:
    r"""The similarity of every tuple that one of b contexts and one of j candidates make.

    A context is all views of a tuple but one, and a candidate takes the free place. With
    :math:`r = \sum_i x_i[b]` over the m other views, :math:`y = y[j]`, :math:`c_i = x_i \cdot y`:

    - ``mip``: :math:`(\bigodot_i x_i) \cdot y`, one matrix product;
    - ``norm``: :math:`\|r + y\|^2 = \|r\|^2 + 2 r \cdot y + \|y\|^2`, one matrix product;
    - ``leave_one_out``: with :math:`q_i = r - x_i`,
      :math:`\frac{r \cdot y}{\|r\|} + \sum_i \frac{x_i \cdot q_i + c_i}
      {\sqrt{\|q_i\|^2 + 2 (r \cdot y - c_i) + \|y\|^2}}`, one matrix product for each view;
    - ``gram``: :math:`\det G = \|y\|^2 \det A - c^T \mathrm{adj}(A) c`, where A is the Gram matrix
      of the context: Schur's complement without its division, so that views that are parallel
      already, where A is singular, keep their gradient. One matrix product for each view.

    No tensor with the dimensions of contexts, candidates and features together is made. ``mip`` and
    ``norm`` take O(B² F) operations and O(B²) memory, the other two m times as much.

    Args:
        others: The m other views of each context, each ``(contexts, features)``.
        y: Candidates for the free place, ``(candidates, features)``.
        similarity: One of `SIMILARITIES`, see `tuple_similarity`.
        eps: Added under roots.

    Returns:
        Shape ``(contexts, candidates)``, in single precision at least.

    Raises:
        ValueError: If `similarity` is not known.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> context_similarity([x, x], y, "mip")
        tensor([[1., 0., 1.],
                [0., 1., 1.]])
    """
    check_similarity(similarity)
    xs, y = [_wide(x) for x in others], _wide(y)
    with without_autocast(y):
        if similarity == "mip":
            return _product(xs) @ y.T
        if similarity == "norm":
            r = functools.reduce(operator.add, xs)
            return _root(_square_of_sum(r, r @ y.T, y), eps)
        if similarity == "leave_one_out":
            return _leave_one_out(xs, y, eps)
        return _negative_volume(xs, y, eps)


def check_similarity(similarity: str) -> None:
    """Raise a ValueError where `similarity` is none of `SIMILARITIES`."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"`similarity` must be one of {SIMILARITIES}, got {similarity!r}.")


def check_views(views: Sequence[Tensor]) -> list[Tensor]:
    """The views in single precision at least.

    Raises:
        ValueError: If there are less than two, or they are not all ``(batch, features)`` alike.
    """
    if len(views) < 2:
        raise ValueError(f"`views` must be at least 2 tensors, got {len(views)}.")
    shapes = [tuple(x.shape) for x in views]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(f"`views` must all have one shape (batch, features), got {shapes}.")
    return [_wide(x) for x in views]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A region in which products are not rounded to half precision, which six factors would need.

    Args:
        x: A tensor on the device that is meant.
    """
    return torch.autocast(x.device.type, enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _product(xs: Sequence[Tensor]) -> Tensor:
    # one by one, since the gradient of a reduction must first look for zeros
    return functools.reduce(operator.mul, xs)


def _root(square: Tensor, eps: float) -> Tensor:
    # rounding may leave less than zero of a difference of squares
    return (square.clamp(min=0) + eps).sqrt()


def _square_of_sum(q: Tensor, product: Tensor, y: Tensor) -> Tensor:
    """Squared length of ``q[b] + y[j]`` from their products, ``(contexts, candidates)``."""
    return q.square().sum(-1)[:, None] + 2 * product + y.square().sum(-1)


def _leave_one_out(xs: Sequence[Tensor], y: Tensor, eps: float) -> Tensor:
    r = functools.reduce(operator.add, xs)
    total = r @ y.T
    found = total / _root(r.square().sum(-1), eps)[:, None]
    for x in xs:
        c, q = x @ y.T, r - x
        found = found + ((x * q).sum(-1)[:, None] + c) / _root(_square_of_sum(q, total - c, y), eps)
    return found


def _negative_volume(xs: Sequence[Tensor], y: Tensor, eps: float) -> Tensor:
    det, adjugate = (part.to(y.dtype) for part in _determinant_and_adjugate(_gram(xs)))
    c = torch.stack([x @ y.T for x in xs], dim=-1)
    form = ((c @ adjugate) * c).sum(-1)
    return -_root(y.square().sum(-1) * det[:, None] - form, eps)


def _gram(xs: Sequence[Tensor]) -> Tensor:
    """Products of every two views, ``(*, n, n)``, in double precision where the device has it."""
    wide = [x if x.device.type == "mps" else x.double() for x in xs]
    products = {(i, j): (wide[i] * wide[j]).sum(-1) for i in range(len(xs)) for j in range(i + 1)}
    entries = [products[max(i, j), min(i, j)] for i in range(len(xs)) for j in range(len(xs))]
    shape = torch.broadcast_shapes(*(one.shape for one in entries))  # type: ignore[no-untyped-call]
    stacked = torch.stack([one.expand(shape) for one in entries], dim=-1)
    return stacked.view(*shape, len(xs), len(xs))


def _determinant_and_adjugate(a: Tensor) -> tuple[Tensor, Tensor]:
    """Both by Faddeev and LeVerrier: products alone, so smooth where the matrix is singular."""
    size = a.shape[-1]
    eye = torch.eye(size, dtype=a.dtype, device=a.device)
    m, c = eye.expand_as(a), -a.diagonal(dim1=-2, dim2=-1).sum(-1)
    for k in range(2, size + 1):
        m = a @ m + c[..., None, None] * eye
        c = -(a @ m).diagonal(dim1=-2, dim2=-1).sum(-1) / k
    sign = (-1) ** size
    return sign * c, -sign * m
