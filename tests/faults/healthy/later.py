"""Healthy runs that nobody looked at while rules were written."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.faulty.attention import weights_of
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
from tests.faults.networks import (
    CNN,
    GNN,
    MLP,
    Autoencoder,
    GRUClassifier,
    Learner,
    Towers,
    Transformer,
    contrastive_loss,
    optimizer_of,
)
from tests.faults.witness import Witness

Check = Callable[[Witness], None]
SGD = "torch.optim.SGD"


def _steps(count: int, **more: Any) -> dict[str, Any]:
    return {"trainer": {"max_steps": count}, **more}


def _right(tensors: Callable[[], tuple[Tensor, ...]], bound: float) -> Check:
    def verify(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses))
        least(accuracy(witness, tensors()), bound, "accuracy on fresh samples")

    return verify


def _near_best(samples: int, slack: float = 0.04, **blobs: Any) -> Check:
    def verify(witness: Witness) -> None:
        best = nearest_centre(samples, **blobs)
        got = accuracy(witness, data.blobs(samples, **blobs))
        least(got, best - slack, "accuracy on fresh points")

    return verify


# ---- ordinary ----


def _five_images() -> tuple[Tensor, Tensor]:
    return data.images(2400, classes=5, noise=0.5, seed=121)


@healthy(
    "later_cnn_of_five_classes",
    "cnn",
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=_right(_five_images, 0.9),
)
def _cnn(config: Config) -> Job:
    return job(CNN(1, 5, "gelu"), F.cross_entropy, config, _five_images())


def _largest_sum() -> tuple[Tensor, Tensor]:
    x, _ = data.sequences(6000, time=9, features=5, seed=122)
    return x, x[..., :3].sum(1).argmax(-1)


@healthy(
    "later_gru_of_two_layers",
    "gru",
    config=_steps(300, optimizer={"lr": 4e-3}),
    verify=_right(_largest_sum, 0.85),
)
def _gru(config: Config) -> Job:
    return job(GRUClassifier(5, 3, width=36, layers=2), F.cross_entropy, config, _largest_sum())


def _meetings() -> tuple[Tensor, Tensor, Tensor]:
    return data.graphs(5000, nodes=8, seed=123)


@healthy(
    "later_gnn_of_two_rounds",
    "gnn",
    config=_steps(250, optimizer={"_target_": "torch.optim.AdamW", "lr": 3e-3}),
    verify=_right(_meetings, 0.72),
)
def _gnn(config: Config) -> Job:
    return job(GNN(4, 2, width=40, layers=2), F.cross_entropy, config, _meetings())


def _thirty_words() -> tuple[Tensor, Tensor]:
    return data.tokens(4000, length=20, kinds=30, seed=124)


@healthy(
    "later_transformer_of_three_blocks",
    "transformer",
    config=_steps(200, optimizer={"lr": 1e-3}, model={"warmup_share": 0.1}),
    verify=_right(_thirty_words, 0.9),
)
def _transformer(config: Config) -> Job:
    net = Transformer(30, 2, width=24, layers=3, heads=3, length=20)
    return job(net, F.cross_entropy, config, _thirty_words())


def _on_a_plane(samples: int = 4000) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(125)
    x = torch.randn(samples, 5, generator=g) @ torch.randn(5, 22, generator=g) / 5**0.5
    x = x + 0.1 * torch.randn(x.shape, generator=g)
    return x, x


def _rebuilds(witness: Witness) -> None:
    most(error(witness, _on_a_plane()), 0.15, "error on fresh points (variance 1)")


@healthy(
    "later_autoencoder_of_a_plane",
    "autoencoder",
    config=_steps(250),
    verify=_rebuilds,
)
def _autoencoder(config: Config) -> Job:
    return job(Autoencoder(22, 7, "gelu"), F.mse_loss, config, _on_a_plane(), outputs="loss")


def _two_views() -> tuple[Tensor, Tensor, Tensor]:
    return (*data.pairs(5000, first=14, second=11, latent=5, seed=126), torch.zeros(5000))


def _finds_pairs(witness: Witness) -> None:
    left, right, _ = fresh(_two_views())
    said = answers(witness, left[:64], right[:64]).argmax(1)
    least(float((said == torch.arange(64)).float().mean()), 0.6, "pairs found among 64")


@healthy(
    "later_contrastive_of_large_batches",
    "contrastive",
    config=_steps(200, hardware={"batch_size": 96}),
    verify=_finds_pairs,
)
def _contrastive(config: Config) -> Job:
    return job(Towers(14, 11, 24), contrastive_loss, config, _two_views(), outputs="loss")


def _wave() -> tuple[Tensor, Tensor]:
    return data.regression(6000, features=6, seed=127)


def _follows(witness: Witness) -> None:
    most(error(witness, _wave()), 0.15, "error on fresh points (variance 0.7)")


@healthy(
    "later_regressor_of_silu",
    "mlp",
    config=_steps(300, optimizer={"_target_": "torch.optim.NAdam", "lr": 2e-3}),
    verify=_follows,
)
def _regressor(config: Config) -> Job:
    net = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    return job(net, F.mse_loss, config, _wave())


# ---- tricky: steps and schedules ----


_EIGHT = {"features": 18, "classes": 8, "noise": 2.0, "seed": 131}


@healthy(
    "later_sgd_with_nesterov_and_a_large_rate",
    "mlp",
    tricky="a rate of 0.2 with momentum, and a loss that wobbles",
    config=_steps(220, optimizer={"_target_": SGD, "lr": 0.2, "momentum": 0.8, "nesterov": True}),
    verify=_near_best(6000, **_EIGHT),
)
def _nesterov(config: Config) -> Job:
    net = MLP([18, 64, 8], norm=True)
    return job(net, F.cross_entropy, config, data.blobs(6000, **_EIGHT))


def _plateaus(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.MultiStepLR(optimizer, [120, 180], gamma=0.2)


@healthy(
    "later_cnn_rate_falls_twice_to_a_twentyfifth",
    "cnn",
    tricky="the loss hardly moves after the second fall of the rate",
    config=_steps(240, optimizer={"_target_": SGD, "lr": 0.05, "momentum": 0.9}),
    verify=_right(lambda: data.images(2400, classes=3, noise=0.7, seed=132), 0.9),
)
def _falls_twice(config: Config) -> Job:
    tensors = data.images(2400, classes=3, noise=0.7, seed=132)
    return job(CNN(1, 3), F.cross_entropy, config, tensors, schedule=_plateaus)


def _trapezoid(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20, max(0.0, (240 - s) / 60)))


@healthy(
    "later_transformer_warm_up_stable_decay",
    "transformer",
    tricky="the rate ends at exactly nothing",
    config=_steps(240, optimizer={"_target_": "torch.optim.AdamW", "lr": 2e-3}),
    verify=_right(lambda: data.tokens(4000, length=11, kinds=17, seed=133), 0.9),
)
def _stable(config: Config) -> Job:
    tensors = data.tokens(4000, length=11, kinds=17, seed=133)
    net = Transformer(17, 2, width=28, heads=4, length=11)
    return job(net, F.cross_entropy, config, tensors, schedule=_trapezoid)


def _noisy_sum() -> tuple[Tensor, Tensor]:
    return data.sequences(4000, time=16, features=3, seed=134)


def _cuts_some(witness: Witness) -> None:
    # the trainer has cut before anybody sees the gradients
    cut = sum(norm > 0.999 for norm in witness.norms) / len(witness.norms)
    least(cut, 0.01, "share of steps whose gradient is cut")
    _right(_noisy_sum, 0.85)(witness)


@healthy(
    "later_gru_clip_of_one_from_the_recipe",
    "gru",
    tricky="a norm of one cuts part of the gradients",
    config={
        "trainer": {"max_steps": 300, "gradient_clip_val": 1.0},
        "optimizer": {"lr": 5e-3},
    },
    verify=_cuts_some,
)
def _clip_of_one(config: Config) -> Job:
    return job(GRUClassifier(3, 2, width=40), F.cross_entropy, config, _noisy_sum())


class Averaged(Learner):
    """Keeps a moving average of its weights, and validates with that."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.05)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        *inputs, target = batch
        self.log("val_loss", self.loss(self.average(*inputs), target))


_SIX = {"features": 15, "classes": 6, "noise": 1.8, "seed": 135}


@healthy(
    "later_moving_average_of_weights",
    "mlp",
    tricky="half of the parameters have no gradient and no optimizer",
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=_near_best(6000, **_SIX),
)
def _moving_average(config: Config) -> Job:
    net = MLP([15, 56, 56, 6], "gelu")
    return job(net, F.cross_entropy, config, data.blobs(6000, **_SIX), learner=Averaged)


# ---- tricky: losses ----


_OVERLAP = {"features": 10, "classes": 3, "noise": 6.0, "seed": 141}


@healthy(
    "later_classes_that_overlap_by_half",
    "mlp",
    tricky="the loss comes to its floor early, and high above zero",
    config=_steps(250, optimizer={"lr": 1e-3}),
    verify=_near_best(12000, slack=0.05, **_OVERLAP),
)
def _overlap(config: Config) -> Job:
    net = MLP([10, 24, 3], "tanh")
    return job(net, F.cross_entropy, config, data.blobs(12000, **_OVERLAP))


def _counts() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(142)
    x = torch.randn(6000, 5, generator=g)
    rate = (1.0 + 0.5 * x[:, :1] - 0.4 * x[:, 1:2]).exp()
    return x, torch.poisson(rate, generator=g)


def _expects(witness: Witness) -> None:
    x, y = fresh(_counts())
    rate = (1.0 + 0.5 * x[:, :1] - 0.4 * x[:, 1:2]).exp()
    truth = float(F.poisson_nll_loss(rate.log(), y))
    most(float(F.poisson_nll_loss(answers(witness, x), y)), truth + 0.08, "loss on fresh counts")


@healthy(
    "later_poisson_loss_below_zero",
    "mlp",
    tricky="the loss is noisy and negative",
    config=_steps(300),
    verify=_expects,
)
def _poisson(config: Config) -> Job:
    net = MLP([5, 32, 1], "gelu")
    return job(net, F.poisson_nll_loss, config, _counts())


def _quantile(said: Tensor, wanted: Tensor) -> Tensor:
    gap = wanted - said
    return torch.maximum(0.9 * gap, -0.1 * gap).mean()


def _covers(witness: Witness) -> None:
    x, y = fresh(_wave())
    below = float((y <= answers(witness, x)).float().mean())
    least(below, 0.82, "share below the ninth decile")
    most(below, 0.96, "share below the ninth decile")


@healthy(
    "later_ninth_decile",
    "mlp",
    tricky="a loss with two slopes, whose gradient never shrinks",
    config=_steps(300, optimizer={"lr": 2e-3}),
    verify=_covers,
)
def _decile(config: Config) -> Job:
    return job(MLP([6, 48, 48, 1], "gelu"), _quantile, config, _wave())


class Harder(Learner):
    """Adds noise to its inputs that grows in steps, so that the loss rises at each."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        x, y = batch
        noise = 0.8 * (self.global_step // 75)
        return super().training_step([x + noise * torch.randn_like(x), y], batch_idx)


_SEVEN = {"features": 16, "classes": 7, "noise": 1.2, "seed": 143}


@healthy(
    "later_noise_on_the_inputs_grows_in_stages",
    "mlp",
    tricky="the loss is raised twice on purpose",
    config=_steps(225, optimizer={"lr": 2e-3}),
    verify=_near_best(6000, **_SEVEN),
)
def _stages(config: Config) -> Job:
    net = MLP([16, 64, 64, 7])
    return job(net, F.cross_entropy, config, data.blobs(6000, **_SEVEN), learner=Harder)


def _few_of_many() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(144)
    x = torch.randn(6000, 12, generator=g)
    score = x @ torch.randn(12, 10, generator=g)
    return x, (score > 4.5).float()


def _tags_right(witness: Witness) -> None:
    x, y = fresh(_few_of_many())
    said = answers(witness, x) > 0
    found = float((said & (y > 0)).sum() / y.sum())
    least(found, 0.6, "share of the rare tags that are found")
    least(float((said == (y > 0)).float().mean()), 0.93, "share of right tags")


@healthy(
    "later_tags_of_which_most_are_absent",
    "mlp",
    tricky="nearly all targets are zero, and most answers are",
    config=_steps(300),
    verify=_tags_right,
)
def _absent(config: Config) -> Job:
    loss = F.binary_cross_entropy_with_logits
    return job(MLP([12, 64, 10]), loss, config, _few_of_many())


# ---- tricky: inside ----


class Probable(MLP):
    """Ends in the logarithm of its probabilities, to which cross-entropy adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(-1)


_FIVE = {"features": 11, "classes": 5, "noise": 1.6, "seed": 151}


@healthy(
    "later_log_softmax_before_cross_entropy",
    "mlp",
    tricky="a softmax twice, where the second changes nothing",
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=_near_best(6000, **_FIVE),
)
def _twice(config: Config) -> Job:
    return job(Probable([11, 48, 5]), F.cross_entropy, config, data.blobs(6000, **_FIVE))


class Slim(nn.Module):
    """Rectified twice squared units, of which most are zero, beside a way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.around = nn.Linear(9, 128), nn.Linear(9, 32)
        self.act = nn.ReLU()
        self.second = nn.Linear(128, 32)
        self.head = nn.Linear(32, 2)
        nn.init.constant_(self.first.bias, -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.around(x) + self.second(self.act(self.first(x)).square()))


def _nine_rings() -> tuple[Tensor, Tensor]:
    return data.rings(5000, features=9, seed=152)


def _sparse_and_right(witness: Witness) -> None:
    _right(_nine_rings, 0.85)(witness)
    x, _ = fresh(_nine_rings())
    net = witness.model.net
    with torch.no_grad():
        least(float((net.first(x) <= 0).float().mean()), 0.6, "share of zeros")


@healthy(
    "later_squared_relu_mostly_zero",
    "mlp",
    tricky="most units are zero for most samples, and each is needed by some",
    config=_steps(250, optimizer={"lr": 2e-3}),
    verify=_sparse_and_right,
)
def _squared(config: Config) -> Job:
    return job(Slim(), F.cross_entropy, config, _nine_rings())


def _before(samples: int = 4000) -> tuple[Tensor, Tensor]:
    return data.copies(samples, length=9, kinds=12, seed=153)


def _tokens_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _looks_at_one(witness: Witness) -> None:
    _right(_before, 0.9)(witness)
    for weights in weights_of(witness):
        least(float(weights.amax(-1).mean()), 0.8, "mean of the largest weight")


@healthy(
    "later_single_head_that_copies",
    "transformer",
    tricky="attention ends on one key, which is right",
    config=_steps(300, optimizer={"lr": 3e-3}),
    verify=_looks_at_one,
)
def _single_head(config: Config) -> Job:
    net = Transformer(12, 12, width=32, heads=1, layers=1, length=9, each=True)
    with torch.no_grad():
        net.position *= 10
    return job(net, _tokens_loss, config, _before())


class ZeroStart(nn.Module):
    """Residual blocks whose last layers begin at zero, so that each begins as nothing."""

    def __init__(self, width: int = 40, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(14, width)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
                )
                for _ in range(blocks)
            ]
        )
        self.head = nn.Linear(width, 4)
        for last in [block[3] for block in self.blocks] + [self.head]:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


_FOUR = {"features": 14, "classes": 4, "noise": 2.0, "seed": 154}


@healthy(
    "later_residual_blocks_begin_as_nothing",
    "mlp",
    tricky="no gradient at first before the head, and constant answers",
    config=_steps(200, optimizer={"lr": 1e-3}),
    verify=_near_best(6000, **_FOUR),
)
def _zero_start(config: Config) -> Job:
    return job(ZeroStart(), F.cross_entropy, config, data.blobs(6000, **_FOUR))


# ---- tricky: wiring and data ----


class Features(Learner):
    """Trains a head on features of a frozen network that is in evaluation mode."""

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net.head, self.config)

    def on_train_epoch_start(self) -> None:
        self.net.features.eval()


def _prepared(tensors: tuple[Tensor, Tensor]) -> CNN:
    net = CNN(1, 4)
    x, y = parts(*tensors)[0]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    net.features.requires_grad_(False)
    net.head = nn.Linear(32, 4)
    return net


def _four_images() -> tuple[Tensor, Tensor]:
    return data.images(2000, classes=4, noise=0.5, seed=161)


@healthy(
    "later_new_head_on_frozen_features",
    "cnn",
    tricky="most layers are frozen, and in evaluation mode",
    config=_steps(180, optimizer={"lr": 1e-2}),
    verify=_right(_four_images, 0.9),
)
def _new_head(config: Config) -> Job:
    tensors = _four_images()
    return job(_prepared(tensors), F.cross_entropy, config, tensors, learner=Features)


def _wide_table() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(162)
    x, y = data.blobs(5000, features=10, classes=3, noise=1.5, seed=162)
    x[:, 4] = 3e3 + 900 * torch.randn(5000, generator=g)
    x[:, 7] = 1e-3 * torch.randn(5000, generator=g)
    return x, y


class Whitened(nn.Module):
    """Takes raw columns, and standardizes them in its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.rest = MLP([10, 40, 3])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(x))


@healthy(
    "later_raw_columns_standardized_inside",
    "mlp",
    tricky="inputs in the thousands, which the first layer brings to one",
    config=_steps(220),
    verify=_right(_wide_table, 0.85),
)
def _raw_columns(config: Config) -> Job:
    return job(Whitened(), F.cross_entropy, config, _wide_table())


class Sides(Towers):
    """One encoder for both sides, under two names."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features, width=20)
        self.right = self.left


def _same_kind() -> tuple[Tensor, Tensor, Tensor]:
    x, _ = data.blobs(5000, features=12, classes=40, seed=163)
    g = torch.Generator().manual_seed(163)
    return x, x + 0.4 * torch.randn(x.shape, generator=g), torch.zeros(5000)


def _finds_same(witness: Witness) -> None:
    left, right, _ = fresh(_same_kind())
    said = answers(witness, left[:64], right[:64]).argmax(1)
    least(float((said == torch.arange(64)).float().mean()), 0.6, "pairs found among 64")


@healthy(
    "later_one_encoder_for_both_sides",
    "contrastive",
    tricky="parameters under two names",
    config=_steps(220, optimizer={"lr": 2e-3}),
    verify=_finds_same,
)
def _one_encoder(config: Config) -> Job:
    return job(Sides(12), contrastive_loss, config, _same_kind(), outputs="loss")


class EverySecond(Learner):
    """Adds up two batches by hand, and clears what it added after each step."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        self.manual_backward(given["loss"] / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return given


@healthy(
    "later_gru_steps_every_second_batch_by_hand",
    "gru",
    tricky="gradients are left over from one batch to the next on purpose",
    config=_steps(220, optimizer={"lr": 5e-3}, hardware={"batch_size": 16}),
    verify=_right(_largest_sum, 0.85),
)
def _every_second(config: Config) -> Job:
    net = GRUClassifier(5, 3, width=32)
    return job(net, F.cross_entropy, config, _largest_sum(), learner=EverySecond)
