"""Which rows of a run still count, after some of its attempts replaced parts of earlier ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Attempt", "attempts_of", "current_rows"]

_ROW = ("step", "epoch", "time", "attempt", "component")
_IDENTITY = (
    "component", "optimizer", "parameter", "module", "layer", "head", "diagnostic", "message",
)  # fmt: skip
_NONFINITE = "_nonfinite"


class Attempt(NamedTuple):
    """An attempt at a run, as far as it decides over rows.

    ``first_step`` is None where nothing is known but the number.
    """

    number: int
    first_step: int | None
    resumed_at: Mapping[str, int] | None
    began_at: Mapping[str, int] | None


def attempts_of(info: Mapping[str, Any]) -> list[Attempt]:
    """The attempts that run.json lists, oldest first.

    Args:
        info: The fields of run.json, which may be none.

    Returns:
        One entry for each attempt; one that has shown no training keeps ``first_step`` None.
    """
    return [
        Attempt(
            one["attempt"],
            one.get("first_step") if one.get("supersedes", True) else None,
            one.get("resumed_at"),
            one.get("began_at"),
        )
        for one in sorted(info.get("attempts", []), key=lambda one: int(one["attempt"]))
    ]


def current_rows(
    frame: "pl.DataFrame",
    offsets: "Callable[[], pl.Series]",
    prefix: str,
    attempts: Sequence[Attempt],
) -> "pl.DataFrame":
    """The rows that no later attempt has replaced, in the order of the file.

    An attempt replaces rows from its first step on, except those that stood in the file when the
    checkpoint was saved from which it resumed. In ``metrics`` a row at exactly its first step
    stays: validation is logged there. Attempts that it resumed past are left out whole. Besides,
    where two attempts report the same thing at the same step, the later one counts.

    Args:
        frame: Rows with the columns that every row has.
        offsets: Gives the byte at which each row begins; asked only where that decides.
        prefix: The record file they come from.
        attempts: What `attempts_of` gave.

    Returns:
        A part of `frame`.
    """
    known = {attempt.number for attempt in attempts}
    found = {number for number in frame["attempt"].unique().to_list() if number is not None}
    strangers = [Attempt(number, None, None, None) for number in sorted(found - known)]
    if len(known | found) < 2:
        return frame
    line = _line_of_descent(sorted([*attempts, *strangers], key=lambda one: one.number))
    keep = _not_replaced(frame, offsets, prefix, line)
    return _latest(frame.filter(keep), prefix)


def _line_of_descent(attempts: Sequence[Attempt]) -> list[Attempt]:
    # from the last attempt back: each to the one that saved the checkpoint it resumed from
    line = [attempts[-1]]
    for attempt in attempts[-2::-1]:
        child = line[-1]
        if child.resumed_at is None or attempt.began_at is None or _reaches(child, attempt):
            line.append(attempt)
    return line


def _reaches(child: Attempt, attempt: Attempt) -> bool:
    resumed_at, began_at = child.resumed_at or {}, attempt.began_at or {}
    return all(resumed_at.get(prefix, 0) >= start for prefix, start in began_at.items())


def _not_replaced(
    frame: "pl.DataFrame",
    offsets: "Callable[[], pl.Series]",
    prefix: str,
    line: Sequence[Attempt],
) -> "pl.Series":
    steps, numbers = frame["step"], frame["attempt"]
    keep = numbers.is_null() | numbers.is_in([attempt.number for attempt in line])
    for attempt in line:
        if attempt.first_step is None:
            continue
        earlier = numbers < attempt.number
        if attempt.resumed_at is not None:
            earlier &= offsets() >= attempt.resumed_at.get(prefix, 0)
        elif attempt.first_step == 0:
            keep &= ~earlier.fill_null(False)
            continue
        after = steps > attempt.first_step if prefix == "metrics" else steps >= attempt.first_step
        keep &= ~(earlier & after).fill_null(False)
    return keep


def _latest(frame: "pl.DataFrame", prefix: str) -> "pl.DataFrame":
    import polars as pl

    contested = pl.col("attempt").n_unique().over("step") > 1
    rows = frame.with_row_index("_row").filter(contested)
    if rows.is_empty():
        return frame
    if prefix == "metrics":
        names = [name for name in frame.columns if name not in _ROW]
        beaten = pl.any_horizontal(_beaten(name, frame.columns) for name in names)
    else:
        same = ["step", *(name for name in _IDENTITY if name in frame.columns)]
        beaten = pl.col("attempt") < pl.col("attempt").max().over(same)
    lost = rows.filter(beaten)["_row"]
    keep = pl.Series([True]).new_from_index(0, frame.height)
    return frame.filter(keep.scatter(lost, False))


def _beaten(name: str, columns: Sequence[str]) -> "pl.Expr":
    import polars as pl

    said = pl.col(name).is_not_null()
    if name + _NONFINITE in columns:
        said |= pl.col(name + _NONFINITE).is_not_null()
    attempt = pl.when(said).then(pl.col("attempt"))
    return (attempt < attempt.max().over("step")).fill_null(False)
