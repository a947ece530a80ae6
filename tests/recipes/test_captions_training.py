"""Does it learn from glyphs, and do the diagnostics name the transformer that is skipped?"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_diag import (
    Components,
    LatentStats,
    RunLogger,
    WiringCheck,
    diagnose,
    read_run,
)
from lightning_diag.lightning import Callback, Trainer
from recipes.captions.baselines import caption_baselines, image_baselines
from recipes.captions.data import CaptionsData
from recipes.captions.model import CaptionAutoencoder

CONF = Path(__file__).parents[2] / "conf"
PARTS = OmegaConf.to_container(OmegaConf.load(CONF / "components" / "captions.yaml"))


@pytest.fixture(scope="module")
def data() -> CaptionsData:
    data = CaptionsData(batch_size=32)
    data.setup("fit")
    return data


def small(**arguments) -> CaptionAutoencoder:
    torch.manual_seed(0)
    sizes = {"image_width": 8, "latent": 16, "text_width": 32, "text_heads": 2, "text_layers": 1}
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    return CaptionAutoencoder(**{**sizes, "optimizer": optimizer, "dropout": 0.0, **arguments})


class Logged(Callback):
    """What the module logged at each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def test_a_short_training_lowers_the_losses(data, quiet):
    logged = Logged()
    model = small()
    trainer = Trainer(
        **{**quiet, "max_epochs": 2},
        limit_train_batches=40,
        limit_val_batches=3,
        logger=False,
        callbacks=[logged],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    trainer.fit(model, datamodule=data)
    assert len(logged.steps) == 80
    first, last = logged.steps[0], logged.steps[-1]
    assert last["loss_caption"] < 0.6 * first["loss_caption"]
    assert last["loss_image"] < 0.7 * first["loss_image"]
    assert last["train_loss"] == pytest.approx(
        20 * last["loss_image"] + last["loss_caption"] + 0.5 * last["loss_alignment"], rel=1e-5
    )
    shares = [last[f"loss_share/{part}"] for part in ("image", "caption", "alignment")]
    assert sum(shares) == pytest.approx(1, rel=1e-5)
    scores = ("image_mse", "image_l1", "caption_accuracy", "caption_perplexity")
    names = ("loss", "loss_image", *scores, "caption_entropy", "caption_exact")
    assert {f"val_{name}" for name in names} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["val_caption_perplexity"] < 100


@pytest.mark.parametrize("skip", [True, False])
def test_wiring_check_names_what_is_skipped(data, quiet, tmp_path, skip):
    model = small(skip_text_decoder=skip)
    run = tmp_path / "run"
    trainer = Trainer(
        **quiet,
        limit_train_batches=14,
        limit_val_batches=1,
        logger=RunLogger(run),
        callbacks=[
            WiringCheck(components=PARTS, every_n_steps=5, on_error="raise"),
            LatentStats("encoder", every_n_steps=5, on_error="raise"),
        ],
    )
    trainer.fit(model, datamodule=data)
    rows = read_run(run).frame("wiring").to_dicts()
    unused = [row for row in rows if row["check"] == "unused_parameter" and row["state"] == "wrong"]
    findings = [one for one in diagnose(run) if one.rank > 0]
    if not skip:
        assert unused == []
        assert findings == []
        return
    assert min(row["step"] for row in unused) <= 1
    assert {row["component"] for row in unused} == {"text_transformer"}
    transformer = sum(weight.numel() for weight in model.text_decoder.transformer.parameters())
    assert {row["parameters"] for row in unused} == {transformer}
    (finding,) = findings
    assert (finding.rule, finding.component) == ("unused_parameter", "text_transformer")
    assert "never called" in finding.message
    assert "teacher forcing" in finding.suggestion


def test_a_checkpoint_holds_the_words_and_brings_back_the_model(data, quiet, tmp_path):
    model = small()
    trainer = Trainer(**quiet, limit_train_batches=2, limit_val_batches=1, logger=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    held = torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert held["CaptionsData"] == {"words": data.vocabulary.words}
    again = CaptionAutoencoder.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    batch = next(iter(data.val_dataloader()))
    torch.testing.assert_close(again.eval()(batch).logits, model.eval()(batch).logits)


# ---- baselines ----


def test_baselines_by_hand():
    train = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [6.0, 6.0]])
    test = torch.tensor([[2.0, 2.0], [4.0, 2.0]])
    found = image_baselines(train, test, ranks=(1, 2))
    assert found["mean"] == pytest.approx(((2 - 2) ** 2 * 3 + (4 - 2) ** 2) / 4)
    assert found["PCA 1"] == pytest.approx((0 + 1 + 0 + 1) / 4)  # along (1, 1)
    assert found["PCA 2"] == pytest.approx(0, abs=1e-9)


def test_the_bigram_by_hand():
    end = 2
    train = [[3, 4, end], [3, 4, end], [3, end]]
    found = caption_baselines(train, [[3, 4, end]], size=5)
    counts = {(None, 3): 3, (3, 4): 2, (4, end): 2}
    totals = {None: 3, 3: 3, 4: 2}
    single = {3: 3, 4: 2, end: 3}
    share = {word: (number + 0.1) / (8 + 0.5) for word, number in single.items()}
    nll = [
        -math.log((n + share[word]) / (totals[before] + 1)) for (before, word), n in counts.items()
    ]
    assert found["bigram perplexity"] == pytest.approx(math.exp(sum(nll) / 3))
    assert found["bigram accuracy"] == 1
    nll = [-math.log(share[word]) for word in (3, 4, end)]
    assert found["unigram perplexity"] == pytest.approx(math.exp(sum(nll) / 3))


# ---- experiments ----


@pytest.mark.parametrize("experiment", ["captions", "captions_full", "captions_skipped_decoder"])
def test_an_experiment_builds_data_and_model(experiment):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", "seed=7", "run_dir=unused"])
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:
            config.hardware[key] = value
    plain = OmegaConf.to_container(config, resolve=True)
    data = instantiate(plain["data"], _convert_="all")
    model = instantiate(plain["model"], _convert_="all")
    assert isinstance(data, CaptionsData)
    assert isinstance(model, CaptionAutoencoder)
    assert data.seed == 7
    assert data.vocabulary_size == model.text_decoder.token.num_embeddings
    assert model.skip_text_decoder == (experiment == "captions_skipped_decoder")
    assert plain["name"] == experiment
    assert plain["callbacks"]["latent_stats"]["module"] == "encoder"
    assert "hardware_monitor" in plain["callbacks"]
    assignment = Components(plain["components"]).assign(model)
    assert assignment.names == list(PARTS)
    assert all(assignment.parameters.values())
    assert assignment.notes == []
