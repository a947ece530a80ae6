"""Do gradients arrive, everywhere, at a sane size?"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.gradient_rows import (
    STATISTICS,
    UNKNOWN,
    GradientNumbers,
    GradientView,
)
from lightning_diag.callbacks.optimizers import (
    completed_gradients,
    gradient_scaler,
    own_parameters,
    unscales_itself,
)
from lightning_diag.components import Components, Patterns
from lightning_diag.functional.gradient_health import (
    gradient_table,
    magnitude_histogram,
    merge_tables,
    zero_counts,
)
from lightning_diag.functional.moments import Moments
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["GradientHealth"]

_COLUMNS = 9
_LOW, _HIGH = -12, 3
_BINS = _HIGH - _LOW + 1
_MARKS = 3
_COUNTERS = ("calls", "executed", "skipped_seen", "clip_seen", "clip_hits", "turns")


class GradientHealth(Diagnostic):
    """Moments of the gradients of every component, read before clipping, once a measured step.

    Gradients are seen in `on_before_optimizer_step`: accumulated, unscaled (also where a fused
    optimizer leaves that to itself), before the Trainer clips them, those of this optimizer only,
    a tied parameter once, a sparse gradient as if it were dense, the shards of all ranks summed
    with one collective. What a module does to its gradients by hand before the step is seen too.

    A measured step costs about three passes over the gradients and one copy to the host. With a
    gradient scaler a counter hangs on the optimizer, which tells a skipped step from a made one;
    a fused optimizer skips inside its own step, so of those only the measured ones are counted.

    Args:
        components: The parts to speak of, see `Components`.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        zeros_every: Count zeros at each n-th measurement only, since on a CPU that costs more than
            all the rest; on other devices they are counted every time.
        per_parameter: Also write a row for every parameter, into ``records/grad_parameter.jsonl``.
        histogram: Also count elements by power of ten and component, into
            ``records/grad_histogram.jsonl``.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components` is of the wrong kind.
        ValueError: If another argument is out of range.

    Logs:
        For each component under ``grad/<component>/`` and for the model under ``grad/``: ``l2``,
        ``rms``, ``mean``, ``std``, ``min``, ``max``, ``zeros`` (share), ``nonfinite``, ``missing``.
        For the model also ``global_norm``, and ``max_norm``, ``min_norm``, ``mean_norm`` over
        parameters; ``has_nan``, ``has_inf``; ``clip_coefficient``, ``clipped``, ``clipped_share``;
        ``scale``, ``skipped``, ``skipped_total``. With several optimizers the model's keys begin
        with ``grad/optimizer_<index>/``.

    Example:
        >>> GradientHealth({"encoder": "net.encoder"}, every_n_steps=100).every_n_steps
        100
    """

    prefix = "grad"
    collective_hooks = frozenset({"on_before_optimizer_step"})
    logged = frozenset(STATISTICS[1:]) | {
        *("missing", "global_norm", "max_norm", "min_norm", "mean_norm", "has_nan", "has_inf"),
        *("clip_coefficient", "clipped", "clipped_share", "scale", "skipped", "skipped_total"),
    }

    def __init__(
        self,
        components: Patterns | Components | None = None,
        every_n_steps: Interval = 50,
        zeros_every: int = 10,
        per_parameter: bool = False,
        histogram: bool = False,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )
        if zeros_every < 1:
            raise ValueError(f"`zeros_every` must be at least 1, got {zeros_every}.")
        self.zeros_every = zeros_every
        self.per_parameter = per_parameter
        self.histogram = histogram
        self._counted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if any(kind.__name__ == "DeepSpeedStrategy" for kind in type(trainer.strategy).__mro__):
            self.note(trainer, "DeepSpeed keeps gradients to itself; none can be seen.", "warning")
        if gradient_scaler(trainer) is not None:
            self._count_executed_steps(trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # with no gradient at all (`training_step` returned None) Lightning makes no step
        if self._counted:
            groups = optimizer.param_groups
            self._called = any(p.grad is not None for group in groups for p in group["params"])
            self._calls += self._called
        if self.is_due(trainer, optimizer):
            self.collect(wait=True)
            self._measure(trainer, pl_module.device, optimizer)

    def forget(self) -> None:
        super().forget()
        self._calls = 0
        self._called = False
        self._executed = 0
        self._skipped_seen = 0
        self._clip_seen = 0
        self._clip_hits = 0
        self._turns: dict[int | None, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            **{name: copy(getattr(self, f"_{name}")) for name in _COUNTERS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name in _COUNTERS:
            setattr(self, f"_{name}", copy(state_dict[name]))

    # ---- measuring ----

    def _measure(self, trainer: Trainer, device: torch.device, optimizer: Optimizer) -> None:
        began = self.device_began(device)
        if self._sharded:
            # collectives come first, on a rank that has failed too; what may fail is in `compute`
            whole = completed_gradients(optimizer)
            size = self._payload_size(trainer, optimizer)

            def compute() -> Tensor:
                return self._payload(self._view(trainer, optimizer).without_copies(whole))

            gathered = self.gather(compute, size, device)
            self._read(self._view(trainer, optimizer), gathered, began)
            return
        view = self._view(trainer, optimizer)
        if device.type == "cpu":
            self._measure_on_host(view)
        else:
            self._read(view, self._payload(view).view(1, -1), began)

    def _read(self, view: GradientView, values: Tensor, began: torch.cuda.Event | None) -> None:
        # the gradients themselves must not outlive their step
        kept = replace(view, gradients=[])
        self.read(values, lambda values: self._finish(kept, values), began)

    def _measure_on_host(self, view: GradientView) -> None:
        """Quick moments, and exact ones for the gradients that turn out to need them."""
        table, doubtful = gradient_table(view.gradients, quick=True)
        turn = self._turns.get(view.optimizer, 0)
        self._turns[view.optimizer] = turn + 1
        if turn % self.zeros_every == 0:
            present = {row: grad for row, grad in enumerate(view.gradients) if grad is not None}
            rows = torch.tensor(list(present), dtype=torch.long)
            table[rows, Moments._fields.index("zeros")] = zero_counts(list(present.values()))
        extras = self._extras(view)

        def finish(table: Tensor) -> None:
            numbers = GradientNumbers(view, table, extras, doubtful)
            unsure = [row for row, mark in enumerate(numbers.marks) if mark]
            if unsure:
                again, _ = gradient_table([view.gradients[row] for row in unsure])
                mended = table.index_copy(0, torch.tensor(unsure), again)
                numbers = GradientNumbers(view, mended, extras, doubtful)
            self._write(view, numbers)

        self.read(table, finish, None)

    def _view(self, trainer: Trainer, optimizer: Optimizer) -> GradientView:
        missed = self._calls - self._called - self._executed
        skipped = missed if self._counted else self._skipped_seen
        step = self.step_of(trainer)
        view = GradientView.of(trainer, optimizer, self.parts(trainer), step=step, skipped=skipped)
        if UNKNOWN in view.names:
            # parameters came to the model after training began
            parts = self.parts(trainer, anew=True)
            view = GradientView.of(trainer, optimizer, parts, step=step, skipped=skipped)
        return view

    def _payload_size(self, trainer: Trainer, optimizer: Optimizer) -> int:
        bins = len(self.parts(trainer).names) * _BINS if self.histogram else 0
        return len(own_parameters(optimizer)) * _COLUMNS + 1 + bins

    def _payload(self, view: GradientView) -> Tensor:
        table, _ = gradient_table(view.gradients)
        extras = self._extras(view)
        # without a single gradient the table has no device of its own
        return torch.cat([table.reshape(-1).to(extras), extras])

    def _extras(self, view: GradientView) -> Tensor:
        """The scale of the gradients, and their histograms by component if asked for."""
        scale = view.scale.reshape(1)
        scale = scale if scale.device.type == "mps" else scale.double()
        if not self.histogram:
            return scale
        rows = []
        for part in range(len(view.parts)):
            gradients = [
                gradient / view.scale if view.scaled else gradient
                for gradient, own in zip(view.gradients, view.index, strict=True)
                if gradient is not None and own == part
            ]
            counts = magnitude_histogram(gradients, _LOW, _HIGH) if gradients else None
            rows.append(scale.new_zeros(_BINS) if counts is None else counts)
        return torch.cat([scale, *rows])

    def _finish(self, view: GradientView, values: Tensor) -> None:
        """From the numbers of all ranks, on the host, to rows."""
        ranks, cells = len(values), len(view.names) * _COLUMNS
        marks = values[:, -_MARKS:] if self._sharded else values[:, :0]
        values = values[:, :-_MARKS] if self._sharded else values
        table = merge_tables(values[:, :cells].reshape(ranks, -1, _COLUMNS))
        extras = torch.cat([values[0, cells : cells + 1], values[:, cells + 1 :].sum(0)])
        numbers = GradientNumbers(view, table, extras, marks)
        if self._sharded:
            self.all_well(numbers.marks)
        self._write(view, numbers)

    def _count_executed_steps(self, optimizers: Sequence[Optimizer]) -> None:
        """A skipped step is one that was called for and did not come: counted on the host."""

        def executed(*_: object) -> None:
            self._executed += 1

        # a difference of counts needs every optimizer to be counted
        self._counted = not any(unscales_itself(optimizer) for optimizer in optimizers)
        if self._counted:
            self.hold(*(optimizer.register_step_post_hook(executed) for optimizer in optimizers))

    # ---- writing ----

    def _write(self, view: GradientView, numbers: GradientNumbers) -> None:
        trainer = view.trainer
        rows = [numbers.part_row(part) for part in view.reported]
        self.report(trainer, [*rows, self._whole_row(view, numbers)], step=view.step)
        if self.per_parameter:
            rows = [numbers.parameter_row(place) for place in range(len(view.names))]
            self.report(trainer, rows, step=view.step, prefix="grad_parameter")
        if self.histogram:
            rows = [numbers.histogram_row(part, _LOW) for part in view.reported]
            self.report(trainer, rows, step=view.step, prefix="grad_histogram")

    def _whole_row(self, view: GradientView, numbers: GradientNumbers) -> Row:
        row = numbers.whole_row()
        if view.has_scaler:
            skipped = int(numbers.nonfinite > 0)
            self._skipped_seen += skipped
            row |= {"scale": numbers.scale, "skipped": skipped}
            row["skipped_total"] = view.skipped_before + skipped
        if view.limit:
            coefficient = numbers.clip_coefficient
            clipped = coefficient is not None and coefficient < 1
            self._clip_seen += coefficient is not None
            self._clip_hits += clipped
            row |= {
                "clip_algorithm": view.algorithm,
                "clip_value": view.limit,
                "clip_coefficient": coefficient,
                "clipped": int(clipped),
                "clipped_share": self._clip_hits / self._clip_seen if self._clip_seen else None,
            }
        return row
