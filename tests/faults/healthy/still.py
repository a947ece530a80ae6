"""Parts that stand still, are used now and then, or are cut off: all on purpose."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

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
from tests.faults.networks import CNN, MLP, GRUClassifier, Learner, optimizer_of
from tests.faults.witness import Witness

Pair = tuple[Tensor, Tensor]


def _old(samples: int = 6400) -> Pair:
    return data.blobs(samples, noise=1.5)


def _new(samples: int = 6400) -> Pair:
    """The same points, with new names for the classes."""
    x, y = _old(samples)
    return x, (y + 1) % 4


def _pretrained(net: nn.Module, tensors: Pair, steps: int = 200) -> nn.Module:
    """The network after training on the first part of the data, by plain torch."""
    x, y = parts(*tensors)[0]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return net


def _right(tensors: Callable[[], Pair], noise: float = 1.5, slack: float = 0.04) -> Any:
    def check(witness: Witness) -> None:
        best = nearest_centre(6400, noise=noise)
        least(accuracy(witness, tensors()), best - slack, "accuracy on fresh points")

    return check


def _all(*checks: Callable[[Witness], None]) -> Callable[[Witness], None]:
    def check(witness: Witness) -> None:
        for one in checks:
            one(witness)

    return check


def _same(prefix: str) -> Callable[[Witness], None]:
    def check(witness: Witness) -> None:
        names = [name for name in witness.first if name.startswith(prefix)]
        assert names, f"nothing begins with {prefix}"
        moved = [name for name in names if witness.changed(name)]
        assert not moved, f"changed: {moved}"

    return check


# ---- frozen ----


@healthy(
    "frozen_backbone",
    "mlp",
    verify=_all(_right(_new), _same("net.body")),
    tricky="the body is frozen and in no optimizer, only the head learns",
)
def _frozen(config: Config) -> Job:
    net = _pretrained(MLP([16, 64, 64, 4]), _old())
    assert isinstance(net, MLP)
    net.body.requires_grad_(False)
    net.head = nn.Linear(64, 4)
    return job(net, F.cross_entropy, config, _new())


class FrozenFeatures(nn.Module):
    """Convolutions that are frozen and stay in evaluation mode, and a head that learns."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.head = nn.Linear(32, 4)

    def train(self, mode: bool = True) -> "FrozenFeatures":
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.features(x).flatten(1)
        return self.head(y)


def _new_images() -> Pair:
    x, y = data.images(2560)
    return x, 3 - y


@healthy(
    "frozen_backbone_in_eval",
    "cnn",
    config={"optimizer": {"lr": 1e-2}},
    verify=_all(
        lambda witness: least(accuracy(witness, _new_images()), 0.97, "accuracy"),
        _same("net.features"),
    ),
    tricky="the frozen part stays in evaluation mode and under no_grad",
)
def _frozen_eval(config: Config) -> Job:
    net = _pretrained(CNN(1, 4), data.images(2560), 60)
    assert isinstance(net, CNN)
    return job(FrozenFeatures(net.features), F.cross_entropy, config, _new_images())


class Adapted(nn.Module):
    """A frozen linear layer and a small update of rank 4 that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * x @ self.down.T @ self.up.T


def _adapted_right(witness: Witness) -> None:
    _right(_new)(witness)
    for name in witness.first:
        assert witness.changed(name) != ("base" in name), f"{name} should not do that"


@healthy(
    "low_rank_adapters",
    "mlp",
    config={"optimizer": {"lr": 1e-2}},
    verify=_adapted_right,
    tricky="all but adapters is frozen; half of them has no gradient at the first step",
)
def _adapters(config: Config) -> Job:
    net = _pretrained(MLP([16, 64, 64, 4]), _old())
    assert isinstance(net, MLP)
    for i in (0, 2):
        net.body[i] = Adapted(net.body[i])
    net.head = Adapted(net.head)
    return job(net, F.cross_entropy, config, _new())


class Waves(nn.Module):
    """Fixed random waves of the input, and a linear layer."""

    def __init__(self, features: int, width: int = 512) -> None:
        super().__init__()
        self.register_buffer("waves", 0.4 * torch.randn(features, width))
        self.register_buffer("phases", 6.2832 * torch.rand(width))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cos(x @ self.waves + self.phases))


def _ripples(samples: int = 4096) -> Pair:
    x, _ = data.regression(samples, features=2)
    noise = torch.randn(samples, 1, generator=torch.Generator().manual_seed(2))
    return x, torch.sin(x[:, :1] + x[:, 1:]) + 0.1 * noise


@healthy(
    "random_features",
    "mlp",
    verify=_all(
        lambda witness: most(error(witness, _ripples()), 0.03, "error (noise 0.01)"),
        _same("net.waves"),
    ),
    tricky="the first layer is random and fixed, in buffers",
)
def _random_features(config: Config) -> Job:
    return job(Waves(2), F.mse_loss, config, _ripples())


class _Thaws(Learner):
    """The body joins the optimizer in mid-run, as people fine-tune."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        body = self.net.body
        if self.global_step == 100 and not next(body.parameters()).requires_grad:
            body.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(body.parameters()), "lr": 3e-4})


def _thawed(witness: Witness) -> None:
    _right(lambda: data.blobs(6400, noise=1.5, seed=1))(witness)
    assert witness.changed("net.body.0.weight"), "the body never moved"
    assert witness.norms_by_name[50]["net.body.0.weight"] is None, "the body was not frozen"


@healthy(
    "thawed_in_mid_run",
    "mlp",
    verify=_thawed,
    tricky="the body is frozen for a hundred steps, then joins with a rate of its own",
)
def _thaws(config: Config) -> Job:
    net = _pretrained(MLP([16, 64, 64, 4]), _old(), 60)
    assert isinstance(net, MLP)
    net.body.requires_grad_(False)
    net.head = nn.Linear(64, 4)
    return job(net, F.cross_entropy, config, _old(), learner=_Thaws)


# ---- teachers ----


class MeanTeacher(Learner):
    """A few labels, and the agreement with a slow average of itself on the rest."""

    def __init__(self, net: nn.Module, *given: Any, **settings: Any) -> None:
        super().__init__(net, *given, **settings)
        self.teacher = copy.deepcopy(net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x + 0.3 * torch.randn_like(x))
        with torch.no_grad():
            wanted = self.teacher(x).softmax(-1)
        agreement = F.mse_loss(logits.softmax(-1), wanted)
        loss = F.cross_entropy(logits[:8], y[:8]) + agreement
        self.log("train_loss", loss)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_batch_end(self, *given: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.05)


def _taught(witness: Witness) -> None:
    _right(_old)(witness)
    assert witness.model is not None
    x, y = fresh(_old())
    with torch.no_grad():
        said = witness.model.teacher(x).argmax(-1)
    best = nearest_centre(6400, noise=1.5)
    least(float((said == y).float().mean()), best - 0.04, "the teacher's accuracy")


@healthy(
    "mean_teacher",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_taught,
    tricky="the teacher has no gradient and is in no optimizer, yet changes",
)
def _teacher(config: Config) -> Job:
    return job(MLP([16, 64, 4]), F.cross_entropy, config, _old(), learner=MeanTeacher)


class Student(Learner):
    """Learns what a frozen teacher says."""

    def __init__(self, net: nn.Module, teacher: nn.Module, *given: Any, **settings: Any) -> None:
        super().__init__(net, *given, **settings)
        self.teacher = teacher.requires_grad_(False).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        with torch.no_grad():
            wanted = (self.teacher(x) / 2).softmax(-1)
        logits = self(x)
        loss = F.kl_div((logits / 2).log_softmax(-1), wanted, reduction="batchmean")
        self.log("train_loss", loss)
        return {"loss": loss, "logits": logits.detach()}


@healthy(
    "distillation",
    "mlp",
    verify=_all(_right(_old), _same("teacher")),
    tricky="a large teacher is frozen and in evaluation mode; the loss ends near zero",
)
def _distillation(config: Config) -> Job:
    teacher = _pretrained(MLP([16, 128, 128, 4], dropout=0.3), _old())
    net = MLP([16, 16, 4])
    learner = Student(net, teacher, F.cross_entropy, config)
    train, _, _ = parts(*_old())
    return Job(learner, data.loader(*train, batch_size=config["hardware"]["batch_size"]))


class Siam(Learner):
    """Two views agree; one side is cut off on purpose, or all would become one point."""

    def __init__(self, net: nn.Module, *given: Any, **settings: Any) -> None:
        super().__init__(net, *given, **settings)
        self.guess = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        left, right = (self(x + 0.5 * torch.randn_like(x)) for _ in range(2))
        loss = -0.5 * (
            F.cosine_similarity(self.guess(left), right.detach()).mean()
            + F.cosine_similarity(self.guess(right), left.detach()).mean()
        )
        self.log("train_loss", loss)
        return loss


def _views_spread(witness: Witness) -> None:
    x, y = fresh(data.blobs(6400))
    code = F.normalize(answers(witness, x), dim=-1)
    least(float(code.std(0).mean() * 16**0.5), 0.5, "spread against that of an even sphere")
    near = (code @ code.T).fill_diagonal_(-1).argmax(1)
    least(float((y[near] == y).float().mean()), 0.9, "neighbours of the same class")


@healthy(
    "siamese_stop_gradient",
    "siamese",
    config={"trainer": {"max_steps": 300}, "hardware": {"batch_size": 64}},
    verify=_views_spread,
    tricky="one side is detached on purpose; the loss is negative",
)
def _siam(config: Config) -> Job:
    net = nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16), nn.BatchNorm1d(16)
    )
    return job(net, F.mse_loss, config, data.blobs(6400), val=False, learner=Siam)


class ValueLearner(Learner):
    """Values of a chain of states, from a copy that follows every fifty steps."""

    def __init__(self, net: nn.Module, *given: Any, **settings: Any) -> None:
        super().__init__(net, *given, **settings)
        self.target = copy.deepcopy(net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, following, reward = batch
        if self.global_step % 50 == 0:
            self.target.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            wanted = reward + 0.8 * self.target(following)
        loss = F.mse_loss(self(state), wanted)
        self.log("train_loss", loss)
        return loss


def _chain(samples: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Ten states in a ring, one of which pays."""
    g = torch.Generator().manual_seed(1)
    place = torch.randint(10, (samples,), generator=g)
    following = (place + 1) % 10
    eye = torch.eye(10)
    return eye[place], eye[following], (place == 9).float()[:, None]


def _values(witness: Witness) -> None:
    exact = torch.tensor([[0.8 ** (9 - i)] for i in range(10)]) / (1 - 0.8**10)
    said = answers(witness, torch.eye(10))
    most(float((said - exact).abs().max()), 0.15, "largest error of a value")


@healthy(
    "values_from_a_slow_copy",
    "mlp",
    config={"trainer": {"max_steps": 800}},
    verify=_values,
    tricky="the loss jumps up every fifty steps, when its target moves",
)
def _value_learner(config: Config) -> Job:
    learner = ValueLearner(MLP([10, 64, 1]), F.mse_loss, config)
    return Job(learner, data.loader(*_chain(), batch_size=config["hardware"]["batch_size"]))


# ---- now and then ----


class Shared(nn.Module):
    """A body with a head for the class, and another that a learner uses when it wants to."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        self.extra = nn.Linear(64, extra)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Turns(Learner):
    """Two heads for two tasks, which take turns: class at even steps, amount at odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if batch_idx % 2 == 0:
            loss = F.cross_entropy(self(x), y)
        else:
            loss = 0.1 * F.mse_loss(self.net.extra(self.net.body(x)), x[:, :1] - x[:, 1:2])
        self.log("train_loss", loss)
        return loss


def _turns_right(witness: Witness) -> None:
    _right(_old)(witness)
    none = [norms["net.extra.weight"] is None for norms in witness.norms_by_name]
    most(abs(sum(none) / len(none) - 0.5), 0.1, "distance from half of the steps without gradient")
    assert witness.model is not None
    x, _ = fresh(_old())
    net, wanted = witness.model.net, x[:, :1] - x[:, 1:2]
    with torch.no_grad():
        left = F.mse_loss(net.extra(net.body(x)), wanted) / wanted.var()
    most(float(left), 0.25, "share of variance left in the second task")


@healthy(
    "tasks_take_turns",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_turns_right,
    tricky="each head has a gradient at every other step; the loss zigzags",
)
def _turns(config: Config) -> Job:
    return job(Shared(1), F.cross_entropy, config, _old(), learner=Turns)


class Skipping(nn.Module):
    """Residual blocks, each left out in a third of the training steps."""

    def __init__(self, features: int, classes: int, width: int = 32, blocks: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.33:
                x = x + block(x)
        return self.head(x)


def _skips(witness: Witness) -> None:
    none = [norms["net.blocks.0.1.weight"] is None for norms in witness.norms_by_name]
    most(abs(sum(none) / len(none) - 0.33), 0.12, "distance from a third of the steps")


@healthy(
    "blocks_left_out_by_chance",
    "mlp",
    verify=_all(_right(_old), _skips),
    tricky="each block is unused in a third of the steps",
)
def _skipping(config: Config) -> Job:
    return job(Skipping(16, 4), F.cross_entropy, config, _old())


class Branch(nn.Module):
    """A branch for samples that have a second input, which few have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP([16, 64, 4])
        self.extra = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        has = x[:, 0] > 4.0
        if bool(has.any()):
            out = out + has[:, None] * self.extra(x)
        return out


def _branches(witness: Witness) -> None:
    none = [norms["net.extra.weight"] is None for norms in witness.norms_by_name]
    least(sum(none) / len(none), 0.1, "share of steps without the branch")
    most(sum(none) / len(none), 0.95, "share of steps without the branch")


@healthy(
    "optional_branch",
    "mlp",
    config={"hardware": {"batch_size": 8}, "trainer": {"max_steps": 300}},
    verify=_all(_right(_old), _branches),
    tricky="a branch is used only where a batch has samples for it",
)
def _branch(config: Config) -> Job:
    return job(Branch(), F.cross_entropy, config, _old())


# ---- cut off, copied, normed ----


class Codes(nn.Module):
    """An autoencoder whose code is the nearest of 32 vectors; gradients pass straight through."""

    def __init__(self, features: int, kinds: int = 32, width: int = 4) -> None:
        super().__init__()
        self.encoder = MLP([features, 64, width])
        self.book = nn.Parameter(torch.randn(kinds, width))
        self.decoder = MLP([width, 64, features])

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        nearest = self.book[torch.cdist(code, self.book).argmin(1)]
        through = code + (nearest - code).detach()
        extra = (nearest - code.detach()).square().mean(1, keepdim=True)
        extra = extra + 0.25 * (nearest.detach() - code).square().mean(1, keepdim=True)
        return torch.cat([self.decoder(through), extra], 1)


def _code_loss(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out[:, :-1], target) + out[:, -1].mean()


def _points(samples: int = 2560) -> Pair:
    x, _ = data.blobs(samples, classes=8, noise=0.4)
    return x, x


def _coded(witness: Witness) -> None:
    x, _ = fresh(_points())
    assert witness.model is not None
    net = witness.model.net
    left = F.mse_loss(answers(witness, x)[:, :-1], x) / x.var(0).mean()
    most(float(left), 0.3, "share of variance left (eight centres leave 0.1)")
    with torch.no_grad():
        used = torch.cdist(net.encoder(x), net.book).argmin(1).unique()
    least(len(used), 5, "codes in use")


@healthy(
    "straight_through_codes",
    "autoencoder",
    config={"trainer": {"max_steps": 500}},
    verify=_coded,
    tricky="detached on purpose; codes that are not chosen get no gradient",
)
def _codes(config: Config) -> Job:
    return job(Codes(16), _code_loss, config, _points())


@healthy(
    "weight_norm",
    "mlp",
    verify=_right(_old),
    tricky="weights are made of two parameters each",
)
def _weight_norm(config: Config) -> Job:
    net = MLP([16, 64, 64, 4])
    for i in (0, 2):
        weight_norm(net.body[i])
    return job(net, F.cross_entropy, config, _old())


class Streams(Learner):
    """Keeps the state of a recurrent network from batch to batch, cut off from the past."""

    def __init__(self, net: nn.Module, *given: Any, **settings: Any) -> None:
        super().__init__(net, *given, **settings)
        self.state: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        state = None if self.state is None else self.state.detach()
        out, self.state = self.net.rnn(x, state)
        loss = F.mse_loss(self.net.head(out), y)
        self.log("train_loss", loss)
        return loss


def _streams(steps: int = 320, batch: int = 16, time: int = 8) -> Pair:
    """A slow average of noise; batches follow each other in time."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, steps * time, 1, generator=g)
    y, level = torch.zeros_like(x), torch.zeros(batch, 1)
    for i in range(x.shape[1]):
        level = 0.8 * level + 0.5 * x[:, i]
        y[:, i] = level
    cut = [one.view(batch, steps, time, 1).transpose(0, 1).flatten(0, 1) for one in (x, y)]
    return cut[0], cut[1]


def _follows(witness: Witness) -> None:
    _, y = _streams()
    most(witness.mean_loss(-30), 0.1 * float(y.var()), "last loss against the variance")


@healthy(
    "state_carried_between_batches",
    "gru",
    config={"trainer": {"max_steps": 300}},
    verify=_follows,
    tricky="a state is carried over and detached at every step",
)
def _carried(config: Config) -> Job:
    net = GRUClassifier(1, 1)
    learner = Streams(net, F.mse_loss, config)
    return Job(learner, data.loader(*_streams(), batch_size=16, shuffle=False))


class LateHead(Learner):
    """A second loss starts at step 150; until then its head has no gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.net.body(x)
        loss = F.cross_entropy(self.net.head(hidden), y)
        if self.global_step >= 150:
            loss = loss + 0.3 * F.mse_loss(self.net.extra(hidden), x)
        self.log("train_loss", loss)
        return loss


def _late(witness: Witness) -> None:
    assert witness.norms_by_name[100]["net.extra.weight"] is None, "the head was not late"
    assert witness.norms_by_name[200]["net.extra.weight"] is not None, "the head never came"
    assert witness.model is not None
    x, _ = fresh(_old())
    with torch.no_grad():
        left = F.mse_loss(witness.model.net.extra(witness.model.net.body(x)), x) / x.var(0).mean()
    most(float(left), 0.5, "share of variance left in the late task")


@healthy(
    "second_loss_starts_late",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_all(_right(_old), _late),
    tricky="a head without gradient for 150 steps; then the loss rises at once",
)
def _late_head(config: Config) -> Job:
    return job(Shared(16), F.cross_entropy, config, _old(), learner=LateHead)


class OnlyHead(Learner):
    """Gives the optimizer the head alone; the body is frozen."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.net.head, self.config)


@healthy(
    "linear_probe",
    "cnn",
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}},
    verify=_all(
        lambda witness: least(accuracy(witness, _new_images()), 0.97, "accuracy"),
        lambda witness: most(
            float(witness.changed("net.features.0.weight")), 0, "whether the body moved"
        ),
    ),
    tricky="the frozen body keeps its batch norm in training mode; statistics move",
)
def _probe(config: Config) -> Job:
    net = _pretrained(CNN(1, 4), data.images(2560), 60)
    assert isinstance(net, CNN)
    net.features.requires_grad_(False)
    net.head = nn.Linear(32, 4)
    return job(net, F.cross_entropy, config, _new_images(), learner=OnlyHead)
