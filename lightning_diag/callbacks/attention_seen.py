"""What was seen of attention in one step: who called, and the sums of each module so far."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_diag.callbacks.attention_mode import apart_from_counters
from lightning_diag.callbacks.attention_names import AttentionNames, Place
from lightning_diag.callbacks.transforms import inside_transform
from lightning_diag.functional.attention_capture import (
    AttentionSums,
    QueryGroups,
    add_sums,
    attention_map,
    attention_sums,
    head_similarity,
)
from lightning_diag.functional.attention_graph import graph_sums
from lightning_diag.functional.attention_named import looks_like_weights
from lightning_diag.functional.attention_scores import (
    Scores,
    dot_product_scores,
    given_scores,
    weight_scores,
)

__all__ = ["Limits", "Seen", "SeenModule"]

_ROOT = "model"
_CANDIDATES = 8
_TRANSFORMED = "inside a transform of `torch.func`"


@dataclass(frozen=True)
class Limits:
    """How much is looked at: query rows and examples of a call, maps and rows of a map."""

    max_rows: int
    max_batch: int
    maps: int
    map_rows: int = 64
    map_keys: int = 256


@dataclass
class SeenModule:
    """The sums of one attention of one module.

    Attributes:
        place: Which module and how it is called.
        source: ``sdpa``, ``softmax``, ``graph`` or ``weights``.
        sums: Sums by head.
        queries: Number of queries, 0 for a graph.
        mass: Weight of every key in each head; None for a graph.
        similarity: Cosines between heads; None for one head.
        groups: Sums by group of queries, where asked for.
        maps: Sampled maps ``(heads, rows, keys)``, where asked for.
        plausible: For weights that were handed out, what `looks_like_weights` says of them.
    """

    place: Place
    source: str
    sums: AttentionSums
    queries: int
    mass: Tensor | None
    similarity: Tensor | None
    groups: QueryGroups | None = None
    maps: Tensor | None = None
    plausible: Tensor | None = None

    def merge(self, other: "SeenModule") -> None:
        """Add another call of the same module; similarity and maps stay those of the first."""
        self.sums = add_sums(self.sums, other.sums)
        self.queries = max(self.queries, other.queries)
        if self.mass is not None and other.mass is not None:
            self.mass = _padded_sum(self.mass, other.mass)
        if self.groups is not None and other.groups is not None:
            pairs = zip(self.groups, other.groups, strict=True)
            self.groups = QueryGroups(*(_padded_sum(a, b) for a, b in pairs))
        if self.plausible is not None and other.plausible is not None:
            self.plausible = self.plausible + other.plausible


@dataclass
class _Frame:
    name: str
    calls: int = 0
    seen: int = 0


@dataclass
class Seen:
    """Collects during one step.

    Args:
        names: Which modules to look at, and how they are called.
        limits: How much to look at.
    """

    names: AttentionNames
    limits: Limits
    modules: dict[tuple[str, int, int], SeenModule] = field(default_factory=dict)
    not_looked_at: dict[str, set[str]] = field(default_factory=dict)
    _frames: list[_Frame] = field(default_factory=lambda: [_Frame("")])

    # ---- whose call it is ----

    def entered(self, name: str) -> None:
        """A module's forward begins."""
        self._frames.append(_Frame(name))

    def left(self, name: str, output: Any) -> None:
        """A module's forward ends; what it hands out is looked at where nothing else was seen."""
        if not any(frame.name == name for frame in self._frames[1:]):
            return
        while True:
            frame = self._frames.pop()
            self._frames[-1].seen += frame.seen
            if frame.name == name:
                break
        if output is None or frame.seen:
            return
        handed_out = list(islice(self.names.handed_out(name, output), _CANDIDATES))
        if inside_transform():
            if handed_out:
                self.passed(name, _TRANSFORMED)
            return
        for number, weights in enumerate(handed_out):
            if _is_plain(weights):
                self._weights(name, number, weights)

    @property
    def caller(self) -> str:
        """The module whose forward runs."""
        return self._frames[-1].name

    def passed(self, name: str, why: str) -> None:
        """Attention that cannot be looked at."""
        self.not_looked_at.setdefault(why, set()).add(name or _ROOT)

    # ---- what is called ----

    def dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        """A call of `F.scaled_dot_product_attention`, with its arguments."""
        place, number = self._call()
        if place is None:
            return
        tensors = [query, key, *([] if attn_mask is None else [attn_mask])]
        if not self._may_compute(place, *tensors):
            return
        with _exact(query.device):
            scores = dot_product_scores(
                query,
                key,
                attn_mask,
                is_causal=is_causal,
                scale=scale,
                max_batch=self.limits.max_batch,
            )
            self._add(place, number, "sdpa", scores)

    def softmax(self, scores: Tensor, heads: int) -> None:
        """What enters the softmax of `nn.MultiheadAttention`, shape ``(batch * heads, T, S)``."""
        place, number = self._call()
        if place is None:
            return
        if not self._may_compute(place, scores):
            return
        with _exact(scores.device):
            by_head = scores.detach().reshape(-1, heads, *scores.shape[1:])
            given = given_scores(by_head, max_batch=self.limits.max_batch)
            self._add(place, number, "softmax", given)

    def graph_softmax(
        self,
        src: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        num_nodes: int | None = None,
        dim: int = 0,
    ) -> None:
        """A call of PyTorch Geometric's `softmax`, with its arguments."""
        place, number = self._call()
        if place is None:
            return
        if not self._may_compute(place, src, known=ptr is None or ptr.dim() == 1):
            return
        with _exact(src.device):
            logits = src.detach().movedim(dim, 0)
            if index is None and ptr is not None:
                counts, num_nodes = ptr.diff(), len(ptr) - 1
                nodes = torch.arange(num_nodes, device=ptr.device)
                index = nodes.repeat_interleave(counts, output_size=len(logits))
            if index is None or not len(logits):
                return
            sums, cosines = graph_sums(logits, index, num_nodes)
            similarity = cosines if len(cosines) > 1 else None
            self._merge(number, SeenModule(place, "graph", sums, 0, None, similarity))

    def _weights(self, name: str, number: int, weights: Tensor) -> None:
        if weights.dim() < 1 or not weights.is_floating_point() or not weights.numel():
            return
        place = self.names.place(name)
        if place is None:
            return
        with _exact(weights.device):
            scores = weight_scores(weights, max_batch=self.limits.max_batch)
            plausible = looks_like_weights(weights, self.limits.max_batch, self.limits.max_rows)
            self._add(place, number, "weights", scores, plausible)

    # ---- sums ----

    def _may_compute(self, place: Place, *tensors: Tensor, known: bool = True) -> bool:
        """Whether a call can be looked at; where not, it is said why."""
        if inside_transform():
            self.passed(place.module, _TRANSFORMED)
        elif not known or not all(_is_plain(tensor) for tensor in tensors):
            self.passed(place.module, "tensors of a special kind")
        else:
            return True
        return False

    def _call(self) -> tuple[Place | None, int]:
        frame = self._frames[-1]
        number, frame.calls, frame.seen = frame.calls, frame.calls + 1, frame.seen + 1
        return self.names.place(frame.name), number

    def _add(
        self,
        place: Place,
        number: int,
        source: str,
        scores: Scores,
        plausible: Tensor | None = None,
    ) -> None:
        _, heads, queries, keys = scores.shape
        if not heads * queries * keys:
            return
        limits = self.limits
        groups = place.groups(queries)
        sums, mass, grouped = attention_sums(scores, max_rows=limits.max_rows, groups=groups)
        similarity, maps = None, None
        if heads > 1:
            similarity = head_similarity(*attention_map(scores))
        if limits.maps:
            weights, _ = attention_map(scores, limits.map_rows)
            maps = _fewer_keys(weights[: limits.maps], limits.map_keys)
        seen = SeenModule(place, source, sums, queries, mass, similarity, grouped, maps, plausible)
        self._merge(number, seen)

    def _merge(self, number: int, seen: SeenModule) -> None:
        key = (seen.place.module, number, len(seen.sums.rows))
        if key in self.modules:
            self.modules[key].merge(seen)
        else:
            self.modules[key] = seen


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and nobody else's counters."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), apart_from_counters():
        yield


def _is_plain(tensor: object) -> bool:
    """Whether a tensor is one whose elements can be computed with here."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
        return False
    plain = type(tensor) in (Tensor, nn.Parameter)
    usable = plain and tensor.layout == torch.strided and tensor.device.type != "meta"
    return usable and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _padded_sum(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two tensors, of which the smaller one has nothing of what it lacks."""
    first = first if first.device == second.device else first.to(second.device)
    sizes = [max(pair) for pair in zip(first.shape, second.shape, strict=True)]
    return _padded(first, sizes) + _padded(second, sizes)


def _padded(x: Tensor, sizes: list[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, x.shape, strict=True)]
    if not any(missing):
        return x
    return nn.functional.pad(x, [n for one in reversed(missing) for n in (0, one)])


def _fewer_keys(weights: Tensor, most: int) -> Tensor:
    """Neighbouring keys taken together, so that at most so many are left."""
    keys = weights.shape[-1]
    if keys <= most:
        return weights
    place = torch.arange(keys, device=weights.device) * most // keys
    return weights.new_zeros(*weights.shape[:-1], most).index_add(-1, place, weights)
