"""Setting a learning rate afterwards is the same as having configured it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from lightning_diag.lightning import LightningModule
from lightning_diag.tuning.learning_rate import (
    base_lr,
    multiples,
    set_base_lr,
    set_group_lrs,
    set_module_lr,
)


def groups(lr, factors=(0.1, 0.5, 1.0)):
    return [{"params": [nn.Parameter(torch.ones(2))], "lr": lr * factor} for factor in factors]


def chained(optimizer):
    first = schedulers.ConstantLR(optimizer, factor=0.1, total_iters=2)
    return schedulers.ChainedScheduler([first, schedulers.ExponentialLR(optimizer, 0.9)])


def sequential(optimizer):
    warmup = schedulers.LinearLR(optimizer, start_factor=1e-3, total_iters=5)
    return schedulers.SequentialLR(
        optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 20)], [5]
    )


MAKE = {
    "none": lambda optimizer: None,
    "warmup": lambda optimizer: schedulers.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 12)),
    "warmup_from_zero": lambda optimizer: schedulers.LambdaLR(optimizer, lambda k: min(1, k / 7)),
    "step": lambda optimizer: schedulers.StepLR(optimizer, 3, 0.5),
    "multi_step": lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 5]),
    "linear": lambda optimizer: schedulers.LinearLR(optimizer, total_iters=4),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 4),
    "polynomial": lambda optimizer: schedulers.PolynomialLR(optimizer, 12, 2.0),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=1),
    "chained": chained,
    "sequential": sequential,
    "one_cycle": lambda optimizer: schedulers.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=20
    ),
    "cyclic": lambda optimizer: schedulers.CyclicLR(
        optimizer,
        [group["lr"] / 4 for group in optimizer.param_groups],
        [group["lr"] for group in optimizer.param_groups],
        step_size_up=3,
    ),
}


def rates(optimizer, scheduler, steps=15):
    found = []
    for step in range(steps):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0 if step else 2.0)
        elif scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize("lr", [3e-4, 0.0018, 0.029, 1.0])
@pytest.mark.parametrize("name", MAKE)
def test_it_is_as_if_configured_so(name, lr):
    optimizer = SGD(groups(1e-3), lr=1e-3)
    scheduler = MAKE[name](optimizer)
    set_base_lr(optimizer, [scheduler] if scheduler else [], lr)
    by_hand = SGD(groups(lr), lr=lr)
    expected = rates(by_hand, MAKE[name](by_hand))
    found = rates(optimizer, scheduler)
    if name in ("one_cycle", "cyclic"):  # these divide the rate by themselves
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    else:
        assert found == expected


@given(
    st.lists(st.sampled_from([0.05, 0.1, 0.3, 1 / 3, 0.5, 0.65, 1.0, 2.0]), min_size=1, max_size=6),
    st.floats(1e-7, 1.0),
    st.integers(10, 99),
    st.integers(-8, 0),
)
def test_ratios_are_kept_to_the_bit(factors, old, digits, power):
    new = float(f"{digits / 10}e{power}")
    optimizer = SGD(groups(old, factors), lr=old)
    base = base_lr(optimizer)
    set_base_lr(optimizer, [], new)
    found = [group["lr"] for group in optimizer.param_groups]
    if old in [old * factor for factor in factors]:
        assert found == [new * factor for factor in factors]
    else:
        assert max(found) == new
        assert base == max(old * factor for factor in factors)


def test_base_is_what_a_person_would_type():
    assert base_lr(SGD(groups(0.1, (0.1, 1.0, 10.0)), lr=0.1)) == 0.1
    assert base_lr(SGD(groups(0.1, (0.1, 10.0)), lr=0.1)) == 1.0
    optimizer = SGD(groups(0.2), lr=0.2)
    schedulers.LambdaLR(optimizer, lambda k: 0.0)
    assert optimizer.param_groups[-1]["lr"] == 0
    assert base_lr(optimizer) == 0.2
    assert multiples(optimizer) == [0.1, 0.5, 1.0]


def test_a_group_that_does_not_learn_stays_so():
    optimizer = SGD(groups(0.1, (0.0, 1.0)), lr=0.1)
    set_base_lr(optimizer, [], 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_no_rate_at_all():
    with pytest.raises(ValueError, match=r"must have a learning rate above 0, got \[0.0\]"):
        base_lr(SGD(groups(1.0, (0.0,)), lr=0.0))


def test_rates_that_are_one_tensor_are_set_once_each():
    rate = torch.tensor(0.1)
    optimizer = AdamW([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=rate)
    held = optimizer.param_groups[0]["lr"]
    set_group_lrs(optimizer, 0.01, multiples(optimizer))
    assert optimizer.param_groups[0]["lr"] is held
    set_group_lrs(optimizer, 0.1, [1.0, 1.0])
    set_base_lr(optimizer, [], 0.5)
    found = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(one, torch.Tensor) for one in found)
    assert [float(one) for one in found] == pytest.approx([0.5, 0.5])


def test_groups_that_come_later_have_the_new_rate():
    optimizer = SGD(groups(0.1), lr=0.1)
    set_base_lr(optimizer, [], 0.3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[-1]["lr"] == 0.3


def test_schedules_of_ones_own():
    class Own(schedulers.LRScheduler):
        def __init__(self, optimizer, peak, after):
            self.peak, self.after = peak, after
            super().__init__(optimizer)

        def get_lr(self):
            return [self.peak for _ in self.base_lrs]

    optimizer = SGD(groups(0.1, (1.0,)), lr=0.1)
    after = schedulers.StepLR(optimizer, 3)
    own = Own(optimizer, 0.1, after)
    set_base_lr(optimizer, [own], 0.4)
    assert (own.peak, own.base_lrs, after.base_lrs) == (0.4, [0.4], [0.4])


def test_group_rates_for_one_step_leave_the_schedule():
    optimizer = SGD(groups(0.1), lr=0.1)
    scheduler = MAKE["warmup"](optimizer)
    set_group_lrs(optimizer, 2.0, multiples(optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 1.0, 2.0]
    assert scheduler.base_lrs == [0.1 * 0.1, 0.1 * 0.5, 0.1]


class Hyper(LightningModule):
    def __init__(self, learning_rate=0.1, other=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.lr = learning_rate
        self.other = other


def test_the_module_is_told():
    module = Hyper()
    assert set_module_lr(module, 0.1, 0.3) == ["lr", "hparams.learning_rate"]
    assert (module.lr, module.hparams.learning_rate) == (0.3, 0.3)
    assert (module.other, module.hparams.other) == (0.1, 0.1)


def test_an_attribute_that_means_something_else_is_left():
    module = Hyper(learning_rate=0.2)
    assert set_module_lr(module, 0.1, 0.3) == []
    assert module.lr == 0.2


def test_a_property_that_shows_the_hyper_parameter_is_not_set_itself():
    class Shows(LightningModule):
        def __init__(self, learning_rate=0.1):
            super().__init__()
            self.save_hyperparameters()

        @property
        def learning_rate(self):
            return self.hparams.learning_rate

    module = Shows()
    assert set_module_lr(module, 0.1, 0.3) == ["hparams.learning_rate"]
    assert module.learning_rate == 0.3
