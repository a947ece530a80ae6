"""What a batch of views is, and the loaders that both kinds of data share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diag.lightning import LightningDataModule

__all__ = ["Batch", "ViewLoaders", "Views", "check_at_least"]


class Batch(NamedTuple):
    """Views of the same things in the same order.

    Attributes:
        views: one a modality, each ``(batch, size)``.
        label: what the things are, ``(batch,)``; -1 where nobody knows. No loss uses it.
    """

    views: tuple[Tensor, ...]
    label: Tensor


class Views(Dataset[Batch]):
    """Things seen several ways.

    Args:
        views: one a modality, each ``(things, size)``.
        label: ``(things,)``; None where there is none.
    """

    def __init__(self, views: list[Tensor], label: Tensor | None = None) -> None:
        self.views = views
        self.label = torch.full((len(views[0]),), -1) if label is None else label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once, which the loader asks for where it can."""
        return Batch(tuple(view[indices] for view in self.views), self.label[indices])


class ViewLoaders(LightningDataModule):
    """Loaders of three splits: shuffled batches to train on, galleries to search in.

    A gallery is one batch of validation or test: a thing is looked for among all things in it. All
    galleries have the same size, which decides what chance is; what is left over when a split is
    divided by `gallery_size` is left out, and a split smaller than that is one gallery.

    Args:
        gallery_size: things in a batch of validation or test.
        batch_size: things in a batch of training, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which things are seen.
    """

    def __init__(
        self, gallery_size: int, batch_size: int, num_workers: int, pin_memory: bool, seed: int
    ) -> None:
        super().__init__()
        check_at_least(2, gallery_size=gallery_size, batch_size=batch_size)
        self.gallery_size = gallery_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.datasets: dict[str, Views] = {}
        self.view_sizes: dict[str, int] = {}

    def train_dataloader(self) -> "DataLoader[Batch]":
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> "DataLoader[Batch]":
        return self._loader("val", self.gallery_size)

    def test_dataloader(self) -> "DataLoader[Batch]":
        return self._loader("test", self.gallery_size)

    def _loader(self, split: str, size: int, *, shuffle: bool = False) -> "DataLoader[Batch]":
        dataset = self.datasets[split]
        return DataLoader(
            dataset,
            batch_size=size,
            shuffle=shuffle,
            # the loss at chance is the logarithm of the batch size, so all have one size
            drop_last=len(dataset) > size,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401
    return batch


def check_at_least(least: int, **values: int) -> None:
    """Raise a ValueError for the first argument that is less.

    Args:
        least: the smallest value that is right.
        **values: arguments by name.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
