"""Windows of drivers and targets: planted ones, or a table of your own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diag.lightning import LightningDataModule
from recipes.drivers.baselines import ceiling, ridge_scores
from recipes.drivers.planted import Edges, planted_series
from recipes.drivers.series import Array, Series, digest, read_table
from recipes.drivers.windows import Scale, Window, Windows, bounds, scale_of

__all__ = ["DriversData", "SeriesData"]


class SeriesData(LightningDataModule):
    """Windows of one series, split in time, scaled by the training part alone.

    A subclass says in `read` where the series comes from. No window lies in two parts.

    Args:
        context: Times that the forecaster sees.
        horizon: Times that it foretells.
        split: Shares of the times that are for training, validation and test.
        batch_size: Windows a batch, on each device.
        num_workers: Processes that load batches.
        pin_memory: Whether batches are put into page-locked memory.
        seed: Of the order in which windows are seen.

    Attributes:
        series: The series; None before `setup`.
        edges: The planted edges, where they are known.
        fingerprint: Name and SHA-256 of the series.

    Raises:
        ValueError: An argument breaks a rule.
    """

    def __init__(
        self,
        *,
        context: int,
        horizon: int,
        split: Sequence[float],
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("context", context, 1),
            ("horizon", horizon, 1),
            ("batch_size", batch_size, 2),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
            raise ValueError(f"`split` must be three positive shares of one, got {list(split)}.")
        self.context = context
        self.horizon = horizon
        self.split = (split[0], split[1], split[2])
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.series: Series | None = None
        self.edges: Edges | None = None
        self.parts: dict[str, Windows] = {}
        self.fingerprint: dict[str, Any] = {}
        self._scores: dict[str, dict[str, Tensor]] = {}
        self._clean: dict[str, Windows] = {}

    def read(self) -> tuple[str, Series, Edges | None, Array | None]:
        """A name, the series, and where they are known the edges and the targets without noise."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if self.series is not None:
            return
        name, series, self.edges, signal = self.read()
        parts = bounds(len(series.targets), self.split)
        scale = scale_of(series, parts["train"][1])
        self.parts = self._windows(series, parts, scale)
        for part, windows in self.parts.items():
            if not len(windows):
                least = self.context + self.horizon
                raise ValueError(
                    f"Each part must have at least `context` + `horizon` = {least} times, got "
                    f"{parts[part][1] - parts[part][0]} for {part}."
                )
        if signal is not None:
            clean = Series(series.drivers, signal, series.driver_names, series.target_names)
            self._clean = self._windows(clean, parts, scale)
        self.series = series
        self.fingerprint = {"name": name, "sha256": digest(series)}

    def train_dataloader(self) -> "DataLoader[Window]":
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> "DataLoader[Window]":
        return self._loader("val")

    def test_dataloader(self) -> "DataLoader[Window]":
        return self._loader("test")

    def baselines(self, part: str) -> dict[str, Tensor]:
        """R2 by target of what a model is to be compared with, see `ridge_scores` and `ceiling`."""
        if part not in self._scores:
            scores = ridge_scores(self.parts["train"], self.parts[part], self.edges)
            if self._clean:
                scores["ceiling"] = ceiling(self.parts[part], self._clean[part])
            self._scores[part] = scores
        return self._scores[part]

    def _windows(
        self, series: Series, parts: Mapping[str, tuple[int, int]], scale: Scale
    ) -> dict[str, Windows]:
        return {
            part: Windows(series, *where, scale, self.context, self.horizon)
            for part, where in parts.items()
        }

    def _loader(self, part: str, *, shuffle: bool = False) -> "DataLoader[Window]":
        windows = self.parts[part]
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            # the forecaster takes deviations over a batch, and one window has none
            drop_last=shuffle and len(windows) % self.batch_size == 1,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )


class DriversData(SeriesData):
    """Thirteen bodies and four targets with planted drivers, or a CSV file of your own.

    Args:
        path: A CSV file with a column ``date``; None for the planted series.
        drivers: Its columns of drivers, or each driver's name with its columns.
        targets: Its columns of targets.
        hours: Length of the planted series.
        generator_seed: Seed of the planted series; it stays when ``seed`` changes.
        context: Times that the forecaster sees.
        horizon: Times that it foretells.
        split: Shares of the times that are for training, validation and test.
        batch_size: Windows a batch, on each device.
        num_workers: Processes that load batches.
        pin_memory: Whether batches are put into page-locked memory.
        seed: Of the order in which windows are seen.

    Raises:
        ValueError: An argument breaks a rule.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        drivers: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        hours: int = 6000,
        generator_seed: int = 0,
        context: int = 96,
        horizon: int = 24,
        split: Sequence[float] = (0.7, 0.15, 0.15),
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(
            context=context,
            horizon=horizon,
            split=split,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        if (path is None) != (drivers is None) or (path is None) != (targets is None):
            raise ValueError(
                "`path`, `drivers` and `targets` must be given together, "
                f"got {path}, {drivers} and {targets}."
            )
        if hours < 1:
            raise ValueError(f"`hours` must be at least 1, got {hours}.")
        self.path = path
        self.drivers = drivers
        self.targets = targets
        self.hours = hours
        self.generator_seed = generator_seed

    def read(self) -> tuple[str, Series, Edges | None, Array | None]:
        if self.path is None or self.drivers is None or self.targets is None:
            series, edges, signal = planted_series(self.hours, self.generator_seed)
            return "planted drivers", series, edges, signal
        return self.path, read_table(self.path, self.drivers, self.targets), None, None
