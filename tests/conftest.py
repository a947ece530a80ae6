"""What every test shares: one Lightning package, one thread, and tiny models with known answers."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# decides for the whole session which of the two Lightning packages is meant
importlib.import_module(os.environ.get("LIGHTNING_DIAG_TEST_PACKAGE", "pytorch_lightning"))

from lightning_diag.lightning import LightningModule  # noqa: E402  (after the choice)

# a busy machine is no reason for a property to fail
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


class Halving(LightningModule):
    """Loss ``|w|^2 / 2`` for each part: the gradient of every weight is the weight itself."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.encoder = nn.ParameterList(
            [nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2)]
        )
        self.head = nn.ParameterList([nn.Parameter(torch.randn(5, generator=generator))])
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = sum(weight.square().sum() / 2 for weight in self.parameters())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_seed_of_another_test() -> Iterator[None]:
    """Lightning keeps a seed in the environment, from where the next run would take it."""
    before = os.environ.get("PL_GLOBAL_SEED")
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    if before is not None:
        os.environ["PL_GLOBAL_SEED"] = before


@pytest.fixture
def loader() -> DataLoader:
    """Eight batches of four rows with three numbers each."""
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(32, 3, generator=generator)), batch_size=4)


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, object]:
    """Trainer arguments for a short silent run on the CPU."""
    return {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
