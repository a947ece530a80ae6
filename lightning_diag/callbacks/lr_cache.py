"""What learning rate, without searching again?"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Diagnostic, OnError, Row
from lightning_diag.functional.lr_range_test import (
    Suggestion,
    learning_rates,
    lr_suggestion,
    smoothed_both_ways,
)
from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.tuning.learning_rate import base_lr, set_base_lr, set_module_lr
from lightning_diag.tuning.lr_key import key_parts
from lightning_diag.tuning.lr_search import Losses, can_search, range_test
from lightning_diag.tuning.lr_store import Entry, LRStore, key_of

__all__ = ["LRCache"]

_FEWEST = 20  # steps of a search: ten to know the noise by, ten to see the loss fall


@dataclass(frozen=True)
class _Result:
    """What is known of the learning rate, by search or from the cache."""

    suggestion: Suggestion
    curve: Mapping[str, Sequence[float]]
    key: str
    age_hours: float | None
    seconds: float


class LRCache(Diagnostic):
    """The learning rate at which the loss falls fastest, searched once and kept for the next run.

    Before the first step a range test trains `num_steps` steps with a learning rate that rises from
    `min_lr` to `max_lr`, and undoes them to the last bit; see `range_test`. Where the loss fell
    fastest is the suggestion, and it is set: in all parameter groups, which keep their ratios, in
    the schedulers, in ``lr`` or ``learning_rate`` of the module and its hyper-parameters. Then the
    run is, bit for bit, the one with that learning rate in its configuration (`CyclicLR` and
    `OneCycleLR`, which divide it, up to rounding). The module's own ``optimizer_step``, where it
    has one, is not called in the search, since it often sets the rate itself.

    The result is kept under a key: what the model, its code, optimizer, batch, precision, data and
    search are (`key_parts`), without seed and learning rate. The next run with this key takes it
    from there in some milliseconds, and of several that start at once one searches and the others
    wait. To fine-tune from several sets of weights, take `values` or another `cache_dir`: weights
    are no part of the key otherwise. Runs with other seeds share a key, and whichever came first
    has searched. A run that is to be repeated without the cache takes the `lr` that
    ``lr_finder.jsonl`` names.

    A search that finds nothing leaves the learning rate as it was, says why, and is not kept.
    Nothing happens on a resumed run, whose learning rate comes from its checkpoint, nor under
    ``fast_dev_run``. Under DDP all ranks search together, on the mean of their losses and
    gradients; where weights are sharded (FSDP) or belong to another engine, none is searched, and
    that is said. Peak memory is that of a training step; a copy of the weights is held on the host
    meanwhile.

    Args:
        cache_dir: Folder of the entries; None for the user's cache folder.
        max_age_hours: Entries older than this are searched anew.
        min_lr: First learning rate of the search.
        max_lr: Last one.
        num_steps: Optimizer steps of the search, at least 20.
        bounds: Smallest and largest learning rate that may be set, as ``[1e-5, 5e-5]``; None for
            the range of the search.
        optimizer: Index in ``trainer.optimizers``, where there are several.
        loss: Name of a logged value that is the loss, where ``training_step`` returns none.
        values: Whether the initial weights are part of the key: then each seed is searched.
        apply: Whether to set what is found; False to record it only.
        refresh: Search even if the cache knows the answer, and replace it.
        every_n_steps: None: it measures once.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Without effect; a search costs what `num_steps` steps cost.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Rows:
        ``lr_finder.jsonl``, one row a fit: ``lr`` (null without a suggestion), ``lr_before``,
        ``applied`` (1 if it was set), ``confidence`` (``high``, ``medium`` or ``none``), ``slope``
        (of the smoothed loss by the logarithm of the learning rate), ``noise`` (standard deviation
        of the loss), ``fall`` (of the smoothed loss), ``reason`` (why none, or what limits it),
        ``points``, ``diverged`` (1 if the search ended before its last learning rate),
        ``cache_hit``, ``age_hours`` (of the entry), ``key``, ``seconds``, ``min_lr``, ``max_lr``,
        ``set`` (attributes of the module that were set), ``optimizer`` (index, where one is named).

        ``lr_finder_curve.jsonl``, one row a learning rate: ``point``, ``lr``, ``loss`` (corrected
        by how much harder than the others its batch was before training), ``smoothed``.

    Logs:
        ``lr_finder/lr``, ``lr_finder/cache_hit``.

    Example:
        >>> LRCache(min_lr=1e-6, bounds=(1e-5, 1e-3)).num_steps
        100

    References:
        Smith (2017), "Cyclical learning rates for training neural networks",
        https://arxiv.org/abs/1506.01186, section 3.3.
    """

    prefix = "lr_finder"
    paced_by_steps = False
    logged = frozenset({"lr", "cache_hit"})

    def __init__(
        self,
        cache_dir: str | Path | None = None,
        max_age_hours: float = 168.0,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_steps: int = 100,
        bounds: Sequence[float] | None = None,
        optimizer: int | None = None,
        loss: str | None = None,
        values: bool = False,
        apply: bool = True,
        refresh: bool = False,
        every_n_steps: None = None,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if not 0 < min_lr < max_lr:
            raise ValueError(
                f"`min_lr` must be above 0 and below `max_lr`, got {min_lr} and {max_lr}."
            )
        if num_steps < _FEWEST:
            raise ValueError(f"`num_steps` must be at least {_FEWEST}, got {num_steps}.")
        if every_n_steps is not None:
            raise ValueError(
                f"`every_n_steps` must be None: it searches once; got {every_n_steps}."
            )
        self.cache_dir, self.max_age_hours = cache_dir, max_age_hours
        self.min_lr, self.max_lr, self.num_steps = min_lr, max_lr, num_steps
        self.bounds = _checked(bounds)
        self.optimizer, self.loss, self.values = optimizer, loss, values
        self.apply, self.refresh = apply, refresh
        self.suggestion: Suggestion | None = None
        self._store = LRStore(cache_dir, max_age_hours)
        self._set: dict[str, float] = {}
        super().__init__(
            None, every_n_steps=None, on_error=on_error, overhead_budget=overhead_budget
        )

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{{self.optimizer}}}"

    # ---- hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None or trainer.global_step > 0:
            self._resume(trainer, pl_module)
            return
        if getattr(trainer, "fast_dev_run", False):
            self.note(trainer, "no learning rate is searched under `fast_dev_run`.")
            return
        if not can_search(trainer):
            self.note(
                trainer,
                "a learning rate is searched on one device and under DDP, and not under "
                f"{type(trainer.strategy).__name__}.",
                "warning",
            )
            return
        if type(pl_module).optimizer_step is not LightningModule.optimizer_step:
            self.note(trainer, "the module's own `optimizer_step` is not called in the search.")
        optimizer = self._chosen(trainer)
        before = base_lr(optimizer, _schedulers(trainer, optimizer))
        result = self._result(trainer, pl_module, optimizer)
        self.suggestion = found = result.suggestion
        done: list[str] = []
        if self.apply and found.lr is not None:
            done = self._apply(trainer, pl_module, optimizer, found.lr)
        self._tell(trainer, result, before)
        self._report(trainer, result, before, done)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "set": dict(self._set)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._set = dict(state_dict["set"])

    # ---- private ----

    def _chosen(self, trainer: Trainer) -> Optimizer:
        count = len(trainer.optimizers)
        if self.optimizer is None and count != 1:
            raise ValueError(
                f"`optimizer` must say which of several optimizers to search for, by its index; "
                f"there are {count}."
            )
        index = self.optimizer or 0
        if not 0 <= index < count:
            raise ValueError(f"`optimizer` must be below the number of them, {count}; got {index}.")
        return trainer.optimizers[index]

    def _result(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> _Result:
        """From the cache, else by a search that others wait for."""
        began = time.perf_counter()
        with ExitStack() as lock:
            mine = self._look_up(trainer, pl_module, optimizer, lock)
            # rank 0's answer to all
            key, parts, entry = trainer.strategy.broadcast(mine)
            if entry is not None:
                return self._of(entry, time.perf_counter() - began)
            lrs = learning_rates(self.min_lr, self.max_lr, self.num_steps)
            losses = range_test(trainer, pl_module, optimizer, lrs, loss=self.loss)
            self.measured()
            result = self._judged(lrs, losses, key, time.perf_counter() - began)
            if trainer.is_global_zero and result.suggestion.lr is not None:
                self._keep(trainer, result, parts)
        return result

    def _look_up(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, lock: ExitStack
    ) -> tuple[str, dict[str, object], Entry | None]:
        if not trainer.is_global_zero:
            return "", {}, None
        try:
            parts = key_parts(
                trainer, pl_module, optimizer, self._search_settings(), values=self.values
            )
            key = key_of(parts)
            entry = None if self.refresh else self._store.read(key)
            if entry is None:
                lock.enter_context(
                    self._store.lock(key, lambda: _say(trainer, "waiting for a run that searches."))
                )
                entry = None if self.refresh else self._store.read(key)
            if entry is None:
                why = self._store.difference(parts)
                reason = f"; the nearest entry differs: {why}" if why else ""
                message = f"no learning rate is kept for key {key[:12]}{reason}; searching."
                _say(trainer, message)
                self.note(trainer, message)
        except Exception as error:
            # the other ranks wait for an answer
            self.note(trainer, f"the cache cannot be used: {error}", "warning")
            return "", {}, None
        return key, parts, entry

    def _search_settings(self) -> dict[str, object]:
        return {
            "min_lr": self.min_lr,
            "max_lr": self.max_lr,
            "num_steps": self.num_steps,
            "bounds": None if self.bounds is None else list(self.bounds),
            "optimizer": self.optimizer,
            "loss": self.loss,
        }

    def _judged(self, lrs: Sequence[float], losses: Losses, key: str, seconds: float) -> _Result:
        values = torch.tensor(losses.compared(), dtype=torch.float64)
        tried = torch.tensor(lrs[: len(values)], dtype=torch.float64)
        suggestion = lr_suggestion(tried, values, spread=losses.spread(), bounds=self.bounds)
        finite = int(values.isfinite().long().cumprod(0).sum())
        smoothed = smoothed_both_ways(values[:finite]).tolist() if finite else []
        curve = {"lr": list(lrs[:finite]), "loss": values[:finite].tolist(), "smoothed": smoothed}
        return _Result(suggestion, curve, key, None, seconds)

    def _of(self, entry: Entry, seconds: float) -> _Result:
        place = int(torch.tensor(entry.curve["lr"]).sub(entry.lr).abs().argmin())
        smoothed = entry.curve["smoothed"]
        found = Suggestion(
            lr=entry.lr,
            place=place,
            slope=entry.slope,
            noise=entry.noise,
            fall=smoothed[0] - min(smoothed),
            confidence=entry.confidence,
            reason="",
        )
        return _Result(found, entry.curve, entry.key, entry.age_hours, seconds)

    def _keep(self, trainer: Trainer, result: _Result, parts: dict[str, object]) -> None:
        found = result.suggestion
        if not result.key or found.lr is None:
            return
        try:
            self._store.write(
                Entry(
                    key=result.key,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                    lr=found.lr,
                    confidence=found.confidence,
                    slope=found.slope,
                    noise=found.noise,
                    parts=parts,
                    curve={name: list(values) for name, values in result.curve.items()},
                    versions={"torch": torch.__version__},
                )
            )
        except (OSError, TypeError, ValueError) as error:
            self.note(trainer, f"what was found cannot be kept: {error}", "warning")

    def _apply(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, lr: float
    ) -> list[str]:
        schedulers = _schedulers(trainer, optimizer)
        before = base_lr(optimizer, schedulers)
        set_base_lr(optimizer, schedulers, lr)
        self._set = {"before": before, "lr": lr}
        return set_module_lr(pl_module, before, lr)

    def _resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer and its schedulers come from the checkpoint, the module's attribute not."""
        if self._set:
            set_module_lr(pl_module, self._set["before"], self._set["lr"])
        self.note(trainer, "no learning rate is searched in a run that is resumed.")

    def _tell(self, trainer: Trainer, result: _Result, before: float) -> None:
        found = result.suggestion
        if found.lr is None:
            self.note(
                trainer,
                f"the search supports no learning rate, {before:g} stays: {found.reason}.",
                "warning",
            )
            return
        source = "searched" if result.age_hours is None else f"kept {result.age_hours:.1f} h ago"
        verb = "is" if self.apply else "would be"
        limits = f"; {found.reason}" if found.reason else ""
        message = (
            f"the learning rate {verb} {found.lr:g} instead of {before:g} ({source}, confidence "
            f"{found.confidence}, key {result.key[:12]}{limits})."
        )
        _say(trainer, message)
        self.note(trainer, message)

    def _report(
        self, trainer: Trainer, result: _Result, before: float, done: Sequence[str]
    ) -> None:
        found, step = result.suggestion, self.step_of(trainer)
        points = len(result.curve["lr"])
        row: Row = {
            "component": None,
            "lr": found.lr,
            "lr_before": before,
            "applied": int(self.apply and found.lr is not None),
            "confidence": found.confidence,
            "slope": found.slope,
            "noise": found.noise,
            "fall": found.fall,
            "reason": found.reason or None,
            "points": points,
            "diverged": int(points < self.num_steps),
            "cache_hit": int(result.age_hours is not None),
            "age_hours": result.age_hours,
            "key": result.key,
            "seconds": result.seconds,
            "min_lr": self.min_lr,
            "max_lr": self.max_lr,
            "set": list(done),
        }
        if self.optimizer is not None:
            row["optimizer"] = self.optimizer
        self.report(trainer, [row], step=step)
        columns = (result.curve["lr"], result.curve["loss"], result.curve["smoothed"])
        curve: list[Row] = [
            {"component": None, "point": place, "lr": lr, "loss": loss, "smoothed": smoothed}
            for place, (lr, loss, smoothed) in enumerate(zip(*columns, strict=True))
        ]
        self.report(trainer, curve, step=step, prefix="lr_finder_curve")


def _schedulers(trainer: Trainer, optimizer: Optimizer) -> list[Any]:
    found = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [one for one in found if getattr(one, "optimizer", None) is optimizer]


def _say(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(f"LRCache: {message}", flush=True)


def _checked(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise ValueError(
            f"`bounds` must be a smallest and a largest learning rate above 0, got {bounds}."
        )
    return float(bounds[0]), float(bounds[1])
