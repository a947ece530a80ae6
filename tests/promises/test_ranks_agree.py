"""Promise 4: two processes take the same decisions, also when something is odd on one of them."""

import pytest
import torch

from lightning_diag.records import read_run
from tests.promises.jobs import ODD_STEP, train_odd_rank
from tests.promises.modes import DISTRIBUTED
from tests.promises.processes import needs_fork, run_ranks

pytestmark = [pytest.mark.distributed, needs_fork]

EPOCHS = 4
# six batches, shared by two
IN_EPOCH = 3
BATCHES = EPOCHS * IN_EPOCH


def train(mode, kind, folder, interval=1, epochs=EPOCHS):
    # a hang is what this is about: far longer than such a training takes
    run_ranks(train_odd_rank, mode, kind, interval, epochs, folder, timeout=45)
    left = [torch.load(folder / f"left_{rank}.pt", weights_only=False) for rank in range(2)]
    assert [one["step"] for one in left] == [epochs * IN_EPOCH] * 2
    grad = read_run(folder / "run").grad
    whole = grad.filter(grad["component"].is_null())
    return left, {row["step"]: row for row in whole.to_dicts()}


@pytest.mark.parametrize("mode", DISTRIBUTED)
def test_rows_are_those_of_the_whole_gradient(mode, tmp_path):
    left, rows = train(mode, "nothing", tmp_path)
    assert list(rows) == list(range(BATCHES))
    for step, row in rows.items():
        assert row["global_norm"] == pytest.approx(left[0]["norms"][step], rel=1e-5)
    assert not left[0]["told"] + left[1]["told"]


@pytest.mark.parametrize("kind", ["data", "gradient"])
@pytest.mark.parametrize("mode", DISTRIBUTED)
def test_a_value_that_is_odd_on_rank_1(mode, kind, tmp_path):
    left, rows = train(mode, kind, tmp_path)
    assert list(rows) == list(range(BATCHES))
    assert not left[0]["told"] + left[1]["told"]
    assert not any(rows[step]["nonfinite"] for step in range(ODD_STEP))
    if mode == "ddp" and kind == "gradient":
        # replicas are not compared: rank 0 speaks of its own gradient, which was well
        return
    assert rows[ODD_STEP]["has_nan"] == 1
    if kind == "gradient":
        assert rows[ODD_STEP]["nonfinite"] == 1
        assert rows[ODD_STEP]["first_nonfinite"] == "net.head.weight"
    else:
        assert rows[ODD_STEP]["nonfinite"] > 100


@pytest.mark.parametrize("mode", DISTRIBUTED)
def test_an_error_on_rank_1(mode, tmp_path):
    left, rows = train(mode, "error", tmp_path)
    assert len(left[1]["told"]) == 1
    assert "planted on one rank" in left[1]["told"][0]
    if mode == "ddp":
        # replicas measure alone, so that the other goes on
        assert not left[0]["told"]
        assert list(rows) == list(range(BATCHES))
    else:
        assert len(left[0]["told"]) == 1
        assert "rank 1" in left[0]["told"][0]
        assert list(rows) == list(range(ODD_STEP))


def test_a_sum_that_is_still_pending_counts_once(tmp_path):
    left, rows = train("fsdp2", "pending", tmp_path)
    assert not left[0]["told"] + left[1]["told"]
    for step in range(BATCHES):
        assert rows[step]["global_norm"] == pytest.approx(left[0]["norms"][step], rel=1e-5)


def test_an_error_beside_a_pending_sum_leaves_nobody_waiting(tmp_path):
    """Completing the sum is a collective of its own, which the failed rank must enter too."""
    left, rows = train("fsdp2", "pending_error", tmp_path)
    assert len(left[0]["told"]) == len(left[1]["told"]) == 1
    assert list(rows) == list(range(ODD_STEP))


@pytest.mark.parametrize("kind", ["nothing", "slow"])
def test_an_automatic_interval_is_the_same_on_all_ranks(kind, tmp_path):
    """Ranks that measured at different steps would wait for each other forever."""
    left, rows = train("fsdp2", kind, tmp_path, "auto", epochs=25)
    assert not left[0]["told"] + left[1]["told"]
    assert len(rows) >= 3
