import math
import statistics

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.rules.sizes import Size, largest, ratio, typical_others
from lightning_diag.rules.traces import (
    component_traces,
    evidence_steps,
    outliers,
    robust_sigma,
    streaks,
    without_skipped,
)
from tests.rules.planted import component_row, whole_row

positive = st.floats(1e-6, 1e6)
table = st.dictionaries(st.text(), st.tuples(positive, positive), min_size=2, max_size=12)


@given(st.lists(st.booleans()))
def test_streaks_cover_exactly_the_true_flags(flags):
    covered = [index for start, stop in streaks(flags) for index in range(start, stop)]
    assert covered == [index for index, flag in enumerate(flags) if flag]
    for (_, stop), (start, _) in zip(streaks(flags), streaks(flags)[1:], strict=False):
        assert start > stop


def test_robust_sigma_estimates_a_normal_deviation_despite_wild_values():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(5.0, 2.0, 4000), np.full(400, 1e9)])
    centre, spread = robust_sigma(values.tolist(), 0.0)
    assert centre == pytest.approx(5.0, abs=0.4)
    assert spread == pytest.approx(2.0, rel=0.2)


def test_outliers_keep_standing_out_and_ignore_a_steady_trend():
    jump = [0.0, 0.1] * 10 + [50.0] * 20
    heights = outliers(jump, sigmas=6, window=128, history=5, floor=0.1)
    assert [height > 1 for height in heights] == [False] * 20 + [True] * 20
    trend = [0.1 * index for index in range(100)]
    assert not any(h > 1 for h in outliers(trend, sigmas=6, window=128, history=5, floor=0.1))


def test_outliers_pass_over_nan():
    values = [1.0] * 10 + [math.nan, 99.0]
    heights = outliers(values, sigmas=6, window=9, history=5, floor=0.1)
    assert heights[10] == 0.0
    assert heights[11] > 1


@given(table)
def test_typical_others_is_the_median_of_the_others(pairs):
    sizes = {name: Size(*pair) for name, pair in pairs.items()}
    for name, typical in typical_others(sizes).items():
        others = [size for other, size in sizes.items() if other != name]
        assert typical.l2 == pytest.approx(statistics.median(one.l2 for one in others))
        assert typical.rms == pytest.approx(statistics.median(one.rms for one in others))


@given(table)
def test_the_largest_suffice_for_the_largest_ratio(pairs):
    sizes = [Size(*pair) for pair in pairs.values()]
    for size in sizes:
        assert max(ratio(one, size) for one in largest(sizes)) == pytest.approx(
            max(ratio(one, size) for one in sizes)
        )


def test_rows_of_two_optimizers_at_one_step_are_merged():
    rows = [
        component_row(0, "a", 3.0, optimizer=0, count=10),
        component_row(0, "a", 4.0, optimizer=1, count=20),
    ]
    (trace,) = component_traces(pl.DataFrame(rows))
    assert trace.steps == [0]
    assert trace.numbers("l2") == [5.0]
    assert trace.numbers("count") == [30.0]


def test_skipped_steps_are_left_out_for_their_optimizer_only():
    rows = []
    for optimizer in (0, 1):
        part = component_row(5, f"net{optimizer}", 1.0, optimizer=optimizer)
        rows += [part, whole_row(5, [part], optimizer=optimizer, skipped=1 - optimizer)]
    kept = without_skipped(pl.DataFrame(rows, infer_schema_length=None))
    assert kept["component"].to_list() == ["net1", None]


def test_evidence_keeps_both_ends():
    assert evidence_steps(range(5)) == (0, 1, 2, 3, 4)
    assert evidence_steps(range(100), limit=4) == (0, 1, 98, 99)
