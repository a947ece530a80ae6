import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_diag.rules import RULES, Evidence, Finding, diagnose, diagnosis, order_findings, rule
from lightning_diag.rules.causal_order import CAUSAL_ORDER
from tests.rules.planted import noise, run_of, trace

CONFIG = {
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "trainer": {"gradient_clip_val": 1.0, "precision": "16-mixed"},
    "hardware": {"precision": "16-mixed"},
    "component_lrs": None,
}
SGD = {**CONFIG, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}
FOLDER = Path(__file__).parents[2] / "conf" / "rules"
FAMILIES = sorted({one.family for one in RULES.values()})


def exploding(**more):
    rng = np.random.default_rng(0)
    norms = {"encoder": noise(rng, 60, 1.0), "head": noise(rng, 60, 0.5)}
    norms["encoder"][40:] = 1e4
    return run_of(trace(norms), **more)


def vanishing(**more):
    rng = np.random.default_rng(0)
    norms = {"encoder": noise(rng, 60, 1e-6), "head": noise(rng, 60, 0.5)}
    return run_of(trace(norms), **more)


def first(run, id="exploding_gradient"):
    return next(one for one in diagnose(run) if one.rule == id)


@pytest.mark.parametrize("family", FAMILIES)
def test_yaml_repeats_the_python_defaults(family):
    written = yaml.safe_load((FOLDER / f"{family}.yaml").read_text())
    python = {
        id: dataclasses.asdict(one.thresholds) for id, one in RULES.items() if one.family == family
    }
    assert written == python
    values = [value for one in written.values() for value in one.values()]
    assert all(isinstance(value, (int, float)) for value in values)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_yaml_threshold_has_a_comment(family):
    text = (FOLDER / f"{family}.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line.startswith("  "))


def test_every_yaml_is_the_file_of_a_family():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(FAMILIES)


def test_every_rule_says_where_its_thresholds_come_from():
    assert all(one.reference for one in RULES.values())


def test_the_six_rules_of_the_family_are_there():
    assert set(RULES) >= {
        "vanishing_gradient",
        "exploding_gradient",
        "nonfinite_gradient",
        "dead_component",
        "gradient_imbalance",
        "clipping_dominates",
    }
    for one in RULES.values():
        assert set(one.explains) <= set(RULES)


def test_every_rule_has_a_place_among_causes():
    assert sorted(CAUSAL_ORDER) == sorted(RULES)


@pytest.mark.parametrize("seed", range(20))
def test_causes_form_no_circle(monkeypatch, seed):
    # all of them at once, at any steps: whatever the rules list, some finding explains itself
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 60, len(RULES))
    found = [
        Finding(rule=id, severity="warning", first_step=int(step))
        for id, step in zip(RULES, steps, strict=True)
    ]
    causes = {one.rule: one.caused_by for one in diagnosis._with_causes(found)}
    assert None in causes.values()
    for start in causes:
        rule, seen = start, set()
        while rule is not None:
            assert rule not in seen
            seen.add(rule)
            rule = causes[rule]


def test_a_threshold_can_be_changed():
    assert first(exploding()).rank > 0
    raised = {"exploding_gradient": {"max_l2": 1e6}}
    found = diagnose(exploding(), raised)
    assert [one for one in found if one.rule == "exploding_gradient" and one.rank > 0] == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"exploding_gradients": {}}, ValueError, "did you mean `exploding_gradient`"),
        ({"dead_component": {"min_row": 2}}, ValueError, "did you mean `min_rows`"),
        ({"dead_component": {"min_rows": "2"}}, TypeError, "must be a number, got '2'"),
        ({"dead_component": {"min_rows": float("nan")}}, ValueError, "must be finite, got nan"),
        ({"dead_component": {"min_rows": True}}, TypeError, "must be a number, got True"),
        ({"dead_component": 3}, TypeError, "must be a mapping, got 3"),
    ],
)
def test_wrong_thresholds_are_named(given, error, message):
    with pytest.raises(error, match=message):
        diagnose(run_of([]), given)


def test_wrong_on_error():
    with pytest.raises(ValueError, match="`on_error` must be 'report' or 'raise', got 'warn'"):
        diagnose(run_of([]), on_error="warn")


def test_a_rule_that_fails_is_reported_and_the_others_run(monkeypatch):
    def fail(rows, thresholds):
        raise KeyError("l2")

    broken = dataclasses.replace(RULES["dead_component"], check=fail)
    monkeypatch.setitem(RULES, "dead_component", broken)
    findings = diagnose(exploding())
    failed = next(one for one in findings if one.rule == "dead_component")
    assert (failed.severity, failed.confidence) == ("info", 0.0)
    assert "`dead_component` could not be checked: KeyError" in failed.message
    assert first(exploding()).severity == "critical"
    with pytest.raises(KeyError):
        diagnose(exploding(), on_error="raise")


def test_rules_without_their_rows_are_silent():
    run = run_of([])
    run.rows = {"metrics": [{"step": 0, "train_loss": 1.0}]}
    assert diagnose(run, on_error="raise") == []


def test_rows_with_few_columns_are_read():
    rows = [{"step": i, "component": "a", "l2": 1.0} for i in range(20)]
    rows += [{"step": i, "component": "b", "l2": 1.0} for i in range(20)]
    assert diagnose(run_of(rows), on_error="raise") == []


def test_exploding_override_slows_down_and_never_loosens_the_clip():
    overrides = first(exploding(config=CONFIG)).overrides
    assert overrides == {"optimizer.lr": 0.0003, "trainer.gradient_clip_val": 0.5}
    wide = {**CONFIG, "trainer": {"gradient_clip_val": 5.0}}
    assert first(exploding(config=wide)).overrides["trainer.gradient_clip_val"] == 1.0
    none = {**CONFIG, "trainer": {"gradient_clip_val": None}}
    assert first(exploding(config=none)).overrides["trainer.gradient_clip_val"] == 1.0


def test_overrides_name_only_keys_that_exist():
    assert first(exploding()).overrides == {}
    assert first(exploding(config={"optimizer": {"lr": 0.1}})).overrides == {"optimizer.lr": 0.03}
    assert first(exploding(config={"optimizer": None, "trainer": 3})).overrides == {}


def test_component_rate_is_for_sgd_only():
    id = "vanishing_gradient"
    assert first(vanishing(config=SGD), id).overrides == {"component_lrs": {"encoder": 3.0}}
    assert first(vanishing(config=CONFIG), id).overrides == {}
    given = {**SGD, "component_lrs": {"head": 1.0, "encoder": 0.5}}
    overrides = first(vanishing(config=given), id).overrides
    assert overrides == {"component_lrs": {"head": 1.0, "encoder": 1.5}}


def test_nonfinite_leaves_float16():
    run = exploding(config=CONFIG)
    for row in run.rows["grad"]:
        if row["step"] >= 500 and row["component"] is None:
            row.update(nonfinite=2, has_nan=1)
    found = first(run, "nonfinite_gradient")
    assert found.overrides["hardware.precision"] == "bf16-mixed"
    assert found.caused_by == "exploding_gradient"


def test_clip_is_put_near_the_usual_norm_for_adam_only():
    rng = np.random.default_rng(0)
    norms = {"encoder": noise(rng, 60, 40.0, 0.01), "head": noise(rng, 60, 1.0)}
    rows = trace(norms, clip=1.0)
    adam = first(run_of(rows, config=CONFIG), "clipping_dominates")
    assert adam.overrides == {"trainer.gradient_clip_val": pytest.approx(40.0, rel=0.02)}
    assert first(run_of(rows, config=SGD), "clipping_dominates").overrides == {}


def made(rule, severity, step, **more):
    return Finding(rule=rule, severity=severity, first_step=step, **more)


def test_order_puts_the_gravest_first_and_causes_before_effects():
    effect = made("nonfinite_gradient", "critical", 50, caused_by="exploding_gradient")
    cause = made("exploding_gradient", "warning", 40)
    other = made("gradient_imbalance", "warning", 0)
    note = made("clipping_dominates", "info", 0)
    dead = made("dead_component", "critical", 60)
    ordered = order_findings([note, other, effect, dead, cause])
    assert ordered == [dead, cause, effect, other, note]


def test_finding_survives_json():
    finding = Finding(
        rule="dead_component",
        severity="critical",
        component="é<b>",
        first_step=3,
        last_step=9,
        observed=0.0,
        threshold=0.0,
        unit="l2 norm",
        evidence=Evidence("records/grad.jsonl", (3, 6, 9)),
        message="m",
        suggestion="s",
        overrides={"optimizer.lr": 0.1},
        confidence=0.9,
        caused_by="nonfinite_gradient",
    )
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding
    design = "rule severity component first_step last_step observed threshold unit evidence"
    design += " message suggestion overrides confidence caused_by"
    assert list(finding.to_dict()) == design.split()


def test_finding_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="`severity` must be one of info, warning, critical"):
        Finding(rule="x", severity="HIGH")
    with pytest.raises(ValueError, match="only its own fields, got 'sevrity'"):
        Finding.from_dict({"rule": "x", "severity": "info", "sevrity": "info"})


def test_registry_refuses_doubles_and_thresholds_without_unit():
    @dataclass(frozen=True)
    class Bare:
        low: float = 1.0

    @dataclass(frozen=True)
    class Stated:
        low: float = field(default=1.0, metadata={"unit": "rows"})

    with pytest.raises(ValueError, match=r"state its unit, got `new_rule\.low`"):
        rule("new_rule", family="x", needs="grad", thresholds=Bare)
    with pytest.raises(ValueError, match="used once, got 'dead_component'"):
        rule("dead_component", family="x", needs="grad", thresholds=Stated)(lambda rows, t: [])


def test_thresholds_of_the_run_are_the_default_and_an_argument_wins():
    own = {"rules": {"exploding_gradient": {"max_l2": 1e6}}}
    grave = {one.rule for one in diagnose(exploding(config=own)) if one.rank > 0}
    assert "exploding_gradient" not in grave
    given = {"exploding_gradient": {"max_l2": 100.0}}
    grave = {one.rule for one in diagnose(exploding(config=own), given) if one.rank > 0}
    assert "exploding_gradient" in grave
