"""From the sums of one step, in one tensor, to rows."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diag.callbacks.attention_names import Place
from lightning_diag.callbacks.attention_seen import SeenModule
from lightning_diag.callbacks.base import Row
from lightning_diag.functional.attention_capture import (
    AttentionSums,
    attention_verdict,
    nearest_head,
    top_keys,
)

__all__ = ["AttentionRows", "Pages"]

_VERDICTS = ("peaked", "uniform", "sink", "duplicate")
_MEANS = ("entropy", "entropy_normalized", "max", "peaked_share", "sink_share", "mean")
# what may be missing from one to a row of weights that a module hands out, on average
_TOLERANCE = 0.05
# below this a key among the largest is one that got nothing
_NOTHING = 1e-9


class Pages:
    """Tensors that travel to the host together, as one.

    Each is given a number, under which `page` finds its values again.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._ends = [0]

    def add(self, tensor: Tensor) -> int:
        """Take a tensor along."""
        self._tensors.append(tensor.detach().reshape(-1))
        self._ends.append(self._ends[-1] + tensor.numel())
        return len(self._tensors) - 1

    def together(self) -> Tensor:
        """All of them in one dimension, on the device of the first."""
        if not self._tensors:
            return torch.zeros(0, dtype=torch.float64)
        home = self._tensors[0].device
        wide = torch.float32 if home.type == "mps" else torch.float64
        here = (x if x.device == home else x.to(home) for x in self._tensors)
        return torch.cat([x.to(wide) for x in here])

    def page(self, number: int, values: Any) -> Any:
        """The part of the values, a sequence, that belongs to one tensor."""
        return values[self._ends[number] : self._ends[number + 1]]


class _Module:
    """One module's numbers, and where they lie on the pages."""

    def __init__(self, seen: SeenModule, number: int, top: int, pages: Pages) -> None:
        self.place, self.source, self.number = seen.place, seen.source, number
        self.label = seen.place.label
        self.heads, self.queries = len(seen.sums.rows), seen.queries
        self.keys = 0 if seen.mass is None else seen.mass.shape[-1]
        self.sums = pages.add(torch.stack(list(seen.sums)))
        self.plausible = None if seen.plausible is None else pages.add(seen.plausible)
        self.nearest = self.top = self.groups = None
        self.maps = None if seen.maps is None else pages.add(seen.maps)
        self.map_shape = () if seen.maps is None else tuple(seen.maps.shape)
        if seen.similarity is not None:
            cosines, index = nearest_head(seen.similarity)
            self.nearest = (pages.add(cosines), pages.add(index))
        if seen.mass is not None:
            weights, index, _ = top_keys(seen.mass, seen.sums.rows, top)
            self.top = (pages.add(weights), pages.add(index))
        if seen.groups is not None:
            groups = seen.groups
            self.groups = pages.add(torch.stack(list(groups[:-1])))
            weights, index, std = top_keys(groups.mass, groups.rows, top)
            self.group_top = (pages.add(weights), pages.add(index), pages.add(std))
            self.group_count = len(groups.rows)


class AttentionRows:
    """The rows of one step.

    Args:
        modules: What was seen, by module, number of the call and heads.
        top: How many keys to name.

    Attributes:
        pages: All numbers, to be read at once.
    """

    def __init__(self, modules: Sequence[tuple[int, SeenModule]], top: int) -> None:
        self.pages = Pages()
        self._modules = [_Module(seen, number, top, self.pages) for number, seen in modules]

    def finish(self, values: Any) -> None:
        """Take the numbers, a NumPy array, and leave out what turns out to be no attention."""
        self._values = values
        self._modules = [module for module in self._modules if self._is_attention(module)]
        handed_out: Counter[str] = Counter()
        taken: Counter[str] = Counter()
        for module in self._modules:
            number, label = module.number, module.label
            if module.source == "weights":
                number = handed_out[label]
                handed_out[label] += 1
            label = label if number == 0 else f"{label}#{number + 1}"
            taken[label] += 1
            module.label = label if taken[label] == 1 else f"{label}@{taken[label]}"

    @property
    def seen(self) -> list[str]:
        """The modules with attention."""
        return [module.place.module for module in self._modules]

    @property
    def misnamed(self) -> list[str]:
        """Sentences about lists of names that do not fit."""
        sentences = []
        for module in self._modules:
            keys, queries = len(module.place.keys), len(module.place.queries)
            if keys and module.keys and keys != module.keys:
                sentences.append(
                    f"`key_names` of `{module.label}` must name its {module.keys} keys, "
                    f"got {keys} names; keys are numbered instead."
                )
            if module.groups is not None and queries > module.group_count:
                sentences.append(
                    f"`query_names` of `{module.label}` must be no more than its "
                    f"{module.queries} queries, got {queries} names; queries are numbered instead."
                )
        return sentences

    def maps(self) -> dict[str, Any]:
        """Sampled maps by component, arrays ``(heads, rows, keys)`` in single precision."""
        return {
            module.label: self._page(module.maps).reshape(module.map_shape).astype("float32")
            for module in self._modules
            if module.maps is not None
        }

    def rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """The rows of modules and the whole model, of heads, and of groups of queries."""
        modules, heads, queries = [], [], []
        for module in self._modules:
            own = self._head_rows(module)
            heads += own
            modules.append(self._module_row(module, own))
            queries += self._query_rows(module)
        return [*modules, _whole_row(modules, heads)], heads, queries

    def _page(self, number: int | None) -> Any:
        return self.pages.page(number or 0, self._values)

    def _is_attention(self, module: _Module) -> bool:
        if module.plausible is None:
            return True
        total, rows, wrong = self._page(module.plausible).tolist()
        return bool(rows and not wrong and abs(total / rows - 1) < _TOLERANCE)

    def _head_rows(self, module: _Module) -> list[Row]:
        table = self._page(module.sums).reshape(-1, module.heads).T.tolist()
        nearest = [self._page(number).tolist() for number in module.nearest or ()]
        rows: list[Row] = []
        for head, fields in enumerate(table):
            sums = dict(zip(AttentionSums._fields, fields, strict=True))
            row = _about(module.place, module.label) | {"head": head} | _means(sums)
            similarity, other = (
                (nearest[0][head], int(nearest[1][head])) if nearest else (None, None)
            )
            verdict = _verdict(sums, similarity)
            row |= {"verdict": verdict, "similarity": similarity, "nearest_head": other}
            row["all_keys"] = module.keys or None
            if module.top is not None and sums["rows"]:
                row |= self._top_keys(module, module.top, head, module.heads)
            rows.append(row)
        return rows

    def _module_row(self, module: _Module, heads: Sequence[Row]) -> Row:
        table = self._page(module.sums).reshape(-1, module.heads).sum(1).tolist()
        sums = dict(zip(AttentionSums._fields, table, strict=True))
        verdicts = Counter(row["verdict"] for row in heads)
        return {
            **_about(module.place, module.label),
            "source": module.source,
            "heads": module.heads,
            "queries": module.queries or None,
            "all_keys": module.keys or None,
            **_means(sums),
            **{f"heads_{verdict}": verdicts[verdict] for verdict in _VERDICTS},
        }

    def _query_rows(self, module: _Module) -> list[Row]:
        if module.groups is None:
            return []
        table = self._page(module.groups).reshape(-1, module.group_count).T.tolist()
        *top, std = module.group_top
        spread = self._page(std).tolist()
        rows: list[Row] = []
        for group, (count, choices, entropy, normalized, largest) in enumerate(table):
            names = module.place.queries
            name = names[group] if len(names) == module.group_count else None
            row: Row = _about(module.place, module.label)
            row |= {"query": group, "name": name, "rows": int(count)}
            row |= {
                "entropy": _ratio(entropy, count),
                "entropy_normalized": _ratio(normalized, choices),
                "max": _ratio(largest, count),
                "mean": 1 / module.keys if count else None,
                "std": spread[group] if count else None,
            }
            if count:
                row |= self._top_keys(module, tuple(top), group, module.group_count)
            rows.append(row)
        return rows

    def _top_keys(self, module: _Module, top: tuple[int, ...], place: int, of: int) -> Row:
        weights, index = (self._page(number).reshape(of, -1)[place].tolist() for number in top)
        names = module.place.keys if len(module.place.keys) == module.keys else ()
        row: Row = {}
        for rank, (weight, key) in enumerate(zip(weights, index, strict=True), start=1):
            if weight < _NOTHING:
                break
            row |= {f"key_{rank}": int(key), f"mass_{rank}": weight}
            if names:
                row[f"name_{rank}"] = names[int(key)]
        return row


def _about(place: Place, label: str) -> Row:
    row: Row = {"component": label}
    return row if place.part is None else row | {"part": place.part}


def _means(sums: dict[str, float]) -> Row:
    rows = sums["rows"]
    return {
        "entropy": _ratio(sums["entropy"], rows),
        "entropy_normalized": _ratio(sums["normalized"], sums["choices"]),
        "max": _ratio(sums["largest"], rows),
        "peaked_share": _ratio(sums["peaked"], rows),
        "sink_share": _ratio(sums["sink"], rows),
        "mean": _ratio(sums["mean"], rows),
        "keys": _ratio(sums["keys"], rows),
        "rows": int(rows),
        "single": int(rows - sums["choices"]),
        "masked": int(sums["masked"]),
        "nonfinite": int(sums["nonfinite"]),
    }


def _verdict(sums: dict[str, float], similarity: float | None) -> str | None:
    choices = sums["choices"]
    if not choices:
        return None
    # where there is a single key, its weight is one
    single = sums["rows"] - choices
    return attention_verdict(
        largest=(sums["largest"] - single) / choices,
        normalized=sums["normalized"] / choices,
        sink=sums["sink_choices"] / choices,
        keys=(sums["keys"] - single) / choices,
        similarity=math.nan if similarity is None else similarity,
    )


def _whole_row(modules: Sequence[Row], heads: Sequence[Row]) -> Row:
    """Every head counts alike, whatever module it belongs to."""
    row: Row = {"component": None, "captured": len(modules), "heads": len(heads)}
    for key in _MEANS:
        known = [value for head in heads if isinstance(value := head[key], float)]
        row[key] = sum(known) / len(known) if known else None
    for key in ("rows", "masked", "nonfinite", *(f"heads_{verdict}" for verdict in _VERDICTS)):
        row[key] = sum(value for module in modules if isinstance(value := module[key], int))
    return row


def _ratio(total: float, count: float) -> float | None:
    # sums that do not exist, such as the sink of a graph, are no numbers
    return total / count if count and not math.isnan(total) else None
