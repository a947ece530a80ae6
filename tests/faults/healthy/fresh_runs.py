"""Healthy runs by somebody who never saw a rule."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler as schedules

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.faulty.fresh_tasks import (
    Community,
    Factors,
    Forecaster,
    Language,
    Patches,
    Table,
    UNet,
    Views,
    Waveform,
    cells,
    digits,
    discs,
    each_word,
    field,
    ratings,
    sentences,
    series,
    steps,
    table,
    waves,
)
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
from tests.faults.networks import GAN, MLP, Autoencoder, Learner, Transformer, optimizer_of
from tests.faults.witness import Witness

Check = Callable[[Witness], None]
SGD = "torch.optim.SGD"
ADAMW = "torch.optim.AdamW"
BCE = F.binary_cross_entropy_with_logits


def _right(tensors: Callable[[], tuple[Tensor, ...]], bound: float) -> Check:
    def verify(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses))
        least(accuracy(witness, tensors()), bound, "accuracy on fresh samples")

    return verify


def _near(tensors: Callable[[], tuple[Tensor, ...]], bound: float) -> Check:
    def verify(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses))
        most(error(witness, tensors()), bound, "error on fresh samples")

    return verify


# ---- ordinary ----


class Reader(nn.Module):
    """Convolutions for digits, with a norm of a kind."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _cosine(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.CosineAnnealingLR(optimizer, 220)


@healthy(
    "fresh_digits_group_norms_nesterov_cosine",
    "cnn",
    config=steps(220, optimizer={"_target_": SGD, "lr": 0.05, "momentum": 0.9, "nesterov": True}),
    verify=_right(digits, 0.93),
)
def _group_norms(config: Config) -> Job:
    net = Reader(lambda width: nn.GroupNorm(4, width))
    return job(net, F.cross_entropy, config, digits(), schedule=_cosine)


def _forecast() -> tuple[Tensor, Tensor]:
    return series(6000, seed=401)


@healthy(
    "fresh_forecast_of_two_series",
    "rnn",
    config=steps(280, optimizer={"lr": 8e-3}),
    verify=_near(_forecast, 0.12),
)
def _forecasts(config: Config) -> Job:
    return job(Forecaster(width=32), F.mse_loss, config, _forecast())


def _text() -> tuple[Tensor, Tensor]:
    return sentences(4000, kinds=12, seed=402)


def _knows_the_chain(witness: Witness) -> None:
    table = (2.5 * torch.randn(12, 12, generator=torch.Generator().manual_seed(402))).softmax(-1)
    x, y = fresh(_text())
    truth = -float(table[x, y].log().mean())
    most(float(each_word(answers(witness, x), y)), truth + 0.05, "loss on fresh sentences")


@healthy(
    "fresh_language_of_two_layers",
    "transformer",
    config=steps(250, optimizer={"_target_": ADAMW, "lr": 3e-3}),
    verify=_knows_the_chain,
)
def _language(config: Config) -> Job:
    return job(Language(layers=2), each_word, config, _text())


def _people() -> tuple[Tensor, Tensor, Tensor]:
    return table(6000, seed=403)


def _tells(witness: Witness) -> None:
    *inputs, y = fresh(_people())
    said = answers(witness, *inputs) > 0
    least(float((said == (y > 0)).float().mean()), 0.8, "accuracy on fresh rows")


@healthy(
    "fresh_table_of_numbers_and_kinds",
    "mlp",
    config=steps(250, optimizer={"_target_": "torch.optim.RAdam", "lr": 5e-3}),
    verify=_tells,
)
def _table(config: Config) -> Job:
    return job(Table(), BCE, config, _people())


def _standard_cells() -> tuple[Tensor, Tensor]:
    x, y = cells()
    return (x - x.mean(0)) / x.std(0), y


@healthy(
    "fresh_cells_of_a_hospital",
    "mlp",
    config=steps(150, optimizer={"_target_": ADAMW, "lr": 2e-3, "weight_decay": 0.1}),
    verify=_right(_standard_cells, 0.93),
)
def _hospital(config: Config) -> Job:
    net = MLP([30, 12, 2], "tanh", dropout=0.3)
    return job(net, F.cross_entropy, config, _standard_cells())


def _tones() -> tuple[Tensor, Tensor]:
    return waves(4000, classes=4, noise=0.8, seed=404)


@healthy(
    "fresh_waveform_of_four_tones",
    "cnn",
    config=steps(200, optimizer={"_target_": "torch.optim.Adamax", "lr": 5e-3}),
    verify=_right(_tones, 0.9),
)
def _waveform(config: Config) -> Job:
    return job(Waveform(4), F.cross_entropy, config, _tones())


# ---- tricky: tasks ----


def _overlap(said: Tensor, wanted: Tensor) -> Tensor:
    share = said.sigmoid()
    both = (share * wanted).sum((1, 2, 3))
    whole = share.sum((1, 2, 3)) + wanted.sum((1, 2, 3))
    return BCE(said, wanted) + 1 - (2 * both / whole).mean()


def _small_discs() -> tuple[Tensor, Tensor]:
    return discs(2000, noise=0.5, seed=405)


def _found(witness: Witness) -> None:
    x, wanted = fresh(_small_discs())
    said = answers(witness, x) > 0
    both = float((said & (wanted > 0)).sum()) / float((said | (wanted > 0)).sum())
    least(both, 0.75, "intersection over union of fresh discs")


@healthy(
    "fresh_segmentation_of_small_discs",
    "cnn",
    tricky="nearly all pixels are background, and all are answered so at first",
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=_found,
)
def _segmentation(config: Config) -> Job:
    return job(UNet(6), _overlap, config, _small_discs())


def _liked() -> tuple[Tensor, Tensor]:
    return ratings(9000, users=200, items=40, seed=406)


@healthy(
    "fresh_recommender_of_many_users",
    "recommender",
    tricky="most rows of the embeddings have no gradient in a batch",
    config=steps(400, optimizer={"_target_": ADAMW, "lr": 2e-2}, hardware={"batch_size": 64}),
    verify=_near(_liked, 0.5),
)
def _recommender(config: Config) -> Job:
    return job(Factors(200, 40, 6), F.mse_loss, config, _liked())


class ByTwo(Learner):
    """Has an optimizer for the rows of embeddings, and another for all else, by hand."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(given["loss"])
        for optimizer in self.optimizers():
            optimizer.step()
        return given

    def configure_optimizers(self) -> Any:
        rows = [*self.net.users.parameters(), *self.net.items.parameters()]
        rest = [self.net.bias, *self.net.tower.parameters()]
        return [torch.optim.SparseAdam(rows, 1e-2), torch.optim.Adam(rest, 3e-3)]


class SparseTower(Factors):
    """Factors with sparse rows, and a network beside their product."""

    def __init__(self) -> None:
        super().__init__(80, 40, 6)
        self.users.sparse = self.items.sparse = True
        self.tower = MLP([12, 24, 1])

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.cat([self.users(x[:, 0]), self.items(x[:, 1])], -1)
        return super().forward(x) + self.tower(pair)[:, 0]


def _liked_by_few() -> tuple[Tensor, Tensor]:
    return ratings(9000, users=80, items=40, seed=407)


@healthy(
    "fresh_recommender_sparse_rows_by_an_optimizer_of_their_own",
    "recommender",
    tricky="two optimizers by hand, and gradients that are sparse",
    config=steps(800, hardware={"batch_size": 64}),
    verify=_near(_liked_by_few, 0.5),
)
def _sparse_rows(config: Config) -> Job:
    return job(SparseTower(), F.mse_loss, config, _liked_by_few(), learner=ByTwo)


def _groups_right(witness: Witness) -> None:
    net = witness.model.net
    nodes = torch.arange(len(net.groups))
    least(float((answers(witness, nodes).argmax(-1) == net.groups).float().mean()), 0.9, "accuracy")


@healthy(
    "fresh_graph_of_communities",
    "gnn",
    tricky="every batch asks for some nodes of the same graph",
    config=steps(200, optimizer={"lr": 5e-3}),
    verify=_groups_right,
)
def _communities(config: Config) -> Job:
    net = Community(classes=5, nodes=200, layers=2)
    return job(net, F.cross_entropy, config, net.data(5000))


class Sine(nn.Module):
    """A layer that gives the sine of thirty times what is linear."""

    def __init__(self, before: int, after: int, *, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)
        bound = 1 / before if first else math.sqrt(6 / before) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


def _stripes() -> tuple[Tensor, Tensor]:
    return field(20000, frequency=6.0, seed=408)


@healthy(
    "fresh_picture_by_sines",
    "mlp",
    tricky="tiny weights times thirty, and gradients that are large for it",
    config=steps(300, optimizer={"lr": 5e-4}, hardware={"batch_size": 128}),
    verify=_near(_stripes, 0.03),
)
def _sines(config: Config) -> Job:
    net = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), nn.Linear(64, 1))
    return job(net, F.mse_loss, config, _stripes())


class Frequencies(nn.Module):
    """Sines and cosines of fixed random frequencies, and a network on them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", 12 * torch.randn(2, 48))
        self.body = MLP([96, 64, 1])

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.turns
        return self.body(torch.cat([y.sin(), y.cos()], -1))


@healthy(
    "fresh_picture_by_random_frequencies",
    "mlp",
    tricky="the loss stands for a while, since neighbours look unlike",
    config=steps(300, optimizer={"lr": 3e-3}, hardware={"batch_size": 128}),
    verify=_near(_stripes, 0.03),
)
def _frequencies(config: Config) -> Job:
    return job(Frequencies(), F.mse_loss, config, _stripes())


def _spoken() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(409)
    letters = torch.randint(1, 6, (6000, 4), generator=g)
    x = F.one_hot(letters.repeat_interleave(3, 1), 6).float()
    return x + 0.3 * torch.randn(x.shape, generator=g), letters


class Speech(nn.Module):
    """Logarithms of the chances of letters, and of none, at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1)


def _aligned(said: Tensor, letters: Tensor) -> Tensor:
    moments, lengths = (torch.full((len(said),), n) for n in (said.shape[1], 4))
    return F.ctc_loss(said.transpose(0, 1), letters, moments, lengths)


def _spells(witness: Witness) -> None:
    x, letters = fresh(_spoken())
    rows = answers(witness, x).argmax(-1).tolist()
    right = 0
    for row, wanted in zip(rows, letters.tolist(), strict=True):
        kept = [one for one, last in zip(row, [0, *row], strict=False) if one and one != last]
        right += kept == wanted
    least(right / len(rows), 0.6, "share of fresh words without a mistake")


@healthy(
    "fresh_speech_by_its_letters",
    "gru",
    tricky="nothing is said at all for a time at first",
    config=steps(260, optimizer={"lr": 5e-3}),
    verify=_spells,
)
def _speech(config: Config) -> Job:
    return job(Speech(), _aligned, config, _spoken())


# ---- tricky: losses ----


class AlignAndSpread:
    """Views of one sample near, all codes apart on the sphere."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        near = (first - second).square().sum(1).mean()
        return near + torch.pdist(first).square().mul(-2).exp().mean().log()


def _neighbours_agree(witness: Witness) -> None:
    x, y = parts(*digits())[0]
    new, wanted = fresh(digits())
    old, new = (F.normalize(answers(witness, one), dim=-1) for one in (x, new))
    got = float((y[(new @ old.T).argmax(1)] == wanted).float().mean())
    least(got, 0.85, "share of fresh digits whose nearest neighbour is of their kind")


@healthy(
    "fresh_views_aligned_and_spread",
    "contrastive",
    tricky="the loss is negative, and comes to its floor early",
    config=steps(260, optimizer={"lr": 3e-3}, hardware={"batch_size": 64}),
    verify=_neighbours_agree,
)
def _views(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 96, 64, 16]))
    return job(net, AlignAndSpread(), config, digits(), learner=Views)


class Proxies(nn.Module):
    """A loss with a point for each kind, which is learned with the network."""

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(kinds, width))

    def forward(self, codes: Tensor, target: Tensor) -> Tensor:
        near = F.normalize(codes, dim=-1) @ F.normalize(self.points, dim=-1).T
        return F.cross_entropy(12 * near, target)


def _near_their_points(witness: Witness) -> None:
    x, y = fresh(digits())
    points = witness.model.loss.points.detach()
    got = (F.normalize(answers(witness, x), dim=-1) @ F.normalize(points, dim=-1).T).argmax(1)
    least(float((got == y).float().mean()), 0.9, "accuracy on fresh digits")


@healthy(
    "fresh_metric_learning_with_points_of_the_loss",
    "mlp",
    tricky="the loss has parameters, and what the network gives are no logits",
    config=steps(220, optimizer={"lr": 3e-3}),
    verify=_near_their_points,
)
def _proxies(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 64, 16], "gelu"))
    return job(net, Proxies(10, 16), config, digits(), outputs="loss")


def _like_the_real(witness: Witness) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        made = witness.model.generator(torch.randn(2000, 4))
    real = _oval(2000)
    most(float((made.mean(0) - real.mean(0)).norm()), 0.6, "distance of the means")
    for a, b in zip(made.std(0), real.std(0), strict=True):
        least(float(a / b), 0.5, "spread over that of the real points")
        most(float(a / b), 1.8, "spread over that of the real points")


def _oval(samples: int) -> Tensor:
    g = torch.Generator().manual_seed(410)
    return torch.randn(samples, 2, generator=g) * torch.tensor([1.5, 0.6]) + torch.tensor([1.0, 0])


class TwoRates(GAN):
    """The one that judges learns four times as fast as the one that makes."""

    def configure_optimizers(self) -> Any:
        rate = self.config["optimizer"]["lr"]
        return [
            torch.optim.Adam(part.parameters(), times * rate, betas=(0.0, 0.9))
            for part, times in ((self.generator, 1), (self.discriminator, 4))
        ]


class HingeGAN(TwoRates):
    """A hinge for real and made points; the layers that judge have a norm of one."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for layer in self.discriminator.modules():
            if isinstance(layer, nn.Linear):
                parametrizations.spectral_norm(layer)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(second)
        loss = F.relu(1 - self.discriminator(real)).mean()
        loss = loss + F.relu(1 + self.discriminator(fake.detach())).mean()
        self._step(second, loss, "discriminator_loss")
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        self._step(first, -self.discriminator(fake).mean(), "generator_loss")
        self.untoggle_optimizer(first)


@healthy(
    "fresh_gan_hinge_with_spectral_norms",
    "gan",
    tricky="two losses that wander, of which one is negative",
    config=steps(800, optimizer={"lr": 1e-3}),
    verify=_like_the_real,
)
def _hinge(config: Config) -> Job:
    return Job(HingeGAN(config), data.loader(_oval(12800)))


class FlatGAN(TwoRates):
    """A penalty for slopes at what is real."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = batch[0].requires_grad_()
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(second)
        said = self.discriminator(real)
        slope = torch.autograd.grad(said.sum(), real, create_graph=True)[0]
        loss = F.softplus(-said).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        self._step(second, loss + 0.5 * slope.square().sum(1).mean(), "discriminator_loss")
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        self._step(first, F.softplus(-self.discriminator(fake)).mean(), "generator_loss")
        self.untoggle_optimizer(first)


@healthy(
    "fresh_gan_with_a_penalty_for_slopes",
    "gan",
    tricky="a gradient of a gradient, and losses that rise to a balance",
    config=steps(800, optimizer={"lr": 1e-3}),
    verify=_like_the_real,
)
def _penalty(config: Config) -> Job:
    return Job(FlatGAN(config), data.loader(_oval(12800)))


class Coupling(nn.Module):
    """Moves and scales each half of a point by what the other says."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.parts = nn.ModuleList([MLP([1, 32, 32, 2], "tanh") for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        volume = torch.zeros_like(first)
        for part in self.parts:
            scale, shift = part(first).chunk(2, -1)
            scale = scale.tanh()
            first, second = second * scale.exp() + shift, first
            volume = volume + scale
        return torch.cat([first, second, volume], -1)


def _unlikely(said: Tensor, _: Tensor) -> Tensor:
    z, volume = said[:, :2], said[:, 2]
    return (0.5 * z.square().sum(1) + math.log(2 * math.pi) - volume).mean()


def _banana(samples: int = 8000) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(411)
    x = torch.randn(samples, 2, generator=g) * torch.tensor([1.0, 0.2])
    x[:, 1] += x[:, 0].square()
    return x, torch.zeros(samples)


def _knows_the_density(witness: Witness) -> None:
    x, _ = fresh(_banana())
    truth = math.log(2 * math.pi) + math.log(0.2) + 1.0
    most(float(_unlikely(answers(witness, x), x)), truth + 0.3, "negative log likelihood")


@healthy(
    "fresh_flow_to_a_banana",
    "mlp",
    tricky="what the network gives are no predictions, and the loss has no floor at zero",
    config=steps(350, optimizer={"lr": 2e-3}, hardware={"batch_size": 64}),
    verify=_knows_the_density,
)
def _flow(config: Config) -> Job:
    return job(Coupling(), _unlikely, config, _banana(), outputs="loss")


class Decaying(Learner):
    """Learns what solves ``u' = -2 u`` with ``u(0) = 1`` from places alone."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        u = self.net(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        begin = (self.net(torch.zeros(1, 1)) - 1).square().mean()
        loss = (slope + 2 * u).square().mean() + begin
        self.log("train_loss", loss)
        return loss


def _solves(witness: Witness) -> None:
    x = torch.linspace(0, 2, 50)[:, None]
    most(float((answers(witness, x) - (-2 * x).exp()).abs().max()), 0.06, "largest error")


@healthy(
    "fresh_physics_of_a_decay",
    "mlp",
    tricky="the targets are nothing but the equation, and answers go to zero",
    config=steps(350, optimizer={"lr": 5e-3}),
    verify=_solves,
)
def _physics(config: Config) -> Job:
    g = torch.Generator().manual_seed(412)
    x = 2 * torch.rand(8000, 1, generator=g)
    net = MLP([1, 32, 32, 1], "tanh")
    return Job(Decaying(net, F.mse_loss, config), data.loader(x, x))


class Walking(Learner):
    """Learns the worth of steps on a line, whose right end pays, by a slow copy of itself."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        place, step, after = batch
        if self.global_step % 25 == 0:
            self.slow.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            done = (after == 7).float()
            worth = done + 0.9 * (1 - done) * self.slow(F.one_hot(after, 8).float()).amax(1)
        said = self.net(F.one_hot(place, 8).float()).gather(1, step[:, None])[:, 0]
        loss = F.smooth_l1_loss(said, worth)
        self.log("train_loss", loss)
        return loss


def _walks_right(witness: Witness) -> None:
    worth = answers(witness, torch.eye(8)[:7])
    assert bool((worth[:, 1] > worth[:, 0]).all()), "it walks to the left somewhere"
    most(abs(float(worth[3, 1]) - 0.9**3), 0.15, "error of a worth")


@healthy(
    "fresh_q_learning_with_a_slow_copy",
    "mlp",
    tricky="the loss rises whenever the copy is renewed",
    config=steps(400, optimizer={"lr": 5e-3}, hardware={"batch_size": 64}),
    verify=_walks_right,
)
def _walking(config: Config) -> Job:
    g = torch.Generator().manual_seed(413)
    place, step = (torch.randint(n, (12000,), generator=g) for n in (7, 2))
    after = (place + 2 * step - 1).clamp(0, 7)
    model = Walking(MLP([8, 32, 2]), F.mse_loss, config)
    return Job(model, data.loader(place, step, after, batch_size=64))


class Uncertain(nn.Module):
    """Weighs two errors by what it learns of their noise."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(2))

    def forward(self, said: Tensor, wanted: Tensor) -> Tensor:
        errors = (said - wanted).square().mean(0)
        return (errors * (-self.noise).exp() + self.noise).sum()


def _two_answers() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(414)
    x = torch.randn(6000, 6, generator=g)
    y = torch.stack([x[:, 0].sin() + x[:, 1], (x[:, 2] * x[:, 3]).tanh()], 1)
    return x, y + torch.tensor([0.05, 0.5]) * torch.randn(6000, 2, generator=g)


@healthy(
    "fresh_two_answers_weighed_by_their_noise",
    "mlp",
    tricky="the loss falls below zero, and its weights are learned",
    config=steps(300, optimizer={"lr": 5e-3}),
    verify=_near(_two_answers, 0.2),
)
def _uncertain(config: Config) -> Job:
    net = MLP([6, 48, 48, 2], "gelu")
    return job(net, Uncertain(), config, _two_answers())


def _lives() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(415)
    x = torch.randn(6000, 7, generator=g)
    risk = x[:, 0] - 0.8 * x[:, 1] + 0.5 * x[:, 2] * x[:, 3]
    time = torch.empty(6000).exponential_(generator=g) / risk.exp()
    end = torch.empty(6000).exponential_(0.3, generator=g)
    return x, torch.stack([torch.minimum(time, end), (time < end).float()], 1)


def _partial_likelihood(risk: Tensor, life: Tensor) -> Tensor:
    order = life[:, 0].argsort(descending=True)
    risk, seen = risk[order, 0], life[order, 1]
    return -((risk - risk.logcumsumexp(0)) * seen).sum() / seen.sum()


def _orders_lives(witness: Witness) -> None:
    x, life = fresh(_lives())
    risk, (time, seen) = answers(witness, x)[:, 0], life.T
    pairs = (time[:, None] < time) & (seen[:, None] > 0)
    least(float((risk[:, None] > risk)[pairs].float().mean()), 0.75, "pairs in the right order")


@healthy(
    "fresh_lives_by_partial_likelihood",
    "mlp",
    tricky="the loss is of a batch as a whole, high, and falls little",
    config=steps(300, optimizer={"lr": 3e-3}, hardware={"batch_size": 64}),
    verify=_orders_lives,
)
def _survival(config: Config) -> Job:
    net = MLP([7, 32, 32, 1], "gelu")
    return job(net, _partial_likelihood, config, _lives(), outputs="loss")


# ---- tricky: steps ----


@healthy(
    "fresh_segmentation_adadelta_rate_of_one",
    "cnn",
    tricky="a rate of one, which is the right one for this optimizer",
    config=steps(200, optimizer={"_target_": "torch.optim.Adadelta", "lr": 1.0}),
    verify=_found,
)
def _adadelta(config: Config) -> Job:
    return job(UNet(6), BCE, config, _small_discs())


@healthy(
    "fresh_cells_rprop_on_all_samples",
    "mlp",
    tricky="one batch is all there is, and steps do not know how large gradients are",
    config=steps(
        150,
        optimizer={"_target_": "torch.optim.Rprop", "lr": 1e-3, "step_sizes": [1e-6, 1e-2]},
        hardware={"batch_size": 341},
    ),
    verify=_right(_standard_cells, 0.92),
)
def _rprop(config: Config) -> Job:
    net = MLP([30, 4, 2], "tanh")
    return job(net, F.cross_entropy, config, _standard_cells(), val=False)


@healthy(
    "fresh_digits_sgd_rate_of_a_half_with_batch_norms",
    "cnn",
    tricky="a rate that would be too high without the norms",
    config=steps(220, optimizer={"_target_": SGD, "lr": 0.5}),
    verify=_right(digits, 0.93),
)
def _batch_norms(config: Config) -> Job:
    return job(Reader(nn.BatchNorm2d), F.cross_entropy, config, digits(), schedule=_cosine)


def _inverse_root(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.LambdaLR(optimizer, lambda s: min((s + 1) / 40, (40 / (s + 1)) ** 0.5))


@healthy(
    "fresh_language_inverse_root_with_smoothing_and_a_tie",
    "transformer",
    tricky="the floor of the loss is raised by smoothing",
    config=steps(260, optimizer={"lr": 4e-3, "betas": [0.9, 0.98]}),
    verify=_knows_the_chain,
)
def _smoothed(config: Config) -> Job:
    def loss(said: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(said.flatten(0, 1), wanted.flatten(), label_smoothing=0.02)

    net = Language(width=32, heads=4, tied=True, dropout=0.05)
    return job(net, loss, config, _text(), schedule=_inverse_root)


@healthy(
    "fresh_forecast_clipped_at_a_quarter",
    "rnn",
    tricky="many gradients are cut, as in a known recipe for these networks",
    config={
        "trainer": {"max_steps": 280, "gradient_clip_val": 0.25},
        "optimizer": {"lr": 8e-3},
    },
    verify=_near(_forecast, 0.12),
)
def _quarter(config: Config) -> Job:
    return job(Forecaster(width=32), F.mse_loss, config, _forecast())


class Withdrawing(Learner):
    """Freezes its first layers when they are done, and takes them out of the optimizer."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step == 130 and self.net.features[0].weight.requires_grad:
            gone = {id(p) for p in self.net.features[:4].parameters()}
            self.net.features[:4].requires_grad_(False)
            optimizer = self.trainer.optimizers[0]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gone]


@healthy(
    "fresh_digits_first_layers_retire_at_130",
    "cnn",
    tricky="some parameters are frozen, and optimized no longer, on purpose",
    config=steps(220, optimizer={"lr": 3e-3}),
    verify=_right(digits, 0.93),
)
def _retire(config: Config) -> Job:
    net = Reader(lambda width: nn.GroupNorm(4, width))
    return job(net, F.cross_entropy, config, digits(), learner=Withdrawing)


# ---- tricky: inside ----


def _pruned_and_right(witness: Witness) -> None:
    layer = witness.model.net[1].body[0]
    least(float((layer.weight == 0).float().mean()), 0.79, "share of weights that are zero")
    _right(digits, 0.9)(witness)


@healthy(
    "fresh_digits_with_four_fifths_of_the_weights_pruned",
    "mlp",
    tricky="most weights are zero, and have no gradient",
    config=steps(260, optimizer={"lr": 4e-3}),
    verify=_pruned_and_right,
)
def _pruned(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 128, 128, 10]))
    for layer in net[1].body:
        if isinstance(layer, nn.Linear):
            prune.random_unstructured(layer, "weight", 0.8)
    return job(net, F.cross_entropy, config, digits())


class Gated(nn.Module):
    """Blocks with gates for units and root mean squares for norms, without any bias."""

    def __init__(self, width: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(blocks)])
        self.into = nn.ModuleList([nn.Linear(width, 6 * width, bias=False) for _ in range(blocks)])
        self.back = nn.ModuleList([nn.Linear(3 * width, width, bias=False) for _ in range(blocks)])
        self.head = nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for norm, into, back in zip(self.norms, self.into, self.back, strict=True):
            gate, value = into(norm(x)).chunk(2, -1)
            x = x + back(F.silu(gate) * value)
        return self.head(x)


@healthy(
    "fresh_digits_gated_units_without_biases",
    "mlp",
    config=steps(220, optimizer={"_target_": ADAMW, "lr": 2e-3}),
    verify=_right(digits, 0.92),
)
def _gated(config: Config) -> Job:
    return job(Gated(), F.cross_entropy, config, digits())


class Vectors(nn.Module):
    """Words whose vectors are given and stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.randn(22, 16), freeze=True)
        self.rnn = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(x))[0].mean(1))


def _reviews() -> tuple[Tensor, Tensor]:
    return data.tokens(4000, length=14, kinds=22, seed=416)


@healthy(
    "fresh_gru_on_given_word_vectors",
    "gru",
    tricky="the embedding is frozen, and in no optimizer",
    config=steps(220, optimizer={"lr": 5e-3}),
    verify=_right(_reviews, 0.9),
)
def _vectors(config: Config) -> Job:
    return job(Vectors(), F.cross_entropy, config, _reviews())


class Flowing(nn.Module):
    """One layer, gone through ten times in small steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.field = nn.Linear(9, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(10):
            x = x + 0.3 * self.field(x).tanh()
        return self.head(x)


_SIX = {"features": 9, "classes": 6, "noise": 1.2, "seed": 417}


def _near_best(witness: Witness) -> None:
    got = accuracy(witness, data.blobs(6000, **_SIX))
    least(got, nearest_centre(6000, **_SIX) - 0.04, "accuracy on fresh points")


@healthy(
    "fresh_one_layer_in_ten_small_steps",
    "mlp",
    tricky="the gradients of ten passes meet in one layer",
    config=steps(260, optimizer={"lr": 4e-3}),
    verify=_near_best,
)
def _flowing(config: Config) -> Job:
    return job(Flowing(), F.cross_entropy, config, data.blobs(6000, **_SIX))


class Choosing(Autoencoder):
    """A code of choices, drawn by noise, that get harder."""

    heat = 1.0

    def __init__(self) -> None:
        super().__init__(64, 48, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        scores = self.encoder(x).view(-1, 6, 8)
        if not self.training:
            hard = F.one_hot(scores.argmax(-1), 8).float()
            return self.decoder(hard.flatten(1))
        return self.decoder(F.gumbel_softmax(scores, self.heat).flatten(1))


class Cooling(Learner):
    """Lowers the heat of the choices step by step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.net.heat = max(0.3, 1.0 - self.global_step / 300)


def _flat_digits() -> tuple[Tensor, Tensor]:
    x = digits()[0].flatten(1)
    return x, x


def _rebuilds(witness: Witness) -> None:
    variance = float(fresh(_flat_digits())[0].var(0).mean())
    most(error(witness, _flat_digits()) / variance, 0.7, "share of the variance that is left")


@healthy(
    "fresh_autoencoder_of_choices_that_cool",
    "autoencoder",
    tricky="noise in the code, and a softmax inside that gets sharp",
    config=steps(300, optimizer={"lr": 5e-3}),
    verify=_rebuilds,
)
def _choices(config: Config) -> Job:
    net = Choosing()
    return job(net, F.mse_loss, config, _flat_digits(), outputs="loss", learner=Cooling)


class Paths(Patches):
    """Leaves out blocks by chance in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.position
        for block in self.blocks:
            if self.training:
                kept = (torch.rand(len(y), 1, 1) < 0.8).float() / 0.8
                y = y + kept * (block(y) - y)
            else:
                y = block(y)
        return self.head(y[:, 0])


@healthy(
    "fresh_patches_with_dropped_paths",
    "transformer",
    tricky="a fifth of the samples goes around each block",
    config=steps(320, optimizer={"_target_": ADAMW, "lr": 2e-3}, model={"warmup_share": 0.1}),
    verify=_right(digits, 0.85),
)
def _paths(config: Config) -> Job:
    return job(Paths(layers=3), F.cross_entropy, config, digits())


class Queue(Learner):
    """Compares codes with those of a slow copy, of which many are kept from before."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(512, 16), dim=-1))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        asked = F.normalize(self.net(x + 0.3 * torch.randn_like(x)), dim=-1)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.02)
            keys = F.normalize(self.slow(x + 0.3 * torch.randn_like(x)), dim=-1)
        logits = torch.cat([(asked * keys).sum(1, keepdim=True), asked @ self.queue.T], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        self.queue = torch.cat([keys, self.queue])[:512]
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net, self.config)


@healthy(
    "fresh_views_against_a_queue_of_a_slow_copy",
    "contrastive",
    tricky="the loss rises while the queue fills, and half of the parameters follow the others",
    config=steps(300, optimizer={"lr": 3e-3}, hardware={"batch_size": 64}),
    verify=_neighbours_agree,
)
def _queue(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 96, 64, 16]))
    return job(net, F.mse_loss, config, digits(), learner=Queue, val=False)


class LastWord(Transformer):
    """Says which word the text named at its first place, by looking only there."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, -1])


def _names() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(418)
    x = torch.randint(10, (5000, 13), generator=g)
    return x, x[:, 0]


@healthy(
    "fresh_text_that_names_its_kind_at_the_first_place",
    "transformer",
    tricky="the first key gets the attention, since all is said there",
    config=steps(300, optimizer={"lr": 3e-3}),
    verify=_right(_names, 0.95),
)
def _first_place(config: Config) -> Job:
    net = LastWord(10, 10, width=32, heads=2, layers=1, length=13)
    return job(net, F.cross_entropy, config, _names())
