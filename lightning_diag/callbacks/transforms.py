"""Calls inside a transform of `torch.func`: their tensors may not be kept until it is over."""

import torch

__all__ = ["PASSED_BY", "inside_transform"]

PASSED_BY = (
    "what runs inside a transform of `torch.func` (such as `vmap`, `grad`) is not looked at."
)


def inside_transform() -> bool:
    """Whether a transform such as `torch.func.vmap` or `torch.func.grad` is under way.

    Every tensor that is made in the meantime may belong to it, whatever it is made of, and is not
    valid any more behind it.
    """
    return torch._C._functorch.maybe_current_level() is not None
