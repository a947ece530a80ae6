"""Numbers that are none: roots of zero, logarithms of zero, quotients by zero, overflow."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, SGD, breaks, learns
from tests.faults.faulty.losses import batch_of
from tests.faults.networks import CNN, MLP, GRUClassifier, Learner, Transformer
from tests.faults.witness import Witness

NEVER_A_NUMBER = ("nonfinite_loss", "nonfinite_gradient")


def gradient_breaks_first(step: int) -> shared.Check:
    """At `step` the loss is a number and the gradient is none; nothing was wrong before."""

    def check(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses[: step + 1])), "the loss breaks before"
        assert all(map(math.isfinite, witness.norms[:step])), "the gradient breaks before"
        assert not math.isfinite(witness.norms[step]), f"the gradient is {witness.norms[step]:.3g}"

    return check


# ---- the loss is a number, its gradient is none ----


class Siamese(nn.Module):
    """The distance of two inputs after one network: its gradient is infinite where it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 16))
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x[:, :12]), self.encoder(x[:, 12:])
        distance = (first - second).square().sum(-1, keepdim=True).sqrt()
        return self.head(distance)


def couples(samples: int) -> tuple[Tensor, Tensor]:
    """Two vectors side by side, and whether they are much alike."""
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, samples, 12, generator=g)
    y = torch.randint(2, (samples,), generator=g)
    second = torch.where(y[:, None] == 1, first + 0.3 * second, second)
    return torch.cat([first, second], 1), y


@fault(
    "distance_of_a_sample_to_itself",
    "siamese",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    verify=gradient_breaks_first(0),
)
def _itself(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[::20, 12:] = x[::20, :12]

    train = shared.stream(config, *couples(6400), spoil)
    return Job(Learner(Siamese(), F.cross_entropy, config), train)


@fault(
    "distance_of_a_sample_to_itself_in_mid_run",
    "siamese",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    onset=120,
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=gradient_breaks_first(120),
)
def _itself_later(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        row = 32 * 120 + 7
        x[row, 12:] = x[row, :12]

    train = shared.stream(config, *couples(6400), spoil)
    return Job(Learner(Siamese(), F.cross_entropy, config), train)


@fault(
    "root_of_the_error_of_a_zero_head",
    "mlp",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    verify=gradient_breaks_first(0),
)
def _root(config: Config) -> Job:
    x, y = data.regression(2048)
    net = MLP([8, 64, 64, 1], "gelu")
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    loss = lambda out, y: ((out - y).square().sum(-1)).sqrt().mean()  # noqa: E731
    return shared.job(net, loss, config, (x, y.clamp(min=0.0)))


def entropy_of_chosen(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy less a little entropy, whose gradient is none where a share is zero."""
    shares = logits.softmax(-1)
    entropy = -torch.where(shares > 0, shares * shares.log(), torch.zeros_like(shares)).sum(-1)
    return F.cross_entropy(logits, y) - 0.01 * entropy.mean()


@fault(
    "entropy_of_a_share_of_zero",
    "cnn",
    cause="nonfinite_gradient",
    found=("nonfinite_loss", "loss_spike", "input_scale"),
    onset=100,
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=gradient_breaks_first(100),
)
def _entropy(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[batch_of(100)] *= 1000

    train = shared.stream(config, *data.images(6400), spoil)
    return Job(Learner(CNN(1, 4, batch_norm=False), entropy_of_chosen, config), train)


# ---- the loss is none ----


def likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy by hand: the logarithm of a share that may be zero."""
    return -logits.softmax(-1)[torch.arange(len(y)), y].log().mean()


@fault(
    "logarithm_of_zero_at_the_start",
    "mlp",
    cause=(*NEVER_A_NUMBER, "input_scale"),
    verify=lambda witness: _only_by_hand(witness),
)
def _logarithm(config: Config) -> Job:
    x, y = data.blobs(2048)
    return shared.job(MLP([16, 64, 64, 4]), likelihood, config, (1000 * x, y))


def _only_by_hand(witness: Witness) -> None:
    breaks(0, 3)(witness)
    net = witness.model.net
    net.load_state_dict({k.removeprefix("net."): v for k, v in witness.first.items()})
    logits, y = net(witness.batch[0]).detach(), witness.batch[1]
    assert not math.isfinite(likelihood(logits, y)), "the logarithm is a number"
    assert math.isfinite(F.cross_entropy(logits, y)), "no other formula would help"


@fault(
    "batch_of_padding_only",
    "transformer",
    cause="nonfinite_loss",
    found=("nonfinite_gradient",),
    onset=140,
    verify=breaks(140, 140),
)
def _padding(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        y[batch_of(140)] = -100

    train = shared.stream(config, *data.copies(6400), spoil)
    net = Transformer(16, 16, length=12, each=True)
    loss = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())  # noqa: E731
    return Job(Learner(net, loss, config), train)


@fault(
    "relative_error_of_a_target_of_zero",
    "mlp",
    cause=NEVER_A_NUMBER,
    onset=100,
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=breaks(100, 100),
)
def _relative(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        y[32 * 100 + 3] = 0.0

    x, y = data.regression(6400)
    train = shared.stream(config, x, 3.0 + y.clamp(-1.5, 1.5), spoil)
    loss = lambda out, y: ((out - y) / y).square().mean()  # noqa: E731
    return Job(Learner(MLP([8, 64, 64, 1], "gelu"), loss, config), train)


@fault(
    "one_sample_is_not_a_number",
    "gru",
    cause=(*NEVER_A_NUMBER, "nonfinite_data"),
    onset=130,
    verify=breaks(130, 130),
)
def _nan_sample(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[32 * 130 + 5, 3, 1] = float("nan")

    train = shared.stream(config, *data.sequences(6400), spoil)
    return Job(Learner(GRUClassifier(4, 2), F.cross_entropy, config), train)


# ---- too large or too small for sixteen bits ----


class HalfLayers(nn.Module):
    """An MLP whose middle is computed in float16 where the configuration asks for 16-mixed.

    A processor has no autocast to float16; this does what it would do on an accelerator.
    """

    def __init__(self, config: Config, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)
        self.half = config["hardware"]["precision"].startswith("16")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) ** 2
        if self.half:
            middle = F.linear(x.half(), self.middle.weight.half(), self.middle.bias.half())
            x = F.relu(middle).float()
        else:
            x = F.relu(self.middle(x))
        return self.head(x)


class MaskedPooling(nn.Module):
    """Attention over the tokens that are no padding; a mask of -1e9 is infinite in float16."""

    def __init__(self, config: Config, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.score = nn.Linear(width, 1)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.half = config["hardware"]["precision"].startswith("16")

    def forward(self, x: Tensor) -> Tensor:
        y, padding = self.embedding(x), (x == 0)
        scores = self.score(y).squeeze(-1)
        if self.half:
            scores, padding = scores.half(), padding.half()
        shares = (scores + padding * -1e9).softmax(-1).to(y.dtype)
        return self.head((shares[..., None] * y).sum(1))


HALF = {
    "optimizer": {"_target_": ADAM, "lr": 3e-3},
    "hardware": {"precision": "16-mixed"},
}


@fault(
    "mask_is_infinite_in_float16",
    "attention",
    cause=NEVER_A_NUMBER,
    config=HALF,
    verify=lambda witness: _only_in_half(witness, 0, "mask_is_infinite_in_float16"),
    repairable=True,
    cured=learns(0.85),
)
def _mask(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[::40] = 0

    train = shared.stream(config, *data.tokens(6400), spoil)
    return Job(Learner(MaskedPooling(config), F.cross_entropy, config), train)


@fault(
    "mask_is_infinite_in_float16_in_mid_run",
    "attention",
    cause=NEVER_A_NUMBER,
    onset=120,
    config=HALF,
    verify=lambda witness: _only_in_half(witness, 120, "mask_is_infinite_in_float16_in_mid_run"),
    repairable=True,
    cured=learns(0.85),
)
def _mask_later(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[32 * 120 + 9] = 0

    train = shared.stream(config, *data.tokens(6400), spoil)
    return Job(Learner(MaskedPooling(config), F.cross_entropy, config), train)


@fault(
    "float16_overflows_in_mid_run",
    "mlp",
    cause=NEVER_A_NUMBER,
    found=("input_scale", "exploding_gradient", "loss_spike"),
    onset=120,
    config={
        "optimizer": {"_target_": ADAM, "lr": 1e-3},
        "hardware": {"precision": "16-mixed"},
    },
    verify=lambda witness: _only_in_half(witness, 120, "float16_overflows_in_mid_run"),
)
def _float16_later(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[32 * 120 + 4] *= 250

    train = shared.stream(config, *data.blobs(6400, noise=2.0), spoil)
    return Job(Learner(HalfLayers(config), F.cross_entropy, config), train)


def _only_in_half(witness: Witness, step: int, name: str) -> None:
    breaks(step, step)(witness)
    others = shared.replay(name, {"hardware": {"precision": "32-true"}}, step + 5)
    assert all(map(math.isfinite, others)), "float32 breaks, too"


@fault(
    "adam_in_float16_divides_by_zero",
    "autoencoder",
    cause=NEVER_A_NUMBER,
    found=("exploding_gradient",),
    config={
        "optimizer": {"_target_": ADAM, "lr": 1e-3},
        "hardware": {"precision": "16-true"},
    },
    verify=lambda witness: _divides(witness),
    repairable=True,
    cured=learns(),
)
def _half_adam(config: Config) -> Job:
    return shared.autoencoder(config)


def _divides(witness: Witness) -> None:
    assert torch.tensor(1e-8).half() == 0, "the epsilon of Adam is a number of its own"
    kind = witness.first["net.encoder.0.weight"].dtype
    assert kind == torch.float16, f"the weights are {kind}"
    breaks(1, 20)(witness)
    others = shared.replay("adam_in_float16_divides_by_zero", {})
    assert all(map(math.isfinite, others)), "float32 breaks, too"
