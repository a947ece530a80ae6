"""What ties the latent to the caption, in the original and as it was meant."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_alignment", "norm_alignment"]


def norm_alignment(latent: Tensor, drawn: Tensor, image: Tensor) -> Tensor:
    r"""The alignment loss of the original, which aligns nothing.

    .. math:: \bigl| \mathrm{mean}_b \|z_b\| - (1 - \mathrm{mean} |\hat x - x|) \bigr|

    The caption does not occur in it: all that it does is to hold the mean norm of the latents at 1
    less the error of the pictures.

    Args:
        latent: ``(batch, latent)``.
        drawn: the reconstruction, ``(batch, channels, size, size)``.
        image: the picture, of the same shape.

    Returns:
        Shape ``()``, not negative.

    Example:
        >>> z, x = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 1, 4, 4)
        >>> norm_alignment(z, x + 0.5, x)
        tensor(2.)
    """
    norm: Tensor = torch.linalg.vector_norm(latent.float(), dim=1).mean()
    error = (drawn.float() - image.float()).abs().mean()
    return (norm - (1 - error)).abs()


def contrastive_alignment(image: Tensor, caption: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy of telling by cosine which caption belongs to a picture, and the reverse.

    .. math::
        \tfrac12 \bigl(H(\mathrm{softmax}_j\, s_{ij}) + H(\mathrm{softmax}_i\, s_{ij})\bigr),
        \quad s_{ij} = \cos(u_i, v_j) / \tau

    with the cross-entropy :math:`H` against the pairs :math:`i = j`. The cosine of the pairs alone
    would be largest if all vectors were the same; here that is the guess ``ln(batch)``.

    Args:
        image: vectors of pictures, ``(batch, width)``.
        caption: vectors of their captions, ``(batch, width)``.
        temperature: what the cosines are divided by.

    Returns:
        Shape ``()``, in nats.

    References:
        Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision,
        figure 3, https://arxiv.org/abs/2103.00020; there the temperature is learned.
    """
    u, v = F.normalize(image.float(), dim=1), F.normalize(caption.float(), dim=1)
    scores = u @ v.T / temperature
    pairs = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2
