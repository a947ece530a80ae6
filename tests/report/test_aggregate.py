"""Numbers against NumPy and SciPy; every state of a run; any folder."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_diag.report.aggregate import aggregate, statistic, t_quantile
from lightning_diag.report.aggregate_chart import comparison_chart
from lightning_diag.report.aggregate_files import write_aggregate
from lightning_diag.report.aggregate_page import aggregate_page

HOSTILE = "a|b *c* <i> [x](y) `q` \\ #1 {z}"


def make_run(
    folder: Path,
    *,
    f1=(0.5, 0.8, 0.7),
    auc=(0.6, 0.9, 0.95),
    seed: int | None = 42,
    status: str | None = "finished",
    name: str = "code",
    stop_reason=None,
    config=None,
    more=None,
    collapse=None,
) -> Path:
    """A run whose validation at epoch i gave ``f1[i]`` and ``auc[i]``."""
    (folder / "records").mkdir(parents=True)
    if status is not None:
        info = {
            "name": name,
            "seed": seed,
            "status": status,
            "stop_reason": stop_reason,
            "devices": ["cpu"],
            "host": {"name": "secret-host", "cpus": 2},
            "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning_package": "x"},
            "attempts": [
                {"attempt": 1, "first_step": 0, "supersedes": True, "started": 10.0, "ended": 70.0},
            ],
        }
        (folder / "run.json").write_text(json.dumps(info))
    if config is not False:
        plain = {"name": name, "seed": seed, "monitor": "val_auc", "monitor_mode": "max"}
        plain |= {"run_dir": str(folder), "data": {"seed": seed, "samples": 5}, **(config or {})}
        (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    rows = []
    for epoch, (one, two) in enumerate(zip(f1, auc, strict=True)):
        base = {"step": 10 * epoch + 9, "epoch": epoch, "time": 1.0, "attempt": 1}
        rows.append({**base, "component": None, "train_loss": 1.0 / (epoch + 1)})
        row = {**base, "component": None, "val_loss": 1 - two, "val_f1": one, "val_auc": two}
        rows.append({key: value for key, value in row.items() if value is not None})
    rows += more or []
    lines = [json.dumps(row) for row in rows]
    (folder / "records" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if collapse is not None:
        (folder / "collapse_report.json").write_text(json.dumps(collapse))
    return folder


def only(summary):
    (group,) = summary.groups
    return group


@given(st.floats(0.51, 0.9999), st.integers(1, 400))
def test_quantiles_agree_with_scipy(share, degrees):
    assert t_quantile(share, degrees) == pytest.approx(stats.t.ppf(share, degrees), rel=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_statistics_agree_with_numpy_and_scipy(values):
    found = statistic(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)
    half = stats.t.ppf(0.975, len(values) - 1) * found.std / math.sqrt(len(values))
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half), rel=1e-9, abs=1e-9)


def test_statistics_of_none_and_one():
    assert statistic([]) == (type(statistic([])))(0, None, None, None)
    one = statistic([0.5])
    assert (one.n, one.mean, one.std, one.ci95) == (1, 0.5, None, None)


@pytest.mark.parametrize(
    ("share", "degrees", "message"),
    [(0.5, 3, "`share` must be between 0.5 and 1"), (0.9, 0, "`degrees` must be at least 1")],
)
def test_quantiles_check_their_arguments(share, degrees, message):
    with pytest.raises(ValueError, match=message):
        t_quantile(share, degrees)


def test_all_metrics_of_a_run_come_from_its_best_row(tmp_path):
    make_run(tmp_path / "a", f1=(0.9, 0.8, 0.7), auc=(0.6, 0.95, 0.9))
    (run,) = only(aggregate(tmp_path)).runs
    assert run.metrics == pytest.approx({"f1": 0.8, "auc": 0.95, "loss": 0.05})
    assert (run.epoch, run.step, run.monitor, run.higher) == (1, 19, "auc", True)
    assert run.seconds == 60
    assert run.history["f1"] == [(0, 0.9), (1, 0.8), (2, 0.7)]


def test_the_lowest_is_best_where_the_run_says_so(tmp_path):
    config = {"monitor": "val_loss", "monitor_mode": "min"}
    make_run(tmp_path / "a", auc=(0.6, 0.95, 0.9), config=config)
    assert only(aggregate(tmp_path)).runs[0].epoch == 1


def test_a_later_attempt_replaces_what_it_did_again(tmp_path):
    folder = make_run(tmp_path / "a", auc=(0.6, 0.99, 0.7))
    row = {"step": 19, "epoch": 1, "time": 2.0, "attempt": 2, "component": None}
    row |= {"val_loss": 0.2, "val_f1": 0.4, "val_auc": 0.8}
    with (folder / "records" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    info = json.loads((folder / "run.json").read_text())
    info["attempts"].append({"attempt": 2, "first_step": 11, "supersedes": True})
    (folder / "run.json").write_text(json.dumps(info))
    (run,) = only(aggregate(tmp_path)).runs
    assert (run.metrics["auc"], run.metrics["f1"]) == (0.8, 0.4)


def test_the_summary_has_the_keys_of_the_reference_and_its_numbers(tmp_path):
    values = {"gnn": [0.91, 0.95, 0.9], "fusion": [0.96, 0.93, 0.99]}
    for model, f1 in values.items():
        for seed, value in zip((42, 2025, 7), f1, strict=True):
            make_run(
                tmp_path / model / f"seed_{seed}", f1=(value,), auc=(0.5,), seed=seed, name=model
            )
    found = aggregate(tmp_path).to_dict()
    assert list(found["models"]) == ["fusion", "gnn"]
    for model, f1 in values.items():
        row = found["models"][model]
        assert row["mean_f1"] == pytest.approx(np.mean(f1))
        assert row["std_f1"] == pytest.approx(np.std(f1, ddof=1))
        low, high = stats.t.interval(0.95, 2, np.mean(f1), stats.sem(f1))
        assert row["ci95_f1"] == pytest.approx((low, high))
        assert sorted(row["seeds"]) == [7, 42, 2025]
        assert (row["n"], row["n_diverged"], row["n_unfinished"]) == (3, 0, 0)
        assert row["best_f1"] == max(f1)
        assert row["best_seed"] == (42, 2025, 7)[f1.index(max(f1))]
        assert row["mean_auc"] == 0.5
    assert found["best_overall_model"] == "fusion"
    assert found["best_overall_f1"] == pytest.approx(np.mean(values["fusion"]))


LAST = {"step": 30, "epoch": 3, "time": 1.0, "attempt": 1, "component": None}


@pytest.mark.parametrize(
    ("made", "state", "reason"),
    [
        ({"status": "running"}, "unfinished", "still trains"),
        ({"status": "failed", "stop_reason": "ValueError: no"}, "unfinished", "ValueError: no."),
        ({"status": None}, "unfinished", "run.json is missing"),
        ({"collapse": {"collapsed": False}}, "clean", ""),
        ({"collapse": {"collapsed": True}}, "collapsed", "says that the run collapsed"),
        (
            {"collapse": {"collapsed": True, "stop_reason": {"message": "one class."}}},
            "collapsed",
            "one class.",
        ),
        (
            {"more": [{**LAST, "train_loss": None, "train_loss_nonfinite": 1}]},
            "diverged",
            "train_loss",
        ),
        (
            {
                "more": [
                    {**LAST, "train_loss": None, "train_loss_nonfinite": 1},
                    {**LAST, "step": 31, "train_loss": 0.5},
                ]
            },
            "clean",
            "",
        ),
        ({"config": {"monitor": "val_acu"}}, "unmeasured", "did you mean `val_auc`?"),
        ({"f1": (), "auc": ()}, "unmeasured", "nothing was"),
    ],
)
def test_a_sick_run_stands_apart(made, state, reason, tmp_path):
    make_run(tmp_path / "m" / "a", seed=1, f1=(0.9,), auc=(0.9,)) if "config" not in made else None
    make_run(tmp_path / "m" / "b", **{"seed": 2, **made})
    summary = aggregate(tmp_path)
    run = next(run for group in summary.groups for run in group.runs if run.path.name == "b")
    assert run.state == state
    assert reason in run.reason
    clean = [run for group in summary.groups for run in group.clean]
    assert (run in clean) == (state == "clean")
    text = aggregate_page(summary, None)
    assert ("## Runs that stand apart" in text) == (state != "clean")
    comparison_chart(summary).to_dict()
    if state != "clean" and "config" not in made:
        statistics = [group.metrics["f1"] for group in summary.groups if "f1" in group.metrics]
        assert [found.n for found in statistics if found.n] == [1]


def test_diverged_seeds_are_counted_and_left_out_of_the_mean(tmp_path):
    for seed, f1 in ((1, 0.8), (2, 0.9)):
        make_run(tmp_path / "m" / f"s{seed}", seed=seed, f1=(f1,), auc=(0.9,))
    make_run(tmp_path / "m" / "s3", seed=3, f1=(0.1,), auc=(0.9,), collapse={"collapsed": True})
    make_run(tmp_path / "m" / "s4", seed=4, f1=(0.2,), auc=(0.9,), status="running")
    row = aggregate(tmp_path).to_dict()["models"]["m"]
    assert (row["n"], row["n_diverged"], row["n_unfinished"]) == (2, 1, 1)
    assert row["mean_f1"] == pytest.approx(0.85)
    assert row["seeds"] == [1, 2]
    assert [run["state"] for run in row["runs"]] == ["clean", "clean", "collapsed", "unfinished"]


def test_no_clean_run_at_all(tmp_path):
    make_run(tmp_path / "m" / "a", status="failed")
    _, files = write_aggregate(tmp_path)
    found = json.loads(files["production_summary.json"].read_text())
    assert found["best_overall_model"] is None
    assert found["models"]["m"]["mean_f1"] is None
    assert "No clean run has been measured." in files["production_report.md"].read_text()


def test_a_folder_that_is_a_run(tmp_path):
    make_run(tmp_path / "lone")
    group = only(aggregate(tmp_path / "lone"))
    assert group.name == "code"
    assert aggregate(tmp_path / "lone").to_dict()["models"]["code"]["runs"][0]["path"] == "."


def test_a_sweep_is_grouped_by_what_differs_but_the_seed(tmp_path):
    for number, (seed, lr) in enumerate((s, lr) for s in (1, 2, 3) for lr in (0.1, 0.01)):
        config = {"optimizer": {"lr": lr}, "callbacks": {"blob": {"seed": 0}}}
        config["model"] = {"transformer_run": f"runs/t/seed_{seed}"}
        make_run(tmp_path / str(number), seed=seed, config=config, f1=(lr,), auc=(0.5,))
    groups = {group.name: group for group in aggregate(tmp_path).groups}
    assert set(groups) == {"optimizer.lr=0.1", "optimizer.lr=0.01"}
    assert [run.seed for run in groups["optimizer.lr=0.1"].runs] == [1, 2, 3]


def test_diagnostics_and_loggers_make_no_other_experiment(tmp_path):
    for seed in (1, 2):
        config = {
            "callbacks": {"health": {"_target_": "lightning_diag.GradientHealth", "every": seed}},
            "logger": {"run": {"path": str(seed)}},
        }
        make_run(tmp_path / str(seed), seed=seed, config=config)
    assert len(only(aggregate(tmp_path)).runs) == 2
    for seed in (3, 4):
        target = "lightning_diag.lightning.callbacks.EarlyStopping"
        config = {"callbacks": {"stop": {"_target_": target, "patience": seed}}}
        make_run(tmp_path / str(seed), seed=seed, config=config)
    assert len(aggregate(tmp_path).groups) == 3


def test_runs_are_named_by_name_where_folders_do_not_tell(tmp_path):
    for number, (name, seed) in enumerate((n, s) for n in ("one", "two") for s in (1, 2)):
        make_run(tmp_path / str(number), name=name, seed=seed)
    assert [group.name for group in aggregate(tmp_path).groups] == ["one", "two"]


def test_runs_without_a_configuration_go_by_their_folder(tmp_path):
    for model in ("one", "two"):
        for seed in (1, 2):
            make_run(tmp_path / model / str(seed), seed=seed, config=False, name="")
    summary = aggregate(tmp_path)
    assert [group.name for group in summary.groups] == ["one", "two"]
    assert summary.groups[0].runs[0].monitor == "loss"


def test_one_folder_with_two_experiments_is_two_groups(tmp_path):
    for number, width in enumerate((8, 8, 16)):
        make_run(tmp_path / "m" / str(number), seed=number, config={"model": {"width": width}})
    names = [group.name for group in aggregate(tmp_path).groups]
    assert names == ["model.width=16", "model.width=8"]


def test_the_metric_that_is_compared_by(tmp_path):
    make_run(tmp_path / "m" / "a")
    assert aggregate(tmp_path).metric == "f1"
    assert aggregate(tmp_path, "auc").metric == "auc"
    by_loss = aggregate(tmp_path, "loss")
    assert (by_loss.metric, by_loss.higher) == ("loss", False)
    with pytest.raises(ValueError, match="No run has the metric `aux`; did you mean `auc`"):
        aggregate(tmp_path, "aux")


def test_without_f1_it_is_what_the_runs_monitor(tmp_path):
    make_run(tmp_path / "m" / "a", f1=(None, None), auc=(0.5, 0.6))
    summary = aggregate(tmp_path)
    assert (summary.metric, summary.higher) == ("auc", True)


def test_the_lower_loss_wins(tmp_path):
    config = {"monitor": "val_loss", "monitor_mode": "min"}
    for name, auc in (("good", 0.9), ("bad", 0.6)):
        make_run(tmp_path / name / "a", f1=(None,), auc=(auc,), config=config, name=name)
    found = aggregate(tmp_path).to_dict()
    assert found["best_overall_model"] == "good"
    assert found["best_overall_loss"] == pytest.approx(0.1)


def test_hostile_names_do_no_harm(tmp_path):
    row = {**LAST, "val_loss": 0.1, "val_f1": 0.5, "val_auc": 0.99, f"val_{HOSTILE}": 0.25}
    make_run(tmp_path / "a", name=HOSTILE, more=[row])
    make_run(tmp_path / "b", name="plain")
    _, files = write_aggregate(tmp_path, HOSTILE)
    text = files["production_report.md"].read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "<i>" not in text.replace("\\<i\\>", "")
    for table in text.split("\n\n"):
        lines = [line.replace("\\\\", "").replace("\\|", "") for line in table.splitlines()]
        if lines and lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
    assert rows
    assert "secret-host" not in text
    assert HOSTILE in json.loads(files["production_summary.json"].read_text())["models"]
    assert files["metrics_comparison.png"].read_bytes().startswith(b"\x89PNG")


def test_names_that_no_picture_can_hold(tmp_path):
    for name in ("a\x1bb", "c\x01d"):
        make_run(tmp_path / name, name=name)
    # what cannot be drawn ends the whole process
    code = "import sys; from lightning_diag.report.aggregate_files import write_aggregate as write"
    code += "; print(write(sys.argv[1])[1]['metrics_comparison.png'].read_bytes()[1:4])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "b'PNG'"), done.stderr


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "production_summary").write_text("in the way")
    message = r"`.*production_summary` must be a folder that takes files, got: File exists\."
    with pytest.raises(OSError, match=message):
        write_aggregate(tmp_path)


def test_broken_files_are_no_end(tmp_path):
    folder = make_run(tmp_path / "m" / "a")
    (folder / "config.yaml").write_text("[1")
    (folder / "collapse_report.json").write_text("{")
    with (folder / "records" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "epo')
    other = make_run(tmp_path / "m" / "b")
    (other / "run.json").write_text("{")
    states = {
        run.path.name: run.state for group in aggregate(tmp_path).groups for run in group.runs
    }
    assert states == {"a": "clean", "b": "unfinished"}


def test_the_report_says_when_on_what_and_how(tmp_path):
    generator = random.Random(0)
    for model in ("one", "two"):
        for seed in (1, 2, 3):
            f1 = [generator.uniform(0.7, 0.9) for _ in range(4)]
            make_run(tmp_path / model / str(seed), f1=f1, auc=f1, seed=seed, name=model)
    summary, files = write_aggregate(tmp_path)
    assert sorted(path.name for path in (tmp_path / "production_summary").iterdir()) == [
        "metrics_comparison.png",
        "production_report.md",
        "production_summary.json",
    ]
    text = files["production_report.md"].read_text()
    assert f"Made on {summary.made:%Y-%m-%d} from 6 runs." in text
    assert "Machine: 2 CPU cores, no GPU." in text
    assert "torch 2.13.0" in text
    assert "do not tell them apart" in text
    assert "(highest auc)" in text
    assert text.count("clean |") >= 6
    assert aggregate(tmp_path).to_dict()["models"].keys() == {"one", "two"}  # it reads no summary


def test_a_machine_with_accelerators_is_named(tmp_path):
    folder = make_run(tmp_path / "m" / "a")
    info = json.loads((folder / "run.json").read_text())
    info["devices"] = ["GPU_A", "GPU_A", "GPU_B"]
    (folder / "run.json").write_text(json.dumps(info))
    text = aggregate_page(aggregate(tmp_path), None)
    assert "Machine: 2 x GPU\\_A and GPU\\_B, 2 CPU cores." in text


def test_the_same_seed_twice_is_said(tmp_path):
    for name in "ab":
        make_run(tmp_path / "m" / name, seed=5)
    _, files = write_aggregate(tmp_path)
    assert "m has seed 5 more than once" in files["production_report.md"].read_text()


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(ValueError, match="`folder` must have a run in it"):
        aggregate(tmp_path)
    with pytest.raises(FileNotFoundError, match="`folder` must be a folder with runs in it"):
        aggregate(tmp_path / "none")
