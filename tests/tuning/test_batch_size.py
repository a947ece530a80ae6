"""Real processes train a tiny model: what they tell, and how they end."""

import copy
import os
import re
import resource
import sys
from functools import partial

import pytest
import torch

from lightning_diag.tuning.batch_size import profile_batch_sizes
from lightning_diag.tuning.batch_size_child import EVENTS, checked
from lightning_diag.tuning.batch_size_meter import logged_loss
from tests.tuning import batch_size_jobs as jobs


@pytest.mark.slow
def test_training_is_timed_without_warm_up_and_validation(tmp_path):
    ballast = b"x" * 2**30  # what this process holds must not count for its child
    arguments = {"sleeps": True, "accumulate": 2, "marks": str(tmp_path / "marks")}
    before = copy.deepcopy((arguments, dict(os.environ), sys.path, sys.argv))
    said = []
    (row,) = profile_batch_sizes(
        jobs.make,
        [8, 8],
        epochs=2,
        arguments=arguments,
        output=tmp_path / "new" / "profile.md",
        title="a*b",
        tell=said.append,
    )
    assert (arguments, dict(os.environ), sys.path, sys.argv) == before
    assert (row.batch_size, row.status, row.epochs_completed) == (8, "ok", 2)
    assert row.epoch_samples == (64, 64)
    assert row.largest_batch == 8
    least = 8 * jobs.BATCH
    # the first batch of all, and each validation, sleeps longer than this
    assert all(least <= seconds < jobs.WARM for seconds in row.epoch_seconds)
    assert sum(row.epoch_seconds) / 2 == pytest.approx(row.avg_time_per_epoch)
    assert row.samples_per_second == pytest.approx(64 / row.avg_time_per_epoch)
    assert 64 / jobs.WARM < row.samples_per_second <= 64 / least
    # the weight stays 1: (1 - 2)^2, and accumulation divides nothing
    assert (row.final_train_loss, row.final_test_loss) == (1.0, 1.0)
    assert (row.memory_kind, row.device, row.allocated_gb) == ("resident", "cpu", None)
    assert 0.1 < row.peak_memory_gb < len(ballast) / 1e9
    assert row.device_memory_gb > row.peak_memory_gb
    assert not row.oom_error
    assert row.error_message is None
    text = (tmp_path / "new" / "profile.md").read_text()
    assert text.startswith("# Batch Size Profile: a\\*b\n")
    assert "**Optimal batch size: 8**" in text
    assert said[0] == "batch size 8 ..."
    assert "samples/s" in said[1]
    (mark,) = (tmp_path / "marks").read_text().splitlines()
    pid, parent = map(int, mark.split())
    assert parent == os.getpid()
    assert not alive(pid)


@pytest.mark.slow
def test_memory_that_runs_out_is_a_row_and_larger_sizes_are_skipped():
    small, large, larger = profile_batch_sizes(
        jobs.make, [512, 4, 64], epochs=1, arguments={"eats": 32}, memory_limit_gib=1.25
    )
    assert (small.status, small.batch_size) == ("ok", 4)
    assert small.device_memory_gb == pytest.approx(1.25 * 2**30 / 1e9)
    assert small.peak_memory_gb > 4 * 32 * 2**20 / 1e9
    assert (large.status, large.batch_size, large.oom_error) == ("out of memory", 64, True)
    assert "can't allocate memory" in large.error_message
    assert (large.epochs_completed, large.samples_per_second) == (0, None)
    assert (larger.status, larger.batch_size, larger.oom_error) == ("skipped", 512, False)
    assert "64" in larger.error_message


@pytest.mark.slow
def test_a_killed_process_keeps_its_finished_epochs():
    (row,) = profile_batch_sizes(jobs.make, [16], epochs=5, arguments={"dies_in": 2})
    assert (row.status, row.oom_error, row.epochs_completed) == ("killed", True, 1)
    assert "SIGKILL" in row.error_message
    assert row.samples_per_second > 0
    assert row.final_test_loss == 1.0


@pytest.mark.slow
def test_what_takes_too_long_is_ended():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    (row,) = profile_batch_sizes(jobs.hangs, [8], timeout_s=3)
    assert (row.status, row.oom_error) == ("timeout", False)
    assert row.error_message == "It took longer than 3 seconds."
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (jobs.Job(), "got ('Job',)."),
        (({}, jobs.Job()), "got ('dict', 'Job')."),
        ((jobs.Job(), {}, None), "got ('Job', 'dict', 'NoneType')."),
        (({}, torch.nn.Linear(1, 1), None), "with a LightningModule, got a Linear."),
    ],
)
def test_what_make_returns_is_checked(made, found):
    rule = re.escape("`make` must return (trainer_arguments, module, data)")
    with pytest.raises(TypeError, match=f"^{rule}.*{re.escape(found)}$"):
        checked(made)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu():
    small, large = profile_batch_sizes(
        jobs.make,
        [4, 64],
        epochs=1,
        arguments={"eats": 64, "accelerator": "cuda"},
        memory_limit_gib=2.0,
    )
    assert (small.status, small.memory_kind) == ("ok", "gpu reserved")
    assert small.device == torch.cuda.get_device_name(0)
    assert 4 * 64 * 2**20 / 1e9 < small.allocated_gb <= small.peak_memory_gb < 2.15
    assert (large.status, large.oom_error) == ("out of memory", True)
    assert small.device_memory_gb == pytest.approx(2 * 2**30 / 1e9)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_sizes": []}, "`batch_sizes` must name at least one size, got none."),
        ({"batch_sizes": [8, 0]}, "`batch_sizes` must be whole numbers of at least 1, got 0."),
        ({"batch_sizes": [True]}, "`batch_sizes` must be whole numbers of at least 1, got True."),
        ({"batch_sizes": [1.5]}, "`batch_sizes` must be whole numbers of at least 1, got 1.5."),
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0."),
        ({"memory_limit_gib": 0}, "`memory_limit_gib` must be positive, got 0."),
        ({"timeout_s": -1}, "`timeout_s` must be positive, got -1."),
        ({"spare": 1}, "`spare` must be at least 0 and below 1, got 1."),
    ],
)
def test_numbers_out_of_their_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        profile_batch_sizes(**{"make": jobs.make, "batch_sizes": [8], **changed})


@pytest.mark.parametrize(
    "make",
    [lambda batch_size: None, partial(jobs.make, samples=8), jobs.Job().configure_optimizers],
    ids=["lambda", "partial", "method of an object"],
)
def test_what_a_new_process_cannot_import_is_refused(make):
    with pytest.raises(TypeError, match=r"^`make` must be a function at the top of a file"):
        profile_batch_sizes(make, [8])


def test_arguments_are_those_that_json_knows():
    with pytest.raises(TypeError, match=r"^`arguments` must be of types that JSON knows, got "):
        profile_batch_sizes(jobs.make, [8], arguments={"samples": object()})


def test_a_call_in_one_of_its_own_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(EVENTS, str(tmp_path / "events"))
    with pytest.raises(RuntimeError, match=r'under `if __name__ == "__main__":`'):
        profile_batch_sizes(jobs.make, [8])
    assert "unguarded" in (tmp_path / "events").read_text()


@pytest.mark.parametrize(
    "name", ["val_loss", "val/loss", "valid_loss", "test_loss", "val_loss_epoch"]
)
def test_a_loss_is_found_under_its_usual_names(name):
    metrics = {"train_loss": torch.tensor(3.0), "val_f1": torch.tensor(2.0)}
    assert logged_loss(metrics) is None
    assert logged_loss({**metrics, name: torch.tensor(0.5)}) == 0.5
    assert logged_loss(metrics, ("train",)) == 3.0
