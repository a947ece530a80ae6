"""Gradients that vanish, explode, are cut, are clipped away, or reach one part only."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, SGD, both, learns, worse_than
from tests.faults.networks import ACTIVATIONS, CNN, Learner, scaled
from tests.faults.witness import Witness

STUCK = ("not_learning", "slow_convergence", "loss_plateau", "update_too_small")


# ---- vanishing ----


class Deep(nn.Module):
    """Many layers without norms, each with weights of the size that its activation asks for."""

    def __init__(self, depth: int, activation: str, scale: float = 1.0, width: int = 32) -> None:
        super().__init__()
        kind = ACTIVATIONS[activation]
        sizes = [16, *[width] * depth]
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(a, b), kind()) for a, b in pairwise(sizes)]
        )
        self.head = nn.Linear(width, 4)
        tanh = activation in ("tanh", "sigmoid", "identity")
        for layer in self.layers:
            nn.init.normal_(
                layer[0].weight,
                std=scale * (1.0 if tanh else 2.0) ** 0.5 / layer[0].in_features ** 0.5,
            )
            nn.init.zeros_(layer[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def deep(config: Config, depth: int, *, by_layer: bool = False) -> Job:
    model = config["model"]
    net = Deep(depth, model["activation"], model.get("init_scale", 1.0))
    made = shared.job(net, F.cross_entropy, config, data.blobs(2048, noise=2.0))
    parts = {f"layer{index}": f"net.layers.{index}" for index in range(depth)}
    return Job(made.model, made.train, made.val, parts if by_layer else None)


def fades(name: str, last: str, share: float) -> shared.Check:
    """The first layer's gradient is this share of the last layer's, by plain backpropagation."""

    def check(witness: Witness) -> None:
        net = witness.model.net
        net.load_state_dict({k.removeprefix("net."): v for k, v in witness.first.items()})
        net = net.double()
        x, y = witness.batch[0].double(), witness.batch[-1]
        first_weight, last_weight = (net.get_parameter(one) for one in (name, last))
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), [first_weight, last_weight])
        first, second = (float(g.norm()) for g in gradients)
        assert first < share * second, f"gradients of {first:.3g} and {second:.3g}"

    return check


@fault(
    "ten_sigmoid_layers",
    "mlp",
    cause="vanishing_gradient",
    found=(*STUCK, "gradient_imbalance", "constant_prediction"),
    config={"optimizer": {"_target_": SGD, "lr": 0.05}, "model": {"activation": "sigmoid"}},
    verify=both(
        fades("layers.0.0.weight", "head.weight", 1e-4),
        worse_than("ten_sigmoid_layers", {"model": {"activation": "relu"}}, 1.5),
    ),
    repairable=True,
    cured=learns(),
)
def _sigmoid(config: Config) -> Job:
    return deep(config, 10, by_layer=True)


@fault(
    "seven_sigmoid_layers_with_momentum",
    "mlp",
    cause="vanishing_gradient",
    found=(*STUCK, "gradient_imbalance", "constant_prediction"),
    config={
        "optimizer": {"_target_": SGD, "lr": 0.01, "momentum": 0.9},
        "model": {"activation": "sigmoid"},
    },
    verify=both(
        fades("layers.0.0.weight", "head.weight", 3e-3),
        worse_than("seven_sigmoid_layers_with_momentum", {"model": {"activation": "gelu"}}, 1.5),
    ),
    repairable=True,
    cured=learns(),
)
def _sigmoid_momentum(config: Config) -> Job:
    return deep(config, 7)


@fault(
    "deep_tanh_with_tiny_weights",
    "mlp",
    cause="vanishing_gradient",
    found=(*STUCK, "gradient_imbalance", "constant_prediction", "representation_collapse"),
    config={
        "optimizer": {"_target_": SGD, "lr": 0.05},
        "model": {"activation": "tanh", "init_scale": 0.15},
    },
    verify=both(
        fades("layers.0.0.weight", "head.bias", 1e-4),
        worse_than("deep_tanh_with_tiny_weights", {"model": {"init_scale": 1.0}}, 1.5),
    ),
    repairable=True,
    cured=learns(),
)
def _tanh(config: Config) -> Job:
    return deep(config, 8, by_layer=True)


class Recurrent(nn.Module):
    """A plain recurrent network whose recurrent weights are a random rotation times a gain."""

    def __init__(self, gain: float, kind: str = "tanh", width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.rnn = nn.RNN(width, width, nonlinearity=kind, batch_first=True)
        self.head = nn.Linear(width, 2)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


def long_sequences(samples: int, time: int, told: slice) -> tuple[Tensor, Tensor]:
    """The label is the sign of the sum of the first feature over some of the steps."""
    x, _ = data.sequences(samples, time)
    return x, (x[:, told, 0].sum(1) > 0).long()


@fault(
    "recurrent_network_forgets_the_beginning",
    "rnn",
    cause=("vanishing_gradient", "not_learning"),
    found=(*STUCK, "gradient_imbalance"),
    config={"model": {"init_scale": 0.3}},
    verify=lambda witness: _forgets(witness),
)
def _forgetful(config: Config) -> Job:
    net = Recurrent(config["model"]["init_scale"])
    return shared.job(net, F.cross_entropy, config, long_sequences(2048, 40, slice(5)))


def _forgets(witness: Witness) -> None:
    x = witness.batch[0].clone().requires_grad_()
    witness.model.net(x).sum().backward()
    sizes = x.grad.norm(dim=(0, 2))
    share = float(sizes[0] / sizes[-1])
    assert share < 1e-6, f"the first step has {share:.3g} of the gradient of the last"
    assert witness.mean_loss(-40) > 0.65, "it learns all the same"


@fault(
    "loss_times_a_tiny_number",
    "cnn",
    cause=("vanishing_gradient", "update_too_small", "learning_rate_too_low"),
    found=("not_learning", "slow_convergence"),
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=lambda witness: _tiny_everywhere(witness, 1e-6),
)
def _tiny_loss(config: Config) -> Job:
    made = shared.cnn(config)
    loss = lambda logits, y: 1e-8 * F.cross_entropy(logits, y)  # noqa: E731
    return Job(Learner(made.model.net, loss, config), made.train, made.val)


def _tiny_everywhere(witness: Witness, limit: float) -> None:
    assert 0 < max(witness.norms) < limit, f"gradients of up to {max(witness.norms):.3g}"
    assert shared.travel(witness) < 1e-4, "the weights move"


# ---- exploding ----


@fault(
    "recurrent_network_explodes",
    "rnn",
    cause=("exploding_gradient", "learning_rate_too_high"),
    found=("nonfinite_loss", "nonfinite_gradient", "divergence", "loss_spike", "update_too_large"),
    config={
        "optimizer": {"_target_": SGD, "lr": 0.1},
        "model": {"init_scale": 1.6},
    },
    verify=lambda witness: _backward_product(witness, 1e3),
    repairable=True,
    cured=learns(0.8),
)
def _explosive(config: Config) -> Job:
    net = Recurrent(config["model"]["init_scale"], "relu")
    return shared.job(net, F.cross_entropy, config, long_sequences(2048, 60, slice(-4, None)))


@fault(
    "recurrent_network_in_chaos",
    "rnn",
    cause=("exploding_gradient", "learning_rate_too_high"),
    found=("not_learning", "saturated_activation", "update_too_large", "loss_plateau"),
    config={
        "optimizer": {"_target_": SGD, "lr": 0.1},
        "model": {"init_scale": 3.0},
    },
    verify=lambda witness: _backward_product(witness, 1e3),
    repairable=True,
    cured=learns(0.8),
)
def _chaotic(config: Config) -> Job:
    net = Recurrent(config["model"]["init_scale"], "tanh")
    return shared.job(net, F.cross_entropy, config, long_sequences(2048, 60, slice(-4, None)))


def _backward_product(witness: Witness, factor: float) -> None:
    net = witness.model.net
    net.load_state_dict({k.removeprefix("net."): v for k, v in witness.first.items()})
    net = net.double()
    x = witness.batch[0].double().requires_grad_()
    net(x).square().sum().sqrt().backward()
    sizes = x.grad.norm(dim=(0, 2))
    growth = float(sizes[0] / sizes[-1])
    assert growth > factor, f"the gradient grows by {growth:.3g} over time"
    assert max(witness.norms) > 10, f"gradients of up to {max(witness.norms):.3g}"


class Residual(nn.Module):
    """Residual blocks without a norm: each adds to what came before."""

    def __init__(self, depth: int, scale: float, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
                for _ in range(depth)
            ]
        )
        self.head = nn.Linear(width, 4)
        scaled(self.blocks, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@fault(
    "residual_blocks_with_large_weights",
    "mlp",
    cause="exploding_gradient",
    found=("learning_rate_too_high", "update_too_large", "divergence", "nonfinite_loss"),
    config={
        "optimizer": {"_target_": SGD, "lr": 0.01},
        "model": {"init_scale": 3.0},
    },
    verify=lambda witness: _large_gradient(witness, "residual_blocks_with_large_weights"),
    repairable=True,
    cured=learns(),
)
def _residual(config: Config) -> Job:
    net = Residual(8, config["model"]["init_scale"])
    return shared.job(net, F.cross_entropy, config, data.blobs(2048, noise=2.0))


def _large_gradient(witness: Witness, name: str) -> None:
    assert witness.norms[0] > 1e3, f"a first gradient of {witness.norms[0]:.3g}"
    worse_than(name, {"model": {"init_scale": 0.5}}, 1.5)(witness)


@fault(
    "targets_in_tens_of_thousands",
    "mlp",
    cause=("exploding_gradient", "learning_rate_too_high", "input_scale"),
    found=("nonfinite_loss", "nonfinite_gradient", "divergence"),
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=lambda witness: _huge_targets(witness),
)
def _large_targets(config: Config) -> Job:
    return shared.regressor(config, scale=1e4)


def _huge_targets(witness: Witness) -> None:
    size = float(witness.batch[-1].double().square().mean().sqrt())
    assert size > 1e3, f"targets of {size:.3g}"
    assert witness.norms[0] > 1e3, f"a first gradient of {witness.norms[0]:.3g}"
    shared.breaks(1, 100)(witness)


@fault(
    "weights_of_a_layer_blow_up",
    "mlp",
    cause=("exploding_gradient", "loss_spike", "divergence"),
    found=("update_too_large", "learning_rate_too_high", "nonfinite_loss"),
    onset=120,
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=lambda witness: _blows_up(witness, 120),
)
def _blown_mlp(config: Config) -> Job:
    return shared.mlp(config, plans={120: shared.times_weights(30.0, "body")})


@fault(
    "weights_of_the_graph_network_blow_up",
    "gnn",
    cause=("exploding_gradient", "loss_spike", "divergence"),
    found=("update_too_large", "learning_rate_too_high", "nonfinite_loss"),
    onset=100,
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=lambda witness: _blows_up(witness, 100),
)
def _blown_gnn(config: Config) -> Job:
    return shared.gnn(config, plans={100: shared.times_weights(10.0, "own", "others")})


def _blows_up(witness: Witness, step: int) -> None:
    usual = sorted(witness.norms[:step])[step // 2]
    assert witness.norms[step] > 30 * usual, f"{usual:.3g} becomes {witness.norms[step]:.3g}"
    assert witness.losses[step] > 10 * witness.mean_loss(step - 20, step), "the loss stays"


# ---- clipped away ----


def _clipped(witness: Witness, clip: float) -> None:
    tight = sum(norm > 50 * clip for norm in witness.norms) / len(witness.norms)
    assert tight > 0.9, f"{tight:.0%} of the gradients are far above the clip"


@fault(
    "clip_a_thousand_times_too_tight",
    "cnn",
    cause="clipping_dominates",
    found=STUCK,
    config={
        "optimizer": {"_target_": SGD, "lr": 0.05},
        "trainer": {"gradient_clip_val": 1e-4},
    },
    verify=both(
        lambda witness: _clipped(witness, 1e-4),
        worse_than("clip_a_thousand_times_too_tight", {"trainer": {"gradient_clip_val": 1.0}}),
    ),
    repairable=True,
    cured=learns(),
)
def _clip_cnn(config: Config) -> Job:
    return shared.cnn(config)


@fault(
    "clip_too_tight_momentum_transformer",
    "transformer",
    cause="clipping_dominates",
    found=STUCK,
    config={
        "optimizer": {"_target_": SGD, "lr": 0.02, "momentum": 0.9},
        "trainer": {"gradient_clip_val": 3e-3},
    },
    verify=both(
        lambda witness: _clipped(witness, 3e-3),
        worse_than("clip_too_tight_momentum_transformer", {"trainer": {"gradient_clip_val": 1.0}}),
    ),
    repairable=True,
    cured=learns(),
)
def _clip_transformer(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "clip_by_value_too_tight",
    "mlp",
    cause="clipping_dominates",
    found=STUCK,
    config={
        "optimizer": {"_target_": SGD, "lr": 0.1},
        "trainer": {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"},
    },
    verify=both(
        lambda witness: _clipped(witness, 1e-4),
        worse_than("clip_by_value_too_tight", {"trainer": {"gradient_clip_val": None}}),
    ),
    repairable=True,
    cured=learns(),
)
def _clip_value(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "clip_below_the_epsilon_of_adam",
    "autoencoder",
    cause="clipping_dominates",
    found=STUCK,
    config={
        "optimizer": {"_target_": ADAM, "lr": 1e-3, "eps": 1e-5},
        "trainer": {"gradient_clip_val": 1e-5},
    },
    verify=both(
        lambda witness: _clipped(witness, 1e-5),
        worse_than("clip_below_the_epsilon_of_adam", {"trainer": {"gradient_clip_val": 1.0}}),
    ),
    repairable=True,
    cured=learns(),
)
def _clip_adam(config: Config) -> Job:
    return shared.autoencoder(config)


# ---- out of balance, or cut ----


class TwoHeads(nn.Module):
    """Two bodies with a head each; the outputs stand side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
        self.second = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.second(x)], 1)


def two_losses(first: float, second: float) -> Any:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        both = first * F.cross_entropy(logits[:, 0], y)
        return both + second * F.cross_entropy(logits[:, 1], y)

    return loss


def part_norms(witness: Witness, part: str) -> list[float]:
    """Norm of the gradient of a part of the network at every step."""
    return [
        sum((norm or 0.0) ** 2 for name, norm in found.items() if name.startswith(f"net.{part}"))
        ** 0.5
        for found in witness.norms_by_name
    ]


def outweighs(
    large: str, small: str, factor: float, start: int = 0, stop: int | None = None
) -> shared.Check:
    """One part's gradient is larger than the other's by a factor, at the middle step."""

    def check(witness: Witness) -> None:
        ratios = sorted(
            a / max(b, 1e-300)
            for a, b in zip(
                part_norms(witness, large)[start:stop],
                part_norms(witness, small)[start:stop],
                strict=True,
            )
        )
        seen = ratios[len(ratios) // 2]
        assert seen > factor, f"the gradients differ by {seen:.3g}"
        assert min(part_norms(witness, small)) > 0, "the smaller one is zero"

    return check


@fault(
    "head_with_a_tiny_loss_weight",
    "mlp",
    cause=("gradient_imbalance", "vanishing_gradient"),
    found=("update_too_small", "dead_component"),
    config={"optimizer": {"_target_": SGD, "lr": 0.1}},
    verify=outweighs("first", "second", 1e4),
)
def _tiny_head(config: Config) -> Job:
    x, y = data.blobs(2048, noise=2.0)
    return shared.job(TwoHeads(), two_losses(1.0, 1e-6), config, (x, y), outputs="loss")


@fault(
    "head_with_a_large_loss_weight",
    "mlp",
    cause="gradient_imbalance",
    found=("exploding_gradient", "update_too_small", "vanishing_gradient", "update_too_large"),
    config={"optimizer": {"_target_": ADAM, "lr": 3e-3}},
    verify=outweighs("second", "first", 1e3),
)
def _large_head(config: Config) -> Job:
    x, y = data.blobs(2048, noise=3.0)
    return shared.job(TwoHeads(), two_losses(1.0, 1e5), config, (x, y), outputs="loss")


class Fusion(nn.Module):
    """Two towers whose sum is read by a head, one of them times a factor, or behind a gate."""

    def __init__(self, share: float = 1.0, gated: bool = False) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32))
        self.right = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 4)
        self.share = share
        self.gate = nn.Parameter(torch.tensor(1.0)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        gate = 1.0 if self.gate is None else F.relu(self.gate)
        right = self.share * gate * self.right(x[:, 8:])
        return self.head(F.relu(self.left(x[:, :8]) + right))


@fault(
    "modality_fused_with_a_tiny_weight",
    "fusion",
    cause=("gradient_imbalance", "vanishing_gradient"),
    found=("update_too_small", "dead_component"),
    config={"optimizer": {"_target_": SGD, "lr": 0.1}},
    verify=outweighs("left", "right", 1e3),
)
def _tiny_modality(config: Config) -> Job:
    net = Fusion(share=1e-5)
    return shared.job(net, F.cross_entropy, config, data.blobs(2048, noise=2.0))


def silent(part: str, start: int) -> shared.Check:
    """A part has a gradient before a step, and exactly none from there on."""

    def check(witness: Witness) -> None:
        norms = part_norms(witness, part)
        assert start == 0 or min(norms[:start]) > 0, "it was silent before"
        assert max(norms[start:]) == 0, f"it has a gradient of {max(norms[start:]):.3g}"

    return check


@fault(
    "branch_behind_a_closed_gate",
    "fusion",
    cause="dead_component",
    found=("vanishing_gradient", "frozen_weights", "unused_parameter", "gradient_imbalance"),
    verify=silent("right", 0),
)
def _closed_gate(config: Config) -> Job:
    net = Fusion(gated=True)
    net.gate.data.fill_(-0.5)
    return shared.job(net, F.cross_entropy, config, data.blobs(2048, noise=2.0))


@fault(
    "gate_closes_in_mid_run",
    "fusion",
    cause="dead_component",
    found=("vanishing_gradient", "frozen_weights", "gradient_imbalance"),
    onset=120,
    config={"trainer": {"max_steps": 300}},
    verify=silent("right", 120),
)
def _closing_gate(config: Config) -> Job:
    net = Fusion(gated=True)
    tensors = data.blobs(2048, noise=2.5)
    plans = {120: lambda learner: learner.net.gate.data.fill_(-1.0)}
    return shared.job(net, F.cross_entropy, config, tensors, plans=plans)


class Experts(nn.Module):
    """Each sample goes to the expert that the router likes best, and to no other."""

    def __init__(self, preference: float) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(3)]
        )
        with torch.no_grad():
            self.router.bias[2] -= preference

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        best = shares.argmax(-1)
        outputs = torch.zeros(len(x), 4)
        for index, expert in enumerate(self.experts):
            chosen = best == index
            outputs[chosen] = shares[chosen, index, None] * expert(x[chosen])
        return outputs


@fault(
    "expert_that_is_never_chosen",
    "experts",
    cause="dead_component",
    found=("vanishing_gradient", "frozen_weights", "unused_parameter", "gradient_imbalance"),
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=silent("experts.2", 0),
)
def _experts(config: Config) -> Job:
    made = shared.job(Experts(50.0), F.cross_entropy, config, data.blobs(2048, noise=2.0))
    parts = {"router": "net.router", **{f"expert{i}": f"net.experts.{i}" for i in range(3)}}
    return Job(made.model, made.train, made.val, parts)


class Skipping(CNN):
    """A network for images that leaves its convolutions out when it is told to."""

    def __init__(self) -> None:
        super().__init__(1, 4)
        self.skip = nn.Linear(144, 4)
        self.mix = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.mix * super().forward(x) + self.skip(x.flatten(1))


@fault(
    "convolutions_are_switched_off_in_mid_run",
    "cnn",
    cause="dead_component",
    found=("vanishing_gradient", "frozen_weights", "gradient_imbalance"),
    onset=100,
    config={"optimizer": {"_target_": SGD, "lr": 0.02}},
    verify=silent("features", 100),
)
def _skipping(config: Config) -> Job:
    plans = {100: lambda learner: setattr(learner.net, "mix", 0.0)}
    return shared.job(
        Skipping(), F.cross_entropy, config, data.images(1024, noise=1.2), plans=plans
    )
