"""What several rules ask of the same frame, answered once."""

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import polars as pl

__all__ = ["once_a_frame"]

_T = TypeVar("_T")


def once_a_frame(function: "Callable[[pl.DataFrame], _T]") -> "Callable[[pl.DataFrame], _T]":
    """Keep the last result, since one rule after the other asks the same of the same frame."""
    last: list[tuple[weakref.ref[pl.DataFrame], _T]] = []

    @functools.wraps(function)
    def remembered(frame: "pl.DataFrame") -> _T:
        if not last or last[0][0]() is not frame:
            last[:] = [(weakref.ref(frame, lambda _: last.clear()), function(frame))]
        return last[0][1]

    return remembered
