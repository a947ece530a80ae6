"""Are units dead or saturated?"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lightning_diag.callbacks.activation_health_forward import Fate, activation_calls
from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.transforms import PASSED_BY
from lightning_diag.components import Components, Patterns, matches, nearest
from lightning_diag.functional.activation_health import (
    COLUMNS,
    Activity,
    activity_table,
    idle_update,
    merge_activity,
)
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["ActivationHealth"]

_MOST_CALLS = 4
_DEAD = frozenset({"relu", "relu6", "gelu", "silu", "mish", "hardswish"}) | frozenset(
    {"elu", "selu", "celu", "softplus"}
)
_SATURATED = frozenset({"relu6", "tanh", "sigmoid", "hardtanh", "hardsigmoid"})


@dataclass
class _Forward:
    """What one measured forward pass has shown so far."""

    trainer: Trainer
    step: int
    calls: dict[str, int] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    activities: dict[str, Activity] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    fates: dict[str, list[Fate]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)


class ActivationHealth(Diagnostic):
    """Dead and saturated shares of every activation function that runs, by the module it runs in.

    A unit is a feature (last dimension) or a channel (behind a convolution). It is dead in a
    measurement when its activation is switched off for every sample and position of the batch:
    exactly zero for ReLU, deep in the flat negative tail for GELU, SiLU and their like. A batch may
    lack what a unit looks for, so a unit counts as dead only after `window` such measurements in a
    row. That half of a ReLU's outputs are zero is healthy, and shows in ``zero_share`` alone. A
    saturated unit of tanh or sigmoid lies at its ends for every sample.

    Modules (`nn.ReLU` and so on, and modules of others whose class is named after GELU, SiLU or
    Swish) and plain functions (`F.relu`, `torch.tanh`, ``x.sigmoid()`` and so on) are seen. A
    function belongs to the innermost module whose forward is running. A module that is called
    several times in a forward has a row for each call: ``act``, ``act#2`` and so on; the fourth
    takes all that follow. Of compiled parts an eager copy is looked at; the functions that such a
    model calls outside of its compiled parts are not seen. Not seen either: gates inside `nn.LSTM`
    and other fused kernels.

    Looks at the first micro-batch of a measured step, on rank 0's own data, in the precision in
    which the forward runs. A measured step costs about five passes over what activation functions
    take and return, and one copy to the host; no activation is kept. The memory over measurements
    is one number a unit, on the device.

    Args:
        components: The parts of the model, see `Components`; each row says to which it belongs.
        modules: Globs over names of modules (``encoder.*``), to look at these only; None for all.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        window: Measurements in a row after which a unit without activity is dead.
        saturation: Output of tanh (in magnitude) and sigmoid (1 minus this at the lower end) from
            which on they are saturated.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components` or `modules` is of the wrong kind.
        ValueError: If another argument is out of range.

    Rows:
        ``activation.jsonl``, one a call of an activation function (component: the module's name)
        and one of all together (component null):

        - ``part``: the component that the module belongs to; ``function``: ``relu``, ``gelu``, ...
        - ``calls``: how many calls are in the row.
        - ``count``, ``nonfinite``: elements of the output, and those ``nan`` or infinite.
        - ``mean``, ``std``, ``rms``, ``min``, ``max``: of the output; null where an element is not
          finite.
        - ``units``: features or channels.
        - ``zero_share``: share of elements that are switched off, 0 to 1 (ReLU: exactly zero).
        - ``dead_now``: share of units that are switched off for the whole batch.
        - ``dead_share``, ``dead_units``: share and number of those that were so in the last
          `window` measurements; null before there are so many.
        - ``saturated_share``: share of elements that are saturated; ``saturated_units``: share of
          units that are so for the whole batch.
        - ``last``: 1 if no layer that learns ran after it, so that it is an output; and
          ``last_of_part``: none of the same component. ``gate``: 1 if a sigmoid's output was
          multiplied with another tensor; null for other functions, and where that is not seen.

        What a function cannot be (a tanh is never dead) is null. The row of all together has
        ``modules``, ``count``, ``units``, ``nonfinite``, ``zero_share``, ``dead_now``,
        ``dead_share``, ``dead_units``, ``saturated_share``, ``saturated_units`` and
        ``most_dead``, ``most_saturated``: the names of the worst.

    Logs:
        ``dead_share``, ``saturated_share`` and ``zero_share`` under ``activation/<module>/`` and
        under ``activation/``.

    Example:
        >>> ActivationHealth(modules="encoder.*", every_n_steps=200).window
        5
    """

    prefix = "activation"
    logged = frozenset({"dead_share", "saturated_share", "zero_share"})

    def __init__(
        self,
        components: Patterns | Components | None = None,
        modules: str | Sequence[str] | None = None,
        every_n_steps: Interval = 100,
        window: int = 5,
        saturation: float = 0.97,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"`window` must be at least 1, got {window!r}.")
        if not 0.5 < saturation < 1:
            raise ValueError(f"`saturation` must lie between 0.5 and 1, got {saturation}.")
        self.modules = modules
        self.window = window
        self.saturation = saturation
        self._globs = _globs(modules)
        self._forward: _Forward | None = None
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.is_due_batch(trainer):
            self._forward = _Forward(trainer, self.step_of(trainer))
            self.watch_forward(pl_module, self._watch_calls)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        forward, self._forward = self._forward, None
        if forward is not None:
            self._measure(forward)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def release(self) -> None:
        super().release()
        self._forward = None

    def forget(self) -> None:
        super().forget()
        self._idle: dict[str, Tensor] = {}
        self._looks: dict[str, int] = {}
        self._said: set[str] = set()
        self._times: list[tuple[Any, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "idle": {name: idle.clone() for name, idle in self._idle.items()},
            "looks": dict(self._looks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._idle = {name: idle.clone() for name, idle in state_dict["idle"].items()}
        self._looks = dict(state_dict["looks"])

    # ---- looking ----

    def _watch_calls(self, scope: Scope) -> AbstractContextManager[None]:
        if self._forward is not None and scope.fast_path:
            self._forward.remarks.append(
                "a transformer layer in evaluation mode takes a fused kernel that is left alone: "
                "only activation modules outside of such layers are seen."
            )
        elif self._forward is not None and scope.compiled and not scope.shadow:
            self._forward.remarks.append(
                "the model has compiled parts: outside of them, activation functions that are no "
                "modules are not seen."
            )
        return activation_calls(
            scope,
            self._take,
            self.saturation,
            guard=self.guarded,
            timed=self._timed,
            passed_by=self._pass_by,
        )

    def _pass_by(self) -> None:
        if self._forward is not None and PASSED_BY not in self._forward.remarks:
            self._forward.remarks.append(PASSED_BY)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        began = self.device_began(device)
        yield
        if began is not None:
            self._times.append((began, self.device_began(device)))

    def _take(self, name: str, function: str, found: Activity, fate: Fate) -> None:
        forward = self._forward
        if forward is None:
            return
        if not self._chosen(name):
            forward.others.add(name)
            return
        calls = forward.calls[name] = forward.calls.get(name, 0) + 1
        place = min(calls, _MOST_CALLS)
        key = name if place == 1 else f"{name}#{place}"
        before = forward.activities.get(key)
        if before is not None:
            same = before.flatness.dead_units.shape == found.flatness.dead_units.shape
            if not same or forward.functions[key] != function:
                return
            found = merge_activity(before, found)
        forward.activities[key] = found
        forward.functions[key] = function
        forward.merged[key] = forward.merged.get(key, 0) + 1
        forward.fates.setdefault(key, []).append(fate)

    def _chosen(self, name: str) -> bool:
        return self._globs is None or any(matches(name, glob) for glob in self._globs)

    # ---- measuring ----

    def _measure(self, forward: _Forward) -> None:
        for remark in forward.remarks:
            self._say(forward.trainer, remark, "info")
        if not forward.activities:
            self._say(forward.trainer, self._nothing(forward), "warning")
            return
        device = next(iter(forward.activities.values())).flatness.flat.device
        began = self.device_began(device)
        found = []
        for key, one in forward.activities.items():
            dead = one.flatness.dead_units
            idle = self._idle.get(key)
            if idle is None or idle.shape != dead.shape:
                idle, self._looks[key] = None, 0
            elif idle.device != dead.device:
                # resumed from a checkpoint
                idle = idle.to(dead.device)
            self._idle[key] = idle_update(idle, dead)
            self._looks[key] += 1
            found.append((one, self._idle[key]))
        table = activity_table(found, self.window)
        names = list(forward.activities)
        looks = [self._looks[name] for name in names]
        times, self._times = self._times, []
        forward.activities.clear()

        def finish(table: Tensor) -> None:
            self._device_seconds += sum(a.elapsed_time(b) for a, b in times) / 1000
            self._write(forward, names, looks, table.tolist())

        self.read(table, finish, began)

    def _nothing(self, forward: _Forward) -> str:
        if self._globs is None or not forward.others:
            return "no activation function was seen in the forward pass; nothing is measured."
        globs = ", ".join(f"`{glob}`" for glob in self._globs)
        near = nearest(self._globs[0], sorted(forward.others))
        return f"`modules` {globs} match no module with an activation function; {near}."

    def _say(self, trainer: Trainer, message: str, severity: Any) -> None:
        if message not in self._said:
            self._said.add(message)
            self.note(trainer, message, severity)

    # ---- writing ----

    def _write(
        self, forward: _Forward, names: list[str], looks: list[int], table: list[list[float]]
    ) -> None:
        owners = self._owners(forward.trainer)
        rows = []
        for name, times, values in zip(names, looks, table, strict=True):
            known = times >= self.window
            row = _row(dict(zip(COLUMNS, values, strict=True)), forward.functions[name], known)
            part = _owner(name.partition("#")[0], owners)
            calls = {"calls": forward.merged[name]}
            place = _place(forward.fates[name], part, owners)
            rows.append({"component": name, "part": part, **calls, **row, **place})
        self.report(forward.trainer, [*rows, _whole(rows)], step=forward.step)

    def _owners(self, trainer: Trainer) -> dict[str, str]:
        """Outermost modules to the component that they belong to."""
        return {
            module: component
            for component, modules in self.parts(trainer).modules.items()
            for module in modules
        }


def _row(values: dict[str, float], function: str, known: bool) -> Row:
    """The numbers of one call; `known` tells whether the window is full."""
    count, units = values["count"], values["units"]
    mean, square = values["sum"] / count, values["sum_sq"] / count
    sound = not values["nonfinite"]
    row: Row = {"function": function, "count": int(count), "nonfinite": int(values["nonfinite"])}
    row |= {
        "mean": _sound(mean, sound),
        "std": _sound(max(square - mean * mean, 0) ** 0.5, sound),
        "rms": _sound(square**0.5, sound),
        "min": _sound(values["min"], sound),
        "max": _sound(values["max"], sound),
        "units": int(units),
    }
    can_die = function in _DEAD
    row |= {
        "zero_share": values["flat"] / count if can_die else None,
        "dead_now": values["dead_now"] / units if can_die else None,
        "dead_share": values["dead"] / units if can_die and known else None,
        "dead_units": int(values["dead"]) if can_die and known else None,
    }
    saturates = function in _SATURATED
    return row | {
        "saturated_share": values["saturated"] / count if saturates else None,
        "saturated_units": values["saturated_units"] / units if saturates else None,
    }


def _place(fates: Sequence[Fate], part: str | None, owners: dict[str, str]) -> Row:
    """Whether the output leaves the model, or its part, and whether it opens and shuts others."""
    followers = {name for fate in fates for name in fate.followers}
    own = any(_owner(name, owners) == part for name in followers)
    gates = [fate.gate for fate in fates if fate.gate is not None]
    return {
        "last": int(not followers),
        "last_of_part": int(not own),
        "gate": int(any(gates)) if gates else None,
    }


def _sound(value: float, sound: bool) -> float | None:
    return value if sound and isfinite(value) else None


def _whole(rows: Sequence[Row]) -> Row:
    """All activation functions together, each weighted by its elements or units."""
    whole: Row = {"component": None, "modules": len(rows)}
    for key in ("count", "units", "nonfinite", "dead_units"):
        known = [row[key] for row in rows if row[key] is not None]
        whole[key] = sum(known) if known or key != "dead_units" else None  # type: ignore[arg-type]
    for key, weight in (
        *(("zero_share", "count"), ("dead_now", "units"), ("dead_share", "units")),
        *(("saturated_share", "count"), ("saturated_units", "units")),
    ):
        whole[key] = _mean(rows, key, weight)
    for key, share in (("most_dead", "dead_share"), ("most_saturated", "saturated_share")):
        worst = max(rows, key=lambda row: row[share] or 0.0)  # type: ignore[arg-type, return-value]
        if worst[share]:
            whole[key] = worst["component"]
    return whole


def _mean(rows: Sequence[Row], key: str, weight: str) -> float | None:
    known = [(row[key], row[weight]) for row in rows if row[key] is not None]
    total = sum(size for _, size in known)  # type: ignore[misc]
    return sum(share * size for share, size in known) / total if total else None  # type: ignore


def _globs(modules: str | Sequence[str] | None) -> list[str] | None:
    if modules is None:
        return None
    listed = [modules] if isinstance(modules, str) else list(modules)
    if not all(isinstance(glob, str) for glob in listed):
        raise TypeError(f"`modules` must be globs over names of modules, got {modules!r}.")
    if not listed or not all(listed):
        raise ValueError(f"`modules` must have at least one glob, got {modules!r}.")
    return listed


def _owner(name: str, owners: dict[str, str]) -> str | None:
    while name:
        if name in owners:
            return owners[name]
        name = name.rpartition(".")[0]
    return None
