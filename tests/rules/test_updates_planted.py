"""Each update rule finds its planted fault: the right rule, severity, component and first step."""

import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_diag.rules import diagnose
from tests.rules.planted import MadeUpRun


def windows(losses, *, rates=1e-3, norms=1.0, width=10):
    """Rows as CollapseStop writes them, from the loss and the rate of every step."""
    losses = np.asarray(losses, dtype=float)
    rates = np.broadcast_to(np.asarray(rates, dtype=float), losses.shape)
    rows = []
    for first in range(0, len(losses) - width + 1, width):
        part, rate = losses[first : first + width], rates[first : first + width]
        finite = part[np.isfinite(part)]
        some = len(finite) > 0
        known = np.isfinite(rate).all()
        rows.append(
            {
                "step": first + width - 1,
                "component": None,
                "first_step": first,
                "steps": width,
                "loss": float(finite.mean()) if some else None,
                "loss_std": float(finite.std()) if some else None,
                "loss_min": float(finite.min()) if some else None,
                "loss_max": float(finite.max()) if some else None,
                "nonfinite": int(width - len(finite)),
                "gradient_norm": float(norms),
                "lr": float(rate[-1]) if known else None,
                "lr_nonfinite": int(not known),
                "lr_min": float(rate.min()) if known else None,
                "lr_max": float(rate.max()) if known else None,
            }
        )
    return rows


def updates(ratios, *, every=5, rates=1e-3, counts=None, **more):
    """Rows as UpdateRatio writes them, from ``{component: ratio per measured row}``."""
    rows = []
    for index in range(len(next(iter(ratios.values())))):
        step = every * (index + 1) - 1
        for name, series in ratios.items():
            row = {
                "step": step,
                "component": name,
                "count": (counts or {}).get(name, 5000),
                "update_l2": 10.0 * series[index],
                "weight_l2": 10.0,
                "weight_rms": 0.1,
                "ratio": series[index],
                "unchanged_share": 0.0,
                "nonfinite": 0,
                "lr": float(rates if np.isscalar(rates) else rates[step]),
            }
            rows.append({**row, **{key: value[index] for key, value in more.items()}})
        rows.append({"step": step, "component": None, "count": 10_000, "skipped": 0})
    return rows


def start(loss, norm=1.0):
    """The row that CollapseStop writes at the first step."""
    return [{"step": 0, "component": None, "event": 0, "loss": loss, "gradient_norm": norm}]


def falling(steps=200, first=1.4, last=0.1, speed=40.0, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    curve = last + (first - last) * np.exp(-np.arange(steps) / speed)
    return curve * np.exp(rng.normal(0, noise, steps))


def scheduled(make, steps=200, lr=0.1):
    """The rates that a scheduler of PyTorch gives, stepped every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def alarms(run):
    return {one.rule for one in diagnose(run, on_error="raise") if one.rank > 0}


def only(run, rule):
    found = [one for one in diagnose(run, on_error="raise") if one.rule == rule and one.rank > 0]
    assert len(found) == 1, found
    return found[0]


# ---- learning_rate_too_high ----


def jumping(steps=200, peak=100.0, after=3.0, first=1.4):
    rng = np.random.default_rng(1)
    curve = after + (peak - after) * np.exp(-np.arange(steps) / 15)
    curve = curve * np.exp(rng.normal(0, 0.1, steps))
    curve[0] = first
    return curve


def test_loss_that_jumps_at_once_under_large_steps():
    ratios = {"body": [0.1] * 40, "head": [0.2] * 40}
    run = MadeUpRun(
        {
            "loss": windows(jumping(), rates=0.3),
            "update": updates(ratios, rates=0.3),
            "collapse": start(1.4),
        }
    )
    finding = only(run, "learning_rate_too_high")
    assert (finding.first_step, finding.severity) == (0, "critical")
    assert finding.observed == pytest.approx(jumping()[:20].max() / 1.4)
    assert finding.evidence.file == "records/loss.jsonl"
    assert "0.3" in finding.message
    assert "jumped" in finding.message
    first = diagnose(run)[0]
    assert first.rule == "learning_rate_too_high"


def test_same_jump_under_ordinary_steps_is_not_the_rates_doing():
    ratios = {"body": [1e-3] * 40, "head": [2e-3] * 40}
    rows = {"loss": windows(jumping()), "update": updates(ratios), "collapse": start(1.4)}
    assert "learning_rate_too_high" not in alarms(MadeUpRun(rows))


def test_huge_gradient_before_the_first_step_is_not_the_rates_doing():
    ratios = {"body": [0.1] * 40, "head": [0.2] * 40}
    rows = {"loss": windows(jumping()), "update": updates(ratios), "collapse": start(1.4, 5e3)}
    assert "learning_rate_too_high" not in alarms(MadeUpRun(rows))


def test_loss_that_is_lost_within_the_first_window():
    losses = np.full(200, np.nan)
    losses[:8] = 1.4 * 10.0 ** np.arange(8)
    ratios = {"body": [0.5, math.nan] * 5}
    run = MadeUpRun(
        {
            "loss": windows(losses, rates=3.0),
            "update": updates(ratios, rates=3.0),
            "collapse": start(1.4),
        }
    )
    finding = only(run, "learning_rate_too_high")
    assert (finding.first_step, finding.severity) == (0, "critical")
    assert "not finite" in finding.message


def test_loss_that_stays_up_under_large_steps():
    rng = np.random.default_rng(2)
    losses = 2.77 * np.exp(rng.normal(0, 0.01, 200))
    ratios = {"body": [0.12] * 6 + [0.02] * 34, "head": [0.1] * 6 + [0.03] * 34}
    rows = {"loss": windows(losses, rates=0.1), "update": updates(ratios), "collapse": start(2.8)}
    finding = only(MadeUpRun(rows), "learning_rate_too_high")
    assert "has not come down" in finding.message


def test_rate_that_is_raised_in_mid_run():
    losses = np.concatenate([falling(120), 1.5 * falling(80, 1.0, 1.0)])
    rates = np.where(np.arange(200) < 120, 3e-3, 0.3)
    ratios = {"body": [3e-3] * 24 + [0.3] * 16}
    rows = {"loss": windows(losses, rates=rates), "update": updates(ratios, rates=rates)}
    finding = only(MadeUpRun(rows), "learning_rate_too_high")
    assert finding.first_step == 120
    assert "raised from 0.003 to 0.3" in finding.message


def test_loss_that_leaves_later_under_steps_that_were_large():
    losses = np.concatenate([falling(100), falling(100, 0.3, 1.5, 20)])
    ratios = {"body": [0.05] * 40, "head": [0.04] * 40}
    rows = {"loss": windows(losses), "update": updates(ratios)}
    finding = only(MadeUpRun(rows), "learning_rate_too_high")
    assert finding.first_step == 100


def test_loss_that_leaves_later_at_ordinary_steps_is_not_the_rates_doing():
    losses = np.concatenate([falling(100), falling(100, 0.3, 1.5, 20)])
    ratios = {"body": [2e-3] * 20 + [0.5] * 20}
    rows = {"loss": windows(losses), "update": updates(ratios)}
    assert "learning_rate_too_high" not in alarms(MadeUpRun(rows))


# ---- learning_rate_too_low ----


def test_rate_with_which_nothing_moves():
    rng = np.random.default_rng(3)
    losses = 2.3 * np.exp(rng.normal(0, 0.02, 200))
    ratios = {"body": [2e-6] * 40, "head": [6e-6] * 40}
    rows = {"loss": windows(losses, rates=1e-6), "update": updates(ratios, rates=1e-6)}
    finding = only(MadeUpRun(rows), "learning_rate_too_low")
    assert (finding.first_step, finding.severity) == (0, "warning")
    assert finding.observed == pytest.approx(4e-6)
    assert "1e-06" in finding.message


WARMING_UP, DECAYING = np.linspace(1e-8, 1e-6, 200), 1e-6 * 0.97 ** np.arange(200)


@pytest.mark.parametrize(
    ("rates", "begins", "found"),
    [(WARMING_UP, 0, False), (DECAYING, 0, True), (DECAYING, 1000, False)],
    ids=["warming up", "decaying, all of it in sight", "decaying, after what is not in sight"],
)
def test_rate_that_is_not_at_its_height(rates, begins, found):
    losses = falling(200, 1.4, 1.4)
    ratios = {"body": [2e-6] * 40, "head": [6e-6] * 40}
    rows = {"loss": windows(losses, rates=rates), "update": updates(ratios, rates=rates)}
    for file in rows.values():
        for row in file:
            row |= {key: row[key] + begins for key in ("step", "first_step") if key in row}
    assert ("learning_rate_too_low" in alarms(MadeUpRun(rows))) == found


# ---- update_too_large, update_too_small ----


def test_component_that_is_overwritten_step_by_step():
    ratios = {"body": [2e-3] * 40, "neck": [2e-3] * 40, "head": [2e-3] * 20 + [0.4] * 20}
    rows = {"update": updates(ratios), "loss": windows(falling(200, 1.0, 1.0))}
    finding = only(MadeUpRun(rows), "update_too_large")
    assert (finding.component, finding.severity) == ("head", "warning")
    assert finding.first_step == 104
    assert finding.observed == pytest.approx(0.4)


def test_steps_larger_than_the_weights_are_critical_and_named_once():
    ratios = {"body": [2.0] * 40, "head": [3.0] * 40}
    rows = {"update": updates(ratios), "loss": windows(falling(200, 1.0, 1.0))}
    finding = only(MadeUpRun(rows), "update_too_large")
    assert (finding.component, finding.severity) == (None, "critical")


def test_component_that_does_not_move():
    ratios = {"body": [2e-3] * 40, "neck": [2e-3] * 40, "head": [1e-8] * 40}
    rows = {"update": updates(ratios), "loss": windows(falling(200, 1.0, 1.0))}
    finding = only(MadeUpRun(rows), "update_too_small")
    assert finding.component == "head"
    assert finding.observed == pytest.approx(1e-8)


def test_updates_that_are_rounded_away():
    rows = updates({"body": [1e-3] * 40}, unchanged_share=[0.97] * 40)
    grad = [{"step": 4 + 5 * i, "component": "body", "l2": 0.1, "zeros": 0.0} for i in range(40)]
    run = {"update": rows, "grad": grad, "loss": windows(falling(200, 1.0, 1.0))}
    finding = only(MadeUpRun(run), "update_too_small")
    assert finding.observed == pytest.approx(0.97)
    assert "rounded" in finding.message


# ---- scheduler_misuse ----

SPENT = {
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "steps": lambda o: schedulers.StepLR(o, 10),
    "linear": lambda o: schedulers.LinearLR(o, 1.0, 0.0, 60),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 80, 2.0),
}


@pytest.mark.parametrize("name", SPENT)
def test_rate_that_is_spent_early(name):
    rows = {"loss": windows(falling(), rates=scheduled(SPENT[name]))}
    finding = only(MadeUpRun(rows), "scheduler_misuse")
    assert (finding.first_step, finding.severity) == (0, "warning")
    assert "spent early" in finding.message
    assert "interval" in finding.suggestion


@pytest.mark.parametrize("half", [5, 10, 15, 20, 33, 60])
def test_cosine_that_goes_on_past_its_end(half):
    rates = scheduled(lambda o: schedulers.CosineAnnealingLR(o, half))
    finding = only(MadeUpRun({"loss": windows(falling(), rates=rates)}), "scheduler_misuse")
    assert finding.first_step == 0
    assert "T_max" in finding.message
    assert finding.observed >= (200 // half) // 2 - 1


def test_rate_of_zero_all_the_time():
    rows = {"loss": windows(falling(200, 1.0, 1.0), rates=0.0)}
    finding = only(MadeUpRun(rows), "scheduler_misuse")
    assert (finding.first_step, finding.severity) == (0, "critical")


def test_rate_of_zero_for_the_first_epoch():
    rates = np.repeat([0.0, 0.5, 1.0, 1.0, 1.0], 40)
    finding = only(MadeUpRun({"loss": windows(falling(), rates=rates)}), "scheduler_misuse")
    assert (finding.severity, finding.last_step, finding.observed) == ("warning", 39, 40.0)


def test_rate_that_rises_without_end():
    rates = scheduled(lambda o: schedulers.ExponentialLR(o, 1.05), lr=1e-3)
    finding = only(MadeUpRun({"loss": windows(falling(), rates=rates)}), "scheduler_misuse")
    assert (finding.first_step, finding.severity) == (0, "critical")
    assert finding.observed == pytest.approx(1.05**199)


@pytest.mark.parametrize("bad", [-1e-4, math.nan], ids=["negative", "not a number"])
def test_rate_that_is_none(bad):
    rates = np.where(np.arange(200) < 150, 1e-3, bad)
    finding = only(MadeUpRun({"loss": windows(falling(), rates=rates)}), "scheduler_misuse")
    assert (finding.first_step, finding.severity) == (150, "critical")


def test_warm_up_that_does_not_end():
    rates = np.linspace(0, 1e-5, 200)
    ratios = {"body": 1e-5 * np.arange(40) / 40, "head": 2e-5 * np.arange(40) / 40}
    losses = falling(200, 1.0, 1.0)
    rows = {"loss": windows(losses, rates=rates), "update": updates(ratios, rates=rates)}
    finding = only(MadeUpRun(rows), "scheduler_misuse")
    assert "warm-up does not end" in finding.message


def test_rate_is_read_from_a_monitors_rows_too():
    rates = scheduled(SPENT["exponential"])
    rows = [{"step": i, "lr-SGD": float(rate)} for i, rate in enumerate(rates)]
    finding = only(MadeUpRun({"metrics": rows}), "scheduler_misuse")
    assert finding.evidence.file == "records/metrics.jsonl"


def test_cause_comes_first():
    rates = scheduled(SPENT["exponential"], lr=1e-3)
    ratios = {"body": 1e-2 * rates[4::5] / 1e-3}
    losses = falling(200, 1.0, 1.0)
    rows = {"loss": windows(losses, rates=rates), "update": updates(ratios, rates=rates)}
    assert diagnose(MadeUpRun(rows))[0].rule == "scheduler_misuse"


# ---- parts that have a rate of their own ----


def test_a_part_whose_rate_is_far_above_that_of_the_others():
    ratios = {"body": [2e-3] * 40, "neck": [2e-3] * 40, "head": [0.2] + [0.02] * 39}
    rows = updates(ratios)
    for row in rows:
        if row["component"] == "head":
            row["lr"] = 0.1
    finding = only(MadeUpRun({"update": rows}), "learning_rate_too_high")
    assert (finding.component, finding.first_step) == ("head", 4)
    assert "is 0.1, where the other parts have 0.001" in finding.message


@pytest.mark.parametrize(("rate", "ratio"), [(0.1, 0.02), (0.01, 0.2)], ids=["calm", "near"])
def test_a_part_with_a_higher_rate_may_be_meant_so(rate, ratio):
    ratios = {"body": [2e-3] * 40, "head": [ratio] + [0.005] * 39}
    rows = updates(ratios)
    for row in rows:
        if row["component"] == "head":
            row["lr"] = rate
    assert "learning_rate_too_high" not in alarms(MadeUpRun({"update": rows}))


def test_a_rate_that_leaps_explains_what_blows_up_elsewhere():
    ratios = {"body": [1e-4] * 20 + [0.4] + [0.02] * 19, "head": [2e-3] * 40}
    rates = np.where(np.arange(200) < 100, 1e-4, 0.5)
    rows = updates(ratios, rates=rates)
    for row in rows:
        if row["component"] == "head":
            row["lr"] = 1e-3
    gradients = [
        {"step": step, "component": name, "l2": 0.5 if step < 104 else 500.0, "count": 1000}
        for step in range(4, 200, 5)
        for name in (None, "head")
    ]
    found = diagnose(MadeUpRun({"update": rows, "grad": gradients}), on_error="raise")
    assert (found[0].rule, found[0].component, found[0].first_step) == (
        *("learning_rate_too_high", "body"),
        104,
    )
    exploded = next(one for one in found if one.rule == "exploding_gradient")
    assert exploded.caused_by == "learning_rate_too_high"


def test_a_part_that_stops_in_mid_run_though_it_has_a_gradient():
    share = [0.0] * 20 + [1.0] * 20
    rows = updates({"body": [2e-3] * 20 + [0.0] * 20, "head": [2e-3] * 40}, unchanged_share=share)
    for row in rows:
        if row["component"] == "head":
            row["unchanged_share"] = 0.0
    gradients = [
        {"step": step, "component": "body", "l2": 0.5, "count": 1000} for step in range(4, 200, 5)
    ]
    run = MadeUpRun({"update": rows, "grad": gradients})
    finding = only(run, "update_too_small")
    assert (finding.component, finding.first_step) == ("body", 104)
    without = [{**row, "l2": 0.0} if row["step"] > 100 else row for row in gradients]
    assert "update_too_small" not in alarms(MadeUpRun({"update": rows, "grad": without}))


# ---- steps that have left nothing to measure ----


@pytest.mark.parametrize(
    ("rms", "rate", "norm", "found"),
    [
        (10.0, 1.0, 1.0, True),  # as the first step of RMSprop at that rate leaves them
        (1.0, 10.0, 9.0, True),  # ten times nine, over weights of norm ten
        (1.0, 10.0, 1e-6, False),  # there was no gradient to begin with
        (0.1, 1e-3, 9.0, False),  # no such rate
    ],
)
def test_first_steps_that_overwrote_the_weights(rms, rate, norm, found):
    rows = updates({"body": [1e-9] * 40, "head": [2e-9] * 40}, rates=rate)
    for row in rows:
        row |= {"weight_rms": rms, "weight_l2": 10.0}
    losses = np.full(200, 3.4657)
    losses[0] = 4.4
    run = MadeUpRun(
        {"loss": windows(losses, rates=rate), "update": rows, "collapse": start(4.4, norm)}
    )
    assert ("learning_rate_too_high" in alarms(run)) == found


def test_weights_that_their_decay_makes_fade_are_not_a_rate_that_is_too_high():
    ratios = {"body": [0.1] * 40, "head": [0.1] * 40}
    losses = 0.69 + 0.01 * np.random.default_rng(0).normal(size=200)
    loss = windows(losses, rates=0.1)
    rows = updates(ratios, rates=0.1)
    assert "learning_rate_too_high" in alarms(MadeUpRun({"loss": loss, "update": rows}))
    for row in rows:
        row["weight_rms"] = 0.1 * 0.9 ** row["step"]
    assert "learning_rate_too_high" not in alarms(MadeUpRun({"loss": loss, "update": rows}))


def test_a_warm_up_that_begins_anew():
    again = np.linspace(1e-8, 1e-6, 80)
    rates = np.concatenate([np.linspace(1e-5, 1e-3, 20), np.full(100, 1e-3), again])
    run = MadeUpRun({"loss": windows(falling(), rates=rates)})
    finding = only(run, "scheduler_misuse")
    assert finding.first_step == 120
    assert "begins anew" in finding.message
    stepped = np.concatenate([np.full(120, 1e-3), np.full(80, 1e-5)])
    assert not alarms(MadeUpRun({"loss": windows(falling(), rates=stepped)}))


# ---- runs that were stopped at once ----


def ended(norms, losses, kinds, rate):
    rows = [
        {
            "step": step,
            "component": None,
            "event": int(step > 0),
            "gradient_norm": norm,
            "kinds": kinds if step else None,
            "loss": loss,
            "streak": step,
            "action": "stop" if step == len(norms) - 1 else None,
        }
        for step, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    ]
    return MadeUpRun({"collapse": rows, "loss": windows(losses, rates=rate, width=len(losses))})


@pytest.mark.parametrize(
    ("norms", "losses", "kinds"),
    [
        ([5.0, 3e4, 2e9, 2e17], [32.0, 2e8, 1e16, 1e27], "exploding_gradient,loss_spike"),
        ([3.9, 1e-15, 1e-20, 1e-22], [5.66, 4.852, 4.852, 4.852], "vanishing_gradient"),
    ],
)
def test_a_run_that_its_first_step_has_ruined(norms, losses, kinds):
    found = diagnose(ended(norms, losses, kinds, 30.0), on_error="raise")
    assert (found[0].rule, found[0].severity) == ("learning_rate_too_high", "critical")
    (other,) = [one for one in found if one.rule in kinds.split(",")[:1]]
    assert other.caused_by == "learning_rate_too_high"


def test_a_run_that_explodes_from_its_start_on():
    run = ended([100.0, 300.0, 1900.0, 700.0], [5.5, 6.0, 9.0, 7.0], "exploding_gradient", 1e-3)
    assert alarms(run) == {"exploding_gradient"}
    finding = only(run, "exploding_gradient")
    assert (finding.severity, finding.first_step) == ("critical", 1)


@pytest.mark.parametrize(("rate", "found"), [(30.0, True), (1e-4, False)])
def test_a_run_that_collapses_at_once_and_is_not_stopped(rate, found):
    run = ended([5.0] + [3e4] * 60, [32.0] + [2e8] * 60, "exploding_gradient", rate)
    run.rows["collapse"][-1]["action"] = None
    said = " ".join(one.message for one in diagnose(run, on_error="raise"))
    assert ("The first step ruined the run" in said) == found


def test_a_wild_jump_counts_even_if_the_loss_comes_back():
    losses = falling(200, 1.4, 0.05, speed=20.0)
    losses[2:8] = 500.0
    ratios = {"body": [0.15] + [0.01] * 39, "head": [0.17] + [0.01] * 39}
    rows = {"loss": windows(losses, rates=1.0), "update": updates(ratios, rates=1.0)}
    rows["collapse"] = start(1.4)
    assert only(MadeUpRun(rows), "learning_rate_too_high").first_step == 0
    losses[2:8] = 5.0
    rows["loss"] = windows(losses, rates=1.0)
    assert "learning_rate_too_high" not in alarms(MadeUpRun(rows))


@pytest.mark.parametrize(("at", "found"), [(20, True), (120, False)])
def test_a_rate_that_is_low_for_most_of_the_run(at, found):
    rates = np.where(np.arange(200) < at, 5e-3, 5e-5)
    run = MadeUpRun({"loss": windows(falling(), rates=rates)})
    assert ("scheduler_misuse" in alarms(run)) == found


def test_a_part_whose_rate_becomes_zero_though_it_has_a_gradient():
    rows = updates({"body": [2e-3] * 20 + [0.0] * 20, "head": [2e-3] * 40})
    for row in rows:
        if row["component"] == "body" and row["step"] > 100:
            row |= {"lr": 0.0, "unchanged_share": 1.0}
    gradients = [
        {"step": step, "component": "body", "l2": 0.5, "count": 1000} for step in range(4, 200, 5)
    ]
    finding = only(MadeUpRun({"update": rows, "grad": gradients}), "update_too_small")
    assert (finding.component, finding.first_step) == ("body", 104)


def test_a_gradient_of_exactly_zero_is_no_mark_of_the_rate():
    run = ended([3.9, 0.0, 0.0, 0.0], [5.66, 4.852, 4.852, 4.852], "vanishing_gradient", 30.0)
    assert "learning_rate_too_high" not in alarms(run)


@pytest.mark.parametrize(("ratio", "found"), [(0.005, True), (0.2, False)])
def test_weights_that_grew_more_than_their_steps_can_have_made_them_are_noted(ratio, found):
    rows = updates({"body": [ratio] * 40, "head": [0.005] * 40})
    for row in rows:
        if row["component"] == "body" and row["step"] > 100:
            row["weight_rms"] = 0.7
    noted = [one for one in diagnose(MadeUpRun({"update": rows})) if one.unit == "times its size"]
    assert bool(noted) == found
    assert all((one.severity, one.component) == ("info", "body") for one in noted)
