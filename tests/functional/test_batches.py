"""How large a batch is, whatever it is made of."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_diag.functional.batches import batch_size, tensors_in

Pair = namedtuple("Pair", ["x", "y"])
ROWS, LABELS = torch.zeros(4, 3), torch.zeros(4)


@dataclass
class Held:
    name: str
    rows: Tensor


class Graphs:
    """As PyTorch Geometric has it: many nodes, fewer graphs."""

    num_graphs = 7
    x = torch.zeros(50, 2)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (ROWS, 4),
        ([ROWS, LABELS], 4),
        ({"text": ["a"], "deep": {"rows": ROWS}}, 4),
        (Pair(ROWS, LABELS), 4),
        (Held("a", ROWS), 4),
        (Graphs(), 7),
        (torch.tensor(3.0), 1),
        ("text", None),
        ([], None),
        (None, None),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


def test_tensors_come_in_order_and_each_time_they_stand_there():
    found = list(tensors_in([ROWS, {"a": (LABELS, None)}, Held("b", ROWS), 3]))
    assert [one is other for one, other in zip(found, [ROWS, LABELS, ROWS], strict=True)] == [
        True
    ] * 3
