import json

import pytest
import typer
from typer.testing import CliRunner

from lightning_diag.commands.aggregate import aggregate
from tests.report.test_aggregate import make_run

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(aggregate)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_it_writes_the_files_and_prints_a_line_for_each_experiment(tmp_path):
    for model in ("gnn", "fusion"):
        for seed in (1, 2):
            make_run(tmp_path / model / f"seed_{seed}", seed=seed, name=model)
    result = run(tmp_path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "experiment",
        "clean",
        "diverged",
        "unfinished",
        "mean",
        "f1",
        "std",
    ]
    assert lines[1].split() == ["fusion", "2", "0", "0", "0.7", "0"]
    assert lines[2].split() == ["gnn", "2", "0", "0", "0.7", "0"]
    found = json.loads((tmp_path / "production_summary" / "production_summary.json").read_text())
    assert found["models"]["gnn"]["mean_f1"] == 0.7


def test_another_metric(tmp_path):
    make_run(tmp_path / "gnn" / "seed_1")
    result = run(tmp_path, "--metric", "auc")
    assert "mean auc" in result.stdout
    assert "0.95" in result.stdout


def test_names_are_no_markup(tmp_path):
    make_run(tmp_path / "[red]x[/red]" / "a", seed=1)
    assert "[red]x[/red]" in run(tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: `folder` must have a run in it"),
        (("--metric", "f2"), "error: `folder` must have a run in it"),
    ],
)
def test_wrong_usage_ends_with_two(arguments, message, tmp_path):
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_metric_that_no_run_has(tmp_path):
    make_run(tmp_path / "a")
    result = run(tmp_path, "--metric", "lossy")
    assert result.exit_code == 2
    assert "No run has the metric `lossy`; did you mean `loss`?" in result.stderr


def test_debug_shows_where(tmp_path):
    result = run(tmp_path / "none", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "UsageError"
