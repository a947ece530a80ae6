"""Small networks of every kind that the cases need, and the module that trains them."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_diag import param_groups
from lightning_diag.lightning import LightningModule

Loss = Callable[[Tensor, Tensor], Tensor]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}


def located(path: str) -> Any:
    """What a dotted name stands for."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def optimizer_of(module: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that ``config["optimizer"]`` describes, with ``component_lrs`` if any."""
    settings = {k: v for k, v in config["optimizer"].items() if not k.startswith("_")}
    parameters: Any = [p for p in module.parameters() if p.requires_grad]
    if config.get("component_lrs"):
        parameters = param_groups(module, config["component_lrs"], base_lr=settings["lr"])
    return located(config["optimizer"]["_target_"])(parameters, **settings)


class Learner(LightningModule):
    """A network, a loss, and what a configuration says of how it learns.

    Args:
        net: The network; the module's parts are its children (``net.<child>``).
        loss: From what the network returns and the target to a number.
        config: See `case.DEFAULTS`; ``model.warmup_share`` warms up linearly, by the step.
        outputs: ``"loss"`` returns the loss alone, ``"logits"`` also predictions and targets.
        schedule: From optimizer to a scheduler, stepped every optimizer step; instead of a warm-up.
        plans: What happens to the module right before the batch of a step: ``{step: function}``.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        config: Mapping[str, Any],
        *,
        outputs: str = "logits",
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        plans: Mapping[int, Callable[["Learner"], None]] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.config = dict(config)
        self.outputs = outputs
        self.schedule = schedule
        self.plans = dict(plans or {})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for step in [one for one in self.plans if one <= self.global_step]:
            self.plans.pop(step)(self)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        *inputs, target = batch
        logits = self(*inputs)
        loss = self.loss(logits, target)
        self.log("train_loss", loss)
        if self.outputs == "loss":
            return loss
        return {"loss": loss, "logits": logits.detach(), "target": target}

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        *inputs, target = batch
        self.log("val_loss", self.loss(self(*inputs), target))

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self, self.config)
        share = self.config["model"].get("warmup_share", 0.0)
        if self.schedule is not None:
            scheduler = self.schedule(optimizer)
        elif share:
            steps = max(1, int(share * self.config["trainer"]["max_steps"]))
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / steps)
            )
        else:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def scaled(module: nn.Module, scale: float) -> nn.Module:
    """All weights of two and more dimensions times a factor: too large or too small a start."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return module


class MLP(nn.Sequential):
    """Linear layers with activations between them, as ``body`` and ``head``."""

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        *,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after)]
            layers += [nn.LayerNorm(after)] if norm else []
            layers += [ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-2], sizes[-1])


class CNN(nn.Module):
    """Three convolutions and a head, for images of ``channels`` x 12 x 12."""

    def __init__(
        self, channels: int, classes: int, activation: str = "relu", *, batch_norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after)] if batch_norm else []
            layers += [ACTIVATIONS[activation](), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class GRUClassifier(nn.Module):
    """A GRU over vectors ``(batch, time, features)``, and a head on its last state."""

    def __init__(self, features: int, classes: int, width: int = 32, layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.GRU(features, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention by `scaled_dot_product_attention`; `temperature` multiplies its scores."""

    def __init__(self, width: int, heads: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = temperature
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q * self.temperature, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: str, temperature: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, temperature)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens ``(batch, time)`` to logits: of the sequence, or of every token (`each`)."""

    def __init__(
        self,
        tokens: int,
        classes: int,
        *,
        width: int = 32,
        layers: int = 2,
        heads: int = 4,
        length: int = 16,
        activation: str = "gelu",
        temperature: float = 1.0,
        each: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        make = partial(Block, width, heads, activation, temperature)
        self.blocks = nn.ModuleList([make() for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        y = self.norm(y)
        return self.head(y) if self.each else self.head(y.mean(1))


class GNN(nn.Module):
    """Mean aggregation over a dense adjacency ``(batch, nodes, nodes)``; logits of the graph."""

    def __init__(self, features: int, classes: int, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        sizes = [features, *[width] * layers]
        pairs = list(pairwise(sizes))
        self.own = nn.ModuleList([nn.Linear(a, b) for a, b in pairs])
        self.others = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in pairs])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weights = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
        for own, others in zip(self.own, self.others, strict=True):
            x = F.relu(own(x) + others(weights @ x))
        return self.head(x.mean(1))


class Autoencoder(nn.Module):
    """Encoder to a latent vector, and decoder back."""

    def __init__(self, features: int, latent: int = 8, activation: str = "relu") -> None:
        super().__init__()
        kind = ACTIVATIONS[activation]
        self.encoder = nn.Sequential(nn.Linear(features, 64), kind(), nn.Linear(64, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), kind(), nn.Linear(64, features))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Towers(nn.Module):
    """Two encoders into one space of unit vectors, with a learned temperature."""

    def __init__(self, first: int, second: int, width: int = 32) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(first, 64), nn.ReLU(), nn.Linear(64, width))
        self.right = nn.Sequential(nn.Linear(second, 64), nn.ReLU(), nn.Linear(64, width))
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        return self.scale.exp() * left @ right.T


class GAN(LightningModule):
    """A generator and a discriminator of points in the plane, by manual optimization."""

    def __init__(self, config: Mapping[str, Any], width: int = 32) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = MLP([4, width, width, 2], "leaky_relu")
        self.discriminator = MLP([2, width, width, 1], "leaky_relu")
        self.config = dict(config)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(second)
        logits = torch.cat([self.discriminator(real), self.discriminator(fake.detach())])
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        self._step(second, loss, "discriminator_loss")
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        logits = self.discriminator(fake)
        loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        self._step(first, loss, "generator_loss")
        self.untoggle_optimizer(first)

    def _step(self, optimizer: Any, loss: Tensor, name: str) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log(name, loss)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [optimizer_of(part, self.config) for part in parts]


def contrastive_loss(logits: Tensor, _: Tensor) -> Tensor:
    """Symmetric InfoNCE: the diagonal holds the pairs."""
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
