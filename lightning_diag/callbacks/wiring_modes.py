"""Which modules are in evaluation mode while the model trains, and which of them matter."""

from collections.abc import Mapping

from torch import nn

from lightning_diag.callbacks.wiring_tensors import attribute

__all__ = ["NORMS", "eval_mode"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_BATCH_NORMS, *_INSTANCE_NORMS)


def eval_mode(
    modules: Mapping[str, nn.Module], optimized: set[int]
) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """Modules in evaluation mode that behave otherwise in training, with company that learns.

    Args:
        modules: All modules of the model by name, outer ones first.
        optimized: ``id`` of the parameters that optimizers have.

    Returns:
        The outermost containers that are in evaluation mode, and single layers that are so by
        themselves, as somebody sets them on purpose.
    """
    containers: list[tuple[str, nn.Module]] = []
    layers: list[tuple[str, nn.Module]] = []
    covered: set[int] = set()
    for name, module in modules.items():
        if module.training or id(module) in covered:
            continue
        covered.update(id(part) for part in module.modules())
        sensitive = any(_sensitive(part) and not part.training for part in module.modules())
        learning = any(p.requires_grad and id(p) in optimized for p in module.parameters())
        if not sensitive:
            continue
        if next(module.children(), None) is not None:
            containers += [(name, module)] if learning else []
        elif learning:
            layers.append((name, module))
    return containers, layers


def _sensitive(module: nn.Module) -> bool:
    if isinstance(module, (*_BATCH_NORMS, *_INSTANCE_NORMS)):
        return bool(module.track_running_stats)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    dropped = type(module).__name__.lower()
    rate = attribute(module, "p", attribute(module, "drop_prob", 0))
    return "drop" in dropped and isinstance(rate, (int, float)) and rate > 0
