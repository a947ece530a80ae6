"""The overrides of a finding: for keys that are there, in the right direction, no further."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diag import param_groups
from lightning_diag.components import Components
from lightning_diag.rules import Evidence, Finding, remedies

ADAM = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}
ALL = {
    "optimizer": {**ADAM, "weight_decay": 0.01},
    "component_lrs": None,
    "hardware": {"precision": "16-mixed", "accumulate": 2, "num_workers": 1, "batch_size": 8},
    "trainer": {"gradient_clip_val": 1.0, "max_steps": 100},
    "model": {
        "warmup_share": 0.0,
        "schedule": "cosine",
        "schedule_steps": 20,
        "activation": "relu",
        "init_scale": 4.0,
        "dropout": 0.1,
    },
    "data": {"standardize": False},
}
REMEDIES = [getattr(remedies, name) for name in remedies.__all__]


def finding(observed=None, unit="update over weight", severity="warning", **more):
    return Finding(
        rule="learning_rate_too_high", severity=severity, observed=observed, unit=unit, **more
    )


def paths(config, above=""):
    for key, value in config.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from paths(value, f"{above}{key}.")


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda one: one.__name__)
@pytest.mark.parametrize(
    "config",
    [{}, {"optimizer": None, "model": 3, "trainer": [], "hardware": "auto", "component_lrs": 1}],
)
@pytest.mark.parametrize("observed", [None, 0.0, math.inf, math.nan, -1.0])
def test_a_key_that_is_not_there_is_not_overridden(remedy, config, observed):
    found = remedy(finding(observed, component="head", first_step=3), config)
    assert set(found) <= set(paths(config))


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda one: one.__name__)
@settings(max_examples=25)  # for each of them
@given(
    keys=st.sets(st.sampled_from([key for key in paths(ALL) if "." in key])),
    observed=st.one_of(st.none(), st.floats(allow_nan=True)),
    step=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_only_keys_of_the_configuration_and_three_digits(remedy, keys, observed, step):
    config = {}
    for key in keys:
        group, _, name = key.partition(".")
        config.setdefault(group, {})[name] = ALL[group][name]
    found = remedy(finding(observed, component="head", first_step=step), config)
    assert set(found) <= set(paths(config))
    for value in found.values():
        if isinstance(value, float):
            assert math.isfinite(value)
            assert value == float(f"{value:.3g}")


@pytest.mark.parametrize("name", ["calm_steps", "calm_start", "leave_half_precision"])
@pytest.mark.parametrize("clip", [None, 1e-3, 0.5, 1.0, 5.0, 1e6])
def test_calm_never_loosens_a_clip_and_never_raises_a_rate(name, clip):
    config = {**ALL, "trainer": {"gradient_clip_val": clip}, "hardware": {"precision": "32-true"}}
    found = getattr(remedies, name)(finding(1e9, "l2 norm", first_step=2), config)
    assert found["trainer.gradient_clip_val"] <= (clip or math.inf)
    assert found["trainer.gradient_clip_val"] <= 1.0
    assert found["optimizer.lr"] == 3e-4


@pytest.mark.parametrize(
    ("observed", "rate"),
    [(0.5, 0.002), (0.1, 0.01), (0.02, 0.05), (0.015, 0.05), (1e-9, 0.05), (1e9, 0.001)],
)
def test_the_rate_falls_as_far_as_the_updates_are_too_large(observed, rate):
    # 0.01 over the update, 0.01 to 0.5
    found = remedies.lower_rate(finding(observed), {"optimizer": SGD})
    assert found == {"optimizer.lr": pytest.approx(rate, rel=1e-12)}


def test_without_updates_the_rate_falls_by_the_severity():
    mild = remedies.lower_rate(finding(7.0, "times its best"), {"optimizer": SGD})
    grave = remedies.lower_rate(finding(7.0, "loss", severity="critical"), {"optimizer": SGD})
    assert (mild, grave) == ({"optimizer.lr": 0.03}, {"optimizer.lr": 0.01})


@pytest.mark.parametrize(
    ("observed", "threshold", "rate"),
    [
        (8.0, 2.0, 0.015),
        (1e9, 2.0, 0.003),
        (2.0, 2.0, 0.01),
        (None, 2.0, 0.01),
        (math.inf, 2, 0.01),
    ],
)
def test_the_rate_falls_with_the_root_of_a_loss_that_jumped(observed, threshold, rate):
    jump = finding(observed, "times the loss at the start", "critical", threshold=threshold)
    assert remedies.lower_rate(jump, {"optimizer": SGD}) == {"optimizer.lr": pytest.approx(rate)}


def test_adam_comes_down_to_where_networks_train():
    for rate, new in [(3.0, 3e-3), (0.02, 2e-3), (1e-3, 1e-4)]:
        config = {"optimizer": {**ADAM, "lr": rate}}
        assert remedies.lower_rate(finding(0.1), config) == {"optimizer.lr": new}


@pytest.mark.parametrize("name", ["calm_steps", "calm_start"])
def test_a_run_that_steps_by_hand_gets_no_clip(name):
    config = {**ALL, "automatic_optimization": False}
    found = getattr(remedies, name)(finding(first_step=0), config)
    assert "optimizer.lr" in found
    assert "trainer.gradient_clip_val" not in found


@pytest.mark.parametrize(
    ("optimizer", "observed", "factor"),
    [
        # up to 0.01 of the weights; of Adam, whose updates do not shrink, up to 0.003
        *(("SGD", 1e-3, 10.0), ("SGD", 9e-3, 2.0), ("SGD", 1e-12, 10_000.0), ("SGD", None, 3.0)),
        *(("Adam", 3e-4, 10.0), ("Adam", 2.9e-3, 2.0), ("Adam", None, 3.0)),
    ],
)
def test_the_rate_rises_as_far_as_the_updates_are_too_small(optimizer, observed, factor):
    config = {"optimizer": {"_target_": f"torch.optim.{optimizer}", "lr": 1e-6}}
    assert remedies.raise_rate(finding(observed), config) == {
        "optimizer.lr": pytest.approx(1e-6 * factor)
    }


@pytest.mark.parametrize(("momentum", "most"), [(0.0, 1.0), (0.9, 0.1), (1.0, 0.01)])
def test_sgd_is_not_raised_above_one(momentum, most):
    config = {"optimizer": {**SGD, "lr": 5e-3, "momentum": momentum}}
    assert remedies.raise_rate(finding(1e-9), config) == {"optimizer.lr": pytest.approx(most)}
    config["optimizer"]["lr"] = 2.0
    assert remedies.raise_rate(finding(1e-9), config) == {}


@pytest.mark.parametrize(
    ("settings_", "override"),
    [
        ({**ADAM, "eps": 1.0}, {"optimizer.eps": 1e-8}),
        ({**ADAM, "eps": 1e-4}, None),
        ({**SGD, "eps": 1.0}, None),
        ({**SGD, "dampening": 0.999}, {"optimizer.dampening": 0.0}),
        ({**SGD, "dampening": 0.1}, None),
    ],
)
def test_what_makes_steps_small_comes_before_the_rate(settings_, override):
    found = remedies.raise_rate(finding(1e-5), {"optimizer": settings_})
    assert found == override if override else set(found) == {"optimizer.lr"}


@pytest.mark.parametrize(
    ("precision", "observed", "unit", "key"),
    [
        ("bf16-true", 1e-3, "update over weight", "hardware.precision"),
        ("16-true", 0.95, "share of elements that do not change", "hardware.precision"),
        ("bf16-true", 5e-3, "update over weight", "optimizer.lr"),  # above 2 ** -8
        ("bf16-mixed", 1e-3, "update over weight", "optimizer.lr"),
        ("32-true", 1e-3, "update over weight", "optimizer.lr"),
    ],
)
def test_updates_that_half_precision_swallows(precision, observed, unit, key):
    config = {"optimizer": SGD, "hardware": {"precision": precision}}
    found = remedies.raise_rate(finding(observed, unit), config)
    assert set(found) == {key}
    if key == "hardware.precision":
        assert found[key] == "bf16-mixed"


def test_adam_is_not_raised_above_a_hundredth():
    config = {"optimizer": {**ADAM, "lr": 5e-3}}
    assert remedies.raise_rate(finding(1e-6), config) == {"optimizer.lr": 0.01}
    config = {"optimizer": {**ADAM, "lr": 0.02}}
    assert remedies.raise_rate(finding(1e-6), config) == {}


@given(st.floats(1e-8, 1e3), st.one_of(st.none(), st.floats(1e-12, 1e12)))
def test_lower_is_lower_and_higher_is_higher(rate, observed):
    config = {"optimizer": {"_target_": "mine.Optimizer", "lr": float(f"{rate:.3g}")}}
    old = config["optimizer"]["lr"]
    lower = remedies.lower_rate(finding(observed), config)["optimizer.lr"]
    higher = remedies.raise_rate(finding(observed), config)["optimizer.lr"]
    assert 0.0099 * old <= lower <= 0.505 * old
    assert 1.99 * old <= higher <= 10_050 * old


def test_a_component_with_a_rate_that_is_off_is_brought_back_alone():
    config = {"optimizer": ADAM, "component_lrs": {"head": 10.0, "body": 0.01, "still": 0.0}}
    head = finding(0.05, component="head")
    assert remedies.lower_rate(head, config) == {
        "component_lrs": {"head": 2.0, "body": 0.01, "still": 0.0}
    }
    assert remedies.lower_rate(finding(9.0, component="head"), config) == {
        "component_lrs": {"head": 1.0, "body": 0.01, "still": 0.0}
    }
    config["component_lrs"]["head"] = 100.0  # out of all proportion: that of the others
    assert remedies.lower_rate(head, config)["component_lrs"]["head"] == 1.0
    body = finding(1e-6, component="body")
    assert remedies.raise_rate(body, config)["component_lrs"]["body"] == 1.0
    still = finding(0.0, component="still")
    assert remedies.raise_rate(still, config)["component_lrs"]["still"] == 1.0
    assert remedies.lower_rate(still, config) == {}
    # one that is not too high itself, and the whole model: first the one that stands out
    for other in (finding(0.5, component="body"), finding(0.5)):
        assert remedies.lower_rate(other, config) == remedies.lower_rate(head, config)
        assert remedies.lower_rate(other, {**config, "component_lrs": {"head": 10.0}}) == {
            "optimizer.lr": 2e-5
        }
        # but where the rate itself is too high
        high = {**config, "optimizer": {**ADAM, "lr": 0.1}}
        assert remedies.lower_rate(other, high) == {"optimizer.lr": 2e-3}


@pytest.mark.parametrize(
    ("settings_", "old", "observed", "new"),
    [
        ({**SGD, "lr": 0.01}, None, 1e-3, {"head": 10.0}),
        ({**SGD, "lr": 0.01}, {"body": 2.0}, 1e-9, {"body": 2.0, "head": 100.0}),
        ({**SGD, "lr": 1e-4}, None, 1e-9, {"head": 1000.0}),
        ({**SGD, "lr": 0.01}, {"head": 2.0}, 1e-3, {"head": 20.0}),
        ({**ADAM, "lr": 1e-3}, None, 1e-9, {"head": 10.0}),
    ],
)
def test_one_part_that_is_too_slow_does_not_drive_the_others(settings_, old, observed, new):
    config = {"optimizer": settings_, "component_lrs": old}
    slow = finding(observed, component="head")
    assert remedies.raise_rate(slow, config) == {"component_lrs": new}
    # Adam's rate is at its limit, and a model that takes no such rates
    top = {"optimizer": {**ADAM, "lr": 0.01}, "component_lrs": old}
    assert set(remedies.raise_rate(slow, top)) <= ({"component_lrs"} if old else set())
    other = {**config, "model": {"_target_": "mine.Model"}}
    assert set(remedies.raise_rate(slow, other)) == {"optimizer.lr"}
    takes = {**config, "model": {"_target_": "mine.Model", "component_lrs": None}}
    assert remedies.raise_rate(slow, takes) == {"component_lrs": new}


@pytest.mark.parametrize(
    ("settings_", "rate"), [({**ADAM, "lr": 1e-7}, 1e-3), ({**SGD, "lr": 1e-6}, 1e-2)]
)
def test_a_rate_that_is_tiny_itself_is_raised_for_all(settings_, rate):
    config = {"optimizer": settings_, "component_lrs": {"body": 0.01}}
    slow = finding(3e-7 if settings_["lr"] < 1e-6 else 1e-6, component="head")
    assert remedies.raise_rate(slow, config) == {"optimizer.lr": pytest.approx(rate)}
    # a part that is held back stays the reason, however far that is
    held = {**config, "component_lrs": {"body": 1e-6}}
    assert remedies.raise_rate(finding(1e-9, component="body"), held) == {
        "component_lrs": {"body": 1.0}
    }
    own = finding(1e-6, component="body")
    assert remedies.raise_rate(own, config) == {"component_lrs": {"body": 1.0}}


PARTS = {"left": "encoders.left", "norms": ["*.norm", "*_norm"], "one": ["encoders.right"]}


@pytest.mark.parametrize(
    ("more", "component", "key"),
    [
        # no patterns: the top-level children, as `param_groups` names them
        ({}, "encoders", "encoders"),
        # patterns that the model does not know: one glob can be named, several can not
        ({"components": PARTS}, "left", "encoders.left"),
        ({"components": PARTS}, "one", "encoders.right"),
        ({"components": PARTS}, "norms", None),
        ({"components": PARTS}, "other", None),
        # patterns that the model knows
        ({"components": PARTS, "model": {"components": PARTS}}, "norms", "norms"),
        ({"components": PARTS, "model": {"components": PARTS}}, "tail", None),
        ({"components": PARTS, "model": {"components": None}}, "encoders", "encoders"),
        # keys that are there and take the same parameters
        ({"components": PARTS, "component_lrs": {"encoders": 0.5}}, "left", None),
        ({"components": PARTS, "component_lrs": {"enc*.l*": 0.5}}, "left", None),
        ({"components": PARTS, "component_lrs": {"encoders.left": 0.5}}, "left", "encoders.left"),
        ({"components": PARTS, "component_lrs": {"head": 0.5}}, "left", "encoders.left"),
    ],
)
def test_only_names_that_the_model_takes_rates_for(more, component, key):
    config = {"optimizer": SGD, "component_lrs": None, **more}
    slow = finding(1e-3, component=component)
    raised = remedies.raise_rate(slow, config)
    boosted = remedies.boost_component(slow, config)
    if key is None:
        assert (set(raised), boosted) == ({"optimizer.lr"}, {})
    else:
        assert set(raised["component_lrs"]) == {*(config["component_lrs"] or {}), key}
        assert set(boosted["component_lrs"]) == set(raised["component_lrs"])


def test_the_names_are_those_that_parameter_groups_take():
    model = torch.nn.ModuleDict(
        {
            "encoders": torch.nn.ModuleDict(
                {"left": torch.nn.Linear(2, 2), "right": torch.nn.Linear(2, 2)}
            ),
            "head": torch.nn.Linear(2, 1),
        }
    )
    for parts in (None, {"left": "encoders.left", "rest": ["encoders.right", "head"]}):
        for name in Components(parts).assign(model).names:
            config = {"optimizer": SGD, "component_lrs": None, "components": parts}
            found = remedies.raise_rate(finding(1e-3, component=name), config)
            groups = param_groups(model, found.get("component_lrs", {}), base_lr=0.1)
            fast = [p for group in groups if group["lr"] > 0.9 for p in group["params"]]
            wanted = Components(parts).assign(model).parameters[name].values()
            assert set(map(id, fast)) == (set() if name == "rest" else set(map(id, wanted)))


def test_the_part_with_the_larger_gradient_is_slowed_down():
    config = {"optimizer": SGD, "component_lrs": {"head": 1.5, "still": 0.0}}
    for side, new in (("smaller", 4.5), ("larger", 0.5)):
        unit = f"times {side} than the typical component, by norm and by rms"
        found = remedies.boost_component(finding(1e3, unit, component="head"), config)
        assert found == {"component_lrs": {"head": new, "still": 0.0}}
        # kept still on purpose
        assert remedies.boost_component(finding(1e3, unit, component="still"), config) == {}
    own = {**config, "model": {"_target_": "mine.Model"}}
    assert remedies.boost_component(finding(component="head"), own) == {}


@pytest.mark.parametrize(
    ("share", "new"), [(0, 0.1), (0.05, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, None), (1.0, None)]
)
def test_warmup_gets_longer_up_to_three_tenths(share, new):
    found = remedies.set_warmup(finding(first_step=0), {"model": {"warmup_share": share}})
    assert found == ({} if new is None else {"model.warmup_share": new})


def test_warmup_answers_nothing_that_begins_late():
    assert remedies.set_warmup(finding(first_step=31), ALL) == {}
    assert remedies.set_warmup(finding(first_step=30), ALL) == {"model.warmup_share": 0.1}


def test_a_schedule_fits_the_run():
    fitted = remedies.steady_schedule(finding(), ALL)
    assert fitted == {"model.schedule_steps": 100}
    unknown = {**ALL, "trainer": {"max_steps": -1}}
    assert remedies.steady_schedule(finding(), unknown) == {"model.schedule": "constant"}
    long = {"model": {"warmup_share": 0.9, "schedule": "cosine"}}
    assert remedies.steady_schedule(finding(), long) == {"model.warmup_share": 0.1}
    fine = {"model": {"schedule": "constant", "warmup_share": 0.1, "schedule_steps": 100}}
    assert remedies.steady_schedule(finding(), {**ALL, **fine}) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("relu", "leaky_relu"), ("ReLU", "leaky_relu"), ("tanh", "gelu"), ("sigmoid", "gelu")),
        *(("gelu", None), ("leaky_relu", None), ("identity", None), (None, None), (3, None)),
    ],
)
def test_activation(old, new):
    found = remedies.change_activation(finding(), {"model": {"activation": old}})
    assert found == ({} if new is None else {"model.activation": new})


@pytest.mark.parametrize(
    ("old", "smaller", "larger"), [(8, 1.0, None), (1.0, 0.5, None), (0.01, 0.005, 1.0)]
)
def test_init(old, smaller, larger):
    config = {"model": {"init_scale": old}}
    assert remedies.smaller_init(finding(), config) == {"model.init_scale": smaller}
    expected = {} if larger is None else {"model.init_scale": larger}
    assert remedies.larger_init(finding(), config) == expected


def test_units_that_died_in_training_were_killed_by_a_step():
    config = {"optimizer": SGD, "model": {"activation": "relu", "init_scale": 1.0}}
    assert remedies.revive_units(finding(first_step=0), config) == {
        "model.activation": "leaky_relu"
    }
    killed = {"model.activation": "leaky_relu", "optimizer.lr": 0.03}
    assert remedies.revive_units(finding(first_step=40), config) == killed
    # seen at the first look, or not yet at one before
    seen = finding(first_step=9, evidence=Evidence("activation.jsonl", (9, 19, 29)))
    assert remedies.revive_units(seen, config) == {"model.activation": "leaky_relu"}
    later = finding(first_step=19, evidence=Evidence("activation.jsonl", (19, 29)))
    assert remedies.revive_units(later, config) == killed
    assert remedies.revive_units(replace(seen, began_after=4), config) == killed
    large = {"model": {"activation": "gelu", "init_scale": 20.0}, "optimizer": SGD}
    assert remedies.revive_units(finding(first_step=0), large) == {"model.init_scale": 1.0}
    assert remedies.revive_units(finding(first_step=0), {"optimizer": SGD}) == {
        "optimizer.lr": 0.03
    }


def test_a_start_that_is_too_large_is_made_usual():
    found = remedies.calm_start(finding(first_step=0), ALL)
    assert found == {
        "optimizer.lr": 3e-4,
        "trainer.gradient_clip_val": 0.5,
        "model.warmup_share": 0.1,
        "model.init_scale": 1.0,
    }


def test_a_gradient_that_vanishes():
    weak = {"model": {"activation": "sigmoid", "init_scale": 0.1}, "optimizer": SGD}
    assert remedies.strengthen_gradient(finding(), weak) == {
        "model.init_scale": 1.0,
        "model.activation": "gelu",
    }
    plain = {"optimizer": SGD, "component_lrs": None, "model": {"activation": "relu"}}
    encoder = finding(component="encoder")
    assert remedies.strengthen_gradient(encoder, plain) == {"component_lrs": {"encoder": 3.0}}
    # a rate that killed everything at once comes before that
    wild = {**plain, "optimizer": {**SGD, "lr": 30.0}}
    assert remedies.strengthen_gradient(encoder, wild) == {"optimizer.lr": 0.1}


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"optimizer": ADAM}, {}),
        ({"optimizer": {**ADAM, "lr": 1.0}}, {"optimizer.lr": 3e-3}),
        ({"optimizer": {**SGD, "lr": 1.0}}, {}),
        ({"optimizer": {**SGD, "lr": 1.5}}, {"optimizer.lr": 0.1}),
        ({"optimizer": {**SGD, "lr": 1.0, "momentum": 0.9}}, {"optimizer.lr": 0.01}),
        ({"optimizer": {**SGD, "dampening": 0.9}}, {"optimizer.dampening": 0.0}),
        ({"optimizer": {**ADAM, "eps": 0.1}}, {"optimizer.eps": 1e-8}),
        ({"optimizer": {**ADAM, "weight_decay": 1.0}}, {}),
        ({"optimizer": {**ADAM, "weight_decay": 5.0}}, {"optimizer.weight_decay": 0.01}),
        ({"optimizer": {**SGD, "weight_decay": 0.5}}, {"optimizer.weight_decay": 0.0}),
        ({"trainer": {"gradient_clip_val": 1e-5}}, {"trainer.gradient_clip_val": 1.0}),
        ({"trainer": {"gradient_clip_val": 0.1}}, {}),
        ({"model": {"init_scale": 3.0}}, {"model.init_scale": 1.0}),
        ({"model": {"init_scale": 0.1}}, {"model.init_scale": 1.0}),
        ({"model": {"init_scale": 0.5, "activation": "tanh", "dropout": 0.5}}, {}),
        ({"model": {"activation": "sigmoid"}}, {"model.activation": "gelu"}),
        ({"model": {"warmup_share": 1.0}}, {"model.warmup_share": 0.1}),
        ({"model": {"dropout": 0.9}}, {"model.dropout": 0.1}),
        ({"component_lrs": {"a": 500.0, "b": 0.0}}, {"component_lrs": {"a": 1.0, "b": 0.0}}),
        ({"component_lrs": {"a": 10.0, "b": 1e-3}}, {}),
    ],
)
def test_what_is_unusual_becomes_usual(config, overrides):
    assert remedies.usual_settings(finding(), config) == overrides
    mended = deepcopy(config)
    for key, value in overrides.items():
        group, _, name = key.partition(".")
        if name:
            mended[group][name] = value
        else:
            mended[group] = value
    assert remedies.usual_settings(finding(), mended) == {}


def test_clip_of_plain_sgd_is_loosened_only_where_it_is_very_tight():
    tight = {"optimizer": SGD, "trainer": {"gradient_clip_val": 1e-3}}
    assert remedies.loosen_clip(finding(0.01), tight) == {"trainer.gradient_clip_val": 0.1}
    assert remedies.loosen_clip(finding(1e-5), tight) == {"trainer.gradient_clip_val": 1.0}
    usual = {"optimizer": SGD, "trainer": {"gradient_clip_val": 1.0}}
    assert remedies.loosen_clip(finding(0.01), usual) == {}
    adam = {"optimizer": ADAM, "trainer": {"gradient_clip_val": 1.0}}
    assert remedies.loosen_clip(finding(0.01), adam) == {"trainer.gradient_clip_val": 100.0}
    assert remedies.loosen_clip(finding(2.0), adam) == {}
    assert remedies.loosen_clip(finding(0.01, caused_by="exploding_gradient"), adam) == {}


@pytest.mark.parametrize(
    ("precision", "new"),
    [("16-mixed", "bf16-mixed"), ("16-true", "bf16-mixed"), (16, "bf16-mixed"), ("32-true", None)],
)
def test_half_precision(precision, new):
    config = {"hardware": {"precision": precision}, "optimizer": SGD}
    found = remedies.leave_half_precision(finding(), config)
    assert found == ({"optimizer.lr": 0.03} if new is None else {"hardware.precision": new})


def test_what_is_not_finite_before_the_first_step_was_not_made_so_by_a_step():
    config = {"optimizer": SGD, "trainer": {"gradient_clip_val": None}}
    assert remedies.leave_half_precision(finding(first_step=0), config) == {}
    large = {**config, "model": {"init_scale": 50.0}}
    found = remedies.leave_half_precision(finding(first_step=0), large)
    assert found == {"model.init_scale": 1.0}
    assert set(remedies.leave_half_precision(finding(first_step=1), large)) == {
        "optimizer.lr",
        "trainer.gradient_clip_val",
    }


@pytest.mark.parametrize(
    ("old", "more", "fewer"), [(1, 4, None), (4, 8, None), (8, None, 1), (64, None, 8)]
)
def test_accumulation(old, more, fewer):
    config = {"hardware": {"accumulate": old}, "optimizer": SGD}
    key = "hardware.accumulate"
    assert remedies.more_accumulated(finding(), config) == ({} if more is None else {key: more})
    assert remedies.fewer_accumulated(finding(), config) == ({} if fewer is None else {key: fewer})
    expected = {"optimizer.lr": 0.3} if fewer is None else {key: fewer}
    assert remedies.quicken(finding(), config) == expected


@pytest.mark.parametrize(("old", "new"), [(0, 2), (1, 2), (4, 8), (12, 16), (16, None), (True, 0)])
def test_workers(old, new):
    found = remedies.more_workers(finding(), {"hardware": {"num_workers": old}})
    assert found == ({"hardware.num_workers": new} if new else {})


def test_regularize_and_standardize():
    assert remedies.regularize(finding(), ALL) == {
        "optimizer.weight_decay": 0.1,
        "model.dropout": 0.3,
    }
    none = {"optimizer": {"weight_decay": 0.0}, "model": {"dropout": 0.5}}
    assert remedies.regularize(finding(), none) == {"optimizer.weight_decay": 0.01}
    assert remedies.standardize_data(finding(), ALL) == {"data.standardize": True}
    assert remedies.standardize_data(finding(), {"data": {"standardize": True}}) == {}
