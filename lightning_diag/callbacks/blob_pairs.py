"""Which two weights make pairs: those that are named, or the first two that fit one another."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_diag.components import module_names, parameter_names, weight_of
from lightning_diag.spelling import did_you_mean

__all__ = ["WeightPair", "checked_pairs", "find_pair", "named_pairs"]

FOUND = "encoder_decoder"


class WeightPair(NamedTuple):
    """Two weights, ``(h, d)`` and ``(d, h)``, and what they are called."""

    encoder_name: str
    decoder_name: str
    encoder: Tensor
    decoder: Tensor


def checked_pairs(pairs: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, str]] | None:
    """The pairs as plain names.

    Args:
        pairs: Name to encoder and decoder parameter; None for none.

    Raises:
        TypeError: It is no mapping.
        ValueError: It is empty, or an entry is not two names.
    """
    if pairs is None:
        return None
    if not isinstance(pairs, Mapping):
        raise TypeError(f"`pairs` must map names to two parameters, got {pairs!r}.")
    if not pairs:
        raise ValueError("`pairs` must name at least one pair, or be None to find one.")
    checked = {}
    for name, both in pairs.items():
        listed = [] if isinstance(both, str) or not isinstance(both, Sequence) else list(both)
        if not isinstance(name, str) or not name:
            raise ValueError(f"A pair must have a name, got {name!r}.")
        if len(listed) != 2 or not all(isinstance(one, str) and one for one in listed):
            raise ValueError(
                f"Pair `{name}` must be the names of an encoder and a decoder weight, got {both!r}."
            )
        checked[name] = (listed[0], listed[1])
    return checked


def named_pairs(
    model: nn.Module, pairs: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, WeightPair], list[str]]:
    """The weights of the pairs that fit, and a sentence for each that does not.

    Args:
        model: The network.
        pairs: Pair to the names of its encoder and decoder.
    """
    weights = dict(parameter_names(model))
    found, problems = {}, []
    for name, both in pairs.items():
        unknown = [one for one in both if one not in weights]
        for one in unknown:
            near = did_you_mean(one, weights)
            problems.append(f"Pair `{name}` names `{one}`, which is no parameter; {near}")
        if unknown:
            continue
        encoder, decoder = (weights[one] for one in both)
        if encoder.dim() != 2 or tuple(encoder.shape) != tuple(reversed(decoder.shape)):
            problems.append(
                f"Pair `{name}` must be (h, d) and (d, h), got {tuple(encoder.shape)} for "
                f"`{both[0]}` and {tuple(decoder.shape)} for `{both[1]}`."
            )
            continue
        found[name] = WeightPair(*both, encoder, decoder)
    return found, problems


def find_pair(model: nn.Module) -> dict[str, WeightPair]:
    """The first two linear layers of which one leads back where the other comes from.

    Those whose shapes differ come before square ones, of which any two would fit.

    Args:
        model: The network.

    Returns:
        One pair, or none.
    """
    layers = [
        (f"{name}.weight" if name else "weight", weight)
        for name, module in module_names(model).items()
        if isinstance(module, nn.Linear) and (weight := weight_of(module)) is not None
    ]
    fitting = [
        WeightPair(one, other, encoder, decoder)
        for place, (one, encoder) in enumerate(layers)
        for other, decoder in layers[place + 1 :]
        if decoder is not encoder and tuple(encoder.shape) == tuple(reversed(decoder.shape))
    ]
    fitting.sort(key=lambda pair: pair.encoder.shape[0] == pair.encoder.shape[1])
    return {FOUND: fitting[0]} if fitting else {}
