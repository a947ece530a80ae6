"""What the healthy runs share: data in three parts, and how well a trained module answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job
from tests.faults.networks import Learner, Loss
from tests.faults.witness import Witness

Tensors = tuple[Tensor, ...]


def parts(*tensors: Tensor) -> tuple[Tensors, Tensors, Tensors]:
    """Sixty per cent to train on, twenty to validate on, twenty that nobody has seen."""
    size = len(tensors[0])
    first, second = int(0.6 * size), int(0.8 * size)
    return (
        tuple(one[:first] for one in tensors),
        tuple(one[first:second] for one in tensors),
        tuple(one[second:] for one in tensors),
    )


def fresh(tensors: Sequence[Tensor]) -> Tensors:
    """The part of the data that nobody has seen."""
    return parts(*tensors)[2]


def job(
    net: nn.Module,
    loss: Loss,
    config: Config,
    tensors: Sequence[Tensor],
    *,
    val: bool = True,
    components: dict[str, str] | None = None,
    learner: type[Learner] = Learner,
    **settings: Any,
) -> Job:
    """A learner on the first part of the data, validated on the second."""
    train, held, _ = parts(*tensors)
    return Job(
        learner(net, loss, config, **settings),
        data.loader(*train, batch_size=config["hardware"]["batch_size"]),
        data.loader(*held, batch_size=64, shuffle=False) if val else None,
        components,
    )


def answers(witness: Witness, *inputs: Tensor) -> Tensor:
    """What the trained module says, in evaluation mode, by plain torch."""
    model = witness.model
    assert model is not None
    model.eval()
    kind = next(model.parameters()).dtype
    with torch.no_grad():
        return model(*[one.to(kind) if one.is_floating_point() else one for one in inputs]).float()


def accuracy(witness: Witness, tensors: Sequence[Tensor], classes_at: int = -1) -> float:
    """Share of right answers on the part of the data that nobody has seen."""
    *inputs, target = fresh(tensors)
    said = answers(witness, *inputs).argmax(classes_at)
    return float((said == target).float().mean())


def error(witness: Witness, tensors: Sequence[Tensor]) -> float:
    """Mean squared error on the part of the data that nobody has seen."""
    *inputs, target = fresh(tensors)
    return float(F.mse_loss(answers(witness, *inputs), target))


def nearest_centre(
    samples: int, features: int = 16, classes: int = 4, noise: float = 1.0, seed: int = 1
) -> float:
    """How often the best possible classifier of `data.blobs` is right: the nearest centre."""
    centres = 1.5 * torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
    x, y = fresh(data.blobs(samples, features, classes, noise, seed))
    return float((torch.cdist(x, centres).argmin(1) == y).float().mean())


def least(value: float, bound: float, what: str) -> None:
    """Assert that a number is large enough, and say it where it is not."""
    assert value >= bound, f"{what} is {value:.4g}, not at least {bound:.4g}"


def most(value: float, bound: float, what: str) -> None:
    """Assert that a number is small enough, and say it where it is not."""
    assert value <= bound, f"{what} is {value:.4g}, not at most {bound:.4g}"


def per_token(logits: Tensor, target: Tensor, **settings: Any) -> Tensor:
    """Cross-entropy of every token: ``(batch, time, kinds)`` against ``(batch, time)``."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), **settings)
