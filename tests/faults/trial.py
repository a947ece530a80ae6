"""One case, trained for real under the diagnostics, and what was found in it."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_diag import (
    ActivationHealth,
    AttentionCapture,
    CollapseStop,
    GradientHealth,
    HardwareMonitor,
    HealthAlerts,
    LatentStats,
    RunLogger,
    UpdateRatio,
    WiringCheck,
    read_run,
    suite,
)
from lightning_diag import lightning as door
from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.rules import Finding, diagnose
from tests.faults.case import Case, Config
from tests.faults.witness import Witness

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

Setting = Literal["close", "default"]


@dataclass(frozen=True)
class Trial:
    """What came of a case.

    Args:
        case: The case.
        findings: What `diagnose` says after the run.
        delay: Steps from the onset to the first look, every ten steps, at which one of the
            rules that should be found stood above ``info``; None where it never did.
        since: Steps between the onset and the `first_step` of that finding.
        error: Why the case is not what it claims, if it is not.
    """

    case: Case
    findings: list[Finding]
    delay: int | None
    since: int | None
    error: str = ""

    @property
    def accusations(self) -> list[Finding]:
        """Findings above ``info``."""
        return [one for one in self.findings if one.rank > 0]

    @property
    def found(self) -> bool:
        """Whether what is wrong was found at all."""
        return any(one.rule in self.case.found for one in self.accusations)

    @property
    def right_cause(self) -> bool:
        """Whether the first finding names the cause."""
        return bool(self.accusations) and self.accusations[0].rule in self.case.cause


def diagnostics(setting: Setting, components: Mapping[str, str] | None) -> list[Diagnostic]:
    """Every diagnostic that rules read: close intervals, or those that the suite has."""
    if setting == "default":
        chosen = suite("full", components)
        # a run that is broken off shows nothing of what comes after
        chosen = [one for one in chosen if not isinstance(one, CollapseStop | HealthAlerts)]
        return [*chosen, CollapseStop(action="warn")]
    parts: dict[str, Any] = {"components": components, "on_error": "raise"}
    return [
        GradientHealth(every_n_steps=5, **parts),
        UpdateRatio(every_n_steps=5, **parts),
        ActivationHealth(every_n_steps=10, **parts),
        LatentStats(every_n_steps=10, on_error="raise"),
        AttentionCapture(every_n_steps=10, on_error="raise"),
        WiringCheck(every_n_steps=20, **parts),
        HardwareMonitor(every_n_steps=10, on_error="raise"),
        CollapseStop(action="warn", on_error="raise"),
    ]


def train(case: Case, config: Config, folder: Path, setting: Setting = "close") -> Witness:
    """Train a case into a folder, and return who saw it."""
    torch.set_num_threads(1)
    package = importlib.import_module(door.PACKAGE)
    package.seed_everything(case.seed(config["seed"]), verbose=False)
    witness, hardware, trainer = Witness(), config["hardware"], dict(config["trainer"])
    logger = RunLogger(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = case.build(config)
        # as `lightning-diag train` writes them down: what the diagnostics were given
        logger.log_hyperparams({**config, "components": job.components and dict(job.components)})
        if job.val is None:
            trainer.pop("val_check_interval", None)
        elif len(job.train) < trainer.get("val_check_interval", 0):
            trainer |= {"check_val_every_n_epoch": None}
        door.Trainer(
            accelerator="cpu",
            devices=1,
            precision=hardware["precision"],
            accumulate_grad_batches=hardware["accumulate"],
            logger=logger,
            callbacks=[*diagnostics(setting, job.components), witness],
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **trainer,
        ).fit(job.model, job.train, job.val)
    return witness


def attempt(case: Case, folder: Path, setting: Setting = "close") -> Trial:
    """Train a case, show that it is what it claims, and diagnose it.

    A folder that holds the run already is diagnosed again, and not trained.
    """
    said = folder / "verified.txt"
    if not said.exists():
        witness, error = train(case, case.config, folder, setting), ""
        try:
            case.verify(witness)
        except AssertionError as wrong:
            error = f"not what it claims: {wrong}".strip()
        said.write_text(error)
    error, run = said.read_text(), read_run(folder)
    findings = diagnose(run, on_error="raise")
    delay, since = (None, None) if case.healthy else _delay(case, run)
    return Trial(case, findings, delay, since, error)


def _delay(case: Case, run: "Run") -> tuple[int | None, int | None]:
    steps = sorted({s for p in run.prefixes for s in run.frame(p)["step"].drop_nulls().to_list()})
    last = steps[-1] if steps else 0
    for look in [*range(min(case.onset, last), last, 10), last]:
        for one in diagnose(_Until(run, look), on_error="raise"):
            if one.rank > 0 and one.rule in case.found:
                first = one.first_step
                return max(0, look - case.onset), None if first is None else first - case.onset
    return None, None


class _Until:
    """A run as it was after a step."""

    def __init__(self, run: "Run", step: int) -> None:
        self.config = run.config
        self._run = run
        self._step = step
        self.frame = partial(_frame, run, step)

    @property
    def prefixes(self) -> list[str]:
        return [one for one in self._run.prefixes if len(self.frame(one))]


def _frame(run: "Run", step: int, prefix: str) -> "pl.DataFrame":
    frame = run.frame(prefix)
    return frame.filter((frame["step"] <= step) | frame["step"].is_null())
