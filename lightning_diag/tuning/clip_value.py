"""A clip value for the gradients, read off the norms that a run has recorded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from statistics import median

from lightning_diag.records import Run, read_run
from lightning_diag.tuning.clip_value_norms import (
    History,
    histories,
    runaway,
    training_losses,
    trusted,
)

__all__ = ["ClipSuggestion", "suggest_clip_value", "suggest_clip_values"]

_ALGORITHMS = ("norm", "value")
_WORDS = {
    "skipped": "of steps that the gradient scaler skipped",
    "nonfinite": "that are not finite",
    "no_gradient": "of steps without a gradient",
    "warm_up": "of the start",
    "exploding": "of an explosion",
}


@dataclass(frozen=True)
class ClipSuggestion:
    """What to clip at, and what that rests on.

    Attributes:
        value: The clip value, rounded upward to two digits; None where none can be told.
        percentile: The percentile asked for, 0 to 100.
        norms: Number of recorded norms that count.
        would_clip: Share of these that the value would shorten, 0 to 1.
        current: The clip value of the run; None where it did not clip.
        current_clips: Share of the norms that count which that one shortened.
        excluded: Norms that do not count: ``skipped`` by the gradient scaler, ``nonfinite``,
            ``no_gradient``, ``warm_up``, ``exploding``, each with its number.
        algorithm: ``"norm"``, or ``"value"`` where single elements are clipped: then "norm" stands
            for the largest magnitude of an element throughout.
        optimizer: Place among several optimizers, or None.
        diverged_at: Step at which the norms ran away for good, or None.
        reason: All this in words.
    """

    value: float | None
    percentile: float
    norms: int
    would_clip: float | None
    current: float | None
    current_clips: float | None
    excluded: dict[str, int]
    algorithm: str
    optimizer: int | None
    diverged_at: int | None
    reason: str

    @property
    def overrides(self) -> dict[str, object]:
        """The Hydra overrides that try it; several optimizers are clipped by hand and have none."""
        if self.value is None or self.optimizer is not None:
            return {}
        found: dict[str, object] = {"trainer.gradient_clip_val": self.value}
        if self.algorithm == "value":
            found["trainer.gradient_clip_algorithm"] = "value"
        return found


def suggest_clip_value(
    run: Run | str | Path,
    percentile: float = 95.0,
    *,
    optimizer: int | None = None,
    algorithm: str | None = None,
    warmup_share: float = 0.1,
    min_norms: int = 20,
) -> ClipSuggestion:
    """A clip value at a percentile of the gradient norms that `GradientHealth` recorded.

    At the 95th percentile clipping is a guard: it leaves usual steps alone and shortens the odd one
    in twenty. At the 10th, as in AutoClip, nine steps in ten are cut to about one length, which
    with plain SGD amounts to another learning rate. Between the two training is known to be
    forgiving: Pascanu et al. found values from half to ten times the average norm to do.

    The norms are those before clipping. Those of the first steps, of skipped ones and of an
    explosion do not count. Where a run exploded and stayed so, the value is that of the stretch
    before, never looser than the run's own clip, and the reason names the learning rate, since
    no clip value mends that.

    Args:
        run: The run, or its folder.
        percentile: Percentile of the norms, above 0 and below 100.
        optimizer: Which of several optimizers; needed where there are several.
        algorithm: ``"norm"`` or ``"value"``; None for the one that the run clips with.
        warmup_share: Share of the steps, from the start, that does not count.
        min_norms: Fewest norms to judge by; the percentile may need more, such as 100 for the 99th.

    Returns:
        The suggestion; its `value` is None where there are too few norms, or where they were
        clipped before they were recorded.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an argument is out of range, or the run has no such optimizer.

    References:
        Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural networks,
        https://arxiv.org/abs/1211.5063, section 3.2. Seetharaman, Wichern, Pardo, Le Roux 2020,
        AutoClip, https://arxiv.org/abs/2007.14469.
    """
    found = suggest_clip_values(
        run, percentile, algorithm=algorithm, warmup_share=warmup_share, min_norms=min_norms
    )
    there = [one.optimizer for one in found]
    if len(found) == 1 and optimizer in (None, there[0]):
        return found[0]
    if optimizer is None or optimizer not in there:
        listed = ", ".join(str(one) for one in there)
        if there == [None]:
            raise ValueError(f"`optimizer` must be None in a run with one, got {optimizer}.")
        raise ValueError(f"`optimizer` must be one of {listed}, got {optimizer}.")
    return found[there.index(optimizer)]


def suggest_clip_values(
    run: Run | str | Path,
    percentile: float = 95.0,
    *,
    algorithm: str | None = None,
    warmup_share: float = 0.1,
    min_norms: int = 20,
) -> list[ClipSuggestion]:
    """The same for every optimizer of a run, one suggestion each; see `suggest_clip_value`."""
    if not 0 < percentile < 100:
        raise ValueError(f"`percentile` must be above 0 and below 100, got {percentile:g}.")
    if algorithm not in (None, *_ALGORITHMS):
        raise ValueError(f"`algorithm` must be one of {', '.join(_ALGORITHMS)}, got {algorithm!r}.")
    if not 0 <= warmup_share < 1:
        raise ValueError(f"`warmup_share` must be at least 0 and below 1, got {warmup_share:g}.")
    if min_norms < 1:
        raise ValueError(f"`min_norms` must be at least 1, got {min_norms}.")
    opened = run if isinstance(run, Run) else read_run(run)
    losses = list(training_losses(opened))
    # a percentile lies within the norms only where there is one beyond it on either side
    needed = max(min_norms, math.ceil(100 / min(percentile, 100 - percentile) - 1e-9))
    found = histories(opened, algorithm) or [
        History(None, algorithm or "norm", [], [], {}, None, None)
    ]
    return [_suggestion(one, losses, percentile, warmup_share, needed) for one in found]


def _suggestion(
    history: History,
    losses: Sequence[tuple[int, float]],
    percentile: float,
    warmup_share: float,
    needed: int,
) -> ClipSuggestion:
    onset = runaway(history, losses)
    stretch = len(history.sizes) if onset is None else onset
    sizes, excluded = _counted(history, trusted(history, losses), stretch, warmup_share)
    diverged_at = None
    if onset is not None:
        diverged_at = (*history.steps, history.ended_at)[onset]
    value = None
    if len(sizes) >= needed and not _clipped_by_hand(history, sizes):
        value = _round_up(_percentile(sizes, percentile))
        if diverged_at is not None and history.current is not None:
            value = min(value, history.current)
    reason = _reason(history, sizes, excluded, percentile, value, needed, diverged_at)
    return ClipSuggestion(
        value=value,
        percentile=percentile,
        norms=len(sizes),
        would_clip=_share_above(sizes, value),
        current=history.current,
        current_clips=_share_above(sizes, history.current),
        excluded=excluded,
        algorithm=history.algorithm,
        optimizer=history.optimizer,
        diverged_at=diverged_at,
        reason=reason,
    )


def _counted(
    history: History, calm: Sequence[bool], stretch: int, warmup_share: float
) -> tuple[list[float], dict[str, int]]:
    """The sizes that count, and how many do not for which reason."""
    steps, sizes = history.steps[:stretch], history.sizes[:stretch]
    begin = warmup_share * (steps[-1] + 1) if steps else 0.0
    late = [step >= begin for step in steps]
    pairs = list(zip(late, calm[:stretch], strict=True))
    counted = [size for size, (a, b) in zip(sizes, pairs, strict=True) if a and b]
    exploding = len(history.sizes) - stretch + sum(a and not b for a, b in pairs)
    more = {"warm_up": len(late) - sum(late), "exploding": exploding}
    return counted, history.excluded | {why: count for why, count in more.items() if count}


def _clipped_by_hand(history: History, sizes: Sequence[float]) -> bool:
    """Whether norms crowd at their top, as they do where they were clipped before we saw them."""
    if history.current is not None:
        return False
    top = max(sizes)
    crowd = sum(size >= 0.999 * top for size in sizes)
    return crowd >= max(3, 0.05 * len(sizes))


def _percentile(sizes: Sequence[float], percentile: float) -> float:
    """With linear interpolation between neighbours, as NumPy's."""
    ordered = sorted(sizes)
    place = percentile / 100 * (len(ordered) - 1)
    low = min(math.floor(place), len(ordered) - 2)
    return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])


def _round_up(value: float) -> float:
    """To two digits, away from zero."""
    exact = Decimal(f"{value:.12g}")
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), ROUND_CEILING))


def _share_above(sizes: Sequence[float], limit: float | None) -> float | None:
    if limit is None or not sizes:
        return None
    return sum(size > limit for size in sizes) / len(sizes)


def _reason(
    history: History,
    sizes: Sequence[float],
    excluded: dict[str, int],
    percentile: float,
    value: float | None,
    needed: int,
    diverged_at: int | None,
) -> str:
    said = []
    if diverged_at is not None:
        said.append(_diverged(history, sizes, diverged_at))
    if value is None:
        said.append(_nothing(history, sizes, needed))
    else:
        name = "norms" if history.algorithm == "norm" else "largest elements"
        said.append(
            f"{percentile:g}% of {len(sizes)} {name} before clipping lie below "
            f"{_percentile(sizes, percentile):.3g}; half of them below {median(sizes):.3g}."
        )
        said.append(f"A clip at {value:g} cuts {_share_above(sizes, value):.1%} of these steps.")
        said += _against_the_current(history, sizes, value)
        said += _drift(sizes) if diverged_at is None else []
    if excluded:
        listed = ", ".join(f"{count} {_WORDS[why]}" for why, count in excluded.items())
        said.append(f"Left out: {listed}.")
    return " ".join(said)


def _diverged(history: History, sizes: Sequence[float], diverged_at: int) -> str:
    usual = f", where {median(sizes):.3g} was usual" if sizes else ""
    after = [
        size for step, size in zip(history.steps, history.sizes, strict=True) if step >= diverged_at
    ]
    peak = f"rose to {max(after):.3g}" if after else "were no longer finite"
    return (
        f"From step {diverged_at} to the end the norms {peak}{usual}: the run diverged, and only "
        "what lies before counts. Lower the learning rate or warm it up first; a clip alone seldom "
        "saves such a run, and a looser one makes it worse."
    )


def _nothing(history: History, sizes: Sequence[float], needed: int) -> str:
    if len(sizes) >= needed:
        return (
            f"The largest of {len(sizes)} norms are the same to 0.1% ({max(sizes):.3g}), which "
            "looks like a clip by hand before they were recorded. Clip in the module's "
            "`on_before_optimizer_step`: GradientHealth sees them before that."
        )
    recorded = len(history.sizes) + sum(history.excluded.values())
    if not recorded:
        return "No gradient norms are recorded: train with GradientHealth."
    last = history.steps[-1] + 1 if history.steps else 0
    often = max(1, int(0.8 * last / needed))
    more = f", {often} would do for a run as long as this one" if last >= needed else ""
    return (
        f"{len(sizes)} norms count and {needed} are needed. Train longer, or measure more often: a "
        f"smaller `every_n_steps` of GradientHealth{more}."
    )


def _against_the_current(history: History, sizes: Sequence[float], value: float) -> list[str]:
    share = _share_above(sizes, history.current)
    if history.current is None or share is None:
        return []
    said = [f"The run's own clip, {history.current:g}, cut {share:.1%} of them."]
    if value > history.current and share > 0.5:
        said.append(
            "That run lived on clipped steps: if you loosen the clip, plain SGD needs a learning "
            "rate that is lower by the same factor."
        )
    return said


def _drift(sizes: Sequence[float]) -> list[str]:
    quarter = max(1, len(sizes) // 4)
    start, end = median(sizes[:quarter]), median(sizes[-quarter:])
    if max(start, end) <= 3 * min(start, end):
        return []
    went = "fell" if end < start else "rose"
    return [f"The norms {went} from {start:.3g} to {end:.3g}, and one value fits only one end."]
