"""Clean vectors with fresh noise: any number of batches, each from a generator of its own."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["Batch", "BatchKeys", "Clean", "NoisyStream", "Rows", "TwoHot", "generator_of", "noisy"]


class Batch(NamedTuple):
    """Vectors with noise, and what they are without it, each ``(batch, features)``."""

    noisy: Tensor
    clean: Tensor


class Clean(Protocol):
    """Where clean vectors come from."""

    def take(self, seed: int, epoch: int, start: int, size: int) -> Tensor:
        """Vectors `start` to `start` + `size` of an epoch, ``(size, features)``."""
        ...


class TwoHot:
    """Vectors of zeros with a fixed number of ones at random places, new in every epoch.

    Every set of places is as likely as any other (Floyd's algorithm, all rows at once).

    Args:
        features: length of a vector.
        ones: how many ones it has.

    References:
        Bentley & Floyd, 1987, Programming pearls: a sample of brilliance, CACM 30(9).
    """

    def __init__(self, features: int, ones: int) -> None:
        self.features = features
        self.ones = ones

    def take(self, seed: int, epoch: int, start: int, size: int) -> Tensor:
        generator = generator_of("places", seed, epoch, start)
        places = torch.empty(size, self.ones, dtype=torch.long)
        for column in range(self.ones):
            last = self.features - self.ones + column
            drawn = torch.randint(last + 1, (size,), generator=generator)
            taken = (places[:, :column] == drawn[:, None]).any(dim=1)
            places[:, column] = torch.where(taken, last, drawn)
        return torch.zeros(size, self.features).scatter_(1, places, 1.0)


class Rows:
    """The rows of a table, in another order in every epoch.

    Args:
        table: ``(rows, features)``.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def take(self, seed: int, epoch: int, start: int, size: int) -> Tensor:
        order = torch.randperm(len(self.table), generator=generator_of("order", seed, epoch, 0))
        return self.table[order[start : start + size]]


class NoisyStream(Dataset[Batch]):
    """Batches, made when they are asked for by epoch and number.

    A batch follows from the seed, the epoch, its number and the batch size alone. So it is the same
    with any number of workers, and a resumed run goes on as it would have gone.

    Args:
        clean: where clean vectors come from.
        rows: vectors in an epoch.
        batch_size: vectors in a batch; the last may have fewer.
        noise_variance: variance of the Gaussian noise on every number.
        seed: of all draws.
    """

    def __init__(
        self, clean: Clean, rows: int, batch_size: int, noise_variance: float, seed: int
    ) -> None:
        self.clean = clean
        self.rows = rows
        self.batch_size = batch_size
        self.noise_variance = noise_variance
        self.seed = seed

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, number = key
        start = number * self.batch_size
        size = min(self.batch_size, self.rows - start)
        clean = self.clean.take(self.seed, epoch, start, size)
        generator = generator_of("noise", self.seed, epoch, start)
        return noisy(clean, self.noise_variance, generator)


class BatchKeys(DistributedSampler[Any]):
    """The numbers of the batches of an epoch for one of several devices, each with the epoch.

    Lightning tells it the epoch by `set_epoch`, and leaves a `DistributedSampler` as it is.

    Args:
        stream: the batches.
        num_replicas: devices.
        rank: number of this one.
    """

    def __init__(self, stream: NoisyStream, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(stream, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, number) for number in super().__iter__())


def noisy(clean: Tensor, noise_variance: float, generator: torch.Generator) -> Batch:
    """Vectors with Gaussian noise on every number.

    Args:
        clean: ``(batch, features)``.
        noise_variance: variance of the noise.
        generator: where it is drawn from.

    Returns:
        The batch.
    """
    noise = torch.randn(clean.shape, generator=generator)
    return Batch(noise.mul_(noise_variance**0.5).add_(clean), clean)


def generator_of(purpose: str, *numbers: int) -> torch.Generator:
    """A generator for one purpose, apart from those for any other purpose or numbers.

    Args:
        purpose: any word.
        numbers: such as seed and epoch.

    Returns:
        A generator on the CPU, whose seed is a hash of both.

    Example:
        >>> [generator_of("noise", 42, epoch).initial_seed() for epoch in (0, 1)]
        [4157115730, 1518635547]
    """
    text = " ".join([purpose, *map(str, numbers)])
    # torch's generator on the CPU takes 32 bits of a seed
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)
