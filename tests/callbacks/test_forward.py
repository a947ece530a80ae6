"""A forward is watched once, from inside, and training is the same with and without it."""

import copy
import functools
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.components import module_names
from lightning_diag.lightning import LightningModule
from tests.callbacks.witness import fit


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.b = nn.Linear(8, 1)

    def forward(self, x):
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


class Task(LightningModule):
    """`how`: eager, wrapped by torch.compile, compiled in place, or checkpointed by hand."""

    def __init__(self, how="eager", manual=False, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        if how == "wrapped":
            self.net = torch.compile(self.net, backend="aot_eager")
        if how == "in place":
            self.net.compile(backend="aot_eager")
        self.how, self.fail_at = how, fail_at
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise KeyError("batch")
        x = batch[0]
        if self.how == "checkpointed":
            loss = checkpoint(self.net, x, use_reentrant=False).square().mean()
        else:
            loss = self.net(x).square().mean()
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Outputs(Diagnostic):
    """Notes which modules without children ran."""

    prefix = "outputs"

    def __init__(self, fail="", **arguments):
        super().__init__(**{"every_n_steps": 2, "on_error": "raise", **arguments})
        self.fail = fail
        self.seen, self.scopes, self.skip = [], [], False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.is_due_batch(trainer):
            self.step = self.step_of(trainer)
            self.watch_forward(pl_module, self.inside)

    @contextmanager
    def inside(self, scope):
        if self.fail == "enter":
            raise ValueError("enter")
        self.scopes.append(scope)
        leaves = {n: m for n, m in scope.modules.items() if not list(m.children())}
        handles = [
            module.register_forward_hook(self.guarded(lambda *_, name=name: self.saw(scope, name)))
            for name, module in leaves.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.fail == "exit":
            raise ValueError("exit")

    def saw(self, scope, name):
        if self.fail == "hook":
            raise ValueError("hook")
        if scope.live:
            self.seen.append((self.step, name, scope.shadow))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(24, 3, generator=generator)), 4)


def trained(data, path, callbacks, **options):
    arguments = {key: options.pop(key) for key in ("accumulate_grad_batches",) if key in options}
    module = Task(**options)
    torch.manual_seed(1)
    fit(module, callbacks, data, path, **arguments)
    return module, torch.random.get_rng_state()


NAMES = ["net.a", "net.norm", "net.drop", "net.b"]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("how", ["eager", "wrapped", "in place", "checkpointed"])
def test_each_module_is_seen_once_and_training_is_the_same(how, manual, data, tmp_path):
    without, state = trained(data, tmp_path / "a", [], how=how, manual=manual)
    watch = Outputs()
    module, own_state = trained(data, tmp_path / "b", [watch], how=how, manual=manual)
    shadow = how in ("wrapped", "in place")
    assert watch.seen == [(step, name, shadow) for step in (1, 3, 5) for name in NAMES]
    assert all(scope.compiled == shadow for scope in watch.scopes)
    for name, value in without.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert torch.equal(state, own_state)
    assert "training_step" not in vars(module)
    assert "manual_backward" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


def test_two_watch_the_same_step(data, tmp_path):
    first, second = Outputs(every_n_steps=2), Outputs(every_n_steps=3)
    module, _ = trained(data, tmp_path, [first, second])
    assert {step for step, _, _ in first.seen} == {1, 3, 5}
    assert {step for step, _, _ in second.seen} == {2, 5}
    assert "training_step" not in vars(module)


def test_an_own_training_step_of_the_instance_comes_back(data, tmp_path):
    module = Task()
    mine = module.training_step
    module.training_step = mine
    fit(module, [Outputs()], data, tmp_path)
    assert vars(module)["training_step"] is mine


class OneArgument(Task):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class ByKeyword(Task):
    def training_step(self, batch, *, batch_idx=0):
        return super().training_step(batch, batch_idx)


class Iterates(Task):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def logged(step):
    @functools.wraps(step)
    def run(self, *args, **kwargs):
        return step(self, *args, **kwargs)

    return run


class Decorated(Task):
    @logged
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("kind", [OneArgument, ByKeyword, Iterates, Decorated])
@pytest.mark.parametrize("own", [False, True], ids=["method", "attribute"])
def test_lightning_passes_what_the_users_step_takes(kind, own, data, tmp_path):
    weights = []
    for name, callbacks in {"a": [], "b": [Outputs()]}.items():
        module = kind()
        if own:
            module.training_step = module.training_step
        torch.manual_seed(1)
        fit(module, callbacks, data, tmp_path / name)
        weights.append(module.net.a.weight)
    assert torch.equal(*weights)
    assert len(callbacks[0].seen) == 3 * len(NAMES)


def test_the_first_batch_of_an_accumulated_step_is_watched(data, tmp_path):
    watch = Outputs(every_n_steps=2)
    trained(data, tmp_path, [watch], accumulate_grad_batches=2)
    assert watch.seen == [(1, name, False) for name in NAMES]


@pytest.mark.parametrize("how", ["eager", "wrapped"])
@pytest.mark.parametrize("place", ["enter", "hook", "exit"])
def test_an_error_ends_the_diagnostic_alone(place, how, data, tmp_path):
    without, _ = trained(data, tmp_path / "a", [], how=how)
    watch, other = Outputs(place, on_error="warn"), Outputs(every_n_steps=3)
    with pytest.warns(RuntimeWarning, match=f"Outputs has ended .* ValueError: {place}"):
        module, _ = trained(data, tmp_path / "b", [watch, other], how=how)
    assert len(other.seen) == 2 * len(NAMES)
    for name, value in without.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert not any(part._forward_hooks for part in module.modules())


def test_nothing_stays_after_a_failing_step(data, tmp_path):
    module = Task(fail_at=3)
    with pytest.raises(KeyError, match="batch"):
        fit(module, [Outputs()], data, tmp_path)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


def test_a_diagnostic_that_ended_before_the_step_is_not_asked(data, tmp_path):
    class Late(Outputs):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self.seen == [] and batch_idx == 1:
                raise ValueError("late")

    late = Late(on_error="warn")
    with pytest.warns(RuntimeWarning, match="late"):
        module, _ = trained(data, tmp_path, [late])
    assert late.seen == []
    assert "training_step" not in vars(module)


def test_module_names_are_clean_and_name_the_module_itself():
    net = Net()
    names = module_names(nn.ModuleDict({"net": torch.compile(net)}))
    assert list(names) == ["", "net", *NAMES]
    assert names["net"] is net


class Frozen(LightningModule):
    """A frozen transformer layer in evaluation mode computes in PyTorch's fused way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        self.backbone.eval()
        x = batch[0].repeat(1, 3)[:, :8].view(4, 1, 8).expand(4, 5, 8).contiguous()
        return self.head(self.backbone(x)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.1)


def test_fused_layers_are_left_alone(data, tmp_path):
    weights = []
    for name, callbacks in {"a": [], "b": [Outputs()]}.items():
        module = Frozen()
        fit(module, callbacks, data, tmp_path / name)
        weights.append(module.head.weight)
    assert torch.equal(*weights)
    (watch,) = callbacks
    assert {name for _, name, _ in watch.seen} == {"head"}
    # the layer is not in evaluation mode before its first step
    assert [scope.fast_path for scope in watch.scopes] == [True] * 3


class Copies(Task):
    """Copies itself or its network while it is watched, as a target network or a pool may."""

    def __init__(self, what, how):
        super().__init__(manual=what == "self in manual step")
        self.what, self.copied_by = what, how
        self.copies = []

    def copied(self):
        part = self if self.what.startswith("self") else self.net
        trainer, self._trainer = self._trainer, None
        copies, self.copies = self.copies, []
        try:
            return copy.deepcopy(part) if self.copied_by == "deepcopy" else pickle.dumps(part)
        finally:
            self._trainer, self.copies = trainer, copies

    def on_train_batch_start(self, batch, batch_idx):
        if self.what == "self before the step":
            self.copies.append(self.copied())

    def training_step(self, batch, batch_idx):
        if self.what != "self before the step":
            self.copies.append(self.copied())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("what", ["net", "self", "self before the step", "self in manual step"])
def test_a_copy_of_the_module_is_free_of_us(what, how, data, tmp_path):
    module, watch = Copies(what, how), Outputs()
    fit(module, [watch], data, tmp_path)
    seen = len(watch.seen)
    assert seen == 3 * len(NAMES)
    for found in module.copies:
        part = found if how == "deepcopy" else pickle.loads(found)
        # a copy that was made during a step may carry hooks, which do nothing
        (part if what == "net" else part.net)(torch.zeros(4, 3))
        if what != "net":
            before = part.net.a.weight.clone()
            part.automatic_optimization = True
            part.what = "none"
            assert part.training_step([torch.ones(4, 3)], 0).requires_grad
            assert torch.equal(part.net.a.weight, before)
    assert len(watch.seen) == seen


class Strict(Task):
    def __setattr__(self, name, value):
        if name in ("training_step", "manual_backward"):
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_a_module_that_takes_no_new_attributes(data, tmp_path):
    watch = Outputs()
    fit(Strict(), [watch], data, tmp_path)
    assert len(watch.seen) == 3 * len(NAMES)


class CompiledMethod(Task):
    """A compiled function, which no module knows of, calls the modules."""

    def __init__(self):
        super().__init__()
        self.go = torch.compile(lambda x: self.net(x).square().mean(), backend="aot_eager")

    def training_step(self, batch, batch_idx):
        return self.go(batch[0])


def test_a_compiled_function_is_compiled_as_without_us(data, tmp_path):
    left = []
    for name, callbacks in {"a": [], "b": [Outputs(every_n_steps=1)]}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = CompiledMethod()
        torch.manual_seed(1)
        fit(module, callbacks, data, tmp_path / name)
        counters = torch._dynamo.utils.counters
        breaks = sum(counters["graph_break"].values())
        left.append((module.net.a.weight, counters["stats"]["unique_graphs"], breaks))
    assert torch.equal(left[0][0], left[1][0])
    assert left[0][1:] == left[1][1:]


class Property(Task):
    @property
    def training_step(self):
        return functools.partial(Task.training_step, self)


def test_a_step_that_is_a_property_is_not_watched_and_it_is_said(data, tmp_path):
    watch = Outputs(on_error="warn")
    module = Property()
    with pytest.warns(RuntimeWarning, match="must be a method to be watched, got property"):
        fit(module, [watch], data, tmp_path)
    assert watch.seen == []
    assert "training_step" not in vars(module)


def test_nothing_stands_in_where_no_step_came(data, tmp_path):
    class Stops(Task):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    module, watch = Stops(), Outputs()
    fit(module, [watch], data, tmp_path)
    assert watch.seen == []
    assert "training_step" not in vars(module)


class Scripted(Task):
    def __init__(self):
        super().__init__()
        self.script = torch.jit.script(nn.Sequential(nn.Linear(1, 4), nn.ReLU()))

    def training_step(self, batch, batch_idx):
        return self.script(self.net(batch[0])).square().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules_take_no_hooks_and_are_left_alone(data, tmp_path):
    weights = []
    for name, callbacks in {"a": [], "b": [Outputs()]}.items():
        torch.manual_seed(1)
        module = Scripted()
        fit(module, callbacks, data, tmp_path / name)
        weights.append(module.net.a.weight)
    assert torch.equal(*weights)
    assert {name for _, name, _ in callbacks[0].seen} == set(NAMES)
