"""What is each part of the model, and what does it cost?"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.profile_internals import Internals, reporting_modules
from lightning_diag.callbacks.profile_measurement import Cost, Measurement
from lightning_diag.callbacks.profile_table import print_table
from lightning_diag.components import Components, Patterns
from lightning_diag.functional.component_profiler import breakdown
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["ComponentProfiler"]


class ComponentProfiler(Diagnostic):
    """Size of every component at the start; time, memory and operations of it on measured steps.

    On a measured step hooks hang on the outermost modules of each component, for that one batch.
    Forward time runs from the call of such a module to its return, over all its calls; where one
    component calls another, the inner one's time is its own alone. Backward time runs from the
    first gradient of a call's outputs to the end of the last operator that passes gradients out of
    the call, to its inputs or to parameters; adding up the parameters' gradients and sending them
    to other ranks is not in it, a forward that checkpointing runs again is. On a CUDA device times
    are those between events in the stream, on others those of the host's clock; nothing waits.

    Floating point operations and memory do not change from step to step and are counted at each
    `count_every`-th measurement, by looking at every operator of the forward as it runs. That
    slows such a forward (the row says ``counting``), above all that of small operators.
    Operations are those of matrix products, convolutions and attention in the forward, by the
    formulas of `torch.utils.flop_counter` (a multiplication and an addition are two); recurrent
    kernels have none there and count as zero. A backward pass takes about twice as many.

    Of parts that are compiled, forward time and operations are those of an eager copy (see
    `Diagnostic.watch_forward`; the row says ``eager``), and backward time is unknown; the times of
    the whole model are those of the compiled one. With accumulation the first micro-batch of a
    step is measured. Under manual optimization the forward of the whole model is all of
    ``training_step`` but the backward passes. Of several devices rank 0 measures.

    What a module returns from a method ``diagnostics()``, a mapping of names to numbers or
    tensors, is recorded at the end of each measured batch. All ranks call it there, without
    gradients and with PyTorch's random numbers put back; where it fails, it is left out from then
    on. Its tensors must not need values on the host: they are read together, later.

    Args:
        components: The parts to speak of, see `Components`.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        count_every: Count operations and memory at each n-th measurement only, the first included.
        table: Print the components when training starts.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components` is of the wrong kind.
        ValueError: If another argument is out of range.

    Rows:
        ``records/component.jsonl``, for each component and the whole model, at the start and at
        measured steps: ``parameters`` (elements), ``trainable``, ``frozen``, ``buffers``
        (elements), ``bytes`` (of parameters and buffers), ``share`` (of all parameters; a tied one
        counts once).

        At measured steps also ``calls``, ``forward_seconds``, ``backward_seconds``, ``step_share``
        (of both in the time of the batch, not for an eager copy), ``eager`` (1: timed in an eager
        copy), ``counting`` (1: slowed by counting); where counted ``forward_flops``,
        ``saved_bytes`` (memory made in the forward that was there at its end: kept for the
        backward, and results), ``peak_bytes`` (most memory in use after an operator, beyond what
        was in use when the call began; CUDA only). For the whole model also ``step_seconds`` (from
        the start to the end of the batch).

        ``records/component_internal.jsonl``, for each number from ``diagnostics()``: ``module``,
        ``name``, ``value``; of a tensor of several elements ``value`` is the mean, with ``min``
        and ``max``.

    Logs:
        For each component under ``component/<component>/`` and for the model under
        ``component/``: ``parameters``, ``trainable``, ``share``, ``forward_seconds``,
        ``backward_seconds``, ``step_share``, ``forward_flops``, ``saved_bytes``, ``peak_bytes``;
        for the model ``step_seconds``.

    Example:
        >>> ComponentProfiler({"encoder": "net.encoder"}, every_n_steps=100).every_n_steps
        100
    """

    prefix = "component"
    logged = frozenset(
        {
            *("parameters", "trainable", "share", "forward_seconds", "backward_seconds"),
            *("step_share", "forward_flops", "saved_bytes", "peak_bytes", "step_seconds"),
        }
    )

    def __init__(
        self,
        components: Patterns | Components | None = None,
        every_n_steps: Interval = 500,
        count_every: int = 10,
        table: bool = True,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if count_every < 1:
            raise ValueError(f"`count_every` must be at least 1, got {count_every}.")
        self.count_every = count_every
        self.table = table
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )
        self._measurement: Measurement | None = None
        self._due = False
        self._step = 0
        self._broken: set[str] = set()
        self._said: set[str] = set()

    # ---- hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._due = False
        self._broken.clear()
        self._said.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        rows = self._sizes(trainer, pl_module)
        self.report(trainer, rows, step=self.step_of(trainer))
        if self.table and trainer.is_global_zero:
            self._print(rows)
        if pl_module.device.type not in ("cpu", "cuda"):
            kind = pl_module.device.type
            self.note(trainer, f"times are of the host: a `{kind}` device is not asked for its own")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._due = self.is_due_batch(trainer)
        # at the end of the batch the step will have been made, and counted
        self._step = self.step_of(trainer)
        if self._due and trainer.is_global_zero:
            self._measurement = Measurement(
                pl_module.device,
                self._members(trainer),
                self.guarded,
                counting=self._turn % self.count_every == 0,
                automatic=pl_module.automatic_optimization,
            )
            self._turn += 1
            self.watch_forward(pl_module, self._measurement.inside)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._measurement is not None:
            self._measurement.backward_begins()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._measurement is not None:
            self._measurement.backward_ends()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            self._due = False
            self._finish(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def release(self) -> None:
        super().release()
        if self._measurement is not None:
            self._measurement.close()
        self._measurement = None

    def forget(self) -> None:
        super().forget()
        self._turn = 0
        self._measurement = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "turn": self._turn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._turn = state_dict["turn"]

    # ---- sizes ----

    def _sizes(self, trainer: Trainer, pl_module: LightningModule) -> list[Row]:
        """A row for each component, and the last for the whole model."""
        parts = self.parts(trainer)
        whole = breakdown(pl_module.parameters(), pl_module.buffers())
        rows: list[Row] = []
        for name in parts.names:
            modules = parts.modules[name].values()
            own = breakdown(
                parts.parameters[name].values(),
                (buffer for module in modules for buffer in module.buffers()),
            )
            share = own.parameters / whole.parameters if whole.parameters else None
            rows.append({"component": name, **own._asdict(), "share": share})
        share = 1.0 if whole.parameters else None
        return [*rows, {"component": None, **whole._asdict(), "share": share}]

    def _print(self, rows: Sequence[Row]) -> None:
        try:
            print_table(rows)
        except OSError:
            # a closed terminal is no reason to measure nothing
            self.table = False

    # ---- costs ----

    def _members(self, trainer: Trainer) -> dict[str, int]:
        parts = self.parts(trainer)
        return {
            module: number
            for number, component in enumerate(parts.names)
            for module in parts.modules[component]
        }

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            measurement.ends()
        internals = self._ask(trainer, pl_module)
        if measurement is None:
            return
        self.collect(wait=True)
        sizes = self._sizes(trainer, pl_module)
        self.read(
            internals.values(),
            partial(self._write, trainer, self._step, sizes, measurement, internals),
            self.device_began(pl_module.device),
        )

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> Internals:
        internals = Internals(pl_module.device)
        for name, module in reporting_modules(pl_module).items():
            if name in self._broken:
                continue
            try:
                internals.ask(name, module)
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._broken.add(name)
                why = f"{type(error).__name__}: {error}"
                self.note(trainer, f"`diagnostics()` of `{name}` is left out: {why}", "warning")
        if internals.odd:
            odd = ", ".join(internals.odd[:5])
            self._say_once(trainer, odd, f"neither a number nor a tensor of real numbers: {odd}.")
        return internals

    def _write(
        self,
        trainer: Trainer,
        step: int,
        sizes: list[Row],
        measurement: Measurement,
        internals: Internals,
        values: Tensor,
    ) -> None:
        parts, whole = measurement.costs(len(sizes) - 1)
        seconds = measurement.step_seconds()
        rows = [
            size | _cost_row(cost, seconds, counting=measurement.counting)
            for size, cost in zip(sizes, [*parts, whole], strict=True)
        ]
        del rows[-1]["calls"], rows[-1]["eager"]
        rows[-1]["step_seconds"] = seconds
        self.report(trainer, rows, step=step)
        said = internals.rows(values.tolist(), partial(self._owner, trainer))
        if said:
            self.report(trainer, said, step=step, prefix="component_internal")
        self._say_what_is_missing(trainer, sizes, parts, measurement)

    def _owner(self, trainer: Trainer, module: str) -> str | None:
        """The component in which a module lies, None for the model as a whole."""
        parts = self.parts(trainer)
        for component in parts.names:
            for outer in parts.modules[component]:
                if module == outer or module.startswith(f"{outer}."):
                    return component
        return None

    def _say_what_is_missing(
        self, trainer: Trainer, sizes: list[Row], parts: list[Cost], measurement: Measurement
    ) -> None:
        silent = [
            f"`{size['component']}`"
            for size, cost in zip(sizes, parts, strict=False)
            if not cost.calls and size["parameters"]
        ]
        if silent:
            self._say_once(
                trainer,
                "silent",
                f"no module of {', '.join(silent)} was called in the forward of a measured step: "
                "its time cannot be seen (parameters used without a call of their module, "
                "or not used).",
            )
        if measurement.compiled:
            self._say_once(
                trainer,
                "compiled",
                "parts of the model are compiled: their forward time and operations are those of "
                "an eager copy, and their backward time is unknown.",
            )
        if measurement.uncounted:
            names = ", ".join(f"`{name}`" for name in sorted(measurement.uncounted))
            self._say_once(trainer, names, f"the operations of {names} could not be counted.")

    def _say_once(self, trainer: Trainer, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.note(trainer, message)


def _cost_row(cost: Cost, step_seconds: float, *, counting: bool) -> Row:
    row: Row = {key: value for key, value in asdict(cost).items() if value is not None}
    times = [cost.forward_seconds, cost.backward_seconds]
    known = [time for time in times if time is not None]
    # an eager copy's time comes on top of the step
    if known and step_seconds > 0 and not cost.eager:
        row["step_share"] = sum(known) / step_seconds
    return row | {"eager": int(cost.eager), "counting": int(counting)}
