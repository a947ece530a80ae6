"""Findings are said while the run goes on: once, and again only after they were gone."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import (
    booleans,
    data,
    fixed_dictionaries,
    floats,
    integers,
    lists,
    none,
    sampled_from,
    text,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import GradientHealth, HealthAlerts, RunLogger
from lightning_diag.lightning import Callback
from lightning_diag.records import live_rows
from lightning_diag.records.live_rows import LiveRows
from lightning_diag.records.read_records import parse_records
from lightning_diag.records.read_run import read_run
from lightning_diag.rules import diagnose
from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.ledger import Ledger
from tests.callbacks.witness import fit, lightning, rows
from tests.conftest import Halving

DEAD = Finding("dead_component", "warning", "head", 3, 9)


class Sick(Halving):
    """The gradient of the head is zero from `since` on, and comes back at `until`."""

    def __init__(self, since=20, until=10**9):
        super().__init__(lr=1e-4)
        self.since, self.until = since, until

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        alive = 0.0 if self.since <= step < self.until else 1.0
        head = sum(weight.square().sum() / 2 for weight in self.head)
        return sum(weight.square().sum() / 2 for weight in self.encoder) + alive * head


@pytest.fixture
def long():
    return DataLoader(TensorDataset(torch.zeros(120, 1)), batch_size=1)


def watched(module, loader, path, *, every=10, **arguments):
    alerts = HealthAlerts(**{"every_n_steps": every, "on_error": "raise", **arguments})
    fit(module, [GradientHealth(every_n_steps=1, zeros_every=1), alerts], loader, path)
    return alerts, rows(path, "health_alert"), rows(path, "health")


def test_a_finding_is_said_once_soon_and_counted(long, tmp_path, capsys):
    seen = {}

    class Metrics(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    alerts = HealthAlerts(every_n_steps=10, on_error="raise")
    diagnostics = [GradientHealth(every_n_steps=1, zeros_every=1), alerts, Metrics()]
    fit(Sick(), diagnostics, long, tmp_path)
    dead = rows(tmp_path, "health_alert", rule="dead_component")
    assert len(dead) == 1
    assert dead[0]["component"] == "head"
    assert dead[0]["state"] == "raised"
    assert dead[0]["first_step"] == 20
    assert 20 < dead[0]["step"] <= 49
    printed = capsys.readouterr().err
    assert printed.count("Dead component: head, since step 20") == 1
    looks = rows(tmp_path, "health")
    assert [row["step"] for row in looks] == list(range(9, 120, 10))
    assert looks[0]["findings"] == 0
    assert looks[-1]["findings"] >= 1
    assert looks[-1]["critical"] + looks[-1]["warning"] == looks[-1]["findings"]
    assert seen["health/findings"] == looks[-1]["findings"]


def test_what_is_said_live_is_what_the_run_says_afterwards(long, tmp_path):
    watched(Sick(), long, tmp_path)
    live = LiveRows()
    for line in (tmp_path / "records" / "grad.jsonl").read_text().splitlines():
        live.add("grad", line)
    assert diagnose(live) == [replace(one, overrides={}) for one in diagnose(tmp_path)]


def test_a_healthy_run_is_silent(long, tmp_path, capsys):
    _, said, looks = watched(Halving(lr=1e-4), long, tmp_path)
    assert said == []
    assert {row["findings"] for row in looks} == {0}
    assert "WARNING" not in capsys.readouterr().err


def test_a_finding_is_cleared_when_it_has_gone_and_may_come_again(long, tmp_path):
    class Twice(Sick):
        def training_step(self, batch, batch_idx):
            step = self.trainer.global_step
            self.since, self.until = (50, 10**9) if step >= 45 else (10, 25)
            return super().training_step(batch, batch_idx)

    _, said, _ = watched(Twice(), long, tmp_path, every=5, clear_after=3)
    states = [row["state"] for row in said if row["rule"] == "dead_component"]
    assert states[:2] == ["raised", "cleared"]
    assert states.count("raised") == 2


def test_only_what_is_grave_enough_is_said(long, tmp_path):
    _, said, _ = watched(Sick(), long, tmp_path, severity="critical")
    assert [row for row in said if row["severity"] == "warning"] == []


def test_a_resumed_run_does_not_say_it_again(long, tmp_path):
    def resumable():
        return [
            GradientHealth(every_n_steps=1, zeros_every=1),
            HealthAlerts(every_n_steps=10, on_error="raise"),
        ]

    trainer = fit(Sick(), resumable(), long, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    first = rows(tmp_path, "health_alert", rule="dead_component", state="raised")
    fit(Sick(), resumable(), long, tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert rows(tmp_path, "health_alert", rule="dead_component", state="raised") == first
    assert rows(tmp_path, "health")[-1]["step"] == 239


class Alerting(lightning("loggers").CSVLogger):
    """Stands for W&B's logger, whose class is known by its name."""

    said: ClassVar[list[dict[str, object]]] = []

    class Experiment:
        def alert(self, **arguments):
            Alerting.said.append(arguments)
            raise OSError("no network")

    @property
    def experiment(self):
        return self.Experiment()

    def log_metrics(self, metrics, step):
        pass

    def save(self):
        pass


def test_loggers_are_told_and_may_fail(long, tmp_path):
    Alerting.said.clear()
    kind = type("WandbLogger", (Alerting,), {})
    board = lightning("loggers").TensorBoardLogger(tmp_path, name="board")
    alerts = HealthAlerts(every_n_steps=10, on_error="raise", console=False)
    loggers = [RunLogger(tmp_path / "run"), kind(tmp_path), board]
    diagnostics = [GradientHealth(every_n_steps=1, zeros_every=1), alerts]
    with pytest.warns(match="WandbLogger took no alert: OSError: no network"):
        fit(Sick(), diagnostics, long, tmp_path, logger=loggers)
    told = [one for one in Alerting.said if "Dead component" in one["title"]]
    assert len(told) == 1
    assert told[0]["level"] in ("WARN", "ERROR")
    assert "Try: " in told[0]["text"]
    events = b"".join(file.read_bytes() for file in tmp_path.glob("board/**/events*"))
    assert b"Dead component" in events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"severity": "grave"}, r"`severity` must be one of .*, got 'grave'\."),
        ({"clear_after": 0}, r"`clear_after` must be at least 1, got 0\."),
        ({"history_rows": 0}, r"`history_rows` must be at least 1, got 0\."),
        ({"thresholds": {"dead": {}}}, r"`thresholds` must name rules, got 'dead'"),
        ({"every_n_steps": 0}, r"`every_n_steps` must be at least 1 or \"auto\", got 0\."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HealthAlerts(**arguments)


class TestLedger:
    def test_raised_once_worsened_cleared_and_raised_again(self):
        ledger = Ledger(clear_after=2)
        assert ledger.update([DEAD]).raised == [DEAD]
        assert ledger.update([DEAD, DEAD]) == ([], [], [])
        grave = replace(DEAD, severity="critical")
        assert ledger.update([grave]).worsened == [grave]
        # as before, or milder: no news
        assert ledger.update([DEAD]) == ([], [], [])
        assert ledger.counts() == {"info": 0, "warning": 0, "critical": 1}
        assert ledger.update([]) == ([], [], [])
        assert ledger.update([]).cleared == [("dead_component", "head")]
        assert ledger.update([DEAD]).raised == [DEAD]

    def test_a_short_absence_is_no_news(self):
        ledger = Ledger(clear_after=2)
        ledger.update([DEAD])
        for _ in range(5):
            assert ledger.update([]) == ([], [], [])
            assert ledger.update([DEAD]) == ([], [], [])


class TestLiveRows:
    def line(self, step, **values):
        return json.dumps({"step": step, "component": None, **values})

    def test_keeps_the_latest_rows(self):
        live = LiveRows(history_rows=3)
        for step in range(5):
            live.add("grad", self.line(step, l2=float(step)))
        assert live.frame("grad")["l2"].to_list() == [2.0, 3.0, 4.0]
        live.add("grad", self.line(9, l2=None, l2_nonfinite=1))
        assert live.frame("grad")["step"].to_list() == [3, 4, 9]
        assert live.latest_steps("grad", 2) == [4, 9]
        assert live.prefixes == ["grad"]

    def test_reads_like_the_run(self, tmp_path):
        logger = RunLogger(tmp_path)
        live = LiveRows()
        end = logger.listen(live.add)
        logger.log_rows("grad", [{"component": "a", "l2": float("inf")}], step=0, epoch=0)
        logger.log_rows("grad", [{"component": "a", "l2": 2}], step=1, epoch=0)
        assert live.frame("grad").equals(read_run(tmp_path).frame("grad"))
        end()
        logger.log_rows("grad", [{"component": "a", "l2": 3}], step=2, epoch=0)
        assert len(live.frame("grad")) == 2

    def test_a_row_is_parsed_once(self, monkeypatch):
        parsed = []

        def counting(data):
            parsed.append(data.count(b"step"))
            return parse_records(data)

        monkeypatch.setattr(live_rows, "parse_records", counting)
        live = LiveRows(history_rows=100)
        for step in range(1000):
            # a column without a value has no type, and is none that does not fit
            bins = None if step % 20 < 10 else [1.0]
            live.add("grad", self.line(step, l2=float(step), bins=bins))
            if step % 10 == 9:
                assert live.frame("grad")["step"].to_list() == [*range(max(0, step - 99), step + 1)]
                assert live.frame("grad") is live.frame("grad")
        assert parsed == [10] * 100
        # more than it keeps came between two looks
        for step in range(1000, 1250):
            live.add("grad", self.line(step, l2=0.0))
        assert live.frame("grad")["step"].to_list() == [*range(1150, 1250)]
        assert parsed[100:] == [100]

    @given(data())
    def test_read_bit_by_bit_it_is_the_same(self, draw):
        number = none() | floats(-9, 9).map(lambda x: round(x, 3)) | integers(-9, 9)
        kinds = {"a": number, "b": none() | text("xyz", max_size=3), "c": none() | lists(number)}
        kinds["mixed"] = number | sampled_from(["x", "y"])
        row = fixed_dictionaries({}, optional=kinds)
        rows = draw.draw(lists(row, max_size=25))
        live, lines = LiveRows(history_rows=8), []
        for step, values in enumerate(rows):
            lines.append(self.line(step, **values))
            live.add("grad", lines[-1])
            if draw.draw(booleans()):
                whole = parse_records("\n".join(lines[-8:]).encode())[0]
                assert self.values(live.frame("grad")) == self.values(whole)

    @staticmethod
    def values(frame):
        """What is there, whatever type a column has; text where a column holds several."""
        found = []
        for row in frame.to_dicts():
            row["mixed"] = str(row.get("mixed")).removesuffix(".0")
            found.append({name: value for name, value in row.items() if value is not None})
        return found

    def test_without_rows_the_columns_are_there(self):
        assert LiveRows().frame("grad").columns == ["step", "epoch", "time", "attempt", "component"]


def test_evidence_names_the_file(tmp_path):
    alerts = HealthAlerts()
    alerts._live = LiveRows()
    for step in range(10):
        alerts._live.add("grad", json.dumps({"step": step, "component": None}))
    seen = Evidence("records/grad.jsonl", (1, 2))
    assert alerts._is_current(replace(DEAD, last_step=7, evidence=seen))
    assert not alerts._is_current(replace(DEAD, last_step=6, evidence=seen))
    assert alerts._is_current(replace(DEAD, last_step=6))
    assert alerts._is_current(replace(DEAD, last_step=None, evidence=seen))
