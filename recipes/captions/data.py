"""Pictures and captions in batches: glyphs and their names, or a folder of your own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_diag.lightning import LightningDataModule
from recipes.captions.folder import read_folder
from recipes.captions.glyphs import glyphs
from recipes.captions.samples import SPLITS, Sample, Source, split_of
from recipes.captions.vocabulary import PADDING, Vocabulary

__all__ = ["Batch", "CaptionedImages", "CaptionsData", "collate"]


class Batch(NamedTuple):
    """Pictures and their captions.

    Attributes:
        image: 0 (black) to 1 (white), ``(batch, channels, size, size)``.
        tokens: ids, each caption with its end and then padding, ``(batch, length)``.
    """

    image: Tensor
    tokens: Tensor


class CaptionedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as bytes and captions as ids.

    Args:
        samples: pictures and captions.
        vocabulary: of the training split.
        max_words: most words of a caption.
    """

    def __init__(self, samples: Sequence[Sample], vocabulary: Vocabulary, max_words: int) -> None:
        self.images = torch.stack([sample.image for sample in samples])
        self.captions = [sample.caption for sample in samples]
        self.tokens = [
            torch.tensor(vocabulary.encode(caption, max_words)) for caption in self.captions
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.tokens[index]


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pictures as numbers from 0 to 1, captions padded to the longest of them."""
    images, tokens = zip(*rows, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), True, PADDING)
    return Batch(torch.stack(images).float() / 255, padded)


class CaptionsData(LightningDataModule):
    """Pictures with captions, in three splits that share no picture.

    Without a path the pictures are the glyphs of DejaVu Sans and the captions their Unicode names
    (see the README beside this file). Pictures that look the same are in one split, whatever they
    are called. The vocabulary is made of the training split alone.

    Args:
        path: a folder of yours, see `recipes.captions.folder.read_folder`; None for the glyphs.
        image_size: height and width.
        channels: 1 for grey, 3 for colour; glyphs are grey.
        max_words: most words of a caption.
        vocabulary_size: most token ids, three special ones included.
        min_count: how often a word must occur in the training split to be known.
        batch_size: pictures a batch, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which pictures are seen; the splits do not depend on it.

    Raises:
        ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        image_size: int = 32,
        channels: int = 1,
        max_words: int = 16,
        vocabulary_size: int = 1024,
        min_count: int = 2,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 8),
            ("max_words", max_words, 1),
            ("vocabulary_size", vocabulary_size, 4),
            ("min_count", min_count, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if channels not in ((1,) if path is None else (1, 3)):
            rule = "1, since glyphs are grey" if path is None else "1 or 3"
            raise ValueError(f"`channels` must be {rule}, got {channels}.")
        self.path = path
        self.image_size = image_size
        self.channels = channels
        self.max_words = max_words
        self.vocabulary_size = vocabulary_size
        self.min_count = min_count
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.vocabulary = Vocabulary([])
        self.datasets: dict[str, CaptionedImages] = {}
        self.fingerprint: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        source = self._source()
        splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        for sample in source.samples:
            splits[split_of(sample.group)].append(sample)
        sizes = {split: len(samples) for split, samples in splits.items()}
        if not all(sizes.values()):
            raise ValueError(
                "Each split must get a picture, by a hash of the pictures, "
                f"got {', '.join(f'{size} for {split}' for split, size in sizes.items())}."
            )
        self.vocabulary = Vocabulary.of(
            [sample.caption for sample in splits["train"]],
            size=self.vocabulary_size,
            min_count=self.min_count,
        )
        for split, samples in splits.items():
            self.datasets[split] = CaptionedImages(samples, self.vocabulary, self.max_words)
        self.fingerprint = {"name": source.name, "sha256": source.digest, "samples": sizes}

    def train_dataloader(self) -> "DataLoader[tuple[Tensor, Tensor]]":
        world, rank = 1, 0
        if self.trainer is not None:
            world, rank = self.trainer.world_size, self.trainer.global_rank
        # the order follows from seed and epoch alone: a resumed run goes on as it would have gone
        order: DistributedSampler[Any] = DistributedSampler(
            self.datasets["train"],
            num_replicas=world,
            rank=rank,
            seed=self.seed,
        )
        return self._loader("train", order)

    def val_dataloader(self) -> "DataLoader[tuple[Tensor, Tensor]]":
        return self._loader("val")

    def test_dataloader(self) -> "DataLoader[tuple[Tensor, Tensor]]":
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The words, without which the ids in a checkpoint mean nothing."""
        return {"words": self.vocabulary.words}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See that a checkpoint speaks of the same words."""
        if self.datasets and state_dict["words"] != self.vocabulary.words:
            raise ValueError(
                f"The checkpoint must have the vocabulary of the data ({len(self.vocabulary)} "
                f"words), got another one ({len(state_dict['words'])} words)."
            )

    def _source(self) -> Source:
        if self.path is None:
            return glyphs(self.image_size)
        return read_folder(self.path, size=self.image_size, channels=self.channels)

    def _loader(
        self, split: str, order: "DistributedSampler[Any] | None" = None
    ) -> "DataLoader[tuple[Tensor, Tensor]]":
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            sampler=order,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )
