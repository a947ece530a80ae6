"""Views of handwritten digits, or tables of your own, split and standardized."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from recipes.modalities.batches import ViewLoaders, Views
from recipes.modalities.folder import read_folder
from recipes.modalities.views import VIEWS, Array

__all__ = ["ModalitiesData", "digit_views"]


class ModalitiesData(ViewLoaders):
    """Two to six views of each of 1,797 handwritten digits, or the files of a folder of yours.

    The splits depend on `split_seed` alone, and hold the classes in the same shares where labels
    are known. Each number is standardized with mean and deviation of the training split; one that
    does not vary there becomes 0.

    Args:
        folder: one CSV or .npy file a view, see `read_folder`; None for the digits.
        n_views: how many views, the first so many; None for all. Of the digits: left, right,
            spectrum, gradients, profiles, moments.
        val_share: share of things to validate on.
        test_share: share of things to test on.
        split_seed: of the splits; it stays when ``seed`` changes.
        gallery_size: things among which one is looked for, see `ViewLoaders`.
        batch_size: things in a batch of training, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which things are seen.

    Raises:
        ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        n_views: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.2,
        split_seed: int = 0,
        gallery_size: int = 180,
        batch_size: int = 128,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(gallery_size, batch_size, num_workers, pin_memory, seed)
        if n_views is not None and (n_views < 2 or (folder is None and n_views > len(VIEWS))):
            most = f"at most {len(VIEWS)}" if folder is None else "at most the number of files"
            raise ValueError(f"`n_views` must be at least 2 and {most}, got {n_views}.")
        if min(val_share, test_share) <= 0 or val_share + test_share >= 1:
            raise ValueError(
                "`val_share` and `test_share` must be above 0 and leave something to train on, got "
                f"{val_share} and {test_share}."
            )
        self.folder = folder
        self.n_views = n_views
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.fingerprint: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        views, label = digit_views() if self.folder is None else read_folder(self.folder)
        if self.n_views is not None and self.n_views > len(views):
            raise ValueError(
                f"`n_views` must be at most the number of files, {len(views)}, got {self.n_views}."
            )
        views = dict(list(views.items())[: self.n_views])
        rows = self._split(len(next(iter(views.values()))), label)
        scaled = [_standardized(table, rows["train"]) for table in views.values()]
        for split, chosen in rows.items():
            known = None if label is None else torch.from_numpy(label[chosen])
            self.datasets[split] = Views([torch.from_numpy(x[chosen]) for x in scaled], known)
        self.view_sizes = {name: table.shape[1] for name, table in views.items()}
        self.fingerprint = {
            "name": "digits" if self.folder is None else Path(self.folder).name,
            "views": list(views),
            "sha256": _digest(views),
            "samples": {split: len(chosen) for split, chosen in rows.items()},
        }

    def _split(self, things: int, label: NDArray[np.int64] | None) -> dict[str, NDArray[np.int64]]:
        rows = np.arange(things)
        # a class of which there are too few cannot be in all splits
        if label is not None and min(np.unique(label, return_counts=True)[1]) < 3:
            label = None
        rest, test = train_test_split(
            rows, test_size=self.test_share, random_state=self.split_seed, stratify=label
        )
        train, val = train_test_split(
            rest,
            test_size=self.val_share / (1 - self.test_share),
            random_state=self.split_seed,
            stratify=None if label is None else label[rest],
        )
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def digit_views() -> tuple[dict[str, Array], NDArray[np.int64]]:
    """The six views of scikit-learn's digits, and which digits they are.

    Returns:
        The views by name, each ``(1797, size)``, not standardized; the digits, ``(1797,)``.
    """
    digits = load_digits()
    images = digits.images.astype(float) / 16
    return {name: view(images) for name, view in VIEWS.items()}, digits.target.astype(np.int64)


def _standardized(table: Array, train: NDArray[np.int64]) -> NDArray[np.float32]:
    mean, deviation = table[train].mean(axis=0), table[train].std(axis=0)
    varies = deviation > 1e-9 * np.abs(table[train]).max(axis=0, initial=0)
    scaled = np.where(varies, (table - mean) / np.where(varies, deviation, 1), 0)
    return scaled.astype(np.float32)


def _digest(views: dict[str, Array]) -> str:
    found = hashlib.sha256()
    for name, table in views.items():
        # rounded, since the last bits of a Fourier transform differ between machines
        found.update(f"{name} {table.shape}".encode())
        found.update((np.round(table, 6) + 0.0).tobytes())
    return found.hexdigest()
