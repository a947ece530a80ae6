"""What faults of training share: ordinary jobs, schedules by configuration, and evidence."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from tests.faults import data
from tests.faults.case import CASES, Config, Job, merged
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

Check = Callable[[Witness], None]
SGD = "torch.optim.SGD"
ADAM = "torch.optim.Adam"
ADAMW = "torch.optim.AdamW"

# ---- jobs that learn well with fair settings ----


def job(
    net: nn.Module, loss: Any, config: Config, tensors: Sequence[Tensor], **learner: Any
) -> Job:
    """A learner on three quarters of the samples, validated on the rest."""
    kept = 3 * len(tensors[0]) // 4
    size = config["hardware"]["batch_size"]
    train = data.loader(*[t[:kept] for t in tensors], batch_size=size)
    val = data.loader(*[t[kept:] for t in tensors], batch_size=64, shuffle=False)
    learner.setdefault("schedule", schedule_of(config))
    return Job(Learner(net, loss, config, **learner), train, val)


def mlp(config: Config, **learner: Any) -> Job:
    """Four blobs."""
    net = MLP([16, 64, 64, 4], config["model"].get("activation", "relu"))
    return job(net, F.cross_entropy, config, data.blobs(2048, noise=2.0), **learner)


def regressor(config: Config, scale: float = 1.0, **learner: Any) -> Job:
    """A smooth function, whose values may have another scale."""
    x, y = data.regression(2048)
    return job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, (x, scale * y), **learner)


def cnn(config: Config, *, batch_norm: bool = True, **learner: Any) -> Job:
    """Bars in images."""
    net = CNN(1, 4, batch_norm=batch_norm)
    return job(net, F.cross_entropy, config, data.images(1024, noise=0.6), **learner)


def gru(config: Config, **learner: Any) -> Job:
    """The sign of a sum over time."""
    return job(GRUClassifier(4, 2), F.cross_entropy, config, data.sequences(2048), **learner)


def transformer(config: Config, **learner: Any) -> Job:
    """Which of two tokens is more frequent."""
    return job(Transformer(20, 2), F.cross_entropy, config, data.tokens(2048), **learner)


def gnn(config: Config, **learner: Any) -> Job:
    """Marked nodes among marked neighbours."""
    return job(GNN(4, 2), F.cross_entropy, config, data.graphs(2048), **learner)


def low_rank(samples: int, features: int = 24, latent: int = 6) -> Tensor:
    """Points on a linear subspace, with noise."""
    g = torch.Generator().manual_seed(1)
    basis = torch.randn(latent, features, generator=g)
    points = torch.randn(samples, latent, generator=g) @ basis / latent**0.5
    return points + 0.1 * torch.randn(samples, features, generator=g)


def autoencoder(config: Config, **learner: Any) -> Job:
    """Reconstruction of points on a subspace."""
    x = low_rank(2048)
    return job(Autoencoder(24), F.mse_loss, config, (x, x), outputs="loss", **learner)


def contrastive(config: Config, net: nn.Module | None = None, **learner: Any) -> Job:
    """Two views of a latent vector."""
    tensors = (*data.pairs(2048), torch.zeros(2048))
    return job(net or Towers(12, 10), contrastive_loss, config, tensors, outputs="loss", **learner)


def stream(
    config: Config, x: Tensor, y: Tensor, spoil: Callable[[Tensor, Tensor], None]
) -> Iterable[Any]:
    """Batches in a fixed order, one a step, spoiled in place unless ``data.spoiled`` is false."""
    x, y = x.clone(), y.clone()
    if config["data"].get("spoiled", True):
        spoil(x, y)
    return data.loader(x, y, batch_size=config["hardware"]["batch_size"], shuffle=False)


def schedule_of(config: Config) -> Callable[[torch.optim.Optimizer], Any] | None:
    """The schedule that ``model.schedule`` names, stepped every optimizer step.

    ``model.schedule_steps`` and ``model.schedule_factor`` are its numbers; None if constant.
    """
    settings, total = config["model"], config["trainer"]["max_steps"]
    steps = settings.get("schedule_steps") or total
    factor = settings.get("schedule_factor", 0.1)
    rate = config["optimizer"]["lr"]
    kinds: Mapping[str, Callable[[torch.optim.Optimizer], Any]] = {
        "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=steps),
        "exponential": lambda o: schedules.ExponentialLR(o, gamma=factor),
        "step": lambda o: schedules.StepLR(o, step_size=steps, gamma=factor),
        "linear": lambda o: schedules.LambdaLR(o, lambda s: max(0.0, 1 - s / steps)),
        "warmup": lambda o: schedules.LambdaLR(o, lambda s: min(1.0, (s + 1) / steps)),
        "one_cycle": lambda o: schedules.OneCycleLR(
            o, max_lr=rate * factor, total_steps=total + 1, cycle_momentum=False
        ),
    }
    return kinds.get(settings.get("schedule", "constant"))


# ---- evidence ----


def replay(name: str, over: Mapping[str, Any], steps: int | None = None) -> list[float]:
    """Losses of a case with other settings and without its plans, trained by a plain loop."""
    case = CASES[name]
    config = merged(case.config, over)
    torch.manual_seed(case.seed(config["seed"]))
    made = case.build(config)
    chosen = made.model.configure_optimizers()
    optimizers, following = chosen if isinstance(chosen, tuple) else ([chosen], [])
    losses: list[float] = []
    clip = config["trainer"]["gradient_clip_val"]
    while len(losses) < (steps or config["trainer"]["max_steps"]):
        for batch in made.train:
            *inputs, target = batch
            loss = made.model.loss(made.model.net(*inputs), target)
            optimizers[0].zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(made.model.parameters(), clip)
            optimizers[0].step()
            for one in following:
                one["scheduler"].step()
            losses.append(float(loss.detach()))
    return losses[: steps or config["trainer"]["max_steps"]]


def tail(losses: Sequence[float]) -> float:
    """Mean of the last fifth, or what is not finite in it."""
    last = losses[-max(5, len(losses) // 5) :]
    return sum(last) / len(last)


def worse_than(
    name: str, over: Mapping[str, Any], factor: float = 1.5, margin: float = 0.1
) -> Check:
    """The same case with these settings ends well below the loss that was seen."""

    def check(witness: Witness) -> None:
        seen, mended = tail(witness.losses), tail(replay(name, over))
        assert math.isfinite(mended), "the mended settings fail, too"
        bad = not math.isfinite(seen) or seen > factor * mended + margin
        assert bad, f"{seen:.3g} is hardly worse than {mended:.3g} with mended settings"

    return check


def rises(factor: float = 2.0) -> Check:
    """The loss ends above its start, and stays a number."""

    def check(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses)), "the loss is not finite"
        seen, start = tail(witness.losses), witness.mean_loss(0, 3)
        assert seen > factor * start, f"the loss does not rise: {start:.3g} to {seen:.3g}"

    return check


def breaks(first: int = 0, last: int = 10_000) -> Check:
    """The loss is a number before `first`, and stops to be one before `last`."""

    def check(witness: Witness) -> None:
        bad = [step for step, loss in enumerate(witness.losses) if not math.isfinite(loss)]
        assert bad, "the loss is finite to the end"
        assert first <= bad[0] <= last, f"the loss breaks at {bad[0]}"

    return check


def travel(witness: Witness) -> float:
    """How far the weights went from the start, as a share of their norm."""
    names = [n for n, _ in witness.model.named_parameters()]
    moved = sum(float((witness.last[n] - witness.first[n]).double().square().sum()) for n in names)
    size = sum(float(witness.first[n].double().square().sum()) for n in names)
    return math.sqrt(moved / size)


def hardly_moves(share: float = 0.02) -> Check:
    """The weights end where they began."""

    def check(witness: Witness) -> None:
        assert travel(witness) < share, f"the weights moved by {travel(witness):.3g}"

    return check


def both(*checks: Check) -> Check:
    """All of them."""

    def check(witness: Witness) -> None:
        for one in checks:
            one(witness)

    return check


def learns(factor: float = 0.7) -> Check:
    """The mended run learns."""

    def check(witness: Witness) -> None:
        seen, start = tail(witness.losses), witness.mean_loss(0, 5)
        assert seen < factor * start, f"the loss goes from {start:.3g} to {seen:.3g} only"

    return check


def times_rate(factor: float, part: str | None = None) -> Callable[[Learner], None]:
    """A plan: the learning rate of all groups, or of the one with that name, times a factor."""

    def plan(learner: Learner) -> None:
        for optimizer in learner.trainer.optimizers:
            for group in optimizer.param_groups:
                if part is None or group.get("name") == part:
                    group["lr"] *= factor

    return plan


def times_weights(factor: float, *parts: str) -> Callable[[Learner], None]:
    """A plan: the weights of some parts of the network times a factor."""

    def plan(learner: Learner) -> None:
        with torch.no_grad():
            for part in parts:
                for parameter in learner.net.get_submodule(part).parameters():
                    parameter.mul_(factor)

    return plan
