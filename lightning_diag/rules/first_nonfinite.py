"""Where the first NaN or infinity came from, as the replay of that step has found it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

__all__ = ["NONFINITE_FILE", "advice", "first_nonfinite", "sentence"]

NONFINITE_FILE = "records/nonfinite.jsonl"

_FOUND = ("op", "data", "parameter", "buffer", "constant", "uninitialised")
# by what the name of the operation holds, the more special first
_OPERATIONS = {
    "softmax": "Let no row of the softmax be masked as a whole: give it one valid place, or set "
    "such rows to zero after it.",
    "logsumexp": "Let no row be masked as a whole.",
    "log": "Keep the argument of the logarithm above zero: clamp it (`x.clamp(min=1e-8)`), use "
    "`log1p`, or take the logarithm and the softmax in one (`log_softmax`, a loss `with_logits`).",
    "exp": "Bound what is exponentiated: subtract its largest value, clamp it, or use `logsumexp`, "
    "`softmax` or `softplus`.",
    "sqrt": "Add a small number under the square root (`(x + 1e-8).sqrt()`): at zero its slope is "
    "infinite.",
    "norm": "Add a small number before the norm is taken or divided by: at zero its slope is not "
    "defined.",
    "div": "Keep the divisor away from zero: add a small number to it, or clamp it.",
    "reciprocal": "Keep the divisor away from zero: add a small number to it, or clamp it.",
    "pow": "Keep the base of the power away from zero, where a root or a negative power has no "
    "finite slope.",
    "acos": "Clamp the cosine a little inside -1 to 1: at the ends its slope is infinite.",
    "atan2": "Keep both arguments of `atan2` from being zero at once.",
    "mean": "Do not average over nothing: an empty batch or mask gives 0/0.",
    "var": "Do not take the variance of a single value.",
    "std": "Do not take the deviation of a single value, nor of equal values, where its slope is "
    "infinite: add a small number to the variance first.",
}
_REASONS = {
    "data": "Look at the data first: drop or fill values that are not finite, where they are read.",
    "parameter": "An earlier step, or a checkpoint, has broken this weight: go back to a "
    "checkpoint before it, and look at how it is initialised.",
    "buffer": "This buffer keeps what an earlier batch has left in it: go back to a checkpoint "
    "before it, and keep such batches from it.",
    "constant": "Look at where this constant is made.",
    "uninitialised": "Fill this tensor when it is made (`torch.zeros`), or write all of it.",
}


def first_nonfinite(
    nonfinite: "pl.DataFrame", last_step: int | None = None, first_step: int | None = None
) -> dict[str, Any]:
    """The first row that says where it came from; empty where there is none.

    Args:
        nonfinite: Rows of ``nonfinite.jsonl``.
        last_step: Last step that is meant; None for any.
        first_step: Where that is known, the first step that was not finite: the last row up to it
            is meant, since there is one more after each rollback.
    """
    if "reason" not in nonfinite.columns or "step" not in nonfinite.columns:
        return {}
    rows = nonfinite.sort("step", maintain_order=True).to_dicts()
    known = [row for row in rows if row.get("reason") in _FOUND]
    before = [row for row in known if first_step is not None and row["step"] <= first_step]
    if before:
        return before[-1]
    return next((row for row in known if last_step is None or row["step"] <= last_step), {})


def sentence(row: dict[str, Any]) -> str:
    """What was found, with a leading space; nothing where nothing was.

    Args:
        row: What `first_nonfinite` gave.
    """
    message = row.get("message")
    if not message:
        return ""
    used = {
        "later": ", with the weights after it",
        "snapshot": ", with the weights of the last snapshot",
    }
    return f" Step {row['step']} was made again{used.get(str(row.get('weights')), '')}: {message}"


def advice(row: dict[str, Any]) -> str:
    """What to try first, with a space behind it; nothing where nothing was found.

    Args:
        row: What `first_nonfinite` gave.
    """
    reason = row.get("reason")
    if reason in _REASONS:
        return f"{_REASONS[reason]} "
    if reason != "op":
        return ""
    where = row.get("line") or row.get("module")
    at = f"Begin at {where}. " if where else ""
    names = " ".join(str(row.get(key) or "") for key in ("op", "call", "node")).lower()
    overflow = row.get("output_inf") and not row.get("output_nan")
    if overflow and str(row.get("outputs") or "").startswith("float16"):
        return f"{at}The number does not fit into 16 bits: use bf16-mixed, or compute it in 32. "
    found = next((text for part, text in _OPERATIONS.items() if part in names), "")
    return f"{at}{found} " if found else at
