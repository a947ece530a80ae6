"""Runs that the machine holds up: a slow loader, memory that is never given back."""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.networks import CNN, MLP, GRUClassifier, Learner, Transformer
from tests.faults.witness import Witness

# ---- input ----


class Slow(Dataset):
    """Samples that take their time, as files on a slow disk or pictures to decode do.

    Args:
        tensors: What a sample is taken from.
        seconds: How long one takes.
        since: Number of the first sample that is slow, in the order of asking.
    """

    def __init__(self, *tensors: Tensor, seconds: float, since: int = 0) -> None:
        self.tensors = tensors
        self.seconds = seconds
        self.since = since
        self.asked = 0

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.asked += 1
        if self.asked > self.since:
            time.sleep(self.seconds)
        return tuple(x[index] for x in self.tensors)


class Clocked(Learner):
    """Looks at the clock when a batch begins and ends.

    Args:
        rest: Seconds of rest in a step, for a device that works while the host waits.

    Attributes:
        waits: Seconds between the end of a batch and the beginning of the next.
        works: Seconds from the beginning of a batch to its end.
    """

    def __init__(self, *args: Any, rest: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rest = rest
        self.waits: list[float] = []
        self.works: list[float] = []
        self.at = 0.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.at:
            self.waits.append(now - self.at)
        self.at = now
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.rest)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.works.append(now - self.at)
        self.at = now


def _slow(config: Config, dataset: Slow, shuffle: bool = True) -> DataLoader:
    hardware = config["hardware"]
    workers = hardware["num_workers"]
    return DataLoader(
        dataset,
        batch_size=hardware["batch_size"],
        shuffle=shuffle,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )


def _share(witness: Witness, since: int = 0) -> float:
    model = witness.model
    assert isinstance(model, Clocked)
    waits, works = sum(model.waits[since + 2 :]), sum(model.works[since + 2 :])
    return waits / (waits + works)


def _waits(least: float, since: int = 0) -> Callable[[Witness], None]:
    def verify(witness: Witness) -> None:
        share = _share(witness, since)
        assert share > least, f"only {share:.2f} of the time is waiting"
        model = witness.model
        if isinstance(model, Clocked) and since:
            early, late = model.waits[:since], model.waits[since:]
            assert sorted(late)[len(late) // 2] > 5 * sorted(early)[len(early) // 2]

    return verify


def _waits_less(most: float) -> Callable[[Witness], None]:
    def cured(witness: Witness) -> None:
        share = _share(witness, 10)
        assert share < most, f"{share:.2f} of the time is waiting still"

    return cured


@fault(
    "mlp_reads_each_sample_from_a_slow_disk",
    "mlp",
    cause="input_bound",
    config={"trainer": {"max_steps": 150}, "hardware": {"batch_size": 16}},
    verify=_waits(0.4),
    repairable=True,
    cured=_waits_less(0.45),
)
def _slow_disk(config: Config) -> Job:
    x, y = data.blobs(4096)
    dataset = Slow(x, y, seconds=0.0017)
    module = Clocked(MLP([16, 64, 64, 4]), F.cross_entropy, config, rest=0.014)
    return Job(module, _slow(config, dataset))


@fault(
    "cnn_decodes_pictures_in_the_training_process",
    "cnn",
    cause="input_bound",
    config={"trainer": {"max_steps": 150}, "hardware": {"batch_size": 8}},
    verify=_waits(0.4),
    repairable=True,
    cured=_waits_less(0.45),
)
def _decodes(config: Config) -> Job:
    x, y = data.images(4096)
    dataset = Slow(x, y, seconds=0.005)
    module = Clocked(CNN(1, 4), F.cross_entropy, config, rest=0.015)
    return Job(module, _slow(config, dataset))


@fault(
    "gru_loader_slows_down_at_100",
    "gru",
    cause="input_bound",
    onset=100,
    config={"trainer": {"max_steps": 200}, "hardware": {"batch_size": 16}},
    verify=_waits(0.4, 100),
)
def _slows_down(config: Config) -> Job:
    x, y = data.sequences(4096)
    # the cache of the file system is full
    dataset = Slow(x, y, seconds=0.003, since=1600)
    module = Clocked(GRUClassifier(4, 2), F.cross_entropy, config, rest=0.005)
    return Job(module, _slow(config, dataset))


# ---- memory ----


def resident() -> int:
    """Bytes of this process in memory, as the kernel counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Gives freed memory back to the kernel, that none is taken for new that is not."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Keeping(Learner):
    """Keeps something of every step in a list.

    Args:
        since: The step from which on.
        keep: From the module and the inputs to what is kept.
        pause: Seconds of rest a step, since a machine's memory is looked at by the second.
    """

    def __init__(
        self,
        *args: Any,
        keep: Callable[[Learner, list[Tensor]], object],
        since: int = 0,
        pause: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.keep = keep
        self.since = since
        self.pause = pause
        self.kept: list[object] = []
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        if self.global_step >= self.since:
            self.kept.append(self.keep(self, list(batch)))
        time.sleep(self.pause)
        self.sizes.append(resident())
        return given

    def on_fit_start(self) -> None:
        give_back()

    def on_fit_end(self) -> None:
        self.held = len(self.kept)
        self.kept.clear()
        give_back()


def _grows(least: float, since: int = 0) -> Callable[[Witness], None]:
    def verify(witness: Witness) -> None:
        model = witness.model
        assert isinstance(model, Keeping)
        assert model.held >= len(model.sizes) - since - 1
        first, middle = model.sizes[since + 10], model.sizes[(since + len(model.sizes)) // 2]
        for low, high in ((first, middle), (middle, model.sizes[-1])):
            grown = (high - low) / 2**20
            assert grown > least / 2.5, f"it grows by {grown:.0f} MiB"

    return verify


def _penalty(module: Learner, batch: list[Tensor]) -> object:
    # never gone backward through, so that all its activations stay
    return module.net(batch[0]).square().mean()


def _maps(module: Learner, batch: list[Tensor]) -> object:
    # augmented copies of the batch, for a figure that is never drawn
    return batch[0].repeat(1, 96, 1, 1)


def _both(module: Learner, batch: list[Tensor]) -> object:
    return [x.repeat(1, 512) for x in batch[:1]]


@fault(
    "mlp_keeps_penalties_with_their_graphs",
    "mlp",
    cause="memory_growth",
    config={"trainer": {"max_steps": 250}, "hardware": {"batch_size": 128}},
    verify=_grows(120),
)
def _graphs(config: Config) -> Job:
    x, y = data.blobs(8192)
    net = MLP([16, 512, 512, 512, 4])
    module = Keeping(net, F.cross_entropy, config, keep=_penalty, pause=0.005)
    return Job(module, data.loader(x, y, batch_size=config["hardware"]["batch_size"]))


@fault(
    "cnn_keeps_copies_from_100",
    "cnn",
    cause="memory_growth",
    onset=100,
    config={"trainer": {"max_steps": 250}},
    verify=_grows(200, 100),
)
def _copies(config: Config) -> Job:
    x, y = data.images(1024)
    module = Keeping(CNN(1, 4), F.cross_entropy, config, keep=_maps, since=100, pause=0.02)
    return Job(module, data.loader(x, y))


@fault(
    "transformer_keeps_inputs_of_every_step",
    "transformer",
    cause="memory_growth",
    config={"trainer": {"max_steps": 220}},
    verify=_grows(200),
)
def _inputs(config: Config) -> Job:
    x, y = data.tokens(1024)
    module = Keeping(Transformer(20, 2), F.cross_entropy, config, keep=_both, pause=0.01)
    return Job(module, data.loader(x, y))
