"""A model whose loss, gradient norm, predictions and labels are planned batch by batch."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.lightning import LightningModule, Trainer
from tests.callbacks.witness import fit, rows

NAN, INF = math.nan, math.inf
Plan = dict[int, float]


def mixed(batch: int, size: int = 8) -> Tensor:
    """Predictions of both classes."""
    generator = torch.Generator().manual_seed(batch)
    classes = (torch.arange(size) + batch) % 2
    noise = torch.rand(size, 2, generator=generator)
    return noise + 2 * nn.functional.one_hot(classes, 2)


def both(batch: int, size: int = 8) -> Tensor:
    """Labels of both classes."""
    return torch.arange(size) % 2


class Still(torch.optim.SGD):
    """Computes the gradients and leaves the weights alone, whatever these are."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        return None if closure is None else closure()


class Planned(LightningModule):
    """The loss of batch i is ``losses[i]`` and its gradient has the norm ``norms[i]``, else 1."""

    def __init__(
        self,
        losses: Plan | None = None,
        norms: Plan | None = None,
        logits: Callable[[int], Tensor | None] = mixed,
        labels: Callable[[int], Tensor | None] = both,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.losses, self.norms = losses or {}, norms or {}
        self.logits, self.labels = logits, labels

    def outputs(self, batch: int) -> dict[str, Any]:
        slope = self.weight[0] - self.weight[0].detach()
        norm = self.norms.get(batch, 1.0)
        norm = norm if math.isfinite(norm) else 1.0
        loss = self.losses.get(batch, 1.0) + (norm * slope if norm else 0 * slope)
        outputs = {"loss": loss, "logits": self.logits(batch), "target": self.labels(batch)}
        return {key: value for key, value in outputs.items() if value is not None}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.outputs(self.trainer.fit_loop.total_batch_idx)

    def on_after_backward(self) -> None:
        norm = self.norms.get(self.trainer.fit_loop.total_batch_idx, 1.0)
        if not math.isfinite(norm):
            self.weight.grad[0] = norm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Still(self.parameters(), lr=0.0)


class _Late:
    """A read that arrives only when somebody waits for it, as from a busy device."""

    def __init__(self, values: Tensor, then: Callable[[Tensor], None]) -> None:
        self.values, self.then = values.clone(), then

    def arrived(self) -> bool:
        return False

    def finish(self) -> float:
        self.then(self.values)
        return 0.0


class Delayed(CollapseStop):
    """Reads its numbers late, as it does on a CUDA device."""

    def read(self, values: Tensor, then: Callable[[Tensor], None], began: Any) -> None:
        self.measured()
        self._pending.append(_Late(values, then))


def batches(count: int = 12) -> DataLoader:
    """So many batches of nothing."""
    return DataLoader(TensorDataset(torch.zeros(count, 1)), batch_size=1)


def train(module: LightningModule, path: Path, **arguments: Any) -> Trainer:
    """Train with a CollapseStop that is given what is one of its arguments."""
    own = set(CollapseStop.__init__.__annotations__) - {"return"}
    stop = CollapseStop(
        **{"on_error": "raise"} | {key: arguments.pop(key) for key in own & arguments.keys()}
    )
    loader = arguments.pop("loader", None) or batches()
    before: Sequence[Any] = arguments.pop("before", ())
    after: Sequence[Any] = arguments.pop("after", ())
    return fit(module, [*before, stop, *after], loader, path, **arguments)


def events(path: Path) -> dict[int, str]:
    """Step to what happened there, of the rows that tell of events."""
    return {row["step"]: row["kinds"] for row in rows(path, "collapse", event=1)}


def notes(path: Path) -> list[str]:
    return [row["message"] for row in rows(path, "notes", diagnostic="CollapseStop")]
