"""Which operation was the first to make NaN or infinity?"""

import gc
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import copy_context
from copy import deepcopy
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.collapse_rollback import nonfinite_entries
from lightning_diag.callbacks.nonfinite_replay_copy import aside, tensors_in_use
from lightning_diag.callbacks.nonfinite_replay_random import Generators, put_back
from lightning_diag.callbacks.nonfinite_replay_rows import culprit_row, empty_row, finite_row
from lightning_diag.callbacks.nonfinite_replay_trace import (
    Culprit,
    Deadline,
    TalksToRanksError,
    Trace,
)
from lightning_diag.callbacks.optimizers import gradient_scaler
from lightning_diag.callbacks.wiring_tensors import named_tensors
from lightning_diag.components import module_names
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["NonfiniteReplay"]

_LOOKS = 3
_MOST_BYTES = 256 * 2**20
# other ranks may wait for this one, as a rule for 600 s at most
_MOST_SECONDS = 300
_LAST_SECONDS = 10


@dataclass
class _Batch:
    """One micro-batch, by reference, and the random numbers with which its step began."""

    step: int
    batch: Any
    batch_idx: int
    generators: Generators
    loss: Tensor | None = None
    bytes: int | None = None


class NonfiniteReplay:
    """Makes a step whose loss or gradient was not finite once more, and follows it inside.

    The step runs on a copy of the module, with a copy of the batch, from the random numbers that it
    had. What happens there is followed from operation to operation, so that a NaN in the loss or in
    a gradient leads to the operation that made it of finite values; an infinity that is written as
    such, as in a mask, is passed over unless it has become NaN.

    Until then it costs a reference to the batch of the step, and 5 kB of random numbers. Python's
    and NumPy's take longer: they are kept where the first steps have drawn some.

    Attributes:
        armed: Whether there is still something to wait for; it is done once.
    """

    def __init__(self, *, armed: bool = True) -> None:
        self.armed = armed
        self._batches: list[_Batch] = []
        self._looks = 0
        self._others = False

    def begin(self, step: int, batch: Any, batch_idx: int, device: torch.device) -> None:
        """A micro-batch begins, whose step is judged.

        Args:
            step: The step.
            batch: The micro-batch.
            batch_idx: Its number in the epoch.
            device: Where the module is.
        """
        if not self.armed:
            return
        others = self._others or self._looks < _LOOKS
        if self._batches:
            self._make_room()
        generators = Generators.now(device, others=others)
        self._batches.append(_Batch(step, batch, batch_idx, generators))

    def saw_loss(self, loss: Tensor, *, by_hand: bool) -> None:
        """Take note of the loss of the micro-batch under way, the first where there are several.

        Args:
            loss: What the backward pass begins from.
            by_hand: Whether the step calls it itself, so that the graph may be kept for another.
        """
        if self._batches and self._batches[-1].loss is None:
            # the step may count on it that its graph goes when it lets it go
            self._batches[-1].loss = loss.detach() if by_hand else loss

    def losses(self) -> list[Tensor]:
        """The losses of the micro-batches that are kept."""
        return [one.loss for one in self._batches if one.loss is not None]

    def end(self, outputs: Any) -> None:
        """A micro-batch ends.

        Args:
            outputs: What ``training_step`` returned, which Lightning has taken off its graph.
        """
        if self._batches:
            loss = _loss_of(outputs)
            self._batches[-1].loss = None if loss is None or loss.requires_grad else loss
        if self._looks < _LOOKS and not self._others and self._batches:
            self._looks += 1
            self._others = self._batches[-1].generators.others_moved()

    def forget(self, *, but: int | None = None) -> None:
        """Let the batches go.

        Args:
            but: The step whose batches are still wanted.
        """
        self._batches = [one for one in self._batches if one.step == but]

    def find(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: int,
        *,
        weights: Mapping[str, Tensor] | None = None,
        after: bool,
        kinds: str,
        sharded: bool = False,
    ) -> Row:
        """Make the step again, and say what was found.

        Args:
            trainer: The trainer that is running.
            module: The module that trains.
            step: The step.
            weights: Finite weights of an earlier step, by name, if there are some.
            after: Whether the optimizer may have made its step already.
            kinds: What was not finite.
            sharded: Whether parameters are spread over ranks, so that no rank can do it alone.

        Returns:
            A row of ``records/nonfinite.jsonl``.
        """
        batches = [one for one in self._batches if one.step == step]
        self.armed, self._batches = False, []
        if sharded:
            what = "the parameters are spread over ranks"
            return {**empty_row("sharded", what), "component": None, "kinds": kinds}
        try:
            return self._found(trainer, module, batches, weights, after) | {"kinds": kinds}
        except Exception as error:
            return _failed(error) | {"component": None, "kinds": kinds}

    def _found(
        self,
        trainer: Trainer,
        module: LightningModule,
        batches: list[_Batch],
        weights: Mapping[str, Tensor] | None,
        after: bool,
    ) -> Row:
        lost = _nonfinite_weights(module) if after else []
        used = "later" if after else "same"
        if lost and weights is not None:
            used = "snapshot"
        shared: Row = {"component": None, "weights": used}
        if lost and weights is None:
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            what = f"`{lost[0]}`{more} were not finite any more when this was noticed"
            return empty_row("weights_lost", what) | shared
        if not batches:
            return empty_row("not_kept", "the batch of that step was not kept") | shared
        row: Row = {}
        with put_back():
            for one in batches:
                row = _apart(trainer, module, one, weights if lost else None)
                row["batch_idx"] = one.batch_idx
                if row["reason"] != "finite":
                    break
        return row | shared

    def _make_room(self) -> None:
        """Only the micro-batch under way may be of any size."""
        last = self._batches[-1]
        if last.bytes is None:
            tensors = [tensor for _, tensor in named_tensors(last.batch)]
            last.bytes = sum(x.numel() * x.element_size() for x in tensors)
        total, kept = 0, []
        for one in reversed(self._batches):
            total += one.bytes or 0
            if total > _MOST_BYTES:
                break
            kept.append(one)
        self._batches = kept[::-1]


def _replay(
    trainer: Trainer,
    module: LightningModule,
    one: _Batch,
    weights: Mapping[str, Tensor] | None,
    deadline: Deadline,
) -> Row:
    copied = aside(trainer, module, one.step, weights)
    batch = deepcopy(one.batch)
    names = module_names(copied)
    trace = Trace(copied, names, deadline, tensors_in_use(trainer, module))
    for name, parameter in copied.named_parameters():
        parameter.grad = None
        if not is_lazy(parameter):
            trace.given("parameter", name, parameter)
    for name, buffer in copied.named_buffers():
        trace.given("buffer", name, buffer)
    for name, tensor in named_tensors(batch):
        trace.given("data", name, tensor)
    losses: list[Tensor] = []
    one.generators.set()
    try:
        with torch.compiler.set_stance("force_eager"), trace.entered():
            _step(trainer, copied, batch, one.batch_idx, trace, losses)
    except Culprit as culprit:
        return culprit_row(culprit, one.batch, _same(losses, one.loss))
    return finite_row(one.batch, _same(losses, one.loss))


def _apart(
    trainer: Trainer,
    module: LightningModule,
    one: _Batch,
    weights: Mapping[str, Tensor] | None,
) -> Row:
    """In a thread of its own, which no mode reaches that is entered here, nor autocast."""
    rows: list[Row] = []
    deadline, ended = Deadline(_MOST_SECONDS), Event()
    home = torch.get_default_device()

    def run() -> None:
        try:
            if module.device.type == "cuda":
                torch.cuda.set_device(module.device)
            with home if home.type != "cpu" else nullcontext():
                rows.append(_replay(trainer, module, one, weights, deadline))
        except BaseException as error:
            # it is not kept itself: it would hold the copy
            rows.append(_failed(error))
        finally:
            ended.set()

    thread = Thread(target=copy_context().run, args=(run,), daemon=True)
    try:
        # an interrupt may come as early as in here
        thread.start()
        thread.join()
    except BaseException:
        # nobody waits for it any more: it must draw no random number after this
        deadline.at = 0
        ended.wait(_LAST_SECONDS)
        raise
    # modules of Lightning and of metrics hold each other: what the copy holds is given back now
    gc.collect()
    return rows[0]


def _failed(error: BaseException) -> Row:
    if isinstance(error, TalksToRanksError):
        what = f"the step talks to the other ranks ({error}), which a replay must not"
        return empty_row("collective", what)
    text = str(error).strip().partition("\n")[0]
    return empty_row("failed", f"the replay failed with {type(error).__name__}: {text}")


def _step(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    batch_idx: int,
    trace: Trace,
    losses: list[Tensor],
) -> None:
    """As Lightning makes a step, but for the optimizer's part."""
    automatic = module.automatic_optimization
    scaler = gradient_scaler(trainer)
    trace.before_backward = None if automatic else losses.append
    with trainer.precision_plugin.train_step_context():
        outputs = module.training_step(*_arguments(module, batch, batch_idx))
    loss = _loss_of(outputs)
    if loss is None:
        return
    if not automatic:
        trace.judge(loss, "loss")
        return
    loss = loss / trainer.accumulate_grad_batches
    scaled = loss if scaler is None else scaler.scale(loss)
    losses += [scaled.detach(), loss.detach()]
    trace.judge(loss, "loss")
    if scaled.requires_grad:
        module.backward(scaled)


def _arguments(module: LightningModule, batch: Any, batch_idx: int) -> list[Any]:
    parameters = inspect.signature(module.training_step).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    both = several or sum(one.kind in plain for one in parameters) > 1
    return [batch, batch_idx] if both else [batch]


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) else None


def _same(losses: list[Tensor], loss: Tensor | None) -> bool | None:
    """Whether the replay gave the loss of the step, to the last bit; NaN is like NaN."""
    if loss is None or not losses:
        return None
    # before the backward pass it has been multiplied by the scale, at the end of the batch not
    again, kept = losses[:2], loss.detach()
    return any(_equal(one, kept) for one in again if one.dtype == kept.dtype)


def _equal(one: Tensor, other: Tensor) -> bool:
    same = torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return same and one.shape == other.shape


def _nonfinite_weights(module: LightningModule) -> list[str]:
    weights = {name: x for name, x in module.named_parameters() if not is_lazy(x)}
    flags = nonfinite_entries(weights).tolist() if weights else []
    return [name for name, odd in zip(weights, flags, strict=True) if odd]
