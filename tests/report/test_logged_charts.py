"""Do loggers get scalars, findings and charts, under the same keys and at the right step?"""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import GradientHealth, HealthAlerts, RunLogger, UpdateRatio
from lightning_diag.report.logged_charts import log_charts
from tests.callbacks.witness import fit, lightning, rows
from tests.conftest import Halving

OURS = ("grad/", "update/", "health/")


class Sick(Halving):
    """The head gets no gradient from step 20 on."""

    def training_step(self, batch, batch_idx):
        alive = float(self.trainer.global_step < 20)
        head = sum(weight.square().sum() / 2 for weight in self.head)
        loss = sum(weight.square().sum() / 2 for weight in self.encoder) + alive * head
        self.log("train_loss", loss)
        return loss


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A training that is logged everywhere, and its charts."""
    pytest.importorskip("wandb")
    import os

    folder = tmp_path_factory.mktemp("logged")
    os.environ["WANDB_SILENT"] = "true"
    kinds = lightning("loggers")
    # W&B and TensorBoard write into their folders, CSV into its own
    loggers = [
        RunLogger(folder / "run"),
        kinds.TensorBoardLogger(folder, name="board"),
        kinds.CSVLogger(folder, name="csv"),
        kinds.WandbLogger(save_dir=folder, offline=True, project="test"),
    ]
    diagnostics = [
        GradientHealth(every_n_steps=3, zeros_every=1),
        UpdateRatio(every_n_steps=5),
        HealthAlerts(every_n_steps=10, console=False, charts=True),
    ]
    loader = DataLoader(TensorDataset(torch.zeros(60, 1)), batch_size=1)
    fit(Sick(), diagnostics, loader, folder, logger=loggers)
    failed = [row["message"] for row in rows(folder / "run", "notes", severity="warning")]
    loggers[3].experiment.finish()
    loggers[1].finalize("success")
    return folder, failed


def from_board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # the writer begins a second file after training has ended
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(folder / "board/version_0"), sizes)
    events.Reload()
    return events


def from_wandb(folder):
    """Rows and alerts of the offline file."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows, alerts = [], []
    for data in offline_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = [*record.history.item, *record.request.partial_history.item]
        keys = [item.key or "/".join(item.nested_key) for item in items]
        values = [json.loads(item.value_json) for item in items]
        rows.append(dict(zip(keys, values, strict=True)))
        if record.HasField("alert"):
            alerts.append(record.alert)
    return rows, alerts


def offline_records(data):
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, records in parts.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, at, parts = 1 << 15, 7, b""
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def scalars_of_board(folder):
    board = from_board(folder)
    return {
        (tag, event.step): event.value
        for tag in board.Tags()["scalars"]
        if tag.startswith(OURS)
        for event in board.Scalars(tag)
    }


def test_every_logger_has_the_same_keys_at_the_same_steps(logged):
    folder, _ = logged
    board = scalars_of_board(folder)
    (file,) = folder.glob("csv/**/metrics.csv")
    table = {
        (key, int(row["step"])): float(value)
        for row in csv.DictReader(file.read_text().splitlines())
        for key, value in row.items()
        if key.startswith(OURS) and value
    }
    cloud = {
        (key, row["trainer/global_step"]): value
        for row in from_wandb(folder)[0]
        for key, value in row.items()
        if key.startswith(OURS) and isinstance(value, int | float)
    }
    assert len(board) > 50
    assert board.keys() == table.keys() == cloud.keys()
    for place, value in board.items():
        assert table[place] == pytest.approx(value, rel=1e-5)
        assert cloud[place] == pytest.approx(value, rel=1e-5)
    # and the steps are those that were measured
    rows = [json.loads(line) for line in (folder / "run/records/grad.jsonl").open()]
    assert {step for key, step in board if key.startswith("grad/")} == {row["step"] for row in rows}
    norms = {row["step"]: row["l2"] for row in rows if row["component"] == "encoder"}
    told = {step: value for (key, step), value in board.items() if key == "grad/encoder/l2"}
    assert told == pytest.approx(norms, rel=1e-5)


def test_findings_are_text_and_alerts(logged):
    folder, _ = logged
    board = from_board(folder)
    texts = [
        event.tensor_proto.string_val[0].decode()
        for event in board.Tensors("health/alert/text_summary")
    ]
    assert any("Dead component: head" in text for text in texts)
    alerts = from_wandb(folder)[1]
    assert any("Dead component" in one.title for one in alerts)
    assert any("Try: " in one.text for one in alerts)


def test_charts_are_pictures_at_the_last_step(logged):
    folder, failed = logged
    assert failed == []
    board = from_board(folder)
    assert {"charts/gradient_flow", "charts/training", "charts/update_ratio"} <= set(
        board.Tags()["images"]
    )
    (image,) = board.Images("charts/gradient_flow")
    assert image.step == 59
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 1000
    (picture,) = folder.glob("wandb/offline-run-*/files/media/images/charts/gradient_flow*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = from_wandb(folder)[0]
    row = next(row for row in rows if any(key.startswith("charts/gradient") for key in row))
    assert row["trainer/global_step"] == 59


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory):
    """The same into a real store of MLflow, and what it gives back."""
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    logger = lightning("loggers").MLFlowLogger(
        "mine",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_location=(folder / "artifacts").as_uri(),
    )
    diagnostics = [
        GradientHealth(every_n_steps=3, zeros_every=1),
        UpdateRatio(every_n_steps=5),
        HealthAlerts(every_n_steps=10, console=False, charts=True),
    ]
    loader = DataLoader(TensorDataset(torch.zeros(60, 1)), batch_size=1)
    fit(Sick(), diagnostics, loader, folder, logger=[RunLogger(folder / "run"), logger])
    return folder, mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db"), logger.run_id


def test_mlflow_keeps_scalars_findings_and_charts(mlflow_run, logged):
    folder, client, run = mlflow_run
    told = {
        (key, one.step): one.value
        for key in client.get_run(run).data.metrics
        if key.startswith(OURS)
        for one in client.get_metric_history(run, key)
    }
    assert told.keys() == scalars_of_board(logged[0]).keys()
    rows = [json.loads(line) for line in (folder / "run/records/grad.jsonl").open()]
    norms = {row["step"]: row["l2"] for row in rows if row["component"] == "encoder"}
    kept = {step: value for (key, step), value in told.items() if key == "grad/encoder/l2"}
    assert kept == pytest.approx(norms)
    texts = [
        Path(client.download_artifacts(run, one.path)).read_text()
        for one in client.list_artifacts(run, "health")
    ]
    assert any("Dead component: head" in text for text in texts)
    pictures = {one.path for one in client.list_artifacts(run, "charts")}
    assert {"charts/gradient_flow.png", "charts/update_ratio.png"} <= pictures
    file = Path(client.download_artifacts(run, "charts/gradient_flow.png"))
    assert file.read_bytes().startswith(b"\x89PNG")


class Mlflow:
    """What Lightning's MLFlowLogger shows of MLflow's client."""

    run_id = "7"

    def __init__(self):
        self.told = []

    @property
    def experiment(self):
        return self

    def log_image(self, run_id, image, artifact_file):
        self.told.append((run_id, image.size, artifact_file))

    def log_text(self, run_id, text, artifact_file):
        self.told.append((run_id, text, artifact_file))


MLFlowLogger = type("MLFlowLogger", (Mlflow,), {})


def test_mlflow_gets_artifacts(logged):
    logger = MLFlowLogger()
    assert log_charts(logged[0] / "run", [logger, object()]) == []
    runs, sizes, files = zip(*logger.told, strict=True)
    assert set(runs) == {"7"}
    assert "charts/gradient_flow.png" in files
    assert min(width for width, _ in sizes) > 1000


def test_a_chart_without_rows_is_not_drawn(tmp_path):
    run = RunLogger(tmp_path)
    run.log_metrics({"train_loss": 1.0}, step=3)
    logger = MLFlowLogger()
    assert log_charts(tmp_path, [logger]) == []
    assert [place for _, _, place in logger.told] == ["charts/training.png"]


def test_a_finding_is_a_text_of_mlflow():
    from types import SimpleNamespace

    from lightning_diag.callbacks.health_channels import send
    from lightning_diag.rules.finding import Finding

    logger = type("Mine", (MLFlowLogger,), {})()
    finding = Finding("dead_component", "critical", "head", 3, 9, message="It is dead.")
    send(SimpleNamespace(loggers=[logger]), finding, 19)
    ((run, text, place),) = logger.told
    assert (run, place) == ("7", "health/alert-19-dead_component.txt")
    assert text.startswith("CRITICAL Dead component: head, since step 3\nIt is dead.")


def test_no_failure_leaves_it(tmp_path, logged):
    class Broken(MLFlowLogger):
        def log_image(self, *arguments):
            raise OSError("no network")

    assert log_charts(logged[0] / "run", [Broken()]) == [
        "MLFlowLogger took no chart: OSError: no network"
    ]
    (line,) = log_charts(tmp_path / "nothing", [MLFlowLogger()])
    assert line.startswith("The charts could not be drawn: ")
    assert log_charts(Path("never looked at"), [object()]) == []
