import csv
import io

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.report.norms import component_norms, measured_steps, norms_csv
from lightning_diag.report.thinning import thin
from tests.rules.planted import component_row, trace, whole_row


def frame(rows):
    return pl.DataFrame(rows, infer_schema_length=None)


def read(text):
    return list(csv.reader(io.StringIO(text)))


def test_summary_against_numpy():
    norms = [0.5, 2.0, 1.0, 0.0]
    rows = trace({"a": norms, "b": [1.0] * 4}, counts={"a": 25})
    summary = component_norms(frame(rows))[0]
    assert summary.component == "a"
    assert (summary.mean, summary.std) == (np.mean(norms), np.std(norms))
    assert (summary.max, summary.min) == (2.0, 0.0)
    assert summary.rms == pytest.approx(np.median(norms) / 5.0)
    assert (summary.rows, summary.zero_rows, summary.nonfinite_rows) == (4, 1, 0)
    assert component_norms(frame(rows))[2].component == "whole model"


def test_summary_leaves_nonfinite_rows_out():
    rows = [component_row(0, "a", 1.0), component_row(1, "a", 7.0, nonfinite=3)]
    rows += [component_row(2, "a", None, l2_nonfinite=1)]
    summary = component_norms(frame(rows))[0]
    assert (summary.mean, summary.max, summary.nonfinite_rows) == (1.0, 1.0, 2)


def test_csv_has_a_line_a_step_and_gaps_are_empty():
    rows = trace({"a": [3.0, 0.25], "b": [4.0, 1.0]})
    rows += [component_row(20, "b", 2.0), component_row(30, "b", None)]
    lines = read(norms_csv(frame(rows)))
    assert lines[0] == ["step", "a", "b", "global"]
    assert lines[1] == ["0", "3.0", "4.0", "5.0"]
    assert [line[0] for line in lines[1:]] == ["0", "10", "20", "30"]
    assert lines[3] == ["20", "", "2.0", ""]
    assert lines[4] == ["30", "", "", ""]
    assert float(lines[2][3]) == pytest.approx(np.hypot(0.25, 1.0))


def test_csv_merges_optimizers_that_step_at_once():
    parts = [
        component_row(0, name, l2, optimizer=i)
        for i, (name, l2) in enumerate([("a", 3.0), ("b", 4.0)])
    ]
    rows = [*parts, *(whole_row(0, [part], optimizer=part["optimizer"]) for part in parts)]
    assert read(norms_csv(frame(rows)))[1] == ["0", "3.0", "4.0", "5.0"]
    names = [one.component for one in component_norms(frame(rows))]
    assert names == ["a", "b", "whole model, optimizer 0", "whole model, optimizer 1"]


def test_csv_of_names_with_commas_and_quotes_reads_back():
    name = 'a,"b"\nc'
    assert read(norms_csv(frame(trace({name: [1.0]}))))[0] == ["step", name, "global"]


def test_csv_and_summary_of_nothing():
    empty = pl.DataFrame(schema={"step": pl.Int64, "component": pl.String})
    assert norms_csv(empty) == "step,global\n"
    assert component_norms(empty) == []
    assert measured_steps(empty) == []


def test_a_row_without_numbers_measured_nothing():
    rows = [component_row(i, "a", None) for i in range(3)]
    assert measured_steps(frame(rows)) == []
    rows.append(component_row(3, "a", None, count=0, tensors=0, missing=2))
    assert measured_steps(frame(rows)) == [3]


@given(st.lists(st.floats(allow_nan=False), max_size=200), st.integers(2, 50))
def test_thin_keeps_extremes_and_order_within_the_limit(values, limit):
    kept = thin(values, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(set(kept))
    if values:
        assert max(values[index] for index in kept) == max(values)
        assert min(values[index] for index in kept) == min(values)
    if len(values) <= limit:
        assert kept == list(range(len(values)))


def test_thin_refuses_a_limit_below_two():
    with pytest.raises(ValueError, match="`limit` must be at least 2, got 1"):
        thin([1.0], 1)
