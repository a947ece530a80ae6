"""Do the notebooks run from top to bottom, say what they claim, and stay small?"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"comparing_seeds", "is_my_run_healthy", "watching_blobs_form", "where_does_attention_look"}

LARGEST_NOTEBOOK = 150_000
LARGEST_PICTURE = 40_000
LONGEST_CELL = 24
PATHS = re.compile(r"/home/|/tmp/|/root/|/Users/|/var/|[A-Z]:\\\\", re.IGNORECASE)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[Any]:
    return [output for cell in code(notebook) for output in cell.outputs]


def noise(notebook: nbformat.NotebookNode) -> list[str]:
    """What was written to the standard error, and the errors."""
    return [
        output.get("text") or output.get("evalue")
        for output in outputs(notebook)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_there_is_one_for_each_question():
    assert {path.stem for path in NOTEBOOKS} == NAMES
    text = (ROOT / "notebooks/README.md").read_text("utf-8")
    assert {name for name in NAMES if f"({name}.ipynb)" in text} == NAMES


@pytest.mark.slow
@pytest.mark.timeout(600)
@each
def test_a_notebook_runs_and_keeps_its_claims(path, tmp_path, monkeypatch):
    """In a fresh kernel, away from the checkout; its assert cells hold, nothing is warned of."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        folder = tmp_path / variable
        folder.mkdir()
        monkeypatch.setenv(variable, str(folder))
    work = tmp_path / "notebooks"
    work.mkdir()
    notebook = read(path)
    committed = [kinds(cell) for cell in code(notebook)]
    # raises where a cell does
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    assert noise(notebook) == []
    assert [kinds(cell) for cell in code(notebook)] == committed
    assert list(work.iterdir()) == []


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    return [output.get("name") or ",".join(sorted(output.data)) for output in cell.outputs]


@each
def test_a_committed_notebook_was_run_in_order_and_without_noise(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert noise(notebook) == []
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert any(output.get("name") == "stdout" for output in outputs(notebook))


@each
def test_a_committed_notebook_is_small(path):
    notebook = read(path)
    assert path.stat().st_size < LARGEST_NOTEBOOK
    assert 10 <= len(notebook.cells) <= 25
    assert max(len(cell.source.splitlines()) for cell in code(notebook)) <= LONGEST_CELL
    pictures = [output.data["image/png"] for output in outputs(notebook) if "data" in output]
    assert max(len(picture) * 3 // 4 for picture in pictures) < LARGEST_PICTURE


@each
def test_a_committed_notebook_names_no_machine(path):
    notebook = read(path)
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)  # in base64 anything may stand
    assert PATHS.findall(nbformat.writes(notebook)) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(dict(cell.metadata) == {} for cell in notebook.cells)


@each
def test_a_notebook_asserts_what_it_claims_and_names_what_is_planted(path):
    notebook = read(path)
    asserts = re.findall(r"^\s*assert ", "\n".join(cell.source for cell in code(notebook)), re.M)
    assert len(asserts) >= 3
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**planted" in prose.lower()
    assert "## The answer" in prose


@each
def test_a_notebook_uses_public_names_alone(path):
    source = "\n".join(cell.source for cell in code(read(path)))
    assert not re.search(r"^\s*(from|import) .*\b_\w", source, re.M)
    assert not re.search(r"\b(hydra|omegaconf|https?)\b", source)


def test_notebooks_are_formatted():
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "notebooks"]
        ended = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
