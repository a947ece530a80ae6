"""Small models, healthy and with one planted fault each, and what a wiring check says of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.callbacks.wiring_check import WiringCheck
from lightning_diag.lightning import LightningModule
from lightning_diag.rules import Finding, diagnose
from tests.callbacks.witness import fit, rows

WIDTH, CLASSES = 6, 4


class Plain(LightningModule):
    """An encoder and a head, a class to tell for each row of numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head = nn.Linear(8, CLASSES)
            self.make()

    def make(self) -> None:
        """For what a case adds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Adapted(Plain):
    """Learns from gradients that `torch.func` takes for each sample by itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weights = dict(self.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            scores = torch.func.functional_call(self, weights, (x[None],))
            return F.cross_entropy(scores, y.long()[None])

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, *batch)
        inner = {name: weights[name] - 0.1 * found[name].mean(0) for name in weights}
        scores = torch.func.functional_call(self, inner, (batch[0],))
        return F.cross_entropy(scores, batch[1])


def data(
    x: Tensor | None = None, y: Tensor | None = None, count: int = 16, size: int = 8
) -> DataLoader:
    """Batches of numbers and classes."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(count * size, WIDTH, generator=generator)
    classes = torch.randint(CLASSES, (count * size,), generator=generator)
    x, y = numbers if x is None else x, classes if y is None else y
    return DataLoader(TensorDataset(x, y), batch_size=size)


def check(**arguments: Any) -> WiringCheck:
    """A look at every fourth step, and an error is an error."""
    return WiringCheck(**{"every_n_steps": 4, "on_error": "raise", **arguments})


def findings(
    module: LightningModule, path: Path, loader: DataLoader | None = None, **arguments: Any
) -> list[Finding]:
    """Train with a wiring check, and diagnose the run."""
    fit(module, check(), loader or data(), path, **arguments)
    return diagnose(path, on_error="raise")


def only(found: list[Finding], severity: str = "warning") -> Finding:
    """The one finding above `info`, and it is as grave as it should be."""
    grave = [one for one in found if one.rank > 0]
    assert len(grave) == 1, grave
    assert grave[0].severity == severity
    return grave[0]


def calm(found: list[Finding]) -> bool:
    """Whether nothing is above `info`."""
    return not [one for one in found if one.rank > 0]


def wiring(path: Path, name: str, **having: object) -> list[dict[str, Any]]:
    """The rows of one check."""
    return rows(path, "wiring", check=name, **having)
