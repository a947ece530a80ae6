"""Tell me now: the rules on live rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.health_channels import say, send
from lightning_diag.callbacks.health_charts import Charts, are_wanted, give_charts
from lightning_diag.callbacks.run import run_logger
from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.records.live_rows import LiveRows
from lightning_diag.records.read_run import read_run
from lightning_diag.rules.diagnosis import diagnose
from lightning_diag.rules.finding import SEVERITIES, Finding, Severity
from lightning_diag.rules.ledger import Ledger, Standing
from lightning_diag.rules.registry import resolve_thresholds

__all__ = ["HealthAlerts"]

_KEYS = ("findings", "critical", "warning")


class HealthAlerts(Diagnostic):
    """Findings as they arise: the rules of `diagnose`, run on the latest rows of this run.

    Whatever the other diagnostics have written is judged every `every_n_steps` optimizer steps, and
    once more when training ends. Each finding is said once: on the terminal, as an alert or text in
    the loggers that have those, and as counts in ``trainer.callback_metrics``. It is cleared, and
    may be said again, when it has been gone for `clear_after` looks: when the rule finds it no
    longer, or found it last at a step that lies `clear_after` measurements back.

    The process of rank 0 judges; the counts reach the others by one small collective, so that
    callbacks such as ``EarlyStopping`` may watch them anywhere. Nothing is read from a device but
    those counts, and only with several ranks. Place it after the other diagnostics, or it sees
    their rows one look later.

    Args:
        every_n_steps: Optimizer steps between two looks, or ``"auto"``: as often as
            `overhead_budget` allows, since a look takes as long whatever a step takes.
        severity: The mildest findings that are said: ``"info"``, ``"warning"`` or ``"critical"``.
        clear_after: Looks, and measurements, without a finding before it is cleared.
        history_rows: Rows of each record file that the rules see, the latest.
        thresholds: ``{rule id: {threshold: number}}`` in place of the defaults.
        console: Whether to print findings.
        loggers: Whether to send findings to W&B (``alert``), TensorBoard (``add_text``) and MLflow
            (``log_text``).
        charts: Whether these get the charts of the report, as pictures, when training has ended,
            which takes some seconds; ``"auto"``: where that is within `overhead_budget`. Needs
            Pillow.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend, on looks or on charts.

    Raises:
        TypeError: If a threshold is no number.
        ValueError: If an argument is out of range, or a rule or threshold unknown.

    Logs:
        ``health/findings``, ``health/critical`` and ``health/warning``: how many stand.

    Rows:
        ``records/health.jsonl``, one a look: ``findings``, ``critical``, ``warning`` (counts of
        what stands). ``records/health_alert.jsonl``, one a change: ``component``, ``rule``,
        ``severity``, ``state`` (raised, worsened or cleared), ``first_step``, ``last_step``,
        ``observed``, ``threshold``, ``unit``, ``message``, ``suggestion``.

    Example:
        >>> HealthAlerts(severity="critical").severity
        'critical'
    """

    prefix = "health"
    logged = frozenset(_KEYS)
    collective_hooks = frozenset({"on_train_batch_end"})
    gathers_replicas = True

    def __init__(
        self,
        every_n_steps: Interval = "auto",
        severity: Severity = "warning",
        clear_after: int = 3,
        history_rows: int = 1000,
        thresholds: Mapping[str, Any] | None = None,
        console: bool = True,
        loggers: bool = True,
        charts: Charts = "auto",
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if severity not in SEVERITIES:
            raise ValueError(f"`severity` must be one of {SEVERITIES}, got {severity!r}.")
        if history_rows < 1:
            raise ValueError(f"`history_rows` must be at least 1, got {history_rows}.")
        if not (isinstance(charts, bool) or charts == "auto"):
            raise ValueError(f'`charts` must be true, false or "auto", got {charts!r}.')
        Ledger(clear_after)
        resolve_thresholds(thresholds)
        self.severity: Severity = severity
        self.clear_after = clear_after
        self.history_rows = history_rows
        self.thresholds = thresholds
        self.console = console
        self.loggers = loggers
        self.charts: Charts = charts
        self._live: LiveRows | None = None
        self._silence: Callable[[], None] | None = None
        super().__init__(
            every_n_steps=every_n_steps, on_error=on_error, overhead_budget=overhead_budget
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        run = run_logger(trainer)
        if run is None:
            self.note(trainer, "no RunLogger is there, so no rows can be judged.", "warning")
        elif trainer.is_global_zero:
            self._live = LiveRows(history_rows=self.history_rows)
            if (run.path / "records").is_dir():
                before = read_run(run.path)
                self._live.config = before.config
                self._live.take(before)
            self._silence = run.listen(self._live.add)
            # what takes long the first time is done before the first step
            diagnose(self._live, self.thresholds)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due_after(trainer):
            # the step before this one has been made
            step = self.step_of(trainer) - pl_module.automatic_optimization
            if self._gathers:
                self._look_together(trainer, pl_module, step)
            else:
                self.measured()
                self._write(trainer, self._look(trainer, step), step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._look(trainer, self.step_of(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the last checkpoint is written: whoever breaks this off loses pictures alone
        super().on_fit_end(trainer, pl_module)
        wanted = are_wanted(self.charts, self._clock.elapsed, self.overhead_budget)
        if wanted and self._live is not None:
            said = give_charts(trainer)
            if said is not None:
                self.note(trainer, *said)

    def release(self) -> None:
        super().release()
        if self._silence is not None:
            self._silence()
        self._silence = None
        self._live = None

    def forget(self) -> None:
        super().forget()
        self._ledger = Ledger(self.clear_after)

    def state_dict(self) -> dict[str, Any]:
        standing = [[*key, *value] for key, value in self._ledger.standing.items()]
        return {**super().state_dict(), "standing": standing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._ledger = Ledger(self.clear_after)
        for rule, component, severity, gone in state_dict["standing"]:
            self._ledger.standing[rule, component] = Standing(severity, gone)

    # ---- looking ----

    def _look_together(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        began = self.device_began(pl_module.device)

        def compute() -> Tensor:
            return torch.tensor(self._look(trainer, step), dtype=torch.float64)

        gathered = self.gather(compute, len(_KEYS), pl_module.device)

        def then(values: Tensor) -> None:
            read: list[list[float]] = values.tolist()
            self.all_well([mark for rank in read for mark in rank[len(_KEYS) :]])
            self._write(trainer, [int(count) for count in read[0][: len(_KEYS)]], step)

        self.read(gathered, then, began)

    def _look(self, trainer: Trainer, step: int) -> list[int]:
        """Judge the rows, say what is new, and count what stands; nothing but on rank 0."""
        if self._live is None:
            return [0] * len(_KEYS)
        found = diagnose(self._live, self.thresholds)
        gravest = SEVERITIES.index(self.severity)
        current = [one for one in found if one.rank >= gravest and self._is_current(one)]
        changes = self._ledger.update(current)
        rows: list[Row] = [
            *(_row(one, "raised") for one in changes.raised),
            *(_row(one, "worsened") for one in changes.worsened),
        ]
        for rule, component in changes.cleared:
            rows.append({"component": component, "rule": rule, "state": "cleared"})
        if rows:
            self.report(trainer, rows, step=step, prefix="health_alert")
        for finding in [*changes.raised, *changes.worsened]:
            if self.console:
                say(trainer, finding)
            if self.loggers:
                send(trainer, finding, step)
        counts = self._ledger.counts()
        return [len(self._ledger.standing), counts["critical"], counts["warning"]]

    def _is_current(self, finding: Finding) -> bool:
        """Whether a finding reaches into the last few measurements of what it rests on."""
        prefix = finding.evidence.file.rpartition("/")[2].removesuffix(".jsonl")
        if self._live is None or finding.last_step is None or prefix not in self._live.prefixes:
            return True
        latest = self._live.latest_steps(prefix, self.clear_after)
        return not latest or finding.last_step >= latest[0]

    def _write(self, trainer: Trainer, counts: list[int], step: int) -> None:
        row: Row = {"component": None, **dict(zip(_KEYS, counts, strict=True))}
        self.report(trainer, [row], step=step)


def _row(finding: Finding, state: str) -> Row:
    names = ("rule", "severity", "first_step", "last_step", "observed", "threshold", "unit")
    known = {name: getattr(finding, name) for name in names}
    words = {"message": finding.message, "suggestion": finding.suggestion}
    return {"component": finding.component, "state": state, **known, **words}
