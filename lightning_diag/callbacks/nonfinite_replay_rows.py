"""What a replay has found, as a row and in words."""

from typing import Any

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.nonfinite_replay_numbers import Range, described, together
from lightning_diag.callbacks.nonfinite_replay_trace import Culprit, Origin, Place

__all__ = ["culprit_row", "empty_row", "finite_row"]

_COLUMNS = (
    *("reason", "module", "op", "call", "direction", "node", "line", "tensor"),
    *("input_min", "input_max", "input_zeros", "input_nan", "input_inf", "inputs"),
    *("output_nan", "output_inf", "outputs", "then_module", "then_op", "then_line"),
    *("seen_in", "batch_idx", "batch", "reproduced", "message"),
)


def empty_row(reason: str, what: str) -> Row:
    """A row that names no operation.

    Args:
        reason: Why, in a word.
        what: Why, in half a sentence.
    """
    message = f"Where NaN or infinity came from could not be found: {what}."
    return {**dict.fromkeys(_COLUMNS), "reason": reason, "message": message}


def finite_row(batch: Any, reproduced: bool | None) -> Row:
    """A row for a replay in which all was finite.

    Args:
        batch: The micro-batch.
        reproduced: Whether the loss was that of the step.
    """
    why = (
        "with the same loss"
        if reproduced
        else "since something it depends on has changed, or is drawn anew"
    )
    row = empty_row("finite", f"the step was made again and was finite, {why}")
    return {**row, "batch": described(batch), "reproduced": reproduced}


def culprit_row(culprit: Culprit, batch: Any, reproduced: bool | None) -> Row:
    """A row that says where the values come from.

    Args:
        culprit: What was found.
        batch: The micro-batch.
        reproduced: Whether the loss was that of the step.
    """
    origin = culprit.origin
    if origin is None or origin.place is None:
        row = empty_row("unseen", f"the {culprit.what} was not finite, but no operation was seen")
        return {**row, "seen_in": culprit.what, "batch": described(batch)}
    place, then = origin.place, origin.turned
    into, out = together(place.inputs), together(place.outputs)
    return {
        **dict.fromkeys(_COLUMNS),
        "reason": "op" if origin.kind == "mask" else origin.kind,
        "module": place.module,
        "op": place.op,
        "call": place.call,
        "direction": "backward" if place.backward else "forward",
        "node": place.node or None,
        "line": place.line,
        "tensor": origin.name,
        **{f"input_{key}": value for key, value in into.items()},
        "inputs": _listed(place.inputs),
        "output_nan": out["nan"],
        "output_inf": out["inf"],
        "outputs": _listed(place.outputs),
        "then_module": then and then.module,
        "then_op": then and then.op,
        "then_line": then and then.line,
        "seen_in": culprit.what,
        "batch": described(batch),
        "reproduced": reproduced,
        "message": _message(origin, place, culprit.what),
    }


def _message(origin: Origin, place: Place, what: str) -> str:
    where = f"in module `{place.module}`" if place.module else "in `training_step`"
    line = f" ({place.line})" if place.line else ""
    name = f"`{place.op}`" + (f" of `{place.call}`" if place.call else "")
    if origin.kind == "data":
        return f"The data hold NaN or infinity: `{origin.name}`, {_bad(place)}."
    if origin.kind in ("parameter", "buffer"):
        return (
            f"The {origin.kind} `{origin.name}` was not finite before the step; {name} {where} "
            f"took it in{line}."
        )
    if origin.kind == "uninitialised":
        return f"Memory that was never written was read: it comes from {name} {where}{line}."
    if origin.kind == "constant":
        return f"A constant that is not finite went into {name} {where}{line}."
    into, then = _listed(place.inputs), ""
    if origin.turned is not None:
        again = origin.turned
        inside = f" in module `{again.module}`" if again.module else ""
        then = f" `{again.op}`{inside} then made NaN of it."
    gave = "NaN" if any(one.nan for one in place.outputs) else "infinity"
    if place.backward:
        of = f"the backward pass of `{place.call}`" if place.call else f"`{place.node}`"
        node = f" ({place.node})" if place.call and place.node else ""
        return (
            f"The first {gave} was made in {of}{node} {where}{line}; forward its input was "
            f"{into or 'unknown'}. It was seen in the {what}.{then}"
        )
    return f"The first {gave} was made by {name} {where}{line}; its input was {into}.{then}"


def _bad(place: Place) -> str:
    bad = [one for one in place.inputs if one.nan or one.inf]
    return _listed(bad) or "as seen where it is used"


def _listed(ranges: list[Range]) -> str:
    return "; ".join(map(str, ranges[:4]))
