"""Faults in networks and their wiring that nobody looked at while rules were written."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer, seen, share, silent_units, spread
from tests.faults.faulty._shared import SGD, both, breaks, job, learns, tail
from tests.faults.faulty.attention import FirstToken, Masked, each_token, entropy, weights_of
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
)
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]


def _steps(count: int, **more: Any) -> dict[str, Any]:
    return {"trainer": {"max_steps": count}, **more}


def _ends_above(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        assert not tail(witness.losses) < least, f"the loss ends at {tail(witness.losses):.3g}"

    return verify


def _sets(name: str, value: object) -> Callable[[Learner], None]:
    """A plan: another value for an attribute of the network."""

    def plan(learner: Learner) -> None:
        setattr(learner.net, name, value)

    return plan


# ---- answers ----


def _constant(most: float = 1e-3) -> Verify:
    def verify(witness: Witness) -> None:
        wide = float(answer(witness).std(0).max())
        assert wide < most, f"the answers differ by {wide:.3g}"

    return verify


_SAME = ("not_learning", "loss_plateau", "dead_component", "vanishing_gradient")


@fault(
    "later_regressor_norm_over_a_single_value",
    "mlp",
    cause="constant_prediction",
    found=(*_SAME, "representation_collapse", "frozen_weights", "update_too_small"),
    config=_steps(170, optimizer={"lr": 1e-3}),
    verify=both(_constant(), _ends_above(0.3)),
)
def _single_value(config: Config) -> Job:
    x, y = data.regression(2000, features=10, seed=61)
    net = nn.Sequential(MLP([10, 52, 52, 1], "gelu"), nn.LayerNorm(1))
    return job(net, F.mse_loss, config, (x, y))


class Unknown(Transformer):
    """Reads words as the one that stands for all unknown words, once the vocabulary is lost."""

    lost = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(x) if self.lost else x)


@fault(
    "later_transformer_all_words_unknown_from_115",
    "transformer",
    cause=("constant_prediction", "representation_collapse"),
    found=("not_learning", "divergence", "loss_spike", "attention_uniform", "loss_plateau"),
    onset=115,
    config=_steps(220, optimizer={"lr": 2e-3}),
    verify=both(_constant(), _ends_above(0.6)),
)
def _unknown(config: Config) -> Job:
    tensors = data.tokens(2400, length=18, kinds=30, seed=62)
    net = Unknown(30, 2, width=24, heads=2, length=18)
    return job(net, F.cross_entropy, config, tensors, plans={115: _sets("lost", True)})


def _silent(least: float, name: str) -> Verify:
    def verify(witness: Witness) -> None:
        part = silent_units(seen(witness, name))
        assert part >= least, f"only {part:.2f} of the units are silent"

    return verify


_STUCK = ("constant_prediction", "not_learning", "vanishing_gradient", "dead_component")


@fault(
    "later_mlp_positive_weights_on_log_probabilities",
    "mlp",
    cause="dead_relu",
    found=(*_STUCK, "representation_collapse", "input_scale", "loss_plateau"),
    config=_steps(160, optimizer={"lr": 1e-3}),
    verify=both(_silent(0.95, "net.body.1"), _ends_above(0.9)),
)
def _log_probabilities(config: Config) -> Job:
    x, y = data.blobs(2000, features=12, classes=3, seed=63)
    net = MLP([12, 44, 44, 3])
    nn.init.uniform_(net.body[0].weight)
    return job(net, F.cross_entropy, config, (x.log_softmax(-1), y))


class Latent(Autoencoder):
    """Its code has a ReLU, and a bias that some constants were written into."""

    def __init__(self) -> None:
        super().__init__(16, latent=12)
        self.encoder.append(nn.ReLU())


def _wrong_bias(learner: Learner) -> None:
    with torch.no_grad():
        learner.net.encoder[2].bias.fill_(-25.0)


@fault(
    "later_autoencoder_code_dies_at_105",
    "autoencoder",
    cause="dead_relu",
    found=(*_STUCK, "representation_collapse", "loss_spike", "divergence"),
    onset=105,
    config=_steps(190, optimizer={"lr": 2e-3}),
    verify=both(_constant(), lambda w: _code_silent(w)),
)
def _code_dies(config: Config) -> Job:
    x, _ = data.blobs(2000, features=16, classes=6, seed=64)
    plans = {105: _wrong_bias}
    return job(Latent(), F.mse_loss, config, (x, x), outputs="loss", plans=plans)


def _code_silent(witness: Witness) -> None:
    assert silent_units(seen(witness, "net.encoder.3")) == 1.0, "a unit of the code is alive"


def _at_limits(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        part = share(seen(witness, nn.Tanh), lambda x: x.abs() > 0.99)
        assert part >= least, f"only {part:.2f} of the outputs are at their limits"

    return verify


_LIMITS = ("vanishing_gradient", "dead_component", "gradient_imbalance", "slow_convergence")


class Steep(nn.Module):
    """Gates whose slope is raised in the course of training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 60), nn.Linear(60, 60)
        self.gates = nn.Tanh()
        self.head = nn.Linear(60, 2)
        self.slope = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.gates(self.slope * self.first(x))
        return self.head(self.gates(self.slope * self.second(y)))


@fault(
    "later_mlp_slope_of_the_next_stage_at_110",
    "mlp",
    cause="saturated_activation",
    found=(*_LIMITS, "loss_spike", "loss_plateau", "divergence", "exploding_gradient"),
    onset=110,
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=_at_limits(0.85),
)
def _steep(config: Config) -> Job:
    tensors = data.rings(2400, features=8, seed=66)
    return job(Steep(), F.cross_entropy, config, tensors, plans={110: _sets("slope", 100.0)})


# ---- codes ----


def _to_centre(code: Tensor, _: Tensor) -> Tensor:
    return (code - 1.0).square().sum(1).mean()


def _collapsed(witness: Witness) -> None:
    code = answer(witness)
    assert spread(code) < 0.1, f"the codes differ by {spread(code):.3g} of their size"


@fault(
    "later_one_class_network_maps_all_to_the_centre",
    "mlp",
    cause=("representation_collapse", "constant_prediction"),
    config=_steps(220),
    verify=_collapsed,
)
def _one_class(config: Config) -> Job:
    x, _ = data.blobs(2000, features=16, classes=5, seed=67)
    return job(MLP([16, 48, 24, 12], "gelu"), _to_centre, config, (x, torch.zeros(2000)))


class Variational(nn.Module):
    """Encoder to a mean and a log variance, and decoder of a sample."""

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 48), nn.ReLU(), nn.Linear(48, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 48), nn.ReLU(), nn.Linear(48, features))
        self.divergence = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encoder(x).chunk(2, -1)
        self.divergence = 0.5 * (mean.square() + spread.exp() - spread - 1).sum(1).mean()
        return self.decoder(mean + (spread / 2).exp() * torch.randn_like(mean))


class Bounded(Learner):
    """Adds the divergence to the error, with a weight."""

    weight = 0.02

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, wanted = batch
        loss = self.loss(self.net(x), wanted) + self.weight * self.net.divergence
        self.log("train_loss", loss)
        return loss


def _full_weight(learner: Learner) -> None:
    learner.weight = 8.0


def _posterior_is_prior(witness: Witness) -> None:
    answer(witness)
    assert float(witness.model.net.divergence) < 0.05, "the code still says something"
    x, _ = witness.batch
    error = float(F.mse_loss(answer(witness), x))
    assert error > 0.8 * float(x.var(0).mean()), f"it rebuilds with an error of {error:.3g}"


@fault(
    "later_variational_weight_for_sums_on_means_from_100",
    "autoencoder",
    cause="representation_collapse",
    found=("constant_prediction", "loss_spike", "dead_component", "not_learning", "divergence"),
    onset=100,
    config=_steps(240),
    verify=_posterior_is_prior,
)
def _posterior(config: Config) -> Job:
    x, _ = data.blobs(2000, features=14, classes=5, seed=68)
    plans = {100: _full_weight}
    model = Bounded(Variational(14, 4), F.mse_loss, config, plans=plans)
    return Job(model, data.loader(x, x))


# ---- probabilities for logits ----


class Probable(GNN):
    """Its answers are probabilities."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return super().forward(x, adjacency).softmax(-1)


def _probabilities(low: float) -> Verify:
    def verify(witness: Witness) -> None:
        said = answer(witness)
        assert float(said.min()) >= 0
        assert float(said.max()) <= 1
        _ends_above(low)(witness)

    return verify


@fault(
    "later_gnn_returns_probabilities_to_cross_entropy",
    "gnn",
    cause="double_softmax",
    found=("slow_convergence", "loss_plateau", "not_learning"),
    config=_steps(200),
    verify=_probabilities(0.3133),
)
def _graph_softmax(config: Config) -> Job:
    tensors = data.graphs(2400, nodes=12, seed=69)
    return job(Probable(4, 2, width=28, layers=2), F.cross_entropy, config, tensors)


# ---- attention ----


def _copier(width: int = 48, heads: int = 4, length: int = 10) -> Transformer:
    net = Transformer(14, 14, width=width, heads=heads, length=length, each=True)
    with torch.no_grad():
        net.position *= 8
    return net


def _entropy(low: float, high: float) -> Verify:
    def verify(witness: Witness) -> None:
        for weights in weights_of(witness):
            assert low <= entropy(weights) <= high, f"the entropy is {entropy(weights):.3f}"

    return verify


_ATTENTION = ("not_learning", "loss_plateau", "slow_convergence", "vanishing_gradient")


@fault(
    "later_transformer_queries_of_standard_deviation_one",
    "transformer",
    cause="attention_collapse",
    found=(*_ATTENTION, "exploding_gradient", "gradient_imbalance"),
    config=_steps(200, optimizer={"lr": 1e-3}),
    verify=both(_entropy(0.0, 0.2), _ends_above(0.4)),
)
def _normal_queries(config: Config) -> Job:
    net = FirstToken(18, 2, width=64, heads=4, length=15)
    for block in net.blocks:
        nn.init.normal_(block.attention.qkv.weight[: 2 * 64])
    return job(net, F.cross_entropy, config, data.tokens(2400, length=15, kinds=18, seed=71))


@fault(
    "later_transformer_queries_and_keys_begin_at_zero",
    "transformer",
    cause="attention_uniform",
    found=(*_ATTENTION, "dead_component"),
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=both(_entropy(0.999, 1.001), _ends_above(1.2)),
)
def _zero_queries(config: Config) -> Job:
    net = _copier()
    with torch.no_grad():
        for block in net.blocks:
            block.attention.qkv.weight[: 2 * 48] = 0
            block.attention.qkv.bias[: 2 * 48] = 0
    return job(net, each_token, config, data.copies(2400, length=10, kinds=14, seed=72))


def _length_of_one(tokens: int) -> Tensor:
    return torch.arange(tokens).expand(tokens, tokens) < 1


def _all_lengths_one(learner: Learner) -> None:
    for block in learner.net.blocks:
        block.attention.added = _length_of_one


def _first_alone(witness: Witness) -> None:
    for weights in weights_of(witness):
        assert float(weights[..., 0].min()) > 0.99, "other keys than the first are seen"
    _ends_above(1.0)(witness)


@fault(
    "later_transformer_padding_mask_keeps_the_first_token_at_105",
    "transformer",
    cause=("attention_sink", "attention_collapse"),
    found=(*_ATTENTION, "loss_spike", "divergence"),
    onset=105,
    config=_steps(200),
    verify=_first_alone,
)
def _lengths(config: Config) -> Job:
    net = _copier(width=32)
    for block in net.blocks:
        block.attention = Masked(32, 4)
    tensors = data.copies(2400, length=10, kinds=14, seed=73)
    return job(net, each_token, config, tensors, plans={105: _all_lengths_one})


# ---- wiring ----


class Lazily(nn.Module):
    """Makes a layer when it sees the first batch: after the optimizer is made."""

    def __init__(self) -> None:
        super().__init__()
        self.project: nn.Linear | None = None
        self.net = GNN(20, 2, width=28, layers=2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        if self.project is None:
            self.project = nn.Linear(x.shape[-1], 20)
            self.kept = copy.deepcopy(self.project.state_dict())
        return self.net(self.project(x).tanh(), adjacency)


def _project_stays(witness: Witness) -> None:
    project, kept = witness.model.net.project, witness.model.net.kept
    assert all(torch.equal(kept[name], x) for name, x in project.state_dict().items())
    assert witness.norms_by_name[-1]["net.project.weight"]


@fault(
    "later_gnn_layer_made_in_the_first_forward",
    "gnn",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    config=_steps(160),
    verify=_project_stays,
)
def _lazily(config: Config) -> Job:
    tensors = data.graphs(2000, nodes=9, seed=74)
    return job(Lazily(), F.cross_entropy, config, tensors)


def _more_words(learner: Learner) -> None:
    old = learner.net.embedding
    new = nn.Embedding(old.num_embeddings + 6, old.embedding_dim)
    with torch.no_grad():
        new.weight[: old.num_embeddings] = old.weight
    learner.net.embedding = new
    learner.kept = new.weight.detach().clone()


def _words_stay(witness: Witness) -> None:
    model = witness.model
    assert torch.equal(model.net.embedding.weight, model.kept), "the embedding moves"
    assert witness.norms_by_name[-1]["net.embedding.weight"]


@fault(
    "later_transformer_vocabulary_grows_at_90",
    "transformer",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    onset=90,
    config=_steps(180, optimizer={"lr": 1e-3}),
    verify=_words_stay,
)
def _vocabulary(config: Config) -> Job:
    tensors = data.tokens(2000, length=12, kinds=22, seed=75)
    net = Transformer(22, 2, width=28, heads=4, layers=1, length=12)
    return job(net, F.cross_entropy, config, tensors, plans={90: _more_words})


class SecondTwice(nn.Module):
    """Has three layers, and goes through the second twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 46), nn.Linear(46, 46)
        self.third, self.head = nn.Linear(46, 46), nn.Linear(46, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.second(F.gelu(self.first(x))))
        return self.head(F.gelu(self.second(y)))


def _without_gradient(beginning: str, since: int = 0) -> Verify:
    def verify(witness: Witness) -> None:
        for norms in witness.norms_by_name[since:]:
            found = [n for name, n in norms.items() if name.startswith(beginning)]
            assert found
            assert not any(found), f"{beginning} has a gradient"

    return verify


@fault(
    "later_mlp_second_layer_named_twice",
    "mlp",
    cause="unused_parameter",
    found=("frozen_weights", "dead_component"),
    config=_steps(150, optimizer={"lr": 2e-3}),
    verify=both(_without_gradient("net.third"), learns(0.8)),
)
def _second_twice(config: Config) -> Job:
    tensors = data.blobs(2000, features=13, noise=1.5, seed=76)
    return job(SecondTwice(), F.cross_entropy, config, tensors)


class Cached(CNN):
    """May take features from a cache, which knows no graph."""

    cached = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).flatten(1)
        return self.head(torch.tensor(y.tolist()) if self.cached else y)


@fault(
    "later_cnn_features_from_a_cache_from_100",
    "cnn",
    cause=("detached_graph", "unused_parameter"),
    found=("frozen_weights", "dead_component", "update_too_small"),
    onset=100,
    config=_steps(180, optimizer={"lr": 1e-3}),
    verify=_without_gradient("net.features", 101),
)
def _cache(config: Config) -> Job:
    tensors = data.images(1200, classes=6, noise=0.8, seed=77)
    return job(Cached(1, 6), F.cross_entropy, config, tensors, plans={100: _sets("cached", True)})


class HardChoice(nn.Module):
    """Chooses one of several prototypes by the largest score, through which nothing flows."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
        self.prototypes = nn.Embedding(6, 24)
        self.head = nn.Sequential(nn.Linear(24 + 8, 40), nn.ReLU(), nn.Linear(40, 2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return self.head(torch.cat([self.prototypes(chosen), x], -1))


@fault(
    "later_mlp_router_by_largest_score",
    "mlp",
    cause=("detached_graph", "unused_parameter"),
    found=("frozen_weights", "dead_component"),
    config=_steps(170),
    verify=_without_gradient("net.router"),
)
def _router(config: Config) -> Job:
    return job(HardChoice(), F.cross_entropy, config, data.rings(2000, features=8, seed=78))


class OnceAnEpoch(Learner):
    """Clears its gradients when an epoch begins, and not before every step."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization = False

    def on_train_epoch_start(self) -> None:
        self.optimizers().zero_grad()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        self.manual_backward(given["loss"])
        self.optimizers().step()
        return given


def _adds_up(witness: Witness) -> None:
    """The gradient at a step holds that of the steps before."""
    model = witness.model
    *inputs, target = witness.batch
    model.zero_grad()
    model.loss(model.net(*inputs), target).backward()
    one = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    last = sum(witness.norms[-10:]) / 10
    assert last > 4 * one, f"the gradient is {last:.3g}, of one batch {one:.3g}"


@fault(
    "later_gru_gradients_cleared_once_an_epoch",
    "gru",
    cause="missing_zero_grad",
    found=(
        "exploding_gradient",
        "loss_oscillation",
        "divergence",
        "update_too_large",
        "learning_rate_too_high",
    ),
    config=_steps(180, optimizer={"_target_": SGD, "lr": 0.02}),
    verify=_adds_up,
)
def _once_an_epoch(config: Config) -> Job:
    x, y = data.sequences(1440, time=10, features=3, seed=79)
    return Job(OnceAnEpoch(GRUClassifier(3, 2), F.cross_entropy, config), data.loader(x, y))


class Looks(Learner):
    """Looks at its own codes now and then, in evaluation mode, and stays there.

    Args:
        since: The step of the first look.
    """

    def __init__(self, *args: Any, since: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.since = since
        self.modes: list[bool] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        self.modes.append(self.net.training)
        given = super().training_step(batch, batch_idx)
        if self.global_step >= self.since and batch_idx % 20 == 0:
            self.net.eval()
            with torch.no_grad():
                self.net(*batch[:-1])
        return given


def _not_training(witness: Witness) -> None:
    modes = witness.model.modes
    assert all(modes[:80])
    assert not any(modes[-60:]), "it is in training mode"


@fault(
    "later_cnn_looks_at_itself_in_evaluation_mode_from_80",
    "cnn",
    cause="eval_mode_in_training",
    found=("loss_spike", "divergence", "exploding_gradient", "loss_oscillation"),
    onset=80,
    config=_steps(180, optimizer={"lr": 1e-3}),
    verify=_not_training,
)
def _looks(config: Config) -> Job:
    x, y = data.images(6000, classes=3, noise=0.7, seed=80)
    return Job(Looks(CNN(1, 3), F.cross_entropy, config, since=80), data.loader(x, y))


class Twins(Towers):
    """Both sides have one trunk."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features, width=20)
        self.right[0] = self.left[0]


def _wrap(learner: Learner) -> None:
    # as tools do that put a wrapper around a module of which they take a copy
    learner.net.right = copy.deepcopy(learner.net.right)


def _no_longer_twins(witness: Witness) -> None:
    net = witness.model.net
    assert torch.equal(witness.first["net.left.0.weight"], witness.first["net.right.0.weight"])
    apart = float((net.left[0].weight - net.right[0].weight).norm())
    assert apart > 0.01, f"they are {apart:.3g} apart"


@fault(
    "later_contrastive_shared_trunk_copied_at_85",
    "contrastive",
    cause=("tied_weight_broken", "unoptimized_parameter"),
    found=("frozen_weights", "missing_zero_grad"),
    onset=85,
    config=_steps(190, optimizer={"lr": 2e-3}),
    verify=_no_longer_twins,
)
def _trunk(config: Config) -> Job:
    tensors = (*data.pairs(2400, first=12, second=12, seed=81), torch.zeros(2400))
    return job(Twins(12), contrastive_loss, config, tensors, outputs="loss", plans={85: _wrap})


# ---- data ----


_RAW = (
    "exploding_gradient",
    "loss_oscillation",
    "saturated_activation",
    "not_learning",
    "divergence",
    "loss_spike",
    "gradient_imbalance",
    "slow_convergence",
    "dead_relu",
    "loss_plateau",
    "update_too_large",
)


class Sized(Learner):
    """Notes how large the inputs of the last batch are."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        self.size = float(batch[0].abs().max())
        return super().training_step(batch, batch_idx)


def _in_millimetres(witness: Witness) -> None:
    assert float(witness.batch[0].abs().max()) < 10
    assert witness.model.size > 500, f"the inputs go to {witness.model.size:.3g}"


@fault(
    "later_gnn_millimetres_from_110",
    "gnn",
    cause="input_scale",
    found=_RAW,
    onset=110,
    config=_steps(190, optimizer={"lr": 2e-3}),
    verify=_in_millimetres,
)
def _metres(config: Config) -> Job:
    x, adjacency, y = data.graphs(190 * 24, nodes=11, seed=83)
    x[110 * 24 :] *= 1000
    train = data.loader(x, adjacency, y, batch_size=24, shuffle=False)
    model = Sized(GNN(4, 2, width=32), F.cross_entropy, config)
    return Job(model, train)


def _breaks_inputs(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        breaks(step, step)(witness)
        assert all(torch.isfinite(x).all() for x in witness.batch if x.is_floating_point())

    return verify


@fault(
    "later_cnn_blank_picture_standardized_at_120",
    "cnn",
    cause="nonfinite_data",
    found=("nonfinite_loss", "nonfinite_gradient"),
    onset=120,
    config=_steps(170, optimizer={"lr": 1e-3}),
    verify=_breaks_inputs(120),
)
def _blank(config: Config) -> Job:
    x, y = data.images(170 * 32, classes=4, noise=0.5, seed=84)
    x[120 * 32 + 7] = 0.25
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    return Job(Learner(CNN(1, 4), F.cross_entropy, config), data.loader(x, y, shuffle=False))


def _below(most: float) -> Verify:
    def verify(witness: Witness) -> None:
        assert tail(witness.losses) < most, f"the loss ends at {tail(witness.losses):.3g}"

    return verify


@fault(
    "later_cnn_likelihood_of_plain_logits",
    "cnn",
    cause="loss_target_mismatch",
    found=("divergence", "exploding_gradient", "not_learning", "constant_prediction"),
    config=_steps(170, optimizer={"lr": 2e-3}),
    verify=_below(-5.0),
)
def _plain_logits(config: Config) -> Job:
    tensors = data.images(1600, classes=5, noise=0.6, seed=86)
    return job(CNN(1, 5), F.nll_loss, config, tensors)


def _is_sum(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        *_, target = witness.batch
        model = witness.model
        said = answer(witness)
        mean = float(
            F.cross_entropy(said.flatten(0, said.dim() - 2), target.flatten())
            if target.dim() > 1
            else contrastive_loss(said, target)
        )
        total = float(model.loss(said, target))
        assert total > least * mean, f"the loss is {total / mean:.3g} times the mean"

    return verify


_SUMMED = (
    "exploding_gradient",
    "learning_rate_too_high",
    "loss_oscillation",
    "divergence",
    "update_too_large",
    "clipping_dominates",
    "loss_spike",
)


class Summing:
    """The contrastive loss, as a sum over the samples once it is told to."""

    total = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = contrastive_loss(logits, target)
        return loss * len(logits) if self.total else loss


def _sum_now(learner: Learner) -> None:
    learner.loss.total = True


@fault(
    "later_contrastive_sum_over_pairs_from_95",
    "contrastive",
    cause="wrong_reduction",
    found=_SUMMED,
    onset=95,
    config=_steps(180, optimizer={"lr": 1e-3}, hardware={"batch_size": 64}),
    verify=_is_sum(50),
)
def _sum_pairs(config: Config) -> Job:
    tensors = (*data.pairs(4000, first=15, second=15, seed=88), torch.zeros(4000))
    net = Towers(15, 15, width=24)
    return job(net, Summing(), config, tensors, outputs="loss", plans={95: _sum_now})
