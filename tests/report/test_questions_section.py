"""Are the five questions answered from the numbers, and from nothing where there are none?"""

import math
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.report import write_report
from lightning_diag.report.groups import grouped
from lightning_diag.report.question_series import loss_parts, part_weights, series, total_loss
from lightning_diag.report.sections import SECTIONS
from lightning_diag.report.sections.questions import agreed, questions_section
from lightning_diag.rules import Finding
from tests.report.conftest import HOSTILE

QUESTIONS = (
    "Is training healthy?",
    "Which loss dominates?",
    "Is the latent space alive?",
    "Is it overfitting?",
    "Is the machine the limit?",
)
WEIGHTS = {"model": {"image_weight": 20.0, "caption_weight": 1.0}, "caption_weight": 1.0}


def metrics(image, caption, *, total=None, val=()):
    """Two parts each ten steps, their total with the weights 20 and 1, and a validation loss."""
    rows = []
    for i, (a, b) in enumerate(zip(image, caption, strict=True)):
        whole = 20.0 * a + b if total is None else total[i]
        rows.append(
            {"step": 10 * i + 9, "train_loss": whole, "loss_image": a, "loss_caption": b}
            | {"lr-AdamW": 1e-3}
        )
    return rows + [{"step": step, "val_loss": value} for step, value in val]


def falling(start, end, count=40):
    return list(np.geomspace(start, end, count))


def grad(norms, **more):
    return [{"step": 10 * i + 9, "l2": norm, "nonfinite": 0} | more for i, norm in enumerate(norms)]


def latent(step, **more):
    row = {"step": step, "component": "encoder", "features": 64, "rank_limit": 63}
    row |= {"effective_rank": 30.0, "mean_cosine": 0.1, "std_ratio": 0.95, "dead_dimensions": 0}
    return row | more


def hardware(**more):
    row = {"data_wait": 0.05, "samples_per_second": 300.0, "cpu_percent": 80.0}
    return [{"step": 10 * i + 9} | row | more for i in range(10)]


def answers(run):
    section = questions_section(run)
    assert section.title == "Five questions"
    return {
        question: line.removeprefix(question).strip()
        for question in QUESTIONS
        for line in section.lines
        if line.startswith(question)
    }


@pytest.fixture
def good(write_run):
    rows = metrics(falling(0.1, 0.01), falling(6, 1), val=[(99, 4.0), (199, 3.0), (399, 2.0)])
    return write_run(
        {
            "metrics": rows,
            "grad": grad(falling(3, 1)),
            "latent": [latent(49, effective_rank=12.0), latent(399)],
            "hardware": hardware(gpu_percent=93.0, gpu_memory_percent=40.0),
        },
        config=WEIGHTS,
    )


def test_a_good_run(good):
    said = answers(good)
    assert list(said) == list(QUESTIONS)
    healthy, dominant, alive, overfitting, machine = said.values()
    whole = 20 * np.array(falling(0.1, 0.01)) + np.array(falling(6, 1))
    start, end = (f"{np.median(part):.3g}" for part in (whole[:4], whole[-4:]))
    first, last = (f"{np.median(part):.3g}" for part in (falling(3, 1)[:4], falling(3, 1)[-4:]))
    assert healthy == (
        f"Yes, as far as its curves show: `train_loss` fell from {start} (steps 9 to 39) to {end} "
        f"(steps 369 to 399, medians); the gradient norm went from {first} to {last}, at most 3 at "
        "step 9."
    )
    image = 20 * np.mean(falling(0.1, 0.01)[-4:])
    caption = np.mean(falling(6, 1)[-4:])
    share = 100 * caption / (image + caption)
    assert dominant.startswith(
        f"`caption`: over steps 369 to 399 the loss consisted of `caption` {share:.3g} %, "
        f"`image` {100 - share:.3g} % (the parts times their weights;"
    )
    assert alive == (
        "Yes: `encoder` had effective rank 30 of at most 63 at step 399 (12 at step 49), mean "
        "cosine between samples 0.1, deviation of a dimension 0.95 of that of random directions."
    )
    then, now = (f"{x:.3g}" for x in (3 - np.median(whole[16:20]), 2 - np.median(whole[-4:])))
    assert overfitting == (
        "No: `val_loss` was lowest at the end; at step 399 `val_loss` was 2 and `train_loss` "
        f"{end}, which is {now} apart ({then} at step 199)."
    )
    assert machine == (
        "The GPU was busy: 5 % of the time went between batches, mostly in waiting for data, 300 "
        "samples per second, 93 % of the time with the GPU in use, 40 % of its memory, 80 % of "
        "the processors in use (medians of steps 9 to 99)."
    )


def test_it_comes_first_in_every_form(good):
    assert SECTIONS[0] == "questions"
    report = write_report(good)
    assert report.sections[0].title == "Five questions"
    for form in ("report.html", "report.md"):
        text = report.files[form].read_text()
        assert text.index("Five questions") < text.index("Representation")
        assert all(question.rstrip("?") in text for question in QUESTIONS)


def test_no_section_where_nothing_bears_on_a_question(write_run, healthy_rows):
    assert questions_section(write_run({"grad": healthy_rows["grad"]})) is None


def test_all_five_are_answered_where_one_loss_was_logged(write_run, healthy_rows):
    said = answers(write_run(healthy_rows))
    assert tuple(said) == QUESTIONS
    assert said["Which loss dominates?"].startswith("There is one loss")


def test_the_loss_that_collapse_stop_saw_stands_in_for_one_that_was_not_logged(write_run):
    rows = [{"step": 10 * i + 9, "loss": 2.0 * 0.9**i, "nonfinite": 0} for i in range(20)]
    said = answers(write_run({"loss": rows}))
    assert said["Is training healthy?"].startswith("Yes, as far as its curves show: `loss` fell")
    rows[15] |= {"loss": None, "nonfinite": 10}
    said = answers(write_run({"loss": rows}, name="lost"))
    assert said["Is training healthy?"].startswith("No: `loss` was NaN or infinite at 1 of 20")


def test_curves_do_not_call_healthy_what_findings_call_sick(write_run, healthy_rows):
    section = questions_section(write_run(healthy_rows))
    assert agreed([section], []) == [section]
    groups = grouped([Finding("learning_rate_too_high", "warning")])
    first, *rest = agreed([section], groups)[0].lines
    assert first.startswith("Is training healthy? No: the learning rate is too high. By its curves")
    assert rest == list(section.lines[1:])


def test_a_latent_space_of_zeros_has_collapsed(write_run):
    zeros = latent(19, latent_norm=0.0, mean_cosine=None, effective_rank=None)
    said = answers(write_run({"latent": [latent(9), zeros]}))["Is the latent space alive?"]
    assert said == "No, it has collapsed: all of `encoder` is zero at step 19."


def test_what_is_missing_is_said(write_run):
    said = answers(write_run({"latent": [latent(9)]}))
    assert [answer.partition(":")[0] for answer in said.values()] == [
        *("Cannot be told", "Cannot be told", "Yes", "Cannot be told", "Cannot be told")
    ]
    assert "no part of the loss was logged" in said["Which loss dominates?"]
    assert "HardwareMonitor" in said["Is the machine the limit?"]
    rows = [{"step": i, "loss_a": 1.0, "loss_b": 2.0} for i in range(9)]
    said = answers(write_run({"metrics": rows}, name="other"))
    assert said["Is the latent space alive?"] == "Cannot be told: `LatentStats` left no rows."
    assert "no training loss" in said["Is training healthy?"]
    assert said["Which loss dominates?"].startswith("`b`: over step 8 the loss consisted of `b` 66")
    assert "without weights, as none are configured" in said["Which loss dominates?"]


# ---- healthy? ----


def healthy(write_run, rows, info=None):
    return answers(write_run(rows, config=WEIGHTS, info=info))["Is training healthy?"]


def test_a_loss_that_was_not_finite(write_run):
    rows = metrics([0.1] * 9, falling(6, 1, 9))
    rows[4] |= {"train_loss": None, "train_loss_nonfinite": 1}
    assert healthy(write_run, {"metrics": rows}) == (
        "No: `train_loss` was NaN or infinite at 1 of 9 logged steps, first at step 49."
    )


def test_a_loss_that_rose(write_run):
    said = healthy(write_run, {"metrics": metrics([0.1] * 40, falling(1, 6))})
    assert said.startswith("No: `train_loss` rose from 3.")
    assert said.endswith("no gradient was measured.")


def test_a_loss_that_went_nowhere(write_run):
    noise = 1 + 0.1 * np.random.default_rng(0).standard_normal(100)
    said = healthy(write_run, {"metrics": metrics([0.1] * 100, noise)})
    assert said.startswith("Hardly: `train_loss` went from ")
    differ = f"{np.median(np.abs(np.diff(2 + noise))):.3g}"
    assert f"and its neighbours differ by {differ}; " in said


def test_a_gradient_out_of_hand(write_run):
    rows = {"metrics": metrics([0.1] * 40, falling(6, 1)), "grad": grad(falling(1, 1e4))}
    assert healthy(write_run, rows).startswith("No: the gradient norm went from ")
    rows["grad"] = grad([1.0] * 40)
    rows["grad"][7]["nonfinite"] = 3
    assert "the gradient was NaN or infinite, first at step 79" in _of(rows, write_run)


def _of(rows, write_run):
    return answers(write_run(rows, config=WEIGHTS, name="again"))["Is training healthy?"]


def test_the_gradient_is_that_of_the_whole_model(write_run):
    rows = {"metrics": metrics([0.1] * 40, falling(6, 1))}
    rows["grad"] = grad([1.0] * 40) + grad(falling(1, 1e9), component="encoder")
    assert "the gradient norm went from 1 to 1, at most 1 at step 9" in healthy(write_run, rows)


def test_a_run_that_a_diagnostic_stopped(write_run):
    stop = {"diagnostic": "CollapseStop", "rule": "loss", "message": "three events in a row."}
    said = healthy(write_run, {"latent": [latent(9)]}, info={"stop_reason": stop})
    assert said == "No: CollapseStop stopped the run: three events in a row."


def test_few_points(write_run):
    rows = {"metrics": metrics([0.1] * 3, [3.0, 2.0, 1.0])}
    assert healthy(write_run, rows) == "Cannot be told: `train_loss` was logged at 3 steps alone."


# ---- which loss dominates? ----


def dominant(write_run, rows, config=WEIGHTS):
    return answers(write_run({"metrics": rows}, config=config))["Which loss dominates?"]


def test_no_part_is_more_than_half(write_run):
    rows = [{"step": i, "loss_a": 1.0, "loss_b": -1.0, "loss_c": 1.0} for i in range(20)]
    said = dominant(write_run, rows, None)
    assert said.startswith("None: over steps 18 to 19 the loss consisted of `a` 33.3 %, `b` 33.3 %")


def test_parts_that_do_not_add_up_are_no_answer(write_run):
    said = dominant(write_run, metrics([0.1] * 40, [1.0] * 40), None)
    assert said == (
        "Cannot be told: the parts as they were logged add up to 1.1 over steps 369 to 399, and "
        "`train_loss` was 3: there are weights or parts that the run does not show."
    )


def test_parts_that_are_zero(write_run):
    rows = metrics([0.0] * 9, [0.0] * 9)
    assert dominant(write_run, rows) == "Cannot be told: all parts are zero."


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (["loss_image", "loss_caption", "loss_share/image", "train_loss"], {"image", "caption"}),
        (["train/loss_image", "train/loss/caption", "val/loss_image"], {"image", "caption"}),
        (["image_loss", "train_caption_loss", "val_image_loss"], {"image", "caption"}),
        (["loss_image_step", "loss_image_epoch", "test_loss_image"], {"image"}),
        (["loss", "train_loss", "loss_total", "total_loss", "loss_image_nonfinite"], set()),
        (["train_loss_step", "train_loss_epoch", "val_loss", "lossy"], set()),
    ],
)
def test_what_is_a_part(columns, parts):
    frame = pl.DataFrame({"step": [1, 2], **{name: [1.0, 2.0] for name in columns}})
    assert set(loss_parts(frame)) == parts


@pytest.mark.parametrize(
    ("columns", "train", "val"),
    [
        (["train_loss", "val_loss"], "train_loss", "val_loss"),
        (["loss", "valid/loss"], "loss", "valid/loss"),
        (["train_loss_step", "val_loss_epoch"], "train_loss_step", "val_loss_epoch"),
        (["loss_total", "validation_total_loss"], "loss_total", "validation_total_loss"),
        (["train_loss_image", "val_loss_image"], None, None),
    ],
)
def test_what_is_the_whole(columns, train, val):
    frame = pl.DataFrame({"step": [1, 2], **{name: [1.0, 2.0] for name in columns}})
    found = total_loss(frame), total_loss(frame, ("val", "valid", "validation"))
    assert tuple(one and one.name for one in found) == (train, val)


def test_of_two_spellings_the_one_with_more_points_counts():
    rows = {"step": [1, 2, 3], "loss_a_epoch": [None, None, 5.0], "loss_a_step": [1.0, 2.0, 3.0]}
    assert loss_parts(pl.DataFrame(rows))["a"].name == "loss_a_step"


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        ({"image_weight": 2}, 2.0),
        ({"model": {"image_loss_weight": 2.0}}, 2.0),
        ({"model": {"loss_weights": {"image": 2.0}}}, 2.0),
        ({"weights": {"image": 2.0}, "image_weight": 2.0}, 2.0),
        ({"lambda_image": 2.0}, 2.0),
        ({"image_weight": 2.0, "model": {"image_weight": 3.0}}, None),
        ({"weight_decay": 2.0, "subimage_weight": 2.0, "image_weight_decay": 2.0}, None),
        ({"image_weight": True}, None),
        ({"image_weight": "2"}, None),
    ],
)
def test_weights_in_a_configuration(config, weight):
    assert part_weights(config, ["image"]).get("image") == weight


# ---- alive? ----


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({}, "Yes"),
        ({"mean_cosine": 0.995}, "No, it has collapsed"),
        ({"effective_rank": 1.2}, "No, it has collapsed"),
        ({"effective_rank": 2.0}, "In part"),
        ({"dead_dimensions": 40}, "In part"),
        ({"mean_cosine": None}, "Cannot be told"),
        ({"effective_rank": math.nan}, "Cannot be told"),
    ],
)
def test_the_verdict_on_a_latent_space(write_run, numbers, verdict):
    said = answers(write_run({"latent": [latent(49), latent(99, **numbers)]}))
    assert said["Is the latent space alive?"].partition(":")[0] == verdict


def test_the_deviation_of_all_elements_decides_nothing(write_run):
    """A collapsed encoder may have any: it is the norm over the root of the dimensions."""
    rows = [latent(49, latent_std=0.63), latent(99, latent_std=0.63, mean_cosine=1.0)]
    said = answers(write_run({"latent": rows}))["Is the latent space alive?"]
    assert said.startswith("No, it has collapsed")
    assert "0.63" not in said


def test_one_sentence_a_module(write_run):
    section = questions_section(write_run({"latent": [latent(9), latent(9, component="head")]}))
    assert sum(line.startswith("Is the latent space alive?") for line in section.lines) == 2


# ---- overfitting? ----


@pytest.mark.parametrize(
    ("val", "verdict"),
    [
        ([5.0, 3.0, 2.0, 2.5, 3.0], "Yes: `val_loss` was lowest, 2, at step 239 and 3 at step 399"),
        ([5.0, 3.0, 2.0, 2.0, 2.1], "Hardly: `val_loss` was lowest, 2, at step 239"),
        ([5.0, 4.0, 3.0, 2.0, 1.0], "No: `val_loss` was lowest at the end"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "Yes: `val_loss` was lowest, 1, at step 79 and 5 at step 399"),
        ([5.0], "Cannot be told from one validation"),
        ([], "Cannot be told: no validation loss was logged"),
    ],
)
def test_the_verdict_on_overfitting(write_run, val, verdict):
    steps = np.linspace(79, 399, len(val)).astype(int).tolist() if len(val) > 1 else [399]
    rows = metrics([0.01] * 40, falling(6, 0.1), val=zip(steps[: len(val)], val, strict=True))
    said = answers(write_run({"metrics": rows}, config=WEIGHTS))["Is it overfitting?"]
    assert said.startswith(verdict)


def test_a_validation_loss_that_rises_with_the_training_loss(write_run):
    train = falling(6, 1, 20) + falling(1, 6, 20)
    val = [(99, 3.0), (199, 1.0), (399, 5.0)]
    rows = metrics([0.0] * 40, train, val=val)
    said = answers(write_run({"metrics": rows}, config=WEIGHTS))["Is it overfitting?"]
    assert said.startswith("No: ")
    assert said.endswith("which did not fall any further.")


# ---- hardware? ----


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"data_wait": 0.6, "gpu_percent": 90.0}, "Yes, its input: 60 % of the time"),
        ({"data_wait": 0.4, "gpu_percent": 90.0}, "In part, its input: 40 % of the time"),
        ({"gpu_percent": 12.0}, "The GPU had little to do: 5 % of the time"),
        ({}, "Not its input: 5 % of the time"),
    ],
)
def test_the_verdict_on_the_machine(write_run, numbers, verdict):
    rows = {"latent": [latent(9)], "hardware": hardware(**numbers)}
    assert answers(write_run(rows))["Is the machine the limit?"].startswith(verdict)


def test_memory_that_is_nearly_full(write_run):
    rows = {"latent": [latent(9)], "hardware": hardware(memory_percent=97.0)}
    said = answers(write_run(rows))["Is the machine the limit?"]
    assert said.endswith("Memory was nearly full: 97 %.")


# ---- series ----


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_the_windows_of_a_series(values):
    one = series(pl.DataFrame({"step": range(len(values)), "x": values}), "x")
    tenth = max(1, len(values) // 10)
    assert one.start.median == pytest.approx(np.median(values[:tenth]))
    assert one.end.mean == pytest.approx(np.mean(values[-tenth:]))
    assert (one.end.first, one.end.last) == (len(values) - tenth, len(values) - 1)
    assert one.around(len(values) - 1) == one.end
    expected = np.median(np.abs(np.diff(values))) if len(values) > 1 else 0.0
    assert one.noise == pytest.approx(expected)


@pytest.mark.parametrize(
    "rows",
    [
        {"metrics": [{"step": 3, "loss_a": "odd", "loss_b": 1.0, f"loss_{HOSTILE}": 2.0}] * 9},
        {"latent": [{"step": 3}, {"step": None}]},
        {"latent": [latent(3, component=HOSTILE, rank_limit=0)]},
        {
            "latent": [latent(3)],
            "hardware": [{"step": 3, "data_wait": None}],
            "grad": [{"step": 3}],
        },
    ],
)
def test_odd_rows(write_run, rows):
    assert len(questions_section(write_run(rows)).lines) == len(QUESTIONS)


def test_names_are_no_markup(write_run):
    rows = [{"step": i, f"loss_{HOSTILE}": 2.0, "loss_b": 1.0} for i in range(9)]
    report = write_report(write_run({"metrics": rows, "latent": [latent(3, component=HOSTILE)]}))
    assert sum("<img" in line for line in report.sections[0].lines) == 2
    page = report.files["report.html"].read_text()
    assert "&lt;img" in page
    assert not re.search("<img.src=x", page)
