"""The ways of training in which every promise must hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch

from lightning_diag.lightning import PACKAGE, LightningModule
from tests.promises.networks import Classifier, Manual, Sharded, TwoOptimizers

_plugins = import_module(f"{PACKAGE}.plugins")
_strategies = import_module(f"{PACKAGE}.strategies")


@dataclass(frozen=True)
class Mode:
    """How to make the module, and what the Trainer and the loader are given."""

    module: Callable[[], LightningModule]
    trainer: Callable[[], Mapping[str, Any]] = dict
    loader: Mapping[str, Any] = field(default_factory=dict)


def _scaler() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return {"plugins": [_plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def _sharded() -> dict[str, Any]:
    strategy = _strategies.ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    return {"strategy": strategy, "devices": 2}


QUICK = {
    "plain": Mode(Classifier),
    "accumulated": Mode(Classifier, partial(dict, accumulate_grad_batches=4)),
    "scaler": Mode(Classifier, _scaler),
    "scaler_overflow": Mode(partial(Classifier, spike_at=2), _scaler),
    "scaler_fused": Mode(partial(Classifier, fused=True, spike_at=2), _scaler),
    "bf16": Mode(Classifier, partial(dict, precision="bf16-mixed")),
    "clip_norm": Mode(Classifier, partial(dict, gradient_clip_val=0.1)),
    "clip_value": Mode(
        Classifier, partial(dict, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    ),
    "no_loss": Mode(partial(Classifier, nothing_at=1)),
    "tied": Mode(partial(Classifier, tied=True)),
    "sparse": Mode(partial(Classifier, sparse=True)),
    "spectral": Mode(partial(Classifier, spectral=True)),
    "bf16_true": Mode(Classifier, partial(dict, precision="bf16-true")),
    "manual": Mode(Manual),
    "two_optimizers": Mode(TwoOptimizers),
}
WORKERS = {"workers": Mode(Classifier, loader={"shuffle": True, "num_workers": 2})}
COMPILED = {
    "aot_eager": Mode(partial(Classifier, backend="aot_eager")),
    "inductor": Mode(partial(Classifier, backend="inductor")),
}
DISTRIBUTED = {
    "ddp": Mode(Classifier, partial(dict, strategy="ddp_find_unused_parameters_true", devices=2)),
    "fsdp2": Mode(Sharded, _sharded),
}
MODES = QUICK | WORKERS | COMPILED | DISTRIBUTED
