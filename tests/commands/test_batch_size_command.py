"""The command: which arguments are its own, what it writes, what it returns to the shell."""

import json

import pytest

from lightning_diag.commands.batch_size import asked, batch_size
from lightning_diag.commands.errors import UsageError
from tests.tuning import batch_size_jobs as jobs


def test_arguments_are_its_own_or_hydras():
    found = asked(
        [
            "experiment=tiny",
            "batch_sizes=[16, 32]",
            "epochs=3",
            "memory_limit_gib=1.5",
            "timeout_s=null",
            "output=out/a.md",
            "+data.epochs=7",
            "--config-dir",
            "conf",
        ]
    )
    assert found.batch_sizes == (16, 32)
    assert found.options == {"epochs": 3, "memory_limit_gib": 1.5}
    assert str(found.output) == "out/a.md"
    assert found.hydra == ("experiment=tiny", "+data.epochs=7", "--config-dir", "conf")
    assert asked(["batch_sizes=8"]).batch_sizes == (8,)
    assert asked(["batch_sizes=8"]).output is None


LIST = "`batch_sizes` must be a list of whole numbers, as in `batch_sizes=[16,32,64]`"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"{LIST}; it was not given."),
        (["batch_sizes=[16,0]"], f"{LIST}, got `[16,0]`."),
        (["batch_sizes=[16,1.5]"], f"{LIST}, got `[16,1.5]`."),
        (["batch_sizes=[]"], f"{LIST}, got `[]`."),
        (["batch_sizes=[16"], f"{LIST}, got `[16`."),
        (["batch_sizes=[true]"], f"{LIST}, got `[true]`."),
        (["batch_sizes=8", "epochs=1.5"], "`epochs` must be a whole number, got `1.5`."),
        (["batch_sizes=8", "spare=much"], "`spare` must be a number, got `much`."),
        (["batch_sizes=8", "epochs=0"], "`epochs` must be a whole number of at least 1, got 0."),
        (["batch_sizes=8", "spare=2"], "`spare` must be at least 0 and below 1, got 2.0."),
        (
            ["batch_sizes=8", "output=a.txt"],
            "`output` must name a file that ends in .md, got `a.txt`.",
        ),
    ],
    ids=" ".join,
)
def test_a_mistake_is_refused_before_anything_is_measured(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        batch_size(arguments, lambda hydra: ("tiny", {}), jobs.make)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_three_files_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    composed = []

    def compose(hydra):
        composed.append(tuple(hydra))
        return "a/b", {"fails_in": 2}

    status = batch_size(["batch_sizes=[16]", "epochs=1", "seed=7"], compose, jobs.make)
    assert status == 0
    assert composed == [("seed=7",)]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("batch-size-a-b-2")
    stored = json.loads((folder / "profile.json").read_text())
    (row,) = stored["profiles"]
    assert (row["batch_size"], row["status"], row["epochs_completed"]) == (16, "ok", 1)
    assert stored["recommendation"]["batch_size"] == 16
    assert stored["title"] == "a/b"
    text = (folder / "profile.md").read_text()
    assert "![Throughput and memory by batch size](profile.png)" in text
    assert "**Optimal batch size: 16**" in text
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "batch size 16: " in said
    assert "optimal batch size: 16" in said


@pytest.mark.slow
def test_nothing_measured_is_a_failure(tmp_path):
    arguments = ["batch_sizes=[16]", "timeout_s=0.1", f"output={tmp_path}/mine.md"]
    assert batch_size(arguments, lambda hydra: ("tiny", {}), jobs.make) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine.md", "mine.png", "mine.json"}
    assert "TIMEOUT" in (tmp_path / "mine.md").read_text()
