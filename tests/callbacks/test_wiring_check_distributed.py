"""Do two processes agree on what they see of their replicas?"""

import pytest
import torch

from lightning_diag.rules import diagnose
from tests.callbacks.wiring_cases import wiring
from tests.callbacks.wiring_jobs import ODD_STEP, train_odd
from tests.promises.processes import needs_fork, run_ranks

pytestmark = [pytest.mark.distributed, needs_fork]


def left(folder):
    return [torch.load(folder / f"left_{rank}.pt", weights_only=False) for rank in range(2)]


def test_replicas_that_stay_equal(tmp_path):
    run_ranks(train_odd, "ddp", "none", 4, tmp_path)
    states = wiring(tmp_path / "run", "replica_drift")
    assert [row["state"] for row in states] == ["ok"] * len(states)
    assert [row["step"] for row in states] == [0, 1, 2, 3, 7, 11]
    one, other = (found["weights"] for found in left(tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_replicas_that_come_apart(tmp_path):
    run_ranks(train_odd, "ddp", "drift", 4, tmp_path)
    drift = [one for one in diagnose(tmp_path / "run") if one.rule == "replica_drift"]
    assert [(one.severity, one.component) for one in drift] == [("critical", "body")]
    assert drift[0].first_step == 7 > ODD_STEP
    first = wiring(tmp_path / "run", "replica_drift", step=7)
    assert [row["names"] for row in first] == ["net.body.0.weight"]


@pytest.mark.parametrize("kind", ["error", "error inside"])
def test_a_rank_that_fails_keeps_nobody_waiting(tmp_path, kind):
    run_ranks(train_odd, "ddp", kind, 2, tmp_path)
    found = left(tmp_path)
    assert {one["step"] for one in found} == {12}
    assert all(len(one["told"]) == 1 for one in found)
    assert "failed on rank 1" in found[0]["told"][0]
    assert "planted on one rank" in found[1]["told"][0]


def test_an_interval_of_its_own_choice_is_the_same_everywhere(tmp_path):
    run_ranks(train_odd, "ddp", "none", "auto", tmp_path)
    assert not any(one["told"] for one in left(tmp_path))


def test_shards_are_not_compared(tmp_path):
    run_ranks(train_odd, "fsdp2", "none", 4, tmp_path)
    assert not any(one["told"] for one in left(tmp_path))
    assert {row["state"] for row in wiring(tmp_path / "run", "replica_drift")} == {"unknown"}
    unused = wiring(tmp_path / "run", "unused_parameter")
    assert {row["component"] for row in unused} == {"unused"}
