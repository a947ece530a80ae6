"""Projects that know nothing of this package run under the full suite as they are."""

import warnings

import pytest
import torch

from lightning_diag import diagnose, read_run, suite
from lightning_diag.lightning import Trainer
from lightning_diag.report import write_report
from lightning_diag.suites import SUITES
from tests.promises.trace import differences, snapshot
from tests.strangers.projects import PROJECTS, STEPS

OPTIONS = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
# steps that the longest default interval does not reach here
LONGER = {"ComponentProfiler"}
# what there is to see of attention: module, heads and how it is computed
ATTENTION = {
    "bert": {f"bert.bert.encoder.layer.{i}.attention.self": 4 for i in range(2)},
    "llama": {f"model.model.layers.{i}.self_attn": 4 for i in range(2)},
    "gat": {"first": 4, "second": 1},
}


def run_project(name, folder, diagnostics):
    """Train as the project's author would; say what is left and what was warned of."""
    make, data = PROJECTS[name]
    torch.manual_seed(0)
    module = make()
    trainer = Trainer(callbacks=diagnostics, default_root_dir=folder, **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data())
    said = [str(warning.message) for warning in caught]
    return snapshot(trainer, module), [text for text in said if "has ended" in text]


@pytest.fixture(scope="module", params=PROJECTS)
def watched(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    without, _ = run_project(name, folder / "without", [])
    trace, ended = run_project(name, folder / "with", suite("full"))
    (path,) = (folder / "with").glob("**/diagnostics/version_0")
    return name, without, trace, ended, read_run(path)


def test_training_is_the_same_to_the_last_bit(watched):
    _, without, trace, ended, _ = watched
    assert not ended
    assert not differences(without, trace)
    assert trace["global_step"] >= STEPS


def test_every_diagnostic_measured_or_said_why_not(watched):
    _name, _, _, _, run = watched
    last = {row["diagnostic"]: row["measured"] for row in run.overhead.to_dicts()}
    notes = {row["diagnostic"] for row in run.frame("notes").to_dicts()}
    for kind in set(SUITES["full"]) - LONGER:
        assert last.get(kind, 0) >= 1 or kind in notes, kind
    for prefix in ("grad", "update", "hardware", "wiring", "health"):
        assert len(run.frame(prefix)), prefix


def test_nobody_is_accused(watched):
    *_, run = watched
    grave = [one for one in diagnose(run) if one.rank > 0]
    assert not grave, [(one.rule, one.component, one.message) for one in grave]
    assert run.info["attempts"][-1]["status"] == "finished"


def test_the_report_is_written(watched):
    *_, run = watched
    report = write_report(run)
    assert report.exit_code == 0
    text = report.files["report.md"].read_text()
    assert "could not be" not in text


def test_attention_is_seen_head_by_head(watched):
    name, *_, run = watched
    if name not in ATTENTION:
        messages = [row["message"] for row in run.frame("notes").to_dicts()]
        assert any("attention" in message for message in messages)
        return
    heads = {}
    for row in run.attention_head.to_dicts():
        heads.setdefault(row["component"], set()).add(row["head"])
        assert 0 <= row["entropy_normalized"] <= 1 + 1e-6
        assert 0 < row["max"] <= 1 + 1e-6
    assert {part: len(found) for part, found in heads.items()} == ATTENTION[name]
