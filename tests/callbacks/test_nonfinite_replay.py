"""Is the operation that broke a step named, and is the training as if nobody had looked?"""

import contextlib
import copy
import json
import os
import random
import signal
import threading
import time
import weakref
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.callbacks.collapse_window import Window
from lightning_diag.callbacks.nonfinite_replay import NonfiniteReplay
from lightning_diag.callbacks.nonfinite_replay_numbers import range_of
from lightning_diag.lightning import Callback
from tests.callbacks.collapse_plan import Delayed
from tests.callbacks.nonfinite_models import (
    INF,
    NAN,
    ODD,
    STEPS,
    Broken,
    BrokenByHand,
    BrokenTransformer,
    data,
    train_ranked,
)
from tests.callbacks.witness import fit, rows, scaler_plugin
from tests.promises import trace
from tests.promises.processes import needs_fork, run_ranks

DEEP = "body.2.1"


def train(
    module, path, loader=None, *, kind=CollapseStop, before=(), after=(), own=None, **options
):
    own = {"action": "warn", "on_error": "raise", **(own or {})}
    trace.seed()
    return fit(module, [*before, kind(**own), *after], loader or data(), path, **options)


class Late(Delayed):
    """Knows of a step when it has been made, as it does on a CUDA device."""

    def _replay_early(self, *_):
        pass


def found(path):
    (row,) = rows(path, "nonfinite")
    return row


def spoils(function):
    """Let the first column of a part become what `function` makes of it, the rest stay."""

    def spoil(x):
        return torch.cat([function(x[:, :1]), x[:, 1:]], 1)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "op", "low", "high"),
    [
        (lambda x: torch.log(x * 0), "aten.log", 0, 0),
        (lambda x: (x * 0) / (x * 0), "aten.div", 0, 0),
        (lambda x: x / (x * 0), "aten.div", None, None),
        (lambda x: torch.sqrt(-1 - x.abs()), "aten.sqrt", None, None),
        (lambda x: torch.exp(x * 0 + 100) - torch.exp(x * 0 + 100), "aten.exp", 100, 100),
        (lambda x: torch.acos(x * 0 + 2), "aten.acos", 2, 2),
        (lambda x: ((x * 0 + 300).half() * 300).float(), "aten.mul", 300, 300),
        (lambda x: (x * 0 + 1e5).half().float(), "aten._to_copy", 1e5, 1e5),
        (lambda x: x.new_zeros(0).mean() + x, "aten.mean", None, None),
        (lambda x: x.masked_fill(x == x, -INF).softmax(1), "aten._softmax", None, None),
        (lambda x: torch.where(x == x, -INF, x).logsumexp(1, True) * 0, "aten.mul", None, None),
    ],
    ids=[
        *("log of 0", "0 by 0", "by 0", "root of less", "inf - inf", "acos", "half product"),
        *("half cast", "mean of nothing", "masked softmax", "masked logsumexp"),
    ],
)
def test_forward(tmp_path, spoil, op, low, high):
    train(Broken(spoils(spoil)), tmp_path)
    row = found(tmp_path)
    assert (row["step"], row["batch_idx"], row["reason"]) == (ODD, ODD, "op")
    assert (row["module"], row["op"], row["direction"]) == (DEEP, op, "forward")
    assert row["output_nan"] or row["output_inf"]
    assert row["reproduced"] is True
    assert row["weights"] == "same"
    assert "test_nonfinite_replay.py" in row["line"]
    assert row["message"].startswith("The first ")
    if low is not None:
        assert (row["input_min"], row["input_max"]) == (low, high)


@pytest.mark.parametrize(
    ("spoil", "node", "low", "high"),
    [
        (lambda x: torch.sqrt(x * 0), "SqrtBackward0", 0, 0),
        (lambda x: torch.where(x > 9, (x * 0).log(), x), "LogBackward0", 0, 0),
        (lambda x: torch.linalg.vector_norm(x * 0, dim=1, keepdim=True) ** 0.5, "Pow", 0, 0),
        (lambda x: (x * 0).pow(0.5), "PowBackward0", 0, 0),
        (lambda x: torch.acos(x * 0 + 1), "AcosBackward0", 1, 1),
    ],
    ids=["sqrt", "log behind where", "norm", "pow", "acos"],
)
def test_backward(tmp_path, spoil, node, low, high):
    train(Broken(spoils(spoil)), tmp_path)
    row = found(tmp_path)
    assert (row["step"], row["reason"], row["direction"]) == (ODD, "op", "backward")
    assert (row["kinds"], row["module"]) == ("nonfinite_gradient", DEEP)
    assert row["node"].startswith(node)
    assert (row["input_min"], row["input_max"]) == (low, high)
    assert row["reproduced"] is True
    assert row["seen_in"].startswith("gradient of ")
    assert "test_nonfinite_replay.py" in row["line"]


def test_in_the_loss_outside_of_any_module(tmp_path):
    train(Broken(at_end=lambda loss: (loss * 0).log()), tmp_path)
    row = found(tmp_path)
    assert (row["module"], row["op"], row["kinds"]) == ("", "aten.log", "nonfinite_loss")
    assert "in `training_step`" in row["message"]


def test_an_infinity_that_does_no_harm_is_passed_over(tmp_path):
    def spoil(x):
        harmless = 1 / (1 + torch.exp(x.detach() * 0 + 100))
        masked = x.masked_fill(x > 0, -INF).exp()
        return (harmless + masked * 0 + x * 0) / (x * 0)

    train(Broken(spoils(spoil)), tmp_path)
    assert found(tmp_path)["op"] == "aten.div"


def test_an_infinity_and_where_it_became_nan(tmp_path):
    def spoil(x):
        e = torch.exp(x * 0 + 100)
        return e / e.sum()

    train(Broken(spoils(spoil)), tmp_path)
    row = found(tmp_path)
    assert (row["op"], row["then_op"], row["then_module"]) == ("aten.exp", "aten.div", DEEP)
    assert "then made NaN of it" in row["message"]


@pytest.mark.parametrize(("number", "count"), [(NAN, "nan"), (INF, "inf")])
def test_in_the_data(tmp_path, number, count):
    def spoil(x):
        x[8 * ODD + 2, 1] = number

    train(Broken(), tmp_path, data(spoil=spoil))
    row = found(tmp_path)
    assert (row["reason"], row["tensor"], row["module"]) == ("data", "batch[0]", "first")
    assert row[f"input_{count}"] == 1
    assert "batch[0]: float32[8, 3]" in row["batch"]


class Spoil(Callback):
    def __init__(self, name):
        self.name = name

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == ODD:
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            tensors[self.name].view(-1)[0] = NAN


def test_in_a_weight(tmp_path):
    train(Broken(), tmp_path, before=[Spoil("head.weight")])
    row = found(tmp_path)
    assert (row["reason"], row["tensor"], row["module"]) == ("parameter", "head.weight", "head")


def test_in_a_buffer_that_is_read(tmp_path):
    module = Broken()
    module.body[0].eval()
    module.train = lambda mode=True: module
    train(module, tmp_path, before=[Spoil("body.0.running_mean")])
    row = found(tmp_path)
    assert (row["reason"], row["tensor"]) == ("buffer", "body.0.running_mean")


def test_a_buffer_that_the_step_itself_has_broken_is_no_reason(tmp_path):
    train(Broken(gain=1), tmp_path, before=[Spoil("body.0.running_mean"), Spoil("head.weight")])
    assert found(tmp_path)["tensor"] == "head.weight"


def test_a_constant(tmp_path):
    train(Broken(at_end=lambda loss: loss * NAN), tmp_path)
    assert found(tmp_path)["reason"] == "constant"


def test_transformer_with_a_row_that_is_masked_as_a_whole(tmp_path):
    train(BrokenTransformer(), tmp_path)
    row = found(tmp_path)
    assert row["module"] == "cross"
    assert row["op"] == "aten._softmax"
    assert row["input_inf"]
    assert (row["reason"], row["reproduced"]) == ("op", True)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision(tmp_path, precision):
    def spoil(x):
        return (x * 0 + 300) @ torch.full((1, 1), 300.0) * 1e36

    options = (
        {"plugins": [scaler_plugin()]} if precision == "16-mixed" else {"precision": precision}
    )
    train(Broken(spoils(spoil)), tmp_path, **options)
    row = found(tmp_path)
    name = {"bf16-mixed": "aten.mul", "16-mixed": "aten.mm"}[precision]
    assert (row["module"], row["reason"], row["op"]) == (DEEP, "op", name)
    assert ("bfloat16" if precision == "bf16-mixed" else "float16[8, 1]") in row["outputs"]


def test_a_step_that_the_scaler_skips_is_not_followed(tmp_path):
    class Spiky(Broken):
        def loss(self, batch):
            with torch.autocast("cpu", enabled=False):
                # too large for single precision once it has been multiplied by the scale
                return super().loss(batch) * (1e36 if self.fault.odd else 1)

    train(Spiky(), tmp_path, plugins=[scaler_plugin(2.0**16)])
    assert not rows(tmp_path, "nonfinite")
    assert rows(tmp_path, "loss")[0]["skipped"] == 1


def test_manual_optimization(tmp_path):
    train(BrokenByHand(spoils(lambda x: torch.sqrt(x * 0))), tmp_path)
    row = found(tmp_path)
    assert (row["module"], row["node"]) == (DEEP, "SqrtBackward0")
    assert (row["step"], row["reproduced"]) == (ODD, True)


@pytest.mark.parametrize("odd", [4, 5, 6, 7])
@pytest.mark.parametrize("op", [lambda x: (x * 0).log() * 0, lambda x: (x * 0).sqrt()])
def test_the_micro_batch_of_an_accumulation(tmp_path, odd, op):
    module = Broken(spoils(op), odd=odd)
    train(module, tmp_path, data(16 * STEPS), accumulate_grad_batches=4)
    row = found(tmp_path)
    assert (row["step"], row["batch_idx"]) == (1, odd)
    assert (row["module"], row["reason"], row["reproduced"]) == (DEEP, "op", True)


def test_compiled_parts_run_eagerly(tmp_path):
    module = Broken(spoils(lambda x: (x * 0).sqrt()), odd=2)
    module.body = torch.compile(module.body, backend="aot_eager")
    train(module, tmp_path)
    row = found(tmp_path)
    assert (row["module"], row["node"]) == (DEEP, "SqrtBackward0")


def test_a_checkpointed_part(tmp_path):
    class Checkpointed(Broken):
        def loss(self, batch):
            part = lambda x: self.body(self.first(x))  # noqa: E731
            hidden = torch.utils.checkpoint.checkpoint(part, batch[0], use_reentrant=False)
            return F.mse_loss(self.head(hidden), batch[1])

    train(Checkpointed(spoils(lambda x: (x * 0).sqrt())), tmp_path)
    row = found(tmp_path)
    assert (row["node"], row["direction"]) == ("SqrtBackward0", "backward")


def test_sparse_gradients(tmp_path):
    class Sparse(Broken):
        def __init__(self, *args):
            super().__init__(*args)
            self.table = nn.Embedding(4, 8, sparse=True)

        def loss(self, batch):
            words = self.table(torch.zeros(8, dtype=torch.long))
            return F.mse_loss(self.head(self.fault(words)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    train(Sparse(spoils(lambda x: (x * 0).sqrt())), tmp_path)
    assert found(tmp_path)["node"] == "SqrtBackward0"


# ---- harmless ----


class Bits(Callback):
    """All that is there after each batch."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        kept = {name: str(value) for name, value in metrics.items() if "collapse" not in name}
        state = trace.snapshot(trainer, module)
        inside = {"calls": module.calls, "seen": list(module.seen), "metrics": kept}
        self.steps.append(copy.deepcopy({**state, **inside, "batch": batch}))


MODES = {
    "plain": (Broken, {}),
    "draws": (lambda spoil: Broken(spoil, draws=True), {}),
    "manual": (BrokenByHand, {}),
    "accumulated": (Broken, {"accumulate_grad_batches": 2}),
    "bf16": (Broken, {"precision": "bf16-mixed"}),
    "scaler": (Broken, {}),
    "clipped": (Broken, {"gradient_clip_val": 0.1}),
}


@pytest.mark.parametrize("kind", [CollapseStop, Late])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("mode", MODES)
def test_bits_are_the_same(tmp_path, mode, fault, kind):
    spoil = spoils(
        {"loss": lambda x: (x * 0) / (x * 0), "gradient": lambda x: (x * 0).sqrt()}[fault]
    )
    left, written = [], []
    for find in (False, True):
        make, options = MODES[mode]
        options = options | ({"plugins": [scaler_plugin()]} if mode == "scaler" else {})
        bits, path = Bits(), tmp_path / str(find)
        train(make(spoil), path, kind=kind, after=[bits], own={"find_nonfinite": find}, **options)
        left.append(bits.steps)
        metrics = rows(path, "metrics")
        written.append([{k: v for k, v in row.items() if k != "time"} for row in metrics])
    assert not trace.differences(*left)
    assert written[0] == written[1]
    assert not rows(tmp_path / "False", "nonfinite")
    # a step that a scaler skipped is followed where the loss itself is not finite
    assert len(rows(tmp_path / "True", "nonfinite")) == (fault == "loss" or mode != "scaler")


def test_other_diagnostics_see_nothing_of_it(tmp_path):
    from lightning_diag import ActivationHealth, AttentionCapture, LatentStats

    seen = []
    for find in (False, True):
        others = [
            kind(every_n_steps=1, on_error="raise")
            for kind in (ActivationHealth, AttentionCapture, LatentStats)
        ]
        path = tmp_path / str(find)
        train(BrokenTransformer(), path, before=others, own={"find_nonfinite": find})
        seen.append([len(rows(path, name)) for name in ("activation", "attention", "latent")])
    assert seen[0] == seen[1]
    assert rows(tmp_path / "True", "nonfinite")


class OverLambda(Broken):
    """A function that encloses the module, as a hook does that keeps features."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.part = lambda x: self.body(x)
        self.first.register_forward_hook(lambda *_: self.seen.append("hook"))

    def loss(self, batch):
        return F.mse_loss(self.head(self.part(self.first(batch[0]))), batch[1])


class OverTrainer(Broken):
    def loss(self, batch):
        hidden = self.trainer.lightning_module.body(self.first(batch[0]))
        return F.mse_loss(self.head(hidden), batch[1])


class OverScheduler(Broken):
    def training_step(self, batch, batch_idx):
        self.lr_schedulers().optimizer.param_groups[0]["lr"] *= 0.9
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


class Memory(torch.utils.data.Dataset):
    def __init__(self):
        self.kept = []

    def append(self, item):
        self.kept.append(item)

    def __len__(self):
        return len(self.kept)


class Remembers(Broken):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.memory = Memory()

    def training_step(self, batch, batch_idx):
        self.memory.append(1)
        return super().training_step(batch, batch_idx) + len(self.memory)


class Itself(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class GivesItself(Broken):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        torch.manual_seed(4)
        self.head = Itself(8, 2)


class Outside(Broken):
    """A parameter that trains and that no module holds."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        scale = nn.Parameter(torch.ones(1))
        self.scale = [lambda: scale]

    def loss(self, batch):
        return super().loss(batch) * self.scale[0]().square().sum()

    def configure_optimizers(self):
        return torch.optim.Adam([*self.parameters(), self.scale[0]()], lr=1e-2)


class Ascends(torch.optim.SGD):
    @torch.no_grad()
    def first_step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad.sign(), alpha=0.01)


class Sharpness(Broken):
    """Two backward passes, with the weights moved in between; the second is odd."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        odd = self.prepare(batch_idx)
        optimizer = self.optimizers()
        for second in (False, True):
            self.fault.odd = odd and second
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            (optimizer.step if second else optimizer.first_step)()

    def configure_optimizers(self):
        return Ascends(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", [CollapseStop, Late])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OverLambda, "op"),
        (OverTrainer, "op"),
        (OverScheduler, "op"),
        (Remembers, "op"),
        (GivesItself, "failed"),
        (Outside, "failed"),
        (Sharpness, "failed"),
    ],
)
def test_ways_back_to_what_trains(tmp_path, make, reason, kind):
    left = []
    own = {"snapshot_every_n_steps": 1}
    for find in (False, True):
        bits, path = Bits(), tmp_path / str(find)
        module = make(spoils(lambda x: (x * 0).log()))
        own["find_nonfinite"] = find
        trainer = train(module, path, kind=kind, after=[bits], own=own)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        left.append((bits.steps, rates, len(getattr(module, "memory", ()))))
    assert not trace.differences(left[0][0], left[1][0])
    assert left[0][1:] == left[1][1:]
    (row,) = rows(tmp_path / "True", "nonfinite")
    assert row["reason"] == reason, row["message"]


@pytest.mark.parametrize("make", [Broken, BrokenByHand, OverTrainer])
@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_is_given_back(tmp_path, monkeypatch, make, fails):
    from lightning_diag.callbacks import nonfinite_replay

    copies, alive, original = [], [], nonfinite_replay.aside

    class Looks(Callback):
        def on_train_batch_end(self, *_):
            alive.append(sum(copied() is not None for copied in copies))

    def aside(*given):
        copied = original(*given)
        copies.extend(weakref.ref(x) for x in (copied, *copied.parameters()))
        return copied

    def spoil(x):
        if fails and threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("planted")
        return (x * 0).log()

    monkeypatch.setattr(nonfinite_replay, "aside", aside)
    train(make(spoils(spoil)), tmp_path, after=[Looks()])
    assert found(tmp_path)["reason"] == ("failed" if fails else "op")
    assert copies
    assert not any(alive)


def test_the_graph_of_a_loss_is_not_held():
    replay = NonfiniteReplay()
    replay.begin(0, None, 0, torch.device("cpu"))
    loss = torch.ones((), requires_grad=True) * 2
    replay.saw_loss(loss, by_hand=True)
    assert replay.losses()[0].grad_fn is None


class NeverEnds(Broken):
    """Made again, it goes on and on, and keeps all errors to itself."""

    def training_step(self, batch, batch_idx):
        if threading.current_thread() is not threading.main_thread():
            if self.options.get("interrupts"):
                os.kill(os.getpid(), signal.SIGINT)
            while True:
                with contextlib.suppress(Exception):
                    torch.rand(1)
                    time.sleep(0.001)
        return super().training_step(batch, batch_idx)


def test_a_step_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    from lightning_diag.callbacks import nonfinite_replay

    monkeypatch.setattr(nonfinite_replay, "_MOST_SECONDS", 0.2)
    trainer = train(NeverEnds(spoils(lambda x: (x * 0).log())), tmp_path)
    assert trainer.global_step == STEPS
    assert "took longer than 0.2 s" in found(tmp_path)["message"]


@pytest.mark.skipif(os.name == "nt", reason="there is no such signal")
def test_an_interrupt_ends_the_replay_too(tmp_path):
    threads = threading.active_count()
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        train(NeverEnds(spoils(lambda x: (x * 0).log()), interrupts=True), tmp_path)
    assert threading.active_count() == threads
    assert not rows(tmp_path, "nonfinite")


def test_an_interrupt_as_the_replay_begins_ends_it_too(tmp_path, monkeypatch):
    original = threading.Thread.start

    def start(thread):
        original(thread)
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        train(NeverEnds(spoils(lambda x: (x * 0).log())), tmp_path)
    left = torch.get_rng_state()
    time.sleep(0.1)
    assert torch.equal(torch.get_rng_state(), left)


def test_there_must_be_room_for_a_copy(tmp_path, monkeypatch):
    from lightning_diag.callbacks import nonfinite_replay_copy

    monkeypatch.setattr(nonfinite_replay_copy, "_free_bytes", lambda device: 100)
    train(Broken(spoils(lambda x: (x * 0).log())), tmp_path)
    assert "and 1e-07 GB are free" in found(tmp_path)["message"]


def test_a_part_that_was_never_used_is_no_obstacle(tmp_path):
    class Lazy(Broken):
        def __init__(self, *args):
            super().__init__(*args)
            self.never = nn.LazyLinear(3)

        def configure_optimizers(self):
            parts = [self.first, self.body, self.head]
            return torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1)

    train(Lazy(spoils(lambda x: (x * 0).log())), tmp_path)
    assert (found(tmp_path)["op"], found(tmp_path)["reason"]) == ("aten.log", "op")


def test_an_end_that_the_step_asks_for(tmp_path):
    class Exits(Broken):
        def training_step(self, batch, batch_idx):
            if threading.current_thread() is not threading.main_thread():
                raise SystemExit(3)
            return super().training_step(batch, batch_idx)

    trainer = train(Exits(at_end=lambda loss: loss * NAN), tmp_path)
    assert trainer.global_step == STEPS
    assert "SystemExit" in found(tmp_path)["message"]


def test_a_number_that_has_left_its_tensor(tmp_path):
    def spoil(loss):
        return loss * (loss.detach() * 0 - 1).log().item()

    train(Broken(at_end=spoil), tmp_path)
    assert (found(tmp_path)["op"], found(tmp_path)["reason"]) == ("aten.log", "op")


def test_weights_that_another_optimizer_has_moved_are_later_ones(tmp_path):
    class Second(BrokenByHand):
        def loss(self, batch):
            self.fault.odd = self.fault.odd and self.turn > 0
            return super().loss(batch)

        def training_step(self, batch, batch_idx):
            odd = self.prepare(batch_idx)
            for turn, optimizer in enumerate(self.optimizers()):
                self.turn, self.fault.odd = turn, odd
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    train(Second(spoils(lambda x: (x * 0).log())), tmp_path)
    assert (found(tmp_path)["op"], found(tmp_path)["weights"]) == ("aten.log", "later")


def test_nothing_is_held_afterwards(tmp_path):
    stop = CollapseStop(action="warn", on_error="raise")
    module = Broken()
    hooks = [len(part._forward_hooks) for part in module.modules()]
    fit(module, stop, data(), tmp_path)
    assert not stop._replay._batches
    assert [len(part._forward_hooks) for part in module.modules()] == hooks


def test_other_steps_keep_nothing(tmp_path):
    class Keeps(Callback):
        def __init__(self, stop):
            self.stop, self.kept = stop, []

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.kept.append(len(self.stop._replay._batches))

    stop = CollapseStop(every_n_steps=3, on_error="raise")
    keeps = Keeps(stop)
    fit(Broken(), [stop, keeps], data(), tmp_path)
    assert keeps.kept == [0, 0, 1, 0, 0, 1, 0, 0]


def ranks(tmp_path, kind, find=True):
    folder = tmp_path / f"{kind}_{find}"
    folder.mkdir()
    # a hang is what this is about: far longer than such a training takes
    run_ranks(train_ranked, kind, find, folder, timeout=90)
    left = [torch.load(folder / f"left_{rank}.pt", weights_only=False) for rank in range(2)]
    return left, rows(folder / "run", "nonfinite")


@needs_fork
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_each_rank_follows_its_own_step(tmp_path, kind):
    left, found = ranks(tmp_path, kind)
    (row,) = found
    assert (row["reason"], row["reproduced"], row["step"]) == ("finite", True, ODD)
    (told,) = left[1]["told"]
    assert "on rank 1: step 5" in told
    name = "log" if kind == "loss" else "sqrt"
    assert f"`torch.Tensor.{name}`" in told
    assert f"in module `{DEEP}`" in told
    without, _ = ranks(tmp_path, kind, find=False)
    for one, other in zip(left, without, strict=True):
        assert not trace.differences(one["state"], other["state"])
        assert one["calls"] == other["calls"]


@needs_fork
@pytest.mark.distributed
def test_a_step_that_talks_to_other_ranks_is_not_followed(tmp_path):
    left, found = ranks(tmp_path, "talks")
    (row,) = found
    assert row["reason"] == "collective"
    assert "c10d" in row["message"]
    assert left[0]["calls"] == STEPS


# ---- honest ----


def test_without_the_argument_nothing_is_followed(tmp_path):
    train(Broken(at_end=lambda loss: loss * NAN), tmp_path, own={"find_nonfinite": False})
    assert not rows(tmp_path, "nonfinite")


def test_weights_that_are_lost_are_said_to_be(tmp_path):
    train(Broken(at_end=lambda loss: loss * NAN), tmp_path, kind=Late)
    row = found(tmp_path)
    assert (row["step"], row["reason"], row["op"]) == (ODD, "weights_lost", None)
    assert "first.weight" in row["message"]


def test_the_weights_of_a_snapshot_serve(tmp_path):
    module = Broken(spoils(lambda x: (x * 0).log()))
    train(module, tmp_path, kind=Late, own={"snapshot_every_n_steps": 2})
    row = found(tmp_path)
    assert (row["step"], row["weights"], row["module"]) == (ODD, "snapshot", DEEP)
    assert row["op"] == "aten.log"


def test_a_loss_without_a_gradient_is_followed_later(tmp_path):
    class Apart(Broken):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss + (loss.detach() * 0).log() if self.fault.odd else loss}

    train(Apart(), tmp_path, kind=Late)
    row = found(tmp_path)
    assert (row["weights"], row["op"], row["step"]) == ("later", "aten.log", ODD)


def test_what_is_finite_when_made_again(tmp_path):
    class Once(Broken):
        memory: ClassVar[list[int]] = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.fault.odd and not self.memory:
                self.memory.append(1)
                return loss * NAN
            return loss

    train(Once(), tmp_path)
    row = found(tmp_path)
    assert (row["reason"], row["op"], row["reproduced"]) == ("finite", None, False)


@pytest.mark.parametrize("what", ["copy", "step"])
def test_an_error_in_the_replay_ends_nothing(tmp_path, what):
    class Fails(Broken):
        def training_step(self, batch, batch_idx):
            if self.calls > ODD and what == "step":
                raise ZeroDivisionError("planted")
            return super().training_step(batch, batch_idx)

    module = Fails(at_end=lambda loss: loss * NAN)
    if what == "copy":
        module.things = (one for one in [1, 2])
    else:
        module.options["odd"] = STEPS - 1
        module.calls = ODD + 1 - STEPS
    trainer = train(module, tmp_path)
    assert trainer.global_step == STEPS
    row = found(tmp_path)
    assert row["reason"] == "failed"
    assert {"copy": "generator", "step": "planted"}[what] in row["message"]


def test_it_is_done_once_and_again_after_a_rollback(tmp_path):
    class Always(Broken):
        def prepare(self, batch_idx):
            super().prepare(batch_idx)
            self.fault.odd = batch_idx in (2, 3, 6, 7)
            return False

    own = {"action": "rollback", "events_in_a_row": 2, "snapshot_every_n_steps": 1}
    train(Always(spoils(lambda x: (x * 0).log())), tmp_path, own=own)
    assert [row["step"] for row in rows(tmp_path, "nonfinite")] == [2, 6]
    report = json.loads((tmp_path / "collapse_report.json").read_text())
    assert [one["step"] for one in report["nonfinite"]] == [2, 6]
    assert report["nonfinite"][0]["op"] == "aten.log"


def test_it_is_said_at_once(tmp_path):
    with pytest.warns(UserWarning, match="step 5 was not finite. The first .* `aten.log`"):
        train(Broken(at_end=lambda loss: (loss * 0).log()), tmp_path)


# ---- its parts ----


def test_large_batches_do_not_pile_up(monkeypatch):
    from lightning_diag.callbacks import nonfinite_replay

    monkeypatch.setattr(nonfinite_replay, "_MOST_BYTES", 100)
    replay = NonfiniteReplay()
    for number, size in enumerate([10, 10, 10, 50, 1]):
        replay.begin(0, [torch.zeros(size)], number, torch.device("cpu"))
    assert [one.batch_idx for one in replay._batches] == [4]
    replay.begin(0, [torch.zeros(1)], 5, torch.device("cpu"))
    assert [one.batch_idx for one in replay._batches] == [4, 5]


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_python_and_numpy_are_kept_where_the_first_steps_drew(draw):
    for draws in (True, False):
        replay = NonfiniteReplay()
        for number in range(5):
            replay.begin(0, None, number, torch.device("cpu"))
            if draws:
                draw()
            replay.end(None)
        assert (replay._batches[-1].generators.python is not None) is draws


def test_a_device_is_asked_nothing():
    module = SimpleNamespace(device=torch.device("cuda"))
    # to ask one of these is an error
    unread = torch.full((), NAN, device="meta")
    window = Window(0)
    window._squares[0] = unread
    assert window.odd_on_host(SimpleNamespace(lightning_module=module), None, 0, [unread]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_range(dtype):
    x = torch.tensor([[1.0, -2.0, 0.0], [NAN, INF, -INF]], dtype=dtype)
    one = range_of(x)
    assert (one.low, one.high, one.zeros, one.nan, one.inf) == (-2, 1, 1, 1, 2)
    assert (one.shape, one.dtype) == ((2, 3), str(dtype).partition(".")[2])
    nothing = range_of(torch.full((2,), NAN, dtype=dtype))
    assert (nothing.low, nothing.high, nothing.nan) == (None, None, 2)
    assert range_of(torch.zeros(0)) is None
    assert range_of(torch.zeros(2, dtype=torch.long)) is None
