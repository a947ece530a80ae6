"""Curves that look wrong and are right: plateaus, bumps, noise, floors, gaps."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.healthy.checks import (
    accuracy,
    answers,
    error,
    fresh,
    job,
    least,
    most,
    nearest_centre,
    parts,
)
from tests.faults.networks import CNN, MLP, Learner, scaled
from tests.faults.witness import Witness

# ---- first nothing, then all ----


def _parity(samples: int = 6000, bits: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(2, (samples, 10), generator=g).float() * 2 - 1
    return x, (x[:, :bits].prod(1) > 0).long()


def _late_insight(witness: Witness) -> None:
    fifth = len(witness.losses) // 5
    least(witness.mean_loss(fifth // 2, fifth), 0.6, "loss after a tenth of the run")
    most(witness.mean_loss(-fifth), 0.2, "last loss")
    least(accuracy(witness, _parity()), 0.95, "accuracy on fresh bits")


@healthy(
    "parity_after_a_plateau",
    "mlp",
    config={
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.03, "momentum": 0.9},
        "trainer": {"max_steps": 500},
    },
    verify=_late_insight,
    tricky="the loss stands still at the start, then falls to nothing",
)
def _parity_job(config: Config) -> Job:
    return job(MLP([10, 64, 2]), F.cross_entropy, config, _parity())


def _product(samples: int = 2560) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 8, generator=g)
    y = x @ torch.randn(8, 4, generator=g) / 8**0.5
    return x, y + 0.1 * torch.randn(samples, 4, generator=g)


def _leaves_saddle(witness: Witness) -> None:
    first = witness.mean_loss(0, 5)
    least(witness.mean_loss(10, 20), 0.85 * first, "loss on the saddle")
    most(error(witness, _product()), 0.03, "error on fresh data (noise 0.01)")


@healthy(
    "deep_linear_leaves_a_saddle",
    "mlp",
    config={
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9},
        "trainer": {"max_steps": 300},
    },
    verify=_leaves_saddle,
    tricky="small weights at the start: a saddle, then fast progress",
)
def _saddle(config: Config) -> Job:
    net = scaled(MLP([8, 32, 32, 4], "identity"), 0.2)
    return job(net, F.mse_loss, config, _product())


# ---- floors ----


def _at_floor(witness: Witness) -> None:
    half = len(witness.losses) // 2
    first, last = witness.mean_loss(half, half + half // 2), witness.mean_loss(-half // 2)
    most(abs(first - last), 0.08 * first, "change over the second half")
    _, y = fresh(_loud())
    _, clean = fresh(_loud(0.0))
    floor = float(F.mse_loss(clean, y))
    most(error(witness, _loud()), 1.12 * floor, f"error on fresh data (floor {floor:.2f})")


def _loud(noise: float = 1.0, samples: int = 6400) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=g)
    y = 2 * x[:, :1] - x[:, 1:2].abs()
    return x, y + noise * torch.randn(samples, 1, generator=g)


@healthy(
    "at_the_noise_floor_by_half",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_at_floor,
    tricky="the loss is flat from half of the run on: nothing is left to learn",
)
def _floor(config: Config) -> Job:
    return job(MLP([4, 32, 1]), F.mse_loss, config, _loud())


def _weak(samples: int = 12000) -> tuple[Tensor, Tensor]:
    """The inputs tell a tenth of the targets' variance; the best loss is 90 % of the first."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=g)
    return x, 0.33 * x[:, :1] + torch.randn(samples, 1, generator=g)


def _weak_found(witness: Witness) -> None:
    x, y = fresh(_weak())
    said = answers(witness, x)
    best = float(F.mse_loss(0.33 * x[:, :1], y))
    most(float(F.mse_loss(said, y)), 1.03 * best, f"error on fresh data (floor {best:.3f})")
    least(float(y.var()), 1.06 * best, "variance")


@healthy(
    "weak_signal",
    "mlp",
    config={
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 400},
        "hardware": {"batch_size": 64},
    },
    verify=_weak_found,
    tricky="the best possible loss is nine tenths of the first one",
)
def _weak_signal(config: Config) -> Job:
    return job(MLP([4, 16, 1]), F.mse_loss, config, _weak())


# ---- noise ----


def _points_right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=2.0)
    least(accuracy(witness, data.blobs(6400, noise=2.0)), best - 0.04, "accuracy on fresh points")


@healthy(
    "batches_of_four",
    "mlp",
    config={
        "optimizer": {"lr": 1e-3},
        "hardware": {"batch_size": 4},
        "trainer": {"max_steps": 600},
    },
    verify=_points_right,
    tricky="four samples a batch: loss and gradient are all noise",
)
def _four(config: Config) -> Job:
    net = MLP([16, 64, 4])
    return job(net, F.cross_entropy, config, data.blobs(6400, noise=2.0))


@healthy(
    "one_sample_at_a_time",
    "linear",
    config={
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01},
        "hardware": {"batch_size": 1},
        "trainer": {"max_steps": 1000},
    },
    verify=_points_right,
    tricky="one sample a batch",
)
def _single(config: Config) -> Job:
    return job(nn.Linear(16, 4), F.cross_entropy, config, data.blobs(6400, noise=2.0))


@healthy(
    "dropout_half",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_points_right,
    tricky="dropout 0.5: the training loss is noisy and above that of validation",
)
def _dropout(config: Config) -> Job:
    net = MLP([16, 128, 128, 4], dropout=0.5)
    return job(net, F.cross_entropy, config, data.blobs(6400, noise=2.0))


class _Shaken(Learner):
    """Adds noise to every gradient, as private or annealed training does."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                spread = 0.5 * float(parameter.grad.std()) if parameter.numel() > 1 else 0.0
                parameter.grad.add_(spread * torch.randn_like(parameter.grad))


@healthy(
    "noise_on_the_gradient",
    "mlp",
    verify=_points_right,
    tricky="noise is added to every gradient on purpose",
)
def _shaken(config: Config) -> Job:
    net = MLP([16, 64, 64, 4])
    tensors = data.blobs(6400, noise=2.0)
    return job(net, F.cross_entropy, config, tensors, learner=_Shaken)


# ---- bumps ----


class _Batches(torch.utils.data.IterableDataset):
    """Batches in the order that a function makes them."""

    def __init__(self, make: Any, count: int) -> None:
        self.make = make
        self.count = count

    def __iter__(self) -> Any:
        for step in range(self.count):
            yield self.make(step)


def _harder(step: int) -> tuple[Tensor, Tensor]:
    """Points with more noise from half of the run on."""
    x, y = data.blobs(4096, noise=1.0 if step < 200 else 2.0, seed=1)
    chosen = torch.randint(2457, (32,), generator=torch.Generator().manual_seed(step))
    return x[chosen], y[chosen]


def _harder_learned(witness: Witness) -> None:
    least(witness.mean_loss(200, 210), 1.5 * witness.mean_loss(180, 200), "loss at the change")
    most(witness.mean_loss(-40), witness.mean_loss(200, 210), "last loss")
    best = nearest_centre(4096, noise=2.0)
    least(accuracy(witness, data.blobs(4096, noise=2.0)), best - 0.04, "accuracy")


@healthy(
    "curriculum",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_harder_learned,
    tricky="harder data from half of the run on: the loss rises and stays higher",
)
def _curriculum(config: Config) -> Job:
    batches = DataLoader(_Batches(_harder, config["trainer"]["max_steps"]), batch_size=None)
    return Job(Learner(MLP([16, 32, 4]), F.cross_entropy, config), batches)


class _Outliers(Learner):
    """Once in a while a batch has targets that are wrong."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.global_step in (120, 215):
            y = y.roll(1, 0)
        return super().training_step((x, y), batch_idx)


def _jumps_and_learns(witness: Witness) -> None:
    for step in (120, 215):
        usual = witness.mean_loss(step - 20, step)
        least(witness.losses[step], 2.5 * usual, "loss of the odd batch")
        most(witness.mean_loss(step + 5, step + 25), 1.5 * usual, "loss after it")
    least(accuracy(witness, data.blobs(6400, noise=1.5)), 0.9, "accuracy")


@healthy(
    "two_odd_batches",
    "mlp",
    config={"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 300}},
    verify=_jumps_and_learns,
    tricky="two batches with wrong labels: the loss is many times as large, once each",
)
def _odd(config: Config) -> Job:
    net = MLP([16, 64, 4])
    return job(net, F.cross_entropy, config, data.blobs(6400, noise=1.5), learner=_Outliers)


class _Annealed(Learner):
    """A divergence whose weight grows from zero, so that the loss grows in between."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch[:1]
        mean, spread = self.net.encoder(x).chunk(2, -1)
        spread = spread.clamp(-8, 8)
        code = mean + (spread / 2).exp() * torch.randn_like(mean)
        rebuilt = (self.net.decoder(code) - x).square().sum(-1).mean()
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(-1).mean()
        weight = min(1.0, self.global_step / 300)
        loss = rebuilt + weight * divergence
        self.log("train_loss", loss)
        self.log("divergence", divergence)
        return loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net.decoder(self.net.encoder(x).chunk(2, -1)[0])


def _views(samples: int = 2560) -> tuple[Tensor, Tensor]:
    x, _ = data.pairs(samples, first=24, latent=4)
    return x, x


def _annealed_well(witness: Witness) -> None:
    x, _ = fresh(_views())
    left = float((answers(witness, x) - x).square().mean() / x.var(0).mean())
    most(left, 0.15, "share of variance left")


@healthy(
    "divergence_weight_grows",
    "autoencoder",
    config={"trainer": {"max_steps": 400}},
    verify=_annealed_well,
    tricky="a term of the loss grows from zero by plan",
)
def _annealed(config: Config) -> Job:
    net = nn.Module()
    net.encoder, net.decoder = MLP([24, 64, 8]), MLP([4, 64, 24])
    return job(net, F.mse_loss, config, _views(), val=False, learner=_Annealed)


class _TwoSources(Learner):
    """Every other batch is of a task whose loss is ten times the other's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x + 2.5 * torch.randn_like(x) if batch_idx % 2 else x
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss


def _zigzags(witness: Witness) -> None:
    low, high = witness.losses[-100::2], witness.losses[-99::2]
    low, high = (low, high) if sum(low) < sum(high) else (high, low)
    least(sum(high), 2 * sum(low), "sum of the losses of every other batch")
    best = nearest_centre(6400, noise=1.0)
    least(accuracy(witness, data.blobs(6400)), best - 0.03, "accuracy on clean points")


@healthy(
    "loss_of_two_sources",
    "mlp",
    verify=_zigzags,
    tricky="the loss jumps up and down between easy and hard batches",
)
def _sources(config: Config) -> Job:
    return job(MLP([16, 64, 4]), F.cross_entropy, config, data.blobs(6400), learner=_TwoSources)


# ---- validation ----


def _gap_job(config: Config, wrong: float, held: int = 512, **settings: Any) -> Job:
    """Validated on points with other noise than those trained on."""
    x, y = data.blobs(6400, noise=1.5)
    g = torch.Generator().manual_seed(4)
    loud = x + wrong * torch.randn(x.shape, generator=g)
    (train, _, _), (_, other, _) = parts(x, y), parts(loud, y)
    return Job(
        Learner(MLP([16, 32, 4]), F.cross_entropy, config, **settings),
        data.loader(*train, batch_size=config["hardware"]["batch_size"]),
        data.loader(*[one[:held] for one in other], batch_size=min(held, 64), shuffle=False),
    )


def _same_points_right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, data.blobs(6400, noise=1.5)), best - 0.03, "accuracy on fresh points")


def _gap(witness: Witness) -> None:
    _same_points_right(witness)
    values = [value for _, value in witness.val_losses]
    most(max(values[-3:]), 1.25 * min(values), "validation loss at the end")
    least(values[-1], 1.5 * witness.mean_loss(-50), "validation loss against training")


@healthy(
    "harder_validation_data",
    "mlp",
    config={"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 300, "val_check_interval": 25}},
    verify=_gap,
    tricky="validation is harder: a gap from the start, that stays",
)
def _gap_case(config: Config) -> Job:
    return _gap_job(config, 1.0)


def _wiggles(witness: Witness) -> None:
    _same_points_right(witness)
    values = [value for _, value in witness.val_losses][3:]
    ups = sum(b > a for a, b in pairwise(values))
    least(ups, 2, "times the validation loss rose")


@healthy(
    "tiny_validation_set",
    "mlp",
    config={"optimizer": {"lr": 3e-3}, "trainer": {"max_steps": 300, "val_check_interval": 15}},
    verify=_wiggles,
    tricky="a validation loss over 32 samples that goes up and down",
)
def _wiggles_case(config: Config) -> Job:
    return _gap_job(config, 0.5, held=32)


def _few(witness: Witness) -> None:
    _same_points_right(witness)
    assert len(witness.val_losses) <= 3, f"{len(witness.val_losses)} validations"


@healthy(
    "three_validations",
    "mlp",
    config={"trainer": {"max_steps": 144, "val_check_interval": 48}},
    verify=_few,
    tricky="three values of a validation loss are all there is",
)
def _few_case(config: Config) -> Job:
    return _gap_job(config, 0.3, held=64)


class _Augmented(Learner):
    """Trains on images that are shifted, blurred out and hidden in part."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        shown = (torch.rand(len(x), 1, 1, 12) > 0.3).float()
        return super().training_step((x * shown + 0.4 * torch.randn_like(x), y), batch_idx)


def _easier_validation(witness: Witness) -> None:
    least(accuracy(witness, data.images(2560)), 0.98, "accuracy on fresh images")
    most(witness.val_losses[-1][1], 0.8 * witness.mean_loss(-50), "validation loss")


@healthy(
    "strong_augmentation",
    "cnn",
    verify=_easier_validation,
    tricky="the training loss is far above that of validation",
)
def _augmented(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560), learner=_Augmented)


# ---- short and long ----


@healthy(
    "thirty_steps",
    "linear",
    config={"optimizer": {"lr": 5e-2}, "trainer": {"max_steps": 30}},
    verify=lambda witness: least(
        accuracy(witness, data.blobs(6400)), nearest_centre(6400) - 0.03, "accuracy"
    ),
    tricky="thirty steps in all, which are enough",
)
def _thirty(config: Config) -> Job:
    return job(nn.Linear(16, 4), F.cross_entropy, config, data.blobs(6400))


@healthy(
    "sixty_steps",
    "cnn",
    config={"trainer": {"max_steps": 60}},
    verify=lambda witness: least(accuracy(witness, data.images(2560)), 0.95, "accuracy"),
    tricky="sixty steps in all, which are enough",
)
def _sixty(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560))


@healthy(
    "long_run_of_a_tiny_network",
    "mlp",
    config={"optimizer": {"lr": 5e-3}, "trainer": {"max_steps": 1500}},
    verify=_at_floor,
    tricky="a thousand steps at the floor",
)
def _long(config: Config) -> Job:
    return job(MLP([4, 16, 1], "tanh"), F.mse_loss, config, _loud())


@healthy(
    "one_batch_is_all_the_data",
    "mlp",
    config={"trainer": {"max_steps": 150}},
    verify=lambda witness: least(
        accuracy(witness, data.blobs(6400)), nearest_centre(6400) - 0.03, "accuracy"
    ),
    tricky="every step is an epoch",
)
def _full_batch(config: Config) -> Job:
    net = MLP([16, 32, 4])
    return Job(
        Learner(net, F.cross_entropy, config),
        DataLoader([parts(*data.blobs(6400))[0]], batch_size=None),
    )
