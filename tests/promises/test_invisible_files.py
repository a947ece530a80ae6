"""Promise 1, as the user sees it: other loggers, checkpoints and metrics are what they were."""

from importlib import import_module

import pytest

from lightning_diag.lightning import PACKAGE, Callback
from tests.promises.cases import CLASSES, build
from tests.promises.trace import differences, train

loggers = import_module(f"{PACKAGE}.loggers")
callbacks = import_module(f"{PACKAGE}.callbacks")

PREFIXES = tuple(f"{kind.prefix}/" for kind in CLASSES)
LOGGERS = {
    "csv": lambda folder: loggers.CSVLogger(folder, name="mine"),
    "tensorboard": lambda folder: loggers.TensorBoardLogger(folder, name="mine"),
    "both": lambda folder: [LOGGERS["tensorboard"](folder), LOGGERS["csv"](folder)],
    "none": lambda folder: False,
}


class Bystander(Callback):
    """What a user's own callback sees of the loggers while training."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen = [type(trainer.logger).__name__, trainer.log_dir]


def fit(kind, folder, diagnostics):
    checkpoint = callbacks.ModelCheckpoint(monitor="val_loss", save_last=True, save_top_k=2)
    stop = callbacks.EarlyStopping("val_loss", patience=5)
    bystander = Bystander()
    _, trainer = train(
        "plain",
        folder,
        [*diagnostics, checkpoint, stop, bystander],
        logger=LOGGERS[kind](folder),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    return trainer, bystander


def others(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith(PREFIXES)}


def csv_rows(file):
    header, *lines = file.read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    kept = [{key: value for key, value in others(row).items() if value} for row in rows]
    # a row that a diagnostic alone has written still carries its step
    return sorted([sorted(row.items()) for row in kept if row.keys() - {"step", "epoch"}], key=str)


def tensorboard_scalars(file):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(file))
    accumulator.Reload()
    names = sorted(others(dict.fromkeys(accumulator.Tags()["scalars"])))
    return {name: [(e.step, e.value) for e in accumulator.Scalars(name)] for name in names}


def files(folder):
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or "diagnostics/" in name:
            continue
        if file.name == "metrics.csv":
            found[name] = csv_rows(file)
        elif "tfevents" in name:
            found[f"{file.parent.relative_to(folder)}/events"] = tensorboard_scalars(file)
        else:
            found[name] = None if file.suffix == ".ckpt" else file.read_text()
    return found


def what_is_left(kind, folder, diagnostics):
    trainer, bystander = fit(kind, folder, diagnostics)
    chosen = trainer.checkpoint_callback
    logger, log_dir = bystander.seen
    left = {
        "files": files(folder),
        "best": chosen.best_model_path.replace(str(folder), ""),
        "kept": {k.replace(str(folder), ""): v for k, v in chosen.best_k_models.items()},
        "callback_metrics": others(trainer.callback_metrics),
        "progress_bar_metrics": trainer.progress_bar_metrics,
    }
    if kind != "none":
        # without a logger Lightning logs nothing, and what it now logs goes to ours alone
        left |= {"logged": others(trainer.logged_metrics), "logger": logger}
        left["log_dir"] = log_dir.replace(str(folder), "")
    return left


@pytest.mark.parametrize("kind", LOGGERS)
def test_files_metrics_and_checkpoints_of_others(kind, tmp_path):
    without = what_is_left(kind, tmp_path / "without", [])
    assert any(name.endswith("last.ckpt") for name in without["files"])
    assert not differences(without, what_is_left(kind, tmp_path / "with", build("all")))


@pytest.mark.parametrize("kind", LOGGERS)
def test_the_run_stands_beside_the_other_loggers(kind, tmp_path):
    fit(kind, tmp_path, build("all"))
    (run,) = tmp_path.rglob("run.json")
    (last,) = tmp_path.rglob("last.ckpt")
    assert run.parent.parent.parent == last.parent.parent
    assert run.parent.parent.name == "diagnostics"


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_other_loggers_receive_the_own_keys(kind, tmp_path):
    trainer, _ = fit(kind, tmp_path, build("all"))
    own = [key for key in trainer.callback_metrics if key.startswith(PREFIXES)]
    assert own
    text = b"".join(file.read_bytes() for file in (tmp_path / "mine").rglob("*") if file.is_file())
    assert all(key.encode() in text for key in own)
