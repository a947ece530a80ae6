"""What `lightning-diag clip-value` prints, and how it ends."""

import json

import pytest
import typer
from typer.testing import CliRunner

from lightning_diag.commands.clip_value import clip_value
from tests.tuning.clip_value_runs import every, healthy, written

app = typer.Typer()
app.command("clip-value")(clip_value)


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path):
    return written(tmp_path / "run", every(healthy(200), clip_value=1.0, clip_algorithm="norm"))


def test_prints_value_reason_and_override(run):
    done = call(run)
    first, reason, override = done.output.splitlines()
    value = first.removeprefix("clip at ")
    assert 1 < float(value) < 3
    assert "95% of 180 norms" in reason
    assert override == f"trainer.gradient_clip_val={value}"
    assert done.exit_code == 0


def test_json_is_one_line_that_reads_back(run):
    done = call(run, "--json", "--percentile", 10)
    read = json.loads(done.output)
    assert read["percentile"] == 10
    assert read["overrides"] == {"trainer.gradient_clip_val": read["value"]}
    assert read["value"] < 1


def test_nothing_to_suggest_ends_with_3(tmp_path):
    done = call(written(tmp_path / "run", every(healthy(5))))
    assert done.exit_code == 3
    assert done.output.startswith("no clip value\n")


def test_several_optimizers(tmp_path):
    grad = [
        {**one, "optimizer": number}
        for number in (0, 1)
        for one in every(healthy(100, 1.0 + number))
    ]
    done = call(written(tmp_path / "run", grad))
    assert done.exit_code == 0
    assert "optimizer 0: clip at " in done.output
    assert "optimizer 1: clip at " in done.output
    assert "`on_before_optimizer_step`" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["none"], "does not exist"), (["run", "--percentile", "100"], "`percentile` must be above")],
)
def test_wrong_usage_ends_with_2(run, arguments, words):
    done = call(run.parent / arguments[0], *arguments[1:])
    assert done.exit_code == 2
    assert "error: " in done.output
    assert words in done.output
