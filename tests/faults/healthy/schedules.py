"""Learning rates that move, and that are right."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.healthy.checks import (
    accuracy,
    error,
    fresh,
    job,
    least,
    most,
    nearest_centre,
    parts,
)
from tests.faults.networks import CNN, MLP, GRUClassifier, Learner, Transformer
from tests.faults.witness import Witness

SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9}
Check = Callable[[Witness], None]


def _points_right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=2.0)
    least(accuracy(witness, data.blobs(6400, noise=2.0)), best - 0.04, "accuracy on fresh points")


def _points(config: Config, **settings: Any) -> Job:
    net = MLP([16, 64, 64, 4], config["model"].get("activation", "relu"))
    return job(net, F.cross_entropy, config, data.blobs(6400, noise=2.0), **settings)


def _counts_right(witness: Witness) -> None:
    least(accuracy(witness, data.tokens(4096)), 0.9, "accuracy on fresh tokens")


def _after(check: Check, *others: Check) -> Check:
    def both(witness: Witness) -> None:
        for one in (check, *others):
            one(witness)

    return both


def _rate(first: float, last: float) -> Check:
    """Shows from the rates themselves that the schedule is what its name says."""

    def seen(witness: Witness) -> None:
        for got, wanted in ((witness.rates[0], first), (witness.rates[-1], last)):
            most(
                abs(got - wanted),
                1e-4 + 0.05 * max(first, last),
                f"distance of a rate from {wanted}",
            )

    return seen


@healthy(
    "warmup_over_a_third",
    "transformer",
    config={"model": {"warmup_share": 0.3}, "trainer": {"max_steps": 300}},
    verify=_after(_counts_right, _rate(3e-3 / 90, 3e-3)),
    tricky="warm-up from nothing over 30 %",
)
def _warmup(config: Config) -> Job:
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(4096))


def _warm_cosine(steps: int, warm: int) -> Callable[[Optimizer], Any]:
    def factor(step: int) -> float:
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, factor)


@healthy(
    "warmup_from_exactly_zero_then_cosine",
    "transformer",
    config={"trainer": {"max_steps": 300}},
    verify=_after(_counts_right, _rate(0.0, 0.0)),
    tricky="the first step moves nothing, the last next to nothing",
)
def _from_zero(config: Config) -> Job:
    steps = config["trainer"]["max_steps"]
    net = Transformer(20, 2)
    schedule = _warm_cosine(steps, steps // 10)
    return job(net, F.cross_entropy, config, data.tokens(4096), schedule=schedule)


@healthy(
    "cosine_to_zero",
    "mlp",
    verify=_after(_points_right, _rate(3e-3, 0.0)),
    tricky="the rate ends at zero",
)
def _cosine(config: Config) -> Job:
    steps = config["trainer"]["max_steps"]
    return _points(config, schedule=lambda o: lr_scheduler.CosineAnnealingLR(o, steps))


@healthy(
    "linear_to_zero",
    "cnn",
    verify=_after(
        lambda witness: least(accuracy(witness, data.images(2560)), 0.97, "accuracy on images"),
        _rate(3e-3, 0.0),
    ),
    tricky="the rate ends at zero",
)
def _linear(config: Config) -> Job:
    steps = config["trainer"]["max_steps"]
    return job(
        CNN(1, 4),
        F.cross_entropy,
        config,
        data.images(2560),
        schedule=lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, steps),
    )


def _peaks(witness: Witness) -> None:
    least(max(witness.rates), 20 * witness.rates[0], "highest rate")
    most(witness.rates[-1], 0.01 * max(witness.rates), "last rate")


@healthy(
    "one_cycle",
    "mlp",
    config={"optimizer": {"lr": 1e-2}},
    verify=_after(_points_right, _peaks),
    tricky="the rate rises twenty-five-fold and falls to nothing",
)
def _one_cycle(config: Config) -> Job:
    steps, rate = config["trainer"]["max_steps"], config["optimizer"]["lr"]
    return _points(config, schedule=lambda o: lr_scheduler.OneCycleLR(o, rate, steps))


@healthy(
    "step_decay",
    "mlp",
    config={"optimizer": {**SGD, "lr": 0.05}, "trainer": {"max_steps": 240}},
    verify=_after(_points_right, _rate(0.05, 0.0005)),
    tricky="the rate drops tenfold twice",
)
def _step_decay(config: Config) -> Job:
    steps = config["trainer"]["max_steps"]
    return _points(
        config, schedule=lambda o: lr_scheduler.MultiStepLR(o, [steps // 2, 3 * steps // 4], 0.1)
    )


class _WatchesValidation(Learner):
    """Halves the rate where the validation loss stands still."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": "val_loss",
                "interval": "step",
                "frequency": 40,
                "strict": False,
            },
        }


def _reduced(witness: Witness) -> None:
    most(witness.rates[-1], 0.5 * witness.rates[0], "last rate")
    least(witness.rates[-1], 1e-3 * witness.rates[0], "last rate")


@healthy(
    "reduced_on_plateau",
    "mlp",
    config={
        "optimizer": {"lr": 1e-2},
        "trainer": {"max_steps": 480, "val_check_interval": 40},
    },
    verify=_after(_points_right, _reduced),
    tricky="the rate falls by what the validation loss does",
)
def _on_plateau(config: Config) -> Job:
    return _points(config, learner=_WatchesValidation)


def _restarts_seen(witness: Witness) -> None:
    jumps = sum(b > 5 * a for a, b in zip(witness.rates, witness.rates[1:], strict=False) if a > 0)
    least(jumps, 2, "restarts of the rate")


@healthy(
    "warm_restarts",
    "mlp",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 300}},
    verify=_after(_points_right, _restarts_seen),
    tricky="the rate jumps up again twice, and the loss with it",
)
def _restarts(config: Config) -> Job:
    steps = config["trainer"]["max_steps"]
    return _points(
        config, schedule=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, steps // 3)
    )


@healthy(
    "cyclic_rate",
    "mlp",
    config={"optimizer": {**SGD, "lr": 0.05}, "trainer": {"max_steps": 300}},
    verify=_points_right,
    tricky="the rate goes up and down all the time",
)
def _cyclic(config: Config) -> Job:
    rate = config["optimizer"]["lr"]
    return _points(
        config,
        schedule=lambda o: lr_scheduler.CyclicLR(o, 0.1 * rate, rate, step_size_up=25),
    )


@healthy(
    "exponential_decay",
    "gru",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 300}},
    verify=lambda witness: least(accuracy(witness, data.sequences(4096)), 0.9, "accuracy"),
    tricky="the rate falls to a twentieth",
)
def _exponential(config: Config) -> Job:
    return job(
        GRUClassifier(4, 2),
        F.cross_entropy,
        config,
        data.sequences(4096),
        schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.99),
    )


def _slower_body(witness: Witness) -> None:
    moved = {
        name: float((witness.last[name] - witness.first[name]).norm() / witness.first[name].norm())
        for name in ("net.body.0.weight", "net.head.weight")
    }
    most(moved["net.body.0.weight"], 0.5 * moved["net.head.weight"], "movement of the body")


@healthy(
    "slow_body_fast_head",
    "mlp",
    config={"component_lrs": {"net.body.*": 0.1}, "optimizer": {"lr": 1e-2}},
    verify=_after(_points_right, _slower_body),
    tricky="one part learns at a tenth of the rate on purpose",
)
def _component_rates(config: Config) -> Job:
    return _points(config)


# ---- rates at the edges of what is right ----


def _large_is_better(witness: Witness) -> None:
    tensors = data.rings(4096, noise=0.2)
    right = accuracy(witness, tensors)
    (x, y), (held, wanted) = parts(*tensors)[0], fresh(tensors)
    net = MLP([8, 64, 64, 2], "gelu")
    net.load_state_dict({k.removeprefix("net."): v for k, v in witness.first.items()})
    optimizer = torch.optim.SGD(net.parameters(), 0.005, momentum=0.9, nesterov=True)
    for chosen in torch.arange(32 * len(witness.losses)).remainder(len(x)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    tenth = float((net(held).argmax(1) == wanted).float().mean())
    least(right, tenth, "accuracy, against that with a tenth of the rate,")
    least(right, 0.85, "accuracy")


@healthy(
    "sgd_large_right_rate",
    "mlp",
    config={
        "optimizer": {**SGD, "lr": 0.05, "nesterov": True},
        "trainer": {"max_steps": 150},
    },
    verify=_large_is_better,
    tricky="momentum and a rate near the largest that works",
)
def _large_sgd(config: Config) -> Job:
    net = MLP([8, 64, 64, 2], "gelu")
    return job(net, F.cross_entropy, config, data.rings(4096, noise=0.2))


@healthy(
    "adam_large_right_rate",
    "mlp",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 400}},
    verify=lambda witness: most(error(witness, data.regression(4096)), 0.05, "error (noise 0.01)"),
    tricky="Adam at 1e-2",
)
def _large_adam(config: Config) -> Job:
    return job(MLP([8, 32, 1], "tanh"), F.mse_loss, config, data.regression(4096))


def _trained(net: torch.nn.Module, tensors: Any, steps: int, rate: float = 3e-3) -> torch.nn.Module:
    """The network after some training, by plain torch."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    x, y = tensors
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return net


def _moved_world(samples: int = 6400) -> Any:
    """The points of a task that the network knows, all of them moved."""
    x, y = data.blobs(samples, noise=1.5)
    return x + 0.8, y


def _old_world(samples: int = 6400) -> Any:
    return data.blobs(samples, noise=1.5)


def _adapts(witness: Witness) -> None:
    most(max(witness.rates), 1e-4, "rate")
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, _moved_world()), best - 0.03, "accuracy in the new world")
    most(witness.mean_loss(-50), 0.75 * witness.mean_loss(0, 20), "last loss against the first")


@healthy(
    "fine_tuning_small_rate",
    "mlp",
    config={"optimizer": {"lr": 1e-4}, "trainer": {"max_steps": 300}},
    verify=_adapts,
    tricky="a very small rate, right for a network that knows nearly all",
)
def _fine_tuning(config: Config) -> Job:
    net = _trained(MLP([16, 64, 64, 4]), [one[:3840] for one in _old_world()], 300)
    return job(net, F.cross_entropy, config, _moved_world())


def _still_good(witness: Witness) -> None:
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, _old_world()), best - 0.02, "accuracy")
    first, last = witness.mean_loss(0, 50), witness.mean_loss(-50)
    most(abs(last - first), 0.1, "change of the loss, which is flat from the start,")
    most(first, 0.3, "first loss")


@healthy(
    "continues_a_converged_model",
    "mlp",
    config={"optimizer": {"lr": 3e-5}},
    verify=_still_good,
    tricky="the loss is low and flat from the first step",
)
def _continues(config: Config) -> Job:
    net = _trained(MLP([16, 64, 64, 4]), [one[:3840] for one in _old_world()], 600)
    return job(net, F.cross_entropy, config, _old_world())


def _decayed(witness: Witness) -> None:
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, _old_world()), best - 0.03, "accuracy")


@healthy(
    "adamw_heavy_decay",
    "mlp",
    config={
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1},
        "trainer": {"max_steps": 300},
    },
    verify=_decayed,
    tricky="weight decay 0.1",
)
def _adamw(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _old_world())


@healthy(
    "adagrad",
    "mlp",
    config={"optimizer": {"_target_": "torch.optim.Adagrad", "lr": 0.03}},
    verify=_points_right,
    tricky="steps shrink by themselves",
)
def _adagrad(config: Config) -> Job:
    return _points(config)


@healthy(
    "rmsprop",
    "cnn",
    config={"optimizer": {"_target_": "torch.optim.RMSprop", "lr": 1e-3}},
    verify=lambda witness: least(accuracy(witness, data.images(2560)), 0.97, "accuracy"),
)
def _rmsprop(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560))


@healthy(
    "sgd_plain_small_momentum_free",
    "mlp",
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}, "trainer": {"max_steps": 300}},
    verify=_points_right,
)
def _plain_sgd(config: Config) -> Job:
    return _points(config)


class _ManyGroups(Learner):
    """A group for each parameter, no weight decay on biases."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p], "weight_decay": 0.05 if p.dim() > 1 else 0.0} for p in self.parameters()
        ]
        return torch.optim.AdamW(groups, lr=self.config["optimizer"]["lr"])


@healthy(
    "a_group_for_each_parameter",
    "mlp",
    config={"optimizer": {"lr": 1e-3}},
    verify=_points_right,
    tricky="many parameter groups with settings of their own",
)
def _many_groups(config: Config) -> Job:
    return _points(config, learner=_ManyGroups)
