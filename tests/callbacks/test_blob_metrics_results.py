"""Is results.json there after every epoch, whole, true and without doubles?"""

import json

import pytest
import torch

from lightning_diag import GradientHealth
from lightning_diag.callbacks.blob_metrics import BlobMetrics
from lightning_diag.callbacks.blob_results import EpochResults, split_metrics
from lightning_diag.lightning import Callback
from lightning_diag.lightning import callbacks as lightning_callbacks
from tests.callbacks.test_blob_metrics import SEED_KEYS, Denoiser, blobs, results
from tests.callbacks.witness import fit, rows


class Reader(Callback):
    """Follows the file as a monitor does."""

    def __init__(self, path):
        self.path = path / "results.json"
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_idx == 0 and self.path.exists():
            self.seen.append(json.loads(self.path.read_text()))


def test_the_schema_of_the_guide(loader, tmp_path):
    module = Denoiser(lr=0.01)
    arguments = {"max_epochs": 3, "val_dataloaders": loader}
    reader = Reader(tmp_path)
    train(module, [blobs(), GradientHealth(every_n_steps=1), reader], loader, tmp_path, arguments)
    found = results(tmp_path)
    assert list(found) == [
        *("experiment_name", "output_dir", "training_duration_seconds"),
        *("training_history", "final_metrics"),
    ]
    assert found["experiment_name"] == tmp_path.name
    assert found["output_dir"] == str(tmp_path)
    assert 0 < found["training_duration_seconds"] < 60
    history = found["training_history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    losses = [
        row["train_loss_epoch"] for row in rows(tmp_path, "metrics") if "train_loss_epoch" in row
    ]
    for entry, row, loss in zip(history, rows(tmp_path, "blob"), losses, strict=True):
        assert list(entry) == ["epoch", "train", "test", "diagnostics"]
        # what other diagnostics say is no metric of the module
        assert entry["train"] == pytest.approx({"loss": loss, "scaled_loss": 2 * loss})
        assert entry["test"] == {"loss": entry["epoch"] - 1}
        assert set(entry["diagnostics"]) == SEED_KEYS
        assert entry["diagnostics"] == {key: row[key] for key in SEED_KEYS}
    assert found["final_metrics"] == {key: history[-1][key] for key in ("epoch", "train", "test")}
    # complete when the next epoch begins
    assert [len(one["training_history"]) for one in reader.seen] == [1, 2]
    for one in reader.seen:
        assert one["training_history"] == history[: len(one["training_history"])]


def train(module, callbacks, loader, path, arguments):
    validation = arguments.pop("val_dataloaders", None)
    if validation is not None:
        module.val_dataloader = lambda: validation
    return fit(module, callbacks, loader, path, **arguments)


def test_validation_of_another_epoch_is_not_repeated(loader, tmp_path):
    arguments = {"max_epochs": 4, "check_val_every_n_epoch": 2, "val_dataloaders": loader}
    train(Denoiser(lr=0.01), blobs(), loader, tmp_path, {**arguments, "num_sanity_val_steps": 1})
    tests = [entry["test"] for entry in results(tmp_path)["training_history"]]
    assert tests == [{}, {"loss": 1}, {}, {"loss": 3}]


def test_several_pairs(loader, tmp_path):
    pairs = {"a": ["fc1.weight", "fc2.weight"], "b": ["fc2.weight", "fc1.weight"]}
    fit(Denoiser(), blobs(pairs=pairs), loader, tmp_path)
    (entry,) = results(tmp_path)["training_history"]
    one, other = rows(tmp_path, "blob")
    found = entry["diagnostics"]
    assert set(found) == SEED_KEYS | {"pairs"}
    assert found["encoder_std"] == one["encoder_std"] == other["decoder_std"]
    assert found["pairs"]["b"] == {key: other[key] for key in SEED_KEYS}


def test_a_resumed_run_goes_on(loader, tmp_path):
    save = lightning_callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1)
    fit(
        Denoiser(lr=0.01), [blobs(), save], loader, tmp_path,
        max_epochs=3, enable_checkpointing=True,
    )  # fmt: skip
    before = results(tmp_path)
    checkpoint = next(iter((tmp_path / "saved").glob("epoch=1*")))
    diagnostic = blobs()
    fit(Denoiser(lr=0.01), diagnostic, loader, tmp_path, max_epochs=4, ckpt_path=checkpoint)
    after = results(tmp_path)
    history = after["training_history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    assert history[:2] == before["training_history"][:2]
    assert all(entry["train"] for entry in history)
    # the time up to the checkpoint, and what came since
    stored = torch.load(checkpoint, weights_only=False)["callbacks"]
    (state,) = [state for key, state in stored.items() if key.startswith("BlobMetrics")]
    assert 0 < state["train_seconds"] < after["training_duration_seconds"]
    # the same samples again, so the repeated epoch has the same numbers
    time = "computation_time_ms"
    again, first = (
        {key: value for key, value in one[2]["diagnostics"].items() if key != time}
        for one in (history, before["training_history"])
    )
    assert again == first


def test_a_run_from_scratch_starts_the_history_anew(loader, tmp_path):
    for epochs in (3, 1):
        fit(Denoiser(), blobs(), loader, tmp_path, max_epochs=epochs)
        assert len(results(tmp_path)["training_history"]) == epochs


def test_what_was_known_when_training_failed(loader, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Denoiser(), [blobs(), Fails()], loader, tmp_path, max_epochs=3)
    (entry,) = results(tmp_path)["training_history"]
    assert entry["train"]["loss"] > 0
    assert entry["diagnostics"]["n_clusters_dbscan"] == 3


def test_it_can_be_left_out(loader, tmp_path):
    fit(Denoiser(), BlobMetrics(results=False), loader, tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert rows(tmp_path, "blob")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"training_history": [{"a": 1}]}', "null"])
def test_a_broken_file_is_replaced(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    history = EpochResults(tmp_path, 5)
    history.epoch(6)["train"] = {"loss": float("nan")}
    history.write(1.0)
    found = results(tmp_path)
    assert found["training_history"] == [{"epoch": 6, "train": {"loss": None}, "test": {}}]


def test_names_of_metrics():
    metrics = {
        "train_loss": 1.0, "train_loss_step": 2.0, "train_loss_epoch": 1.0, "loss_on": 3.0,
        "val/acc": 4.0, "validation.f1": 5.0, "test_": 6.0, "Train/x": 7.0, "grad/l2": 8.0,
        "last_step": 9.0,
    }  # fmt: skip
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    tensors["val_many"] = torch.zeros(3)
    train, test = split_metrics(tensors, {"grad"}, validated=True)
    assert train == {"loss": 1.0, "loss_on": 3.0, "test_": 6.0, "x": 7.0, "last_step": 9.0}
    assert test == {"acc": 4.0, "f1": 5.0}
    assert split_metrics(tensors, {"grad"}, validated=False) == (train, {})
    assert split_metrics({}, (), validated=True) == ({}, {})
