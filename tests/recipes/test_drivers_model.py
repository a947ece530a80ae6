import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error, r2_score
from torch.distributions import Bernoulli, kl_divergence

from lightning_diag import AttentionCapture, Components, RunLogger, read_run
from lightning_diag.lightning import Callback, Trainer
from recipes.drivers.baselines import r_squared
from recipes.drivers.data import DriversData
from recipes.drivers.model import DriversForecaster
from recipes.drivers.network import (
    CelestialToTargetAttention,
    FusionCrossAttention,
    GraphCombiner,
    PatchingComposer,
    StochasticLearner,
)
from recipes.drivers.planted import Edges
from recipes.drivers.scores import ForecastScores, drivers_found
from recipes.drivers.windows import Window

COMPONENTS = [
    "fusion_cross_attention",
    "hierarchical_fusion_proj",
    "celestial_to_target_attention",
    "wave_patching_composer",
    "target_patching_composer",
    "graph_combiner",
    "stochastic_learner",
    "decoder",
]


def tiny(**arguments):
    small = {"width": 8, "fusion_heads": 2, "context": 48, "patches": [12, 24], "dropout": 0.0}
    return DriversForecaster(**{**small, "horizon": 6, **arguments})


def batch(size=5, context=48, bodies=13, features=1, targets=4, horizon=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Window(
        torch.randn(size, context, bodies, features, generator=generator),
        torch.randn(size, context, targets, generator=generator),
        torch.randn(size, horizon, targets, generator=generator),
    )


def settled(model):
    """In evaluation mode, with the statistics of values as they are after some training."""
    model.train()
    with torch.no_grad():
        for seed in range(20):
            model(batch(64, seed=seed))
    return model.eval()


def tiny_data(**arguments):
    return DriversData(**{"hours": 700, "context": 48, "horizon": 6, "batch_size": 32, **arguments})


# ---- shapes and names ----


def test_the_eight_components_hold_every_parameter():
    model = DriversForecaster()
    named = [name for name, child in model.named_children() if list(child.parameters())]
    assert sorted(named) == sorted(COMPONENTS)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == set(COMPONENTS)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bodies": 10, "features": 5, "targets": 1},
        {"heads": 4, "fusion_heads": 4},
        {"context": 50, "patches": [7, 24]},
        {"patches": []},
    ],
)
def test_shapes(sizes):
    model = tiny(**sizes)
    given = {
        key: sizes[key] for key in ("bodies", "features", "targets", "context") if key in sizes
    }
    window = batch(3, **given)
    forecast = model(window)
    assert forecast.future.shape == window.future.shape
    heads, targets, bodies = sizes.get("heads", 1), window.future.shape[2], window.drivers.shape[2]
    assert forecast.attention.shape == (3, heads, targets, bodies)
    torch.testing.assert_close(forecast.attention.sum(-1), torch.ones(3, heads, targets))
    forecast.future.sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "`heads` must be at least 1 and divide `width`, got 3 and 8."),
        ({"fusion_heads": 0}, "`fusion_heads` must be at least 1 and divide `width`, got 0 and 8."),
        (
            {"patches": [48]},
            "`patches` must be at least 1 and shorter than `context`, got [48] and",
        ),
        ({"noise": -1.0}, "`noise` must be at least 0, got -1.0."),
        ({"warmup_share": 2.0}, "`warmup_share` must be between 0 and 1, got 2.0."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**arguments)


# ---- the components ----


def test_patches_by_hand():
    composer = PatchingComposer(2, 3, 10, [4], 5)
    x = torch.randn(2, 10, 2, 3)
    tokens = composer(x)
    assert tokens.shape == (2, 2, 1 + 2, 5)
    whole, quarter = composer.embed
    for node in range(2):
        series = x[1, :, node]
        cuts = [whole(series.flatten()), quarter(series[2:6].flatten())]
        cuts.append(quarter(series[6:10].flatten()))
        expected = torch.stack(cuts) + composer.place + composer.node[node]
        torch.testing.assert_close(tokens[1, node], expected)


def test_fusion_hands_on_the_window_its_mean_and_deviation_and_what_it_found():
    fusion = FusionCrossAttention(8, 2, 0.0)
    tokens = torch.randn(3, 4, 5, 8)
    base, mean, deviation, found = fusion(tokens).split(8, dim=-1)
    torch.testing.assert_close(base, tokens[:, :, 0])
    torch.testing.assert_close(mean, tokens.mean(2))
    torch.testing.assert_close(deviation, tokens.std(2, correction=0), atol=1e-5, rtol=1e-4)
    one = fusion.key_norm(tokens[2, 3])
    expected, _ = fusion.attention(fusion.query_norm(tokens[2, 3, :1]), one, one)
    torch.testing.assert_close(found[2, 3], expected[0])


def test_the_divergence_is_that_of_bernoulli_variables():
    learner = StochasticLearner(2, 6, expected=1.5)
    with torch.no_grad():
        learner.logits.copy_(torch.randn(2, 6))
    drawn, divergence = learner(4)
    prior = Bernoulli(probs=torch.tensor(0.25))
    expected = kl_divergence(Bernoulli(logits=learner.logits), prior).mean()
    torch.testing.assert_close(divergence, expected)
    assert drawn.shape == (4, 2, 6)
    assert ((drawn > 0) & (drawn < 1)).all()
    assert StochasticLearner(2, 6, expected=1.5)(1)[1].abs() < 1e-6


def test_edges_are_drawn_in_training_as_often_as_their_probability_says():
    torch.manual_seed(0)
    learner = StochasticLearner(1, 3, expected=1.0)
    with torch.no_grad():
        learner.logits.copy_(torch.tensor([[-1.0, 0.0, 2.0]]))
    drawn, _ = learner(20_000)
    share = (drawn > 0.5).float().mean((0, 1))
    torch.testing.assert_close(share, learner.logits[0].sigmoid().detach(), atol=0.02, rtol=0)
    expected, _ = learner.eval()(2)
    torch.testing.assert_close(expected, learner.logits.sigmoid().expand(2, 1, 3))
    torch.testing.assert_close(learner.diagnostics()["expected_edges"], expected[0].sum(-1))


def test_the_combined_graph_lies_between_the_three():
    combiner = GraphCombiner(2, 3, 4)
    target, body, drawn = torch.randn(5, 2, 4), torch.randn(5, 3, 4), torch.rand(5, 2, 3)
    edges = combiner(target, body, drawn)
    now = (combiner.from_target(target) @ combiner.from_body(body).mT / 2).sigmoid()
    shares = combiner.shares(target).softmax(-1)
    expected = torch.empty_like(edges)
    for b in range(3):
        fixed = combiner.fixed[:, b].sigmoid()
        graphs = torch.stack([fixed.expand(5, 2), now[:, :, b], drawn[:, :, b]], dim=-1)
        expected[:, :, b] = (graphs * shares).sum(-1)
    torch.testing.assert_close(edges, expected)


def test_attention_by_hand():
    attention = CelestialToTargetAttention(2, 3, 4, 1, edge_scale=4.0, noise=0.0)
    target, body, edges = torch.randn(6, 2, 4), torch.randn(6, 3, 4), torch.rand(6, 2, 3)
    out, weights = attention(target, body, edges)
    values = torch.stack([body[:, b] @ attention.value[b] for b in range(3)], dim=1)
    values = (values - values.mean(0)) / (values.var(0, correction=0) + 1e-5).sqrt()
    keys = attention.key(attention.body_norm(body))
    for m in range(2):
        asking = attention.target_norm(target[:, m])
        scores = (attention.query[m](asking)[:, None] * keys).sum(-1) / 2 + 4 * edges[:, m]
        expected = scores.softmax(-1)
        torch.testing.assert_close(weights[:, 0, m], expected)
        message = attention.output[m]((expected[:, :, None] * values).sum(1))
        gate = attention.gate[m](torch.cat([asking, message], dim=-1))
        torch.testing.assert_close(out[:, m], target[:, m] + gate * message)


def test_a_larger_body_does_not_arrive_any_louder():
    attention = CelestialToTargetAttention(2, 3, 4, 1, edge_scale=4.0, noise=0.0)
    target, body, edges = torch.randn(64, 2, 4), torch.randn(64, 3, 4), torch.rand(64, 2, 3)
    out, _ = attention(target, body, edges)
    with torch.no_grad():
        attention.value.mul_(100.0)
    torch.testing.assert_close(attention(target, body, edges)[0], out, atol=1e-3, rtol=1e-3)


def test_noise_has_its_size_and_ends_with_training():
    torch.manual_seed(0)
    attention = CelestialToTargetAttention(1, 3, 4, 1, edge_scale=4.0, noise=0.5)
    seen = []
    attention.output[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    window = torch.randn(4000, 1, 4), torch.randn(4000, 3, 4), torch.rand(4000, 1, 3)
    with torch.no_grad():
        attention(*window)
        attention.noise = 0.0
        attention(*window)
        attention.noise = 0.5
        assert (seen[0] - seen[1]).std() == pytest.approx(0.5, rel=0.03)
        attention.eval()
        assert torch.equal(attention(*window)[0], attention(*window)[0])


# ---- nothing goes around attention ----


def changed(window, body):
    drivers = window.drivers.clone()
    drivers[:, :, body] += torch.randn(drivers.shape[:2] + drivers.shape[3:])
    return window._replace(drivers=drivers)


def test_a_hidden_body_has_no_way_to_its_target():
    model, window = settled(tiny()), batch()
    hidden = torch.zeros(4, 13, dtype=torch.bool)
    hidden[2, 7] = True
    before, after = (model(one, hidden) for one in (window, changed(window, 7)))
    assert (before.attention[:, :, 2, 7] == 0).all()
    torch.testing.assert_close(after.future[..., 2], before.future[..., 2])
    torch.testing.assert_close(after.attention[:, :, 2], before.attention[:, :, 2])
    for m in (0, 1, 3):
        assert (after.future[..., m] - before.future[..., m]).abs().max() > 1e-4
    seen = model(window).future[..., 2] - model(changed(window, 7)).future[..., 2]
    assert seen.abs().max() > 1e-4


def test_a_body_is_made_of_its_own_series():
    model, window = settled(tiny()), batch()
    fused = [
        model.hierarchical_fusion_proj(
            model.fusion_cross_attention(model.wave_patching_composer(one.drivers))
        )
        for one in (window, changed(window, 4))
    ]
    moved = (fused[0] - fused[1]).abs().amax((0, 2))
    assert moved[4] > 1e-3
    assert moved[torch.arange(13) != 4].max() == 0


def test_a_target_does_not_see_another():
    model, window = settled(tiny()), batch()
    history = window.history.clone()
    history[..., 1] += 1
    moved = (model(window).future - model(window._replace(history=history)).future).abs()
    assert moved[..., 1].max() > 1e-3
    assert moved[..., [0, 2, 3]].max() < 1e-6


# ---- scores ----


def test_scores_over_batches_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    actual = torch.randn(50, 6, 3, generator=generator)
    predicted = actual + torch.randn(50, 6, 3, generator=generator) * torch.tensor([0.1, 1.0, 2.0])
    attention = torch.rand(50, 2, 3, 5, generator=generator).softmax(-1)
    metric = ForecastScores(3, 5)
    for part in torch.arange(50).split(16):
        metric.update(predicted[part], actual[part], attention[part])
    scores = metric.scores()
    truth, guess = actual.reshape(-1, 3), predicted.reshape(-1, 3)
    expected = mean_squared_error(truth, guess, multioutput="raw_values")
    np.testing.assert_allclose(scores.mse, expected, rtol=1e-5)
    expected = r2_score(truth, guess, multioutput="raw_values")
    np.testing.assert_allclose(scores.r2, expected, rtol=1e-4)
    torch.testing.assert_close(scores.attention, attention.mean((0, 1)))


def test_drivers_found_by_hand():
    body = np.array([[0, 1, 2], [3, 1, 0]])
    edges = Edges(body, np.full((2, 3), 24), np.ones((2, 3)))
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.05, 0.25, 0.3]])
    top1, recall = drivers_found(attention, edges)
    assert top1 == 0.5
    assert recall == pytest.approx((3 / 3 + 2 / 3) / 2)


# ---- training ----


class Losses(Callback):
    def __init__(self):
        self.losses, self.keys = [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.keys = set(outputs)
        assert outputs["logits"].shape == outputs["target"].shape


def trained(quiet, epochs=3, data=None, callbacks=(), logger=False, **arguments):
    torch.manual_seed(0)
    model = tiny(**arguments)
    trainer = Trainer(
        **{**quiet, "max_epochs": epochs},
        logger=logger,
        callbacks=[*callbacks],
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=data or tiny_data())
    return model


def test_a_short_training_lowers_the_loss_and_says_how_it_compares(quiet, capsys):
    losses = Losses()
    model = trained(quiet, callbacks=[losses], component_lrs={"stochastic_learner": 10.0})
    assert losses.keys == {"loss", "logits", "target"}
    assert np.mean(losses.losses[-5:]) < 0.8 * losses.losses[0]
    logged = model.trainer.callback_metrics
    named = {f"{kind}_target_{m}" for kind in ("mse", "r2") for m in range(4)}
    whole = {"loss", "mse", "r2", "r2_ridge_history", "r2_ridge_planted", "r2_ridge_all"}
    whole |= {"r2_ceiling", "attention_top1", "recall_at_3"}
    assert {f"val_{name}" for name in named | whole} | {"train_loss", "train_mse"} <= set(logged)
    assert logged["val_r2"] == pytest.approx(float(model.latest["val"].r2.mean()))
    told = capsys.readouterr().out
    assert "R2 on validation, and where attention goes:" in told
    assert re.search(r"attention: main driver first in \d of 4 targets, recall@3 [01]\.\d\d", told)
    rates = {
        group["name"]: group["initial_lr"] for group in model.trainer.optimizers[0].param_groups
    }
    assert rates["stochastic_learner"] == pytest.approx(2e-2)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_logged_scores_are_those_of_the_forecasts(quiet, stage, capsys):
    data, model = tiny_data(), settled(tiny())
    trainer = Trainer(**quiet, logger=False)
    run = trainer.validate if stage == "val" else trainer.test
    (logged,) = run(model, datamodule=data, verbose=False)
    windows = data.parts[stage].together()
    with torch.no_grad():
        forecast = model.eval()(windows)
    r2 = r_squared(forecast.future, windows.future)
    for m in range(4):
        assert logged[f"{stage}_r2_target_{m}"] == pytest.approx(float(r2[m]), abs=1e-4)
    error = (forecast.future - windows.future).square().mean()
    assert logged[f"{stage}_mse"] == pytest.approx(float(error), abs=1e-5)
    assert logged[f"{stage}_r2_ceiling"] == pytest.approx(
        float(data.baselines(stage)["ceiling"].mean())
    )
    top1, recall = drivers_found(forecast.attention.mean((0, 1)), data.edges)
    assert logged[f"{stage}_attention_top1"] == pytest.approx(top1)
    assert logged[f"{stage}_recall_at_3"] == pytest.approx(recall)
    assert ("R2 on test" in capsys.readouterr().out) is (stage == "test")


def test_the_same_seed_gives_the_same_weights(quiet):
    first, second = (trained(quiet, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_own_data_train_without_planted_truth(quiet, tmp_path, capsys):
    lines = [f"{t:04d},{np.sin(t / 3):.4f},{np.cos(t / 5):.4f}" for t in range(500)]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["date,wind,load", *lines]))
    data = tiny_data(path=str(path), drivers=["wind"], targets=["load"])
    model = trained(quiet, epochs=1, data=data, bodies=1, targets=1)
    logged = model.trainer.callback_metrics
    assert {"val_r2_load", "val_r2_ridge_history", "val_r2_ridge_all"} <= set(logged)
    assert not {"val_attention_top1", "val_r2_ceiling", "val_r2_ridge_planted"} & set(logged)
    assert re.search(r"load .* wind 1\.00", capsys.readouterr().out)


def test_sizes_that_are_not_those_of_the_data_are_refused(quiet):
    trainer = Trainer(**quiet, logger=False)
    message = "must be those of the data, (13, 1, 4, 48, 6), got (12, 1, 4, 48, 6)."
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.fit(tiny(bodies=12), datamodule=tiny_data())


def test_a_run_without_end_is_refused(quiet):
    trainer = Trainer(**{**quiet, "max_epochs": -1}, logger=False)
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps` must be given"):
        trainer.fit(tiny(), datamodule=tiny_data())


def test_the_rate_rises_and_falls_to_zero(quiet):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    optimizer = partial(torch.optim.SGD, lr=0.1)
    model = trained(quiet, 2, callbacks=[Rates()], optimizer=optimizer, warmup_share=0.25)
    warmup = round(len(rates) / 4)
    assert rates[:warmup] == pytest.approx([0.1 * (i + 1) / warmup for i in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_checkpoint_brings_back_the_model(quiet, tmp_path):
    model = trained(quiet, epochs=1)
    model.trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = DriversForecaster.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    window = batch()
    torch.testing.assert_close(again.eval()(window).future, model.eval()(window).future)


def test_attention_capture_sees_which_body_a_target_looks_at(quiet, tmp_path):
    capture = AttentionCapture(
        every_n_steps=4,
        capture={
            "c2t": "celestial_to_target_attention",
            "fusion": "fusion_cross_attention.attention",
        },
        key_names={"c2t": [f"body_{b}" for b in range(13)]},
        query_names={"c2t": [f"target_{m}" for m in range(4)]},
        on_error="raise",
    )
    trained(quiet, 1, callbacks=[capture], logger=RunLogger(tmp_path / "run"))
    run = read_run(tmp_path / "run")
    rows = [row for row in run.attention_query.to_dicts() if row["component"] == "c2t"]
    assert {row["name"] for row in rows} == {f"target_{m}" for m in range(4)}
    for row in rows:
        assert row["mean"] == pytest.approx(1 / 13, abs=1e-4)
        assert row["name_1"] == f"body_{row['key_1']}"
        assert row["mass_1"] >= row["mass_2"]
    assert {row["component"] for row in run.attention.to_dicts()} >= {"c2t", "fusion"}
    assert not (tmp_path / "run" / "records" / "notes.jsonl").exists()


@pytest.mark.slow
def test_the_body_that_attention_looks_at_most_is_the_one_that_counts_most(quiet):
    """Hiding the first body from a target costs it more than hiding any other."""
    torch.manual_seed(0)
    data = DriversData(generator_seed=0, batch_size=64)
    model = DriversForecaster(width=48)
    Trainer(**{**quiet, "max_epochs": 5}, logger=False, gradient_clip_val=1.0).fit(model, data)
    windows = data.parts["test"].together()
    model.eval()
    with torch.no_grad():
        whole = model(windows)
        cost = torch.empty(4, 13)
        for b in range(13):
            hidden = torch.zeros(4, 13, dtype=torch.bool)
            hidden[:, b] = True
            without = model(windows, hidden)
            cost[:, b] = (without.future - windows.future).square().mean((0, 1))
    looked = whole.attention.mean((0, 1))
    top = looked.argmax(1)
    assert (r_squared(whole.future, windows.future) > data.baselines("test")["history"]).all()
    assert (cost.argmax(1) == top).sum() >= 3
    assert drivers_found(looked, data.edges)[0] >= 0.75
    error = (whole.future - windows.future).square().mean((0, 1))
    assert (cost.amax(1) > 1.5 * error).all()


# ---- components in the configuration ----


def test_the_named_components_take_every_parameter():
    from omegaconf import OmegaConf

    path = Path(__file__).parents[2] / "conf" / "components" / "drivers.yaml"
    assignment = Components(OmegaConf.to_container(OmegaConf.load(path))).assign(tiny())
    assert assignment.names == COMPONENTS
    assert all(assignment.parameters.values())
    assert assignment.notes == []
