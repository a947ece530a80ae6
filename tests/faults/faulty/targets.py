"""Data that is not what the network or the loss takes it for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer
from tests.faults.networks import (
    CNN,
    GNN,
    MLP,
    Autoencoder,
    GRUClassifier,
    Learner,
    Loss,
    Transformer,
)
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]
Spoil = Callable[[list[Tensor]], list[Tensor]]


class Spoiled(Learner):
    """Takes batches that are spoiled from a step on, or at one step alone.

    Args:
        spoil: From the tensors of a batch to others.
        since: The first step.
        until: The step before which it ends.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        config: Config,
        *,
        spoil: Spoil,
        since: int = 0,
        until: int | None = None,
    ) -> None:
        super().__init__(net, loss, config)
        self.spoil = spoil
        self.since = since
        self.until = until
        self.batches: list[list[Tensor]] = []

    def on_after_batch_transfer(self, batch: Sequence[Tensor], dataloader_idx: int) -> Any:
        if self.global_step >= self.since and (self.until is None or self.global_step < self.until):
            batch = self.spoil([x.clone() for x in batch])
        if self.trainer.training:
            self.batches.append(list(batch))
        return batch


def _sizes(batches: Sequence[Sequence[Tensor]], place: int = 0) -> list[float]:
    return [float(batch[place].double().square().mean().sqrt()) for batch in batches]


# ---- the scale of inputs ----


def _large(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        (size,) = _sizes([witness.batch])
        assert size > least, f"the inputs have a root mean square of {size:.3g}"

    return verify


def _learns(witness: Witness) -> None:
    (size,) = _sizes([witness.batch])
    assert 0.3 < size < 3, f"the inputs have a root mean square of {size:.3g}"
    assert witness.fell(0.7), "the loss does not fall"


_SCALE = (
    *("saturated_activation", "exploding_gradient", "loss_spike", "loss_oscillation", "dead_relu"),
    *("divergence", "not_learning", "slow_convergence", "update_too_large", "vanishing_gradient"),
)


def _bytes(x: Tensor) -> Tensor:
    """Pictures from 0 to 255."""
    return ((x - x.min()) / (x.max() - x.min()) * 255).round()


@fault(
    "cnn_pictures_from_0_to_255",
    "cnn",
    cause="input_scale",
    found=_SCALE,
    verify=_large(50.0),
)
def _pictures(config: Config) -> Job:
    x, y = data.images(1024)
    net = CNN(1, 4, batch_norm=False)
    return Job(Learner(net, F.cross_entropy, config), data.loader(_bytes(x), y))


@fault(
    "mlp_tanh_features_in_thousands",
    "mlp",
    cause="input_scale",
    found=_SCALE,
    config={"data": {"standardize": False}, "trainer": {"max_steps": 250}},
    verify=_large(500.0),
    repairable=True,
    cured=_learns,
)
def _thousands(config: Config) -> Job:
    x, y = data.rings(2048, features=3)
    x = 1000.0 * x
    if config["data"]["standardize"]:
        x = (x - x.mean(0)) / x.std(0)
    return Job(Learner(MLP([3, 64, 64, 2], "tanh"), F.cross_entropy, config), data.loader(x, y))


@fault(
    "gru_one_feature_in_seconds_since_1970",
    "gru",
    cause="input_scale",
    found=_SCALE,
    verify=_large(1e6),
)
def _timestamps(config: Config) -> Job:
    x, y = data.sequences(1024)
    stamps = 1.7e9 + 60.0 * torch.arange(x.shape[1]).expand(len(x), -1)
    x = torch.cat([x, stamps[..., None]], -1)
    return Job(Learner(GRUClassifier(5, 2), F.cross_entropy, config), data.loader(x, y))


def _tiny(witness: Witness) -> None:
    (size,) = _sizes([witness.batch])
    assert size < 0.01, f"the inputs have a root mean square of {size:.3g}"
    assert not witness.fell(0.9), "it learns all the same"


@fault(
    "cnn_pictures_divided_by_255_twice",
    "cnn",
    cause="input_scale",
    found=("not_learning", "slow_convergence", "constant_prediction", "vanishing_gradient"),
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05}},
    verify=_tiny,
)
def _twice(config: Config) -> Job:
    x, y = data.images(1024)
    net = CNN(1, 4, batch_norm=False)
    return Job(Learner(net, F.cross_entropy, config), data.loader(_bytes(x) / 255**2, y))


def _grows(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Spoiled)
    sizes = _sizes(model.batches)
    assert max(sizes[: model.since]) < 3
    assert min(sizes[model.since :]) > 100


@fault(
    "mlp_features_no_longer_standardized_from_120",
    "mlp",
    cause="input_scale",
    found=_SCALE,
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_grows,
)
def _no_longer(config: Config) -> Job:
    x, y = data.blobs(2048, noise=2.0)
    x = (x - x.mean(0)) / x.std(0)
    module = Spoiled(
        MLP([16, 64, 64, 4]), F.cross_entropy, config, spoil=lambda b: [300 * b[0], b[1]], since=120
    )
    return Job(module, data.loader(x, y))


# ---- data that is not finite ----


def _not_finite(witness: Witness) -> None:
    assert any(not torch.isfinite(x).all() for x in witness.batch), "the first batch is finite"
    assert any(loss != loss for loss in witness.losses[:3]), "the loss is finite"


_NAN = ("nonfinite_loss", "nonfinite_gradient", "divergence")


@fault(
    "mlp_missing_values_are_nan",
    "mlp",
    cause="nonfinite_data",
    found=_NAN,
    verify=_not_finite,
)
def _missing(config: Config) -> Job:
    x, y = data.blobs(1024)
    x[torch.rand_like(x) < 0.03] = float("nan")
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), data.loader(x, y))


@fault(
    "regression_targets_have_nan",
    "mlp",
    cause="nonfinite_data",
    found=_NAN,
    verify=_not_finite,
)
def _nan_targets(config: Config) -> Job:
    x, y = data.regression(1024)
    y[::10] = (-y[::10].abs()).log()
    return Job(Learner(MLP([8, 64, 1], "tanh"), F.mse_loss, config), data.loader(x, y))


class Normed(GNN):
    """Takes an adjacency that was divided by the degrees beforehand."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        for own, others in zip(self.own, self.others, strict=True):
            x = F.relu(own(x) + others(weights @ x))
        return self.head(x.mean(1))


@fault(
    "gnn_isolated_nodes_divided_by_zero",
    "gnn",
    cause="nonfinite_data",
    found=_NAN,
    verify=_not_finite,
)
def _isolated(config: Config) -> Job:
    x, adjacency, y = data.graphs(1024)
    weights = adjacency / adjacency.sum(-1, keepdim=True)
    return Job(Learner(Normed(4, 2), F.cross_entropy, config), data.loader(x, weights, y))


def _log_of_zero(batch: list[Tensor]) -> list[Tensor]:
    batch[0][:2] = torch.zeros_like(batch[0][:2]).log()
    return batch


def _spoiled_late(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Spoiled)
    good = [bool(all(torch.isfinite(x).all() for x in batch)) for batch in model.batches]
    assert all(good[: model.since])
    assert not any(good[model.since : model.until])
    losses = torch.tensor(witness.losses)
    assert torch.isfinite(losses[: model.since]).all()
    assert not torch.isfinite(losses[model.since + 1 :]).any()


@fault(
    "cnn_log_of_zero_from_120",
    "cnn",
    cause="nonfinite_data",
    found=_NAN,
    onset=120,
    config={"trainer": {"max_steps": 200}},
    verify=_spoiled_late,
)
def _late_logs(config: Config) -> Job:
    x, y = data.images(1024)
    net = CNN(1, 4, batch_norm=False)
    module = Spoiled(net, F.cross_entropy, config, spoil=_log_of_zero, since=120)
    return Job(module, data.loader(x, y))


@fault(
    "gru_one_corrupt_batch_at_120",
    "gru",
    cause=("nonfinite_data", "nonfinite_loss"),
    found=_NAN,
    onset=120,
    config={"trainer": {"max_steps": 200}},
    verify=_spoiled_late,
)
def _corrupt(config: Config) -> Job:
    x, y = data.sequences(1024)
    module = Spoiled(
        GRUClassifier(4, 2), F.cross_entropy, config, spoil=_log_of_zero, since=120, until=121
    )
    return Job(module, data.loader(x, y))


# ---- targets that the loss does not mean ----


def _broadcast(witness: Witness) -> None:
    y, found = witness.batch[-1], answer(witness)
    assert y.shape != found.shape
    assert (found - y).shape == (len(y), len(y))
    # against every target at once nothing is better than their mean
    assert witness.mean_loss(-20) > 0.7 * float(y.var(correction=0))
    assert float(found.std()) < 0.4 * float(y.std()), "it learns all the same"


def _mse(found: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(found, y)


_MISMATCH = ("not_learning", "loss_plateau", "slow_convergence", "constant_prediction")


@fault(
    "regression_targets_without_last_dimension",
    "mlp",
    cause="loss_target_mismatch",
    found=_MISMATCH,
    verify=_broadcast,
)
def _flat_targets(config: Config) -> Job:
    x, y = data.regression(1024)
    return Job(Learner(MLP([8, 64, 64, 1]), _mse, config), data.loader(x, y.squeeze(-1)))


class Flat(GRUClassifier):
    """Gives one number a sample, without a last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


@fault(
    "gru_regression_targets_with_last_dimension",
    "gru",
    cause="loss_target_mismatch",
    found=_MISMATCH,
    verify=_broadcast,
)
def _long_targets(config: Config) -> Job:
    x, _ = data.sequences(1024)
    y = x[..., 0].sum(1, keepdim=True) / 3
    return Job(Learner(Flat(4, 1), _mse, config), data.loader(x, y))


def _binary(found: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(found.squeeze(-1), y)


def _outside(witness: Witness) -> None:
    y = witness.batch[-1]
    assert float(y.min()) < 0 or float(y.max()) > 1, "the targets are probabilities"
    assert min(witness.losses[len(witness.losses) // 2 :]) < 0, "the loss is positive"


@fault(
    "mlp_bce_with_labels_minus_one_and_one",
    "mlp",
    cause="loss_target_mismatch",
    found=(*_MISMATCH, "divergence", "exploding_gradient", "update_too_large"),
    verify=_outside,
)
def _signs(config: Config) -> Job:
    x, y = data.rings(1024)
    return Job(Learner(MLP([8, 64, 64, 1]), _binary, config), data.loader(x, 2.0 * y - 1))


def _pixels(found: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(found, x)


@fault(
    "autoencoder_bce_with_pictures_from_0_to_255",
    "autoencoder",
    cause=("loss_target_mismatch", "input_scale"),
    found=(*_SCALE, *_MISMATCH),
    verify=_outside,
)
def _bce_pictures(config: Config) -> Job:
    x, _ = data.images(1024)
    x = _bytes(x).flatten(1)
    return Job(Learner(Autoencoder(144), _pixels, config), data.loader(x, x))


@fault(
    "cnn_bce_with_masks_from_0_to_255",
    "cnn",
    cause="loss_target_mismatch",
    found=(*_MISMATCH, "divergence", "exploding_gradient", "update_too_large"),
    verify=_outside,
)
def _masks(config: Config) -> Job:
    x, _ = data.images(1024)
    net = nn.Sequential()
    net.features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
    net.head = nn.Conv2d(16, 1, 1)
    return Job(Learner(net, _pixels, config), data.loader(x, 255.0 * (x > 0.5).float()))


def _turned(batch: list[Tensor]) -> list[Tensor]:
    return [batch[0], 2 * batch[1] - 1]


def _outside_late(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Spoiled)
    lowest = [float(batch[-1].min()) for batch in model.batches]
    assert min(lowest[: model.since]) == 0
    assert max(lowest[model.since :]) == -1
    assert witness.mean_loss(-20) < 0 < witness.mean_loss(100, 120)


@fault(
    "transformer_bce_labels_turn_to_signs_at_120",
    "transformer",
    cause="loss_target_mismatch",
    found=("divergence", "loss_spike", "exploding_gradient"),
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_outside_late,
)
def _signs_late(config: Config) -> Job:
    x, y = data.tokens(2048)
    module = Spoiled(Transformer(20, 1), _binary, config, spoil=_turned, since=120)
    return Job(module, data.loader(x, y.float()))


def _one_label(witness: Witness) -> None:
    y = witness.batch[-1]
    assert (y == y[0]).all()
    found = answer(witness)
    assert (found.argmax(-1) == y).all()
    assert witness.mean_loss(-20) < 0.01, "it is not trivial"


@fault(
    "cnn_all_labels_are_the_same",
    "cnn",
    cause=("loss_target_mismatch", "constant_prediction"),
    found=("vanishing_gradient",),
    verify=_one_label,
)
def _same_labels(config: Config) -> Job:
    x, y = data.images(1024)
    # the folder's name was taken for the class
    return Job(Learner(CNN(1, 4), F.cross_entropy, config), data.loader(x, torch.zeros_like(y)))


# ---- losses that are summed ----


def _summed(count: int) -> Verify:
    def verify(witness: Witness) -> None:
        y = witness.batch[-1]
        assert y.numel() == count, f"{y.numel()} numbers are summed"
        # at the start the loss of one sample is about what guessing gives
        ratio = witness.losses[0] / count
        assert 0.2 < ratio < 10, f"the first loss is {witness.losses[0]:.3g}"

    return verify


_SUM = (
    *("learning_rate_too_high", "exploding_gradient", "divergence", "loss_oscillation"),
    *("update_too_large", "loss_spike", "not_learning", "nonfinite_loss", "nonfinite_gradient"),
    *("clipping_dominates", "dead_relu", "constant_prediction"),
)


def _sum_classes(found: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(found, y, reduction="sum")


@fault(
    "mlp_sgd_summed_cross_entropy",
    "mlp",
    cause="wrong_reduction",
    found=_SUM,
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
    verify=_summed(32),
)
def _mlp_sum(config: Config) -> Job:
    x, y = data.blobs(1024, noise=2.0)
    return Job(Learner(MLP([16, 64, 64, 4]), _sum_classes, config), data.loader(x, y))


@fault(
    "transformer_summed_over_tokens_and_clipped",
    "transformer",
    cause="wrong_reduction",
    found=_SUM,
    config={"trainer": {"gradient_clip_val": 1.0}},
    verify=_summed(32 * 12),
)
def _transformer_sum(config: Config) -> Job:
    x, y = data.copies(1024)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").sum()

    return Job(Learner(Transformer(16, 16, length=12, each=True), loss, config), data.loader(x, y))


@fault(
    "autoencoder_sgd_summed_squares",
    "autoencoder",
    cause="wrong_reduction",
    found=_SUM,
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-3, "momentum": 0.9}},
    verify=_summed(32 * 16),
)
def _autoencoder_sum(config: Config) -> Job:
    x, _ = data.blobs(1024)
    loss = nn.MSELoss(reduction="sum")
    return Job(Learner(Autoencoder(16), loss, config), data.loader(x, x))


def _sum_from_now(module: Learner) -> None:
    module.loss = _sum_graphs


def _sum_graphs(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none").sum()


def _summed_late(witness: Witness) -> None:
    before, after = witness.mean_loss(110, 120), witness.mean_loss(120, 122)
    assert after > 20 * before, f"the loss goes from {before:.3g} to {after:.3g}"


@fault(
    "gnn_loss_summed_from_120",
    "gnn",
    cause="wrong_reduction",
    found=_SUM,
    onset=120,
    config={
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"max_steps": 240},
    },
    verify=_summed_late,
)
def _gnn_sum(config: Config) -> Job:
    x, adjacency, y = data.graphs(2048)
    module = Learner(GNN(4, 2), F.cross_entropy, config, plans={120: _sum_from_now})
    return Job(module, data.loader(x, adjacency, y))
