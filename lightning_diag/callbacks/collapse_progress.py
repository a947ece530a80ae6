"""The judged steps of CollapseStop by the ten: how loss, gradient and predictions go on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import pstdev

from torch import Tensor
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.collapse_judge import Numbers, Verdict

__all__ = ["Progress", "learning_rate"]

_STEPS = 10
_LONG_STEPS = 100
_LONG_AFTER = 20_000

Entry = tuple[int, float | None, float | None, float | None, int, int]


@dataclass
class Progress:
    """Gathers judged steps, and makes one row of every ten; of every hundred in a long run.

    It is not kept over a checkpoint: what was gathered becomes a row before.

    Attributes:
        entries: Step, loss, gradient norm, learning rate, whether the scaler skips it, and whether
            the gradient is not finite, of the steps since the last row.
        broken: Whether the loss of the last step was not finite.
        latest: Numbers of the last step, of which those of the predictions are taken.
    """

    entries: list[Entry] = field(default_factory=list)
    broken: bool = False
    latest: Row = field(default_factory=dict)
    _rows: list[tuple[int, Row]] = field(default_factory=list)

    def see(self, numbers: Numbers, verdict: Verdict, rate: float | None) -> None:
        """Take one step; a row is made where it is the last of its ten."""
        self.latest = verdict.row
        odd = numbers.values["nan"] + numbers.values["inf"] > 0
        self.entries.append(
            (numbers.step, numbers.loss, numbers.norm, rate, int(numbers.skipped), int(odd))
        )
        many = _STEPS if numbers.step < _LONG_AFTER else _LONG_STEPS
        before, self.broken = self.broken, "nonfinite_loss" in verdict.kinds[:1]
        # a break is told at once, and not at each step that it lasts
        if len(self.entries) >= many or (self.broken and not before):
            self.end()

    def end(self) -> None:
        """Make a row of what was gathered, if anything was."""
        if self.entries:
            self._rows.append((self.entries[-1][0], self._row(self.entries)))
            self.entries = []

    def take(self) -> list[tuple[int, Row]]:
        """The rows that were made since the last call, each with its step."""
        rows, self._rows = self._rows, []
        return rows

    def _row(self, entries: Sequence[Entry]) -> Row:
        losses = [(step, loss) for step, loss, *_ in entries if loss is not None]
        finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
        odd = [step for step, loss in losses if not math.isfinite(loss)]
        norms = [n for _, _, n, *_ in entries if n is not None and math.isfinite(n)]
        rates = [rate for _, _, _, rate, *_ in entries if rate is not None]
        row: Row = {"component": None, "first_step": entries[0][0], "steps": len(entries)}
        row |= _loss_columns(finite) | {"nonfinite": len(odd)}
        if odd:
            row["first_nonfinite"] = odd[0]
        row |= {
            "gradient_norm": _mean(norms) if norms else None,
            "gradient_norm_max": max(norms, default=None),
            "gradient_nonfinite": sum(broken for *_, broken in entries),
            "skipped": sum(skipped for *_, skipped, _ in entries),
            "lr": rates[-1] if rates else None,
            "lr_min": min(rates, default=None),
            "lr_max": max(rates, default=None),
        }
        return row | {key: self.latest.get(key) for key in ("variance", "top_share", "predictions")}


def _loss_columns(finite: Sequence[tuple[int, float]]) -> Row:
    if not finite:
        return dict.fromkeys(("loss", "loss_std", "loss_min", "loss_max", "loss_max_step"))
    values = [loss for _, loss in finite]
    highest = max(finite, key=lambda pair: pair[1])
    return {
        "loss": _mean(values),
        "loss_std": pstdev(values),
        "loss_min": min(values),
        "loss_max": highest[1],
        "loss_max_step": highest[0],
    }


def _mean(values: Sequence[float]) -> float:
    # divided before they are added: a sum may be too large where the mean is not
    return math.fsum(value / len(values) for value in values)


def learning_rate(optimizers: Sequence[Optimizer]) -> float | None:
    """The largest learning rate of all parameter groups; None where it lies on a device."""
    rates = [group.get("lr") for one in optimizers for group in one.param_groups]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return None
    return max((float(rate) for rate in rates if rate is not None), default=None)
