import contextlib
import json
import os
import subprocess
import warnings

import pytest
import torch

from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.records import RunLogger, read_run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    # lazily: a logger that is still alive holds its files open
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave not one byte free."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                return


@contextlib.contextmanager
def one_warning(start):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(one.message) for one in caught if "cannot be written" in str(one.message)]
    assert len(told) == 1
    assert told[0].startswith(f"`{start}")


class Net(LightningModule):
    """Fills the disk before step 40 and frees it before step 80."""

    def __init__(self, disk=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.disk = disk

    def training_step(self, batch, batch_idx):
        if self.disk and self.global_step == 40:
            fill(self.disk)
        if self.disk and self.global_step == 80:
            (self.disk / "ballast").unlink()
        loss = self.w.square().sum() / 2
        self.log("train_loss", loss)
        self.logger and self.logger.log_rows(
            "grad", [{"pad": "x" * 300}], step=self.global_step, epoch=0
        )
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_training_outlives_a_full_disk(small_disk, quiet):
    data = torch.utils.data.DataLoader(torch.zeros(120, 1), batch_size=1)
    plain = Net()
    Trainer(logger=False, **quiet).fit(plain, data)
    watched = Net(small_disk)
    logger = RunLogger(small_disk / "run")
    with one_warning(f"{small_disk}/run/records/"):
        Trainer(logger=logger, log_every_n_steps=1, **quiet).fit(watched, data)
    assert torch.equal(watched.w, plain.w)

    run = read_run(small_disk / "run")
    steps = run.grad["step"].to_list()
    assert [step for step in steps if step < 40] == [*range(40)]
    assert [step for step in steps if step >= 80] == [*range(80, 120)]
    missing = 120 - len(steps)
    assert missing > 20
    assert run.torn.get("grad", 0) <= 1
    assert run.metrics["step"].to_list()[-40:] == [*range(80, 120)]
    assert run.info["status"] == "finished"
    (note,) = run.notes["message"].to_list()
    assert f"{missing} of grad.jsonl" in note


def test_a_torn_row_is_closed_once_there_is_space(small_disk):
    logger = RunLogger(small_disk / "run")
    logger.begin(step=0)
    file = small_disk / "run" / "records" / "grad.jsonl"
    with one_warning(f"{file}` cannot be written (No space left on device): training goes on"):
        for step in range(1000):
            logger.log_rows("grad", [{"pad": "x" * 1000}], step=step, epoch=0)
    written = file.read_bytes()
    assert not written.endswith(b"\n")
    fill(small_disk)
    logger.update_info(data="late")
    logger.log_hyperparams({"lr": 0.1})
    (small_disk / "ballast").unlink(missing_ok=True)
    os.truncate(file, len(written) - 20_000)
    logger.log_rows("grad", [{"pad": "after"}], step=1000, epoch=0)
    logger.finalize("success")
    run = read_run(small_disk / "run")
    assert run.grad["pad"].to_list()[-1] == "after"
    assert run.torn == {"grad": 1}
    assert run.info["data"] == "late"
    assert run.config == {"lr": 0.1}
    assert run.info["status"] == "finished"


def test_a_run_that_begins_on_a_full_disk(small_disk):
    fill(small_disk)
    logger = RunLogger(small_disk / "run")
    with one_warning(f"{small_disk}/run/run.json"):
        logger.begin(step=3, info={"data": "d"})
        logger.note("lost", diagnostic="X")
        logger.log_metrics({"a": 1.0}, step=3)
        logger.log_hyperparams({"lr": 0.1})
        assert set(logger.positions().values()) == {0}
    (small_disk / "ballast").unlink()
    logger.log_metrics({"a": 2.0}, step=4)
    run = read_run(small_disk / "run")
    assert run.metrics["a"].to_list() == [2.0]
    assert run.info["data"] == "d"
    assert run.config == {"lr": 0.1}
    assert [one["first_step"] for one in run.info["attempts"]] == [3]
    assert "1 of notes.jsonl, 1 of metrics.jsonl" in run.notes["message"].item()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_always_full(tmp_path):
    logger = RunLogger(tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "grad.jsonl").symlink_to("/dev/full")
    with one_warning(f"{tmp_path}/records/grad.jsonl"):
        for step in range(3):
            logger.log_rows("grad", [{"a": 1}, {"a": 2}], step=step, epoch=0)
    (tmp_path / "records" / "grad.jsonl").unlink()
    logger.log_rows("grad", [{"a": 3}], step=3, epoch=0)
    run = read_run(tmp_path)
    assert run.grad["a"].to_list() == [3]
    assert run.notes["message"].to_list() == [
        "Rows were lost while the disk took none: 6 of grad.jsonl."
    ]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file stands here")
    logger = RunLogger(tmp_path / "run")
    with one_warning(f"{tmp_path}/run"):
        logger.begin(step=0)
        logger.log_rows("grad", [{}], step=0, epoch=0)
        logger.log_metrics({"a": 1.0}, step=0)
        logger.log_hyperparams({"a": 1})
        logger.update_info(a=1)
        assert logger.positions() == {}
        logger.finalize("success")
    assert (tmp_path / "run").read_text() == "a file stands here"
    (tmp_path / "run").unlink()
    logger.log_rows("grad", [{}], step=1, epoch=0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["a"] == 1
    assert read_run(tmp_path / "run").grad["step"].to_list() == [1]
