"""Run folders made by hand, as a run writes them, and a browser."""

import json
import os
import platform
import shutil

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Folder:
    """A run folder that is written into bit by bit."""

    def __init__(self, path):
        self.path = path

    def begin(self, *, status="running", pid=None, planned=100, **more):
        (self.path / "records").mkdir(parents=True, exist_ok=True)
        process = {"host": platform.node(), "pid": os.getpid() if pid is None else pid}
        attempt = {"attempt": 1, "first_step": 0, "started": 1000.0, "process": process}
        info = {"status": status, "planned_steps": planned, "attempts": [attempt], **more}
        (self.path / "run.json").write_text(json.dumps(info))
        return self

    def write(self, prefix, *rows):
        with (self.path / "records" / f"{prefix}.jsonl").open("a") as stream:
            for row in rows:
                stream.write(json.dumps({"epoch": 0, "attempt": 1, "component": None} | row) + "\n")
        return self

    def train(self, first, last, names=("encoder", "head")):
        """Steps of a healthy run, ten by ten."""
        for step in range(first, last, 10):
            time = {"step": step, "time": 1000.0 + step}
            loss = 2.0 / (1 + step / 20)
            self.write("metrics", time | {"train_loss": loss})
            self.write(
                "loss", time | {"first_step": step - 9, "steps": 10, "loss": loss, "lr": 0.1}
            )
            rows = [
                time | {"component": name, "l2": 0.5, "count": 100, "tensors": 2, "missing": 0}
                for name in names
            ]
            whole = {"l2": 0.7, "count": 200, "tensors": 4, "missing": 0, "global_norm": 0.7}
            self.write("grad", *rows, time | whole)
        return self


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "run")


@pytest.fixture
def folders(tmp_path):
    return lambda name: Folder(tmp_path / "sweep" / name)
