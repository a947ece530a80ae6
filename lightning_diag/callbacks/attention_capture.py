"""Where does attention go, head by head?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_diag.callbacks.attention_maps import AttentionImages, save_maps
from lightning_diag.callbacks.attention_mode import (
    AttentionMode,
    among_compiled,
    fast_path_kept,
    graph_softmax_seen,
    modules_followed,
)
from lightning_diag.callbacks.attention_names import AttentionNames, checked_names
from lightning_diag.callbacks.attention_rows import AttentionRows
from lightning_diag.callbacks.attention_seen import Limits, Seen
from lightning_diag.callbacks.base import Diagnostic, Interval, OnError
from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.run import run_logger
from lightning_diag.components import Components, Patterns, module_names
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["AttentionCapture"]

_NOTHING = (
    "no attention was seen. Looked for are `F.scaled_dot_product_attention`, "
    "`nn.MultiheadAttention` and the softmax of PyTorch Geometric; a Hugging Face model calls the "
    'first with `attn_implementation="sdpa"` (not "eager", "flash_attention_2" or '
    '"flex_attention"), and a module that computes weights by itself can be named in `capture`.'
)


class AttentionCapture(Diagnostic):
    """Entropy, peaks, sinks and drivers of every attention head, at measured steps alone.

    Seen are calls of `F.scaled_dot_product_attention` however it was imported,
    `nn.MultiheadAttention` with and without weights (and so PyTorch's transformer layers), the
    softmax over edges of PyTorch Geometric's convolutions, and what a module named in `capture`
    hands out. Weights are computed beside the model's own from the same queries, keys and masks:
    as they are before dropout, in single precision or better whatever autocast does (a product in
    TensorFloat-32 where the user has allowed it). Weights that are handed out are taken as they
    are, with their dropout, and every key counts as allowed.

    A row is one query of one example in one head. At most `max_rows` queries and `max_batch`
    examples of a call are looked at, evenly spread, some rows at a time: memory grows with the
    number of keys alone. Rows without an allowed key are left out and counted. With accumulation
    the first micro-batch is seen; on several devices the batch of rank 0. Compiled parts run a
    second time, eagerly; what a module with compiled parts computes by itself beside them, and
    graphs beside them, are left alone. So are layers in evaluation mode that take PyTorch's fast
    path, since looking would change their bits.

    Args:
        components: Component to globs over modules: attention outside of all is not looked at, and
            rows carry the component as ``part``. None: all attention.
        every_n_steps: Optimizer steps between two measurements, or ``"auto"``.
        capture: Name to the glob of a module, whose rows then carry the name and which gets rows by
            query. Where no attention is seen inside, its output is searched for weights: shares of
            one along the last dimension, shape ``(batch, heads, T, S)``, ``(batch, T, S)`` or
            ``(T, S)``. ``module.attribute`` reads them from an attribute after the forward.
        key_names: What the keys stand for: a list of names by a name of `capture`, or by the glob
            of a module.
        query_names: The same for queries. With more queries than names, neighbouring queries form
            as many groups; without names, up to 64 queries have a row each.
        top_keys: How many keys to write with their mean weight.
        max_rows: Queries of a call to look at.
        max_batch: Examples of a call to look at.
        maps: Heads whose sampled maps (64 queries of the first example, 256 groups of keys at most)
            are saved as ``attention/step_XXXXXX.npz`` in the run, and given as images to the
            loggers that take them (TensorBoard, Weights & Biases).
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components`, `capture` or a list of names is of the wrong kind.
        ValueError: If another argument is out of range.

    Rows:
        attention: One for each module that calls attention (a second call within the same forward
            carries ``#2``), and one for the model, in which every head counts alike.
            ``entropy`` (nats, mean over rows), ``entropy_normalized`` (over the logarithm of the
            allowed keys; rows with one key left out), ``max`` (mean of the largest weight),
            ``peaked_share`` (share of rows whose largest weight is above 0.9), ``sink_share``
            (mean weight of key 0; null for graphs, whose edges have no order), ``mean`` (one over
            the allowed keys), ``keys`` (mean number of allowed keys), ``rows`` (looked at),
            ``single`` (rows with one allowed key), ``masked`` (rows without one), ``nonfinite``
            (rows that are no numbers), ``heads``, ``queries``, ``all_keys`` (masked ones too),
            ``source`` (``sdpa``, ``softmax`` of `nn.MultiheadAttention`, ``graph``, ``weights``),
            ``part``, and the number of heads by verdict: ``heads_peaked``, ``heads_uniform``,
            ``heads_sink``, ``heads_duplicate``.
            The model's row also has ``captured``, the number of modules, 0 if nothing was seen.
        attention_head: One for each module and ``head``: the numbers above; ``verdict`` (``sink``:
            key 0 has more than half of the weight; ``peaked``: largest weight above 0.9 on
            average; ``uniform``: normalized entropy above 0.98; ``duplicate``: cosine to another
            head's map above 0.99; or null); ``similarity`` and ``nearest_head`` (that cosine, on 16
            queries of one example); ``key_1``, ``mass_1``, ``name_1`` and so on (the keys with the
            largest mean weight).
        attention_query: For modules that the user has named, one for each ``query`` or group of
            them: ``name``, ``entropy``, ``entropy_normalized``, ``max``, ``mean``, ``std`` (over
            keys, of the mean weights), ``rows``, ``key_1``, ``mass_1``, ``name_1`` and so on.

    Logs:
        For each module under ``attention/<module>/`` and for the model under ``attention/``:
        ``entropy``, ``entropy_normalized``, ``max``, ``peaked_share``, ``sink_share``.

    Example:
        >>> AttentionCapture(capture={"fusion": "fusion_cross_attention"}).every_n_steps
        100
    """

    prefix = "attention"
    logged = frozenset({"entropy", "entropy_normalized", "max", "peaked_share", "sink_share"})

    def __init__(
        self,
        components: Patterns | Components | None = None,
        every_n_steps: Interval = 100,
        capture: Mapping[str, str] | None = None,
        key_names: Mapping[str, Sequence[str]] | None = None,
        query_names: Mapping[str, Sequence[str]] | None = None,
        top_keys: int = 5,
        max_rows: int = 512,
        max_batch: int = 4,
        maps: int = 0,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )
        _check_counts(top_keys=top_keys, max_rows=max_rows, max_batch=max_batch)
        if maps < 0:
            raise ValueError(f"`maps` must be at least 0, got {maps}.")
        self.capture = _checked_capture(capture)
        self.key_names = checked_names("key_names", key_names)
        self.query_names = checked_names("query_names", query_names)
        self.top_keys = top_keys
        self.max_rows = max_rows
        self.max_batch = max_batch
        self.maps = maps
        self._names: AttentionNames | None = None
        self._images = AttentionImages()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for sentence in self._names_in(pl_module).wrong:
            self.note(trainer, sentence, "warning")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.is_due_batch(trainer):
            return
        self.collect(wait=True)
        limits = Limits(self.max_rows, self.max_batch, self.maps)
        seen, step = Seen(self._names_in(pl_module, anew=True), limits), self.step_of(trainer)

        def inside(scope: Scope) -> AbstractContextManager[None]:
            if scope.shadow:
                return self._shadow(scope, seen)
            return self._forward(trainer, step, scope, seen)

        self.watch_forward(pl_module, inside)

    def release(self) -> None:
        super().release()
        self._names = None

    def forget(self) -> None:
        super().forget()
        self._first = True

    # ---- looking ----

    def _names_in(self, pl_module: LightningModule, *, anew: bool = False) -> AttentionNames:
        if self._names is None or anew:
            self._names = AttentionNames(
                module_names(pl_module),
                self.capture,
                self.key_names,
                self.query_names,
                self.components.patterns,
            )
        return self._names

    @contextmanager
    def _forward(self, trainer: Trainer, step: int, scope: Scope, seen: Seen) -> Iterator[None]:
        """Around ``training_step``: looks at what is eager, and then writes down everything."""
        with ExitStack() as stack:
            mode = self._mode(scope, seen)

            def follow(modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
                return self._followed(modules, scope, seen)

            def passed(name: str) -> None:
                seen.passed(name, "PyTorch's fast path in evaluation mode")

            if scope.compiled:
                also = seen.names.captured
                stack.enter_context(among_compiled(mode, scope.modules, also, follow, passed))
            else:
                # the scope leaves out what may take the fast path; here it is told apart
                modules = seen.names.modules
                stack.enter_context(fast_path_kept(mode, modules, follow, passed))
                stack.enter_context(self._graphs(scope, seen))
                stack.enter_context(mode)
            yield
        self.guarded(self._measured_one)(trainer, step, scope, seen)

    @contextmanager
    def _shadow(self, scope: Scope, seen: Seen) -> Iterator[None]:
        with (
            self._followed(scope.modules, scope, seen),
            self._graphs(scope, seen),
            self._mode(scope, seen),
        ):
            yield

    def _mode(self, scope: Scope, seen: Seen) -> AttentionMode:
        def dot_product(*args: Any, **kwargs: Any) -> None:
            if scope.live:
                seen.dot_product(*args, **kwargs)

        def softmax(scores: Tensor, heads: int) -> None:
            if scope.live:
                seen.softmax(scores, heads)

        def other(name: str) -> None:
            seen.passed(seen.caller, f"`{name}`")

        return AttentionMode(self.guarded(dot_product), self.guarded(softmax), self.guarded(other))

    def _graphs(self, scope: Scope, seen: Seen) -> AbstractContextManager[None]:
        def softmax(*args: Any, **kwargs: Any) -> None:
            if scope.live:
                seen.graph_softmax(*args, **kwargs)

        return graph_softmax_seen(scope.modules, self.guarded(softmax))

    def _followed(
        self, modules: Mapping[str, nn.Module], scope: Scope, seen: Seen
    ) -> AbstractContextManager[None]:
        def left(name: str, output: Any) -> None:
            seen.left(name, output if scope.live else None)

        return modules_followed(modules, self.guarded(seen.entered), self.guarded(left))

    # ---- writing ----

    def _measured_one(self, trainer: Trainer, step: int, scope: Scope, seen: Seen) -> None:
        began = self.device_began(trainer.lightning_module.device)
        modules = [(number, one) for (_, number, _), one in seen.modules.items()]
        rows = AttentionRows(modules, self.top_keys)
        names, skipped = seen.names, seen.not_looked_at
        compiled = scope.compiled

        def finish(values: Tensor) -> None:
            rows.finish(values.numpy())
            self._write(trainer, step, rows)
            if self._first:
                self._first = False
                self._tell(trainer, rows, names, skipped, compiled)

        values = rows.pages.together()
        self.read(values, finish, began if values.is_cuda else None)

    def _write(self, trainer: Trainer, step: int, rows: AttentionRows) -> None:
        modules, heads, queries = rows.rows()
        self.report(trainer, modules, step=step)
        for name, some in (("attention_head", heads), ("attention_query", queries)):
            if some:
                self.report(trainer, some, step=step, prefix=name)
        maps = rows.maps() if self.maps and trainer.is_global_zero else {}
        if not maps:
            return
        run = run_logger(trainer)
        if run is not None:
            try:
                save_maps(run, maps, step)
            except OSError as error:
                self.note(trainer, f"the maps of step {step} were not saved: {error}", "warning")
        for failure in self._images.log(trainer, maps, step):
            self.note(trainer, failure, "warning")

    def _tell(
        self,
        trainer: Trainer,
        rows: AttentionRows,
        names: AttentionNames,
        skipped: Mapping[str, set[str]],
        compiled: bool,
    ) -> None:
        """At the first measured step, what was asked for and cannot be seen."""
        if not rows.seen:
            self.note(trainer, _NOTHING, "warning")
        found = {names.name_of(module) for module in rows.seen}
        for name in sorted(names.asked - found):
            target = self.capture[name]
            self.note(
                trainer,
                f"`{target}` of `capture` gave nothing for `{name}`: it was not called, or it "
                "neither called attention nor handed out weights that are shares of one.",
                "warning",
            )
        for sentence in rows.misnamed:
            self.note(trainer, sentence, "warning")
        for why, modules in skipped.items():
            self.note(trainer, f"attention was not looked at ({why}): {_listed(modules)}.")
        if names.outside:
            listed = _listed(names.outside)
            self.note(trainer, f"attention outside `components` was not looked at: {listed}.")
        if compiled:
            self.note(
                trainer,
                "attention over graphs, or that a module computes by itself, is not looked at "
                "beside compiled parts.",
            )


def _listed(names: set[str]) -> str:
    first = sorted(names)[:5]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{name}`" for name in first) + more


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")


def _checked_capture(capture: object) -> dict[str, str]:
    if capture is None:
        return {}
    if not isinstance(capture, Mapping):
        kind = type(capture).__name__
        raise TypeError(f"`capture` must be a mapping of names to globs, got {kind}.")
    for name, target in capture.items():
        for text in (name, target):
            if not isinstance(text, str) or not text:
                raise TypeError(f"`capture` must map names to globs, got {name!r}: {target!r}.")
    return dict(capture)
