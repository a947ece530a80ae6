"""Each rule finds its planted fault: the right rule, component and first step."""

import numpy as np
import pytest

from lightning_diag.rules import diagnose
from tests.rules.losses_made_up import loss_rows
from tests.rules.planted import MadeUpRun, component_row, noise, run_of, trace, whole_row


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def healthy(rng, length=60):
    return {
        "embedding": noise(rng, length, 0.3),
        "encoder": noise(rng, length, 1.0),
        "head": noise(rng, length, 0.5),
    }


def only(findings, rule):
    chosen = [one for one in findings if one.rule == rule and one.rank > 0]
    assert len(chosen) == 1, findings
    return chosen[0]


def alarms(findings):
    return {one.rule for one in findings if one.rank > 0}


def test_vanishing_component_is_named(rng):
    norms = healthy(rng)
    norms["embedding"] = noise(rng, 60, 3e-6)
    finding = only(diagnose(run_of(trace(norms))), "vanishing_gradient")
    assert finding.component == "embedding"
    assert finding.severity == "warning"
    # the warm-up is the larger of 2 rows and 5 % of 60
    assert finding.first_step == 30
    assert finding.last_step == 590
    assert finding.observed == pytest.approx(np.mean(norms["embedding"][3:]))
    assert "embedding" in finding.message
    assert finding.evidence.file == "records/grad.jsonl"
    assert set(finding.evidence.steps) <= set(range(30, 600, 10))


def test_vanishing_below_the_lower_band_is_critical(rng):
    norms = {**healthy(rng), "embedding": noise(rng, 60, 1e-9)}
    assert only(diagnose(run_of(trace(norms))), "vanishing_gradient").severity == "critical"


def test_vanishing_halfway_starts_where_it_starts(rng):
    norms = healthy(rng)
    norms["encoder"][25:] = noise(rng, 35, 1e-6)
    finding = only(diagnose(run_of(trace(norms))), "vanishing_gradient")
    assert (finding.component, finding.first_step) == ("encoder", 250)


def test_sudden_fall_against_own_past_though_not_tiny(rng):
    norms = healthy(rng)
    norms["encoder"][40:] = noise(rng, 20, 1e-4)
    finding = only(diagnose(run_of(trace(norms))), "vanishing_gradient")
    assert (finding.component, finding.first_step) == ("encoder", 400)
    assert finding.unit.startswith("times smaller than before")
    assert 1e3 < finding.observed < 1e5


def test_deep_chain_reports_each_vanished_part(rng):
    norms = {f"layer{i}": noise(rng, 40, 10.0 ** (-2 * i)) for i in range(6)}
    found = [one for one in diagnose(run_of(trace(norms))) if one.rule == "vanishing_gradient"]
    assert {one.component for one in found} == {"layer3", "layer4", "layer5"}


def test_tiny_everywhere_from_the_start(rng):
    norms = {"encoder": noise(rng, 30, 1e-8), "head": noise(rng, 30, 1e-7)}
    finding = only(diagnose(run_of(trace(norms))), "vanishing_gradient")
    assert finding.component is None
    assert finding.severity == "warning"


def test_exploding_growth_names_component_and_step(rng):
    norms = healthy(rng)
    norms["encoder"][30:] = 1.0 * 2.0 ** np.arange(30)
    finding = only(diagnose(run_of(trace(norms))), "exploding_gradient")
    assert finding.component == "encoder"
    assert finding.severity == "critical"
    assert finding.first_step == 370  # 2**7 is the first power above 100
    assert finding.observed == pytest.approx(2.0**29, rel=1e-3)


def test_exploding_jump_in_a_short_run():
    norms = {"a": [1, 1.2, 0.9, 1.1, 1, 1, 500, 5000, 50000], "b": [0.5] * 9}
    finding = only(diagnose(run_of(trace(norms, every=50))), "exploding_gradient")
    assert (finding.component, finding.first_step) == ("a", 300)


def test_exploding_without_whole_row(rng):
    norms = healthy(rng)
    norms["head"][50:] = 1e4
    finding = only(diagnose(run_of(trace(norms, whole=False))), "exploding_gradient")
    assert (finding.component, finding.first_step) == ("head", 500)


def test_exploding_is_milder_under_clipping(rng):
    norms = healthy(rng)
    norms["encoder"][50:] = 1e4
    plain = only(diagnose(run_of(trace(norms))), "exploding_gradient")
    clipped = only(diagnose(run_of(trace(norms, clip=1.0))), "exploding_gradient")
    assert (plain.severity, clipped.severity) == ("critical", "warning")
    assert "Clipping" in clipped.message


def test_lone_spike_is_a_note_and_many_are_a_warning(rng):
    norms = healthy(rng, 100)
    norms["encoder"][50] = 900
    found = [one for one in diagnose(run_of(trace(norms))) if one.rule == "exploding_gradient"]
    assert [one.severity for one in found] == ["info"]
    norms["encoder"][[40, 60, 70, 80]] = 900
    assert only(diagnose(run_of(trace(norms))), "exploding_gradient").severity == "warning"


def with_nan(rows, steps, component="encoder", parameter="encoder.0.weight"):
    for row in rows:
        if row["step"] in steps and row["component"] in (component, None):
            row.update(nonfinite=7, first_nonfinite=parameter)
            if row["component"] is None:
                row.update(has_nan=1)
    return rows


def test_nonfinite_names_the_first_offender(rng):
    rows = with_nan(trace(healthy(rng)), range(300, 600, 10))
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert (finding.component, finding.first_step, finding.last_step) == ("encoder", 300, 590)
    assert finding.severity == "critical"
    assert "encoder.0.weight" in finding.message
    assert "NaN" in finding.message
    assert "infinity (" not in finding.message
    assert finding.observed == 30


def test_nonfinite_chooses_the_component_of_the_named_parameter(rng):
    rows = with_nan(trace(healthy(rng)), [590])
    for row in rows:
        if row["step"] == 590 and row["component"] == "embedding":
            row.update(nonfinite=3, first_nonfinite="embedding.weight")
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert finding.component == "encoder"
    assert "also in `embedding`" in finding.message


def test_nonfinite_once_in_the_middle_is_a_warning(rng):
    rows = with_nan(trace(healthy(rng)), [300])
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert finding.severity == "warning"
    assert "finite again" in finding.message


def test_overflowed_norm_counts_as_nonfinite(rng):
    rows = trace(healthy(rng))
    for row in rows:
        if row["step"] >= 500 and row["component"] == "head":
            row.update(l2=None, l2_nonfinite=1)
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert (finding.component, finding.first_step) == ("head", 500)


def test_scaler_that_never_finds_a_scale(rng):
    rows = trace(healthy(rng))
    for row in rows:
        if row["component"] is None and row["step"] >= 100:
            scale = 65536.0 * 0.5 ** ((row["step"] - 100) // 10)
            row.update(skipped=1, nonfinite=5, has_inf=1, scale=scale)
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert finding.severity == "critical"
    assert "skipped" in finding.message
    assert finding.first_step == 100


def without_gradient(rows, component, since, *, absent, parameter="encoder.weight"):
    for row in rows:
        if row["component"] == component and row["step"] >= since:
            row["l2"] = 0.0
            if absent:
                row.update(count=0, tensors=0, missing=4, first_missing=parameter)
    return rows


@pytest.mark.parametrize("absent", [True, False])
def test_dead_component_from_the_start(rng, absent):
    rows = without_gradient(trace(healthy(rng)), "encoder", 0, absent=absent)
    finding = only(diagnose(run_of(rows)), "dead_component")
    assert (finding.component, finding.first_step, finding.severity) == ("encoder", 0, "critical")
    assert ("encoder.weight" in finding.message) == absent
    assert ("detach" in finding.suggestion) == absent


def test_dead_component_since_a_step(rng):
    rows = without_gradient(trace(healthy(rng)), "head", 310, absent=False)
    finding = only(diagnose(run_of(rows)), "dead_component")
    assert (finding.component, finding.first_step, finding.last_step) == ("head", 310, 590)


def test_nothing_gets_gradient_from_the_start():
    rows = trace({"a": [0.0] * 6, "b": [0.0] * 6})
    finding = only(diagnose(run_of(rows)), "dead_component")
    assert finding.component is None
    assert finding.severity == "critical"


def test_everything_stops_at_once_is_a_warning(rng):
    norms = healthy(rng)
    for series in norms.values():
        series[40:] = 0.0
    finding = only(diagnose(run_of(trace(norms))), "dead_component")
    assert (finding.component, finding.severity, finding.first_step) == (None, "warning", 400)


def test_imbalance_names_the_starved_component(rng):
    norms = {**healthy(rng), "head": noise(rng, 60, 2e-4)}
    finding = only(diagnose(run_of(trace(norms))), "gradient_imbalance")
    assert finding.component == "head"
    assert 1e3 < finding.observed < 1e4
    assert "smaller" in finding.message


def test_imbalance_names_the_one_that_towers(rng):
    norms = {**healthy(rng), "adapter": noise(rng, 60, 0.4), "head": noise(rng, 60, 2e4)}
    finding = only(diagnose(run_of(trace(norms))), "gradient_imbalance")
    assert finding.component == "head"
    assert "larger" in finding.message


def test_imbalance_of_two_is_told_once(rng):
    norms = {"a": noise(rng, 40, 1.0), "b": noise(rng, 40, 1e-4)}
    assert only(diagnose(run_of(trace(norms))), "gradient_imbalance").component == "b"


def test_clipping_that_decides_every_step(rng):
    norms = {"encoder": noise(rng, 60, 40.0), "head": noise(rng, 60, 5.0)}
    finding = only(diagnose(run_of(trace(norms, clip=1.0))), "clipping_dominates")
    assert finding.component == "encoder"
    assert finding.observed == pytest.approx(1 / 40, rel=0.3)
    assert "100% of the steps" in finding.message


def test_cause_comes_first_and_is_named(rng):
    norms = healthy(rng)
    norms["encoder"][40:] = 10.0 ** np.arange(20)
    rows = with_nan(trace(norms), range(500, 600, 10))
    findings = diagnose(run_of(rows))
    assert [one.rule for one in findings[:2]] == ["exploding_gradient", "nonfinite_gradient"]
    assert findings[0].caused_by is None
    assert findings[1].caused_by == "exploding_gradient"


def test_explosion_after_nan_is_not_its_cause(rng):
    norms = healthy(rng)
    norms["encoder"][50:] = 1e5
    rows = with_nan(trace(norms), [200, 210])
    finding = only(diagnose(run_of(rows)), "nonfinite_gradient")
    assert finding.caused_by is None


def test_skipped_rows_are_no_evidence_of_anything(rng):
    rows = trace(healthy(rng))
    bad = [component_row(600, name, 1e6, nonfinite=9) for name in ("encoder", "head")]
    rows += [*bad, whole_row(600, bad, skipped=1, scale=65536.0, skipped_total=1)]
    rows += [component_row(610, "encoder", 1.0), component_row(610, "head", 1.0)]
    assert not alarms(diagnose(run_of(rows)))


# ---- explosions that are short, and values that are clipped ----


def leap(after):
    """A loss that leaps at step 120, and what is left of it."""
    losses = np.full(300, 0.15)
    losses[120:130] = 2e5
    losses[130:] = after
    return loss_rows(losses)


@pytest.mark.parametrize(("after", "severity"), [(1.4, "critical"), (0.16, "info")])
def test_one_row_counts_where_the_loss_has_not_come_back(rng, after, severity):
    norms = {name: series[:30].copy() for name, series in healthy(rng).items()}
    norms["encoder"][12] = 1e4
    rows = {"grad": trace(norms), "loss": leap(after)}
    found = diagnose(MadeUpRun(rows), on_error="raise")
    (finding,) = [one for one in found if one.rule == "exploding_gradient"]
    assert (finding.severity, finding.first_step) == (severity, 120)


@pytest.mark.parametrize(("level", "found"), [(0.7, True), (0.1, False)])
def test_first_step_that_ruined_the_run(level, found):
    losses, norms = np.full(200, level), np.full(200, 0.7)
    losses[:10], norms[0] = 0.71, 7.5e6
    rows = {"loss": loss_rows(losses, norms=norms)}
    findings = diagnose(MadeUpRun(rows), on_error="raise")
    assert ("exploding_gradient" in alarms(findings)) == found
    if found:
        assert only(findings, "exploding_gradient").first_step == 0


@pytest.mark.parametrize(("value", "found"), [(1e-5, True), (0.5, False)])
def test_values_that_are_clipped_to_their_sign(rng, value, found):
    rows = [
        {**row, "rms": 0.02, "clip_value": value, "clip_algorithm": "value", "clipped": 1}
        for row in trace(healthy(rng))
    ]
    findings = diagnose(run_of(rows), on_error="raise")
    assert ("clipping_dominates" in alarms(findings)) == found
    if found:
        assert "what is left is its sign" in only(findings, "clipping_dominates").message


def test_a_loss_that_rises_first_is_why_gradients_explode(rng):
    norms = {name: series[:30].copy() for name, series in healthy(rng).items()}
    losses = np.full(300, 0.15)
    for index in range(13, 30):
        norms["encoder"][index] = 10.0 ** (index - 10)
        losses[10 * index - 20 : 10 * index - 10] = 2.0 ** (index - 10)
    losses[280:] = 2.0**20
    rows = {"grad": trace(norms), "loss": loss_rows(losses)}
    findings = diagnose(MadeUpRun(rows), on_error="raise")
    assert only(findings, "exploding_gradient").caused_by == "divergence"


def test_a_single_number_is_not_accused(rng):
    norms = {**healthy(rng), "embedding": noise(rng, 60, 3e-9)}
    rows = trace(norms, counts={"embedding": 1})
    assert not alarms(diagnose(run_of(rows), on_error="raise"))


def test_a_clip_that_is_lowered_in_mid_run(rng):
    rows = trace(healthy(rng))
    for row in rows:
        late = row["step"] >= 300
        if row["component"] is None:
            row |= {"clip_value": 1e-4 if late else 5.0, "clipped": int(late)}
            row |= {"clip_coefficient": 1e-4 if late else 1.0, "clip_algorithm": "norm"}
    finding = only(diagnose(run_of(rows), on_error="raise"), "clipping_dominates")
    assert finding.first_step == 300


def test_a_norm_that_is_absurd_from_the_start(rng):
    norms = {name: 1e6 * series for name, series in healthy(rng).items()}
    finding = only(diagnose(run_of(trace(norms)), on_error="raise"), "exploding_gradient")
    assert finding.severity == "warning"
    norms = {**healthy(rng), "head": 1e6 * healthy(rng)["head"]}
    assert "exploding_gradient" not in alarms(diagnose(run_of(trace(norms)), on_error="raise"))
