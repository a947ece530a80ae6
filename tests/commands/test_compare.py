"""What `lightning-diag compare` prints and writes, and how it ends."""

import json
import os

import pytest
from typer.testing import CliRunner

from lightning_diag.cli import app
from tests.commands.test_report_command import RISING, written

QUIET = [0.1] * 60
HIGH = [1.0] * 40 + [5e3] * 20


def call(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def quiet(tmp_path):
    return written(tmp_path / "quiet", QUIET)


@pytest.fixture
def high(tmp_path):
    return written(tmp_path / "high", HIGH)


def test_status_without_a_limit_is_always_0(quiet, high):
    assert call(quiet, high).exit_code == 0
    assert call(high, quiet).exit_code == 0


def test_status_for_ci(quiet, high):
    for limit in ("warning", "critical"):
        assert call(quiet, high, "--fail-on", limit).exit_code == 4
        assert call(high, quiet, "--fail-on", limit).exit_code == 0
        assert call(high, high, "--fail-on", limit).exit_code == 0


def test_the_text_names_what_is_new_and_gone(quiet, high):
    assert "NEW         CRITICAL Exploding gradient" in call(quiet, high).output
    assert "GONE        CRITICAL Exploding gradient" in call(high, quiet).output


def test_json_alone_on_the_output(quiet, high, tmp_path):
    done = call(quiet, high, "--json", "-", "--fail-on", "warning")
    read = json.loads(done.stdout)
    assert (read["exit_code"], done.exit_code) == (4, 4)
    assert read["findings"]["new"][0]["rule"] == "exploding_gradient"
    file = tmp_path / "out" / "c.json"
    filed = call(quiet, high, "--json", file)
    assert json.loads(file.read_text())["fail_on"] is None
    assert f"written: {file}" in filed.output.replace("\n", "")
    assert "Findings" in filed.output


def test_html(quiet, high, tmp_path):
    file = tmp_path / "c.html"
    assert call(quiet, high, "--html", file, "--json", "-").exit_code == 0
    assert file.read_text().startswith("<!doctype html>")


def test_thresholds(tmp_path):
    a, b = (written(tmp_path / name, norms) for name, norms in (("a", QUIET), ("b", RISING)))
    named = ["--threshold", "exploding_gradient.max_l2=2"]
    assert call(a, b, "--fail-on", "warning").exit_code == 0
    assert call(a, b, "--fail-on", "warning", *named).exit_code in (3, 4)
    own = written(tmp_path / "own", RISING, {"rules": {"exploding_gradient": {"max_l2": 2}}})
    assert call(a, own, "--fail-on", "warning").exit_code in (3, 4)


def test_usage(quiet, tmp_path):
    missing = call(quiet, tmp_path / "quit")
    assert missing.exit_code == 2
    assert f"did you mean `{quiet}`?" in missing.stderr
    assert call(quiet).exit_code == 2
    assert call(quiet, quiet, "--fail-on", "info").exit_code == 2
    named = call(quiet, quiet, "--threshold", "dead_componen.min_rows=2")
    assert named.exit_code == 2
    assert "did you mean `dead_component`?" in named.stderr
    page = call(quiet, quiet, "--html", "-")
    assert page.exit_code == 2
    assert "`--html` must name a file" in page.stderr
    (tmp_path / "nothing").mkdir()
    assert "holds neither" in call(quiet, tmp_path / "nothing").stderr


def test_a_run_that_is_still_written(quiet, tmp_path):
    going = written(tmp_path / "going", QUIET, status="running")
    with (going / "records" / "grad.jsonl").open("a") as file:
        file.write('{"step": 99, "l2')  # a line that is only half there
    before = {path: os.stat(path).st_mtime_ns for path in going.rglob("*")}
    assert call(quiet, going, "--fail-on", "warning").exit_code == 0
    assert {path: os.stat(path).st_mtime_ns for path in going.rglob("*")} == before
