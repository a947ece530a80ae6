"""The few values of weights and gradients that a wiring check compares between its looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional
from torch.optim import Optimizer

from lightning_diag.callbacks.optimizers import own_parameters
from lightning_diag.callbacks.wiring_parameters import Subject, twin_pairs
from lightning_diag.components import weight_of
from lightning_diag.functional.moments import gathered, local_shard
from lightning_diag.functional.wiring_check import magnitudes

__all__ = ["Moved", "Twins", "Zeros"]

_SAMPLES = 16


class Moved:
    """Whether weights have moved since the first look, told by sum, norm and a few elements.

    Embeddings are left out: their rows move only when their turn comes.
    """

    def __init__(self) -> None:
        self.subjects: list[Subject] = []
        self._first: Tensor | None = None

    @torch.no_grad()
    def measure(self, subjects: Sequence[Subject], model: nn.Module) -> Tensor | None:
        """How many numbers of each subject's fingerprint differ from the first look's.

        Args:
            subjects: Parameters that optimizers move.
            model: The model, for its embeddings.

        Returns:
            Shape ``(n,)``, in the order of `subjects` of the first call; None at the first call.
        """
        if self._first is None:
            rows = (nn.Embedding, nn.EmbeddingBag)
            skipped = {id(weight_of(part)) for part in model.modules() if isinstance(part, rows)}
            self.subjects = [x for x in subjects if id(x.parameter) not in skipped]
        now = [_fingerprint(x.parameter) for x in self.subjects]
        if not now:
            return None
        samples = gathered(now)
        if self._first is None:
            self._first = samples
            return None
        return (samples != self._first).sum(1)


class Twins:
    """An embedding and a linear map that start with equal values, as if they were one."""

    def __init__(self) -> None:
        self._pairs: list[tuple[str, str]] | None = None
        self.equal: set[tuple[str, str]] = set()

    @torch.no_grad()
    def measure(
        self, modules: Mapping[str, nn.Module]
    ) -> tuple[list[tuple[str, str]], Tensor | None]:
        """Whether each pair is different, and their names; after the first look of equals only."""
        first = self._pairs is None
        if not first and not self.equal:
            return [], None
        found = {(one, other): (a, b) for one, other, a, b in twin_pairs(modules)}
        wanted = list(found) if first else [pair for pair in found if pair in self.equal]
        self._pairs = wanted
        if not wanted:
            return [], None
        return wanted, torch.stack([(a != b).any() for a, b in map(found.__getitem__, wanted)])

    def learn(self, pairs: Sequence[tuple[str, str]], different: Sequence[float]) -> None:
        """Take note of the first look's answer."""
        both = zip(pairs, different, strict=True)
        self.equal.update(pair for pair, other in both if not other)


class Zeros:
    """Parameters whose gradient has been exactly zero at every look so far.

    Attributes:
        looks: At how many looks the gradient was zero, while another one was not, by name.
    """

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}
        self._alive: set[str] = set()

    @torch.no_grad()
    def measure(self, optimizer: Optimizer, who: Mapping[int, Subject]) -> tuple[list[str], Any]:
        """The largest magnitude of each gradient that has been nothing but zeros so far.

        Args:
            optimizer: Whose gradients.
            who: The subjects by ``id`` of the parameter.

        Returns:
            Names, and their magnitudes, shape ``(n,)``; one that is alive stands among them.
        """
        found: list[tuple[str, Tensor]] = []
        reference: tuple[str, Parameter] | None = None
        for parameter in own_parameters(optimizer):
            if parameter.grad is None or id(parameter) not in who:
                continue
            name = who[id(parameter)].name
            if name not in self._alive:
                found.append((name, parameter.grad))
            elif reference is None or parameter.numel() < reference[1].numel():
                reference = (name, parameter)
        if not found:
            return [], None
        if reference is not None and reference[1].grad is not None:
            found.append((reference[0], reference[1].grad))
        return [name for name, _ in found], magnitudes([gradient for _, gradient in found])

    def learn(self, names: Sequence[str], largest: Sequence[float]) -> None:
        """Take note of what was measured."""
        # in a step in which every gradient is zero, none of them stands out
        some = any(value != 0 for value in largest)
        for name, value in zip(names, largest, strict=True):
            if value != 0:
                self._alive.add(name)
                self.looks.pop(name, None)
            elif some:
                self.looks[name] = self.looks.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"looks": dict(self.looks), "alive": sorted(self._alive)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.looks, self._alive = dict(state["looks"]), set(state["alive"])


def _fingerprint(parameter: Parameter) -> Tensor:
    # elements alone may belong to inputs that are always zero, such as the corner of a picture
    x = local_shard(parameter.detach()).reshape(-1)
    few = x[:: max(1, x.numel() // _SAMPLES)][:_SAMPLES]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    whole = [x.sum(dtype=wide), torch.linalg.vector_norm(x, dtype=wide)]
    return torch.cat(
        [torch.stack(whole), functional.pad(few.to(wide), (0, _SAMPLES - few.numel()))]
    )
