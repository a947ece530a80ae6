"""What a batch is, whatever it is made of."""

from collections.abc import Iterator, Mapping

from torch import Tensor

__all__ = ["batch_size"]


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
    first = next(_tensors(batch), None)
    if first is None:
        return None
    return first.shape[0] if first.ndim else 1


def _tensors(batch: object) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
    elif hasattr(batch, "__dataclass_fields__"):
        for name in batch.__dataclass_fields__:
            yield from _tensors(getattr(batch, name, None))
