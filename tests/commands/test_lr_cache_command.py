"""`lightning-diag lr-cache` as a user types it."""

import json
import math
import re
import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.commands.lr_cache import app
from lightning_diag.tuning.lr_store import LRStore
from tests.tuning.lr_store_cases import entry

HOSTILE = "[bold]x[/bold] <img src=x>"


@pytest.fixture
def store(tmp_path):
    return LRStore(tmp_path / "cache", math.inf)


@pytest.fixture
def call(store):
    """Run a subcommand on the store, and expect a status."""

    def call(*arguments, status=0, answer=None):
        command = [*map(str, arguments), "--cache-dir", str(store.folder)]
        result = CliRunner().invoke(app, command, input=answer)
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result.stderr if status == 2 else result.stdout

    return call


def test_an_empty_cache(call, store):
    assert call("list") == f"No learning rate is stored in {store.folder}.\n"
    assert not store.folder.exists()
    assert call("clear", "--yes") == "0 entries were removed.\n"


def test_list(call, store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    store.write(entry(0.5, lr=3.2e-4, model=HOSTILE, batch=64))
    store.write(entry(30, lr=1e-3, batch=[32, 4]))
    store.write(entry(24 * 9, model=None))
    head, *rows = call("list").splitlines()
    assert head.split() == ["key", "age", "learning", "rate", "confidence", "model", "batch"]
    assert [row[:12] for row in rows] == [one.key[:12] for one in store.entries()]
    assert re.search(r"30 min +0\.00032 +high +\[bold\]x\[/bold\] <img src=x> +64", rows[0])
    assert re.search(r"30\.0 h +0\.001 +high +mlp +32, 4", rows[1])
    assert re.search(r"9\.0 days .* high +- +64", rows[2])


def test_show(call, store):
    store.write(entry(2, lr=1e-4, decay=0.01, model=HOSTILE))
    key = entry(2, decay=0.01, model=HOSTILE).key
    text = call("show", key[:7])
    assert key in text
    for words in ("2.0 h ago", "0.0001", "-0.31 loss by factor e", "0.02 loss", "2.13", HOSTILE):
        assert words in text.replace("\n", "")
    assert re.search(r"optimizer.betas +0\.9, 0\.999", text)
    assert re.search(r"decay +0\.01", text)
    curve = text.partition("suggestion ('|' at 0.0001)\n")[2].splitlines()
    assert len(curve) == 13
    assert curve[-1].split()[0] == "1e-08"
    assert curve[-1].split()[-1] == "1"
    assert all(len(line) < 80 for line in curve)
    bars = {line.find("|") for line in curve[:-1]} - {-1}
    (bar,) = bars
    start = curve[-1].index("1e-08")
    assert bar - start == 32  # 1e-4 is the middle of 1e-8 to 1, of 64 characters
    assert sum(line.count(".") + line.count("#") for line in curve[1:-2]) > 60


@pytest.mark.parametrize("points", [1, 2])
def test_a_short_or_flat_curve_is_drawn(call, store, points):
    one = entry()
    for numbers in one.curve.values():
        numbers[:] = [0.5] * points
    store.write(one)
    assert "#" in call("show", one.key)


def test_a_picture(call, store, tmp_path):
    store.write(entry())
    target = tmp_path / "deep" / "a.PNG"
    text = call("show", entry().key, "--png", target)
    assert "The curve is in" in text
    assert "#" not in text
    assert target.read_bytes().startswith(b"\x89PNG")
    said = call("show", entry().key, "--png", tmp_path / "a.jpg", status=2)
    assert re.match(r"error: `--png` must name a file that ends in \.png, got `.*a\.jpg`\.", said)


def test_clear(call, store):
    keys = [entry(batch=batch).key for batch in range(4)]
    for batch in range(4):
        store.write(entry(100 * batch, batch=batch))
    assert call("clear", keys[0][:10]) == "1 entry was removed.\n"
    said = call("clear", "--older-than", 250, status=1, answer="n\n")
    assert f"Remove all entries older than 250 h of {store.folder}?" in said
    assert len(store.entries()) == 3
    assert call("clear", "--older-than", "250", "--yes") == "1 entry was removed.\n"
    assert "2 entries were removed." in call("clear", answer="y\n")
    assert store.entries() == []


def test_no_answer_removes_nothing(call, store):
    store.write(entry())
    call("clear", status=1, answer="")
    assert len(store.entries()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "00000000"), "error: No entry has a key that begins with `00000000`."),
        (("show", "../x"), "error: A key must be hexadecimal digits, got '../x'."),
        (("clear", "../x"), "error: A key must be hexadecimal digits, got '../x'."),
        (("clear", "--yes", "--older-than", "-1"), "error: `older_than_hours` must be at least 0"),
        (("clear", "--yes", "--older-than", "x"), "Invalid value for '--older-than'"),
        (("show",), "Missing argument 'KEY'"),
        (("sow",), "No such command 'sow'"),
    ],
)
def test_wrong_usage(call, store, tmp_path, arguments, said):
    store.write(entry())
    (tmp_path / "x.json").write_text("keep")
    assert said in call(*arguments, status=2)
    assert len(store.entries()) == 1
    assert (tmp_path / "x.json").exists()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("")
    for command in ("list", "clear"):
        result = CliRunner().invoke(app, [command, "--cache-dir", str(tmp_path / "a")])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: `folder` must be a folder, got ")


def test_a_corrupt_entry_is_said_and_left(call, store):
    store.write(entry())
    path = store.path(entry().key)
    path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "is corrupt, or of another version" in call("show", entry().key, status=2)
        assert "No learning rate is stored" in call("list")
    assert path.read_text() == "{"
    assert call("clear", "--yes") == "1 entry was removed.\n"


def test_errors_are_plain():
    def raise_(error):
        with plain_errors(False):
            raise error

    import typer

    with pytest.raises(typer.Exit) as ended:
        raise_(UsageError("no"))
    assert ended.value.exit_code == 2
    with pytest.raises(typer.Exit) as ended:
        raise_(RuntimeError("odd"))
    assert ended.value.exit_code == 1
    with pytest.raises(typer.Exit) as ended:
        raise_(typer.Exit(3))
    assert ended.value.exit_code == 3
    with pytest.raises(typer.Abort):
        raise_(typer.Abort())
    with pytest.raises(SystemExit) as ended:
        raise_(SystemExit(4))
    assert ended.value.code == 4
    for error in (UsageError("no"), RuntimeError("odd")):
        with pytest.raises(type(error), match=str(error)), plain_errors(True):
            raise error


def test_the_command_needs_no_hydra_and_no_torch():
    code = "import lightning_diag.commands.lr_cache, json, sys; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"hydra", "omegaconf", "torch", "altair", "polars", "filelock"}
