"""Two runs side by side: what is gone, new and still there, and what the numbers did."""

import json
import math
import re
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from lightning_diag.records.read_run import Run
from lightning_diag.report.comparison import Comparison, compare
from lightning_diag.report.comparison_findings import FindingChange, compared_findings
from lightning_diag.report.comparison_metrics import LOSS, MetricChange
from lightning_diag.report.comparison_page import comparison_page
from lightning_diag.report.comparison_text import print_comparison
from lightning_diag.report.page_parts import drawn, writable
from lightning_diag.report.series import Panel, line_chart
from lightning_diag.rules import Finding

TOP = (
    "schema before after fail_on exit_code headline findings metrics machine configuration "
    "environment watching"
)
FINDING = (
    "rule component severity_before severity_after change caused_by known_cause reached "
    "before after"
)
METRIC = (
    "name unit goal before after best_before best_after step at_step_before at_step_after better"
)
BASE = {"epoch": 0, "time": 0.0, "attempt": 1, "component": None}


def made(rule, severity="warning", component=None, **more):
    return Finding(rule, severity, component, **more)


def states(before, after):
    return [
        (one.state, one.finding.rule, one.finding.component, one.change)
        for one in compared_findings(before, after)
    ]


def write(folder, *, metrics=(), grad=(), config=None, info=None, **prefixes):
    (folder / "records").mkdir(parents=True)
    for prefix, rows in {"metrics": metrics, "grad": grad, **prefixes}.items():
        if rows:
            text = "".join(json.dumps({**BASE, **row}) + "\n" for row in rows)
            (folder / "records" / f"{prefix}.jsonl").write_text(text)
    (folder / "run.json").write_text(json.dumps(info if info is not None else {}))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Run(folder)


def losses(values, name="train_loss", every=1):
    return [{"step": every * step, name: value} for step, value in enumerate(values)]


def norms(values):
    return [
        {"step": step, "component": part, "l2": value, "count": 9, "nonfinite": 0, "tensors": 1}
        | ({} if part else {"global_norm": value})
        for step, value in enumerate(values)
        for part in (None, "encoder")
    ]


# ---- findings ----


def test_findings_are_paired_by_rule_and_part_then_by_rule():
    before = [
        made("dead_relu", component="a"),
        made("dead_relu", component="b"),
        made("loss_spike"),
    ]
    after = [made("dead_relu", component="b"), made("dead_relu", component="c"), made("divergence")]
    assert states(before, after) == [
        ("new", "divergence", None, None),
        ("still", "dead_relu", "b", "same"),
        ("still", "dead_relu", "c", "same"),
        ("gone", "loss_spike", None, None),
    ]


def test_a_part_that_is_in_both_is_paired_with_itself():
    before = [made("dead_relu", "critical", "a"), made("dead_relu", "warning", "b")]
    after = [made("dead_relu", "critical", "c"), made("dead_relu", "warning", "b")]
    found = compared_findings(before, after)
    assert [(one.before.component, one.after.component) for one in found] == [
        ("a", "c"),
        ("b", "b"),
    ]
    assert {one.change for one in compared_findings(before, after[::-1])} == {"same"}


def test_severity_that_changes():
    for old, new, expected in [
        ("warning", "critical", [("still", "dead_relu", None, "worse")]),
        ("critical", "warning", [("still", "dead_relu", None, "milder")]),
        ("info", "warning", [("new", "dead_relu", None, None)]),
        ("warning", "info", [("gone", "dead_relu", None, None)]),
        ("info", "info", []),
    ]:
        assert states([made("dead_relu", old)], [made("dead_relu", new)]) == expected


@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_a_run_compared_with_itself_has_nothing_new(severity):
    findings = [made("dead_relu", severity, part) for part in ("a", "b", None)]
    found = compared_findings(findings, findings)
    assert [one.change for one in found] == ["same"] * 3
    assert sum(one.alarm for one in found) == 0


def test_a_new_symptom_of_an_old_cause_is_no_alarm():
    cause = made("scheduler_misuse")
    symptom = made("update_too_small", "critical", caused_by="scheduler_misuse")
    (known, _) = compared_findings([cause], [cause, symptom])
    assert (known.state, known.known_cause, known.alarm) == ("new", True, 0)
    new, effect = compared_findings([], [cause, symptom])
    assert (new.alarm, effect.alarm, effect.known_cause) == (1, 2, False)


def test_one_that_moved_says_from_where():
    old, new = made("dead_relu", component="a"), made("dead_relu", component="b")
    assert [one.moved for one in compared_findings([old], [new])] == ["a"]
    assert [one.moved for one in compared_findings([made("dead_relu")], [new])] == [""]
    assert [one.moved for one in compared_findings([old], [old])] == [None]
    assert [one.moved for one in compared_findings([old], [])] == [None]


def test_gone_is_no_comfort_where_the_run_has_not_come_so_far(tmp_path):
    spike = made("loss_spike", first_step=40)
    told = {step: compared_findings([spike], [], step)[0].reached for step in (-1, 39, 40, 99)}
    assert told == {-1: False, 39: False, 40: True, 99: True}
    assert compared_findings([made("loss_spike")], [], 3)[0].reached
    a = write(tmp_path / "a", grad=norms([0.1] * 40 + [500.0] * 20))
    b = write(tmp_path / "b", grad=norms([0.1] * 20))
    found = compare(a, b)
    (gone,) = (one for one in found.of("gone") if one.finding.rule == "exploding_gradient")
    assert not gone.reached
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(found, console)
    assert "(B has not come to step 40, where it began in A)" in console.export_text()
    assert "B has not come to that step" in comparison_page(found, a, b)


def test_neither_before_nor_after():
    with pytest.raises(ValueError, match=r"must have a finding before or after, got neither\."):
        _ = FindingChange("new", None, None).finding


# ---- exit status ----


def comparison(changes, tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    empty = compare(a, b)
    return Comparison(empty.before, empty.after, changes, [], [], [], [], [])


@pytest.mark.parametrize(
    ("before", "after", "statuses"),
    [
        ([], [], (0, 0, 0)),
        ([], ["info"], (0, 0, 0)),
        ([], ["warning"], (0, 3, 0)),
        ([], ["critical"], (0, 4, 4)),
        (["warning"], ["critical"], (0, 4, 4)),
        (["critical"], ["warning"], (0, 0, 0)),
        (["critical"], ["critical"], (0, 0, 0)),
        (["critical"], [], (0, 0, 0)),
    ],
)
def test_exit_code(tmp_path, before, after, statuses):
    sides = [[made("dead_relu", severity) for severity in one] for one in (before, after)]
    found = comparison(compared_findings(*sides), tmp_path)
    assert tuple(found.exit_code(one) for one in (None, "warning", "critical")) == statuses


STOPPED = {"status": "stopped", "stop_reason": {"rule": "collapse", "message": "flat"}}


@pytest.mark.parametrize(
    ("info", "length", "statuses", "said"),
    [
        ({"status": "finished"}, 30, (0, 0, 0), ""),
        ({"status": "running"}, 3, (0, 0, 0), ""),
        ({"status": "finished"}, 0, (0, 3, 0), "B has measured no gradient, so that little can"),
        ({"status": "failed"}, 30, (0, 4, 4), "B failed, A did not."),
        ({"status": "failed"}, 0, (0, 4, 4), "B failed, A did not."),
        (STOPPED, 30, (0, 4, 4), "A diagnostic stopped B, none stopped A."),
    ],
)
def test_a_run_that_cannot_be_judged_passes_no_gate(tmp_path, info, length, statuses, said):
    well = write(tmp_path / "well", grad=norms([0.1] * 30), info={"status": "finished"})
    other = write(tmp_path / "other", grad=norms([0.1] * length), info=info)
    found = compare(well, other)
    assert tuple(found.exit_code(one) for one in (None, "warning", "critical")) == statuses
    assert found.setback.startswith(said)
    assert found.headline.endswith(found.setback)
    # where the first run has measured none either, that is no news
    bare = write(tmp_path / "bare", metrics=losses([3.0, 1.0]), info={"status": "finished"})
    spiked = write(tmp_path / "spiked", metrics=losses([3.0, 9e9]), info={"status": "finished"})
    assert compare(spiked, bare).exit_code("warning") == 0
    for pair in ((other, other), (other, well)):
        assert compare(*pair).exit_code("warning") == 0


# ---- numbers ----


def test_metrics_by_hand(tmp_path):
    a = write(
        tmp_path / "a",
        metrics=[
            *losses([4.0, 3.0, 5.0], "val_loss", 10),
            {"step": 20, "val_f1": 0.5, "lr-Adam": 1},
        ],
        config={"monitor": "mystery", "monitor_mode": "max"},
    )
    b = write(
        tmp_path / "b",
        metrics=[*losses([4.0, 2.0], "val_loss", 10), {"step": 9, "mystery": 1.0, "thing": 2.0}],
    )
    found = {one.name: one for one in compare(a, b).metrics}
    assert list(found) == ["val_loss", "val_f1", "mystery", "thing"]
    loss = found["val_loss"]
    assert (loss.before, loss.after, loss.best_before, loss.best_after) == (5.0, 2.0, 3.0, 2.0)
    assert (loss.step, loss.at_step_before, loss.at_step_after) == (10, 3.0, 2.0)
    assert loss.better is True
    assert (found["val_f1"].goal, found["val_f1"].after, found["val_f1"].better) == (
        "max",
        None,
        None,
    )
    assert found["mystery"].goal == "max"
    assert found["thing"].goal is None


def test_at_equal_steps_the_noise_of_a_batch_is_taken_off(tmp_path):
    a = write(tmp_path / "a", metrics=losses([1.0] * 25))
    b = write(tmp_path / "b", metrics=losses([2.0] * 38 + [99.0, 2.0]))
    (loss,) = compare(a, b).metrics
    assert (loss.step, loss.at_step_before, loss.at_step_after) == (24, 1.0, 2.0)
    c = write(tmp_path / "c", metrics=losses([2.0] * 24 + [99.0]))
    assert compare(a, c).metrics[0].at_step_after == 2.0


def test_no_step_in_common(tmp_path):
    a = write(tmp_path / "a", metrics=[{"step": 3, "val_loss": 1.0}])
    b = write(tmp_path / "b", metrics=[{"step": 9, "val_loss": 2.0}])
    (loss,) = compare(a, b).metrics
    assert (loss.step, loss.at_step_before, loss.better) == (None, None, False)


def test_a_loss_that_is_not_finite_is_worse_than_any(tmp_path):
    lost = [{"step": 0, "val_loss": 3.0}, {"step": 5, "val_loss": None, "val_loss_nonfinite": 1}]
    a = write(tmp_path / "a", metrics=[{"step": 0, "val_loss": 9.0}, {"step": 5, "val_loss": 9.0}])
    b = write(tmp_path / "b", metrics=lost)
    (loss,) = compare(a, b).metrics
    assert math.isnan(loss.after)
    assert (loss.best_after, loss.better) == (3.0, False)
    assert compare(b, a).metrics[0].better is True
    assert compare(b, b).metrics[0].better is None
    assert compare(a, b).to_dict()["metrics"][0]["after"] is None


def test_a_run_that_is_never_finite_has_a_page(tmp_path):
    lost = [{"step": s, "val_loss": None, "val_loss_nonfinite": 1} for s in (5, 9)]
    rows = [{"step": 9, "loss": 1e30, "nonfinite": 4}, {"step": 19, "loss": None, "nonfinite": 10}]
    a = write(tmp_path / "a", metrics=losses([3.0, 2.0], "val_loss"))
    b = write(tmp_path / "b", metrics=lost, loss=rows)
    found = compare(a, b)
    assert "val_loss of B was never finite." in comparison_page(found, a, b)
    assert math.isnan(found.metrics[1].after)


@pytest.mark.parametrize(("goal", "better"), [("min", True), ("max", False), (None, None)])
def test_better_follows_the_goal(goal, better):
    assert MetricChange("x", "", goal, 2.0, 1.0).better is better
    assert MetricChange("x", "", goal, 1.0, 1.0).better is None


def test_machine_and_loss_rows(tmp_path):
    rows = [
        {"step": s, "samples_per_second": r, "process_memory": m, "gpu_memory_peak": None}
        for s, r, m in [(9, 10.0, 5.0), (19, 30.0, 9.0), (29, 20.0, 7.0)]
    ]
    attempts = [
        {"attempt": 1, "started": 10.0, "ended": 15.0},
        {"attempt": 2, "started": 100.0, "ended": 101.5},
        {"attempt": 3, "started": 200.0, "ended": None},
    ]
    loss = [{"step": 9, "loss": 4.0}, {"step": 19, "loss": 2.0}]
    a = write(tmp_path / "a", hardware=rows, loss=loss, info={"attempts": attempts})
    b = write(tmp_path / "b")
    found = compare(a, b)
    assert {one.name: (one.before, one.after) for one in found.machine} == {
        "time": (6.5, None),
        "throughput": (20.0, None),
        "peak memory": (9.0, None),
    }
    assert [(one.name, one.before) for one in found.metrics] == [(LOSS, 2.0)]


def test_cost_of_watching(tmp_path):
    rows = [{"step": s, "diagnostic": d, "share": x} for s, d, x in [(1, "A", 0.5), (9, "A", 0.1)]]
    a = write(tmp_path / "a", overhead=[*rows, {"step": 9, "diagnostic": "B", "share": 0.2}])
    b = write(tmp_path / "b", overhead=rows)
    told = [(one.name, one.before, one.after) for one in compare(a, b).watching]
    assert told == [("all", pytest.approx(0.3), 0.1), ("A", 0.1, 0.1), ("B", 0.2, None)]


# ---- settings ----


def test_configuration_by_hand(tmp_path):
    a = {
        "run_dir": "runs/a",
        "optimizer": {"lr": 1.0, "betas": [1, 2]},
        "model": {"optimizer": {"lr": 1.0, "betas": [1, 2]}, "width": 4, "lr": 5},
        "logger": {"run": {"path": "runs/a", "log": "runs/a/x"}},
        "rules": None,
    }
    b = json.loads(json.dumps(a).replace("runs/a", "runs/b"))
    b["optimizer"]["lr"] = b["model"]["optimizer"]["lr"] = 0.1
    b["model"]["lr"] = 6
    b["new"] = True
    del b["rules"]
    found = compare(write(tmp_path / "a", config=a), write(tmp_path / "b", config=b))
    assert [one.to_dict() for one in found.configuration] == [
        {"key": "optimizer.lr", "before": 1.0, "after": 0.1},
        {"key": "model.lr", "before": 5, "after": 6},
        {"key": "new", "after": True},
    ]


def test_environment_by_hand(tmp_path):
    one = {"seed": 1, "versions": {"torch": "2.1", "python": "3"}, "id": "a", "data": {"sha": "x"}}
    other = {
        "seed": 2,
        "versions": {"torch": "2.2", "python": "3"},
        "id": "b",
        "data": {"sha": "x"},
    }
    found = compare(write(tmp_path / "a", info=one), write(tmp_path / "b", info=other))
    assert [change.to_dict() for change in found.environment] == [
        {"key": "versions.torch", "before": "2.1", "after": "2.2"},
        {"key": "seed", "before": 1, "after": 2},
    ]


# ---- what is written ----


@pytest.fixture
def pair(tmp_path):
    a = write(
        tmp_path / "a",
        metrics=losses([5.0, 4.0, 3.0] * 20),
        grad=norms([0.1] * 40 + [500.0] * 20),
        config={"optimizer": {"lr": 3.0}, "note": "<b>[red]"},
        info={"status": "finished", "seed": 1},
    )
    b = write(
        tmp_path / "b",
        metrics=losses([5.0, 3.0, 1.0] * 15),
        grad=norms([0.1] * 50),
        config={"optimizer": {"lr": 0.3}, "note": "</script>"},
        info={"status": "running", "seed": 1},
    )
    return a, b


def test_json_is_stable(pair):
    found = compare(*pair).to_dict("warning")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert " ".join(found) == TOP
    assert (found["schema"], found["fail_on"], found["exit_code"]) == (1, "warning", 0)
    assert " ".join(found["before"]) == "name path id status state verdict last_step"
    assert list(found["findings"]) == ["gone", "new", "still"]
    (gone,) = (one for one in found["findings"]["gone"] if one["rule"] == "exploding_gradient")
    assert " ".join(gone) == FINDING
    assert (gone["severity_after"], gone["after"]) == (None, None)
    assert Finding.from_dict(gone["before"]).rule == "exploding_gradient"
    assert " ".join(found["metrics"][0]) == METRIC
    back = compare(*reversed(pair))
    assert back.exit_code("warning") in (3, 4)
    assert {one.finding.rule for one in back.of("new")} >= {"exploding_gradient"}


def test_text_holds_what_matters_and_no_markup_of_the_run(pair):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(compare(*pair), console)
    text = console.export_text()
    for wanted in (
        "A a, finished, step 59",
        "B b, running, step 49",
        "GONE",
        "train_loss",
        "<b>[red]",
    ):
        assert wanted in text
    assert re.search(r"optimizer\.lr +3\.0 +0\.3", text)


def test_page_stands_alone_and_escapes(pair):
    page = comparison_page(compare(*pair), *pair)
    head = page[: page.index('<script type="application/json"')]
    assert "Exploding gradient" in head
    assert "&lt;/script&gt;" in head
    assert not re.search(r"(src|href)=.https?:", page)
    assert page.count('data-chart="') == 2
    spec = json.loads(re.search(r'id="spec-losses">(.*?)</script>', page)[1])
    rows = [row for values in spec["datasets"].values() for row in values]
    assert {row["name"] for row in rows} == {"A", "B"}
    assert [row["y"] for row in rows if row["name"] == "B"][:3] == [5.0, 3.0, 1.0]


def test_empty_runs_are_compared_too(tmp_path):
    a, b = write(tmp_path / "x" / "run"), write(tmp_path / "y" / "run")
    found = compare(a, b)
    assert (found.before.name, found.after.name) == ("x/run", "y/run")
    assert found.headline == "Nothing was found in either run."
    assert (found.metrics, found.machine, found.configuration) == ([], [], [])
    assert "Nothing was measured." in comparison_page(found, a, b)
    print_comparison(found, Console(file=open("/dev/null", "w")))  # noqa: SIM115
    same = compare(a, a)
    assert (same.before.name, same.after.name) == ("before", "after")


def test_the_data_alone_needs_no_charts():
    code = "import sys, lightning_diag.report.comparison\n"
    code += "print({'altair', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


HOSTILE = "</script><img src=x onerror=alert(1)>\"'`[red]\\{{7*7}}${oc.env:HOME}\n\x1b[31m.x[0]:Q"


def test_hostile_names_are_names_in_text_and_page(tmp_path):
    """A control character in a chart used to end the process."""
    folder = tmp_path / HOSTILE.replace("/", "_").replace("\n", "")
    rows = [{**row, "component": row["component"] and HOSTILE} for row in norms([0.1] * 40)]
    config = {HOSTILE: {HOSTILE: HOSTILE}, 3: {4: [1]}, "monitor": f"loss {HOSTILE}"}
    info = {"status": HOSTILE, "seed": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    a = write(
        folder,
        metrics=losses([3.0, 2.0], f"loss {HOSTILE}"),
        grad=rows,
        config=config,
        info=info,
    )
    b = write(
        tmp_path / "b",
        metrics=losses([3.0, 1.0], f"loss {HOSTILE}"),
        grad=[
            {**row, "l2": row["l2"] if row["step"] < 30 else 500.0, "component": row["component"]}
            for row in rows
        ],
        config={3: 5},
    )
    found = compare(a, b)
    assert found.of("new")
    page = comparison_page(found, a, b)
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>")
    assert "&lt;img src=x onerror" in page
    console = Console(width=500, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(found, console)
    text = console.export_text(styles=True)
    assert "[red]\\{{7*7}}${oc.env:HOME}" in text
    assert "\x1b[31m.x[0]" not in text
    assert not re.search(r"^\s*\?\[31m", text, re.MULTILINE)


def test_a_chart_with_control_characters_is_drawn():
    found = writable({"a\x00": ["b\x1b", 1, None, {"c": "two\nlines é"}]})
    assert found == {"a?": ["b?", 1, None, {"c": "two\nlines é"}]}
    chart = line_chart("T", [Panel("y", {"A\x1b": [(1, 2.0), (2, 3.0)]})], said=["x\x07"])
    spec, picture = drawn(chart)
    assert "\x1b" not in json.dumps(spec, ensure_ascii=False)
    assert picture.startswith(b"\x89PNG")
