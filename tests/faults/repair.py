"""A sick run mended by what its findings say: overrides applied, trained again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_diag import read_run
from lightning_diag.rules import diagnose
from lightning_diag.rules.repair import changed_config, changes
from tests.faults.case import Case
from tests.faults.trial import train

_ROUNDS = 3


@dataclass(frozen=True)
class Repair:
    """What became of one run.

    Args:
        name: The case.
        cause: What was said to be the cause.
        overrides: All that was changed, by key.
        rounds: How often it was trained again.
        end: ``"healthy"``, or what still is wrong.
    """

    name: str
    cause: str
    overrides: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    end: str = ""

    @property
    def mended(self) -> bool:
        """Whether it ended healthy."""
        return self.end == "healthy"


def repair(case: Case, folder: Path, sick: Path | None = None) -> Repair:
    """Train, diagnose, apply, train again, until it is healthy or nothing is left to apply.

    Args:
        case: The case.
        folder: Where to train.
        sick: The run of the case as it is, where that was made already.
    """
    config, cause = case.config, "nothing was found"
    changed: dict[str, Any] = {}
    for number in range(_ROUNDS + 1):
        place, witness = folder / f"round_{number}", None
        if number == 0 and sick is not None and sick.exists():
            place = sick
        else:
            try:
                witness = train(case, config, place)
            except Exception as error:
                if not number:
                    raise
                # overrides that cannot be trained with are the worst that a repair can end in
                end = f"does not train: {type(error).__name__}: {error}"
                return Repair(case.name, cause, changed, number, end)
        findings = [one for one in diagnose(read_run(place), on_error="raise") if one.rank > 0]
        if number == 0 and findings:
            cause = findings[0].rule
        if not findings:
            end = "healthy" if number else "nothing was found"
            try:
                if case.cured is not None and witness is not None:
                    case.cured(witness)
            except AssertionError as wrong:
                end = f"silent, but {wrong}"
            return Repair(case.name, cause, changed, number, end)
        made = changes(findings, config)
        if not made or number == _ROUNDS:
            said = ", ".join(one.rule for one in findings)
            return Repair(case.name, cause, changed, number, f"still {said}")
        config = changed_config(config, made)
        changed |= {one.key: one.value for one in made}
    raise AssertionError("unreachable")
