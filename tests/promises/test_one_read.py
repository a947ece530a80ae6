"""Promise 3: one read at a measured step; at any other none, no tensor and no hook."""

from functools import cache

import pytest
import torch

from lightning_diag import RunLogger
from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.lightning import Callback, Trainer
from tests.promises.cases import (
    ALSO,
    BY_EPOCH,
    CASES,
    DIAGNOSTICS,
    ONCE,
    WHOLE_STEPS,
    build,
    kinds,
)
from tests.promises.modes import MODES
from tests.promises.networks import Classifier, batches
from tests.promises.reads import Watch, WatchSteps, census
from tests.promises.trace import QUIET, seed, train

EVERY = 3
WATCHED = ["plain", "accumulated", "scaler", "clip_norm", "sparse", "tied", "two_optimizers"]
X = torch.tensor([1.0, 0.0, 2.0])

READS = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X[0]),
    "bool": lambda: bool(X[0] > 0),
    "if": lambda: 1 if X.sum() > 0 else 0,
    "format": lambda: f"{X[0]:.2f}",
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "mask": lambda: X[X > 0],
    "masked_select": lambda: X.masked_select(X > 0),
    "nonzero": lambda: X.nonzero(),
    "equal": lambda: torch.equal(X, X),
    "unique": lambda: X.unique(),
    "index": lambda: [1, 2, 3][torch.tensor(1)],
}
NO_READS = {
    "sum": lambda: X.sum() + X.norm(),
    "integer index": lambda: X[torch.tensor([0, 2])],
    "cast": lambda: X.to(torch.float64),
    "where": lambda: torch.where(X > 0, X, 0).amax(),
}


@pytest.mark.parametrize("read", READS)
def test_watch_sees_a_read_once(read):
    with Watch() as watch:
        READS[read]()
    assert sum(watch.step.reads.values()) == 1


@pytest.mark.parametrize("other", NO_READS)
def test_watch_sees_no_read_in(other):
    with Watch() as watch:
        NO_READS[other]()
    assert not watch.step.reads


def watched(mode, folder, diagnostics, **options):
    watch = WatchSteps()
    options = {"logger": RunLogger(folder), "log_every_n_steps": 4, **options}
    with pytest.MonkeyPatch.context() as patch:
        measured = Diagnostic.measured

        def heard(self):
            if type(self).__name__ not in ONCE:  # before there are steps
                watch.saw_measuring(type(self).__name__)
            measured(self)

        patch.setattr(Diagnostic, "measured", heard)
        train(mode, folder, [watch, *diagnostics], **options)
    return watch


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """The same training without and with the diagnostics of a case, each watched once."""

    @cache
    def watch(mode, case):
        folder = tmp_path_factory.mktemp("watched")
        return watched(mode, folder, build(case, every_n_steps=EVERY) if case else [])

    return lambda mode, case: (watch(mode, None), watch(mode, case))


IN_EPOCH, EPOCHS = 6, 2


def due_batches(mode, kind):
    """The batches, from 0, in which a diagnostic may measure.

    Those in which a due step begins or is made, and what `cases` says of it.
    """
    window = MODES[mode].trainer().get("accumulate_grad_batches", 1)
    ends = [epoch * IN_EPOCH + IN_EPOCH - 1 for epoch in range(EPOCHS)]
    if kind in ONCE:
        return set()
    if kind in BY_EPOCH:
        return set(ends)
    steps, begun = [], 0
    for batch in range(IN_EPOCH * EPOCHS):
        if (batch % IN_EPOCH + 1) % window == 0 or batch in ends:
            steps.append((begun, batch))
            begun = batch + 1
    due = {*range(EVERY - 1, len(steps), EVERY), *ALSO.get(kind, ())}
    chosen = [step for number, step in enumerate(steps) if number in due]
    if kind in WHOLE_STEPS:
        return {batch for first, last in chosen for batch in range(first, last + 1)}
    return {batch for step in chosen for batch in step}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", WATCHED)
def test_reads(mode, case, side_by_side):
    without, watch = side_by_side(mode, case)
    assert len(watch.steps) == len(without.steps) == IN_EPOCH * EPOCHS
    for kind in kinds(case):
        found = {number for number, step in enumerate(watch.steps) if step.measured[kind]}
        assert bool(found) == (kind not in ONCE), kind
        assert found <= due_batches(mode, kind), kind
    for number, (step, before) in enumerate(zip(watch.steps, without.steps, strict=True)):
        more = step.reads - before.reads
        assert sum(more.values()) <= step.measured.total(), (number, more)
        assert bool(step.own_reads) <= bool(step.measured), (number, step.own_reads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", WATCHED)
def test_ordinary_steps_cost_no_operation_and_no_hook(mode, case, side_by_side):
    without, watch = side_by_side(mode, case)
    due = {batch for kind in kinds(case) for batch in due_batches(mode, kind)}
    ordinary = [number for number in range(len(watch.steps)) if number not in due]
    assert ordinary or case == "all"
    for number in ordinary:
        assert not watch.steps[number].own_operations, number
        assert watch.steps[number].hooks == without.steps[number].hooks, number


@pytest.mark.parametrize("case", CASES)
def test_progress_bar_metrics_are_not_read(case, tmp_path, monkeypatch):
    """Lightning reads each of them whenever somebody asks for `callback_metrics`."""
    monkeypatch.setitem(MODES, "prog_bar", type(MODES["plain"])(lambda: Classifier(prog_bar=True)))
    without = watched("prog_bar", tmp_path / "without", [])
    watch = watched("prog_bar", tmp_path / "with", build(case, every_n_steps=EVERY))
    assert any(sum(step.reads.values()) for step in without.steps)
    for step, before in zip(watch.steps, without.steps, strict=True):
        assert sum((step.reads - before.reads).values()) <= step.measured.total()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["plain", "scaler", "two_optimizers"])
def test_nothing_hangs_on_the_model_afterwards(mode, fails, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if fails and batch_idx == 4:
                raise ZeroDivisionError

    module, options = MODES[mode].module(), MODES[mode].trainer()
    before = census(module)
    options = {**QUIET, "default_root_dir": tmp_path, **options}
    trainer = Trainer(callbacks=[*build("all"), Fails()], **options)
    try:
        trainer.fit(module, batches(), batches(1))
    except ZeroDivisionError:
        assert fails
    assert census(module) == before
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class ForbidWaiting(Callback):
    """Any wait for the device between its two hooks is an error."""

    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.mode == "error":
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.mode == "default":
            torch.cuda.set_sync_debug_mode("default")


class Silent(Classifier):
    """Logs nothing, which alone would wait."""

    def log(self, *args, **kwargs):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", DIAGNOSTICS)
def test_a_device_is_never_waited_for(case, tmp_path):
    seed()
    callbacks = [ForbidWaiting("error"), *build(case), ForbidWaiting("default")]
    options = {**QUIET, "accelerator": "gpu", "default_root_dir": tmp_path}
    try:
        Trainer(callbacks=callbacks, logger=RunLogger(tmp_path), **options).fit(
            Silent(), batches(pin_memory=True)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
