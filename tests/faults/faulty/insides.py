"""Networks that are sick inside: dead or saturated units, collapsed codes, constant answers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer, mean_cosine, seen, share, silent_units, spread
from tests.faults.networks import (
    ACTIVATIONS,
    CNN,
    GNN,
    MLP,
    Autoencoder,
    GRUClassifier,
    Learner,
    Towers,
    Transformer,
    scaled,
)
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]


def _learns(witness: Witness) -> None:
    assert witness.fell(0.7), "the loss does not fall"


def _biased(module: nn.Module, value: float, part: float = 1.0) -> nn.Module:
    """Sets the bias of the first `part` of the units of every layer."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None:
                layer.bias[: int(part * len(layer.bias))] = value
    return module


# ---- dead ReLU ----


def _dead(least: float, *, images: bool = False, stuck: bool = True) -> Verify:
    def verify(witness: Witness) -> None:
        part = silent_units(seen(witness, nn.ReLU), images)
        assert part >= least, f"only {part:.2f} of the units are silent"
        assert not stuck or not witness.fell(0.85), "the loss falls all the same"

    return verify


_DEAD = ("constant_prediction", "not_learning", "vanishing_gradient", "dead_component")


@fault(
    "mlp_relu_biases_minus_ten",
    "mlp",
    cause="dead_relu",
    found=(*_DEAD, "representation_collapse"),
    verify=_dead(1.0),
)
def _mlp_bias(config: Config) -> Job:
    x, y = data.blobs(1024)
    net = MLP([16, 64, 64, 4])
    _biased(net.body, -10.0)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "mlp_relu_most_units_dead",
    "mlp",
    cause="dead_relu",
    config={"trainer": {"max_steps": 250}},
    verify=_dead(0.8, stuck=False),
)
def _mlp_most(config: Config) -> Job:
    x, y = data.rings(2048)
    net = MLP([8, 256, 128, 2])
    _biased(net.body, -8.0, part=0.85)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "mlp_relu_shifted_start",
    "mlp",
    cause="dead_relu",
    found=(*_DEAD, "representation_collapse"),
    config={"model": {"activation": "relu"}},
    verify=_dead(0.95),
    repairable=True,
    cured=_learns,
)
def _mlp_shifted(config: Config) -> Job:
    x, y = data.blobs(1024)
    net = MLP([16, 64, 4], config["model"]["activation"])
    scaled(net.body, 0.25)
    _biased(net.body, -2.0)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


def _kill(name: str, value: float, part: float = 1.0) -> Callable[[Learner], None]:
    def plan(module: Learner) -> None:
        _biased(module.get_submodule(name), value, part)

    return plan


@fault(
    "cnn_relu_dies_at_120",
    "cnn",
    cause="dead_relu",
    found=(*_DEAD, "representation_collapse", "loss_spike", "divergence"),
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_dead(0.95, images=True, stuck=False),
)
def _cnn_dies(config: Config) -> Job:
    x, y = data.images(1024)
    net = CNN(1, 4, batch_norm=False)
    module = Learner(net, F.cross_entropy, config, plans={120: _kill("net.features", -20.0)})
    return Job(module, data.loader(x, y))


def _gnn_dead(witness: Witness) -> None:
    (taken,) = seen(witness, "net.head", inputs=True)
    assert (taken == 0).all(), "the head takes something else than zeros"
    assert not witness.fell(0.9)


@fault(
    "gnn_relu_biases_minus_eight",
    "gnn",
    cause="dead_relu",
    found=(*_DEAD, "representation_collapse"),
    verify=_gnn_dead,
)
def _gnn_bias(config: Config) -> Job:
    x, adjacency, y = data.graphs(1024)
    net = GNN(4, 2)
    _biased(net.own, -8.0)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, adjacency, y))


class LastReLU(nn.Module):
    """A regressor whose last layer has an activation, as the others have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.body(x)))


def _all_zero(witness: Witness) -> None:
    assert (answer(witness) == 0).all(), "it predicts something else than zero"
    assert witness.norms[-1] == 0.0


@fault(
    "regressor_ends_in_relu_targets_negative",
    "mlp",
    cause=("dead_relu", "constant_prediction"),
    found=_DEAD,
    verify=_all_zero,
)
def _last_relu(config: Config) -> Job:
    x, y = data.regression(1024)
    return Job(Learner(LastReLU(), F.mse_loss, config), data.loader(x, y - 3.0))


# ---- saturated ----


def _saturated(kind: type[nn.Module], least: float, *, stuck: bool = False) -> Verify:
    def verify(witness: Witness) -> None:
        low = 0.0 if kind is nn.Sigmoid else -1.0
        part = share(seen(witness, kind), lambda x: (x > 0.99) | (x < low + 0.01))
        assert part >= least, f"only {part:.2f} of the outputs are at their limit"
        assert not stuck or not witness.fell(0.85), "the loss falls all the same"

    return verify


_SATURATED = ("vanishing_gradient", "dead_component", "gradient_imbalance", "slow_convergence")


@fault(
    "mlp_tanh_start_thirty_times_too_large",
    "mlp",
    cause="saturated_activation",
    found=(*_SATURATED, "not_learning", "loss_plateau"),
    config={"model": {"activation": "tanh", "init_scale": 30.0}, "trainer": {"max_steps": 250}},
    verify=_saturated(nn.Tanh, 0.8),
    repairable=True,
    cured=_learns,
)
def _mlp_tanh(config: Config) -> Job:
    x, y = data.rings(2048, features=3)
    net = MLP([3, 64, 64, 64, 2], config["model"]["activation"])
    scaled(net.body, config["model"]["init_scale"])
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "mlp_tanh_start_ten_times_too_large",
    "mlp",
    cause="saturated_activation",
    found=(*_SATURATED, "not_learning", "loss_plateau"),
    config={"model": {"activation": "tanh", "init_scale": 10.0}, "trainer": {"max_steps": 250}},
    verify=_saturated(nn.Tanh, 0.6),
    repairable=True,
    cured=_learns,
)
def _mlp_tanh_mild(config: Config) -> Job:
    x, y = data.rings(2048, features=3)
    net = MLP([3, 64, 64, 2], config["model"]["activation"])
    scaled(net.body, config["model"]["init_scale"])
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "mlp_sigmoid_saturated_from_start",
    "mlp",
    cause="saturated_activation",
    found=(*_SATURATED, "not_learning", "loss_plateau", "constant_prediction"),
    config={"optimizer": {"lr": 1e-3}},
    verify=_saturated(nn.Sigmoid, 0.65),
)
def _mlp_sigmoid(config: Config) -> Job:
    x, y = data.blobs(1024, noise=2.0)
    net = MLP([16, 64, 64, 64, 4], "sigmoid")
    scaled(net.body, 25.0)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


def _blow_up(name: str, factor: float) -> Callable[[Learner], None]:
    def plan(module: Learner) -> None:
        scaled(module.get_submodule(name), factor)

    return plan


@fault(
    "cnn_tanh_saturates_at_120",
    "cnn",
    cause="saturated_activation",
    found=(*_SATURATED, "not_learning", "loss_plateau", "loss_spike", "divergence"),
    onset=120,
    config={"trainer": {"max_steps": 260}},
    verify=_saturated(nn.Tanh, 0.7),
)
def _cnn_tanh(config: Config) -> Job:
    x, y = data.images(2048, noise=2.0)
    net = CNN(1, 4, "tanh", batch_norm=False)
    plans = {120: _blow_up("net.features", 40.0)}
    return Job(Learner(net, F.cross_entropy, config, plans=plans), data.loader(x, y))


@fault(
    "autoencoder_tanh_start_too_large",
    "autoencoder",
    cause="saturated_activation",
    found=(*_SATURATED, "not_learning", "loss_plateau"),
    config={"model": {"activation": "tanh", "init_scale": 40.0}},
    verify=_saturated(nn.Tanh, 0.7),
    repairable=True,
    cured=_learns,
)
def _autoencoder_tanh(config: Config) -> Job:
    x, _ = data.blobs(1024)
    net = Autoencoder(16, 8, config["model"]["activation"])
    scaled(net.encoder, config["model"]["init_scale"])
    scaled(net.decoder[0], config["model"]["init_scale"])
    return Job(Learner(net, F.mse_loss, config), data.loader(x, x))


# ---- collapsed representations ----


def _collapsed(name: str, *, inputs: bool = False, least: float = 0.999) -> Verify:
    def verify(witness: Witness) -> None:
        found = seen(witness, name, inputs=inputs)[-1]
        cosine, wide = mean_cosine(found), spread(found)
        same = wide < 0.05 or cosine > least
        assert same, f"codes differ: cosine {cosine:.4f}, spread {wide:.3f}"

    return verify


def _only_positive(logits: Tensor, _: Tensor) -> Tensor:
    return -logits.diagonal().mean()


class Siamese(nn.Module):
    """An encoder and a projector, that see two noisy views of the same sample."""

    def __init__(self, features: int, width: int = 32, noise: float = 0.5) -> None:
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, width))
        self.projector = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (
            F.normalize(self.projector(self.encoder(x + self.noise * torch.randn_like(x))), dim=-1)
            for _ in range(2)
        )
        return one @ two.T


@fault(
    "siamese_without_negatives",
    "contrastive",
    cause="representation_collapse",
    found=("constant_prediction",),
    config={"trainer": {"max_steps": 300}},
    verify=_collapsed("net.projector"),
)
def _siamese(config: Config) -> Job:
    x, y = data.blobs(1024, noise=2.0)
    # both views run through the projector; the last of them is looked at
    return Job(Learner(Siamese(16), _only_positive, config), data.loader(x, y))


def _towers_collapsed(witness: Witness) -> None:
    model = witness.model
    assert model is not None
    x, y, _ = witness.batch
    with torch.no_grad():
        left, right = model.net.left(x), model.net.right(y)
    for code in (left, right):
        assert mean_cosine(code) > 0.98, f"codes differ: cosine {mean_cosine(code):.4f}"


@fault(
    "towers_without_negatives",
    "contrastive",
    cause="representation_collapse",
    found=("constant_prediction",),
    config={"trainer": {"max_steps": 300}, "optimizer": {"lr": 1e-2}},
    verify=_towers_collapsed,
)
def _towers(config: Config) -> Job:
    x, y = data.pairs(1024)
    x, y = x + 3.0 * torch.randn_like(x), y + 3.0 * torch.randn_like(y)
    net = Towers(12, 10)
    net.scale.requires_grad_(False)
    return Job(Learner(net, _only_positive, config), data.loader(x, y, torch.zeros(1024)))


class Agreeing(nn.Module):
    """An encoder of two noisy views that shall be the same, and nothing against a constant."""

    def __init__(self, features: int, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, width), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        noisy = [self.encoder(x + 0.7 * torch.randn_like(x)) for _ in range(2)]
        return torch.stack(noisy, 1)


def _agree(codes: Tensor, _: Tensor) -> Tensor:
    return F.mse_loss(codes[:, 0], codes[:, 1])


def _shrunk(witness: Witness) -> None:
    code = seen(witness, "net.encoder")[-1]
    assert mean_cosine(code) > 0.98, f"codes differ: cosine {mean_cosine(code):.4f}"


@fault(
    "two_views_agree_without_stop_gradient",
    "contrastive",
    cause="representation_collapse",
    found=("constant_prediction", "vanishing_gradient"),
    config={"trainer": {"max_steps": 300}},
    verify=_shrunk,
)
def _agreeing(config: Config) -> Job:
    x, y = data.blobs(1024)
    return Job(Learner(Agreeing(16), _agree, config), data.loader(x, y))


class Gated(Autoencoder):
    """An autoencoder whose code can be cut off by a factor, as an annealed gate does."""

    gate = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.gate * self.encoder(x))


def _close_gate(module: Learner) -> None:
    module.net.gate = 0.0


def _code_ignored(witness: Witness) -> None:
    found = answer(witness)
    assert spread(found) < 0.02, f"reconstructions differ by {spread(found):.3f}"
    x = witness.batch[0]
    own = float((x - x.mean(0)).square().mean())
    assert witness.mean_loss(-20) > 0.8 * own, "it reconstructs better than the mean does"


@fault(
    "autoencoder_code_gated_off_at_120",
    "autoencoder",
    cause=("representation_collapse", "constant_prediction"),
    found=("dead_component", "loss_spike", "divergence", "vanishing_gradient"),
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_code_ignored,
)
def _gated(config: Config) -> Job:
    x, _ = data.blobs(1024, noise=0.5)
    module = Learner(Gated(16), F.mse_loss, config, plans={120: _close_gate})
    return Job(module, data.loader(x, x))


class Variational(nn.Module):
    """A variational autoencoder; gives reconstruction and divergence in one tensor."""

    def __init__(self, features: int, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, features))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return torch.cat([self.decoder(z), divergence[:, None]], -1)


def _weighted(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(output[:, :-1], x) + weight * output[:, -1].mean()

    return loss


def _posterior_collapsed(witness: Witness) -> None:
    x = witness.batch[0]
    (code,) = seen(witness, "net.encoder")
    mean, log_variance = code.chunk(2, -1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    assert divergence < 0.02, f"the code tells {divergence:.3f} nats"
    rest = float((answer(witness)[:, :-1] - x).square().mean())
    assert rest > 0.8 * float((x - x.mean(0)).square().mean())


@fault(
    "variational_autoencoder_posterior_collapse",
    "autoencoder",
    cause=("representation_collapse", "constant_prediction"),
    found=("loss_plateau", "slow_convergence"),
    config={"trainer": {"max_steps": 300}},
    verify=_posterior_collapsed,
)
def _variational(config: Config) -> Job:
    x, _ = data.blobs(1024)
    return Job(Learner(Variational(16), _weighted(20.0), config), data.loader(x, x))


class PooledOverAll(GNN):
    """A graph network that pools all graphs of the batch into one, as a lost batch index does."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weights = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
        for own, others in zip(self.own, self.others, strict=True):
            x = F.relu(own(x) + others(weights @ x))
        return self.head(x.mean((0, 1)).expand(len(x), -1))


def _pooled(witness: Witness) -> None:
    _collapsed("net.head", inputs=True)(witness)
    _constant(witness)
    assert not witness.fell(0.9), "it learns all the same"


@fault(
    "gnn_pools_over_the_batch",
    "gnn",
    cause=("representation_collapse", "constant_prediction"),
    found=("not_learning", "loss_plateau"),
    verify=_pooled,
)
def _pooling(config: Config) -> Job:
    x, adjacency, y = data.graphs(1024)
    module = Learner(PooledOverAll(4, 2), F.cross_entropy, config)
    return Job(module, data.loader(x, adjacency, y))


# ---- constant predictions ----


def _constant(witness: Witness) -> None:
    found = answer(witness).flatten(1)
    wide = float(found.std(0).max())
    assert wide < 0.02, f"answers differ by {wide:.3f} between samples"


@fault(
    "mlp_weight_decay_shrinks_all",
    "mlp",
    cause="constant_prediction",
    found=("representation_collapse", "not_learning", "vanishing_gradient", "dead_component"),
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 1.0}},
    verify=_constant,
)
def _decay(config: Config) -> Job:
    x, y = data.rings(1024)
    return Job(Learner(MLP([8, 64, 64, 2], "tanh"), F.cross_entropy, config), data.loader(x, y))


@fault(
    "gru_reads_its_state_behind_long_padding",
    "gru",
    cause=("constant_prediction", "representation_collapse"),
    found=("not_learning", "vanishing_gradient", "loss_plateau"),
    config={"trainer": {"max_steps": 200}},
    verify=_constant,
)
def _padding(config: Config) -> Job:
    x, y = data.sequences(1024, time=8)
    x = F.pad(x, (0, 0, 0, 70))
    return Job(Learner(GRUClassifier(4, 2), F.cross_entropy, config), data.loader(x, y))


def _zero_inputs(module: Learner) -> None:
    # a "feature importance" experiment that is never undone
    module.net.body[0].p = 1.0


class Dropped(nn.Module):
    """An MLP with dropout on what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def _constant_in_training(witness: Witness) -> None:
    assert witness.model is not None
    witness.model.train()
    _constant(witness)
    assert witness.mean_loss(90, 120) < 0.5 < witness.mean_loss(-20)


@fault(
    "mlp_dropout_of_everything_from_120",
    "mlp",
    cause=("constant_prediction", "representation_collapse"),
    found=("loss_spike", "divergence", "not_learning", "dead_component"),
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_constant_in_training,
)
def _dropped(config: Config) -> Job:
    x, y = data.blobs(1024)
    module = Learner(Dropped(), F.cross_entropy, config, plans={120: _zero_inputs})
    return Job(module, data.loader(x, y))


# ---- softmax twice ----


class Ended(nn.Module):
    """A network with one module more behind it."""

    def __init__(self, net: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.backbone = net
        self.last = last

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(self.backbone(*inputs))


def _is_probability(witness: Witness) -> None:
    found = answer(witness)
    assert ((found >= 0) & (found <= 1)).all()
    total = found.sum(-1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-4)
    classes = found.shape[-1]
    # with scores between 0 and 1 the cross entropy cannot fall below this
    floor = torch.tensor([1.0] + [0.0] * (classes - 1)).log_softmax(0)[0].neg()
    assert min(witness.losses) >= float(floor) - 1e-4


_DOUBLE = ("slow_convergence", "loss_plateau", "not_learning", "vanishing_gradient")


@fault(
    "mlp_softmax_before_cross_entropy",
    "mlp",
    cause="double_softmax",
    found=_DOUBLE,
    verify=_is_probability,
)
def _mlp_softmax(config: Config) -> Job:
    x, y = data.blobs(1024)
    net = Ended(MLP([16, 64, 64, 4]), nn.Softmax(dim=-1))
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "transformer_softmax_before_cross_entropy",
    "transformer",
    cause="double_softmax",
    found=_DOUBLE,
    verify=_is_probability,
)
def _transformer_softmax(config: Config) -> Job:
    x, y = data.tokens(1024)
    net = Ended(Transformer(20, 2), nn.Softmax(dim=-1))
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


def _is_squashed(witness: Witness) -> None:
    found = answer(witness)
    assert ((found >= 0) & (found <= 1)).all()
    # a score between 0 and 1 is a probability between 0.5 and 0.73
    probability = found.sigmoid()
    assert ((probability >= 0.5) & (probability <= 0.7311)).all()
    assert min(witness.losses) > 0.3


def _binary(loss_input: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(loss_input.squeeze(-1), y.float())


@fault(
    "cnn_sigmoid_before_bce_with_logits",
    "cnn",
    cause="double_softmax",
    found=_DOUBLE,
    verify=_is_squashed,
)
def _cnn_sigmoid(config: Config) -> Job:
    x, y = data.images(1024, classes=2)
    net = Ended(CNN(1, 1), ACTIVATIONS["sigmoid"]())
    return Job(Learner(net, _binary, config), data.loader(x, y))


class Soft(GRUClassifier):
    """A GRU that gives probabilities, by the function and not by a module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(super().forward(x), dim=1)


@fault(
    "gru_functional_softmax_before_cross_entropy",
    "gru",
    cause="double_softmax",
    found=_DOUBLE,
    verify=_is_probability,
)
def _gru_softmax(config: Config) -> Job:
    x, y = data.sequences(1024)
    return Job(Learner(Soft(4, 2), F.cross_entropy, config), data.loader(x, y))
