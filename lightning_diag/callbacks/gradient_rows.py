"""What GradientHealth sees at one step, and the rows that it makes of the numbers."""

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.optimizers import (
    gradient_scaler,
    optimizer_index,
    own_parameters,
    unscales_itself,
)
from lightning_diag.callbacks.segments import number, read_segments
from lightning_diag.components import OTHER, Assignment
from lightning_diag.functional.gradient_health import (
    clip_coefficient,
    gradient_summary,
    norm_shares,
)
from lightning_diag.functional.moments import Moments
from lightning_diag.lightning import Trainer

__all__ = [
    "STATISTICS",
    "UNKNOWN",
    "GradientNumbers",
    "GradientView",
]

UNKNOWN = "?"
STATISTICS = ("count", "l2", "rms", "mean", "std", "min", "max", "zeros", "nonfinite")


@dataclass(frozen=True)
class GradientView:
    """One optimizer's gradients at one step, and what is around them."""

    trainer: Trainer
    step: int
    optimizer: int | None
    names: list[str]
    parts: list[str]
    index: list[int]
    gradients: list[Tensor | None]
    trainable: list[bool]
    matrices: list[bool]
    frozen: list[int]
    reported: list[int]
    scale: Tensor
    has_scaler: bool
    scaled: bool
    skipped_before: int
    algorithm: str
    limit: float

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        optimizer: Optimizer,
        assignment: Assignment,
        *,
        step: int,
        skipped: int,
    ) -> "GradientView":
        """Look at the gradients that `optimizer` is about to use; nothing is read or changed."""
        own = own_parameters(optimizer)
        owners = assignment.owners()
        places = [owners.get(id(parameter), (OTHER, UNKNOWN)) for parameter in own]
        parts = list(dict.fromkeys([*assignment.names, *(component for component, _ in places)]))
        index = [parts.index(component) for component, _ in places]
        several = len(trainer.optimizers) > 1
        scaler = gradient_scaler(trainer)
        one = torch.ones((), device=trainer.lightning_module.device)
        return cls(
            trainer=trainer,
            step=step,
            optimizer=optimizer_index(trainer, optimizer) if several else None,
            names=[name for _, name in places],
            parts=parts,
            index=index,
            gradients=[parameter.grad for parameter in own],
            trainable=[parameter.requires_grad for parameter in own],
            matrices=[parameter.dim() > 1 for parameter in own],
            frozen=[
                sum(not p.requires_grad for p in assignment.parameters.get(part, {}).values())
                for part in parts
            ],
            reported=sorted(set(index)) if several else list(range(len(parts))),
            # the public way to the scale that does not wait for the device
            scale=one if scaler is None else scaler.scale(one),
            has_scaler=scaler is not None,
            scaled=scaler is not None and unscales_itself(optimizer),
            skipped_before=skipped,
            algorithm=_algorithm(trainer),
            limit=float(trainer.gradient_clip_val or 0),
        )

    def without_copies(self, gradients: list[Tensor | None]) -> "GradientView":
        """The same on a rank that adds its shards to those of others: what is whole, rank 0 has.

        Args:
            gradients: What `completed_gradients` gave.
        """
        flat = any(kind.__name__ == "FSDPStrategy" for kind in type(self.trainer.strategy).__mro__)
        if flat or self.trainer.global_rank == 0:
            return replace(self, gradients=gradients)
        own = [
            gradient if gradient is None or isinstance(gradient, DTensor) else gradient.new_empty(0)
            for gradient in gradients
        ]
        return replace(self, gradients=own)


def _algorithm(trainer: Trainer) -> str:
    algorithm = trainer.gradient_clip_algorithm
    return str(getattr(algorithm, "value", algorithm) or "norm")


class GradientNumbers:
    """The numbers of one measurement on the host, read at once, and the rows made of them.

    Args:
        view: What was measured.
        table: Numbers by parameter, shape ``(n, 9)``, see `gradient_table`.
        extras: The scale, then the histograms by component if there are any.
        marks: Anything else to be read along: rows of the table that must be measured again, or
            what the ranks say of themselves.
    """

    def __init__(self, view: GradientView, table: Tensor, extras: Tensor, marks: Tensor) -> None:
        self.view = view
        scale = extras[0] if view.scaled else torch.ones_like(extras[0])
        index = torch.tensor(view.index, dtype=torch.long)
        summary = gradient_summary(table, index, len(view.parts), scale)
        whole = summary.whole
        size = whole.abs_max if view.algorithm == "value" else whole.l2
        size = torch.where(whole.nonfinite > 0, torch.nan, size)
        segments = {
            "parameters": _statistics(summary.parameters),
            "parts": _statistics(summary.parts),
            "whole": _statistics(whole),
            "shares": norm_shares(summary.parts.sum_sq),
            "present": summary.present,
            "tensors": summary.tensors,
            "nans": summary.nans,
            "norms": summary.norms,
            "clip": clip_coefficient(size, view.limit) if view.limit else size,
            "extras": extras,
            "marks": marks,
        }
        self._read = read_segments(segments, table)

    @property
    def marks(self) -> list[float]:
        """The marks that were read along."""
        return self._read["marks"]

    @property
    def nonfinite(self) -> float:
        """Number of non-finite elements over all gradients."""
        return self._statistics("whole", 0)["nonfinite"] or 0

    @property
    def scale(self) -> float:
        """What the loss was multiplied by."""
        return self._read["extras"][0]

    @property
    def clip_coefficient(self) -> float | None:
        """Factor that clipping will apply; None where the gradient is not finite."""
        return number(self._read["clip"][0])

    def part_row(self, part: int) -> Row:
        """The row of one component."""
        row: Row = {"component": self.view.parts[part], **self._own()}
        row |= self._statistics("parts", part)
        row |= self._presence(part) | {"share": number(self._read["shares"][part])}
        return row | self._smallest(part)

    def whole_row(self) -> Row:
        """The row of the whole model, without what the callback's counters add."""
        found = self._statistics("whole", 0)
        nans = self._read["nans"][0]
        largest, smallest, mean = (number(norm) for norm in self._read["norms"])
        shares = [number(share) for share in self._read["shares"]]
        known = {part: share for part, share in enumerate(shares) if share is not None}
        dominant = max(known, key=known.__getitem__) if known else None
        row: Row = {"component": None, **self._own(), **found}
        row |= self._presence(None)
        return row | {
            "share": 1.0 if known else None,
            "global_norm": found["l2"],
            "max_norm": largest,
            "min_norm": smallest,
            "mean_norm": mean,
            "has_nan": int(nans > 0),
            "has_inf": int((found["nonfinite"] or 0) > nans),
            "dominant": None if dominant is None else self.view.parts[dominant],
            **self._smallest(None),
        }

    def parameter_row(self, place: int) -> Row:
        """The row of one parameter."""
        row: Row = {
            "component": self.view.parts[self.view.index[place]],
            **self._own(),
            "parameter": self.view.names[place],
            "missing": int(not self._read["present"][place] and self.view.trainable[place]),
        }
        return row | self._statistics("parameters", place)

    def histogram_row(self, part: int, low: int) -> Row:
        """How many elements of a component have a magnitude of each power of ten."""
        bins = (len(self._read["extras"]) - 1) // len(self.view.parts)
        counts = self._read["extras"][1 + part * bins :][:bins]
        row: Row = {"component": self.view.parts[part], **self._own()}
        return row | {f"1e{low + place}": int(count) for place, count in enumerate(counts)}

    def _own(self) -> Row:
        return {} if self.view.optimizer is None else {"optimizer": self.view.optimizer}

    def _statistics(self, segment: str, place: int) -> dict[str, Any]:
        width = len(STATISTICS)
        values = self._read[segment][place * width : (place + 1) * width]
        found: dict[str, Any] = dict(zip(STATISTICS, map(number, values), strict=True))
        found["count"], found["nonfinite"] = int(values[0]), int(values[-1])
        if not found["count"]:
            return dict.fromkeys(STATISTICS) | {"count": 0, "nonfinite": 0}
        if found["zeros"] is None:
            del found["zeros"]
        return found

    def _smallest(self, part: int | None) -> Row:
        """The weight matrix with the smallest gradient that is not zero, and the largest norm.

        Biases and gains are left out: where a normalization follows, they have none by nature.
        """
        width, at = len(STATISTICS), STATISTICS.index("l2")
        norms = self._read["parameters"][at::width]
        matrices = [
            (norms[i], self.view.names[i])
            for i, owner in enumerate(self.view.index)
            if part in (None, owner) and self.view.matrices[i] and 0 < norms[i] < inf
        ]
        if len(matrices) < 2:
            return {}
        least, name = min(matrices)
        return {
            "matrix_min": number(least),
            "matrix_max": number(max(matrices)[0]),
            "smallest": name,
        }

    def _presence(self, part: int | None) -> Row:
        """Which parameters of a component, or of all, have no gradient or a broken one."""
        view = self.view
        own = [i for i, owner in enumerate(view.index) if part is None or owner == part]
        present = self._read["present"]
        missing = [view.names[i] for i in own if view.trainable[i] and not present[i]]
        nonfinite = self._read["parameters"][STATISTICS.index("nonfinite") :: len(STATISTICS)]
        broken = [view.names[i] for i in own if nonfinite[i]]
        row: Row = {
            "tensors": int(sum(present[i] for i in own)),
            "missing": len(missing),
            "frozen": sum(view.frozen[i] for i in (view.reported if part is None else [part])),
        }
        if missing:
            row["first_missing"] = missing[0]
        if broken:
            row["first_nonfinite"] = broken[0]
        return row


def _statistics(found: Moments) -> Tensor:
    """The columns of `STATISTICS`, shape ``(n, 9)``."""
    columns = (found.count, found.l2, found.rms, found.mean, found.std, found.min, found.max)
    return torch.stack([*columns, found.zeros / found.count, found.nonfinite], dim=1)
