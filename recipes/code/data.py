"""Labelled functions for the code transformer: the embedded corpus, or files of your own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_diag.lightning import LightningDataModule
from recipes.code.batches import EncodedFunctions, LengthBuckets, Row, collate
from recipes.code.corpus import Parameters, injected_flows
from recipes.code.jsonl import file_digest, read_jsonl
from recipes.code.tokenizer import encode

__all__ = ["CodeData"]

_WEIGHTINGS = ("none", "class_weights", "weighted_sampler")


class CodeData(LightningDataModule):
    """Functions labelled vulnerable (1) or not (0), tokenized and padded a batch at a time.

    Without paths the data are the "injected flows" corpus (see the README beside this file). With
    ``train_path`` and ``val_path`` they are JSON Lines files of yours, with the code in ``func`` or
    ``code`` and the label in ``target`` or ``label``.

    Rare positives are made to count more in one of two ways, never in both: by the weights that
    the model's loss takes from here, or by a sampler that draws both classes equally often.

    Args:
        train_path: functions to train on; None for the embedded corpus.
        val_path: functions to validate on.
        test_path: functions to test on.
        samples: number of functions in the embedded corpus; None for all that there are.
        corpus_seed: seed of the embedded corpus; it stays when ``seed`` changes.
        flipped_share: share of wrong labels in the corpus' training split, 0 to 1.
        cache_dir: where the corpus is kept; None for the user's cache folder.
        vocabulary_size: number of token ids.
        max_length: most tokens of a function.
        batch_size: functions a batch, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which functions are seen.
        weighting: ``none``, ``class_weights`` or ``weighted_sampler``.
        class_weights: loss weight of class 0 and of class 1, where ``weighting`` asks for it.

    Raises:
        ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        *,
        train_path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        samples: int | None = 8000,
        corpus_seed: int = 0,
        flipped_share: float = 0.03,
        cache_dir: str | None = None,
        vocabulary_size: int = 8192,
        max_length: int = 512,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
        weighting: str = "class_weights",
        class_weights: Sequence[float] = (1.0, 3.0),
    ) -> None:
        super().__init__()
        _check_paths(train_path, val_path, test_path)
        for name, value, least in (
            ("vocabulary_size", vocabulary_size, 2),
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if weighting not in _WEIGHTINGS:
            raise ValueError(f"`weighting` must be one of {_WEIGHTINGS}, got {weighting!r}.")
        if len(class_weights) != 2 or min(class_weights) <= 0:
            raise ValueError(f"`class_weights` must be two positive numbers, got {class_weights}.")
        self.paths = {"train": train_path, "val": val_path, "test": test_path}
        self.parameters = Parameters(samples, corpus_seed, flipped_share=flipped_share)
        self.cache_dir = cache_dir
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.weighting = weighting
        self.class_weights = tuple(class_weights) if weighting == "class_weights" else None
        self.datasets: dict[str, EncodedFunctions] = {}
        self.fingerprint: dict[str, Any] = {}

    def prepare_data(self) -> None:
        if self.paths["train"] is None:
            injected_flows(self.parameters, cache_dir=self.cache_dir)

    def setup(self, stage: str) -> None:
        if not self.datasets:
            source = self._embedded() if self.paths["train"] is None else self._own_files()
            sizes = {split: len(dataset) for split, dataset in self.datasets.items()}
            self.fingerprint = {**source, "samples": sizes}

    def train_dataloader(self) -> "DataLoader[Row]":
        dataset = self.datasets["train"]
        ranks = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None:
            ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        weights = _balanced(dataset.targets) if self.weighting == "weighted_sampler" else None
        order = LengthBuckets(dataset, self.batch_size, seed=self.seed, weights=weights, **ranks)
        return self._loader(dataset, order)

    def val_dataloader(self) -> "DataLoader[Row]":
        return self._loader(self.datasets["val"])

    def test_dataloader(self) -> "DataLoader[Row]":
        if "test" not in self.datasets:
            raise ValueError("`test_path` must be given to test on files of your own, got None.")
        return self._loader(self.datasets["test"])

    def _loader(
        self, dataset: EncodedFunctions, order: LengthBuckets | None = None
    ) -> "DataLoader[Row]":
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=order,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _embedded(self) -> dict[str, Any]:
        corpus = injected_flows(self.parameters, cache_dir=self.cache_dir)
        for split in self.paths:
            samples = [sample for sample in corpus.samples if sample.split == split]
            self.datasets[split] = self._encoded(
                [sample.func for sample in samples],
                [sample.target for sample in samples],
                [sample.injected for sample in samples],
            )
        return {"name": "injected flows", "sha256": corpus.digest}

    def _own_files(self) -> dict[str, Any]:
        digests = {}
        for split, path in self.paths.items():
            if path is not None:
                rows = read_jsonl(path, f"{split}_path")
                self.datasets[split] = self._encoded(
                    [row.func for row in rows], [row.target for row in rows]
                )
                digests[split] = file_digest(path)
        return {"name": Path(str(self.paths["train"])).name, "sha256": digests}

    def _encoded(
        self, functions: list[str], targets: list[int], injected: list[bool] | None = None
    ) -> EncodedFunctions:
        encoded = [
            encode(code, vocabulary_size=self.vocabulary_size, max_length=self.max_length)
            for code in functions
        ]
        return EncodedFunctions(encoded, targets, injected)


def _check_paths(train_path: str | None, val_path: str | None, test_path: str | None) -> None:
    if (train_path is None) != (val_path is None) or (test_path and not train_path):
        raise ValueError(
            "`train_path` and `val_path` must be given together, and `test_path` only with them, "
            f"got {train_path}, {val_path} and {test_path}."
        )


def _balanced(targets: list[int]) -> list[float]:
    counts = Counter(targets)
    return [1 / counts[target] for target in targets]
