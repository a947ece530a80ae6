"""Does the representation keep its dimensions?"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.transforms import PASSED_BY, inside_transform
from lightning_diag.components import module_names, nearest
from lightning_diag.functional.latent_stats import (
    COLUMNS,
    gram_matrix,
    latent_rows,
    latent_values,
    mean_cosine,
    relative_std,
    spectrum,
)
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["LatentStats"]

Pooling = Literal["none", "mean"]

_OUTPUT_ROWS = 256


@dataclass
class _Seen:
    """The representation of one forward pass.

    Attributes:
        step: The step that is measured.
        name: The module that was looked at last.
        latent: What it gave or took.
        positions: Positions of a sequence, where each is a row.
        odd: What it gave instead of a tensor.
        passed_by: Whether it ran inside a transform of `torch.func`.
        output: What the last linear layer gave, and the version that it had then.
    """

    step: int
    name: str | None = None
    latent: Tensor | None = None
    positions: int = 1
    odd: str | None = None
    passed_by: bool = False
    output: tuple[Tensor, int] | None = None


class LatentStats(Diagnostic):
    """Statistics of a representation that show whether it collapses, in whole or in dimensions.

    Looks at what one module returns, or, where none is named, at the input of the last `nn.Linear`
    that runs: in most networks the representation that the head reads. The mean, deviation and norm
    over all elements say nothing of diversity: an encoder that gives the same vector for every
    sample can have the deviation of a healthy one. The deviation of each dimension over the rows,
    the cosine between rows and the effective rank show it.

    A sequence gives a row for each position (`pooling` ``"none"``), padding included; a feature map
    is averaged over its places. Of a tuple, dict or dataclass the first floating tensor is taken;
    of a module that runs several times, the last run. Of compiled parts an eager copy is looked at.
    Looks at the first micro-batch of a measured step, and at rank 0's own data.

    A measured step costs some passes over at most `max_rows` rows, a matrix product of at most
    `rank_rows` of them, one copy of its result (up to `rank_rows` squared numbers) to the host, and
    there its eigenvalues, 2 ms for 256.

    Args:
        module: Name of the module whose output is looked at (``net.encoder``), or None for the
            input of the last linear layer.
        pooling: ``"none"`` or ``"mean"`` over the positions of a sequence.
        max_rows: Most rows to look at, evenly spaced.
        rank_rows: Most rows for the effective rank, which can be no larger than that.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `module` is no text.
        ValueError: If another argument is out of range.

    Rows:
        ``latent.jsonl``, one a measurement (component: the module):

        - ``side``: ``output`` of the named module, or ``input`` of the linear layer.
        - ``rows``, ``features``: vectors looked at, and their dimensions; ``nonfinite``: elements
          that are ``nan`` or infinite (their rows count in nothing but the next four).
        - ``latent_mean``, ``latent_std``, ``latent_min``, ``latent_max``: over all elements; null
          where one is not finite.
        - ``latent_norm``: mean norm of a row.
        - ``std_min``, ``std_mean``: smallest and mean standard deviation of a dimension over the
          rows, each scaled to unit norm; ``std_ratio``: the mean times the root of ``features``,
          about 1 for rows that point everywhere alike, 0 for a collapse.
        - ``mean_cosine``: between two different rows, -1 to 1; 1 for a collapse.
        - ``effective_rank``: exponential of the entropy of the covariance's eigenvalues;
          ``participation``: the squared sum of them over the sum of their squares; 0 where all rows
          are the same. ``rank_limit``: what both can be at most; ``rank_share``: effective rank
          over that. ``top_share``: share of the largest eigenvalue.
        - ``dead_dimensions``: those that vary by less than 1 % of what the most varied tenth does.
        - ``output_features``, ``output_cosine``: dimensions of what the last linear layer gives,
          and the mean cosine between two of at most 256 rows of it; not there where a module is
          named, or where what it gave was written over.

    Logs:
        Under ``latent/<module>/``: ``latent_mean``, ``latent_std``, ``latent_min``, ``latent_max``,
        ``latent_norm``, ``std_min``, ``std_mean``, ``std_ratio``, ``mean_cosine``,
        ``effective_rank``, ``participation``, ``rank_share``, ``dead_dimensions``.

    Example:
        >>> LatentStats("encoder", every_n_steps=200).module
        'encoder'
    """

    prefix = "latent"
    logged = frozenset(
        {
            *("latent_mean", "latent_std", "latent_min", "latent_max", "latent_norm"),
            *("std_min", "std_mean", "std_ratio", "mean_cosine", "dead_dimensions"),
            *("effective_rank", "participation", "rank_share"),
        }
    )

    def __init__(
        self,
        module: str | None = None,
        pooling: Pooling = "none",
        max_rows: int = 4096,
        rank_rows: int = 256,
        every_n_steps: Interval = 50,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if module is not None and not isinstance(module, str):
            raise TypeError(f"`module` must be the name of a module, got {module!r}.")
        if pooling not in ("none", "mean"):
            raise ValueError(f'`pooling` must be "none" or "mean", got {pooling!r}.')
        for name, value in (("max_rows", max_rows), ("rank_rows", rank_rows)):
            if value < 2:
                raise ValueError(f"`{name}` must be at least 2, got {value}.")
        self.module = module
        self.pooling = pooling
        self.max_rows = max_rows
        self.rank_rows = rank_rows
        self._seen: _Seen | None = None
        super().__init__(
            every_n_steps=every_n_steps, on_error=on_error, overhead_budget=overhead_budget
        )

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{{self.module}, {self.every_n_steps}}}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        names = [name for name in module_names(pl_module) if name]
        if self.module is not None and self.module not in names:
            self._said.add("missing")
            near = nearest(self.module, names)
            self.note(trainer, f"there is no module `{self.module}`; {near}.", "warning")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if "missing" not in self._said and self.is_due_batch(trainer):
            self._seen = _Seen(self.step_of(trainer))
            self.watch_forward(pl_module, self._watch_latent)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen, self._seen = self._seen, None
        if seen is not None:
            self._measure(trainer, seen)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def release(self) -> None:
        super().release()
        self._seen = None

    def forget(self) -> None:
        super().forget()
        self._said: set[str] = set()

    # ---- looking ----

    def _watch_latent(self, scope: Scope) -> AbstractContextManager[None]:
        @contextmanager
        def watch() -> Iterator[None]:
            with ExitStack() as stack:
                for name, module in scope.modules.items():
                    handle = self._hook(scope, name, module)
                    if isinstance(handle, ExitStack):
                        stack.enter_context(handle)
                    elif handle is not None:
                        stack.callback(handle.remove)
                yield

        return watch()

    def _hook(self, scope: Scope, name: str, module: nn.Module) -> Any:
        """The hook of one module, where it is the one to look at or may be."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(scope, name, args or kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            self._take(scope, name, output)

        def given(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if self._seen is not None and scope.live and not inside_transform():
                y = _first_tensor(output)
                kept = y is not None and not y.is_inference()
                self._seen.output = (y.detach(), y._version) if y is not None and kept else None

        if self.module is not None:
            # of a compiled module the copy is looked at, which has the same name
            chosen = name == self.module
            return module.register_forward_hook(self.guarded(after)) if chosen else None
        if isinstance(module, nn.Linear):
            with ExitStack() as both:
                hook = module.register_forward_pre_hook(self.guarded(before), with_kwargs=True)
                both.callback(hook.remove)
                hook = module.register_forward_hook(self.guarded(given))
                both.callback(hook.remove)
                return both.pop_all()
        return None

    def _take(self, scope: Scope, name: str, value: object) -> None:
        if self._seen is None or not scope.live:
            return
        if inside_transform():
            self._seen.passed_by = True
            return
        latent = _first_tensor(value)
        self._seen.name = name
        self._seen.odd = type(value).__name__ if latent is None else None
        self._seen.latent = latent = None if latent is None else latent.detach()
        if latent is not None:
            sequence = latent.dim() == 3 and self.pooling == "none"
            self._seen.positions = latent.shape[1] if sequence else 1
        if latent is not None and self.module is not None and latent.numel():
            # whoever takes an output may write into it; the input of a linear layer is kept as is
            self._seen.latent = latent_rows(latent, self.max_rows, self.pooling).clone()

    # ---- measuring ----

    def _measure(self, trainer: Trainer, seen: _Seen) -> None:
        if seen.passed_by and "transform" not in self._said:
            self._said.add("transform")
            self.note(trainer, PASSED_BY)
        x = seen.latent
        if x is None or not x.numel():
            self._say(trainer, seen)
            return
        began = self.device_began(x.device)
        z = latent_rows(x, self.max_rows, self.pooling) if self.module is None else x
        seen.latent = None
        output, seen.output = seen.output, None
        given = self._output_cosine(output, z)
        values = latent_values(z)
        gram = gram_matrix(z, self.rank_rows, seen.positions)
        shape = (z.shape[1], min(len(z), self.rank_rows))
        flat = torch.cat([values, gram.reshape(-1).to(values), given.to(values)])
        self.read(flat, lambda flat: self._write(trainer, seen, shape, flat), began)

    def _output_cosine(self, output: tuple[Tensor, int] | None, z: Tensor) -> Tensor:
        """Features and mean cosine of the layer's output; ``nan`` where it is not known."""
        nothing = torch.full((2,), torch.nan, dtype=z.dtype, device=z.device)
        # whoever takes an output may write into it, and then it is not what the layer gave
        if output is None or output[0]._version != output[1] or not output[0].numel():
            return nothing
        y = latent_rows(output[0], _OUTPUT_ROWS, self.pooling)
        return torch.stack([torch.full_like(nothing[0], y.shape[1]), mean_cosine(y).to(nothing)])

    def _say(self, trainer: Trainer, seen: _Seen) -> None:
        if "nothing" in self._said:
            return
        self._said.add("nothing")
        if seen.odd is not None:
            why = f"`{seen.name}` gives {seen.odd} without a tensor of floating numbers"
        elif seen.latent is not None:
            why = f"`{seen.name}` gives an empty tensor"
        elif seen.passed_by:
            why = "linear layers" if self.module is None else f"`{self.module}`"
            why += " ran inside a transform of `torch.func` alone"
        elif self.module is not None:
            why = f"`{self.module}` did not run in the training step, or cannot be looked into"
        else:
            why = "no linear layer ran in the training step; name a `module`"
        self.note(trainer, f"there is no representation to look at: {why}.", "warning")

    # ---- writing ----

    def _write(self, trainer: Trainer, seen: _Seen, shape: tuple[int, int], flat: Tensor) -> None:
        features, sampled = shape
        values, gram, given = flat[: len(COLUMNS)], flat[len(COLUMNS) : -2], flat[-2:]
        side = min(features, sampled)
        found = spectrum(gram.view(side, side), values[COLUMNS.index("second_moment")])
        ratio = relative_std(values[COLUMNS.index("std_mean")], features)
        beside = [*(x.to(values) for x in found), ratio, *given]
        *numbers, width, cosine = torch.stack([*values, *beside]).tolist()
        named = dict(zip((*COLUMNS, *found._fields, "std_ratio"), numbers, strict=True))
        limit = min(features, sampled - 1)
        row: Row = {
            "component": seen.name or "model",
            "side": "input" if self.module is None else "output",
            "features": features,
            **_row(named),
            "rank_limit": limit,
        }
        rank = row["effective_rank"]
        row["rank_share"] = rank / limit if isinstance(rank, float) and limit else None
        if isfinite(width):
            row["output_features"] = int(width)
            row["output_cosine"] = _number(cosine)
        self.report(trainer, [row], step=seen.step)


def _row(named: Mapping[str, float]) -> Row:
    """The numbers of one measurement by the keys of its row."""
    count = named["count"]
    mean, square = named["sum"] / count, named["sum_sq"] / count
    sound = not named["nonfinite"]
    row: Row = {
        "rows": int(named["rows"]),
        "nonfinite": int(named["nonfinite"]),
        "latent_mean": _number(mean) if sound else None,
        "latent_std": _number(max(square - mean * mean, 0) ** 0.5) if sound else None,
        "latent_min": _number(named["min"]) if sound else None,
        "latent_max": _number(named["max"]) if sound else None,
        "latent_norm": _number(named["norm"]),
    }
    row |= {
        key: _number(named[key])
        for key in (
            *("std_min", "std_mean", "std_ratio", "mean_cosine"),
            *("effective_rank", "participation", "top_share"),
        )
    }
    dead = named["dead_dimensions"]
    return row | {"dead_dimensions": int(dead) if isfinite(dead) else None}


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _first_tensor(value: object) -> Tensor | None:
    """The first floating tensor in whatever a module takes or gives; of a shard, this part."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        plain = value.is_floating_point() and value.layout == torch.strided and not value.is_nested
        return value if plain else None
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
