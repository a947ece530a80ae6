"""Parts whose own learning rate is out of proportion, told by the steps that it makes."""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from lightning_diag.rules.update_traces import Updates

__all__ = ["PartRate", "parts_too_fast"]

_ROWS = 3


class PartRate(NamedTuple):
    """A part that makes large steps because of its learning rate.

    Attributes:
        component: Its name.
        step: Since when.
        rate: Its learning rate.
        usual: The rate that it had before, or that the other parts have.
        ratio: The largest of its first updates at that rate, over the size of its weights.
        raised: Whether its own rate was raised, rather than set beside that of others.
    """

    component: str
    step: int
    rate: float
    usual: float
    ratio: float
    raised: bool


def parts_too_fast(
    traces: Sequence[Updates], *, times_before: float, times_others: float, ratio: float
) -> list[PartRate]:
    """Parts whose rate leapt, or is far above all others', and whose steps are large at once.

    Args:
        traces: All parts whose ratio of update to weight says something.
        times_before: How many times above its own highest rate before.
        times_others: How many times above the median rate of the other parts.
        ratio: From which ratio of update to weight on.
    """
    found = []
    for one in traces:
        others = [x for x in traces if x is not one]
        fast = _raised(one, times_before, ratio) or _beside(one, others, times_others, ratio)
        if fast is not None:
            found.append(fast)
    return found


def _raised(one: Updates, times: float, ratio: float) -> PartRate | None:
    top = math.nan
    for index, rate in enumerate(one.rates):
        if index >= _ROWS and rate > times * top > 0:
            before = _highest(one.ratios[:index])
            after = _highest(one.ratios[index : index + _ROWS])
            if after > ratio > 3 * before:
                return PartRate(one.component, one.steps[index], rate, top, after, raised=True)
        top = rate if math.isnan(top) else max(top, rate)
    return None


def _beside(one: Updates, others: Sequence[Updates], times: float, ratio: float) -> PartRate | None:
    rate = _highest(one.rates[:_ROWS])
    rates = [_highest(x.rates[:_ROWS]) for x in others]
    known = [x for x in rates if x > 0]
    ratios = [_highest(x.ratios[:_ROWS]) for x in others]
    if not known or not rate > times * median(known):
        return None
    own = _highest(one.ratios[:_ROWS])
    if not own > ratio or not own > 3 * _highest(ratios):
        return None
    return PartRate(one.component, one.steps[0], rate, median(known), own, raised=False)


def _highest(values: Sequence[float]) -> float:
    return max((one for one in values if not math.isnan(one)), default=math.nan)
