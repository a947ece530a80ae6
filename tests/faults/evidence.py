"""What a trained network does to one batch, by hooks and plain arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.faults.witness import Witness


def seen(witness: Witness, wanted: type[nn.Module] | str, *, inputs: bool = False) -> list[Tensor]:
    """What the modules of a kind, or of a name, gave (or took) on the first batch, after training.

    Args:
        witness: Who saw the run.
        wanted: A class of modules, or the name of one.
        inputs: Whether what they took is asked for.
    """
    model, found, hooks = witness.model, [], []
    assert model is not None

    def keep(module: nn.Module, taken: Any, given: Any) -> None:
        found.append((taken[0] if inputs else given).detach().float())

    for name, module in model.named_modules():
        if name == wanted or (isinstance(wanted, type) and isinstance(module, wanted)):
            hooks.append(module.register_forward_hook(keep))
    try:
        answer(witness)
    finally:
        for hook in hooks:
            hook.remove()
    assert found, f"nothing ran as {wanted}"
    return found


def answer(witness: Witness, batch: Sequence[Tensor] | None = None) -> Tensor:
    """What the network says to a batch (the first one), after training."""
    assert witness.model is not None
    *inputs, _ = witness.batch if batch is None else batch
    with torch.no_grad():
        return witness.model(*inputs)


def silent_units(outputs: Sequence[Tensor], images: bool = False) -> float:
    """Share of units that are zero for every sample of the batch."""
    flat = [x.transpose(1, -1).flatten(0, -2) if images else x.flatten(0, -2) for x in outputs]
    dead = sum(int((x == 0).all(0).sum()) for x in flat)
    return dead / sum(x.shape[-1] for x in flat)


def share(outputs: Sequence[Tensor], true: Callable[[Tensor], Tensor]) -> float:
    """Share of elements of which something is true."""
    return sum(int(true(x).sum()) for x in outputs) / sum(x.numel() for x in outputs)


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between two different rows."""
    rows = torch.nn.functional.normalize(x.flatten(1).double(), dim=1, eps=1e-300)
    n = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1)))


def spread(x: Tensor) -> float:
    """Standard deviation over the samples, over the root mean square of all elements."""
    x = x.flatten(1).double()
    return float(x.std(0).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-300))


def states(witness: Witness, key: str) -> tuple[Tensor, Tensor]:
    """A parameter before and after training."""
    return witness.first[key], witness.last[key]
