"""Are replicas that come apart found? They need two processes, so that no `Case` holds them."""

from pathlib import Path

import pytest
import torch

from lightning_diag.rules import diagnose
from tests.faults.replicas import ONSET, train_apart
from tests.promises.processes import needs_fork, run_ranks

pytestmark = [pytest.mark.distributed, needs_fork]


def apart(folder: Path) -> set[str]:
    """Names of the weights that differ between the two processes."""
    one, other = (torch.load(folder / f"weights_{rank}.pt") for rank in range(2))
    return {name for name in one if not torch.equal(one[name], other[name])}


def accused(folder: Path) -> list[tuple[str, int | None]]:
    return [(one.rule, one.first_step) for one in diagnose(folder / "run") if one.rank > 0]


def test_heads_made_by_each_process_for_itself(tmp_path):
    run_ranks(train_apart, "start", tmp_path)
    assert "net.head.weight" in apart(tmp_path)
    rule, step = accused(tmp_path)[0]
    assert rule == "replica_drift"
    assert step is not None
    assert step <= 3


def test_weights_limited_by_one_process_alone(tmp_path):
    run_ranks(train_apart, "clipped", tmp_path)
    assert {"net.features.0.weight", "net.features.3.weight"} <= apart(tmp_path)
    rule, step = accused(tmp_path)[0]
    assert rule == "replica_drift"
    assert step is not None
    assert ONSET <= step <= ONSET + 20


def test_replicas_that_stay_together(tmp_path):
    run_ranks(train_apart, "healthy", tmp_path)
    assert apart(tmp_path) == set()
    assert "replica_drift" not in [rule for rule, _ in accused(tmp_path)]
