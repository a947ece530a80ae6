"""The two-layer net: its formula, its losses, its weight pairs, and what it is configured to."""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_diag import BlobMetrics, Components, RunLogger
from lightning_diag.functional.blob_metrics import sample_pairs
from lightning_diag.lightning import Trainer
from recipes.denoiser.data import DenoiserData
from recipes.denoiser.losses import denoising_loss
from recipes.denoiser.model import TwoLayerNet, lr_factor
from recipes.denoiser.sgld import SGLD

CONF = Path(__file__).parents[2] / "conf"


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _vectors(rows=7, features=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = (torch.rand(rows, features, generator=generator) < 0.3).float()
    return torch.randn(rows, features, generator=generator), clean


def _net(**arguments):
    return TwoLayerNet(**{"features": 4, "hidden": 3, **arguments})


def test_the_forward_pass_is_the_formula():
    net = _net()
    for seed, parameter in enumerate(net.parameters()):
        parameter.data = _random(*parameter.shape, seed=seed)
    encoder, b, decoder, c = (p.detach().double().numpy() for p in net.parameters())
    x = _random(5, 4, seed=9)
    expected = np.zeros((5, 4))
    for n in range(5):
        for k in range(4):
            for i in range(3):
                inside = sum(encoder[i, j] * x[n, j].item() for j in range(4)) + b[i]
                expected[n, k] += decoder[k, i] * math.tanh(inside) ** 3
            expected[n, k] += c[k]
    torch.testing.assert_close(
        net(x).detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6
    )


def test_a_pair_of_weights_carries_one_feature_through_one_unit():
    net = _net()
    for parameter in net.parameters():
        parameter.data.zero_()
    i, j = 2, 1
    net.fc1.weight.data[i, j], net.fc2.weight.data[j, i] = 0.7, -1.5
    x = _random(6, 4)
    expected = torch.zeros(6, 4)
    expected[:, j] = -1.5 * torch.tanh(0.7 * x[:, j]) ** 3
    torch.testing.assert_close(net(x).detach(), expected)


def test_the_diagnostic_sees_these_pairs():
    net = _net()
    encoder, decoder = net.fc1.weight.detach(), net.fc2.weight.detach()
    found = sample_pairs(encoder, decoder, 12, torch.Generator().manual_seed(0))
    pairs = {(encoder[i, j].item(), decoder[j, i].item()) for i in range(3) for j in range(4)}
    assert {tuple(pair) for pair in found.tolist()} == pairs


def test_the_first_weights_are_xaviers_times_the_scale_and_biases_are_zero():
    net = TwoLayerNet(features=300, hidden=200, encoder_scale=0.03, decoder_scale=0.5)
    for layer, scale in ((net.fc1, 0.03), (net.fc2, 0.5)):
        # 60,000 numbers: the deviation is known to 0.3 %
        assert abs(layer.weight.std().item() / (scale * math.sqrt(2 / 500)) - 1) < 0.015
        assert not layer.bias.any()


def _expected(denoised, clean, loss, on, off, power):
    """The three losses and the two sums in double precision, vector by vector."""
    y, x = denoised.double().numpy(), clean.double().numpy()
    values, sums = [], []
    for row, truth in zip(y, x, strict=True):
        error = np.abs(row - truth)
        size = error**power if loss == "lp" else error**2
        weighted = np.where(truth != 0, on, off) * size
        values.append(
            len(row) * np.log(np.exp(weighted).sum()) if loss == "logistic" else weighted.sum()
        )
        sums.append((size[truth != 0].sum(), size[truth == 0].sum()))
    return [np.mean(values), *np.mean(sums, axis=0)]


@pytest.mark.parametrize("loss", ["scaled", "lp", "logistic"])
@given(
    seed=st.integers(0, 1000),
    on=st.floats(0, 20),
    off=st.floats(0, 5),
    power=st.floats(1, 4),
)
@settings(max_examples=25)
def test_a_loss_is_its_formula(loss, seed, on, off, power):
    denoised, clean = _vectors(seed=seed)
    found = denoising_loss(denoised, clean, loss=loss, lambda_on=on, lambda_off=off, power=power)
    expected = _expected(denoised, clean, loss, on, off, power)
    np.testing.assert_allclose([value.item() for value in found], expected, rtol=1e-4, atol=1e-6)


def test_lp_with_two_is_scaled():
    denoised, clean = _vectors()
    for a, b in zip(
        denoising_loss(denoised, clean),
        denoising_loss(denoised, clean, loss="lp", power=2.0),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_logistic_is_finite_where_the_exponentials_are_not():
    found = denoising_loss(torch.full((1, 4), 30.0), torch.eye(4)[:1], loss="logistic")
    assert torch.isfinite(found.scaled)
    torch.testing.assert_close(found.scaled, torch.tensor(4 * 16 * 29.0**2))


def test_values_other_than_one_are_on_as_well():
    clean = torch.tensor([[0.0, 0.5, -2.0]])
    found = denoising_loss(torch.zeros(1, 3), clean)
    assert (found.on.item(), found.off.item()) == (4.25, 0.0)


def test_the_floor_is_what_zeros_cost():
    data = DenoiserData(features=20, ones=3, n_train=40, n_val=40, batch_size=15)
    data.setup("fit")
    clean = data.validation.vectors.clean
    assert denoising_loss(torch.zeros_like(clean), clean).scaled == 16 * 3
    logistic = denoising_loss(torch.zeros_like(clean), clean, loss="logistic").scaled
    expected = 20 * math.log(3 * math.exp(16) + 17)
    torch.testing.assert_close(logistic.item(), expected, rtol=1e-5, atol=0)


def test_the_penalty_is_of_weights_alone():
    net = _net(lambda_encoder=0.5, lambda_decoder=2.0)
    encoder = net.fc1.weight.detach().double().square().sum()
    decoder = net.fc2.weight.detach().double().square().sum()
    before = net.penalty().item()
    assert before == pytest.approx((0.5 * encoder + 2.0 * decoder).item(), rel=1e-5)
    net.fc1.bias.data.fill_(9.0)
    net.fc2.bias.data.fill_(9.0)
    assert net.penalty().item() == before


def test_the_learning_rate_rises_and_then_follows_the_schedule():
    named = {"steps": 100, "warmup_share": 0.1, "final_share": 0.01}
    cosine = [lr_factor(i, schedule="cosine", **named) for i in range(101)]
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.505)
    assert cosine[100] == pytest.approx(0.01)
    constant = [lr_factor(i, schedule="constant", **named) for i in range(101)]
    assert set(constant[9:]) == {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, r"`features` must be at least 1, got 0\."),
        ({"hidden": 0}, r"`hidden` must be at least 1, got 0\."),
        ({"encoder_scale": -1.0}, r"`encoder_scale` must be at least 0, got -1\.0\."),
        ({"decoder_scale": math.nan}, r"`decoder_scale` must be at least 0, got nan\."),
        ({"lambda_encoder": -1.0}, r"`lambda_encoder` must be at least 0, got -1\.0\."),
        ({"lambda_decoder": math.inf}, r"`lambda_decoder` must be at least 0, got inf\."),
        ({"lambda_on": -1.0}, r"`lambda_on` must be at least 0, got -1\.0\."),
        ({"lambda_off": -1.0}, r"`lambda_off` must be at least 0, got -1\.0\."),
        ({"power": 0.5}, r"`power` must be at least 1, got 0\.5\."),
        ({"loss": "mse"}, r"`loss` must be one of \('scaled', 'lp', 'logistic'\), got 'mse'\."),
        ({"schedule": "x"}, r"`schedule` must be one of \('constant', 'cosine'\), got 'x'\."),
        ({"warmup_share": 2.0}, r"`warmup_share` must be between 0 and 1, got 2\.0\."),
        ({"final_share": -0.1}, r"`final_share` must be between 0 and 1, got -0\.1\."),
    ],
)
def test_an_argument_that_breaks_a_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        _net(**arguments)


# ---- training ----


def _fit(quiet, *, callbacks=(), logger=False, epochs=3, data=None, **arguments):
    torch.manual_seed(0)
    given = {"features": 16, "n_train": 1000, "n_val": 200, "batch_size": 50, **(data or {})}
    module = TwoLayerNet(
        **{"features": given["features"], "hidden": 16, "schedule": "cosine", **arguments}
    )
    chosen = {"max_epochs": epochs, "log_every_n_steps": 5}
    trainer = Trainer(**{**quiet, **chosen}, callbacks=list(callbacks), logger=logger)
    trainer.fit(module, datamodule=DenoiserData(**given))
    return module, trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {"lambda_decoder": 0.003},
        {"lambda_decoder": 0.003, "loss": "lp", "power": 1.5},
        {"lambda_decoder": 0.003, "loss": "logistic"},
        {"lambda_decoder": 0.003, "component_lrs": {"fc1": 0.5}},
    ],
)
def test_a_short_training_beats_the_floor(quiet, arguments):
    module, trainer = _fit(quiet, encoder_scale=1.0, decoder_scale=1.0, **arguments)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged["val_scaled_loss"] < 0.6 * logged["val_floor"]
    assert {name.removeprefix("train_") for name in logged if name.startswith("train_")} == {
        "loss",
        "scaled_loss",
        "loss_on",
        "loss_off",
    }
    penalty = module.penalty().item()
    assert logged["val_loss"] == pytest.approx(logged["val_scaled_loss"] + penalty, rel=1e-4)
    if module.hparams["loss"] == "scaled":
        parts = 16 * logged["val_loss_on"] + logged["val_loss_off"]
        assert logged["val_scaled_loss"] == pytest.approx(parts, rel=1e-4)
        assert logged["val_floor"] == pytest.approx(32, rel=1e-5)


def test_validation_is_a_mean_over_all_vectors(quiet):
    module, trainer = _fit(quiet, epochs=1, data={"batch_size": 64})
    vectors = trainer.datamodule.validation.vectors
    found = module.measure(module(vectors.noisy), vectors.clean)
    logged = trainer.callback_metrics["val_scaled_loss"]
    torch.testing.assert_close(logged, found.scaled.detach(), rtol=1e-5, atol=0)


def test_training_with_langevin_dynamics(quiet):
    def make(parameters):
        return SGLD(parameters, lr=1e-3, temperature=1e-3, seed=1)

    runs = [_fit(quiet, epochs=1, optimizer=make)[0] for _ in range(2)]
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_trainings_are_the_same(quiet):
    weights = [_fit(quiet, epochs=1)[0].fc1.weight for _ in range(2)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_component_has_its_learning_rate(quiet, factor):
    _, trainer = _fit(quiet, epochs=1, component_lrs={"fc1": factor}, schedule="constant")
    found = {group["lr"] for group in trainer.optimizers[0].param_groups}
    assert found == {0.02, 0.02 * factor}


def test_a_schedule_without_an_end(quiet):
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps` must be given"):
        _fit({**quiet, "max_steps": -1}, epochs=-1)


# ---- the experiment ----


@pytest.mark.slow
def test_the_small_experiment_forms_three_blobs_where_they_are(quiet, tmp_path):
    config = _composed("denoiser_3blob")
    torch.manual_seed(42)
    data = DenoiserData(**_plain(config["data"]))
    module = instantiate(config["model"], _convert_="all")
    blobs = BlobMetrics(on_error="raise", **_plain(config["callbacks"]["blob_metrics"], "on_error"))
    run = RunLogger(tmp_path / "run")
    trainer = Trainer(
        **{**quiet, "max_epochs": 12}, limit_val_batches=1, callbacks=[blobs], logger=run
    )
    trainer.fit(module, datamodule=data)
    rows = [json.loads(line) for line in (tmp_path / "run/records/blob.jsonl").open()]
    assert len(rows) == 12
    last = rows[-1]
    assert last["n_clusters_dbscan"] == 3
    assert last["silhouette_score"] > 0.8
    assert last["weight_correlation"] > 0.9
    # against a count that knows of no clustering
    encoder, decoder = module.fc1.weight.detach(), module.fc2.weight.detach().T
    centre, *outer = last["cluster_centers"]
    assert max(map(abs, centre)) < 0.02
    for sign, found in zip((-1, 1), sorted(outer), strict=True):
        far = sign * encoder > 0.5
        assert 0.005 < far.float().mean() < 0.04
        assert found[0] == pytest.approx(encoder[far].mean().item(), abs=0.15)
        assert found[1] == pytest.approx(decoder[far].mean().item(), abs=0.04)
        assert (sign * decoder[far] > 0).float().mean() > 0.99


# ---- configuration ----


def _plain(node, *without):
    return {k: v for k, v in node.items() if not k.startswith("_") and k not in without}


def _composed(experiment, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides])
    config.run_dir = "unused"
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:  # what the command fills in by looking at the machine
            config.hardware[key] = value
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", ["denoiser_3blob", "reference_3blob"])
def test_an_experiment_builds_data_and_model(experiment):
    config = _composed(experiment, "seed=7")
    data = instantiate(config["data"], _convert_="all")
    model = instantiate(config["model"], _convert_="all")
    assert isinstance(data, DenoiserData)
    assert isinstance(model, TwoLayerNet)
    assert data.seed == 7
    assert data.features == model.fc1.in_features == model.fc2.out_features
    assert type(model.optimizer(model.parameters())) is torch.optim.Adam
    names = dict(model.named_parameters())
    assert set(config["callbacks"]["blob_metrics"]["pairs"]["denoiser"]) <= set(names)
    assert config["callbacks"]["blob_metrics"]["preset"] == "robust"
    assert config["callbacks"]["latent_stats"]["module"] in dict(model.named_modules())
    assignment = Components(config["components"]).assign(model)
    assert assignment.names == ["encoder", "decoder"]
    assert assignment.notes == []


def test_the_reference_is_the_reference():
    config = _composed("reference_3blob")
    found = {
        "d": config["model"]["features"],
        "h": config["model"]["hidden"],
        "s": config["data"]["ones"],
        "eta2": config["data"]["noise_variance"],
        "n_train": config["data"]["n_train"],
        "n_val": config["data"]["n_val"],
        "seed": config["seed"],
        "init": (config["model"]["encoder_scale"], config["model"]["decoder_scale"]),
        "adam": config["model"]["optimizer"],
        "epochs": config["trainer"]["max_epochs"],
        "batch": config["data"]["batch_size"],
        "steps_an_update": config["trainer"]["accumulate_grad_batches"],
        "lambda": [
            config["model"][f"lambda_{part}"] for part in ("encoder", "decoder", "on", "off")
        ],
        "schedule": (config["model"]["schedule"], config["model"]["warmup_share"]),
        "clip": config["trainer"]["gradient_clip_val"],
        "pairs": config["callbacks"]["blob_metrics"]["sample_size"],
    }
    assert found == {
        "d": 1024,
        "h": 512,
        "s": 2,
        "eta2": 0.005,
        "n_train": 300_000,
        "n_val": 5_000,
        "seed": 42,
        "init": (0.03, 0.03),
        "adam": {
            "_target_": "torch.optim.Adam",
            "_partial_": True,
            "lr": 0.02,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
        },
        "epochs": 20,
        "batch": 10_000,
        "steps_an_update": 1,
        "lambda": [0.0, 0.03, 16.0, 1.0],
        "schedule": ("constant", 0.0),
        "clip": None,
        "pairs": 5_000,
    }


def test_langevin_dynamics_is_an_optimizer_to_choose():
    chosen = _composed("denoiser_3blob", "optimizer=sgld", "optimizer.temperature=1e-4", "seed=7")
    optimizer = instantiate(chosen["model"], _convert_="all").optimizer(_net().parameters())
    assert isinstance(optimizer, SGLD)
    assert optimizer.seed == 7
    assert optimizer.defaults["temperature"] == 1e-4


@pytest.mark.parametrize(
    ("file", "made", "wired"),
    [
        ("data/denoiser.yaml", DenoiserData, {"batch_size", "num_workers", "pin_memory", "seed"}),
        ("model/denoiser.yaml", TwoLayerNet, {"optimizer", "component_lrs", "features"}),
        ("optimizer/sgld.yaml", SGLD, {"params", "seed"}),
    ],
)
def test_the_yaml_repeats_the_arguments_and_their_defaults(file, made, wired):
    written = OmegaConf.to_container(OmegaConf.load(CONF / file), resolve=False)
    assert written.pop("_target_") == f"{made.__module__}.{made.__name__}"
    written.pop("_partial_", None)
    taken = inspect.signature(made).parameters
    assert set(written) == set(taken) - {"params"}
    for name in set(written) - wired:
        assert written[name] == taken[name].default, name
