"""What is in a batch or an output, whatever it is made of."""

from collections.abc import Iterator, Mapping

from torch import Tensor

__all__ = ["batch_size", "tensors_in"]


def batch_size(batch: object) -> int | None:
    """Number of samples in a batch: the first dimension of its first tensor; None without one.

    A batch of graphs is as large as the number of its graphs (``num_graphs``).

    Example:
        >>> import torch
        >>> batch_size({"x": [torch.zeros(4, 3)], "y": torch.zeros(4)}), batch_size("text")
        (4, None)
    """
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    first = next(tensors_in(batch), None)
    if first is None:
        return None
    return first.shape[0] if first.ndim else 1


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a value: alone, or in tuples, lists, mappings, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from tensors_in(inside)
    elif isinstance(value, tuple | list):
        for inside in value:
            yield from tensors_in(inside)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))
