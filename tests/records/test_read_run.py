import json
import os

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diag.records import read_run
from lightning_diag.records.read_records import read_records

COMMON = {
    "step": pl.Int64,
    "epoch": pl.Int64,
    "time": pl.Float64,
    "attempt": pl.Int64,
    "component": pl.String,
}


def line(step=0, attempt=1, component=None, **own):
    row = {"step": step, "epoch": 0, "time": 1.5, "attempt": attempt, "component": component}
    return json.dumps({**row, **own}, separators=(",", ":")).encode()


@pytest.fixture
def plant(tmp_path):
    """Write record files, given as bytes or as lists of lines, and open the run."""

    def planted(**files):
        (tmp_path / "records").mkdir(exist_ok=True)
        for prefix, content in files.items():
            data = content if isinstance(content, bytes) else b"".join(x + b"\n" for x in content)
            (tmp_path / "records" / f"{prefix}.jsonl").write_bytes(data)
        return read_run(tmp_path)

    return planted


def test_frames_by_prefix(plant):
    run = plant(
        grad=[line(0, l2=1.0), line(5, component="head", l2=2.0)], notes=[line(message="m")]
    )
    assert run.prefixes == ["grad", "notes"]
    assert dict(run.grad.schema) == {**COMMON, "l2": pl.Float64}
    assert run.grad.rows() == [(0, 0, 1.5, 1, None, 1.0), (5, 0, 1.5, 1, "head", 2.0)]
    assert run.notes["message"].to_list() == ["m"]
    assert run.grad is run.frame("grad")
    assert run.torn == {}
    assert "grad" in dir(run)


def test_a_prefix_that_is_not_there(plant):
    run = plant(grad=[line()], metrics=[line()])
    with pytest.raises(AttributeError, match=r"no records `attention`; .* has `grad`, `metrics`"):
        _ = run.attention
    assert dict(run.frame("attention").schema) == COMMON
    assert run.frame("attention").is_empty()
    assert not hasattr(run, "_repr_html_")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \n"])
def test_an_empty_file(plant, content):
    run = plant(grad=content)
    assert dict(run.grad.schema) == COMMON
    assert run.torn == {}


def test_columns_keep_their_types_without_any_value(plant):
    run = plant(metrics=[line(epoch=None, loss=None, loss_nonfinite=1)])
    assert dict(run.metrics.schema) == {**COMMON, "loss": pl.Float64, "loss_nonfinite": pl.Int64}


def test_whole_and_broken_numbers_in_one_column(plant):
    run = plant(grad=[line(a=1), line(a=2.5), line(a=None), line(b=3), line(a=-1e-300)])
    assert run.grad["a"].to_list() == [1.0, 2.5, None, None, -1e-300]
    assert run.grad["b"].to_list() == [None, None, None, 3, None]


def test_a_column_that_comes_after_ten_thousand_rows(plant):
    run = plant(grad=[line(i) for i in range(10_500)] + [line(10_500, late=0.5, word="x")])
    assert run.grad.height == 10_501
    assert run.grad["late"].to_list()[-2:] == [None, 0.5]
    assert run.grad["word"].to_list()[-1] == "x"


def test_a_float_that_comes_after_ten_thousand_integers(plant):
    run = plant(grad=[line(i, a=1) for i in range(10_500)] + [line(10_500, a=0.25)])
    assert run.grad["a"].dtype == pl.Float64
    assert run.grad["a"].sum() == 10_500.25


@pytest.mark.parametrize("places", [[0], [1], [3], [0, 3], [1, 2]])
@pytest.mark.parametrize(
    "torn",
    [
        b'{"step":7,"l2":0.',
        b'{"step":7,"l2":0.5',
        b"\x00\x00\x00",
        b'{"step":7,"name":"\xff"}',
        b"[1, 2]",
        b"12",
        b"null",
        b'{"step":7}{"step":8}x',
        b"garbage",
    ],
)
def test_torn_lines_are_left_out_and_counted(plant, torn, places):
    lines = [line(i, l2=i / 2) for i in range(3)]
    for place in places:
        lines.insert(place, torn)
    run = plant(grad=lines, metrics=[line(loss=1.0)])
    assert run.grad["step"].to_list() == [0, 1, 2]
    assert run.grad["l2"].to_list() == [0.0, 0.5, 1.0]
    assert run.torn == {"grad": len(places)}
    assert dict(run.grad.schema) == {**COMMON, "l2": pl.Float64}


def test_a_torn_last_line_without_its_newline(plant):
    run = plant(grad=line(0, l2=1.0) + b"\n" + line(1, l2=2.0)[:-5])
    assert run.grad["step"].to_list() == [0]
    assert run.torn == {"grad": 1}


def test_a_last_line_that_lacks_only_its_newline_counts(plant):
    run = plant(grad=line(0, l2=1.0) + b"\n" + line(1, l2=2.0))
    assert run.grad["step"].to_list() == [0, 1]
    assert run.torn == {}


def test_a_row_behind_a_torn_one_on_the_same_line_is_saved(plant):
    run = plant(grad=[line(0, l2=1.0)[:-4] + line(1, l2=2.0), line(2, l2=3.0)])
    assert run.grad["step"].to_list() == [1, 2]
    assert run.torn == {"grad": 1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, "x", None], ["1", "x", None]),
        ([True, 2.5], [1.0, 2.5]),
        ([[1, 2], 3.5], ["[1, 2]", "3.5"]),
        ([{"a": 1}, 3.5], ['{"a": 1}', "3.5"]),
        ([[1, 2], [None, 0.5]], [[1.0, 2.0], [None, 0.5]]),
        ([2**70, 1], [2**70, 1]),
    ],
)
@pytest.mark.parametrize("torn", [[], [b"{"]])
def test_mixed_columns_are_read_somehow(plant, values, expected, torn):
    run = plant(grad=[line(i, a=value) for i, value in enumerate(values)] + torn)
    assert run.grad["a"].to_list() == expected
    assert run.grad["step"].to_list() == [*range(len(values))]


def test_not_a_number_from_another_writer_is_null(plant):
    run = plant(grad=[b'{"step":0,"attempt":1,"l2":NaN}', b'{"step":1,"attempt":1,"l2":0.5}'])
    assert run.grad["l2"].to_list() == [None, 0.5]


def test_a_file_that_grows(plant, tmp_path):
    run = plant(grad=[line(0)])
    assert run.grad.height == 1
    with open(tmp_path / "records" / "grad.jsonl", "ab") as file:
        file.write(line(1) + b"\n" + line(2)[:9])
    assert run.grad.height == 1
    again = read_run(tmp_path)
    assert again.grad["step"].to_list() == [0, 1]
    with open(tmp_path / "records" / "grad.jsonl", "ab") as file:
        file.write(line(2)[9:] + b"\n")
    assert read_run(tmp_path).grad["step"].to_list() == [0, 1, 2]


def test_configuration_and_info(plant, tmp_path):
    run = plant(grad=[])
    (tmp_path / "config.yaml").write_text("model: {width: 3}\n")
    (tmp_path / "run.json").write_text('{"id": "x", "attempts": [3, {"attempt": 1}]}')
    assert run.config == {"model": {"width": 3}}
    assert run.info == {"id": "x", "attempts": [{"attempt": 1}]}
    assert str(tmp_path) in repr(run)


@pytest.mark.parametrize("content", [None, b"", b'{"id": ', b"[]", b"\xff"])
def test_a_missing_or_torn_run_json_is_empty(plant, tmp_path, content):
    run = plant(grad=[line()])
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    assert run.info == {}
    assert run.config == {}
    assert run.grad.height == 1


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "\x00"])
def test_a_configuration_that_is_none(plant, tmp_path, content):
    run = plant(grad=[line()])
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config.yaml` must (be YAML|hold a mapping), got"):
        _ = run.config


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file, which is a file"):
        read_run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"`run.json` or `records/\*.jsonl` in it, got"):
        read_run(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="It has runs inside: 0"):
        read_run(tmp_path)


pieces = st.one_of(
    st.builds(line, step=st.integers(0, 99), l2=st.none() | st.floats(0, 1) | st.integers(-5, 5)),
    st.binary(max_size=30).filter(lambda data: b"\n" not in data),
    st.builds(lambda row, cut: row[:cut], st.builds(line, name=st.text()), st.integers(0, 90)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, max_size=12))
def test_any_bytes_give_the_rows_that_json_finds(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected, torn = [], 0
    for data in lines:
        try:
            row = json.loads(data)
        except ValueError:
            torn += bool(data.strip())
            continue
        torn += not isinstance(row, dict)
        expected += [row.get("step")] if isinstance(row, dict) else []
    rows, offsets, counted = read_records(path)
    assert counted == torn
    assert rows["step"].to_list() == expected
    data = path.read_bytes()
    assert [json.loads(data[o:].split(b"\n")[0])["step"] for o in offsets()] == expected


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    os.mkdir(tmp_path / "records")
    block = b"".join(line(i, component=f"layer{i % 10}", l2=0.5) + b"\n" for i in range(10_000))
    with open(tmp_path / "records" / "grad.jsonl", "wb") as file:
        for _ in range(100):
            file.write(block)
    assert read_run(tmp_path).grad.height == 1_000_000
