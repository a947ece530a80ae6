"""A snapshot puts back whatever was changed, and nothing is replaced that others refer to."""

import itertools
import random
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_diag.tuning.snapshot import Snapshot, same_random_numbers


class Tracker:
    def __init__(self):
        self.count = 0
        self.best = [1.0]


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.counter = 0
        self.history = [torch.ones(2)]
        self.table = defaultdict(list, a=[1])
        self.recent = deque([1, 2], maxlen=2)
        self.names = {"a"}
        self.array = np.zeros(3)
        self.rng = np.random.default_rng(0)
        self.old_rng = np.random.RandomState(0)
        self.python = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.tracker = Tracker()


def spoil(module):
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(1)
    module.counter += 1
    module.history[0].mul_(5)
    module.history.append("more")
    module.table["a"].append(2)
    module.table["b"] = [3]
    module.recent.extend([5, 6, 7])
    module.names.add("b")
    module.array += 1
    module.drawn = (
        module.rng.random(),
        module.old_rng.rand(),
        module.python.random(),
        torch.rand(1, generator=module.generator).item(),
    )
    module.tracker.count += 1
    module.tracker.best[0] = 9.0
    module.tracker.new = True
    module.eval()
    module.linear.weight.requires_grad_(False)
    module.linear.bias.grad = torch.ones(3)
    module.register_forward_hook(lambda *_: None)
    module.register_buffer("extra", torch.zeros(1))
    del module.norm.weight


def described(module):
    return {
        "state": {name: value.tolist() for name, value in module.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "grads": {name: p.grad for name, p in module.named_parameters()},
        "modes": [part.training for part in module.modules()],
        "plain": (module.counter, sorted(module.names), module.array.tolist(), list(module.recent)),
        "held": (module.history[0].tolist(), len(module.history), str(dict(module.table))),
        "tracker": (module.tracker.count, str(module.tracker.best), hasattr(module.tracker, "new")),
        "hooks": len(module._forward_hooks),
        "keys": sorted(vars(module)),
        "rngs": (
            module.rng.bit_generator.state["state"],
            module.old_rng.get_state()[1].tolist(),
            module.python.getstate(),
            module.generator.get_state().tolist(),
        ),
    }


def test_everything_is_put_back_in_place():
    module = Module()
    identities = [id(module.linear.weight), id(module.history), id(module.table["a"])]
    before = described(module)
    kept = Snapshot(module)
    spoil(module)
    # every line of the description has something to notice
    after = described(module)
    assert [name for name in after if str(after[name]) == str(before[name])] == []
    kept.restore()
    assert described(module) == before
    assert [id(module.linear.weight), id(module.history), id(module.table["a"])] == identities
    assert module.table["missing"] == []


def test_gradients_come_back_as_they_were():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    grad = weight.grad
    kept = Snapshot([weight])
    weight.grad.add_(1)
    weight.grad = None
    kept.restore()
    assert weight.grad is grad
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.LBFGS])
def test_an_optimizer_and_its_scheduler(kind):
    module = nn.Linear(4, 1)
    optimizer = kind(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step():
        def closure():
            optimizer.zero_grad()
            loss = module(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()

    step()
    before = repr((module.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    kept = Snapshot(module, optimizer, scheduler)
    step()
    assert repr((module.state_dict(), optimizer.state_dict(), scheduler.state_dict())) != before
    kept.restore()
    assert repr((module.state_dict(), optimizer.state_dict(), scheduler.state_dict())) == before


def test_a_shared_tensor_is_kept_once_and_an_expanded_one_left():
    one = nn.Parameter(torch.ones(2))
    view = torch.ones(1).expand(3)
    kept = Snapshot([one, one, view], OrderedDict(a=one))
    with torch.no_grad():
        one.zero_()
    kept.restore()
    assert one.tolist() == [1, 1]
    assert view.tolist() == [1, 1, 1]


class Data(Dataset):
    def __init__(self):
        self.large = torch.zeros(10_000)
        self.rng = np.random.default_rng(1)
        self.calls = 0

    def __len__(self):
        return 4

    def __getitem__(self, place):
        self.calls += 1
        self.large[place] = 1
        return torch.tensor(self.rng.random())


def test_of_data_only_what_is_small_is_kept():
    data = Data()
    loader = DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(2))
    kept = Snapshot(loader, largest=100)
    first = [value.item() for value in loader]
    kept.restore()
    assert data.calls == 0
    assert data.large[:4].tolist() == [1, 1, 1, 1]
    assert [value.item() for value in loader] == first


def test_a_data_set_that_a_module_holds_is_not_copied():
    module = nn.Linear(1, 1)
    module.data = Data()
    kept = Snapshot(module)
    module.data.calls = 7
    kept.restore()
    assert module.data.calls == 7


def test_a_lazy_parameter_is_refused():
    with pytest.raises(ValueError, match="must have values before they can be kept"):
        Snapshot(nn.LazyLinear(3))


def test_what_refers_to_itself_ends():
    holder = Tracker()
    holder.itself = holder
    holder.best.append(holder.best)
    kept = Snapshot(holder)
    holder.count = 3
    kept.restore()
    assert holder.count == 0


def test_global_random_numbers_come_back_after_an_error_too():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)

    def interrupted():
        with same_random_numbers():
            drawn()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert drawn() == expected


def test_what_keeps_a_second_list_of_its_keys():
    cache = OrderedDict(a=1, b=2)
    kept = Snapshot([cache])
    cache.move_to_end("a")
    cache["c"] = 3
    del cache["b"]
    kept.restore()
    assert list(cache.items()) == [("a", 1), ("b", 2)]
    cache.move_to_end("a")
    assert list(cache) == ["b", "a"]


def test_depth_does_not_matter():
    module = inner = nn.Sequential(nn.BatchNorm1d(2))
    for _ in range(40):
        module = nn.Sequential(module)
    kept = Snapshot(module)
    inner[0].running_mean.add_(1)
    kept.restore()
    assert inner[0].running_mean.tolist() == [0, 0]


def test_tensor_hooks_are_removed():
    weight = nn.Parameter(torch.ones(2))
    weight.register_hook(lambda grad: grad * 2)
    kept = Snapshot([weight])
    weight.register_hook(lambda grad: grad * 10)
    weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(10))
    kept.restore()
    weight.sum().backward()
    assert weight.grad.tolist() == [2, 2]


def test_data_that_grew_in_place():
    buffer = torch.ones(2)
    other = buffer.data
    kept = Snapshot([buffer])
    buffer.data = torch.cat([buffer, buffer])
    kept.restore()
    assert buffer.tolist() == [1, 1]
    assert buffer.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("made", [lambda: iter([1, 2]), lambda: (x for x in "ab"), itertools.count])
def test_what_cannot_begin_again_is_refused(made):
    holder = Tracker()
    holder.source = made()
    with pytest.raises(ValueError, match="must be able to begin again, got a "):
        Snapshot(holder)


def test_one_piece_that_resists_does_not_keep_the_others():
    array, tracker = np.zeros(2), Tracker()
    kept = Snapshot([array, tracker])
    tracker.count = 5
    array.flags.writeable = False
    with pytest.raises(RuntimeError, match="could not be put back"):
        kept.restore()
    assert tracker.count == 0


@dataclass(slots=True)
class Slotted:
    count: int = 0
    seen: list = field(default_factory=list)


@pytest.mark.parametrize(
    "made", [Slotted, lambda: SimpleNamespace(count=0, seen=[])], ids=["slots", "namespace"]
)
def test_holders_of_other_kinds(made):
    holder = Tracker()
    holder.inner = made()
    kept = Snapshot(holder)
    holder.inner.count += 1
    holder.inner.seen.append(1)
    kept.restore()
    assert (holder.inner.count, holder.inner.seen) == (0, [])


def test_a_list_that_is_shuffled_in_place():
    data = Data()
    data.order = list(range(6000))
    kept = Snapshot(data, largest=1 << 20)
    random.Random(1).shuffle(data.order)
    kept.restore()
    assert data.order == list(range(6000))


def test_every_second_normal_number():
    generator = np.random.RandomState(0)
    generator.standard_normal()
    kept = Snapshot([generator])
    expected = generator.standard_normal(3).tolist()
    kept.restore()
    assert generator.standard_normal(3).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    module = nn.Linear(3, 3).cuda()
    before = [p.tolist() for p in module.parameters()]
    kept = Snapshot(module)
    with same_random_numbers(), torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    kept.restore()
    assert [p.tolist() for p in module.parameters()] == before
