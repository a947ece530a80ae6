"""Ways to run a step: precision, accumulation, clipping, by hand, several loaders."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_diag import lightning as door
from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.healthy.checks import (
    Tensors,
    accuracy,
    error,
    fresh,
    job,
    least,
    most,
    nearest_centre,
    parts,
    per_token,
)
from tests.faults.networks import CNN, MLP, GRUClassifier, Learner, Transformer, optimizer_of
from tests.faults.witness import Witness


def _points() -> Tensors:
    return data.blobs(6400, noise=2.0)


def _points_right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=2.0)
    least(accuracy(witness, _points()), best - 0.04, "accuracy on fresh points")


def _counts_right(witness: Witness) -> None:
    least(accuracy(witness, data.tokens(4096)), 0.9, "accuracy on fresh tokens")


# ---- precision and accumulation ----


@healthy(
    "bf16_transformer",
    "transformer",
    config={"hardware": {"precision": "bf16-mixed"}, "model": {"warmup_share": 0.1}},
    verify=_counts_right,
    tricky="bf16: losses and gradients are coarse",
)
def _bf16(config: Config) -> Job:
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(4096))


@healthy(
    "bf16_cnn",
    "cnn",
    config={"hardware": {"precision": "bf16-mixed"}},
    verify=lambda witness: least(accuracy(witness, data.images(2560)), 0.97, "accuracy"),
    tricky="bf16: losses and gradients are coarse",
)
def _bf16_cnn(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560))


def _exact(witness: Witness) -> None:
    kinds = {tensor.dtype for tensor in witness.last.values()}
    assert kinds == {torch.float64}, f"weights are {kinds}"
    most(error(witness, data.regression(4096)), 0.05, "error on fresh points (noise is 0.01)")


@healthy(
    "double_precision",
    "mlp",
    config={"hardware": {"precision": "64-true"}, "trainer": {"max_steps": 400}},
    verify=_exact,
    tricky="weights of 64 bits",
)
def _double(config: Config) -> Job:
    return job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, data.regression(4096))


@healthy(
    "accumulates_four",
    "mlp",
    config={
        "hardware": {"accumulate": 4, "batch_size": 8},
        "trainer": {"max_steps": 150, "val_check_interval": 100},
    },
    verify=_points_right,
    tricky="weights move at every fourth batch alone",
)
def _accumulates(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _points())


@healthy(
    "accumulates_eight_with_clip_and_warmup",
    "transformer",
    config={
        "hardware": {"accumulate": 8, "batch_size": 8},
        "model": {"warmup_share": 0.1},
        "trainer": {"max_steps": 150, "gradient_clip_val": 1.0, "val_check_interval": 250},
    },
    verify=_counts_right,
    tricky="weights move at every eighth batch alone; clip and warm-up beside it",
)
def _accumulates_eight(config: Config) -> Job:
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(4096))


# ---- clipping ----


def _clipped(witness: Witness, limit: float, least_share: float, most_share: float) -> None:
    share = sum(norm > limit for norm in witness.norms) / len(witness.norms)
    least(share, least_share, "share of steps with a clipped gradient")
    most(share, most_share, "share of steps with a clipped gradient")


def _clips_now_and_then(witness: Witness) -> None:
    _clipped(witness, 1.0, 0.05, 0.3)
    _counts_right(witness)


@healthy(
    "clips_now_and_then",
    "transformer",
    config={
        "optimizer": {"lr": 2e-3},
        "hardware": {"batch_size": 32},
        "trainer": {"max_steps": 300, "gradient_clip_val": 1.0},
    },
    verify=_clips_now_and_then,
    tricky="one gradient in ten is clipped",
)
def _clips(config: Config) -> Job:
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(4096))


def _clips_early(witness: Witness) -> None:
    limit, tenth = 2.0, len(witness.norms) // 10
    early = sum(norm > limit for norm in witness.norms[:tenth]) / tenth
    late = sum(norm > limit for norm in witness.norms[-5 * tenth :]) / (5 * tenth)
    least(early, 0.5, "share of clipped steps in the first tenth")
    most(late, 0.05, "share of clipped steps in the second half")
    _, y = fresh(_steep())
    most(error(witness, _steep()), 0.1 * float(y.var()), "error on fresh points")


def _steep(samples: int = 4096) -> tuple[Tensor, Tensor]:
    x, y = data.regression(samples)
    return x, 3 + 2 * y


@healthy(
    "clips_at_the_start",
    "mlp",
    config={"trainer": {"max_steps": 400, "gradient_clip_val": 2.0}},
    verify=_clips_early,
    tricky="large gradients at the start, which the clip is there for",
)
def _clips_start(config: Config) -> Job:
    return job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, _steep())


def _never_clips(witness: Witness) -> None:
    least(accuracy(witness, data.sequences(4096)), 0.9, "accuracy on fresh sequences")
    _clipped(witness, 5.0, 0.0, 0.02)


@healthy(
    "clip_far_above_the_norm",
    "gru",
    config={"trainer": {"max_steps": 250, "gradient_clip_val": 5.0}},
    verify=_never_clips,
    tricky="a clip that never bites",
)
def _loose_clip(config: Config) -> Job:
    return job(GRUClassifier(4, 2), F.cross_entropy, config, data.sequences(4096))


# ---- by hand ----


class ByHand(Learner):
    """One optimizer, stepped by hand as it should be."""

    def __init__(self, *given: Any, every: int = 1, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        optimizer = self.optimizers()
        loss = self.loss(self(x), y)
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss)
        return loss.detach() if self.outputs == "loss" else None


@healthy(
    "by_hand",
    "mlp",
    verify=_points_right,
    tricky="manual optimization that returns nothing",
)
def _by_hand(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _points(), learner=ByHand)


@healthy(
    "by_hand_accumulating",
    "mlp",
    config={"hardware": {"batch_size": 8}, "trainer": {"max_steps": 200}},
    verify=_points_right,
    tricky="manual optimization, a step at every fourth batch",
)
def _by_hand_four(config: Config) -> Job:
    return job(
        MLP([16, 64, 64, 4]),
        F.cross_entropy,
        config,
        _points(),
        learner=ByHand,
        every=4,
        outputs="loss",
    )


class TwoOptimizers(Learner):
    """Body and head have an optimizer each; both step at every batch."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for one in self.optimizers():
            one.zero_grad()
        self.manual_backward(loss)
        for one in self.optimizers():
            one.step()
        self.log("train_loss", loss)
        return loss.detach()

    def configure_optimizers(self) -> Any:
        body = optimizer_of(self.net.body, self.config)
        head = torch.optim.SGD(self.net.head.parameters(), 0.05, momentum=0.9)
        return [body, head]


@healthy(
    "two_optimizers_by_hand",
    "mlp",
    verify=_points_right,
    tricky="body by Adam and head by SGD, in one step",
)
def _two_optimizers(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _points(), learner=TwoOptimizers)


class Sharpness(Learner):
    """Two passes a step: uphill, then down from there."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss)
        moved = []
        with torch.no_grad():
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            for parameter in self.parameters():
                step = 0.05 * parameter.grad / (norm + 1e-12)
                parameter.add_(step)
                moved.append(step)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        with torch.no_grad():
            for parameter, step in zip(self.parameters(), moved, strict=True):
                parameter.sub_(step)
        optimizer.step()
        optimizer.zero_grad()
        self.log("train_loss", loss)
        return loss.detach()


@healthy(
    "sharpness_aware",
    "mlp",
    verify=_points_right,
    tricky="weights are moved and moved back within a step",
)
def _sharpness(config: Config) -> Job:
    return job(MLP([16, 64, 64, 4]), F.cross_entropy, config, _points(), learner=Sharpness)


@healthy(
    "lbfgs",
    "linear",
    config={
        "optimizer": {"_target_": "torch.optim.LBFGS", "lr": 0.5, "max_iter": 4},
        "trainer": {"max_steps": 60},
    },
    verify=_points_right,
    tricky="several passes a step, by LBFGS on all the data",
)
def _lbfgs(config: Config) -> Job:
    learner = Learner(nn.Linear(16, 4), F.cross_entropy, config, outputs="loss")
    return Job(learner, DataLoader([parts(*_points())[0]], batch_size=None))


# ---- what a step returns, and where its batches come from ----


class Silent(Learner):
    """Logs nothing and returns the loss alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)


@healthy(
    "silent_module",
    "mlp",
    verify=_points_right,
    tricky="the module logs nothing",
)
def _silent(config: Config) -> Job:
    net = MLP([16, 64, 64, 4])
    return job(net, F.cross_entropy, config, _points(), val=False, learner=Silent)


@healthy(
    "returns_loss_only",
    "cnn",
    verify=lambda w: least(accuracy(w, data.images(2560)), 0.97, "accuracy"),
)
def _loss_only(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, data.images(2560), outputs="loss")


class TwoLoaders(Learner):
    """A labelled and an unlabelled batch at a time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch["labelled"]
        (extra,) = batch["unlabelled"]
        logits = self(x)
        with torch.no_grad():
            sure, guess = self(extra).softmax(-1).max(-1)
        each = F.cross_entropy(self(extra + 0.5 * torch.randn_like(extra)), guess, reduction="none")
        loss = F.cross_entropy(logits, y) + 0.5 * (each * (sure > 0.9)).mean()
        self.log("train_loss", loss)
        return {"loss": loss, "logits": logits.detach(), "target": y}


@healthy(
    "two_loaders_of_different_length",
    "mlp",
    verify=lambda witness: least(
        accuracy(witness, data.blobs(6400, noise=1.5)),
        nearest_centre(6400, noise=1.5) - 0.05,
        "accuracy",
    ),
    tricky="batches are dictionaries of two loaders, one of which starts again often",
)
def _two_loaders(config: Config) -> Job:
    package = importlib.import_module(f"{door.PACKAGE}.utilities.combined_loader")
    x, y = parts(*data.blobs(6400, noise=1.5))[0]
    loaders = {
        "labelled": data.loader(x[:256], y[:256], batch_size=16),
        "unlabelled": data.loader(x[256:], batch_size=32),
    }
    batches = package.CombinedLoader(loaders, "max_size_cycle")
    return Job(TwoLoaders(MLP([16, 64, 4]), F.cross_entropy, config), batches)


class Saving(nn.Module):
    """Blocks that are run again in the backward pass, to save memory."""

    def __init__(self, features: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(3)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@healthy(
    "checkpointed_blocks",
    "mlp",
    verify=_points_right,
    tricky="every block runs twice a step",
)
def _checkpointed(config: Config) -> Job:
    return job(Saving(16, 4), F.cross_entropy, config, _points())


def _reversed(samples: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(1, 12, (samples, 6), generator=g)
    y = x.flip(1)
    begun = torch.cat([torch.zeros(samples, 1, dtype=torch.long), y[:, :-1]], 1)
    return x, begun, y


class Translator(nn.Module):
    """`nn.Transformer`: reads a sequence, writes another."""

    def __init__(self, kinds: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.position = nn.Parameter(torch.randn(6, width))
        self.core = nn.Transformer(width, 2, 1, 1, 64, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, kinds)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, x: Tensor, begun: Tensor) -> Tensor:
        read, written = (self.embedding(one) + self.position for one in (x, begun))
        return self.head(self.core(read, written, tgt_mask=self.mask, tgt_is_causal=True))


@healthy(
    "translator_reverses",
    "transformer",
    config={"model": {"warmup_share": 0.1}, "trainer": {"max_steps": 500}},
    verify=lambda witness: least(accuracy(witness, _reversed()), 0.95, "accuracy"),
    tricky="peaked cross-attention beside causal self-attention",
)
def _translator(config: Config) -> Job:
    return job(Translator(12), per_token, config, _reversed())
