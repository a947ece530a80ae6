"""Promise 5: whatever breaks inside a diagnostic, training goes on as if it were not there."""

import errno
import os
import sys
import types
import warnings
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from inspect import isfunction

import pytest
import torch

from lightning_diag import GradientHealth, RunLogger
from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.lightning import PACKAGE, Callback, Logger, Trainer
from lightning_diag.records import read_run
from lightning_diag.records.files import LineWriter
from tests.promises.cases import CASES, CLASSES, DIAGNOSTICS, ONCE, build, kinds
from tests.promises.jobs import train_on_small_disk
from tests.promises.networks import Classifier, batches
from tests.promises.processes import needs_fork, run
from tests.promises.trace import QUIET, differences, seed, snapshot

callbacks = import_module(f"{PACKAGE}.callbacks")


class UserError(Exception):
    """What the user's own code raises."""


class PlantedError(Exception):
    """What is planted into a diagnostic."""


def hooks_of(kind):
    """The Lightning hooks that a diagnostic defines; those of the base are one's for all."""
    base = Callback if kind is GradientHealth else Diagnostic
    return [
        name
        for name in dir(Callback)
        if not name.startswith("_")
        and name != "state_key"
        and isfunction(getattr(Callback, name))
        and getattr(kind, name) is not getattr(base, name)
    ]


HOOKS = [(name, hook) for kind, name in CLASSES.items() for hook in hooks_of(kind)]
# called by constructors, where an error is the user's to see
CHECKS = {"blob_settings"}
FUNCTIONS = sorted(
    (module.__name__, name)
    for module in list(sys.modules.values())
    if getattr(module, "__name__", "").startswith("lightning_diag.callbacks.")
    for name, value in vars(module).items()
    if isfunction(value) and value.__module__.startswith("lightning_diag.functional.")
    if name not in CHECKS
)


def breaking(diagnostic, hook, when):
    """The same diagnostic with an exception before or after what one of its hooks does."""
    kind = type(diagnostic)
    original = getattr(kind, hook)

    def broken(self, *args, **kwargs):
        if when == "after":
            original(self, *args, **kwargs)
        raise PlantedError(f"planted in {hook}")

    broken.__name__ = hook
    diagnostic.__class__ = type(kind.__name__, (kind,), {hook: broken})
    return diagnostic


def two_fits(folder, diagnostics, *, logger=False):
    """A training with validation and checkpoints, resumed by another; then one that fails."""
    traces = []
    for resume in (None, "last"):
        seed()
        checkpoint = callbacks.ModelCheckpoint(
            folder / "checkpoints", every_n_train_steps=4, save_last=True
        )
        module = Classifier()
        trainer = Trainer(
            callbacks=[*diagnostics(), checkpoint],
            **{
                **QUIET,
                "default_root_dir": folder,
                "max_epochs": 3 if resume else 2,
                "enable_checkpointing": True,
                "logger": logger,
            },
        )
        path = str(folder / "checkpoints" / "last.ckpt") if resume else None
        trainer.fit(module, batches(), batches(1), ckpt_path=path)
        traces.append(snapshot(trainer, module))
    with pytest.raises(UserError):
        fail(folder, diagnostics())
    return traces


def fail(folder, diagnostics):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise UserError

    options = {**QUIET, "default_root_dir": folder}
    Trainer(callbacks=[*diagnostics, Fails()], **options).fit(Classifier(), batches())


@contextmanager
def collected():
    """The warnings of a block as text, all of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = []
        yield said
    said += [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return two_fits(tmp_path_factory.mktemp("undisturbed"), list)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("case", "hook"), HOOKS)
def test_a_failing_hook_ends_the_diagnostic_alone(case, hook, when, undisturbed, tmp_path):
    made = []

    def diagnostics():
        made.extend(build(case, on_error="warn"))
        return [breaking(made[-1], hook, when)]

    with collected() as said:
        traces = two_fits(tmp_path, diagnostics)
    assert not differences(undisturbed, traces)
    kind = type(made[0]).__name__
    planted = [message for message in said if f"planted in {hook}" in message]
    assert 1 <= len(planted) <= len(made), said
    assert all(kind in message for message in planted)
    assert not [message for message in said if "has ended" in message and message not in planted]


@pytest.mark.parametrize(("case", "hook"), HOOKS)
def test_on_error_raise_lets_it_out(case, hook, tmp_path):
    def diagnostics():
        return [breaking(build(case)[0], hook, "before")]

    with pytest.raises(PlantedError):
        two_fits(tmp_path, diagnostics)


@pytest.mark.parametrize(("module", "function"), FUNCTIONS)
def test_a_failing_function_ends_the_diagnostic_alone(
    module, function, undisturbed, tmp_path, monkeypatch
):
    called = Counter()

    def broken(*args, **kwargs):
        called[function] += 1
        raise PlantedError(f"planted in {function}")

    monkeypatch.setattr(sys.modules[module], function, broken)
    with collected() as said:
        traces = two_fits(tmp_path, lambda: build("all", on_error="warn"))
    assert not differences(undisturbed, traces)
    planted = [message for message in said if f"planted in {function}" in message]
    # each ends at its first failure: it is not called again, and says it once
    assert len(planted) == called[function] <= 3 * len(DIAGNOSTICS)


def test_there_is_something_to_break():
    functions = {name for _, name in FUNCTIONS}
    assert {"gradient_table", "gradient_summary", "norm_shares"} <= functions
    hooks = {hook for _, hook in HOOKS}
    assert {"setup", "on_before_optimizer_step", "on_exception", "state_dict"} <= hooks


@pytest.mark.parametrize("case", CASES)
def test_a_failing_logger_costs_only_its_own_lines(case, undisturbed, tmp_path):
    class Fails(Logger):
        name, version = "fails", "0"

        def log_metrics(self, metrics, step=None):
            if any("/" in key for key in metrics):
                raise PlantedError("planted in the logger")

        def log_hyperparams(self, *args, **kwargs):
            pass

    recorded = RunLogger(tmp_path / "run")
    with collected() as said:
        traces = two_fits(
            tmp_path, lambda: build(case, on_error="warn"), logger=[Fails(), recorded]
        )
    assert not differences(undisturbed, traces)
    planted = [message for message in said if "planted in the logger" in message]
    # once for each diagnostic in each of the two fits; the second goes on with the first's rate
    assert len(planted) == 2 * len(build(case)) - len(ONCE & set(kinds(case)))
    assert all("Fails" in message for message in planted)
    for diagnostic in build(case):
        last = max(read_run(recorded.path).frame(diagnostic.prefix)["step"])
        assert last >= (0 if type(diagnostic).__name__ in ONCE else 11)


def _full(self, line):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def fill_disk(path, monkeypatch):
    monkeypatch.setattr(LineWriter, "write", _full)


def file_in_the_way(path, monkeypatch):
    path.write_text("in the way")


@pytest.mark.parametrize("trouble", [fill_disk, file_in_the_way])
@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_costs_only_rows(case, trouble, undisturbed, tmp_path, monkeypatch):
    path = tmp_path / "run"
    trouble(path, monkeypatch)
    with collected() as said:
        traces = two_fits(tmp_path, lambda: build(case, on_error="warn"), logger=RunLogger(path))
    assert not differences(undisturbed, traces)
    assert not [message for message in said if "has ended" in message], said
    troubles = [message for message in said if "cannot be written" in message]
    assert len([message for message in troubles if str(path) in message]) == 1, said


@needs_fork
@pytest.mark.distributed
def test_a_disk_that_fills_on_the_way_costs_only_later_rows(tmp_path):
    folders = [tmp_path / name for name in ("roomy", "full")]
    for folder, limit in zip(folders, (None, 8_000), strict=True):
        run(train_on_small_disk, folder, limit)
    roomy, full = (torch.load(folder / "left.pt", weights_only=False) for folder in folders)
    assert not differences(roomy["trace"], full["trace"])
    assert not [message for message in full["told"] if "has ended" in message]
    assert len([message for message in full["told"] if "cannot be written" in message]) == 1
    kept = read_run(folders[1] / "run")
    steps, everything = list(kept.grad["step"]), list(read_run(folders[0] / "run").grad["step"])
    assert 0 < len(steps) < len(everything)
    assert steps == everything[: len(steps)]


@pytest.mark.parametrize("case", CASES)
def test_an_interruption_is_not_swallowed(case, tmp_path):
    diagnostics = build(case, on_error="warn")

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    diagnostics[0].report = types.MethodType(interrupt, diagnostics[0])
    options = {**QUIET, "default_root_dir": tmp_path}
    trainer = Trainer(callbacks=diagnostics, **options)
    # what Lightning does with Ctrl-C
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(Classifier(), batches())
    assert trainer.interrupted
