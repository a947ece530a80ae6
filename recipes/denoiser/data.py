"""Vectors with two ones and noise, without end, or clean vectors of your own."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_diag.lightning import LightningDataModule
from recipes.denoiser.stream import (
    Batch,
    BatchKeys,
    Clean,
    NoisyStream,
    Rows,
    TwoHot,
    generator_of,
    noisy,
)
from recipes.denoiser.table import read_table

__all__ = ["DenoiserData", "FixedBatches"]


class DenoiserData(LightningDataModule):
    """Noisy vectors to clean: new ones in every epoch for training, fixed ones for validation.

    Without a path a clean vector has `ones` ones at random places and zeros elsewhere. With one the
    clean vectors are the rows of your file, in another order in every epoch. Noise is always new.

    Args:
        path: a ``.npy`` or CSV file of clean vectors, see `recipes.denoiser.table.read_table`; None
            for vectors of ones and zeros.
        features: length of a vector; the number of columns of your file.
        ones: how many ones a vector has; your file has its own.
        noise_variance: variance of the Gaussian noise on every number.
        n_train: vectors in an epoch; with a file, its rows less those for validation.
        n_val: vectors for validation; with a file, rows drawn from it.
        val_seed: of the validation; it stays when ``seed`` changes.
        batch_size: vectors in a batch, on each device.
        num_workers: processes that make batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the training's vectors, their order and their noise.

    Attributes:
        fingerprint: what the data are, whatever the seed.

    Raises:
        ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        features: int = 1024,
        ones: int = 2,
        noise_variance: float = 0.005,
        n_train: int = 300_000,
        n_val: int = 5_000,
        val_seed: int = 0,
        batch_size: int = 1_000,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, value in (
            ("features", features),
            ("ones", ones),
            ("n_train", n_train),
            ("n_val", n_val),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if path is None and ones > features:
            raise ValueError(f"`ones` must be at most `features`, {features}, got {ones}.")
        if noise_variance < 0:
            raise ValueError(f"`noise_variance` must be at least 0, got {noise_variance}.")
        self.path = path
        self.features = features
        self.ones = ones
        self.noise_variance = noise_variance
        self.n_train = n_train
        self.n_val = n_val
        self.val_seed = val_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.stream: NoisyStream | None = None
        self.validation: FixedBatches | None = None
        self.fingerprint: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        if self.stream is not None:
            return
        train, fixed, rows = self._two_hot() if self.path is None else self._file(self.path)
        noise = generator_of("validation noise", self.val_seed)
        self.stream = NoisyStream(train, rows, self.batch_size, self.noise_variance, self.seed)
        self.validation = FixedBatches(noisy(fixed, self.noise_variance, noise), self.batch_size)
        self.fingerprint = {
            "name": "two-hot" if self.path is None else Path(self.path).name,
            "features": self.features,
            "noise_variance": self.noise_variance,
            "samples": {"train": rows, "val": len(fixed)},
            "val_sha256": _digest(fixed),
        }
        if self.path is None:
            self.fingerprint["ones"] = self.ones
        elif isinstance(train, Rows):
            self.fingerprint["sha256"] = _digest(train.table)

    def train_dataloader(self) -> "DataLoader[Batch]":
        if self.stream is None:
            raise RuntimeError("`setup` must be called before `train_dataloader`.")
        world, rank = 1, 0
        if self.trainer is not None:
            world, rank = self.trainer.world_size, self.trainer.global_rank
        return self._loader(self.stream, BatchKeys(self.stream, world, rank))

    def val_dataloader(self) -> "DataLoader[Batch]":
        if self.validation is None:
            raise RuntimeError("`setup` must be called before `val_dataloader`.")
        return self._loader(self.validation)

    def _two_hot(self) -> tuple[Clean, torch.Tensor, int]:
        clean = TwoHot(self.features, self.ones)
        # an epoch that no training has
        return clean, clean.take(self.val_seed, -1, 0, self.n_val), self.n_train

    def _file(self, path: str) -> tuple[Clean, torch.Tensor, int]:
        table = read_table(path, self.features)
        if self.n_val >= len(table):
            raise ValueError(
                f"`n_val` must be less than the rows of {path}, {len(table)}, got {self.n_val}."
            )
        order = torch.randperm(len(table), generator=generator_of("split", self.val_seed))
        rest = order[self.n_val :].sort().values
        return Rows(table[rest]), table[order[: self.n_val]], len(rest)

    def _loader(
        self, batches: "Dataset[Batch]", keys: BatchKeys | None = None
    ) -> "DataLoader[Batch]":
        return DataLoader(
            batches,
            batch_size=None,
            sampler=keys,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )


class FixedBatches(Dataset[Batch]):
    """The same vectors every time, in batches.

    Args:
        vectors: all of them.
        batch_size: how many a batch has; the last may have fewer.
    """

    def __init__(self, vectors: Batch, batch_size: int) -> None:
        self.vectors = vectors
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.vectors.clean) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return Batch(self.vectors.noisy[rows], self.vectors.clean[rows])


def _digest(table: torch.Tensor) -> str:
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()
