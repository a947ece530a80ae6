"""Is this run dead?"""

import warnings
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.collapse_judge import HARD, Judge, Limits, Numbers, Verdict
from lightning_diag.callbacks.collapse_progress import Progress, learning_rate
from lightning_diag.callbacks.collapse_reason import explained, stop_reason
from lightning_diag.callbacks.collapse_report import write_collapse_report
from lightning_diag.callbacks.collapse_rollback import (
    Snapshot,
    cut_learning_rates,
    nonfinite_entries,
)
from lightning_diag.callbacks.collapse_window import Finder, Found, Predictions, Window
from lightning_diag.callbacks.nonfinite_replay import NonfiniteReplay
from lightning_diag.callbacks.optimizers import (
    completed_gradients,
    gradient_scaler,
    optimizer_index,
)
from lightning_diag.callbacks.run import run_logger
from lightning_diag.functional.collapse_stop import merge_steps
from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.spelling import did_you_mean

__all__ = ["CollapseStop"]

Action = Literal["stop", "rollback", "warn"]

_DEFAULT_SNAPSHOT_STEPS = 100
_MARKS = 3
_CHECKPOINT_KEY = "lightning_diag_collapse"


class CollapseStop(Diagnostic):
    """Judges every step, and stops a run that cannot be saved, or takes it back to where it was.

    A step is an event if its loss is not finite, or larger than `spike_factor` times the mean of
    the last finite ones; if its gradient, before clipping, is not finite, vanishes or explodes; or
    if its predictions do not vary, or are all of one class. Enough events in a row are a collapse.
    The variance is judged over the fewest last steps that hold `min_predictions`; the class over
    `window_steps` steps, and more where these hold fewer predictions, if the labels there have two
    classes and more than a tenth of them are missed. A healthy model may predict one class for a
    while, as in a warm-up or where one class is rare: it counts after `class_patience_steps` of
    that. A head that starts at zero is constant for a while: see `warmup_steps`.

    A step that the gradient scaler skips is no event: it neither goes on with a row of events nor
    ends it, unless its loss is not finite, or the scale is 1 or less, which cannot overflow.

    Predictions are found in what ``training_step`` returns, labels there, or as the second element
    of the batch; see `prediction_numbers` for shapes. With labels that are no classes, as in a
    regression, or without labels, the classes are not judged; without logits, neither are they nor
    the variance. Under accumulation a step is all its micro-batches; under manual optimization a
    step is a batch, and its gradient is that of all optimizers which stepped in it.

    On several devices the numbers of all ranks are gathered by one collective a judged step, since
    a rank's loss and predictions are its own: so all ranks judge the same numbers, and no rank has
    to wait for the device, as a vote at each step would make it. What was decided goes through the
    strategy's boolean reduction. A run ends with the third event, on a CUDA device one step later.

    A judged step costs one pass over the gradients, little more for the predictions, and one copy
    to the host. With snapshots, each is a copy of parameters, buffers and optimizer states on the
    host, which waits for the device; one is kept, a second exists while it is made.

    The reason of a stop is in ``stop_reason`` of this callback, of the Trainer and in run.json:
    ``rule``, ``kinds``, ``step``, ``first_step``, ``observed``, ``threshold``, ``action``,
    ``message``, and ``delayed_by`` where `min_epochs` or `min_steps` hold the stop off.
    collapse_report.json, in the folder of the run, tells the events.

    The first step whose loss or gradient is not finite is made once more, on a copy of the module
    and of the batch, and from the same random numbers: the first module and operation that made NaN
    or infinity are named. On a CPU that happens before the weights take the step. On a CUDA device,
    where nobody waits to know, they have taken it: then the weights of the last snapshot serve, and
    without one only a step that the gradient scaler skipped, or that left the weights finite, can
    be followed. On several devices a rank follows its own step; the first writes it down, the
    others warn of what they find. What a step does outside of its module, as printing, is done once
    more; parameters in shards cannot be followed, nor a step that talks to other ranks.

    A checkpoint that would hold non-finite weights holds those of the last snapshot instead, and
    says so under ``lightning_diag_collapse``; without a snapshot, or where parameters are sharded,
    a warning tells of it. Checkpoints with weights only (`save_weights_only`) pass unseen.

    Args:
        every_n_steps: Optimizer steps between two judged steps, or ``"auto"``.
        action: ``"stop"``, ``"rollback"`` (restore the last snapshot, cut the learning rate, and
            stop when that has not helped) or ``"warn"``. A rollback alone changes the training.
        events_in_a_row: Judged steps in a row that must be events.
        window_steps: Judged steps that losses and predictions are compared over.
        gradient_norm_min: A smaller gradient norm has vanished.
        gradient_norm_max: A larger gradient norm explodes; before clipping.
        variance_min: A smaller variance of the predictions, over the rows of a batch and averaged
            over the columns, is none.
        spike_factor: How many times the mean of the losses before makes a spike.
        min_predictions: Fewest predictions that are judged.
        warmup_steps: Steps at the start in which only what is not finite is an event.
        class_patience_steps: Judged steps in a row that may predict one class alone.
        logits_key: Where the returned dictionary holds the predictions.
        target_key: Where it, or else a batch that is a mapping, holds the labels.
        predictions: Called with what ``training_step`` returned and the batch instead; gives the
            logits, and the labels or None.
        max_predictions: Rows of logits to look at in each batch, evenly spread.
        max_rollbacks: Rollbacks before the run is stopped.
        cooldown_steps: Steps after a rollback in which only what is not finite is an event.
        lr_factor: What a rollback multiplies the learning rates with, those of schedulers too.
        snapshot_every_n_steps: Steps between two snapshots; None makes them every 100 steps for a
            rollback, and never otherwise.
        find_nonfinite: Whether to find where the first NaN or infinity comes from.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `predictions` is no function.
        ValueError: If another argument is out of range.

    Rows:
        ``records/collapse.jsonl``, one for the whole model when events begin, go on (the first ten
        in a row, then at powers of two), or end, and now and then without events (judged steps 1,
        2, 4, ... 64, then every hundredth): ``event`` (0 or 1), ``kinds`` (what happened, with
        commas: ``nonfinite_loss``, ``nonfinite_gradient``, ``exploding_gradient``,
        ``vanishing_gradient``, ``loss_spike``, ``one_class``, ``constant_prediction``), ``streak``
        (events in a row), ``events_total``, ``gradient_norm``, ``skipped`` (by the scaler, 0 or 1),
        ``loss``, ``loss_before`` (mean of the finite losses of the window), ``variance``,
        ``unique_predictions`` (classes in the window; of more than 64, a lower bound),
        ``top_share`` (share of the most frequent one), ``predictions`` (in the window), ``action``
        (``stop``, ``rollback``, ``warn`` or null), ``restored_step`` (of a rollback).

        ``records/loss.jsonl``, one for ten judged steps (a hundred after step 20 000), at the last
        of them; for fewer before a checkpoint, at the end, and where the loss breaks:
        ``first_step``, ``steps``, ``loss`` (mean of the finite ones), ``loss_std``, ``loss_min``,
        ``loss_max``, ``loss_max_step``, ``nonfinite``, ``first_nonfinite`` (step),
        ``gradient_norm`` (mean), ``gradient_norm_max``, ``gradient_nonfinite``, ``skipped`` (counts
        of steps), ``lr`` (largest of all groups, at the last step), ``lr_min``, ``lr_max``, and
        ``variance``, ``top_share``, ``predictions`` of the last step, as above.

        ``records/nonfinite.jsonl``, one for the first step that was not finite, and after each
        rollback: ``kinds`` (as above), ``reason`` (``op``, ``data``, ``parameter``, ``buffer``,
        ``constant``, ``uninitialised``; or why nothing was found: ``finite`` (it was not when made
        again), ``weights_lost``, ``not_kept``, ``sharded``, ``collective``, ``unseen``,
        ``failed``), ``message``, ``module``, ``op`` (``aten.log``), ``call``
        (``torch.Tensor.log``), ``direction`` (``forward`` or ``backward``), ``node`` (of the
        backward graph), ``line`` (of the code), ``tensor`` (name of what was not finite before the
        step), ``input_min``, ``input_max``, ``input_zeros``, ``input_nan``, ``input_inf`` and
        ``inputs`` (what went in; backward, what went in forward), ``output_nan``, ``output_inf``,
        ``outputs``, ``then_module``, ``then_op``, ``then_line`` (what made NaN of an infinity),
        ``seen_in`` (the loss, or which gradient), ``batch_idx``, ``batch``, ``weights`` (``same``,
        ``later`` or of the ``snapshot``), ``reproduced`` (whether the loss was the same to the last
        bit).

    Logs:
        At these rows, under ``collapse/``: ``event``, ``streak``, ``events_total``,
        ``gradient_norm``, ``loss``, ``variance``, ``top_share``.

    Example:
        >>> CollapseStop(action="rollback", warmup_steps=200).max_rollbacks
        2
    """

    prefix = "collapse"
    gathers_replicas = True
    collective_hooks = frozenset(
        {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"}
    )
    logged = frozenset(
        {"event", "streak", "events_total", "gradient_norm", "loss", "variance", "top_share"}
    )

    def __init__(
        self,
        every_n_steps: Interval = 1,
        action: Action = "stop",
        events_in_a_row: int = 3,
        window_steps: int = 5,
        gradient_norm_min: float = 1e-7,
        gradient_norm_max: float = 100.0,
        variance_min: float = 1e-6,
        spike_factor: float = 10.0,
        min_predictions: int = 32,
        warmup_steps: int = 0,
        class_patience_steps: int = 100,
        logits_key: str = "logits",
        target_key: str = "target",
        predictions: Predictions | None = None,
        max_predictions: int = 256,
        max_rollbacks: int = 2,
        cooldown_steps: int = 50,
        lr_factor: float = 0.5,
        snapshot_every_n_steps: int | None = None,
        find_nonfinite: bool = True,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(
                f"`action` must be one of {', '.join(get_args(Action))}, got {action!r}; "
                f"{did_you_mean(str(action), get_args(Action))}"
            )
        if predictions is not None and not callable(predictions):
            raise TypeError(f"`predictions` must be a function or None, got {predictions!r}.")
        self.action = action
        self.events_in_a_row = _at_least("events_in_a_row", events_in_a_row, 1)
        self.window_steps = _at_least("window_steps", window_steps, 2)
        self.gradient_norm_min = _at_least("gradient_norm_min", gradient_norm_min, 0)
        self.gradient_norm_max = _more_than("gradient_norm_max", gradient_norm_max, 0)
        self.variance_min = _at_least("variance_min", variance_min, 0)
        self.spike_factor = _more_than("spike_factor", spike_factor, 1)
        self.min_predictions = _at_least("min_predictions", min_predictions, 1)
        self.warmup_steps = _at_least("warmup_steps", warmup_steps, 0)
        self.class_patience_steps = _at_least("class_patience_steps", class_patience_steps, 0)
        self.logits_key = logits_key
        self.target_key = target_key
        self.predictions = predictions
        self.max_predictions = _at_least("max_predictions", max_predictions, 2)
        self.max_rollbacks = _at_least("max_rollbacks", max_rollbacks, 0)
        self.cooldown_steps = _at_least("cooldown_steps", cooldown_steps, 0)
        if not 0 < lr_factor <= 1:
            raise ValueError(f"`lr_factor` must lie in (0, 1], got {lr_factor}.")
        self.lr_factor = lr_factor
        if snapshot_every_n_steps is not None:
            _at_least("snapshot_every_n_steps", snapshot_every_n_steps, 1)
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.find_nonfinite = find_nonfinite
        self._window: Window | None = None
        self._snapshot: Snapshot | None = None
        self._odd: frozenset[str] = frozenset()
        self._finder = Finder(logits_key, target_key, predictions)
        needed = action == "rollback" and max_rollbacks > 0
        default = _DEFAULT_SNAPSHOT_STEPS if needed else None
        self._snapshot_steps = snapshot_every_n_steps or default
        super().__init__(
            every_n_steps=every_n_steps, on_error=on_error, overhead_budget=overhead_budget
        )

    # ---- hooks ----

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        trainer.stop_reason = None  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # a mask may hold infinities for good
        buffers = dict(pl_module.named_buffers(remove_duplicate=False))
        flags = nonfinite_entries(buffers).tolist() if buffers else []
        self._odd = frozenset(name for name, odd in zip(buffers, flags, strict=True) if odd)
        unseen = [one for one in trainer.checkpoint_callbacks if _only_weights(one)]
        if unseen:
            severity: Literal["info", "warning"] = (
                "warning" if self.action == "rollback" else "info"
            )
            text = "checkpoints of `save_weights_only` are not checked for non-finite weights."
            self.note(trainer, text, severity)
        if self._snapshot_steps is not None:
            self._take_snapshot(trainer, pl_module, self._steps_done(trainer, started=False))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun_at = trainer.global_step
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        window = self._open(trainer)
        if window is not None:
            self._replay.begin(window.step, batch, batch_idx, pl_module.device)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._replay.saw_loss(loss, by_hand=not pl_module.automatic_optimization)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        window, index = self._open(trainer), optimizer_index(trainer, optimizer)
        if window is None or index < 0 or window.has_gradients(index):
            return
        self.collect(wait=True)
        # a collective, where a gradient is a pending sum: also for a rank that has failed
        whole = completed_gradients(optimizer) if self._sharded else None
        if self._error is None:
            window.began = window.began or self.device_began(pl_module.device)
            window.rate = learning_rate(trainer.optimizers)
            shared = self._gathers
            window.add_gradients(trainer, optimizer, index, shared=shared, whole=whole)
            self._replay_odd(trainer, pl_module)
            self._replay_early(trainer, pl_module, window, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window = self._window
        if window is not None and self._error is None:
            try:
                self._see_outputs(trainer, window, outputs, batch)
            except Exception as error:
                # the others wait in the collective, which tells them
                if not self._gathers:
                    raise
                window.failure = error
        self._replay.end(outputs)
        automatic = pl_module.automatic_optimization
        if not automatic or trainer.global_step > self._begun_at:
            self._window = None
            self._end_step(trainer, pl_module, window)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._act(trainer, pl_module)
        self._progress.end()
        self._write(trainer)
        if self._triggered:
            self._write_report(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._progress.end()
        self._write(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write_progress(trainer)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        weights = {k: v for k, v in checkpoint["state_dict"].items() if k not in self._odd}
        flags = nonfinite_entries(weights).tolist()
        broken = [name for name, odd in zip(weights, flags, strict=True) if odd]
        if not broken:
            return
        step, more = trainer.global_step, f" and {len(broken) - 1} more" if broken[1:] else ""
        found = f"after {step} steps `{broken[0]}`{more} are not finite"
        if self._snapshot is None or self._sharded:
            text = f"{found}, and a checkpoint was written with them: do not go on from it."
            self.note(trainer, text, "warning")
            return
        self._snapshot.replace_in(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {
            "instead_of_step": step,
            "weights_after_steps": self._snapshot.step,
        }
        text = f"{found}: the checkpoint holds the weights after {self._snapshot.step} instead."
        self.note(trainer, text, "warning")

    def forget(self) -> None:
        super().forget()
        self._judge = Judge(
            Limits(
                events_in_a_row=self.events_in_a_row,
                window_steps=self.window_steps,
                gradient_norm_min=self.gradient_norm_min,
                gradient_norm_max=self.gradient_norm_max,
                variance_min=self.variance_min,
                spike_factor=self.spike_factor,
                min_predictions=self.min_predictions,
                warmup_steps=self.warmup_steps,
                class_patience_steps=self.class_patience_steps,
            )
        )
        self.stop_reason: dict[str, Any] | None = None
        self._rollbacks: list[dict[str, Any]] = []
        self._triggered = False
        self._collapsed = False
        self._said: set[str] = set()
        self._verdict: Verdict | None = None
        self._window = None
        self._snapshot = None
        self._snapshot_wanted = False
        self._last_step = -1
        self._begun_at = 0
        self._odd = frozenset()
        self._rows: list[tuple[int, Row]] = []
        self._replay = NonfiniteReplay(armed=self.find_nonfinite)
        self._replays: list[tuple[int, Row]] = []
        self._odd_step: tuple[int, str] | None = None
        self._progress = Progress()

    def release(self) -> None:
        super().release()
        if self.stop_reason is None or self._ended:
            # after a stop it is there for a checkpoint that is written at the very end
            self._snapshot = None
        self._replay.forget()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # written by `on_save_checkpoint`, which comes next: a resumed run begins with new rows
        self._progress.end()
        return state | {
            "judge": self._judge.state(),
            "rollbacks": [dict(one) for one in self._rollbacks],
            "triggered": self._triggered,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._judge.load(state_dict["judge"])
        self._rollbacks = [dict(one) for one in state_dict["rollbacks"]]
        self._triggered = state_dict["triggered"]
        self._last_step = state_dict["last_step"]

    # ---- measuring ----

    def _open(self, trainer: Trainer) -> Window | None:
        """The window of the step under way, where that is to be judged."""
        if self.is_due_batch(trainer):
            self._window = Window(self.step_of(trainer))
        return self._window

    def _see_outputs(self, trainer: Trainer, window: Window, outputs: Any, batch: Any) -> None:
        found = self._finder.find(outputs, batch)
        raw = not self._gathers and trainer.lightning_module.device.type == "cpu"
        window.add_outputs(found, self.max_predictions, raw=raw)
        if outputs or not trainer.lightning_module.automatic_optimization:
            self._say_what_is_missing(trainer, found)

    def _say_what_is_missing(self, trainer: Trainer, found: Found) -> None:
        if found.loss is None:
            self._say(trainer, "`training_step` returns no loss, so that none is judged.")
        if found.logits is None:
            text = (
                f"`training_step` returns no `{self.logits_key}`, so that predictions are not "
                "judged; `predictions` may be a function that finds them."
            )
            self._say(trainer, text)
        elif found.targets is None:
            self._say(trainer, "there are no labels, so that predicted classes are not judged.")

    def _measure(self, trainer: Trainer, window: Window, *, discard: bool) -> None:
        device = trainer.lightning_module.device
        has_scaler = gradient_scaler(trainer) is not None
        rate = window.rate

        def judge(values: Tensor) -> None:
            numbers = merge_steps(values[:, :-_MARKS] if self._gathers else values)
            marks = values[:, -_MARKS:].reshape(-1) if self._gathers else values.new_zeros(0)
            read = torch.cat([marks.to(numbers), numbers]).tolist()
            if self._gathers:
                self.all_well(read[: len(marks)])
            if not discard:
                self._judged(Numbers.of(window.step, read[len(marks) :], has_scaler), rate)

        began = window.began or self.device_began(device)
        if not self._gathers and device.type == "cpu":
            values, finish = window.values(trainer)

            def count(read: Tensor) -> None:
                numbers = finish(read.tolist())
                if not discard:
                    self._judged(Numbers.of(window.step, numbers, has_scaler), rate)

            self.read(values, count, None)
            return
        if not self._gathers:
            self.read(window.numbers(trainer).view(1, -1), judge, began)
            return
        size = window.size(trainer)
        self.read(self.gather(lambda: window.numbers(trainer), size, device), judge, began)

    # ---- judging and acting ----

    def _judged(self, numbers: Numbers, rate: float | None) -> None:
        verdict = self._judge.see(numbers)
        self._last_step = verdict.step
        self._progress.see(numbers, verdict, rate)
        if self._verdict is None or not self._verdict.collapsed:
            self._verdict = verdict
        hard = [kind for kind in verdict.kinds if kind in HARD]
        if hard and self._odd_step is None:
            self._odd_step = (verdict.step, ",".join(hard))
        judged, streak = self._judge.judged, verdict.streak
        now_and_then = judged % 100 == 0 or (judged < 100 and judged.bit_count() == 1)
        told = streak <= max(10, self.events_in_a_row) or streak.bit_count() == 1
        if now_and_then or (verdict.kinds and told) or verdict.ended:
            row: Row = {"component": None, **verdict.row, "action": None, "restored_step": None}
            self._rows.append((verdict.step, row))

    def _end_step(
        self, trainer: Trainer, pl_module: LightningModule, window: Window | None
    ) -> None:
        """What is known is acted upon here only: all ranks come by with the same verdicts."""
        self.collect(wait=True)
        acted = self._error is None and self._act(trainer, pl_module)
        if window is not None:
            self._measure(trainer, window, discard=acted)
        done = self._steps_done(trainer)
        if self._snapshot_steps is not None and done % self._snapshot_steps == 0:
            self._snapshot_wanted = True
        if self._snapshot_wanted or trainer.is_last_batch:
            self.collect(wait=True)
        if not self._pending:
            acted = self._act(trainer, pl_module) or acted
        if self._snapshot_wanted and not acted and self._judge.well:
            self._snapshot_wanted = False
            self._take_snapshot(trainer, pl_module, done)
        self._replay.forget(but=window.step if window is not None and self._pending else None)
        self._write(trainer)

    def _replay_early(
        self, trainer: Trainer, pl_module: LightningModule, window: Window, optimizer: Optimizer
    ) -> None:
        """Follow a step that is not finite before the weights take it, where that can be known."""
        if not self._replay.armed:
            return
        index = optimizer_index(trainer, optimizer)
        odd = window.odd_on_host(trainer, optimizer, index, self._replay.losses())
        if odd is not None:
            others = set(range(len(trainer.optimizers))) - {index}
            made = any(window.has_gradients(other) for other in others)
            self._replay_step(trainer, pl_module, window.step, odd, after=made)

    def _replay_odd(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the step that was judged to be not finite, when it has been made already."""
        odd, self._odd_step = self._odd_step, None
        if odd is not None and self._replay.armed:
            self._replay_step(trainer, pl_module, *odd, after=True)

    def _replay_step(
        self, trainer: Trainer, pl_module: LightningModule, step: int, kinds: str, *, after: bool
    ) -> None:
        snapshot = None if self._snapshot is None or self._sharded else self._snapshot.weights
        row = self._replay.find(
            trainer,
            pl_module,
            step,
            weights=snapshot,
            after=after,
            kinds=kinds,
            sharded=self._sharded,
        )
        self._replays.append((step, row))
        self.report(trainer, [row], step=step, prefix="nonfinite")
        text = f"step {step} was not finite. {row['message']}"
        if trainer.global_rank == 0:
            self.note(trainer, text, "warning")
        elif row["op"] is not None:
            warnings.warn(f"CollapseStop on rank {trainer.global_rank}: {text}", stacklevel=2)

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Do what a collapse asks for; whether weights were restored."""
        self._replay_odd(trainer, pl_module)
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return False
        self._collapsed = verdict.collapsed or self.stop_reason is not None
        if not verdict.collapsed or self.stop_reason is not None:
            return False
        if self.action == "warn" and verdict.streak > self.events_in_a_row:
            return False
        if not trainer.strategy.reduce_boolean_decision(True, all=False):
            return False
        self._triggered = True
        may = self._snapshot is not None and len(self._rollbacks) < self.max_rollbacks
        if self.action == "warn":
            self._mark(verdict, "warn", None)
            self.note(trainer, f"{explained(verdict)}.", "warning")
        elif self.action == "rollback" and may:
            self._roll_back(trainer, pl_module, verdict)
        else:
            self._stop(trainer, pl_module, verdict)
        self._write_report(trainer)
        return self.action == "rollback"

    def _roll_back(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        verdict: Verdict,
    ) -> None:
        snapshot = self._restore(trainer, pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        cut_learning_rates(trainer.optimizers, schedulers, self.lr_factor)
        self._judge.start_anew(self._steps_done(trainer) + self.cooldown_steps)
        self._collapsed = False
        self._rollbacks.append(
            {
                "step": verdict.step,
                "kinds": list(verdict.kinds),
                "restored_step": snapshot,
                "lr_factor": self.lr_factor,
            }
        )
        self._replay = NonfiniteReplay(armed=self.find_nonfinite)
        self._mark(verdict, "rollback", snapshot)
        count = f"rollback {len(self._rollbacks)} of {self.max_rollbacks}"
        done = f"the state after {snapshot} steps is restored"
        text = f"{explained(verdict)}; {done}, learning rates times {self.lr_factor:g} ({count})."
        self.note(trainer, text, "warning")

    def _stop(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        reason = stop_reason(
            trainer,
            verdict,
            diagnostic=type(self).__name__,
            action="stop",
            rollbacks=len(self._rollbacks),
        )
        if self.action == "rollback" and self._snapshot is not None:
            self._restore(trainer, pl_module)
        trainer.should_stop = True
        self.stop_reason = reason
        self._collapsed = True
        trainer.stop_reason = reason  # type: ignore[attr-defined]
        self._mark(verdict, "stop", None)
        run = run_logger(trainer)
        if run is not None:
            run.update_info(stop_reason=reason)
        delay = reason["delayed_by"]
        ends = f"it is stopped once {delay} is reached" if delay else "it is stopped"
        self.note(trainer, f"{explained(verdict)}; {ends}.", "warning")

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> int:
        assert self._snapshot is not None
        self._snapshot.restore(pl_module, trainer.optimizers)
        return self._snapshot.step

    def _take_snapshot(self, trainer: Trainer, pl_module: LightningModule, done: int) -> None:
        """Copy the state, if it is finite on all ranks, which come here at the same step."""
        snapshot, failure = None, None
        try:
            snapshot = Snapshot(pl_module, trainer.optimizers, done)
            finite = snapshot.is_finite(self._odd)
        except Exception as error:
            finite, failure = False, error
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if failure is not None:
            raise failure
        if finite:
            self._snapshot = snapshot
        else:
            self._say(trainer, f"the state after {done} steps is not finite: no snapshot.")

    # ---- telling ----

    def _mark(self, verdict: Verdict, action: str, restored: int | None) -> None:
        for step, row in self._rows:
            if step == verdict.step:
                row.update(action=action, restored_step=restored)

    def _write(self, trainer: Trainer) -> None:
        rows, self._rows = self._rows, []
        for step, row in rows:
            self.report(trainer, [row], step=step)
        self._write_progress(trainer)

    def _write_progress(self, trainer: Trainer) -> None:
        for step, row in self._progress.take():
            self.report(trainer, [row], step=step, prefix="loss")

    def _write_report(self, trainer: Trainer) -> None:
        run = run_logger(trainer)
        folder = Path(trainer.default_root_dir) if run is None else run.path
        write_collapse_report(
            folder / "collapse_report.json",
            self._judge,
            collapsed=self._collapsed,
            total_steps=self._last_step + 1,
            settings={
                "every_n_steps": self.every_n_steps,
                "action": self.action,
                "max_rollbacks": self.max_rollbacks,
                "cooldown_steps": self.cooldown_steps,
                "lr_factor": self.lr_factor,
            },
            rollbacks=self._rollbacks,
            nonfinite=[{"step": step, **row} for step, row in self._replays],
            stop_reason=self.stop_reason,
        )

    def _say(self, trainer: Trainer, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.note(trainer, text)

    def _steps_done(self, trainer: Trainer, *, started: bool = True) -> int:
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        return self.step_of(trainer) + started


def _only_weights(checkpoint: Any) -> bool:
    return bool(getattr(checkpoint, "save_weights_only", False))


def _at_least(name: str, value: Any, least: float) -> Any:
    if isnan(value) or value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return value


def _more_than(name: str, value: Any, bound: float) -> Any:
    if not bound < value <= inf:
        raise ValueError(f"`{name}` must be more than {bound}, got {value}.")
    return value
