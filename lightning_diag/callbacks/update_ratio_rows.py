"""What UpdateRatio keeps of one step, and the rows that it makes of the numbers."""

from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.optimizers import optimizer_index, own_parameters
from lightning_diag.callbacks.segments import number, read_segments
from lightning_diag.components import OTHER, Assignment
from lightning_diag.functional.moments import Moments, local_shard
from lightning_diag.functional.update_ratio import (
    gradient_sizes,
    update_ratio,
    update_summary,
    update_table,
)
from lightning_diag.lightning import Trainer

__all__ = [
    "COLUMNS",
    "SizedGradients",
    "UpdateNumbers",
    "UpdateView",
]

COLUMNS = 15
_STATISTICS = (
    *("count", "update_l2", "update_rms", "update_mean", "update_std", "update_max"),
    *("unchanged_share", "nonfinite", "weight_l2", "weight_rms", "ratio"),
)
_COUNTS = frozenset({"count", "nonfinite"})
_NAMED = 3

SizedGradients = list[Tensor | None]


@dataclass(eq=False)
class UpdateView:
    """One optimizer's weights before a step, and what is around them.

    Attributes:
        parameters: The optimizer's parameters.
        before: Copies of this rank's part of those that have a gradient.
        sizes: Largest magnitude of each gradient.
        rates: Learning rate of each parameter group, on the device.
        groups: Parameter group of each parameter.
        table: Once the step is made, `update_table` and `gradient_sizes`, shape ``(n, 15)``.
        doubtful: Rows of the table to be measured again.
    """

    trainer: Trainer
    step: int
    optimizer: int | None
    names: list[str]
    parts: list[str]
    index: list[int]
    reported: list[int]
    parameters: list[Parameter]
    before: list[Tensor | None]
    sizes: Tensor
    rates: Tensor
    groups: list[int]
    first_rate: float | None
    table: Tensor | None = None
    doubtful: Tensor | None = None
    clone_times: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        optimizer: Optimizer,
        assignment: Assignment,
        gradients: SizedGradients,
        *,
        step: int,
        sharded: bool,
    ) -> "UpdateView":
        """Copy the weights that `optimizer` is about to change; nothing is read from a device.

        Args:
            trainer: The trainer that is running.
            optimizer: The optimizer whose step comes.
            assignment: The parts of the model.
            gradients: Gradient of each of `own_parameters`, without pending sums.
            step: The step that is measured.
            sharded: Whether every rank holds a part only.
        """
        parameters = own_parameters(optimizer)
        owners = assignment.owners()
        places = [owners.get(id(parameter), (OTHER, "?")) for parameter in parameters]
        parts = list(dict.fromkeys([*assignment.names, *(component for component, _ in places)]))
        index = [parts.index(component) for component, _ in places]
        several = len(trainer.optimizers) > 1
        rates = [group.get("lr", torch.nan) for group in optimizer.param_groups]
        member = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        own = [None if g is None else _own_part(g, trainer, sharded) for g in gradients]
        return cls(
            trainer=trainer,
            step=step,
            optimizer=optimizer_index(trainer, optimizer) if several else None,
            names=[name for _, name in places],
            parts=parts,
            index=index,
            reported=sorted(set(index)) if several else list(range(len(parts))),
            parameters=parameters,
            before=[
                None if gradient is None else _own_part(p.detach(), trainer, sharded).clone()
                for p, gradient in zip(parameters, gradients, strict=True)
            ],
            sizes=gradient_sizes(own),
            rates=_rates(rates, trainer.lightning_module.device),
            groups=[member[id(parameter)] for parameter in parameters],
            first_rate=max((rate for rate in rates if isinstance(rate, float | int)), default=None),
        )

    def measure(self, *, quick: bool, sharded: bool) -> None:
        """After the step: the table of what it has changed."""
        after = [
            None if before is None else _own_part(p.detach(), self.trainer, sharded)
            for p, before in zip(self.parameters, self.before, strict=True)
        ]
        table, self.doubtful = update_table(self.before, after, quick=quick)
        self.table = torch.cat([table, self.sizes.to(table).view(-1, 1)], dim=1)

    def measure_again(self, rows: list[int]) -> Tensor:
        """The exact table of some rows, on the host."""
        after = [self.parameters[row].detach() for row in rows]
        table, _ = update_table([self.before[row] for row in rows], after)
        return torch.cat([table, self.sizes[rows].to(table).view(-1, 1)], dim=1)

    def release(self) -> None:
        """Give back the copies."""
        self.before = []
        self.parameters = []


def _own_part(tensor: Tensor, trainer: Trainer, sharded: bool) -> Tensor:
    """What this rank alone counts: its shard, and what is whole on rank 0 only."""
    if isinstance(tensor, DTensor):
        return local_shard(tensor)
    flat = any(kind.__name__ == "FSDPStrategy" for kind in type(trainer.strategy).__mro__)
    whole = not sharded or flat or trainer.global_rank == 0
    return tensor if whole else tensor.new_empty(0)


def _rates(rates: list[float | Tensor], device: torch.device) -> Tensor:
    # filled, not copied: a copy from the host would have to be waited for
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack(
        [
            _moved(rate.detach().to(wide).reshape(()), device)
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=wide, device=device)
            for rate in rates
        ]
    )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x if x.device == device else x.to(device)


class UpdateNumbers:
    """The numbers of one measurement on the host, read at once, and the rows made of them.

    Args:
        view: What was measured.
        table: Numbers by parameter, shape ``(n, 15)``.
        rates: Learning rate of each parameter group.
        marks: Anything else to be read along.
    """

    def __init__(self, view: UpdateView, table: Tensor, rates: Tensor, marks: Tensor) -> None:
        self.view = view
        index = torch.tensor(view.index, dtype=torch.long)
        found = update_summary(table, index, len(view.parts))
        segments = {
            "parameters": _statistics(found.updates, found.weights),
            "parts": _statistics(found.part_updates, found.part_weights),
            "whole": _statistics(found.whole_update, found.whole_weight),
            "moved": (found.updates.abs_max > 0) | (found.updates.nonfinite > 0),
            "gradients": found.gradients,
            "rates": rates,
            "marks": marks,
        }
        self._read = read_segments(segments, table)

    @property
    def marks(self) -> list[float]:
        """The marks that were read along."""
        return self._read["marks"]

    @property
    def skipped(self) -> bool:
        """Whether the step was called for and left out, as a fused optimizer does by itself."""
        broken = any(not isfinite(size) for size in self._read["gradients"])
        return broken and not any(self._read["moved"])

    def moved(self) -> dict[str, bool]:
        """Whether each parameter changed, of those that a gradient and a rate told to change."""
        return {
            name: bool(moved)
            for name, moved, size, group in zip(
                self.view.names,
                self._read["moved"],
                self._read["gradients"],
                self.view.groups,
                strict=True,
            )
            if size != 0 and self._read["rates"][group] != 0
        }

    def row(self, part: int | None) -> Row:
        """The row of one component; None for the whole model."""
        own = self._own(part)
        row = self._begin(None if part is None else self.view.parts[part])
        row["tensors"] = sum(self._read["parameters"][i * len(_STATISTICS)] > 0 for i in own)
        row |= self._statistics("whole" if part is None else "parts", part or 0)
        rates = [self._read["rates"][self.view.groups[i]] for i in own]
        row["lr"] = max((rate for rate in rates if not isnan(rate)), default=None)
        still = [name for name, moved in self.moved().items() if not moved]
        return row | named("unchanged", self.names(part), still)

    def parameter_row(self, place: int) -> Row:
        """The row of one parameter."""
        row = self._begin(self.view.parts[self.view.index[place]])
        row["parameter"] = self.view.names[place]
        row |= self._statistics("parameters", place)
        row["lr"] = number(self._read["rates"][self.view.groups[place]])
        return row

    def names(self, part: int | None) -> set[str]:
        """The parameters of a component, or all."""
        return {self.view.names[i] for i in self._own(part)}

    def _own(self, part: int | None) -> list[int]:
        return [i for i, owner in enumerate(self.view.index) if part is None or owner == part]

    def _begin(self, component: str | None) -> Row:
        row: Row = {"component": component}
        return row if self.view.optimizer is None else row | {"optimizer": self.view.optimizer}

    def _statistics(self, segment: str, place: int) -> dict[str, Any]:
        width = len(_STATISTICS)
        values = self._read[segment][place * width : (place + 1) * width]
        if not values[0]:
            return dict.fromkeys(_STATISTICS) | dict.fromkeys(_COUNTS, 0)
        return {
            key: int(value) if key in _COUNTS else number(value)
            for key, value in zip(_STATISTICS, values, strict=True)
        }


def named(key: str, own: set[str], found: list[str]) -> Row:
    """How many of `found` belong to a component, and the first of them by name."""
    here = [name for name in found if name in own]
    row: Row = {key: len(here)}
    if here:
        more = f" and {len(here) - _NAMED} more" if len(here) > _NAMED else ""
        row[f"first_{key}"] = ", ".join(here[:_NAMED]) + more
    return row


def _statistics(update: Moments, weight: Moments) -> Tensor:
    """The columns of `_STATISTICS`, shape ``(n, 11)``."""
    size = torch.where(update.abs_max >= 0, update.abs_max, torch.nan)
    columns = (update.count, update.l2, update.rms, update.mean, update.std, size)
    shares = (update.zeros / update.count, update.nonfinite)
    return torch.stack(
        [*columns, *shares, weight.l2, weight.rms, update_ratio(update, weight)], dim=1
    )
