"""What all diagnostics share: when they measure, how they read, report, fail and are timed."""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from time import perf_counter
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_diag.callbacks.clock import Clock, Read
from lightning_diag.callbacks.forward import Inside, Passing, Watch, watch_training_step
from lightning_diag.callbacks.optimizers import optimizer_index
from lightning_diag.callbacks.pace import Interval, Pace, check_interval
from lightning_diag.callbacks.run import add_run_logger, planned_steps, run_logger
from lightning_diag.components import Assignment, Components, Patterns
from lightning_diag.lightning import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_diag.records import RunLogger

__all__ = ["Diagnostic", "Interval", "OnError", "Row"]

OnError = Literal["warn", "raise"]
Row = dict[str, object]
_P = ParamSpec("_P")
_T = TypeVar("_T")

_BATCH = -2  # stands for batches where others are numbers of optimizers
_CHECKPOINT_KEY = "lightning_diag"
_SHARDING = frozenset({"FSDPStrategy", "ModelParallelStrategy"})


def _isolated(
    hook: Callable[Concatenate["Diagnostic", _P], _T],
) -> Callable[Concatenate["Diagnostic", _P], _T]:
    """A hook that times itself, and whose exception ends the diagnostic instead of the run."""

    def run(self: "Diagnostic", /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        if self._inside:
            return hook(self, *args, **kwargs)
        owes = self._owes_collective and hook.__name__ in self.collective_hooks
        nothing: dict[str, Any] | None = {} if hook.__name__ == "state_dict" else None
        if self._ended and not owes and hook.__name__ != "setup":
            return nothing
        self._inside, self._entered = True, perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self._end(hook.__name__, error)
            return nothing
        finally:
            self._inside = False
            self._seconds += perf_counter() - self._entered

    functools.update_wrapper(run, hook)
    return run


class Diagnostic(Callback):
    """A callback that answers one question about training and changes nothing in it.

    A subclass overrides Lightning hooks as any callback does, calling ``super()``. Every hook it
    defines is isolated: an exception becomes one warning and ends this diagnostic, never the run.

    Args:
        components: The parts of the model to speak of: a mapping of names to globs, a `Components`,
            or None for the top-level children.
        every_n_steps: Measure at each n-th optimizer step (steps n-1, 2n-1, ... counted from 0), or
            ``"auto"`` for the shortest interval that keeps to `overhead_budget`. None only where a
            subclass has another pace (`paced_by_steps` is False).
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Attributes:
        prefix: File of its rows, and beginning of its keys in loggers.
        logged: Keys of its rows that are scalars for the loggers.
        collective_hooks: Hooks that call `gather`: a rank whose diagnostic has ended still runs
            them until it has told the others.
        gathers_replicas: Whether it calls `gather` where ranks hold the same parameters too, and
            not only where they hold shards.
        paced_by_steps: Whether `every_n_steps` may not be None.

    Raises:
        TypeError: If `components` is of the wrong kind.
        ValueError: If another argument is out of range.
    """

    prefix: ClassVar[str]
    logged: ClassVar[frozenset[str]] = frozenset()
    collective_hooks: ClassVar[frozenset[str]] = frozenset()
    gathers_replicas: ClassVar[bool] = False
    paced_by_steps: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _isolate(cls)

    def __init__(
        self,
        components: Patterns | Components | None = None,
        *,
        every_n_steps: Interval | None = 50,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if every_n_steps is not None or self.paced_by_steps:
            check_interval(every_n_steps)
        if on_error not in ("warn", "raise"):
            raise ValueError(f'`on_error` must be "warn" or "raise", got {on_error!r}.')
        if not 0 < overhead_budget <= 1:
            raise ValueError(f"`overhead_budget` must lie in (0, 1], got {overhead_budget}.")
        self.components = Components(components)
        self.every_n_steps = every_n_steps
        self.on_error = on_error
        self.overhead_budget = overhead_budget
        self._inside = False
        self._entered = 0.0
        self._ended = False
        self._error: Exception | None = None
        self._sharded = False
        self._gathers = False
        self._owes_collective = False
        self._told = False
        self._assignment: Assignment | None = None
        self._callback_metrics: dict[str, Tensor] = {}
        self._broken_loggers: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._watch: Watch | None = None
        self._pending: deque[Read] = deque()
        self._resumed: dict[str, Any] = {}
        self.forget()

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{{self.components.patterns}, {self.every_n_steps}}}"

    # ---- what a subclass uses ----

    def step_of(self, trainer: Trainer) -> int:
        """The step that is under way, counted from 0, on the axis of Lightning's own metrics."""
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        return max(trainer.fit_loop.total_batch_idx, 0)

    def is_due(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether the step that `optimizer` is about to make is one to measure.

        To be asked exactly once before each optimizer step: under manual optimization, every
        optimizer's own steps are counted here.
        """
        index = optimizer_index(trainer, optimizer)
        done = trainer.global_step
        if not trainer.lightning_module.automatic_optimization:
            done = self._pace.count(index)
        return self._pace.is_turn(index, done)

    def is_due_batch(self, trainer: Trainer) -> bool:
        """Whether the batch that begins is one to measure: the first of each n-th optimizer step.

        To be asked exactly once in every `on_train_batch_start`. Under manual optimization n counts
        batches.
        """
        return self._pace.is_turn(_BATCH, self.step_of(trainer))

    def is_due_after(self, trainer: Trainer) -> bool:
        """Whether the optimizer step that has just been made is one to measure.

        To be asked exactly once in every `on_train_batch_end`. Under manual optimization n counts
        batches.
        """
        done = self.step_of(trainer) - trainer.lightning_module.automatic_optimization
        # none has been made yet while the first gathers its micro-batches
        return done >= 0 and self._pace.is_turn(_BATCH, done)

    def watch_forward(
        self, pl_module: LightningModule, inside: Inside, *, shadows: bool = True
    ) -> None:
        """Be inside a context while this batch's ``training_step`` runs; once, and then no more.

        Compiled parts of the model are not touched: each is run a second time, eagerly, without
        gradients, with its random numbers and buffers put back, and the context is entered around
        that instead. Where parameters are sharded over ranks, compiled parts are not seen: a second
        forward would gather them, and a rank that has ended would not.

        Args:
            pl_module: The module that trains.
            inside: Makes the context of one `Scope`: it adds hooks to the scope's modules when it
                is entered and removes them when it is left. Called once for all that is eager, and
                once for each compiled part.
            shadows: Whether compiled parts are wanted at all.
        """
        self._watch = watch_training_step(
            pl_module, inside, self.guarded, shadows=shadows and not self._sharded
        )

    def guarded(self, function: Callable[_P, _T]) -> Callable[_P, _T | None]:
        """`function` for a hook of PyTorch: timed, and its exception ends the diagnostic alone."""

        def hook(_: "Diagnostic", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            return function(*args, **kwargs)

        hook.__name__ = getattr(function, "__name__", "hook")
        isolated = _isolated(hook)

        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
            return isolated(self, *args, **kwargs)

        return Passing(run)

    def hold(self, *handles: RemovableHandle) -> None:
        """Keep hooks that `release` removes, whatever happens."""
        self._handles += handles

    def device_began(self, device: torch.device) -> torch.cuda.Event | None:
        """Mark the beginning of a measurement on a CUDA device; None on others."""
        if device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(
        self, values: Tensor, then: Callable[[Tensor], None], began: torch.cuda.Event | None
    ) -> None:
        """Start the one copy to the host that a measured step may cost.

        Args:
            values: All numbers of this measurement, in one tensor.
            then: Called with the values on the host: at once if they are there, else at a later
                hook, when the copy has arrived.
            began: What `device_began` gave.
        """
        self.measured()
        if began is not None and values.is_cuda:
            self._pending.append(Read(values, then, began))
        else:
            then(values if values.device.type == "cpu" else values.cpu())

    def measured(self) -> None:
        """This step was measured; said by `read`, or by a diagnostic that needs no read."""
        self._measured += 1
        self._clock.measuring = True

    def collect(self, *, wait: bool) -> None:
        """Hand over the reads that have arrived; with `wait`, all that were started."""
        while self._pending and (wait or self._pending[0].arrived()):
            self._device_seconds += self._pending.popleft().finish()

    def report(
        self, trainer: Trainer, rows: Sequence[Row], *, step: int, prefix: str | None = None
    ) -> None:
        """Write rows into the run, and their scalars to loggers and callback metrics.

        Args:
            trainer: The trainer that is running.
            rows: Flat rows with a key ``component`` (None: the whole model).
            step: The step that was measured.
            prefix: File of the rows, by default the diagnostic's own; only its rows are scalars
                for the loggers.
        """
        run = run_logger(trainer)
        if run is not None:
            run.log_rows(prefix or self.prefix, rows, step=step, epoch=trainer.current_epoch)
        if prefix is None:
            self._to_loggers(trainer, self._scalars(rows), step)

    def note(
        self, trainer: Trainer, message: str, severity: Literal["info", "warning"] = "info"
    ) -> None:
        """Write a remark into the run; a warning is also said at once."""
        if severity == "warning":
            rank_zero_warn(f"{type(self).__name__}: {message}")
        run = run_logger(trainer)
        if run is not None:
            name, step = type(self).__name__, self.step_of(trainer)
            run.note(message, diagnostic=name, step=step, severity=severity)

    def parts(self, trainer: Trainer, *, anew: bool = False) -> Assignment:
        """The components of the model that is training; `anew` where its parameters changed."""
        if self._assignment is None or anew:
            self._assignment = self.components.assign(trainer.lightning_module)
        return self._assignment

    def gather(self, compute: Callable[[], Tensor], size: int, device: torch.device) -> Tensor:
        """The numbers of every rank, by one collective that every rank enters in any case.

        A rank whose computation fails, or whose diagnostic has ended, takes part with a mark, so
        that none waits in vain and all end together when `all_well` reads it.

        Args:
            compute: Gives this rank's numbers, shape ``(size,)``.
            size: How many numbers.
            device: Where the collective runs.

        Returns:
            Double precision, shape ``(ranks, size + 3)``: the numbers, then whether the rank is
            well, what measuring costs it and what its ordinary step takes, in seconds.
        """
        mine = torch.zeros(size + 3, dtype=torch.float64, device=device)
        failure = self._error
        if failure is None:
            try:
                mine[:size] = compute()
                for place, mark in enumerate((1.0, self._clock.cost(), self._clock.step())):
                    mine[size + place].fill_(mark)
            except Exception as error:
                failure = error
        ranks = torch.distributed.get_world_size()
        everything = mine.new_empty(ranks * (size + 3))
        _all_gather(everything, mine)
        self._owes_collective = False
        if failure is not None:
            self._told = True
            raise failure
        return everything.view(ranks, size + 3)

    def all_well(self, marks: Sequence[float]) -> None:
        """Take note of what the ranks say of themselves, once gathered numbers are on the host.

        Args:
            marks: The last three numbers of each rank, as `gather` gives them, rank by rank.

        Raises:
            RuntimeError: If a rank has failed; this diagnostic then ends on all of them.
        """
        well = marks[::3]
        if not all(well):
            # every rank reads this and ends: nobody will wait for this one
            self._told = True
            raise RuntimeError(f"it failed on rank {list(well).index(0)}")
        self._clock.agree(max(marks[1::3]), max(marks[2::3]))

    def release(self) -> None:
        """Remove the hooks that are held; extended where there is more to give back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def forget(self) -> None:
        """Start with an empty memory; extended where there is more of it than counters."""
        self._clock = Clock()
        self._seconds = 0.0
        self._device_seconds = 0.0
        self._measured = 0
        self._pace = Pace(self.every_n_steps)

    # ---- hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        self._sharded = bool(kinds & _SHARDING) and trainer.world_size > 1
        self._gathers = self._sharded or (self.gathers_replicas and trainer.world_size > 1)
        self._ended, self._error, self._owes_collective = False, None, False
        self._told = False
        self._assignment = None
        self._broken_loggers.clear()
        self._pending.clear()
        if stage == "fit":
            self.forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        add_run_logger(trainer, self._resumed.get("path"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # held from here on: asking the trainer for it reads every progress bar metric
        self._callback_metrics = trainer.callback_metrics
        run = run_logger(trainer)
        if run is not None:
            same = self._resumed.get("path") == str(run.path.resolve())
            automatic = pl_module.automatic_optimization
            run.begin(
                step=trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1,
                info={
                    "world_size": trainer.world_size,
                    "planned_steps": planned_steps(trainer, automatic=automatic),
                    "automatic_optimization": automatic,
                },
                positions=self._resumed.get("positions") if same else None,
            )
        for message in self.parts(trainer).notes:
            self.note(trainer, message, "warning" if "matches nothing" in message else "info")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.start(self._seconds)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._pending:
            ranks_choose = self._gathers and self.every_n_steps == "auto"
            self.collect(wait=ranks_choose or trainer.is_last_batch)
        # what this very hook has taken so far belongs to the batch too
        if self._clock.stop(self._seconds + perf_counter() - self._entered):
            if self.every_n_steps == "auto":
                chosen = self._clock.interval(self.overhead_budget)
                self._pace.interval = chosen or self._pace.interval
            if self._measured.bit_count() == 1:
                self._report_overhead(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collect(wait=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collect(wait=True)
        self._report_overhead(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collect(wait=True)
        if not self._measured and not self._pace.came and self.every_n_steps is not None:
            self.note(
                trainer,
                f"nothing was measured: training ended before step {self._pace.interval}, and "
                f"`every_n_steps` is {self.every_n_steps}.",
                "warning",
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self.collect(wait=True)
        finally:
            # after an exception Lightning calls no teardown
            self.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pending.clear()
        self._assignment = None
        self.release()

    def state_dict(self) -> dict[str, Any]:
        self.collect(wait=True)
        return {
            "measured": self._measured,
            "seconds": self._seconds,
            "device_seconds": self._device_seconds,
            "elapsed": self._clock.elapsed,
            "spent": self._clock.spent,
            "pace": self._pace.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured = state_dict["measured"]
        self._seconds = state_dict["seconds"]
        self._device_seconds = state_dict["device_seconds"]
        self._clock.elapsed, self._clock.spent = state_dict["elapsed"], state_dict["spent"]
        self._pace.load_state_dict(state_dict["pace"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        run = run_logger(trainer)
        if run is not None:
            place = {"path": str(run.path.resolve()), "positions": run.positions()}
            checkpoint[_CHECKPOINT_KEY] = place

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get(_CHECKPOINT_KEY, {})
        states = checkpoint.get("callbacks", {})
        others = {
            getattr(callback, "state_key", None) for callback in getattr(trainer, "callbacks", ())
        }
        kind = f"{type(self).__qualname__}{{"
        own = [key for key in states if key.startswith(kind) and key not in others]
        # resumed with another interval or other components, the memory is still this one's
        if self.state_key not in states and len(own) == 1:
            self.load_state_dict(states[own[0]])

    # ---- private ----

    def _end(self, hook: str, error: Exception) -> None:
        if self._ended:
            return
        self._ended, self._error = True, error
        self._owes_collective = self._gathers and bool(self.collective_hooks) and not self._told
        self._pending.clear()
        self.release()
        if self.on_error == "raise":
            raise error
        warnings.warn(
            f"{type(self).__name__} has ended and training goes on: in {hook}, "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _scalars(self, rows: Sequence[Row]) -> dict[str, float]:
        scalars = {}
        for row in rows:
            places = [self.prefix, row["component"]]
            if "optimizer" in row and row["component"] is None:
                places.append(f"optimizer_{row['optimizer']}")
            place = "/".join(str(name) for name in places if name is not None)
            for key in sorted(row.keys() & self.logged):
                value = row[key]
                if isinstance(value, int | float) and isfinite(value):
                    scalars[f"{place}/{key}".lower()] = float(value)
        return scalars

    def _to_loggers(self, trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
        if not scalars:
            return
        self._callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()}
        )
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, RunLogger) or id(logger) in self._broken_loggers:
                continue
            try:
                logger.log_metrics(dict(scalars), step=step)
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._broken_loggers.add(id(logger))
                rank_zero_warn(
                    f"{type(self).__name__} writes no more to {type(logger).__name__}: "
                    f"{type(error).__name__}: {error}"
                )

    def _report_overhead(self, trainer: Trainer) -> None:
        run = run_logger(trainer)
        if run is None:
            return
        elapsed, own = self._clock.elapsed, self._clock.spent
        if not self.paced_by_steps:
            # what works by the epoch, or before the first, spends its time outside of batches
            elapsed, own = elapsed + self._seconds - own, self._seconds
        spent = max(own, self._device_seconds)
        row: Row = {
            "component": None,
            "diagnostic": type(self).__name__,
            "measured": self._measured,
            "seconds": self._seconds,
            "device_seconds": self._device_seconds or None,
            "step_seconds": self._clock.step(),
            "elapsed": elapsed,
            "share": spent / elapsed if elapsed else None,
            "every_n_steps": None if self.every_n_steps is None else self._pace.interval,
        }
        step = self.step_of(trainer)
        run.log_rows("overhead", [row], step=step, epoch=trainer.current_epoch)


def _all_gather(output: Tensor, values: Tensor) -> None:
    # torch 2.13 renamed it, and warns of the old name
    newest = getattr(torch.distributed, "all_gather_single", None)
    (newest or torch.distributed.all_gather_into_tensor)(output, values)


def _isolate(cls: type[Diagnostic]) -> None:
    for name, hook in list(vars(cls).items()):
        if callable(hook) and hasattr(Callback, name) and not name.startswith("_"):
            setattr(cls, name, _isolated(hook))


_isolate(Diagnostic)
