"""What a training leaves behind, bit by bit, to lay two of them side by side."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_diag.lightning import Callback, LightningModule, Trainer
from tests.promises.modes import MODES
from tests.promises.networks import batches

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "log_every_n_steps": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "logger": False,
}


class Recorder(Callback):
    """Keeps the loss, the rates and the state of every generator after each batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rates = [group["lr"] for x in trainer.optimizers for group in x.param_groups]
        generators = generator_states()
        self.steps.append({"loss": outputs, "rates": rates, "generators": generators})


def seed(number: int = 7) -> None:
    """The same random numbers from here on."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def generator_states() -> dict[str, Any]:
    """The states of the three global generators."""
    name, keys, *rest = np.random.get_state()
    numpy_state = [name, torch.from_numpy(np.asarray(keys).copy()), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}


def train(
    mode: str, folder: Path, callbacks: Iterable[Callback] = (), **trainer_options: Any
) -> tuple[dict[str, Any], Trainer]:
    """Train in one of the modes from the same seed, and say what it leaves behind."""
    chosen, recorder = MODES[mode], Recorder()
    seed()
    module = chosen.module()
    options = {**QUIET, "default_root_dir": folder, **chosen.trainer(), **trainer_options}
    trainer = Trainer(callbacks=[recorder, *callbacks], **options)
    trainer.fit(module, batches(**chosen.loader), batches(1))
    return {"steps": recorder.steps, **snapshot(trainer, module)}, trainer


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Everything that training has changed, and everything that it should have left alone."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": plain(module.state_dict()),
        "gradients": plain({name: p.grad for name, p in module.named_parameters()}),
        "optimizers": plain([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "generators": generator_states(),
        "global_step": trainer.global_step,
        "module": {
            "attributes": sorted(vars(module)),
            "training": [m.training for m in module.modules()],
            "requires_grad": [p.requires_grad for p in module.parameters()],
        },
        "settings": {
            "grad": torch.is_grad_enabled(),
            "dtype": str(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "anomaly": torch.is_anomaly_enabled(),
        },
    }


def plain(value: Any) -> Any:
    """The same without distributed tensors, which do not outlive their process group."""
    if isinstance(value, DTensor):
        return value.to_local().detach().clone()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two traces are not the same to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))
        return [] if same else [at]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return [f"{at}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [x for key in one for x in differences(one[key], other[key], f"{at}/{key}")]
    if _is_list(one) and _is_list(other):
        if len(one) != len(other):
            return [f"{at}: {len(one)} against {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [x for i, (a, b) in pairs for x in differences(a, b, f"{at}/{i}")]
    return [] if one == other else [f"{at}: {one!r} against {other!r}"]


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    # equal bits, so that a NaN equals itself and 0 does not equal -0
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
