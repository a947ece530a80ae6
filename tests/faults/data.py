"""Data with a planted truth, made of random numbers; every kind of network has its task."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def loader(*tensors: Tensor, batch_size: int = 32, shuffle: bool = True) -> DataLoader:
    """Batches of tensors whose first dimension is the sample."""
    return DataLoader(
        TensorDataset(*tensors), batch_size=batch_size, shuffle=shuffle, drop_last=True
    )


def blobs(
    samples: int, features: int = 16, classes: int = 4, noise: float = 1.0, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Points around one centre a class: learned by an MLP within a hundred steps."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(classes, features, generator=g)
    y = torch.randint(classes, (samples,), generator=g)
    return centres[y] + noise * torch.randn(samples, features, generator=g), y


def rings(
    samples: int, features: int = 8, noise: float = 0.1, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Two classes by the norm of the vector: nothing linear separates them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=g)
    radius = x.norm(dim=1) + noise * torch.randn(samples, generator=g)
    return x, (radius > features**0.5).long()


def regression(
    samples: int, features: int = 8, noise: float = 0.1, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """A smooth function of the features with noise, shape ``(samples, 1)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=g)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    return x, y + noise * torch.randn(samples, 1, generator=g)


def images(
    samples: int, classes: int = 4, noise: float = 0.3, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Bright bars at a place of its own for each class, ``(samples, 1, 12, 12)``."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=g)
    x = noise * torch.randn(samples, 1, 12, 12, generator=g)
    for label in range(classes):
        place = 1 + 10 * label // max(1, classes - 1)
        x[y == label, :, place % 11 : place % 11 + 2, :] += 1.0
    return x, y


def sequences(
    samples: int, time: int = 12, features: int = 4, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Whether the first feature sums to more than zero over time, ``(samples, time, features)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, time, features, generator=g)
    return x, (x[..., 0].sum(1) > 0).long()


def tokens(samples: int, length: int = 16, kinds: int = 20, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Whether token 1 stands more often than token 2, ``(samples, length)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (samples, length), generator=g)
    few = torch.rand(samples, length, generator=g)
    x = torch.where(few < 0.15, 1, torch.where(few > 0.85, 2, x))
    return x, ((x == 1).sum(1) > (x == 2).sum(1)).long()


def copies(samples: int, length: int = 12, kinds: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Each token's target is the token before it: attention that looks at one place is right."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (samples, length), generator=g)
    return x, torch.roll(x, 1, 1)


def graphs(samples: int, nodes: int = 10, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Features, adjacency, and whether neighbours of marked nodes are mostly marked."""
    g = torch.Generator().manual_seed(seed)
    upper = (torch.rand(samples, nodes, nodes, generator=g) < 0.3).float().triu(1)
    adjacency = upper + upper.transpose(1, 2)
    x = torch.randn(samples, nodes, 4, generator=g)
    marked = (x[..., :1] > 0).float()
    meeting = (adjacency @ marked * marked).sum((1, 2))
    return x, adjacency, (meeting > meeting.median()).long()


def pairs(
    samples: int, first: int = 12, second: int = 10, latent: int = 4, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Two views of one latent vector, for contrastive learning."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, latent, generator=g)
    views = [
        z @ torch.randn(latent, size, generator=g) + 0.1 * torch.randn(samples, size, generator=g)
        for size in (first, second)
    ]
    return views[0], views[1]
