"""From encoded functions to padded batches, in an order that seed and epoch alone decide."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from recipes.code.tokenizer import PADDING, Encoded

__all__ = ["Batch", "EncodedFunctions", "LengthBuckets", "Row", "collate"]

_BATCHES_IN_A_BUCKET = 16


class Row(NamedTuple):
    """One function: five numbers a token, ``(5, tokens)``, its label, and whether injected."""

    fields: Tensor
    target: int
    injected: bool | None


class Batch(NamedTuple):
    """Padded functions; the first five are ``(batch, tokens)`` and hold what `Encoded` says.

    Attributes:
        ids: hashed tokens; 0 is padding.
        statement: the token's line; -1 is padding.
        column: place in the line.
        name: number of a name that the function assigns to, or 0.
        assigns: 1 where the line assigns to it.
        filled: ``(batch, statements)``, False where the function has fewer lines.
        target: ``(batch,)``, 0 or 1.
        injected: ``(batch,)``, or None where the data do not say.
    """

    ids: Tensor
    statement: Tensor
    column: Tensor
    name: Tensor
    assigns: Tensor
    filled: Tensor
    target: Tensor
    injected: Tensor | None


class EncodedFunctions(Dataset[Row]):
    """Functions whose text has been encoded once, kept in a compact form.

    Args:
        encoded: the functions.
        targets: their labels.
        injected: whether something was planted in each; None where that is not known.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        targets: Sequence[int],
        injected: Sequence[bool] | None = None,
    ) -> None:
        self.fields = [torch.tensor(function, dtype=torch.int32) for function in encoded]
        self.targets = list(targets)
        self.injected = None if injected is None else list(injected)

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, index: int) -> Row:
        injected = None if self.injected is None else self.injected[index]
        return Row(self.fields[index], self.targets[index], injected)

    @property
    def lengths(self) -> list[int]:
        return [fields.shape[1] for fields in self.fields]


def collate(rows: Sequence[Row]) -> Batch:
    """Pad functions to the longest of them.

    Args:
        rows: the functions.

    Returns:
        The batch.
    """
    padded = torch.zeros(5, len(rows), max(row.fields.shape[1] for row in rows), dtype=torch.long)
    padded[0] = PADDING
    padded[1] = -1
    for i, row in enumerate(rows):
        padded[:, i, : row.fields.shape[1]] = row.fields
    statements = padded[1].amax(dim=1) + 1
    filled = torch.arange(int(statements.max())) < statements[:, None]
    known = [row.injected for row in rows if row.injected is not None]
    ids, statement, column, name, assigns = padded.unbind()
    target = torch.tensor([row.target for row in rows])
    injected = torch.tensor(known) if known else None
    return Batch(ids, statement, column, name, assigns, filled, target, injected)


class LengthBuckets(DistributedSampler[int]):
    """Shuffled indices in which functions of similar length follow one another.

    The order follows from the seed and the epoch alone, so that a resumed run goes on as it would
    have gone, whatever else drew random numbers. Being a `DistributedSampler`, it gives each
    process its own share, and Lightning neither replaces it nor forgets to call `set_epoch`.

    Args:
        dataset: the functions.
        batch_size: functions a batch.
        seed: of the order.
        weights: where given, functions are drawn with replacement, each in proportion to its
            weight.
        num_replicas: number of processes.
        rank: number of this process.
    """

    def __init__(
        self,
        dataset: EncodedFunctions,
        batch_size: int,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            cast("Dataset[int]", dataset), num_replicas=num_replicas, rank=rank, seed=seed
        )
        self.lengths = torch.tensor(dataset.lengths)
        self.batch_size = batch_size
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = self._drawn(generator).repeat(2)[: self.total_size]
        mine = drawn[self.rank :: self.num_replicas]
        buckets = torch.split(mine, self.batch_size * _BATCHES_IN_A_BUCKET)
        by_length = [bucket[self.lengths[bucket].argsort(stable=True)] for bucket in buckets]
        ordered = torch.cat(by_length)
        *batches, last = torch.split(ordered, self.batch_size)
        turns = torch.randperm(len(batches), generator=generator).tolist()
        return iter(torch.cat([*(batches[turn] for turn in turns), last]).tolist())

    def _drawn(self, generator: torch.Generator) -> Tensor:
        if self.weights is None:
            return torch.randperm(len(self.lengths), generator=generator)
        return torch.multinomial(
            self.weights, len(self.lengths), replacement=True, generator=generator
        )
