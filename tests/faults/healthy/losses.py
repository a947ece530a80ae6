"""Losses that look odd and are right: negative, tiny, heavy, smoothed, uneven."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
)
from tests.faults.networks import MLP, Learner
from tests.faults.witness import Witness

# ---- below zero ----


def _narrow(samples: int = 2560) -> tuple[Tensor, Tensor]:
    """Targets with noise of 0.05: the best log-likelihood is 1.58, well above zero."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, generator=g)
    return x, torch.sin(x[:, :1]) + 0.05 * torch.randn(samples, 1, generator=g)


def _likelihood(out: Tensor, target: Tensor) -> Tensor:
    mean, spread = out.chunk(2, -1)
    spread = F.softplus(spread) + 1e-3
    return -torch.distributions.Normal(mean, spread).log_prob(target).mean()


def _below_zero(witness: Witness) -> None:
    least(witness.mean_loss(0, 5), 0.3, "first loss")
    most(witness.mean_loss(-40), -0.8, "last loss")
    x, y = fresh(_narrow())
    most(
        float((answers(witness, x)[:, :1] - y).square().mean()),
        0.02,
        "error of the mean (variance 0.43)",
    )


@healthy(
    "likelihood_below_zero",
    "mlp",
    config={"optimizer": {"lr": 5e-3}, "trainer": {"max_steps": 500}},
    verify=_below_zero,
    tricky="the loss crosses zero and ends below it",
)
def _negative(config: Config) -> Job:
    return job(MLP([2, 32, 2], "tanh"), _likelihood, config, _narrow())


def _cosine_loss(out: Tensor, target: Tensor) -> Tensor:
    return -F.cosine_similarity(out, target).mean()


def _directions(samples: int = 2560) -> tuple[Tensor, Tensor]:
    return data.pairs(samples)


def _aligned(witness: Witness) -> None:
    x, y = fresh(_directions())
    least(float(F.cosine_similarity(answers(witness, x), y).mean()), 0.97, "cosine on fresh data")
    most(witness.mean_loss(-20), -0.95, "last loss")


@healthy(
    "negative_cosine",
    "mlp",
    verify=_aligned,
    tricky="a loss between -1 and 1 that ends at -1",
)
def _cosine(config: Config) -> Job:
    return job(MLP([12, 64, 10]), _cosine_loss, config, _directions())


class Mixture(nn.Module):
    """Log-density of points under a mixture of Gaussians, which is all there is to learn."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(parts))
        self.means = nn.Parameter(torch.randn(parts, 2))
        self.spreads = nn.Parameter(torch.zeros(parts))

    def forward(self, x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self.means, self.spreads.exp()[:, None])
        each = normal.log_prob(x[:, None]).sum(-1)
        return (each + self.weights.log_softmax(0)).logsumexp(-1)


_CENTRES = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.2]])


def _clusters(samples: int = 2560) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = _CENTRES[torch.randint(3, (samples,), generator=g)]
    return x + 0.15 * torch.randn(samples, 2, generator=g), torch.zeros(samples)


def _density(witness: Witness) -> None:
    x, _ = fresh(_clusters())
    true = Mixture()
    with torch.no_grad():
        true.means.copy_(_CENTRES)
        true.spreads.fill_(torch.tensor(0.15).log())
        best = float(true(x).mean())
    least(float(answers(witness, x).mean()), best - 0.1, "log-density of fresh points")


@healthy(
    "mixture_density",
    "mlp",
    config={"optimizer": {"lr": 3e-2}, "trainer": {"max_steps": 300}},
    verify=_density,
    tricky="seven numbers in all, and a rate of 3e-2",
)
def _mixture(config: Config) -> Job:
    torch.manual_seed(4)
    return job(Mixture(), lambda out, _: -out.mean(), config, _clusters())


# ---- near zero ----


def _straight(samples: int = 2560) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 8, generator=g)
    return x, x @ torch.randn(8, 1, generator=g)


def _perfect(witness: Witness) -> None:
    most(witness.mean_loss(-20), 1e-6, "last loss")
    most(error(witness, _straight()), 1e-6, "error on fresh data")


@healthy(
    "perfect_fit",
    "linear",
    config={
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"max_steps": 300},
    },
    verify=_perfect,
    tricky="the loss ends below 1e-6: no gradient is left",
)
def _perfect_fit(config: Config) -> Job:
    return job(nn.Linear(8, 1), F.mse_loss, config, _straight())


def _separated(samples: int = 2560) -> tuple[Tensor, Tensor]:
    return data.blobs(samples, noise=0.3)


def _sure(witness: Witness) -> None:
    least(accuracy(witness, _separated()), 0.999, "accuracy")
    most(witness.mean_loss(-50), 1e-3, "last loss")


@healthy(
    "separable_classes",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_sure,
    tricky="the loss dies away, the outputs are sure, gradients vanish: it is done",
)
def _separable(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _separated())


class Triplets(Learner):
    """Anchor, one of its class, one of another; zero once they are a margin apart."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        code = F.normalize(self(x), dim=-1)
        near = (y[:, None] == y) & ~torch.eye(len(y), dtype=torch.bool)
        distance = (code[:, None] - code).square().sum(-1)
        positive = distance.masked_fill(~near, -1.0).amax(1)
        negative = distance.masked_fill(y[:, None] == y, 9.0).amin(1)
        loss = F.relu(positive - negative + 0.3).mean()
        self.log("train_loss", loss)
        return loss


def _grouped(witness: Witness) -> None:
    x, y = fresh(data.blobs(6400))
    code = F.normalize(answers(witness, x), dim=-1)
    near = (code[:, None] - code).square().sum(-1).fill_diagonal_(9.0).argmin(1)
    least(float((y[near] == y).float().mean()), 0.95, "nearest neighbours of the same class")
    quiet = sum(one == 0 for one in witness.losses[-100:])
    least(quiet, 5, "batches without any loss among the last hundred")


@healthy(
    "triplets_without_loss",
    "siamese",
    config={"trainer": {"max_steps": 300}},
    verify=_grouped,
    tricky="many batches have loss and gradient of exactly zero at the end",
)
def _triplets(config: Config) -> Job:
    return job(MLP([16, 64, 8]), F.mse_loss, config, data.blobs(6400), val=False, learner=Triplets)


def _hinge(out: Tensor, target: Tensor) -> Tensor:
    return F.multi_margin_loss(out, target)


@healthy(
    "hinge_loss",
    "mlp",
    verify=lambda witness: least(
        accuracy(witness, data.blobs(6400)), nearest_centre(6400) - 0.03, "accuracy"
    ),
    tricky="most samples have no gradient at the end",
)
def _margin(config: Config) -> Job:
    return job(MLP([16, 64, 4]), _hinge, config, data.blobs(6400))


# ---- heavy, smoothed, uneven ----


def _heavy(samples: int = 4096) -> tuple[Tensor, Tensor]:
    """Student's t with two degrees of freedom, whose variance is infinite, over the truth."""
    x, y = data.regression(samples, noise=0.0)
    g = torch.Generator().manual_seed(9)
    scale = torch.randn(samples, 2, generator=g).square().mean(1, keepdim=True).sqrt()
    return x, y + 0.15 * torch.randn(samples, 1, generator=g) / scale


def _through_tails(witness: Witness) -> None:
    x, noisy = fresh(_heavy())
    _, clean = fresh(data.regression(4096, noise=0.0))
    least(float((noisy - clean).abs().max()), 2.0, "largest outlier")
    most(float(F.mse_loss(answers(witness, x), clean)), 0.06, "error against the truth")


@healthy(
    "heavy_tails_huber",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_through_tails,
    tricky="targets with heavy tails: the loss spikes now and then",
)
def _huber(config: Config) -> Job:
    return job(MLP([8, 64, 64, 1], "gelu"), F.smooth_l1_loss, config, _heavy())


def _noisy_labels(share: float, samples: int = 6400) -> tuple[Tensor, Tensor]:
    x, y = data.blobs(samples)
    g = torch.Generator().manual_seed(7)
    wrong = torch.rand(samples, generator=g) < share
    return x, torch.where(wrong, torch.randint(4, (samples,), generator=g), y)


def _right_in_truth(witness: Witness) -> None:
    x, y = fresh(data.blobs(6400))
    said = answers(witness, x).argmax(-1)
    least(float((said == y).float().mean()), nearest_centre(6400) - 0.04, "accuracy in truth")


@healthy(
    "label_noise",
    "mlp",
    config={"optimizer": {"lr": 1e-3}},
    verify=_right_in_truth,
    tricky="a fifth of the labels is wrong: the loss stays high",
)
def _label_noise(config: Config) -> Job:
    return job(MLP([16, 32, 4]), F.cross_entropy, config, _noisy_labels(0.25))


@healthy(
    "label_smoothing",
    "mlp",
    verify=_right_in_truth,
    tricky="the loss cannot fall below 0.5",
)
def _smoothing(config: Config) -> Job:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return job(MLP([16, 64, 4]), loss, config, data.blobs(6400))


class Mixup(Learner):
    """Trains on mixtures of two samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        share = float(torch.distributions.Beta(1.0, 1.0).sample())
        order = torch.randperm(len(x))
        out = self(share * x + (1 - share) * x[order])
        loss = share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])
        self.log("train_loss", loss)
        return loss


@healthy(
    "mixup",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_right_in_truth,
    tricky="the training loss is noisy and above that of validation",
)
def _mixup(config: Config) -> Job:
    return job(MLP([16, 64, 4]), F.cross_entropy, config, data.blobs(6400), learner=Mixup)


def _rare(samples: int = 6400, share: float = 0.05) -> tuple[Tensor, Tensor]:
    """One class has one sample in twenty."""
    g = torch.Generator().manual_seed(1)
    y = (torch.rand(samples, generator=g) < share).long()
    centre = torch.randn(16, generator=g)
    return torch.randn(samples, 16, generator=g) + y[:, None] * centre, y


def _finds_rare(witness: Witness) -> None:
    x, y = fresh(_rare())
    most(float(y.float().mean()), 0.07, "share of the rare class")
    out = answers(witness, x)
    score = out[:, 1] - out[:, 0]
    above = (score[y == 1][:, None] > score[y == 0]).float().mean()
    # the best score is the projection on the centre
    centre = _rare(6400)[0][_rare(6400)[1] == 1].mean(0)
    ideal = x @ centre
    best = (ideal[y == 1][:, None] > ideal[y == 0]).float().mean()
    least(float(above), float(best) - 0.03, "area under the curve")


@healthy(
    "rare_class",
    "mlp",
    config={"trainer": {"max_steps": 300}, "hardware": {"batch_size": 64}},
    verify=_finds_rare,
    tricky="95:5 classes: most predictions are the same",
)
def _rare_class(config: Config) -> Job:
    return job(MLP([16, 32, 2]), F.cross_entropy, config, _rare())


@healthy(
    "rare_class_weighted",
    "mlp",
    config={"trainer": {"max_steps": 300}, "hardware": {"batch_size": 64}},
    verify=_finds_rare,
    tricky="95:5 classes, the rare one with a weight of 19",
)
def _weighted(config: Config) -> Job:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 19.0]))
    return job(MLP([16, 16, 2]), loss, config, _rare())


def _focal_loss(out: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(out, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


@healthy(
    "rare_class_focal",
    "mlp",
    config={"trainer": {"max_steps": 300}, "hardware": {"batch_size": 64}},
    verify=_finds_rare,
    tricky="95:5 classes and a loss that is small from the start",
)
def _focal(config: Config) -> Job:
    return job(MLP([16, 32, 2]), _focal_loss, config, _rare())


def _by_hand(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum() / len(out)


@healthy(
    "summed_and_divided_by_hand",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=lambda witness: most(error(witness, data.regression(4096)), 0.05, "error (noise 0.01)"),
    tricky="a sum, divided by the batch size",
)
def _divided(config: Config) -> Job:
    return job(MLP([8, 64, 64, 1], "gelu"), _by_hand, config, data.regression(4096))


def _summed(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum(-1).mean()


def _wide_targets(samples: int = 2560) -> tuple[Tensor, Tensor]:
    left, right = data.pairs(samples, first=32, second=100, latent=6)
    return left, right


def _wide_right(witness: Witness) -> None:
    x, y = fresh(_wide_targets())
    most(float(F.mse_loss(answers(witness, x), y) / y.var()), 0.05, "share of variance left")
    least(witness.mean_loss(0, 3), 300, "first loss")


@healthy(
    "loss_in_the_hundreds",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_wide_right,
    tricky="the loss sums over a hundred outputs: large numbers, large gradients",
)
def _hundreds(config: Config) -> Job:
    return job(MLP([32, 64, 100]), _summed, config, _wide_targets())


# ---- outputs near their ends ----


def _signs(samples: int = 2560) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 8, generator=g)
    return x, torch.tanh(4 * x @ torch.randn(8, 3, generator=g))


def _signs_right(witness: Witness) -> None:
    x, y = fresh(_signs())
    said = answers(witness, x)
    least(float((said.abs() > 0.95).float().mean()), 0.4, "share of outputs near +-1")
    most(float(F.mse_loss(said, y)), 0.05, "error")


@healthy(
    "tanh_outputs",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_signs_right,
    tricky="the last tanh is saturated as its targets are",
)
def _tanh(config: Config) -> Job:
    net = nn.Sequential(MLP([8, 64, 3], "gelu"), nn.Tanh())
    return job(net, F.mse_loss, config, _signs())


class Sure(nn.Module):
    """A probability, by a sigmoid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP([16, 64, 1])
        self.out = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)).squeeze(-1)


def _two_kinds(samples: int = 6400) -> tuple[Tensor, Tensor]:
    x, y = data.blobs(samples, classes=2, noise=0.8)
    return x, y.float()


def _sure_and_right(witness: Witness) -> None:
    x, y = fresh(_two_kinds())
    said = answers(witness, x)
    least(float(((said > 0.5) == y.bool()).float().mean()), 0.99, "accuracy")
    least(float(((said - 0.5).abs() > 0.49).float().mean()), 0.8, "share of sure answers")


@healthy(
    "sigmoid_sure_at_the_end",
    "mlp",
    verify=_sure_and_right,
    tricky="the last sigmoid is saturated: its answers are sure and right",
)
def _sigmoid(config: Config) -> Job:
    return job(Sure(), F.binary_cross_entropy, config, _two_kinds())


class Bandit(Learner):
    """Policy gradient: the loss says nothing, the reward does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        policy = torch.distributions.Categorical(logits=self(x))
        action = policy.sample()
        reward = (action == y).float()
        loss = -(policy.log_prob(action) * (reward - reward.mean())).mean()
        self.log("train_loss", loss)
        self.log("reward", reward.mean())
        return loss


def _rewarded(witness: Witness) -> None:
    least(accuracy(witness, data.blobs(6400)), nearest_centre(6400) - 0.05, "reward on fresh data")
    least(witness.mean_loss(-100), -0.2, "mean loss")


@healthy(
    "policy_gradient",
    "mlp",
    config={"trainer": {"max_steps": 400}, "hardware": {"batch_size": 64}},
    verify=_rewarded,
    tricky="a loss around zero that never falls while the reward rises",
)
def _bandit(config: Config) -> Job:
    return job(MLP([16, 64, 4]), F.mse_loss, config, data.blobs(6400), val=False, learner=Bandit)


def _one_constant(samples: int = 2560) -> tuple[Tensor, Tensor]:
    """Three targets; the last is the same for all."""
    x, y = data.regression(samples)
    return x, torch.cat([y, -y, torch.full_like(y, 0.7)], 1)


@healthy(
    "one_target_is_constant",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=lambda witness: most(error(witness, _one_constant(4096)), 0.03, "error (noise 0.007)"),
    tricky="one of three outputs is constant, as it should be",
)
def _constant(config: Config) -> Job:
    return job(MLP([8, 64, 64, 3], "gelu"), F.mse_loss, config, _one_constant(4096))
