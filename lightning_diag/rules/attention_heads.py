"""What the heads of each attention module do, step by step."""

import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.rules.module_rows import number, sorted_rows

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ATTENTION_FILE", "HEAD_FILE", "Head", "Look", "looks_by_module"]

ATTENTION_FILE = "records/attention.jsonl"
HEAD_FILE = "records/attention_head.jsonl"

_COLUMNS = (
    *("component", "part", "head", "entropy_normalized", "max", "sink_share", "keys"),
    *("key_1", "mass_1", "all_keys"),
)


class Head(NamedTuple):
    """One head at one step; NaN where nothing was measured.

    Attributes:
        entropy: Over the logarithm of the keys: 0 looks at one key, 1 at all alike.
        sink: Mean weight of the first key.
        key: The key that gets most over all queries.
        mass: Mean weight of that key.
        keys: Mean number of allowed keys; of all there are, where each query is allowed one.
    """

    entropy: float
    sink: float
    key: float
    mass: float
    keys: float


class Look(NamedTuple):
    """The heads of one module at one step."""

    step: int
    heads: list[Head]

    def share(self, flags: "list[bool]") -> float:
        """The share of heads that have a flag."""
        return sum(flags) / len(flags) if flags else 0.0


_last: list[tuple[weakref.ref[Any], weakref.ref[Any], dict[tuple[str, str], list[Look]]]] = []


def looks_by_module(
    heads: "pl.DataFrame", modules: "pl.DataFrame"
) -> dict[tuple[str, str], list[Look]]:
    """Looks by rising step, by module and the component it belongs to.

    Where there are no rows by head, the mean over a module's heads stands for them all.
    """
    if _last and _last[0][0]() is heads and _last[0][1]() is modules:
        return _last[0][2]
    found = _looks(heads, modules)
    # one rule after the other asks the same
    forget = lambda _: _last.clear()  # noqa: E731
    _last[:] = [(weakref.ref(heads, forget), weakref.ref(modules, forget), found)]
    return found


def _looks(heads: "pl.DataFrame", modules: "pl.DataFrame") -> dict[tuple[str, str], list[Look]]:
    with_heads = "head" in heads.columns and heads.height > 0
    rows = sorted_rows(heads if with_heads else modules, _COLUMNS)
    found: dict[tuple[str, str], dict[int, list[Head]]] = {}
    for row in rows:
        name, head = row.get("component"), _head(row)
        if name is None or head is None:
            continue
        place = found.setdefault((str(name), str(row.get("part") or name)), {})
        place.setdefault(int(row["step"]), []).append(head)
    return {
        place: [Look(step, members) for step, members in steps.items()]
        for place, steps in found.items()
    }


def _head(row: dict[str, Any]) -> Head | None:
    entropy, keys = number(row, "entropy_normalized"), number(row, "keys")
    if math.isnan(entropy) and keys == 1 and number(row, "all_keys") > 1:
        # a mask that leaves a single key makes a choice that has no entropy
        entropy, keys = 0.0, number(row, "all_keys")
    if math.isnan(entropy):
        return None
    sink, key, mass = (number(row, name) for name in ("sink_share", "key_1", "mass_1"))
    return Head(entropy, sink, key, mass, keys)
