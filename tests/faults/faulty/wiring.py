"""Parts that are not connected as their authors think."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import states
from tests.faults.faulty.attention import each_token
from tests.faults.networks import (
    CNN,
    GAN,
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

Verify = Callable[[Witness], None]


def _names(witness: Witness, beginning: str) -> list[str]:
    found = [name for name in witness.norms_by_name[-1] if name.startswith(beginning)]
    assert found, f"no parameter begins with {beginning}"
    return found


# ---- parameters that no optimizer has ----


def _never_moves(beginning: str, *, with_gradient: bool) -> Verify:
    def verify(witness: Witness) -> None:
        for name in _names(witness, beginning):
            assert torch.equal(*states(witness, name)), f"{name} has moved"
            norm = witness.norms_by_name[-1][name]
            assert (norm is not None) == with_gradient, f"the gradient of {name} is {norm}"

    return verify


class Partly(Learner):
    """Gives the optimizer one part of the network.

    Args:
        part: Name of the submodule whose parameters are optimized.
    """

    def __init__(self, *args: Any, part: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.part = part

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.get_submodule(self.part), self.config)


@fault(
    "mlp_optimizer_has_the_head_alone",
    "mlp",
    cause="unoptimized_parameter",
    found=("frozen_weights", "slow_convergence", "missing_zero_grad"),
    verify=_never_moves("net.body", with_gradient=True),
)
def _head_alone(config: Config) -> Job:
    x, y = data.rings(1024)
    net = MLP([8, 64, 64, 2])
    return Job(Partly(net, F.cross_entropy, config, part="net.head"), data.loader(x, y))


class Pair(nn.Module):
    """Towers and the temperature, as somebody writes them who keeps the two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers(12, 10)
        del self.towers.scale
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left = F.normalize(self.towers.left(x), dim=-1)
        return self.scale.exp() * left @ F.normalize(self.towers.right(y), dim=-1).T


@fault(
    "towers_temperature_not_in_optimizer",
    "contrastive",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    verify=_never_moves("net.scale", with_gradient=True),
)
def _temperature(config: Config) -> Job:
    x, y = data.pairs(1024)
    module = Partly(Pair(), contrastive_loss, config, part="net.towers")
    return Job(module, data.loader(x, y, torch.zeros(1024)))


def _new_head(module: Learner) -> None:
    torch.manual_seed(5)
    module.net.head = nn.Linear(module.net.head.in_features, module.net.head.out_features)
    module.kept = copy.deepcopy(module.net.head.state_dict())


def _head_stays_new(witness: Witness) -> None:
    model = witness.model
    assert model is not None
    assert all(torch.equal(model.kept[n], x) for n, x in model.net.head.state_dict().items())
    assert witness.norms_by_name[-1]["net.head.weight"]


@fault(
    "cnn_head_replaced_at_100",
    "cnn",
    cause="unoptimized_parameter",
    found=("frozen_weights", "loss_spike", "missing_zero_grad", "divergence"),
    onset=100,
    config={"trainer": {"max_steps": 220}},
    verify=_head_stays_new,
)
def _replaced(config: Config) -> Job:
    x, y = data.images(1024)
    module = Learner(CNN(1, 4), F.cross_entropy, config, plans={100: _new_head})
    return Job(module, data.loader(x, y))


class OnACopy(Learner):
    """Builds the optimizer on a copy, as one that is made before the model is moved or wrapped."""

    def configure_optimizers(self) -> Any:
        return optimizer_of(copy.deepcopy(self.net), self.config)


@fault(
    "gru_optimizer_has_a_copy",
    "gru",
    cause="unoptimized_parameter",
    found=("frozen_weights", "not_learning", "missing_zero_grad", "update_too_small"),
    verify=_never_moves("net", with_gradient=True),
)
def _on_a_copy(config: Config) -> Job:
    x, y = data.sequences(1024)
    return Job(OnACopy(GRUClassifier(4, 2), F.cross_entropy, config), data.loader(x, y))


class TwiceTheGenerator(GAN):
    """Both optimizers have the generator."""

    def configure_optimizers(self) -> Any:
        return [optimizer_of(self.generator, self.config) for _ in range(2)]


@fault(
    "gan_discriminator_not_in_its_optimizer",
    "gan",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    config={"trainer": {"max_steps": 300}, "optimizer": {"lr": 1e-3}},
    verify=_never_moves("discriminator", with_gradient=True),
)
def _gan_optimizer(config: Config) -> Job:
    return Job(TwiceTheGenerator(config), _points())


def _points() -> Any:
    x, _ = data.blobs(2048, features=2)
    return data.loader(x)


# ---- frozen parameters that an optimizer still moves ----


class Freezing(Learner):
    """Freezes a part at a step, and keeps a copy of it.

    Args:
        since: The step.
        part: What is frozen.
        zeros: Whether Lightning steps and sets gradients to zero, and not to None; else it steps
            by itself, and what is frozen keeps its last gradient.
    """

    def __init__(self, *args: Any, since: int, part: str, zeros: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.since = since
        self.part = part
        self.zeros = zeros
        self.kept: dict[str, Tensor] = {}
        if not zeros:
            self.automatic_optimization = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step >= self.since and not self.kept:
            frozen = self.get_submodule(self.part)
            frozen.requires_grad_(False)
            self.kept = copy.deepcopy(frozen.state_dict())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        if not self.zeros:
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.grad = None
            self.manual_backward(given["loss"])
            self.optimizers().step()
        return given

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def _moves_frozen(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Freezing)
    frozen = model.get_submodule(model.part)
    assert not any(p.requires_grad for p in frozen.parameters())
    now = frozen.state_dict()
    moved = [
        float((now[name] - x).norm() / x.norm().clamp(min=1e-6)) for name, x in model.kept.items()
    ]
    assert min(moved) > 1e-3, f"what is frozen moves by {min(moved):.2g} at least"


_DECAY = {"_target_": "torch.optim.AdamW", "lr": 3e-3, "weight_decay": 0.1}


@fault(
    "mlp_frozen_body_keeps_momentum_from_100",
    "mlp",
    cause="frozen_in_optimizer",
    onset=100,
    config={"trainer": {"max_steps": 220}, "optimizer": _DECAY},
    verify=_moves_frozen,
)
def _momentum(config: Config) -> Job:
    x, y = data.rings(1024)
    net = MLP([8, 64, 64, 2])
    module = Freezing(net, F.cross_entropy, config, since=100, part="net.body", zeros=True)
    return Job(module, data.loader(x, y))


@fault(
    "transformer_frozen_blocks_keep_old_gradient_from_100",
    "transformer",
    cause="frozen_in_optimizer",
    found=("missing_zero_grad", "divergence", "loss_spike", "update_too_large", "dead_relu"),
    onset=100,
    config={"trainer": {"max_steps": 220}},
    verify=_moves_frozen,
)
def _old_gradient(config: Config) -> Job:
    x, y = data.tokens(1024)
    net = Transformer(20, 2)
    module = Freezing(net, F.cross_entropy, config, since=100, part="net.blocks", zeros=False)
    return Job(module, data.loader(x, y))


@fault(
    "cnn_frozen_features_decay_from_40",
    "cnn",
    cause="frozen_in_optimizer",
    onset=40,
    config={"trainer": {"max_steps": 200}, "optimizer": _DECAY},
    verify=_moves_frozen,
)
def _decays(config: Config) -> Job:
    x, y = data.images(1024, noise=1.0)
    net = CNN(1, 4, batch_norm=False)
    module = Freezing(net, F.cross_entropy, config, since=40, part="net.features", zeros=True)
    return Job(module, data.loader(x, y))


# ---- weights that stay where they are ----


class Restored(Learner):
    """Puts the running average of the weights back after each step; the average never moves.

    Args:
        since: The step from which on.
    """

    def __init__(self, *args: Any, since: int, part: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.since = since
        self.part = part
        self.average: Mapping[str, Tensor] = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step < self.since:
            return
        module = self.get_submodule(self.part)
        if not self.average:
            self.average = copy.deepcopy(module.state_dict())
        module.load_state_dict(self.average)


def _restored(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Restored)
    now = model.get_submodule(model.part).state_dict()
    assert all(torch.equal(now[name], x) for name, x in model.average.items())
    assert witness.norms[-1] > 1e-4, "there is nothing to learn any more"


@fault(
    "gnn_average_of_weights_put_back_from_100",
    "gnn",
    cause="frozen_weights",
    found=("loss_plateau", "not_learning", "slow_convergence"),
    onset=100,
    config={"trainer": {"max_steps": 240}, "optimizer": {"lr": 1e-3}},
    verify=_restored,
)
def _gnn_restored(config: Config) -> Job:
    x, adjacency, y = data.graphs(2048)
    module = Restored(GNN(4, 2), F.cross_entropy, config, since=100, part="net")
    return Job(module, data.loader(x, adjacency, y))


@fault(
    "transformer_blocks_put_back_each_step",
    "transformer",
    cause="frozen_weights",
    found=("loss_plateau", "not_learning", "slow_convergence"),
    verify=_restored,
)
def _blocks_restored(config: Config) -> Job:
    x, y = data.tokens(2048)
    module = Restored(Transformer(20, 2), F.cross_entropy, config, since=0, part="net.blocks")
    return Job(module, data.loader(x, y))


class WithoutStep(GAN):
    """The generator's optimizer never steps."""

    def _step(self, optimizer: Any, loss: Tensor, name: str) -> None:
        if name == "discriminator_loss":
            super()._step(optimizer, loss, name)
            return
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.log(name, loss)


@fault(
    "gan_generator_never_steps",
    "gan",
    cause="frozen_weights",
    config={"trainer": {"max_steps": 250}, "optimizer": {"lr": 1e-3}},
    verify=lambda witness: _generator_still(witness),
)
def _without_step(config: Config) -> Job:
    return Job(WithoutStep(config), _points())


def _generator_still(witness: Witness) -> None:
    for name in _names(witness, "generator"):
        assert torch.equal(*states(witness, name)), f"{name} has moved"
    assert witness.changed("discriminator.head.weight")


class Half(nn.Module):
    """A network whose weights are stored in bfloat16, and so are their changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(torch.bfloat16))).float()


def _rounded_away(witness: Witness) -> None:
    weights = [name for name in witness.first if name.endswith("weight")]
    same = sum(int((witness.first[n] == witness.last[n]).sum()) for n in weights)
    total = sum(witness.first[n].numel() for n in weights)
    assert same > 0.9 * total, f"{same} of {total} are the same"
    norm = sum(witness.norms) / len(witness.norms)
    assert norm > 0.1, "the gradients are small themselves"


@fault(
    "mlp_updates_rounded_away_by_bfloat16_weights",
    "mlp",
    cause=("frozen_weights", "update_too_small"),
    found=("slow_convergence", "not_learning", "learning_rate_too_low"),
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-3}},
    verify=_rounded_away,
)
def _bfloat(config: Config) -> Job:
    x, y = data.blobs(1024)
    return Job(Learner(Half(), F.cross_entropy, config), data.loader(x, y))


# ---- parameters that nothing asks ----


class WithSpare(nn.Module):
    """A network and a part that is made and never called, from a step on or at all."""

    def __init__(self, net: nn.Module, spare: nn.Module, *, added: bool = False) -> None:
        super().__init__()
        self.backbone = net
        self.spare = spare
        self.added = added

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.backbone(*inputs)
        if self.added:
            found = found + self.spare(inputs[0].flatten(1))
        return found


def _no_gradient(beginning: str, since: int = 0) -> Verify:
    def verify(witness: Witness) -> None:
        for name in _names(witness, beginning):
            found = [norms[name] for norms in witness.norms_by_name]
            assert all(norm is None for norm in found[since + 1 :]), f"{name} has a gradient"
            assert since == 0 or found[0], f"{name} never had a gradient"

    return verify


@fault(
    "mlp_auxiliary_head_never_called",
    "mlp",
    cause="unused_parameter",
    verify=_no_gradient("net.spare"),
)
def _spare(config: Config) -> Job:
    x, y = data.blobs(1024)
    net = WithSpare(MLP([16, 64, 64, 4]), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)))
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


def _leave_out(module: Learner) -> None:
    module.net.added = False


@fault(
    "cnn_branch_left_out_from_100",
    "cnn",
    cause=("unused_parameter", "dead_component"),
    found=("frozen_weights", "loss_spike"),
    onset=100,
    config={"trainer": {"max_steps": 220}},
    verify=_no_gradient("net.spare", 100),
)
def _branch(config: Config) -> Job:
    x, y = data.images(1024, noise=1.0)
    net = WithSpare(CNN(1, 4), nn.Linear(144, 4), added=True)
    return Job(Learner(net, F.cross_entropy, config, plans={100: _leave_out}), data.loader(x, y))


class LastLayerForgotten(Transformer):
    """Runs all blocks but the last one, by an error of one in the loop."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position[: x.shape[1]]
        for i in range(len(self.blocks) - 1):
            y = self.blocks[i](y)
        return self.head(self.norm(y).mean(1))


@fault(
    "transformer_last_block_never_runs",
    "transformer",
    cause="unused_parameter",
    verify=_no_gradient("net.blocks.2"),
)
def _last_block(config: Config) -> Job:
    x, y = data.tokens(1024)
    net = LastLayerForgotten(20, 2, layers=3)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


# ---- graphs that are cut ----


class Cut(nn.Module):
    """An encoder and a head with a cut between them.

    Args:
        encoder: From inputs to features.
        head: From features to the answer.
        how: ``"detach"``, ``"no_grad"``, ``"numpy"``, or ``""`` for no cut.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, how: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.how = how

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self._after(self.encoder(*inputs))
        return self._after(self.encoder(*inputs))

    def _after(self, found: Tensor) -> Tensor:
        if self.how == "detach":
            found = found.detach()
        if self.how == "numpy":
            found = torch.from_numpy(found.detach().numpy().copy())
        with torch.enable_grad():
            return self.head(found)


def _encoder(kind: str) -> nn.Module:
    if kind == "cnn":
        net: nn.Module = CNN(1, 4)
    elif kind == "transformer":
        net = Transformer(20, 2)
    else:
        net = GNN(4, 2)
    net.head = nn.Identity()
    return net


_CUT = ("unused_parameter", "slow_convergence", "not_learning", "dead_component", "frozen_weights")


@fault(
    "cnn_features_detached",
    "cnn",
    cause="detached_graph",
    found=_CUT,
    verify=_never_moves("net.encoder", with_gradient=False),
)
def _detached(config: Config) -> Job:
    x, y = data.images(1024)
    net = Cut(_encoder("cnn"), nn.Linear(32, 4), "detach")
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "transformer_encoder_without_grad",
    "transformer",
    cause="detached_graph",
    found=_CUT,
    verify=_never_moves("net.encoder", with_gradient=False),
)
def _no_grad(config: Config) -> Job:
    x, y = data.tokens(1024)
    net = Cut(_encoder("transformer"), nn.Linear(32, 2), "no_grad")
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "gnn_features_through_numpy",
    "gnn",
    cause="detached_graph",
    found=_CUT,
    verify=_never_moves("net.encoder", with_gradient=False),
)
def _numpy(config: Config) -> Job:
    x, adjacency, y = data.graphs(1024)
    net = Cut(_encoder("gnn"), nn.Linear(32, 2), "numpy")
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, adjacency, y))


def _cut_now(module: Learner) -> None:
    module.net.how = "detach"


@fault(
    "cnn_features_detached_from_120",
    "cnn",
    cause="detached_graph",
    found=_CUT,
    onset=120,
    config={"trainer": {"max_steps": 240}, "optimizer": {"lr": 5e-4}},
    verify=_no_gradient("net.encoder", 120),
)
def _detached_late(config: Config) -> Job:
    x, y = data.images(1024, noise=1.5)
    net = Cut(_encoder("cnn"), nn.Linear(32, 4), "")
    return Job(Learner(net, F.cross_entropy, config, plans={120: _cut_now}), data.loader(x, y))


class Quantized(Autoencoder):
    """A codebook without the straight-through estimator: the encoder gets no gradient."""

    def __init__(self, features: int, latent: int = 8, codes: int = 32) -> None:
        super().__init__(features, latent)
        self.codes = nn.Parameter(torch.randn(codes, latent))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(self.encoder(x), self.codes).argmin(-1)
        return self.decoder(self.codes[nearest])


@fault(
    "autoencoder_quantized_without_straight_through",
    "autoencoder",
    cause="detached_graph",
    found=_CUT,
    verify=_never_moves("net.encoder", with_gradient=False),
)
def _quantized(config: Config) -> Job:
    x, _ = data.blobs(1024)
    return Job(Learner(Quantized(16), F.mse_loss, config), data.loader(x, x))


class FakeDetached(GAN):
    """The generator is judged by points that are detached from it."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4)).detach()
        logits = torch.cat([self.discriminator(real), self.discriminator(fake)])
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        self._step(second, loss, "discriminator_loss")
        logits = self.discriminator(fake)
        loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        self._step(first, loss, "generator_loss")
        second.zero_grad()


@fault(
    "gan_generator_judged_by_detached_points",
    "gan",
    cause="detached_graph",
    found=_CUT,
    config={"trainer": {"max_steps": 300}, "optimizer": {"lr": 1e-3}},
    verify=_never_moves("generator", with_gradient=False),
)
def _fake_detached(config: Config) -> Job:
    return Job(FakeDetached(config), _points())


# ---- gradients that are not cleared ----


class NeverCleared(Learner):
    """Does not clear the gradient from a step on; notes what is left before each backward.

    Args:
        since: The step.
        manual: Whether it steps by itself, or takes Lightning's hook away.
    """

    def __init__(self, *args: Any, since: int = 0, manual: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.since = since
        self.automatic_optimization = not manual
        self.left: list[float] = []

    def on_before_backward(self, loss: Tensor) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.left.append(float(sum(g.norm() for g in grads)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            if self.global_step < self.since:
                self.optimizers().zero_grad()
            self.manual_backward(given["loss"])
            self.optimizers().step()
        return given

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self.global_step < self.since:
            optimizer.zero_grad()


def _left_over(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, NeverCleared)
    assert not any(model.left[: model.since]), "something was left before"
    later = model.left[model.since + 1 :]
    assert len(later) > 50
    assert all(later), "nothing is left"


_SUMMED = (
    *("exploding_gradient", "divergence", "loss_oscillation", "loss_spike", "update_too_large"),
    *("not_learning", "learning_rate_too_high", "nonfinite_loss", "nonfinite_gradient"),
)


@fault(
    "mlp_manual_without_zero_grad",
    "mlp",
    cause="missing_zero_grad",
    found=_SUMMED,
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05}},
    verify=_left_over,
)
def _manual(config: Config) -> Job:
    x, y = data.blobs(1024)
    module = NeverCleared(MLP([16, 64, 64, 4]), F.cross_entropy, config, manual=True)
    return Job(module, data.loader(x, y))


@fault(
    "gru_zero_grad_hook_overridden",
    "gru",
    cause="missing_zero_grad",
    found=_SUMMED,
    verify=_left_over,
)
def _overridden(config: Config) -> Job:
    x, y = data.sequences(1024)
    module = NeverCleared(GRUClassifier(4, 2), F.cross_entropy, config, manual=False)
    return Job(module, data.loader(x, y))


@fault(
    "transformer_stops_clearing_at_120",
    "transformer",
    cause="missing_zero_grad",
    found=_SUMMED,
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_left_over,
)
def _stops_clearing(config: Config) -> Job:
    x, y = data.tokens(2048)
    net = Transformer(20, 2)
    module = NeverCleared(net, F.cross_entropy, config, since=120, manual=True)
    return Job(module, data.loader(x, y))


class NoZeroGAN(GAN):
    """Never clears a gradient."""

    def _step(self, optimizer: Any, loss: Tensor, name: str) -> None:
        self.left = float(sum(p.grad.norm() for p in self.parameters() if p.grad is not None))
        self.manual_backward(loss)
        optimizer.step()
        self.log(name, loss)


def _left_in_gan(witness: Witness) -> None:
    assert witness.model is not None
    assert witness.model.left > 0, "nothing is left"


@fault(
    "gan_without_zero_grad",
    "gan",
    cause="missing_zero_grad",
    found=_SUMMED,
    config={"trainer": {"max_steps": 300}, "optimizer": {"lr": 1e-3}},
    verify=_left_in_gan,
)
def _gan_left(config: Config) -> Job:
    return Job(NoZeroGAN(config), _points())


# ---- evaluation mode ----


class Evaluating(Learner):
    """Turns evaluation mode on in a training step and never off again.

    Args:
        since: The step.
        part: What is turned; the whole module if empty.
    """

    def __init__(self, *args: Any, since: int = 0, part: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.since = since
        self.part = part
        self.modes: list[bool] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        part = self.get_submodule(self.part) if self.part else self
        if self.global_step == self.since:
            part.eval()
        sensitive = [m for m in part.modules() if isinstance(m, (nn.Dropout, nn.BatchNorm2d))]
        self.modes.append(any(m.training for m in sensitive))
        return super().training_step(batch, batch_idx)


def _not_in_training(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Evaluating)
    assert all(model.modes[: model.since])
    later = model.modes[model.since + 1 :]
    assert len(later) > 50
    assert not any(later), "something is in training mode"


def _statistics_stand(witness: Witness) -> None:
    keys = [key for key in witness.first if key.endswith(("running_mean", "running_var"))]
    assert keys
    assert all(torch.equal(*states(witness, key)) for key in keys), "statistics have moved"


@fault(
    "mlp_eval_in_training_step",
    "mlp",
    cause="eval_mode_in_training",
    found=("overfitting",),
    verify=_not_in_training,
)
def _eval_mlp(config: Config) -> Job:
    x, y = data.blobs(1024, noise=2.0)
    net = MLP([16, 64, 64, 4], dropout=0.3)
    return Job(Evaluating(net, F.cross_entropy, config), data.loader(x, y))


@fault(
    "cnn_loaded_in_eval_mode",
    "cnn",
    cause="eval_mode_in_training",
    verify=_statistics_stand,
)
def _eval_cnn(config: Config) -> Job:
    x, y = data.images(1024)
    # as from_pretrained and many loading functions leave it
    return Job(Learner(CNN(1, 4).eval(), F.cross_entropy, config), data.loader(x, y))


class DroppingTransformer(nn.Module):
    """A transformer of PyTorch's own layers, with dropout."""

    def __init__(self, tokens: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 64, 0.2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


@fault(
    "transformer_encoder_left_in_eval_mode",
    "transformer",
    cause="eval_mode_in_training",
    verify=_not_in_training,
)
def _eval_transformer(config: Config) -> Job:
    x, y = data.tokens(1024)
    net = DroppingTransformer(20, 2)
    module = Evaluating(net, F.cross_entropy, config, part="net.encoder")
    return Job(module, data.loader(x, y))


@fault(
    "cnn_stays_in_eval_mode_from_120",
    "cnn",
    cause="eval_mode_in_training",
    found=("loss_spike",),
    onset=120,
    config={"trainer": {"max_steps": 240}},
    verify=_not_in_training,
)
def _eval_late(config: Config) -> Job:
    x, y = data.images(1024, noise=1.0)
    # a look at the validation set by hand, from which nobody comes back
    return Job(Evaluating(CNN(1, 4), F.cross_entropy, config, since=120), data.loader(x, y))


# ---- weights that are no longer the same ----


class Language(nn.Module):
    """Predicts tokens by the embedding's own weights.

    Args:
        tied: Whether the head has the very weights of the embedding, or a copy of them.
    """

    def __init__(self, tokens: int, width: int = 32, *, tied: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.embedding = nn.Embedding(tokens, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, tokens, bias=False)
        weight = self.embedding.weight
        self.head.weight = weight if tied else nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


class TiedTransformer(Transformer):
    """A transformer whose head has the weights of its embedding."""

    def __init__(self, tokens: int, length: int) -> None:
        super().__init__(tokens, tokens, length=length, each=True)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.head.weight = self.embedding.weight


def _untie(module: Learner, *, optimized: bool = True) -> None:
    head = module.net.head
    head.weight = nn.Parameter(module.net.embedding.weight.detach().clone())
    if optimized:
        module.optimizers().optimizer.add_param_group({"params": [head.weight]})


def _apart(witness: Witness) -> None:
    model = witness.model
    assert model is not None
    one, other = model.net.embedding.weight, model.net.head.weight
    assert torch.equal(witness.first["net.embedding.weight"], witness.first["net.head.weight"])
    assert one.data_ptr() != other.data_ptr()
    assert not torch.equal(one, other), "they are the same still"


@fault(
    "gru_language_head_is_a_copy",
    "gru",
    cause="tied_weight_broken",
    verify=_apart,
)
def _language(config: Config) -> Job:
    x, y = data.copies(1024)
    return Job(Learner(Language(16, tied=False), each_token, config), data.loader(x, y))


@fault(
    "transformer_tie_broken_at_100",
    "transformer",
    cause="tied_weight_broken",
    onset=100,
    config={"trainer": {"max_steps": 220}},
    verify=_apart,
)
def _tie_broken(config: Config) -> Job:
    x, y = data.copies(1024)
    net = TiedTransformer(16, 12)
    return Job(Learner(net, each_token, config, plans={100: _untie}), data.loader(x, y))


@fault(
    "gru_tie_broken_at_100_and_not_optimized",
    "gru",
    cause=("tied_weight_broken", "unoptimized_parameter"),
    found=("frozen_weights", "missing_zero_grad"),
    onset=100,
    config={"trainer": {"max_steps": 220}},
    verify=_apart,
)
def _tie_lost(config: Config) -> Job:
    x, y = data.copies(1024)
    plans = {100: lambda module: _untie(module, optimized=False)}
    return Job(Learner(Language(16), each_token, config, plans=plans), data.loader(x, y))
