"""Networks of every kind on tasks that they can do, with settings that people choose."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
)
from tests.faults.witness import Witness

# ---- classifiers ----


def _images_right(witness: Witness) -> None:
    least(accuracy(witness, data.images(2560)), 0.97, "accuracy on fresh images")


@healthy("cnn_batch_norm", "cnn", verify=_images_right)
def _cnn(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560))


@healthy(
    "cnn_without_norm",
    "cnn",
    config={"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 250}},
    verify=_images_right,
)
def _cnn_plain(config: Config) -> Job:
    return job(CNN(1, 4, batch_norm=False), F.cross_entropy, config, data.images(2560))


def _sums_right(witness: Witness) -> None:
    least(accuracy(witness, data.sequences(4096)), 0.9, "accuracy on fresh sequences")


@healthy("gru_sums", "gru", config={"trainer": {"max_steps": 250}}, verify=_sums_right)
def _gru(config: Config) -> Job:
    return job(GRUClassifier(4, 2), F.cross_entropy, config, data.sequences(4096))


class LSTMClassifier(nn.Module):
    """Two layers of LSTM, and a head on the last state."""

    def __init__(self, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, width, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@healthy("lstm_sums", "gru", config={"trainer": {"max_steps": 300}}, verify=_sums_right)
def _lstm(config: Config) -> Job:
    return job(LSTMClassifier(4, 2), F.cross_entropy, config, data.sequences(4096))


def _counts_right(witness: Witness) -> None:
    least(accuracy(witness, data.tokens(4096)), 0.9, "accuracy on fresh tokens")


@healthy(
    "transformer_counts",
    "transformer",
    config={"model": {"warmup_share": 0.1}, "trainer": {"max_steps": 250}},
    verify=_counts_right,
)
def _transformer(config: Config) -> Job:
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(4096))


class TorchEncoder(nn.Module):
    """Tokens through `nn.TransformerEncoder`, and a head on their mean."""

    def __init__(self, kinds: int, classes: int, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.position).mean(1))


@healthy(
    "torch_encoder_counts",
    "transformer",
    config={"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 300}},
    verify=_counts_right,
)
def _torch_encoder(config: Config) -> Job:
    return job(TorchEncoder(20, 2), F.cross_entropy, config, data.tokens(4096))


def _graphs_right(witness: Witness) -> None:
    least(accuracy(witness, data.graphs(4096)), 0.85, "accuracy on fresh graphs")


@healthy("gnn_meeting", "gnn", config={"trainer": {"max_steps": 300}}, verify=_graphs_right)
def _gnn(config: Config) -> Job:
    return job(GNN(4, 2), F.cross_entropy, config, data.graphs(4096))


class ResidualMLP(nn.Module):
    """Sixteen pre-norm residual blocks."""

    def __init__(self, features: int, classes: int, width: int = 32, blocks: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _blobs_right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=2.0)
    least(accuracy(witness, data.blobs(6400, noise=2.0)), best - 0.04, "accuracy on fresh points")


@healthy(
    "residual_sixteen_blocks",
    "mlp",
    config={"optimizer": {"lr": 1e-3}},
    verify=_blobs_right,
    tricky="gradients of early blocks far above those of late ones",
)
def _residual(config: Config) -> Job:
    return job(ResidualMLP(16, 4), F.cross_entropy, config, data.blobs(6400, noise=2.0))


@healthy("mlp_layer_norm", "mlp", verify=_blobs_right)
def _layer_norm(config: Config) -> Job:
    net = MLP([16, 64, 64, 4], "gelu", norm=True)
    return job(net, F.cross_entropy, config, data.blobs(6400, noise=2.0))


@healthy(
    "linear_classifier",
    "linear",
    config={"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
    verify=_blobs_right,
    tricky="a single layer",
)
def _linear(config: Config) -> Job:
    return job(nn.Linear(16, 4), F.cross_entropy, config, data.blobs(6400, noise=2.0))


# ---- regression and reconstruction ----


def _curve(witness: Witness) -> None:
    most(error(witness, data.regression(4096)), 0.04, "error on fresh points (noise is 0.01)")


@healthy("mlp_regression", "mlp", config={"trainer": {"max_steps": 400}}, verify=_curve)
def _regression(config: Config) -> Job:
    return job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, data.regression(4096))


def _views(samples: int = 2560) -> tuple[Tensor, Tensor]:
    x, _ = data.pairs(samples, first=32, latent=6)
    x = x / x.std(0)
    return x, x


def _rebuilds(witness: Witness) -> None:
    # six directions hold everything but noise: what the six best leave is the floor
    x = fresh(_views())[0]
    values = torch.linalg.svdvals(x - x.mean(0))
    floor = float(values[6:].square().sum() / x.numel())
    most(error(witness, _views()), floor + 0.05, f"reconstruction error (floor {floor:.3f})")


@healthy(
    "autoencoder_low_rank", "autoencoder", config={"trainer": {"max_steps": 400}}, verify=_rebuilds
)
def _autoencoder(config: Config) -> Job:
    return job(Autoencoder(32), F.mse_loss, config, _views())


class VAE(nn.Module):
    """Returns the reconstruction, the mean and the log-variance of the code, side by side."""

    def __init__(self, features: int, latent: int = 6) -> None:
        super().__init__()
        self.encoder = MLP([features, 64, 2 * latent])
        self.decoder = MLP([latent, 64, features])

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encoder(x).chunk(2, -1)
        spread = spread.clamp(-8, 8)
        code = mean + (spread / 2).exp() * torch.randn_like(mean) * self.training
        return torch.cat([self.decoder(code), mean, spread], -1)


def _elbo(out: Tensor, x: Tensor) -> Tensor:
    rebuilt, mean, spread = out.split([32, 6, 6], -1)
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(-1)
    return (5 * (rebuilt - x).square().sum(-1) + divergence).mean()


def _vae_well(witness: Witness) -> None:
    x = fresh(_views())[0]
    rebuilt, mean, _ = answers(witness, x).split([32, 6, 6], -1)
    most(float(F.mse_loss(rebuilt, x)), 0.15, "reconstruction error (variance is 1)")
    least(float((mean.std(0) > 0.5).sum()), 5, "dimensions of the code in use")


@healthy(
    "vae_elbo",
    "autoencoder",
    config={"trainer": {"max_steps": 400}},
    verify=_vae_well,
    tricky="the divergence term rises while the loss falls",
)
def _vae(config: Config) -> Job:
    return job(VAE(32), _elbo, config, _views())


class Denoiser(Learner):
    """Predicts the noise that was mixed in, at a random level: a small diffusion model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        level = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        mixed = (1 - level).sqrt() * x + level.sqrt() * noise
        loss = F.mse_loss(self(torch.cat([mixed, level], 1)), noise)
        self.log("train_loss", loss)
        return loss


def _ring(samples: int = 3000) -> tuple[Tensor]:
    g = torch.Generator().manual_seed(1)
    angle = 6.2832 * torch.rand(samples, generator=g)
    return (torch.stack([angle.cos(), angle.sin()], 1) * 1.4,)


def _denoises(witness: Witness) -> None:
    (x,) = fresh(_ring())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    level = 0.3
    mixed = (1 - level) ** 0.5 * x + level**0.5 * noise
    said = answers(witness, torch.cat([mixed, torch.full((len(x), 1), level)], 1))
    # the best guess is the mean over the ring, weighted by how likely each point is
    angle = torch.linspace(0, 6.2832, 400)
    ring = 1.4 * (1 - level) ** 0.5 * torch.stack([angle.cos(), angle.sin()], 1)
    likely = (-torch.cdist(mixed, ring).square() / (2 * level)).softmax(1)
    best = F.mse_loss((mixed - likely @ ring) / level**0.5, noise)
    most(float(F.mse_loss(said, noise)), 1.12 * float(best), "error of the noise")
    least(witness.mean_loss(-100), 0.2, "the loss, which has a high floor,")


@healthy(
    "diffusion_on_a_ring",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=_denoises,
    tricky="the loss meets its high floor early and is very noisy",
)
def _diffusion(config: Config) -> Job:
    net = MLP([3, 64, 64, 2], "gelu")
    return job(net, F.mse_loss, config, _ring(), val=False, learner=Denoiser)


# ---- two inputs ----


class Pairs(Learner):
    """Both views go in; there is no target."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = contrastive_loss(self(*batch), batch[0])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", contrastive_loss(self(*batch), batch[0]))


def _retrieves(witness: Witness) -> None:
    left, right = (one[:32] for one in fresh(data.pairs(2560)))
    found = (answers(witness, left, right).argmax(1) == torch.arange(32)).float().mean()
    least(float(found), 0.8, "pairs found among 32")


@healthy("contrastive_towers", "contrastive", verify=_retrieves)
def _contrastive(config: Config) -> Job:
    settings: dict[str, Any] = {"learner": Pairs}
    return job(Towers(12, 10), contrastive_loss, config, data.pairs(2560), **settings)


class Siamese(nn.Module):
    """One encoder for both inputs; a small distance means the same class."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.encoder = MLP([features, 64, 16])
        self.scale = nn.Parameter(torch.tensor(-1.0))
        self.shift = nn.Parameter(torch.tensor(1.0))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        distance = (self.encoder(left) - self.encoder(right)).square().mean(-1)
        return self.shift + self.scale * distance


def _couples(samples: int = 6400) -> tuple[Tensor, Tensor, Tensor]:
    x, y = data.blobs(2 * samples, noise=1.0)
    left, right = x.chunk(2)
    first, second = y.chunk(2)
    # half of the pairs are made equal by putting the right ones in the order of their classes
    order = torch.where(torch.arange(samples) % 2 == 0, first, second)
    pool = [right[second == label] for label in range(4)]
    chosen = [pool[int(label)][i % len(pool[int(label)])] for i, label in enumerate(order)]
    return left, torch.stack(chosen), (first == order).float()


def _knows_pairs(witness: Witness) -> None:
    left, right, same = fresh(_couples())
    said = answers(witness, left, right) > 0
    least(float((said == same.bool()).float().mean()), 0.95, "accuracy on fresh pairs")


@healthy("siamese_pairs", "siamese", verify=_knows_pairs, tricky="one encoder runs twice a step")
def _siamese(config: Config) -> Job:
    return job(Siamese(16), F.binary_cross_entropy_with_logits, config, _couples())


# ---- several answers ----


def _labels(samples: int = 2560) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 16, generator=g)
    return x, (x @ torch.randn(16, 10, generator=g) > 4.0).float()


def _labels_right(witness: Witness) -> None:
    x, y = fresh(_labels())
    said = (answers(witness, x) > 0).float()
    most(float(y.mean()), 0.25, "share of positive labels")
    hits, wrong = float((said * y).sum()), float((said != y).sum())
    least(2 * hits / (2 * hits + wrong), 0.8, "F1 on fresh data")


@healthy(
    "multi_label",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_labels_right,
    tricky="most labels are negative",
)
def _multi_label(config: Config) -> Job:
    return job(MLP([16, 64, 64, 10]), F.binary_cross_entropy_with_logits, config, _labels())


def _masks(samples: int = 1500) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    clean = (torch.rand(samples, 1, 3, 3, generator=g) < 0.15).float()
    clean = F.interpolate(clean, scale_factor=4)
    return clean + 0.5 * torch.randn(samples, 1, 12, 12, generator=g), clean


def _masks_right(witness: Witness) -> None:
    x, y = fresh(_masks())
    said = (answers(witness, x) > 0).float()
    overlap = float((said * y).sum() / (said + y).clamp(max=1).sum())
    least(overlap, 0.8, "overlap of masks on fresh images")


@healthy(
    "pixels",
    "cnn",
    verify=_masks_right,
    tricky="six pixels of seven are background",
)
def _pixels(config: Config) -> Job:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )
    return job(net, F.binary_cross_entropy_with_logits, config, _masks())


class TwoHeads(nn.Module):
    """A shared body; a class and a number come out, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP([16, 64, 64])
        self.kind = nn.Linear(64, 4)
        self.amount = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.body(x))
        return torch.cat([self.kind(y), self.amount(y)], -1)


def _both(out: Tensor, target: Tensor) -> Tensor:
    kinds = F.cross_entropy(out[:, :4], target[:, 0].long())
    return kinds + 0.1 * F.mse_loss(out[:, 4], target[:, 1])


def _two_targets(samples: int = 6400) -> tuple[Tensor, Tensor]:
    x, y = data.blobs(samples, noise=1.5)
    return x, torch.stack([y.float(), x[:, 0] - x[:, 1]], 1)


def _both_right(witness: Witness) -> None:
    x, target = fresh(_two_targets())
    out = answers(witness, x)
    best = nearest_centre(6400, noise=1.5)
    least(float((out[:, :4].argmax(1) == target[:, 0]).float().mean()), best - 0.04, "accuracy")
    amount = target[:, 1]
    most(float(F.mse_loss(out[:, 4], amount) / amount.var()), 0.1, "share of variance left")


@healthy(
    "two_heads",
    "mlp",
    verify=_both_right,
    tricky="one head learns ten times as hard as the other",
)
def _multi_task(config: Config) -> Job:
    return job(TwoHeads(), _both, config, _two_targets())


# ---- words ----


class Bag(nn.Module):
    """The mean of the words' vectors, and a head."""

    def __init__(self, kinds: int, classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(kinds, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


@healthy(
    "embedding_bag",
    "embedding",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 250}},
    verify=_counts_right,
    tricky="Adam at 1e-2, right for so small a network",
)
def _bag(config: Config) -> Job:
    return job(Bag(20, 2), F.cross_entropy, config, data.tokens(4096))


class Factors(nn.Module):
    """What a user thinks of an item: the product of their vectors."""

    def __init__(self, users: int, items: int, width: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        for one in (self.users, self.items):
            nn.init.normal_(one.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0]) * self.items(x[:, 1])).sum(-1)


def _ratings(samples: int = 20000, users: int = 200, items: int = 5000) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    left = torch.randn(users, 2, generator=g)
    right = torch.randn(items, 2, generator=g)
    # only every tenth item is ever seen
    x = torch.stack(
        [
            torch.randint(users, (samples,), generator=g),
            10 * torch.randint(items // 10, (samples,), generator=g),
        ],
        1,
    )
    return x, (left[x[:, 0]] * right[x[:, 1]]).sum(-1)


def _rates(witness: Witness) -> None:
    most(error(witness, _ratings()), 0.5, "error on fresh pairs (variance is 2)")


@healthy(
    "huge_sparse_embedding",
    "embedding",
    config={
        "optimizer": {"lr": 2e-2},
        "trainer": {"max_steps": 400},
        "hardware": {"batch_size": 128},
    },
    verify=_rates,
    tricky="nine in ten rows of the embedding never get a gradient",
)
def _factors(config: Config) -> Job:
    return job(Factors(200, 5000), F.mse_loss, config, _ratings())


# ---- generators ----


class Generator(GAN):
    """Answers with generated points."""

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


def _points(samples: int = 4000) -> tuple[Tensor]:
    g = torch.Generator().manual_seed(1)
    return (torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(samples, 2, generator=g),)


def _generates(witness: Witness) -> None:
    said = answers(witness, torch.randn(2000, 4, generator=torch.Generator().manual_seed(2)))
    (real,) = fresh(_points())
    most(float((said.mean(0) - real.mean(0)).norm()), 0.35, "distance of the means")
    spread = said.std(0) / real.std(0)
    least(float(spread.min()), 0.4, "smallest ratio of spreads")
    most(float(spread.max()), 2.0, "largest ratio of spreads")


@healthy(
    "gan_learns_the_points",
    "gan",
    config={
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3, "betas": [0.5, 0.9]},
        "trainer": {"max_steps": 1600},
        "hardware": {"batch_size": 64},
    },
    verify=_generates,
    tricky="both losses rise and fall, two optimizers by hand",
)
def _gan(config: Config) -> Job:
    train, _, _ = parts(*_points())
    return Job(Generator(config), data.loader(*train, batch_size=config["hardware"]["batch_size"]))


class Experts(nn.Module):
    """Each sample goes to one of eight experts, by a router; most experts idle in a step."""

    def __init__(self, features: int, classes: int, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(features, experts)
        self.experts = nn.ModuleList(MLP([features, 32, classes]) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        chosen = weights.argmax(-1)
        out = x.new_zeros(len(x), self.experts[0].head.out_features)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero().squeeze(-1)
            if len(mine):
                out = out.index_add(0, mine, expert(x[mine]) * weights[mine, i : i + 1] * 2)
        return out


def _experts_right(witness: Witness) -> None:
    idle = [
        sum(norms[f"net.experts.{i}.head.weight"] is None for i in range(8))
        for norms in witness.norms_by_name
    ]
    least(sum(n > 0 for n in idle) / len(idle), 0.3, "share of steps with an idle expert")
    used = [
        any(norms[f"net.experts.{i}.head.weight"] is not None for norms in witness.norms_by_name)
        for i in range(8)
    ]
    assert all(used), "an expert is never used"
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, data.blobs(6400, noise=1.5)), best - 0.04, "accuracy")


@healthy(
    "mixture_of_experts",
    "moe",
    config={"hardware": {"batch_size": 16}, "trainer": {"max_steps": 300}},
    verify=_experts_right,
    tricky="an expert is unused in some steps",
)
def _experts(config: Config) -> Job:
    return job(Experts(16, 4), F.cross_entropy, config, data.blobs(6400, noise=1.5))


class Convolutions(nn.Module):
    """Residual convolutions with group norm."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(4)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.amax((2, 3)))


def _patches(samples: int = 1500) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = 0.3 * torch.randn(samples, 1, 12, 12, generator=g)
    y = torch.randint(2, (samples,), generator=g)
    # horizontal or vertical stroke at a random place
    for i in range(samples):
        a, b = torch.randint(1, 8, (2,), generator=g).tolist()
        if y[i]:
            x[i, 0, a, b : b + 4] += 1.5
        else:
            x[i, 0, a : a + 4, b] += 1.5
    return x, y


def _strokes_right(witness: Witness) -> None:
    least(accuracy(witness, _patches()), 0.93, "accuracy on fresh strokes")


@healthy("residual_group_norm", "cnn", verify=_strokes_right)
def _residual_cnn(config: Config) -> Job:
    return job(Convolutions(2), F.cross_entropy, config, _patches())


class Mixer(nn.Module):
    """Mixes over places and over features in turn."""

    def __init__(self, places: int, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        sizes = [(places, 2 * places), (width, 2 * width)]
        self.first = nn.Linear(features, width)
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, a)) for a, b in sizes
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in sizes)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.mix[0](self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.mix[1](self.norms[1](x))
        return self.head(x.mean(1))


@healthy("mixer_sums", "mlp", verify=_sums_right)
def _mixer(config: Config) -> Job:
    return job(Mixer(12, 4, 2), F.cross_entropy, config, data.sequences(4096))


class Convolutions1d(nn.Sequential):
    """Dilated causal-like convolutions over time, and a head on their mean."""

    def __init__(self, features: int, classes: int, width: int = 32) -> None:
        layers: list[nn.Module] = []
        for (before, after), dilation in zip(
            pairwise((features, width, width)), (1, 2), strict=True
        ):
            layers += [nn.Conv1d(before, after, 3, padding=dilation, dilation=dilation), nn.ReLU()]
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2))


@healthy("convolutions_over_time", "cnn", verify=_sums_right)
def _time(config: Config) -> Job:
    return job(Convolutions1d(4, 2), F.cross_entropy, config, data.sequences(4096))
