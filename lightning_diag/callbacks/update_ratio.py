"""How far does each step move each part?"""

from collections import deque
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.optimizers import completed_gradients, own_parameters
from lightning_diag.callbacks.update_ratio_rows import COLUMNS, UpdateNumbers, UpdateView, named
from lightning_diag.components import Components, Patterns
from lightning_diag.functional.update_ratio import merge_updates
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["UpdateRatio"]

_MARKS = 3
_HISTORY, _ENOUGH = 20, 5


class UpdateRatio(Diagnostic):
    """Size of each component's update in proportion to its weights, from before and after a step.

    The weights are copied before a measured step, and compared right after it: what is seen is what
    the optimizer did, with momentum, clipping, weight decay and rounding in it. Only parameters
    that have a gradient at that step are looked at. A parameter that had a gradient and a learning
    rate and still did not change is `unchanged`: typically its updates are too small for half
    precision weights. One that did not change at any measured step so far is `never_changed`.

    A step that the gradient scaler skipped has a row that says so, and no ratio. Under accumulation
    one step is one step; with several optimizers, each one's own parameters are looked at; with
    sharded parameters the shards of all ranks are summed with one collective at the end of the
    batch, otherwise rank 0 speaks for all.

    A measured step costs a copy of the weights, held until the step is made, about five passes over
    them and one copy to the host.

    Args:
        components: The parts to speak of, see `Components`.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        jump: An update is said to have jumped where its norm is more than this many times the
            median of the last 20 measured (once there are 5).
        per_parameter: Also write a row for every parameter, into
            ``records/update_parameter.jsonl``.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components` is of the wrong kind.
        ValueError: If another argument is out of range.

    Rows:
        ``update.jsonl``, one a component and one of the whole model (component null), of the
        parameters that had a gradient; with several optimizers also ``optimizer``, its index:

        - ``tensors``, ``count``: parameters and their elements.
        - ``update_l2``, ``update_rms``, ``update_mean``, ``update_std``, ``update_max``: of the
          elements of the update; the last is the largest magnitude.
        - ``weight_l2``, ``weight_rms``: of the weights before the step.
        - ``ratio``: ``update_l2 / weight_l2``; null where the weights are all zero.
        - ``unchanged_share``: share of elements that stayed exactly the same, 0 to 1.
        - ``nonfinite``: elements of the update that are ``nan`` or infinite.
        - ``lr``: learning rate, the largest where groups differ.
        - ``unchanged``, ``first_unchanged``: parameters with gradient and learning rate that did
          not change in this step, and the first names.
        - ``never_changed``, ``first_never_changed``: those that did so at no measured step yet.
        - ``jump``: ``update_l2`` over its own running median; ``jumped``: 1 where that is more
          than the argument, else 0. Both only where there is a history.
        - ``skipped``: 1 where the step was not made (then nothing else is measured), else 0; for
          the whole model alone.

        ``update_parameter.jsonl``: the same statistics and ``parameter``, its name.

    Logs:
        For each component under ``update/<component>/`` and for the model under ``update/``:
        ``ratio``, ``update_l2``, ``update_rms``, ``update_max``, ``weight_l2``,
        ``unchanged_share``, ``unchanged``, ``never_changed``, ``jumped``, and for the model
        ``skipped``. With several optimizers the model's keys begin with
        ``update/optimizer_<index>/``.

    Example:
        >>> UpdateRatio({"encoder": "net.encoder"}, every_n_steps=100).jump
        10.0
    """

    prefix = "update"
    collective_hooks = frozenset({"on_before_optimizer_step", "on_train_batch_end"})
    logged = frozenset(
        {
            *("ratio", "update_l2", "update_rms", "update_max", "weight_l2", "unchanged_share"),
            *("unchanged", "never_changed", "jumped", "skipped"),
        }
    )

    def __init__(
        self,
        components: Patterns | Components | None = None,
        every_n_steps: Interval = 50,
        jump: float = 10.0,
        per_parameter: bool = False,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if not jump > 1:
            raise ValueError(f"`jump` must be greater than 1, got {jump}.")
        self.jump = jump
        self.per_parameter = per_parameter
        self._open: list[UpdateView] = []
        self._hooks: list[RemovableHandle] = []
        self._size = 0
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.is_due(trainer, optimizer):
            self.collect(wait=True)
            self._before_step(trainer, pl_module.device, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._hooks or self._size:
            self._after_batch(trainer, pl_module.device)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def release(self) -> None:
        super().release()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._open.clear()

    def forget(self) -> None:
        super().forget()
        self._size = 0
        self._never: dict[str, int] = {}
        self._ever: set[str] = set()
        self._norms: dict[tuple[int | None, str | None], deque[float]] = {}
        self._told_nothing = False
        self._warned: set[str | None] = set()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "never": dict(self._never),
            "ever": sorted(self._ever),
            "norms": [[*key, list(norms)] for key, norms in self._norms.items()],
            "warned": list(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._never = dict(state_dict["never"])
        self._ever = set(state_dict["ever"])
        self._norms = {
            (optimizer, component): deque(norms, maxlen=_HISTORY)
            for optimizer, component, norms in state_dict["norms"]
        }
        self._warned = set(state_dict["warned"])

    # ---- measuring ----

    def _before_step(self, trainer: Trainer, device: torch.device, optimizer: Optimizer) -> None:
        if not own_parameters(optimizer):
            # on every rank alike
            self._say_nothing(trainer)
            return
        if self._sharded:
            # a rank that has failed takes part too, here and at the end of the batch
            gradients = completed_gradients(optimizer)
            self._size += len(gradients) * COLUMNS + len(optimizer.param_groups)
            if self._ended:
                return
        else:
            gradients = [parameter.grad for parameter in own_parameters(optimizer)]
        began = self.device_began(device)
        known = self.parts(trainer).owners()
        new = any(id(parameter) not in known for parameter in own_parameters(optimizer))
        view = UpdateView.of(
            trainer,
            optimizer,
            self.parts(trainer, anew=new),
            gradients,
            step=self.step_of(trainer),
            sharded=self._sharded,
        )
        view.clone_times = [began, self.device_began(device)]
        self._open.append(view)

        def stepped(*_: object) -> None:
            # the hook stays until the batch is over: a step must not change what it iterates over
            if view in self._open and view.table is None:
                self._after_step(view, device)

        self._hooks.append(optimizer.register_step_post_hook(self.guarded(stepped)))

    def _say_nothing(self, trainer: Trainer) -> None:
        if not self._told_nothing:
            self._told_nothing = True
            self.note(trainer, "an optimizer has no parameters: there is nothing to measure.")

    def _after_step(self, view: UpdateView, device: torch.device) -> None:
        on_host = device.type == "cpu" and not self._sharded
        began = self.device_began(device)
        view.measure(quick=on_host, sharded=self._sharded)
        if self._sharded:
            view.release()
            return
        self._open.remove(view)
        if on_host:
            self._read_on_host(view)
            return
        payload = self._payload(view)
        view.release()
        self.read(payload.view(1, -1), lambda values: self._finish([view], values), began)

    def _read_on_host(self, view: UpdateView) -> None:
        """Quick moments, and exact ones for the parameters that turn out to need them."""
        table, doubtful = view.table, view.doubtful
        if table is None or doubtful is None:
            return

        def finish(table: Tensor) -> None:
            numbers = UpdateNumbers(view, table, view.rates, doubtful)
            unsure = [row for row, mark in enumerate(numbers.marks) if mark]
            if unsure:
                mended = table.index_copy(0, torch.tensor(unsure), view.measure_again(unsure))
                numbers = UpdateNumbers(view, mended, view.rates, doubtful)
            view.release()
            self._write(view, numbers)

        self.read(table, finish, None)

    def _after_batch(self, trainer: Trainer, device: torch.device) -> None:
        """What no step was made for is skipped; shards are summed."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        views, size = list(self._open), self._size
        self._open.clear()
        self._size = 0
        if not self._sharded:
            for view in views:
                self.measured()
                self._write_skipped(view)
            return
        began = self.device_began(device)

        def compute() -> Tensor:
            return torch.cat([self._payload(view).to(device) for view in views])

        gathered = self.gather(compute, size, device)
        self.read(gathered, lambda values: self._finish(views, values), began)

    def _payload(self, view: UpdateView) -> Tensor:
        table = view.table
        if table is None:
            # no step: as many numbers, which say so
            table = view.rates.new_full((len(view.names), COLUMNS), torch.nan)
        return torch.cat([table.reshape(-1), view.rates.to(table)])

    def _finish(self, views: list[UpdateView], values: Tensor) -> None:
        """From the numbers of all ranks, on the host, to rows."""
        marks = values[:, -_MARKS:] if self._sharded else values[:, :0]
        found = []
        for view in views:
            cells = len(view.names) * COLUMNS
            table = merge_updates(values[:, :cells].reshape(len(values), -1, COLUMNS))
            rates = values[0, cells : cells + len(view.rates)]
            found.append(UpdateNumbers(view, table, rates, marks))
            values = values[:, cells + len(view.rates) :]
        if self._sharded and found:
            self.all_well(found[0].marks)
        for view, numbers in zip(views, found, strict=True):
            self._add_device_time(view)
            if view.table is None:
                self._write_skipped(view)
            else:
                self._write(view, numbers)

    def _add_device_time(self, view: UpdateView) -> None:
        began, ended = view.clone_times or (None, None)
        if began is not None and ended is not None:
            self._device_seconds += began.elapsed_time(ended) / 1000

    # ---- writing ----

    def _write(self, view: UpdateView, numbers: UpdateNumbers) -> None:
        if numbers.skipped:
            self._write_skipped(view)
            return
        for name, moved in numbers.moved().items():
            if moved:
                self._ever.add(name)
                self._never.pop(name, None)
            elif name not in self._ever:
                self._never[name] = self._never.get(name, 0) + 1
        rows = [self._row(view, numbers, part) for part in [*view.reported, None]]
        rows[-1]["skipped"] = 0
        self.report(view.trainer, rows, step=view.step)
        if self.per_parameter:
            rows = [numbers.parameter_row(place) for place in range(len(view.names))]
            self.report(view.trainer, rows, step=view.step, prefix="update_parameter")

    def _row(self, view: UpdateView, numbers: UpdateNumbers, part: int | None) -> Row:
        row = numbers.row(part)
        row |= named("never_changed", numbers.names(part), list(self._never))
        return row | self._compared(view, row)

    def _compared(self, view: UpdateView, row: Row) -> Row:
        """How the update compares with those before it."""
        component, size = row["component"], row["update_l2"]
        key = (view.optimizer, None if component is None else str(component))
        norms = self._norms.setdefault(key, deque(maxlen=_HISTORY))
        usual = median(norms) if len(norms) >= _ENOUGH else 0.0
        if not isinstance(size, float) or row["nonfinite"]:
            return {}
        norms.append(size)
        if not usual:
            return {}
        factor = size / usual
        if factor > self.jump and key[1] not in self._warned:
            self._warned.add(key[1])
            whose = "of the whole model" if key[1] is None else f"of `{key[1]}`"
            self.note(
                view.trainer,
                f"the update {whose} is {factor:.3g} times its running median, at step {view.step} "
                f"with learning rate {row['lr']}.",
            )
        return {"jump": factor, "jumped": int(factor > self.jump)}

    def _write_skipped(self, view: UpdateView) -> None:
        row: Row = {"component": None, "skipped": 1, "lr": view.first_rate}
        if view.optimizer is not None:
            row["optimizer"] = view.optimizer
        view.release()
        self.report(view.trainer, [row], step=view.step)
