"""Is a GPU that has too little to do found? It needs one, so that no `Case` holds it."""

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_diag import HardwareMonitor, RunLogger
from lightning_diag.lightning import Trainer
from lightning_diag.rules import diagnose
from tests.faults import data
from tests.faults.case import DEFAULTS, merged
from tests.faults.networks import CNN, MLP, Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


class OnTheHost(Learner):
    """Does by the host, in the training step, what belongs into the loader or onto the GPU.

    Args:
        seconds: Time that the host takes.
    """

    def __init__(self, *args: Any, seconds: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.seconds = seconds

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            torch.rand(64, 64).sort()
        return super().training_step(batch, batch_idx)


def fit(module: Learner, loader: Any, steps: int, folder: Path) -> list[str]:
    """Train on the GPU; the rules that accuse the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=RunLogger(folder / "run"),
            callbacks=[HardwareMonitor(every_n_steps=10, sample_seconds=0.5, on_error="raise")],
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, loader)
    return [one.rule for one in diagnose(folder / "run") if one.rank > 0]


def busy_share(module: Learner, batch: list[Tensor], steps: int = 20) -> float:
    """Share of the time of some steps in which kernels run, as PyTorch's profiler sees it."""
    module.cuda()
    inputs = [x.cuda() for x in batch]
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    module.log = lambda *_, **__: None
    kinds = [torch.profiler.ProfilerActivity.CUDA]

    def step() -> None:
        module.training_step(inputs, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        passed = time.perf_counter() - start
    running = sum(event.self_device_time_total for event in profile.key_averages())
    return running / 1e6 / passed


def test_a_host_that_works_in_the_training_step(tmp_path):
    config = merged(DEFAULTS, {"optimizer": {"lr": 1e-4}})
    x, y = data.blobs(2048)
    module = OnTheHost(MLP([16, 64, 64, 4]), F.cross_entropy, config, seconds=0.02)
    found = fit(module, data.loader(x, y), 400, tmp_path)
    assert busy_share(module, [x[:32], y[:32]]) < 0.3
    assert found[:1] == ["gpu_underused"]


def test_batches_that_are_far_too_small(tmp_path):
    config = merged(DEFAULTS, {"optimizer": {"lr": 1e-4}})
    x, y = data.images(2048)
    module = OnTheHost(CNN(1, 4), F.cross_entropy, config, seconds=0.005)
    found = fit(module, data.loader(x, y, batch_size=2), 1000, tmp_path)
    assert busy_share(module, [x[:2], y[:2]]) < 0.4
    assert found[:1] == ["gpu_underused"]


def test_a_gpu_that_is_busy(tmp_path):
    config = merged(DEFAULTS, {"optimizer": {"lr": 1e-4}})
    x, y = data.blobs(2 * 8192, features=4096)
    module = Learner(MLP([4096, *[16384] * 4, 4]), F.cross_entropy, config)
    found = fit(module, data.loader(x, y, batch_size=8192), 40, tmp_path)
    assert busy_share(module, [x[:8192], y[:8192]]) > 0.7
    assert "gpu_underused" not in found
