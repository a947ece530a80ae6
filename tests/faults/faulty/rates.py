"""Learning rates that are too high or too low, from the start or from some step on."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, ADAMW, SGD, both, breaks, learns, rises, worse_than
from tests.faults.networks import CNN, GAN, MLP, optimizer_of
from tests.faults.witness import Witness

LARGE = ("update_too_large", "exploding_gradient", "divergence", "loss_oscillation", "loss_spike")
BROKEN = (*LARGE, "nonfinite_loss", "nonfinite_gradient")
SMALL = ("update_too_small", "slow_convergence", "not_learning")


def rate(target: str, value: float, **settings: Any) -> dict[str, Any]:
    return {"optimizer": {"_target_": target, "lr": value, **settings}}


def lower(value: float) -> dict[str, Any]:
    return {"optimizer": {"lr": value}}


# ---- too high from the start ----


@fault(
    "sgd_rate_ten_times_too_large",
    "mlp",
    cause="learning_rate_too_high",
    found=LARGE,
    config=rate(SGD, 3.0),
    verify=both(
        worse_than("sgd_rate_ten_times_too_large", lower(0.1)),
        lambda witness: _bounces(witness, 5.0),
    ),
    repairable=True,
    cured=learns(),
)
def _sgd_mlp(config: Config) -> Job:
    return shared.mlp(config)


def _bounces(witness: Witness, factor: float) -> None:
    start, top = witness.losses[0], max(witness.losses[:50])
    assert top > factor * start, f"the loss climbs from {start:.3g} to {top:.3g} only"


@fault(
    "sgd_rate_gru",
    "gru",
    cause="learning_rate_too_high",
    found=LARGE,
    config=rate(SGD, 3.0),
    verify=both(rises(2.0), worse_than("sgd_rate_gru", lower(0.3))),
    repairable=True,
    cured=learns(),
)
def _sgd_gru(config: Config) -> Job:
    return shared.gru(config)


@fault(
    "sgd_rate_transformer_breaks",
    "transformer",
    cause="learning_rate_too_high",
    found=BROKEN,
    config=rate(SGD, 3.0),
    verify=both(breaks(3), worse_than("sgd_rate_transformer_breaks", lower(0.1))),
    repairable=True,
    cured=learns(),
)
def _sgd_transformer(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "sgd_rate_autoencoder_breaks",
    "autoencoder",
    cause="learning_rate_too_high",
    found=BROKEN,
    config=rate(SGD, 4.0),
    verify=both(breaks(3), worse_than("sgd_rate_autoencoder_breaks", lower(0.5))),
    repairable=True,
    cured=learns(),
)
def _sgd_autoencoder(config: Config) -> Job:
    return shared.autoencoder(config)


@fault(
    "sgd_rate_regression_breaks",
    "mlp",
    cause="learning_rate_too_high",
    found=BROKEN,
    config=rate(SGD, 1.5),
    verify=both(breaks(2), worse_than("sgd_rate_regression_breaks", lower(0.1))),
    repairable=True,
    cured=learns(),
)
def _sgd_regression(config: Config) -> Job:
    return shared.regressor(config)


@fault(
    "sgd_rate_batch_norm_cnn",
    "cnn",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu", "not_learning", "constant_prediction"),
    config=rate(SGD, 3.0),
    verify=worse_than("sgd_rate_batch_norm_cnn", lower(0.1)),
    repairable=True,
    cured=learns(),
)
def _sgd_cnn(config: Config) -> Job:
    return shared.cnn(config)


@fault(
    "momentum_rate_plain_cnn",
    "cnn",
    cause="learning_rate_too_high",
    found=(*BROKEN, "dead_relu", "not_learning", "constant_prediction"),
    config=rate(SGD, 0.5, momentum=0.9),
    verify=worse_than("momentum_rate_plain_cnn", lower(0.02)),
    repairable=True,
    cured=learns(),
)
def _momentum_cnn(config: Config) -> Job:
    return shared.cnn(config, batch_norm=False)


@fault(
    "adam_rate_hundred_times_mlp",
    "mlp",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu"),
    config=rate(ADAM, 0.3),
    verify=both(
        worse_than("adam_rate_hundred_times_mlp", lower(3e-3), 3.0),
        lambda witness: _bounces(witness, 5.0),
    ),
    repairable=True,
    cured=learns(),
)
def _adam_mlp(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "adam_rate_thousand_times_regression",
    "mlp",
    cause="learning_rate_too_high",
    found=LARGE,
    config=rate(ADAM, 3.0),
    verify=both(
        worse_than("adam_rate_thousand_times_regression", lower(3e-3), 3.0),
        lambda witness: _bounces(witness, 100.0),
    ),
    repairable=True,
    cured=learns(),
)
def _adam_regression(config: Config) -> Job:
    return shared.regressor(config)


@fault(
    "adam_rate_mild_transformer",
    "transformer",
    cause="learning_rate_too_high",
    found=(*LARGE, "attention_collapse", "saturated_activation"),
    config=rate(ADAM, 0.1),
    verify=worse_than("adam_rate_mild_transformer", lower(3e-3), 2.0),
    repairable=True,
    cured=learns(),
)
def _adam_transformer(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "adam_rate_gru",
    "gru",
    cause="learning_rate_too_high",
    found=(*LARGE, "not_learning", "loss_plateau", "saturated_activation"),
    config=rate(ADAM, 0.3),
    verify=worse_than("adam_rate_gru", lower(3e-3), 2.0),
    repairable=True,
    cured=learns(),
)
def _adam_gru(config: Config) -> Job:
    return shared.gru(config)


@fault(
    "adamw_rate_gnn",
    "gnn",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu", "not_learning", "constant_prediction"),
    config=rate(ADAMW, 1.0),
    verify=both(
        worse_than("adamw_rate_gnn", lower(3e-3), 1.2), lambda witness: _bounces(witness, 5.0)
    ),
    repairable=True,
    cured=learns(0.8),
)
def _adamw_gnn(config: Config) -> Job:
    return shared.gnn(config)


@fault(
    "adam_rate_mild_autoencoder",
    "autoencoder",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu", "loss_plateau", "not_learning", "representation_collapse"),
    config=rate(ADAM, 0.1),
    verify=worse_than("adam_rate_mild_autoencoder", lower(3e-3), 5.0),
    repairable=True,
    cured=learns(0.3),
)
def _adam_autoencoder(config: Config) -> Job:
    return shared.autoencoder(config)


@fault(
    "sgd_rate_contrastive_collapses",
    "contrastive",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu", "representation_collapse", "loss_plateau", "not_learning"),
    config=rate(SGD, 10.0),
    verify=worse_than("sgd_rate_contrastive_collapses", lower(0.02), 5.0),
    repairable=True,
    cured=learns(0.3),
)
def _sgd_contrastive(config: Config) -> Job:
    return shared.contrastive(config)


@fault(
    "batch_of_one_with_the_rate_of_a_large_batch",
    "mlp",
    cause=("learning_rate_too_high", "loss_oscillation"),
    found=(*BROKEN, "dead_relu"),
    config={**rate(SGD, 1.0), "hardware": {"batch_size": 1}, "trainer": {"max_steps": 300}},
    verify=worse_than(
        "batch_of_one_with_the_rate_of_a_large_batch", {"optimizer": {"lr": 0.02}}, 2.0
    ),
    repairable=True,
    cured=learns(),
)
def _batch_of_one(config: Config) -> Job:
    return shared.mlp(config)


# ---- too high for one part, or for a network that is learned already ----


class FastDiscriminator(GAN):
    """A GAN whose parts have learning rates of their own, by ``component_lrs``."""

    def configure_optimizers(self) -> Any:
        factors = self.config["component_lrs"] or {}
        rate = self.config["optimizer"]["lr"]
        return [
            optimizer_of(
                part,
                {
                    **self.config,
                    "component_lrs": None,
                    "optimizer": {
                        **self.config["optimizer"],
                        "lr": rate * (factors.get(name) or 1),
                    },
                },
            )
            for name, part in (
                ("generator", self.generator),
                ("discriminator", self.discriminator),
            )
        ]


@fault(
    "gan_discriminator_rate",
    "gan",
    cause=("learning_rate_too_high", "update_too_large"),
    found=("exploding_gradient", "gradient_imbalance", "loss_oscillation", "loss_spike"),
    config={**rate(ADAM, 1e-3), "component_lrs": {"discriminator": 500.0}},
    verify=lambda witness: _discriminator_explodes(witness),
    repairable=True,
)
def _gan(config: Config) -> Job:
    angle = 2 * math.pi * torch.rand(2048, generator=torch.Generator().manual_seed(1))
    points = torch.stack([angle.cos(), angle.sin()], 1)
    train = data.loader(points, batch_size=config["hardware"]["batch_size"])
    return Job(FastDiscriminator(config), train)


def _discriminator_explodes(witness: Witness) -> None:
    growth = {
        part: sum(
            float(tensor.double().square().sum())
            for name, tensor in witness.last.items()
            if name.startswith(part)
        )
        / sum(
            float(tensor.double().square().sum())
            for name, tensor in witness.first.items()
            if name.startswith(part)
        )
        for part in ("generator", "discriminator")
    }
    assert growth["discriminator"] > 100, f"the weights grow by {growth}"
    model = witness.model
    with torch.no_grad():
        size = model.discriminator(witness.batch[0]).abs().mean()
    assert size > 50, f"the discriminator answers with {size:.3g}"


class PostNorm(nn.Module):
    """A transformer as of 2017: the norms stand after the sums."""

    def __init__(self, layers: int = 6, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
                for _ in range(layers)
            ]
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position
        for layer in self.layers:
            y = layer(y)
        return self.head(y.mean(1))


@fault(
    "post_norm_transformer_without_warm_up",
    "transformer",
    cause="learning_rate_too_high",
    found=("not_learning", "loss_plateau", "vanishing_gradient", "update_too_large"),
    config=rate(ADAM, 1e-2),
    verify=worse_than("post_norm_transformer_without_warm_up", {"optimizer": {"lr": 1e-3}}, 1.5),
    repairable=True,
    cured=learns(),
)
def _post_norm(config: Config) -> Job:
    return shared.job(PostNorm(), F.cross_entropy, config, data.tokens(2048))


def learned(net: nn.Module, x: Tensor, y: Tensor, steps: int = 200) -> nn.Module:
    """The network after training on some task."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(steps):
        part = slice(32 * step % (len(x) - 32), 32 * step % (len(x) - 32) + 32)
        loss = F.cross_entropy(net(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@fault(
    "fine_tuning_rate_forgets",
    "mlp",
    cause="learning_rate_too_high",
    found=(*LARGE, "dead_relu"),
    config=rate(ADAM, 0.3),
    verify=both(
        lambda witness: _forgets(witness, 3.0),
        worse_than("fine_tuning_rate_forgets", {"optimizer": {"lr": 1e-4}}, 3.0),
    ),
    repairable=True,
    cured=lambda witness: _keeps(witness, 0.1),
)
def _fine_tuning(config: Config) -> Job:
    x, y = data.blobs(2048, noise=2.0)
    net = learned(MLP([16, 64, 64, 64, 4]), x, y)
    return shared.job(net, F.cross_entropy, config, data.blobs(2048, noise=2.2))


def _forgets(witness: Witness, factor: float) -> None:
    seen, start = shared.tail(witness.losses), witness.losses[0]
    assert seen > factor * start, f"the loss goes from {start:.3g} to {seen:.3g} only"


def _keeps(witness: Witness, margin: float) -> None:
    seen, start = shared.tail(witness.losses), witness.losses[0]
    assert seen < start + margin, f"what was learned is lost: {start:.3g} to {seen:.3g}"


@fault(
    "fine_tuning_rate_forgets_cnn",
    "cnn",
    cause="learning_rate_too_high",
    found=(*BROKEN, "dead_relu", "constant_prediction"),
    config=rate(SGD, 2.0),
    verify=worse_than("fine_tuning_rate_forgets_cnn", {"optimizer": {"lr": 0.01}}, 3.0),
    repairable=True,
    cured=lambda witness: _keeps(witness, 0.1),
)
def _fine_tuning_cnn(config: Config) -> Job:
    x, y = data.images(1024, noise=0.9)
    net = learned(CNN(1, 4, batch_norm=False), x, y, 100)
    return shared.job(net, F.cross_entropy, config, data.images(1024, noise=0.9, seed=2))


# ---- too high from some step on ----


@fault(
    "sgd_rate_jumps",
    "mlp",
    cause=("learning_rate_too_high", "scheduler_misuse"),
    found=BROKEN,
    onset=120,
    config=rate(SGD, 0.1),
    verify=lambda witness: _jumps(witness, 120, 40.0),
)
def _sgd_jump(config: Config) -> Job:
    return shared.mlp(config, plans={120: shared.times_rate(50.0)})


def _jumps(witness: Witness, step: int, factor: float) -> None:
    grown = witness.rates[step + 1] / witness.rates[step - 1]
    assert grown > factor, f"the rate grows by {grown:.3g}"
    before = witness.mean_loss(step - 20, step)
    after = max(witness.losses[step : step + 40])
    assert not math.isfinite(after) or after > 3 * before, f"{before:.3g} to {after:.3g}"


@fault(
    "adam_rate_jumps_transformer",
    "transformer",
    cause=("learning_rate_too_high", "scheduler_misuse"),
    found=BROKEN,
    onset=40,
    config=rate(ADAM, 3e-3),
    verify=lambda witness: _jumps(witness, 40, 30.0),
)
def _adam_jump(config: Config) -> Job:
    return shared.transformer(config, plans={40: shared.times_rate(100.0)})


@fault(
    "adam_rate_jumps_gru",
    "gru",
    cause=("learning_rate_too_high", "scheduler_misuse"),
    found=BROKEN,
    onset=120,
    config=rate(ADAM, 3e-3),
    verify=lambda witness: _jumps(witness, 120, 30.0),
)
def _gru_jump(config: Config) -> Job:
    return shared.gru(config, plans={120: shared.times_rate(100.0)})


# ---- too low ----


def _too_low(name: str, mended: Mapping[str, Any], share: float = 0.02) -> shared.Check:
    return both(shared.hardly_moves(share), _slower(name, mended))


def _slower(name: str, mended: Mapping[str, Any]) -> shared.Check:
    def check(witness: Witness) -> None:
        seen, faster = shared.tail(witness.losses), shared.tail(shared.replay(name, mended))
        assert faster < 0.75 * seen, f"{faster:.3g} with mended settings, {seen:.3g} as it is"

    return check


@fault(
    "adam_rate_thousand_times_too_small",
    "mlp",
    cause=("learning_rate_too_low", "update_too_small"),
    found=SMALL,
    config=rate(ADAM, 3e-6),
    verify=_too_low("adam_rate_thousand_times_too_small", lower(3e-3)),
    repairable=True,
    cured=learns(),
)
def _low_mlp(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "sgd_rate_too_small_cnn",
    "cnn",
    cause=("learning_rate_too_low", "update_too_small"),
    found=SMALL,
    config=rate(SGD, 1e-5),
    verify=_too_low("sgd_rate_too_small_cnn", lower(0.03)),
    repairable=True,
    cured=learns(),
)
def _low_cnn(config: Config) -> Job:
    return shared.cnn(config)


@fault(
    "adamw_rate_too_small_transformer",
    "transformer",
    cause=("learning_rate_too_low", "update_too_small"),
    found=SMALL,
    config=rate(ADAMW, 1e-6),
    verify=_too_low("adamw_rate_too_small_transformer", lower(3e-3)),
    repairable=True,
    cured=learns(),
)
def _low_transformer(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "sgd_rate_too_small_gru",
    "gru",
    cause=("learning_rate_too_low", "update_too_small"),
    found=SMALL,
    config=rate(SGD, 3e-5),
    verify=_too_low("sgd_rate_too_small_gru", lower(0.3)),
    repairable=True,
    cured=learns(),
)
def _low_gru(config: Config) -> Job:
    return shared.gru(config)


@fault(
    "adam_rate_somewhat_too_small_autoencoder",
    "autoencoder",
    cause=("learning_rate_too_low", "slow_convergence"),
    found=SMALL,
    config=rate(ADAM, 2e-5),
    verify=_too_low("adam_rate_somewhat_too_small_autoencoder", lower(3e-3), 0.06),
    repairable=True,
    cured=learns(),
)
def _low_autoencoder(config: Config) -> Job:
    return shared.autoencoder(config)


@fault(
    "adam_rate_somewhat_too_small_gnn",
    "gnn",
    cause=("learning_rate_too_low", "slow_convergence", "update_too_small"),
    found=SMALL,
    config={**rate(ADAM, 1e-5), "trainer": {"max_steps": 300}},
    verify=_too_low("adam_rate_somewhat_too_small_gnn", lower(3e-3), 0.05),
    repairable=True,
    cured=learns(0.8),
)
def _low_gnn(config: Config) -> Job:
    return shared.gnn(config)


@fault(
    "sgd_rate_too_small_contrastive",
    "contrastive",
    cause=("learning_rate_too_low", "update_too_small"),
    found=SMALL,
    config=rate(SGD, 1e-5),
    verify=_too_low("sgd_rate_too_small_contrastive", lower(0.02)),
    repairable=True,
    cured=learns(),
)
def _low_contrastive(config: Config) -> Job:
    return shared.contrastive(config)


@fault(
    "adam_epsilon_of_one",
    "mlp",
    cause=("learning_rate_too_low", "update_too_small", "slow_convergence"),
    found=SMALL,
    config=rate(ADAM, 1e-3, eps=1.0),
    verify=_too_low("adam_epsilon_of_one", {"optimizer": {"eps": 1e-8}}, 0.05),
    repairable=True,
    cured=learns(),
)
def _epsilon(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "sgd_dampening",
    "autoencoder",
    cause=("learning_rate_too_low", "slow_convergence", "update_too_small"),
    found=SMALL,
    config=rate(SGD, 0.1, momentum=0.5, dampening=0.999),
    verify=_too_low("sgd_dampening", {"optimizer": {"dampening": 0.0}}, 0.05),
    repairable=True,
    cured=learns(),
)
def _dampening(config: Config) -> Job:
    return shared.autoencoder(config)


@fault(
    "rate_drops_to_almost_nothing",
    "gnn",
    cause=("update_too_small", "learning_rate_too_low", "scheduler_misuse", "frozen_weights"),
    found=("loss_plateau", "slow_convergence"),
    onset=40,
    config=rate(ADAM, 1e-3),
    verify=lambda witness: _drops(witness, 40),
)
def _drop(config: Config) -> Job:
    return shared.gnn(config, plans={40: shared.times_rate(1e-6)})


def _drops(witness: Witness, step: int) -> None:
    early, late = sum(witness.moves[:step]) / step, max(witness.moves[step + 1 :])
    assert late < 1e-4 * early, f"steps of {early:.3g} become {late:.3g}"
    longer = shared.tail(shared.replay("rate_drops_to_almost_nothing", {}))
    assert longer < 0.9 * shared.tail(witness.losses), "there was nothing left to learn"
