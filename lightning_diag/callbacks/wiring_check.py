"""Is everything connected that should be?"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.optimizers import gradient_scaler, optimizer_index
from lightning_diag.callbacks.segments import number
from lightning_diag.callbacks.transforms import PASSED_BY
from lightning_diag.callbacks.wiring_forward import Cuts, ForwardWatch
from lightning_diag.callbacks.wiring_gradients import Leftovers, SilentParameters
from lightning_diag.callbacks.wiring_losses import LossWatch
from lightning_diag.callbacks.wiring_modes import eval_mode
from lightning_diag.callbacks.wiring_parameters import (
    Book,
    Subject,
    Ties,
    hidden_parameters,
    listed,
    untied_by_config,
)
from lightning_diag.callbacks.wiring_reductions import Reductions, rows_of
from lightning_diag.callbacks.wiring_rows import (
    Look,
    data_rows,
    loss_rows,
    plain_row,
    summary_row,
    zero_rows,
)
from lightning_diag.callbacks.wiring_severed import Severed
from lightning_diag.callbacks.wiring_tensors import Memories, named_tensors
from lightning_diag.callbacks.wiring_values import Moved, Twins, Zeros
from lightning_diag.components import Components, Patterns, module_names
from lightning_diag.functional.wiring_check import data_facts, replica_hash
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["WiringCheck"]

_MARKS = 3
_TENSORS = 16
_SAME_LOSSES = 3
_NOTED_STEPS = 10
_REPLICA_STEPS = 500  # where the interval is automatic, the ranks could not agree on it in time


class WiringCheck(Diagnostic):
    """Whether weights, optimizers, modes, data, targets and replicas are connected as they should.

    It looks at the first steps, and then at each n-th. A look is one batch: the first of an
    optimizer step where gradients are accumulated, a whole ``training_step`` under manual
    optimization. Most of it asks the host alone: who is in which optimizer, whose gradient is
    absent, which module is in evaluation mode, where the graph is cut (forward hooks), how the
    functions of `torch.nn.functional` that make the loss are called (a function mode around the
    step). What needs numbers (the input's scale, non-finite data, the range of targets, gradients
    that are exactly zero) is read with one copy to the host. Between looks, parameters that never
    had a gradient are asked again, at no cost where there are none.

    Where parts are compiled, and where attention in evaluation mode takes its fast path, loss
    functions are seen only if they are modules such as `torch.nn.CrossEntropyLoss`. Data and losses
    are those of the first rank; with replicated data parallelism one collective a look compares a
    hash of every parameter across ranks, and the look waits for the device.

    Args:
        components: The parts to speak of, see `Components`.
        every_n_steps: Optimizer steps between two looks, or ``"auto"``.
        first_steps: Steps at the start that are looked at too.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        TypeError: If `components` is of the wrong kind.
        ValueError: If another argument is out of range.

    Rows:
        ``records/wiring.jsonl``, at every look a row for each check, or for each component in which
        the check found something: ``check``, the id of the rule that judges it (``"all"``: the sum,
        with ``wrong`` and ``unknown``, numbers of checks); ``state``, ``ok``, ``wrong`` or
        ``unknown``; ``kind``, which of several faults, or why it is unknown; ``names``, the first
        of the parameters, modules or tensors concerned. As they apply: ``count`` (parameters,
        elements or modules), ``parameters`` (elements), ``share`` (of all parameters),
        ``component_share`` (of the component's); ``steps`` (optimizer steps watched), ``looks``
        (in a row), ``optimizer`` (its place), ``algorithm`` (its class); ``at`` (place, or loss
        function), ``low``, ``high``, ``mean``, ``std``, ``rms``, ``abs_max`` (of inputs, scores or
        targets), ``value`` (the number that decides), ``input_shape``, ``target_shape``,
        ``classes``, ``samples``, ``from_batch`` (0 or 1: the targets come from it), ``normalized``
        (0 or 1: a normalization comes next), ``loss_finite`` (0 or 1), ``loss``.

    Logs:
        ``wiring/wrong``: the number of checks that found something.

    Example:
        >>> WiringCheck({"encoder": "net.encoder"}, every_n_steps=1000).first_steps
        3
    """

    prefix = "wiring"
    collective_hooks = frozenset({"on_train_batch_start"})
    gathers_replicas = True
    logged = frozenset({"wrong"})

    def __init__(
        self,
        components: Patterns | Components | None = None,
        every_n_steps: Interval = 500,
        first_steps: int = 3,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        if first_steps < 0:
            raise ValueError(f"`first_steps` must be at least 0, got {first_steps}.")
        self.first_steps = first_steps
        self._look: Look | None = None
        self._replicated = False
        self._blind = False
        super().__init__(
            components,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )

    def forget(self) -> None:
        super().forget()
        self._last_look = -1
        self._told_detached = False
        self._told_transform = False
        self._told_silent = False
        self._tells_silent = False
        self._forward: ForwardWatch | None = None
        self._losses: LossWatch | None = None
        self._reductions: Reductions | None = None
        self._severed: Severed | None = None
        self._cuts = Cuts()
        self._silent = SilentParameters()
        self._leftovers = Leftovers()
        self._ties = Ties()
        self._zeros = Zeros()
        self._moved = Moved()
        self._twins = Twins()
        self._stepped: set[int] = set()
        self._still_looks: dict[str, int] = {}
        self._cut_since: dict[str, int] = {}
        self._past: list[tuple[float, tuple[float, ...]]] = []
        self._known_book: Book | None = None

    # ---- hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        self._blind = "DeepSpeedStrategy" in kinds
        copies = "DDPStrategy" in kinds and not self._blind
        # shards of one model are not compared, so that nothing is gathered there
        self._gathers = self._replicated = copies and trainer.world_size > 1
        if stage == "fit":
            self._ties.learn(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._ties.learn(pl_module)
        if self._blind:
            self.note(trainer, "DeepSpeed keeps gradients to itself; none can be seen.", "warning")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._is_look(trainer):
            return
        # first of all, so that nothing that fails on one rank keeps it from the others
        hashes = self._hashes(trainer, pl_module.device) if self._replicated else None
        self.collect(wait=True)
        self._begin(trainer, pl_module, batch)
        if self._look is not None:
            self._look.add("hashes", hashes)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        automatic = pl_module.automatic_optimization
        self._leftovers.backward(self._look is not None, trainer.optimizers, automatic)
        if self._look is not None and "loss" not in self._look.numbers and not automatic:
            self._look.add("loss", loss)
        if self._look is not None and self._reductions is not None:
            sums = self._losses.sums if self._losses is not None else {}
            self._reductions.begins(loss, gradient_scaler(trainer), sums)
        if not loss.requires_grad and not self._told_detached:
            self._told_detached = True
            where = self._forward.cuts if self._forward is not None else Cuts()
            place = next(iter(sorted(where.without_graph)), None)
            names = place or next((f"{a} to {b}" for a, b in where.detached.items()), None)
            row = plain_row("detached_graph", "wrong", "whole loss", names=names, share=1.0)
            self.report(trainer, [row], step=self.step_of(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        index = optimizer_index(trainer, optimizer)
        self._leftovers.step(index, optimizer)
        if self._blind:
            return
        look = self._look
        self._silent.step(index, optimizer, self._who(trainer), anew=look is not None)
        if self._silent.steps.get(index) == _NOTED_STEPS and not self._told_silent:
            self._told_silent = self._tells_silent = True
        if look is not None and index not in self._stepped:
            self._stepped.add(index)
            self._measure_zeros(look, trainer, index)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._look is not None:
            self._end_look(trainer, pl_module, outputs)
            # all ranks must know of a failed one before the next collective
            self.collect(wait=self._replicated)
        elif self._tells_silent:
            self._report_silent(trainer, self.step_of(trainer))
        self._tells_silent = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._silent.watched:
            self._report_silent(trainer, self.step_of(trainer))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            # what was about to be fed to the loss may be why it failed
            if self._look is not None and pl_module.device.type == "cpu":
                self._end_look(trainer, pl_module, None)
        finally:
            super().on_exception(trainer, pl_module, exception)

    def release(self) -> None:
        super().release()
        self._look = None
        self._forward = None
        self._losses = self._reductions = self._severed = None
        self._known_book = None
        self._moved = Moved()
        self._leftovers.release()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "last_look": self._last_look,
            "silent": self._silent.state_dict(),
            "zeros": self._zeros.state_dict(),
            "ties": [list(group) for group in self._ties.groups],
            "past": [(loss, list(facts)) for loss, facts in self._past],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last_look = state_dict["last_look"]
        self._silent.load_state_dict(state_dict["silent"])
        self._zeros.load_state_dict(state_dict["zeros"])
        self._ties = Ties(state_dict["ties"])
        self._past = [(loss, tuple(facts)) for loss, facts in state_dict["past"]]

    # ---- a look ----

    def _is_look(self, trainer: Trainer) -> bool:
        step = self.step_of(trainer)
        due = self.is_due_batch(trainer)
        if self._replicated and self.every_n_steps == "auto":
            due = (step + 1) % _REPLICA_STEPS == 0
        if step == self._last_look or not (due or step < self.first_steps):
            return False
        self._last_look = step
        return True

    def _hashes(self, trainer: Trainer, device: torch.device) -> Tensor:
        weights = list(trainer.lightning_module.parameters())
        return self.gather(lambda: replica_hash(weights), len(weights), device)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._look = look = Look(self.step_of(trainer), self.device_began(pl_module.device))
        self._stepped = set()
        self._known_book = None
        self._leftovers.begin()
        look.modules = modules = module_names(pl_module)
        memories = Memories()
        found = [(name, x) for name, x in named_tensors(batch) if x.layout == torch.strided]
        for name, x in found:
            memories.add(x, name)
        numbers = [(name, x) for name, x in found if x.numel() and x.device == pl_module.device]
        floating = [(name, x) for name, x in numbers if x.is_floating_point() or x.is_complex()]
        whole = [(name, x) for name, x in numbers if not x.is_floating_point()]
        with torch.no_grad():
            look.add("batch", *_facts(floating[:_TENSORS]))
            look.add("whole", *_facts(whole[:_TENSORS]))
            if not self._sharded:
                self._measure_weights(look, trainer)
        self._forward = forward = ForwardWatch(self.guarded)
        suspects = self._suspects(trainer)
        severed = self._severed = Severed(suspects) if suspects else None
        self._losses = losses = LossWatch(self.guarded, memories, severed)
        self._reductions = Reductions(self.guarded)
        look.samples = next((len(x) for _, x in found if x.dim()), 0)

        @contextmanager
        def inside(scope: Scope) -> Iterator[None]:
            with forward.inside(scope), losses.inside(scope):
                try:
                    yield
                finally:
                    look.rows += self._mode_rows(trainer, modules)

        # a second forward of compiled parts would show nothing of the graph
        self.watch_forward(pl_module, inside, shadows=False)

    def _suspects(self, trainer: Trainer) -> dict[int, str]:
        """Parameters that the last step gave no gradient, while it gave others one."""
        subjects = self._book(trainer).subjects
        mine = [x for x in subjects if x.parameter.requires_grad]
        if all(x.parameter.grad is None for x in mine):
            mine = [subject for subject, _ in self._silent.found()] if self._silent.watched else []
        return {id(x.parameter): x.name for x in mine if x.parameter.grad is None}

    def _measure_weights(self, look: Look, trainer: Trainer) -> None:
        book = self._book(trainer)
        learning = [
            subject
            for subject in book.subjects
            if subject.parameter.requires_grad
            and id(subject.parameter) in book.optimized
            and subject.parameter.numel()
        ]
        moved = self._moved.measure(learning, trainer.lightning_module)
        look.add("moved", moved)
        pairs, different = self._twins.measure(look.modules)
        look.add("twins", different, pairs)

    def _measure_zeros(self, look: Look, trainer: Trainer, index: int) -> None:
        if self._sharded or self._blind or not 0 <= index < len(trainer.optimizers):
            return
        book = self._book(trainer)
        trainable = {key: one for key, one in book.by_id.items() if one.parameter.requires_grad}
        names, largest = self._zeros.measure(trainer.optimizers[index], trainable)
        look.add(f"zeros_{index}", largest, names)

    def _end_look(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        look, forward, losses = self._look, self._forward, self._losses
        self._look = None
        if look is None or forward is None or losses is None:
            return
        automatic = pl_module.automatic_optimization
        if automatic and 0 not in self._stepped:
            self._measure_zeros(look, trainer, 0)
        self._leftovers.end()
        if (forward.passed_by or losses.passed_by) and not self._told_transform:
            self._told_transform = True
            self.note(trainer, PASSED_BY)
        if forward.cuts.ran:
            self._cuts = forward.cuts
            self._cuts.severed = self._severed.places if self._severed is not None else {}
        self._severed = None
        book = self._book(trainer)
        if book.by_id.keys() != {id(parameter) for parameter in pl_module.parameters()}:
            # a layer was replaced since the last look
            book = self._known_book = Book(self.parts(trainer, anew=True), trainer.optimizers)
        if automatic:
            look.add("loss", _loss_of(outputs))
        entries = [
            (_part_of(book, name), name, e.normalized) for name, e in forward.entries.items()
        ]
        if entries:
            facts = torch.cat([e.facts for e in forward.entries.values()])
            look.add("entries", facts, entries)
        calls = losses.calls
        if calls:
            look.add("calls", torch.stack([call.facts for call in calls]))
        reductions = self._reductions or Reductions(self.guarded)
        look.add("reductions", reductions.numbers())
        for index, value in self._leftovers.values.items():
            look.add(f"left_{index}", value)
        look.rows += self._optimizer_rows(book, look.modules)
        look.rows += self._silent_rows(book)
        look.rows += self._lately_cut_rows(book, look.step) if automatic else []
        look.rows += self._tie_rows(pl_module, look.modules)
        left = (set(self._leftovers.closed), set(self._leftovers.clean))
        parts = trainer.accumulate_grad_batches if automatic else 1
        names = [type(optimizer).__name__ for optimizer in trainer.optimizers] or [""]
        learning = _learning(trainer)

        def then(values: Tensor) -> None:
            read = look.unpacked(values.tolist())
            loss = read["loss"][0] if "loss" in read else None
            rows = look.rows + data_rows(look, read, loss)
            rows += loss_rows(calls, read)
            numbers = read.get("reductions", [])
            rows += rows_of(reductions.found, numbers, look.samples, parts, names[0])
            rows += self._value_rows(book, look, read)
            rows += self._left_rows(book, read, left, trainer)
            rows += self._loss_value_rows(read, loss, learning)
            rows += self._replica_rows(trainer, read)
            self.report(trainer, [*rows, summary_row(rows)], step=look.step)

        self._forward = self._losses = self._reductions = None
        self.read(look.packed(pl_module.device), then, look.began)

    def _report_silent(self, trainer: Trainer, step: int) -> None:
        """Between looks, the host's own knowledge of parameters without a gradient."""
        rows = self._silent_rows(self._book(trainer))
        wrong = [row for row in rows if row["state"] == "wrong" and row["kind"] != "zero"]
        # once a step is made, Lightning counts the next one
        made = trainer.lightning_module.automatic_optimization and step > 0
        if wrong:
            self.report(trainer, wrong, step=step - made)

    # ---- rows ----

    def _optimizer_rows(self, book: Book, modules: Mapping[str, nn.Module]) -> list[Row]:
        if self._blind:
            checks = ("unoptimized_parameter", "frozen_in_optimizer")
            return [plain_row(check, "unknown", "DeepSpeed") for check in checks]
        rows: list[Row] = []
        loose = book.unoptimized()
        wanting = [one for one in loose if one.parameter.grad is not None]
        resting = [one for one in loose if one.parameter.grad is None]
        more: dict[str, Any] = {"value": float(book.strangers)}
        rows += book.rows("unoptimized_parameter", wanting, kind="gradient", **more)
        rows += book.rows("unoptimized_parameter", resting, kind="no gradient", **more)
        hidden = hidden_parameters(modules, {*book.by_id, *book.optimized})
        if hidden:
            size = sum(one.numel() for _, one in hidden)
            row = plain_row("unoptimized_parameter", "wrong", "not registered", **more)
            row |= {"count": len(hidden), "parameters": size, "share": size / (size + book.total)}
            rows.append(row | {"names": listed([name for name, _ in hidden])})
        if not rows:
            rows.append(plain_row("unoptimized_parameter", "ok", count=0, **more))
        frozen = book.frozen_in_optimizer()
        moving = [one for one in frozen if one.parameter.grad is not None]
        still = [one for one in frozen if one.parameter.grad is None]
        found = book.rows("frozen_in_optimizer", moving, kind="gradient left")
        found += book.rows("frozen_in_optimizer", still, kind="no gradient")
        return rows + (found or [plain_row("frozen_in_optimizer", "ok", count=0)])

    def _silent_rows(self, book: Book) -> list[Row]:
        if self._blind or not self._silent.watched:
            return [plain_row("unused_parameter", "unknown", "no step was watched")]
        unused: dict[tuple[int, str], list[Subject]] = {}
        cut: dict[tuple[int, str], list[Subject]] = {}
        places: dict[tuple[int, str], str] = {}
        for subject, steps in self._silent.found():
            module = subject.name.rpartition(".")[0]
            place = self._cuts.place(module, subject.name)
            kind = self._cuts.kind(module)
            if place is None:
                unused.setdefault((steps, kind), []).append(subject)
            else:
                # one cut lies in front of all that comes before it
                places.setdefault((steps, subject.component), place)
                cut.setdefault((steps, subject.component), []).append(subject)
        rows: list[Row] = []
        for (steps, kind), subjects in unused.items():
            rows += book.rows("unused_parameter", subjects, kind=kind, steps=steps)
        for key, subjects in cut.items():
            more = {"steps": key[0], "at": places[key]}
            rows += book.rows("detached_graph", subjects, kind="cut", **more)
        zeros = zero_rows(book, self._zeros.looks, book.subjects)
        if not unused and not zeros:
            rows.append(plain_row("unused_parameter", "ok", count=0))
        return rows + zeros

    def _lately_cut_rows(self, book: Book, step: int) -> list[Row]:
        """Parameters that had a gradient once and have none now, behind a cut that is seen."""
        never = {subject.name for subject, _ in self._silent.found()}
        cut: dict[str, str] = {}
        for subject in book.subjects:
            parameter = subject.parameter
            mine = parameter.requires_grad and id(parameter) in book.optimized
            if mine and parameter.grad is None and subject.name not in never:
                place = self._cuts.place(subject.name.rpartition(".")[0], subject.name)
                if place is not None:
                    cut[subject.name] = place
        self._cut_since = {name: self._cut_since.get(name, step) for name in cut}
        groups: dict[tuple[int, str], list[Subject]] = {}
        places: dict[tuple[int, str], str] = {}
        for subject in book.subjects:
            if subject.name in cut:
                key = (step - self._cut_since[subject.name], subject.component)
                places.setdefault(key, cut[subject.name])
                groups.setdefault(key, []).append(subject)
        rows: list[Row] = []
        for key, subjects in groups.items():
            more = {"steps": max(1, key[0]), "at": places[key]}
            rows += book.rows("detached_graph", subjects, kind="cut", **more)
        return rows

    def _mode_rows(self, trainer: Trainer, modules: Mapping[str, Any]) -> list[Row]:
        book = self._book(trainer)
        rows = []
        for kind, found in zip(
            ("container", "layer"), eval_mode(modules, book.optimized), strict=True
        ):
            parts: dict[str | None, list[str]] = {}
            for name, _ in found:
                parts.setdefault(_part_of(book, name), []).append(name or "the whole model")
            for component, names in parts.items():
                row = plain_row("eval_mode_in_training", "wrong", kind, count=len(names))
                rows.append(row | {"component": component, "names": listed(names)})
        return rows or [plain_row("eval_mode_in_training", "ok", count=0)]

    def _tie_rows(self, pl_module: LightningModule, modules: Mapping[str, nn.Module]) -> list[Row]:
        rows = []
        for kind, pairs in (
            ("came apart", self._ties.broken(pl_module)),
            ("not tied", untied_by_config(modules)),
        ):
            if pairs:
                names = listed([f"{one} and {other}" for one, other in pairs])
                rows.append(
                    plain_row("tied_weight_broken", "wrong", kind, count=len(pairs), names=names)
                )
        return rows or [plain_row("tied_weight_broken", "ok", count=len(self._ties.groups))]

    def _value_rows(self, book: Book, look: Look, read: Mapping[str, list[float]]) -> list[Row]:
        rows: list[Row] = []
        for name, members in look.names.items():
            if name.startswith("zeros_"):
                self._zeros.learn(members, read[name])
        pairs = look.names.get("twins", [])
        if pairs:
            apart = [p for p, other in zip(pairs, read["twins"], strict=True) if other]
            apart = [pair for pair in apart if pair in self._twins.equal]
            self._twins.learn(pairs, read["twins"])
            if apart:
                words = listed([f"{one} and {other}" for one, other in apart])
                rows.append(plain_row("tied_weight_broken", "wrong", "drifted", names=words))
        if "moved" in read:
            silent = {subject.name for subject, _ in self._silent.found()}
            still = [
                subject
                for subject, count in zip(self._moved.subjects, read["moved"], strict=True)
                if not count and subject.parameter.requires_grad and subject.name not in silent
            ]
            looks = {x.name: self._still_looks.get(x.name, 0) + 1 for x in still}
            self._still_looks = looks
            for count in sorted(set(looks.values())):
                members = [x for x in still if looks[x.name] == count]
                rows += book.rows("frozen_weights", members, kind="same values", looks=count)
            if not still:
                rows.append(plain_row("frozen_weights", "ok", count=0))
        return rows

    def _left_rows(
        self,
        book: Book,
        read: Mapping[str, list[float]],
        windows: tuple[set[int], set[int]],
        trainer: Trainer,
    ) -> list[Row]:
        closed, clean = windows
        rows = []
        for index in sorted(closed):
            left = read.get(f"left_{index}")
            if index not in clean and left is None:
                continue
            wrong = index not in clean and left is not None and left[0] != 0
            row = plain_row("missing_zero_grad", "wrong" if wrong else "ok", optimizer=index)
            rows.append(row | {"value": number(left[0]) if wrong and left else 0.0})
        nothing = "no window between two steps was seen whole"
        return rows or [plain_row("missing_zero_grad", "unknown", nothing)]

    def _loss_value_rows(
        self, read: Mapping[str, list[float]], loss: float | None, learning: bool
    ) -> list[Row]:
        if loss is None or not isfinite(loss):
            return []
        facts = tuple(
            number(value) or 0.0 for name in ("batch", "whole") for value in read.get(name, [])
        )
        self._past = [*self._past, (loss, facts)][-_SAME_LOSSES:]
        same = len({value for value, _ in self._past}) == 1
        others = len({kept for _, kept in self._past}) > 1
        wrong = len(self._past) == _SAME_LOSSES and same and others and learning
        if not wrong:
            return []
        row = plain_row("detached_graph", "wrong", "constant loss", looks=_SAME_LOSSES, loss=loss)
        return [row]

    def _replica_rows(self, trainer: Trainer, read: Mapping[str, list[float]]) -> list[Row]:
        if not self._replicated:
            alone = "one device" if trainer.world_size == 1 else "weights are cut into shards"
            return [
                plain_row("replica_drift", "unknown" if trainer.world_size > 1 else "ok", alone)
            ]
        values, ranks = read["hashes"], trainer.world_size
        width = len(values) // ranks
        table = [values[rank * width :][:width] for rank in range(ranks)]
        self.all_well([mark for row in table for mark in row[-_MARKS:]])
        book = self._book(trainer)
        weights = list(trainer.lightning_module.parameters())
        apart = [
            book.subject(weight)
            for place, weight in enumerate(weights)
            if len({row[place] for row in table}) > 1
        ]
        if not apart:
            return [plain_row("replica_drift", "ok", count=0)]
        return book.rows("replica_drift", apart, kind="weights")

    # ---- who is who ----

    def _book(self, trainer: Trainer) -> Book:
        if self._known_book is None:
            book = Book(self.parts(trainer), trainer.optimizers)
            if book.strangers:
                # parameters came to the model after training began
                book = Book(self.parts(trainer, anew=True), trainer.optimizers)
            self._known_book = book
        return self._known_book

    def _who(self, trainer: Trainer) -> Callable[[Parameter], Subject]:
        return lambda parameter: self._book(trainer).subject(parameter)


def _part_of(book: Book, module: str) -> str | None:
    """The component that holds a module; None where several do, or none."""
    parts = {
        subject.component
        for subject in book.subjects
        if not module or subject.name.startswith(f"{module}.")
    }
    return parts.pop() if len(parts) == 1 else None


def _facts(named: list[tuple[str, Tensor]]) -> tuple[Tensor | None, list[str]]:
    if not named:
        return None, []
    return data_facts([x for _, x in named]), [name for name, _ in named]


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach().reshape(-1)[:1] if isinstance(loss, Tensor) else None


def _learning(trainer: Trainer) -> bool:
    # a rate that is a tensor is not read for this
    rates = [group.get("lr", 1) for one in trainer.optimizers for group in one.param_groups]
    return all(isinstance(rate, Tensor) or rate > 0 for rate in rates)
