"""A model that keeps its own gradients, and what its rows must say, worked out from these alone."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_diag import RunLogger
from lightning_diag.lightning import PACKAGE, Callback, LightningModule, Trainer

Truth = dict[str, Any]


def lightning(name: str) -> ModuleType:
    """A submodule of the Lightning package that is tested."""
    return importlib.import_module(f"{PACKAGE}.{name}")


class Witness(LightningModule):
    """Keeps a copy of every gradient at each optimizer step, before and after clipping.

    An encoder and a head that learn, a layer that is frozen, and one that is never used.
    """

    def __init__(self, lr: float = 0.05, loss_scales: dict[int, float] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 1)
            self.still = nn.Linear(2, 2).requires_grad_(False)
            self.idle = nn.Linear(2, 3)
        self.lr = lr
        self.loss_scales = loss_scales or {}
        self.seen: list[dict[str, Any]] = []
        self.after_clipping: list[dict[str, Tensor]] = []

    def loss(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        return (self.head(self.encoder(x)) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch[0]) * self.loss_scales.get(batch_idx, 1.0)
        self.log("train_loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        inside = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.seen.append(
            {
                "step": self.trainer.fit_loop.epoch_loop._batches_that_stepped,
                "optimizer": self.trainer.optimizers.index(optimizer),
                "scale": scaler.get_scale() if scaler else 1.0,
                "divisor": scaler.get_scale() if scaler and inside else 1.0,
                "gradients": {
                    name: None if p.grad is None else p.grad.detach().to_dense().double().clone()
                    for name, p in self.named_parameters()
                    if id(p) in own
                },
                "trainable": {name: p.requires_grad for name, p in self.named_parameters()},
            }
        )

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.after_clipping.append(
            {n: p.grad.double().clone() for n, p in self.named_parameters() if p.grad is not None}
        )


class NoAutocast(Witness):
    """Computes in single precision whatever the Trainer says, so that scaling alone differs."""

    def loss(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().loss(x)


def fit(
    module: LightningModule,
    callbacks: Callback | list[Callback],
    loader: Any,
    path: Path,
    **arguments: Any,
) -> Trainer:
    """Train silently on the CPU, recording into `path`."""
    ckpt_path = arguments.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": path,
        "logger": RunLogger(path),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(callbacks=callbacks, **(settings | arguments))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def scaler_plugin(scale: float = 1024.0) -> Any:
    """Mixed precision with a real gradient scaler on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    precision = lightning("plugins.precision").MixedPrecision
    return precision("16-mixed", "cpu", scaler=scaler)


def rows(path: Path, prefix: str = "grad", **having: object) -> list[dict[str, Any]]:
    """The recorded rows that have these values."""
    file = Path(path, "records", f"{prefix}.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in found if all(row.get(key) == value for key, value in having.items())]


def statistics(gradients: list[Tensor]) -> Truth:
    """Statistics of all elements together, in double precision NumPy."""
    x = np.concatenate([g.numpy().ravel() for g in gradients]) if gradients else np.empty(0)
    kept = x[np.isfinite(x)]
    found: Truth = {"count": x.size, "nonfinite": int(x.size - kept.size)}
    if not x.size:
        return found | dict.fromkeys(("l2", "rms", "mean", "std", "min", "max"))
    found["l2"] = math.sqrt(math.fsum(kept * kept))
    if kept.size:
        found |= {"rms": math.sqrt((kept * kept).mean()), "mean": kept.mean(), "std": kept.std()}
        found |= {"min": kept.min(), "max": kept.max(), "zeros": (x == 0).mean()}
    return found


def expected_rows(seen: dict[str, Any], parts: dict[str, str]) -> dict[str | None, Truth]:
    """What the rows of one step must say, by component; None is the whole model.

    Args:
        seen: An entry of `Witness.seen`.
        parts: Prefix of a parameter's name to its component.
    """
    gradients = {
        name: None if gradient is None else gradient / seen["divisor"]
        for name, gradient in seen["gradients"].items()
    }
    owner = {
        name: next(part for prefix, part in parts.items() if name.startswith(prefix))
        for name in gradients
    }
    whole_square = statistics([g for g in gradients.values() if g is not None])["l2"] or 0
    found: dict[str | None, Truth] = {}
    for part in [*dict.fromkeys(owner.values()), None]:
        own = {n: g for n, g in gradients.items() if part is None or owner[n] == part}
        there = [g for g in own.values() if g is not None]
        missing = [n for n, g in own.items() if g is None and seen["trainable"][n]]
        broken = [n for n, g in own.items() if g is not None and not g.isfinite().all()]
        truth = statistics(there) | {"tensors": len(there), "missing": len(missing)}
        truth["first_missing"] = missing[0] if missing else None
        truth["first_nonfinite"] = broken[0] if broken else None
        if whole_square:
            truth["share"] = (truth["l2"] or 0) ** 2 / whole_square**2
        found[part] = truth
    norms = [statistics([g])["l2"] for g in gradients.values() if g is not None]
    shares = {part: truth.get("share", 0) for part, truth in found.items() if part is not None}
    everything = [g for g in gradients.values() if g is not None]
    found[None] |= {
        "global_norm": found[None]["l2"],
        "max_norm": max(norms, default=None),
        "min_norm": min(norms, default=None),
        "mean_norm": sum(norms) / len(norms) if norms else None,
        "has_nan": int(any(g.isnan().any() for g in everything)),
        "has_inf": int(any(g.isinf().any() for g in everything)),
        "dominant": max(shares, key=shares.__getitem__) if whole_square else None,
    }
    return found


PARTS = {"encoder": "encoder", "head": "head", "still": "still", "idle": "idle"}


def assert_row(row: dict[str, Any], truth: Truth, *, rel: float = 1e-9) -> None:
    """Every number of `truth` stands in `row`; zeros only where the row has them."""
    for key, want in truth.items():
        if key == "zeros" and key not in row:
            continue
        where = (row["step"], row["component"], key)
        if not isinstance(want, int | float) or isinstance(want, int):
            assert row.get(key) == want, where
            continue
        # mean and deviation may cancel: their error is that of the elements' size
        slack = rel * (truth["rms"] or 0) if key in ("mean", "std") else 0
        slack = max(slack, 3e-8 * (truth["rms"] or 0)) if key == "std" else slack
        assert row[key] == pytest.approx(want, rel=rel, abs=slack), where


def assert_rows(
    path: Path,
    witness: Witness,
    steps: list[int],
    parts: dict[str, str] = PARTS,
    *,
    rel: float = 1e-9,
) -> None:
    """The run has rows of just these steps, and each says what the witness saw."""
    found = rows(path)
    assert sorted({row["step"] for row in found}) == steps
    several = len(witness.trainer.optimizers) > 1
    by_place = {(row["step"], row.get("optimizer"), row["component"]): row for row in found}
    assert len(by_place) == len(found), "a row stands twice"
    checked = 0
    for seen in witness.seen:
        if seen["step"] not in steps:
            continue
        for part, truth in expected_rows(seen, parts).items():
            place = (seen["step"], seen["optimizer"] if several else None, part)
            if place in by_place or not several:
                assert_row(by_place[place], truth, rel=rel)
                checked += 1
    assert checked >= len([row for row in found if row["count"]])
