"""Do two ranks judge alike, and stop or roll back at the same step, whatever one of them sees?"""

import pytest
import torch

from tests.callbacks.collapse_jobs import ODD_STEP, STEPS, train_ranked
from tests.callbacks.witness import rows
from tests.promises.processes import needs_fork, run_ranks

pytestmark = [pytest.mark.distributed, needs_fork]
MODES = ["ddp", "fsdp2"]


def train(mode, kind, folder, **options):
    # a hang is what this is about: far longer than such a training takes
    run_ranks(train_ranked, mode, kind, options, folder, timeout=60)
    left = [torch.load(folder / f"left_{rank}.pt", weights_only=False) for rank in range(2)]
    events = {row["step"]: row["kinds"] for row in rows(folder / "run", "collapse", event=1)}
    return left, events


@pytest.mark.parametrize("mode", MODES)
def test_numbers_are_those_of_the_whole(mode, tmp_path):
    left, events = train(mode, "nothing", tmp_path)
    assert not events
    assert [one["step"] for one in left] == [STEPS] * 2
    found = rows(tmp_path / "run", "collapse")
    assert [row["step"] for row in found] == [0, 1, 3, 7]
    for row in found:
        assert row["gradient_norm"] == pytest.approx(left[0]["norms"][row["step"]], rel=1e-5)
    # eight rows of each rank
    assert [row["predictions"] for row in found] == [16, 32, 64, 80]


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(mode, tmp_path):
    left, events = train(mode, "loss", tmp_path)
    assert events == dict.fromkeys(range(ODD_STEP, ODD_STEP + 3), "nonfinite_loss")
    assert [one["step"] for one in left] == [ODD_STEP + 3] * 2
    for one in left:
        assert (one["reason"]["rule"], one["reason"]["step"]) == ("nonfinite_loss", ODD_STEP + 2)


@pytest.mark.parametrize(("kind", "ends"), [("classes", 7), ("classes_of_one", STEPS)])
def test_classes_are_those_of_all_ranks(kind, ends, tmp_path):
    left, _ = train("ddp", kind, tmp_path, class_patience_steps=0)
    assert [one["step"] for one in left] == [ends] * 2


@pytest.mark.parametrize("mode", MODES)
def test_both_roll_back(mode, tmp_path):
    options = {"action": "rollback", "snapshot_every_n_steps": 2}
    left, events = train(mode, "data", tmp_path, **options)
    assert list(events) == [ODD_STEP, ODD_STEP + 1, ODD_STEP + 2]
    assert [one["step"] for one in left] == [STEPS] * 2
    assert [one["rates"] for one in left] == [[0.005]] * 2
    (row,) = rows(tmp_path / "run", "collapse", action="rollback")
    assert row["restored_step"] == ODD_STEP
    for one in left:
        assert all(weight.isfinite().all() for weight in one["weights"].values())
    if mode == "ddp":
        for name, weight in left[0]["weights"].items():
            assert torch.equal(weight, left[1]["weights"][name])


@pytest.mark.parametrize("kind", ["gradient_error", "prediction_error"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_on_one_rank_ends_both_and_training_goes_on(mode, kind, tmp_path):
    left, events = train(mode, kind, tmp_path)
    assert [one["step"] for one in left] == [STEPS] * 2
    assert not events
    if mode == "ddp" and kind == "gradient_error":
        # a replica's gradient is not looked at, so that nothing fails
        assert not left[0]["told"] + left[1]["told"]
        return
    assert len(left[0]["told"]) == len(left[1]["told"]) == 1
    assert "it failed on rank 1" in left[0]["told"][0]
    assert "planted on one rank" in left[1]["told"][0]
