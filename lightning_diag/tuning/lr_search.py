"""A learning rate range test inside of a Trainer that is about to train, and no trace of it."""

import importlib
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_diag.functional.batches import batch_size
from lightning_diag.functional.lr_range_test import diverged
from lightning_diag.lightning import PACKAGE, LightningModule, Trainer
from lightning_diag.tuning.learning_rate import multiples, set_group_lrs
from lightning_diag.tuning.snapshot import Snapshot, same_random_numbers

__all__ = ["Losses", "accumulation", "can_search", "range_test"]

_WHOLE = frozenset({"SingleDeviceStrategy", "DDPStrategy"})
_WITHOUT_LOSS = 30  # steps in a row: a gradient scaler that starts at 2^16 needs no more than 16
_SMALL = 1 << 26  # bytes of what may be a data set's memory


class Losses(NamedTuple):
    """Losses of a range test.

    Attributes:
        found: The loss of each step, under its learning rate.
        before: The loss that the same batches gave before training; empty where that is unknown.
    """

    found: list[float]
    before: list[float]

    def compared(self) -> list[float]:
        """Each loss, corrected by how much harder than the others its batch is."""
        finite = [loss for loss in self.before if math.isfinite(loss)]
        if not finite:
            return self.found
        mean = math.fsum(finite) / len(finite)
        pairs = zip(self.found, self.before, strict=False)
        return [found - before + mean for found, before in pairs]

    def spread(self) -> float | None:
        """Standard deviation of the losses before training."""
        finite = [loss for loss in self.before if math.isfinite(loss)]
        return statistics.pstdev(finite) if finite else None


def range_test(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Optimizer,
    lrs: Sequence[float],
    *,
    loss: str | None = None,
) -> Losses:
    """Train one optimizer step at each learning rate in turn, undo it all, and return the losses.

    The steps are those of the run that is about to begin: its batches, precision, accumulation,
    clipping, hooks of the module and, on several devices, the mean over all of them. All groups
    of the optimizer keep their ratios. No callback and no logger sees them, and nothing is
    written. Afterwards weights, buffers, attributes of the module, optimizers, schedulers, the
    gradient scaler, random generators (the global ones, and those that loaders and data sets
    hold) are what they were, also after an exception. Compiled modules run eagerly meanwhile.

    Before, the same batches go through the untrained module once, with the same random numbers: by
    how much a batch differs from the others is then known, and no noise of the curve. Not so under
    manual optimization, where a forward pass alone cannot be had.

    To be called in ``on_train_start``, on every rank. Ends early where the loss has left.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        optimizer: One of ``trainer.optimizers``; under manual optimization the others step with
            the learning rates they have.
        lrs: Learning rates to try, rising.
        loss: Name under which the module logs the loss to look at; None for what
            ``training_step`` returns.

    Returns:
        The losses, up to the learning rate where they left.

    Raises:
        ValueError: If the strategy is not one that this can undo, or if no step gives a loss.
    """
    if not can_search(trainer):
        raise ValueError(
            "A learning rate can be searched on one device and under DDP, where weights are whole, "
            f"got {type(trainer.strategy).__name__}."
        )
    share = accumulation(trainer)
    # steps that a scaler skips have batches too
    spare = 0 if _scaler(trainer) is None else _WITHOUT_LOSS
    before: list[float] = []
    if pl_module.automatic_optimization:
        with _undone(trainer, pl_module) as logged:
            steps = _Steps(trainer, pl_module, optimizer, loss, logged, share)
            before = [steps.loss_before() for _ in range(len(lrs) + spare)]
    with _undone(trainer, pl_module) as logged:
        steps = _Steps(trainer, pl_module, optimizer, loss, logged, share)
        factors = multiples(optimizer)
        losses = Losses([], [])
        for lr in lrs:
            losses.found.append(steps.loss_at(lr, factors))
            # the one of the same batch
            losses.before.extend(before[steps.seen - 1 : steps.seen])
            if diverged(torch.tensor(losses.compared()), spread=losses.spread()):
                break
    return losses


def can_search(trainer: Trainer) -> bool:
    """Whether every rank holds all weights: what FSDP keeps of its shards cannot be put back."""
    return bool({kind.__name__ for kind in type(trainer.strategy).__mro__} & _WHOLE)


def _scaler(trainer: Trainer) -> Any:  # noqa: ANN401
    return getattr(trainer.precision_plugin, "scaler", None)


def accumulation(trainer: Trainer) -> int:
    """Batches that make one optimizer step in the epoch that is about to begin."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        scheduled = getattr(callback, "get_accumulate_grad_batches", None)
        if scheduled is not None:
            return int(scheduled(trainer.current_epoch))
    return trainer.accumulate_grad_batches


class _Steps:
    """Optimizer steps of the run that is about to begin, one by one."""

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        loss: str | None,
        logged: dict[str, object],
        share: int,
    ) -> None:
        self._trainer, self._module, self._optimizer = trainer, pl_module, optimizer
        self._averages = trainer.world_size > 1
        self._batches = enumerate(_batches(trainer, pl_module))
        self._name, self._logged = loss, logged
        self._share = share
        self.seen = 0  # optimizer steps that gave a loss, those that a scaler skipped too
        taken = inspect.signature(pl_module.training_step).parameters.values()
        self._takes_index = len(taken) >= 2 or any(one.kind is one.VAR_POSITIONAL for one in taken)
        pl_module.on_train_start()
        pl_module.on_train_epoch_start()

    def loss_before(self) -> float:
        """What the batches of one step give without a step."""
        for _ in range(_WITHOUT_LOSS):
            # with gradients: a loss may be made of derivatives
            value = self._agreed(self._forward)
            if value is not None:
                return value
        raise self._without_loss()

    def loss_at(self, lr: float, factors: Sequence[float]) -> float:
        for _ in range(_WITHOUT_LOSS):
            set_group_lrs(self._optimizer, lr, factors)
            scale = self._scale()
            value = self._agreed(self._step)
            self.seen += value is not None
            # a scaler that has just halved its scale has made no step
            if value is not None and self._scale() >= scale:
                return value
        raise self._without_loss()

    def _without_loss(self) -> ValueError:
        return ValueError(
            f"`training_step` must give a loss, got none in {_WITHOUT_LOSS} steps"
            + (f", or none logged as `{self._name}`." if self._name else ".")
        )

    def _forward(self) -> Tensor | None:
        seen = [self._training_step()[1] for _ in range(self._share)]
        parts = [one.detach().float() for one in seen if one is not None]
        return torch.stack(parts).mean() if parts else None

    def _step(self) -> Tensor | None:
        if not self._module.automatic_optimization:
            return self._training_step()[1]
        parts: list[Tensor] = []
        self._trainer.strategy.optimizer_step(
            self._optimizer, closure=lambda: self._closure(parts), model=self._module
        )
        return torch.stack(parts).mean() if parts else None

    def _closure(self, parts: list[Tensor]) -> Tensor | None:
        parts.clear()  # an optimizer may ask again, as L-BFGS does
        self._module.on_before_zero_grad(self._optimizer)
        self._optimizer.zero_grad()
        for _ in range(self._share):
            loss, seen = self._training_step()
            if loss is not None:
                self._trainer.strategy.backward(loss / self._share, self._optimizer)
            if seen is not None:
                parts.append(seen.detach().float())
        if self._averages:
            _average(self._optimizer, self._trainer.world_size)
        return loss

    def _training_step(self) -> tuple[Tensor | None, Tensor | None]:
        """The loss to go backward from, and the loss to look at."""
        index, batch = next(self._batches)
        self._logged.clear()
        if self._module.on_train_batch_start(batch, index) == -1:
            return None, None
        output = self._forward_step(batch, index)
        self._module.on_train_batch_end(output, batch, index)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        seen = loss if self._name is None else self._logged.get(self._name)
        return _as_loss(loss), _as_loss(seen)

    def _forward_step(self, batch: Any, index: int) -> Any:  # noqa: ANN401
        # of the module itself: DDP's wrapper would remember that it was used
        with self._trainer.precision_plugin.train_step_context():
            arguments = (batch, index) if self._takes_index else (batch,)
            return self._module.training_step(*arguments)

    def _scale(self) -> float:
        scaler = _scaler(self._trainer)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _agreed(self, step: Callable[[], Tensor | None]) -> float | None:
        """The mean over ranks; an error of one rank becomes an error of all."""
        failure: Exception | None = None
        value: Tensor | None = None
        try:
            value = step()
        except Exception as error:
            if self._trainer.world_size == 1:
                raise
            failure = error
        if not self._trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            raise failure or RuntimeError("the search failed on another rank")
        if not self._trainer.strategy.reduce_boolean_decision(value is not None, all=True):
            return None
        seen = torch.zeros(()) if value is None else value.detach().float().mean()
        return float(self._trainer.strategy.reduce(seen, reduce_op="mean"))


def _as_loss(value: object) -> Tensor | None:
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    return value if isinstance(value, Tensor) else None


@contextmanager
def _undone(trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, object]]:
    """Everything that training changes is put back; yields what the module logs meanwhile."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scaler = _scaler(trainer)
    dummy = importlib.import_module(f"{PACKAGE}.loggers.logger").DummyLogger
    logged: dict[str, object] = {}
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers())
        kept = Snapshot(pl_module, scaler, *trainer.optimizers, *schedulers)
        stack.callback(kept.restore)
        sources = [trainer.train_dataloader, _data_module(trainer), *kept.data]
        data = Snapshot(*sources, largest=_SMALL)
        stack.callback(data.restore)
        for name, blank in (("callbacks", []), ("loggers", [dummy()])):
            stack.callback(setattr, trainer, name, getattr(trainer, name))
            setattr(trainer, name, blank)
        stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
        # on the instance: the snapshot removes them
        vars(pl_module)["log"] = lambda name, value, *_, **__: logged.update({name: value})
        vars(pl_module)["log_dict"] = lambda values, *_, **__: logged.update(values)
        # nothing is compiled for these steps, and no compiled code learns of them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield logged


def _batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Batches of the training loader on the device, over and over, without ragged last ones."""
    loader = _second_loader(trainer.train_dataloader)
    holder = _transfers(trainer, pl_module)
    first: int | None = None
    while True:
        given = 0
        limit = trainer.num_training_batches
        most = int(limit) if math.isfinite(limit) else None
        for place, (batch, *_) in enumerate(itertools.islice(loader, most), start=1):
            size = batch_size(batch)
            first = first or size
            given += 1
            if place == most and size != first and given > 1:
                continue
            converted = trainer.precision_plugin.convert_input(batch)
            converted = holder.on_before_batch_transfer(converted, 0)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=0)
        if not given:
            raise ValueError("The training loader must give at least one batch, got none.")


def _transfers(trainer: Trainer, pl_module: LightningModule) -> Any:  # noqa: ANN401
    """Whose hook prepares a batch: the data module's, if it has one of its own."""
    data = _data_module(trainer)
    own = type(data).on_before_batch_transfer if data is not None else None
    return pl_module if own in (None, LightningModule.on_before_batch_transfer) else data


def _data_module(trainer: Trainer) -> Any:  # noqa: ANN401
    return getattr(trainer, "datamodule", None)


def _second_loader(loaders: Any) -> Any:  # noqa: ANN401
    """The loaders as one that iterates by itself, beside the iterator that training has begun."""
    combined = importlib.import_module(f"{PACKAGE}.utilities.combined_loader").CombinedLoader
    return combined(_own_workers(loaders), "max_size_cycle")


def _own_workers(loaders: Any) -> Any:  # noqa: ANN401
    if isinstance(loaders, Mapping):
        return {name: _own_workers(loader) for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return [_own_workers(loader) for loader in loaders]
    return _without_persistent_workers(loaders)


def _without_persistent_workers(loader: Any) -> Any:  # noqa: ANN401
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    # its only iterator would be started anew under the training's feet
    batching: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if loader.batch_sampler is None:
        batching = {"batch_size": None, "sampler": loader.sampler}
    return DataLoader(
        loader.dataset,
        **batching,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
    )


def _average(optimizer: Optimizer, ranks: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            torch.distributed.all_reduce(grad)
            parameter.grad = grad / ranks
