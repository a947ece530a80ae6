"""The model trains, its metrics are counted, and the exclusive or tells losses apart."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_diag import GradientHealth, RunLogger, UpdateRatio, diagnose
from lightning_diag.functional.contrastive import contrastive_loss, line_logits
from lightning_diag.lightning import Trainer
from recipes.modalities.batches import Batch
from recipes.modalities.data import ModalitiesData
from recipes.modalities.model import ACTIVATIONS, ViewContrast
from recipes.modalities.xor import XorData

SIZES = {"a": 5, "b": 7, "c": 3}


def tiny(**arguments) -> ViewContrast:
    torch.manual_seed(0)
    small = {"view_sizes": SIZES, "features": 8, "hidden": 12, "layers": 1}
    return ViewContrast(**{**small, **arguments})


def batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(size, width, generator=generator) for width in SIZES.values())
    return Batch(views, torch.zeros(size, dtype=torch.long))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name):
    model = tiny(activation=name)
    kinds = {"gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "relu": nn.ReLU}
    kinds["leaky_relu"] = nn.LeakyReLU
    assert isinstance(model.encoders["a"][1], kinds[name])


def test_lengths():
    for length, want in (("unit", 1.0), ("mip", 8 ** (1 / 2 - 1 / 3))):
        for features in tiny(length=length)(batch().views):
            torch.testing.assert_close(features.norm(dim=-1), torch.full((6,), want))
    free = tiny(length="free")
    torch.testing.assert_close(free(batch().views)[0], free.encoders["a"](batch().views[0]))


def test_linear_encoders():
    assert [type(part) for part in tiny(layers=0).encoders["a"]] == [nn.Linear]


@pytest.mark.parametrize("similarity", ["mip", "norm", "leave_one_out", "gram", "pairwise"])
@pytest.mark.parametrize("negatives", ["lines", "shuffle", "full"])
def test_every_objective_trains(similarity, negatives, quiet):
    if similarity == "pairwise" and negatives != "lines":
        with pytest.raises(ValueError, match='`negatives` must be "lines" with "pairwise"'):
            tiny(similarity=similarity, negatives=negatives)
        return
    model = tiny(view_sizes=None, similarity=similarity, negatives=negatives)
    data = XorData(bits=4, samples=32, batch_size=8, gallery_size=16)
    Trainer(**{**quiet, "max_steps": 3, "max_epochs": -1}, logger=False).fit(model, data)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert model.hparams["view_sizes"] == {f"view_{k}": 4 for k in range(3)}


def test_the_loss_is_the_contrastive_one():
    model = tiny(similarity="gram")
    features = model(batch().views)
    found = model._contrast(features, 0).loss
    want = contrastive_loss(features, similarity="gram", logit_scale=1 / 0.07).loss
    torch.testing.assert_close(found, want)


def test_shuffles_differ_from_batch_to_batch_and_repeat():
    model = tiny(negatives="shuffle", similarity="mip")
    features = model(batch().views)
    first, second, again = (model._contrast(features, index).loss for index in (0, 1, 0))
    assert first == again
    assert first != second


@pytest.mark.parametrize("similarity", ["norm", "pairwise"])
def test_metrics_are_counted_over_a_gallery(similarity, quiet):
    data = ModalitiesData(n_views=3)
    model = tiny(view_sizes=None, similarity=similarity)
    (found,) = Trainer(**quiet, logger=False).test(model, data, verbose=False)
    features = [[], [], []]
    hits = torch.zeros(3)
    for gallery in data.test_dataloader():
        features = model.eval()(gallery.views)
        for k in range(3):
            for b in range(180):
                others = sum(features[i][b] for i in range(3) if i != k)
                scores = (others + features[k]).norm(dim=-1)
                hits[k] += scores.argmax() == b
    names = ["left", "right", "spectrum"]
    assert [found[f"test_recall_1_{name}"] for name in names] == pytest.approx(
        (hits / 360).tolist()
    )
    assert found["test_recall_1"] == pytest.approx(hits.mean().item() / 360)
    assert found["test_recall_1_chance"] == pytest.approx(1 / 180)
    assert found["test_recall_5"] >= found["test_recall_1"]


def test_pairwise_sorts_as_the_sum_of_cosines():
    features = tiny()(batch().views)
    for k, lines in enumerate(line_logits(features, "norm")):
        cosines = sum(features[i] @ features[k].T for i in range(3) if i != k)
        assert torch.equal(lines.argsort(-1), cosines.argsort(-1))


def test_a_checkpoint_needs_no_data(tmp_path, quiet):
    model = tiny(view_sizes=None)
    trainer = Trainer(**{**quiet, "max_steps": 1}, logger=False)
    trainer.fit(model, XorData(bits=4, samples=32, batch_size=8, gallery_size=16))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ViewContrast.load_from_checkpoint(
        tmp_path / "model.ckpt", map_location="cpu", weights_only=True
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_names_of_files_become_names_of_modules():
    model = tiny(view_sizes={"b.sound": 5, "values": 7, "c": 3})
    assert list(model.encoders) == ["b_sound", "values_view", "c"]
    assert len(model(batch().views)) == 3


def test_the_temperature_has_a_limit():
    model = tiny(temperature=0.05, max_logit_scale=50)
    assert model.temperature().item() == pytest.approx(20)
    with torch.no_grad():
        model.temperature.logit_scale.fill_(9.0)
    assert model.temperature().item() == pytest.approx(50)
    assert model.temperature.diagnostics()["logit_scale"].item() == pytest.approx(50)


def test_parts_have_rates_of_their_own(quiet):
    model = tiny(view_sizes=None, component_lrs={"temperature": 0.1})
    Trainer(**{**quiet, "max_steps": 1}, logger=False).fit(
        model, XorData(bits=4, samples=32, batch_size=8, gallery_size=16)
    )
    rates = sorted(group["initial_lr"] for group in model.optimizers().param_groups)
    assert rates == pytest.approx([2e-4, 2e-3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "cosine"}, "`similarity` must be one of .*'pairwise'.*, got 'cosine'"),
        ({"negatives": "all"}, "`negatives` must be one of"),
        ({"length": "long"}, "`length` must be one of .*'mip'.*, got 'long'"),
        ({"activation": "tanh"}, "`activation` must be one of .*'mish'.*, got 'tanh'"),
        ({"features": 0}, "`features` must be at least 1, got 0"),
        ({"layers": -1}, "`layers` must be at least 0, got -1"),
        ({"temperature": 0.001}, "`temperature` must be at least 1 / `max_logit_scale`"),
        ({"view_sizes": {"a": 3}}, "`view_sizes` must name at least 2 views, got"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_sizes_must_come_from_somewhere(quiet):
    with pytest.raises(ValueError, match="`view_sizes` must be given where the data module"):
        Trainer(**quiet, logger=False).fit(tiny(view_sizes=None), [batch()])


def test_without_an_end_there_is_no_schedule(quiet):
    trainer = Trainer(**{**quiet, "max_epochs": -1}, logger=False)
    data = XorData(bits=4, samples=32, batch_size=8, gallery_size=16)
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps` must be given"):
        trainer.fit(tiny(view_sizes=None), data)


def _xor(quiet, epochs, **arguments) -> dict[str, float]:
    torch.manual_seed(0)
    model = ViewContrast(
        optimizer=partial(torch.optim.AdamW, lr=3e-2), layers=0, features=32, **arguments
    )
    data = XorData(bits=12, samples=2048, gallery_size=128, batch_size=128)
    settings = {**quiet, "max_epochs": epochs, "check_val_every_n_epoch": epochs}
    trainer = Trainer(**settings, logger=False)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    return found


@pytest.mark.slow
def test_the_product_solves_the_exclusive_or(quiet):
    found = _xor(quiet, 12, similarity="mip", length="mip")
    assert found["test_recall_1"] > 0.9
    assert found["test_loss"] < 0.3 * math.log(128)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["pairwise", "norm"])
def test_pairs_cannot_see_the_exclusive_or(similarity, quiet):
    found = _xor(quiet, 8, similarity=similarity)
    # chance is 1/128, and three galleries of it have a deviation of 1/128 / sqrt(3)
    assert found["test_recall_1"] < 4 / 128
    assert found["test_loss"] > 0.99 * math.log(128)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "rules"), [("unit", {"vanishing_gradient"}), ("mip", set())])
def test_the_diagnostics_find_what_starves(length, rules, quiet, tmp_path):
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = ViewContrast(
        optimizer=sgd, similarity="mip", length=length, features=512, hidden=32, layers=1
    )
    data = ModalitiesData(n_views=6)
    settings = {**quiet, "max_epochs": 4, "gradient_clip_val": 1.0}
    trainer = Trainer(
        **settings,
        logger=RunLogger(tmp_path / "run"),
        callbacks=[GradientHealth(every_n_steps=3), UpdateRatio(every_n_steps=3)],
    )
    trainer.fit(model, data)
    found = {one.rule for one in diagnose(tmp_path / "run") if one.severity != "info"}
    assert found & {"vanishing_gradient"} == rules
    chance = math.log(180)
    loss = trainer.callback_metrics["val_loss"].item()
    assert (loss > 0.999 * chance) == (length == "unit")
