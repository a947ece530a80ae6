import dataclasses
import enum
import json
import math
from argparse import Namespace
from collections import OrderedDict, deque
from datetime import UTC, date, datetime, timedelta
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_diag.records.json_safe import flat_row, json_safe


class Colour(enum.Enum):
    RED = "red"
    ODD = object()


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: float
    where: Path


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (2**70, 2**70),
        (0.5, 0.5),
        ("text\nline", "text\nline"),
        ("déjà", "déjà"),
        (Path("a/b"), "a/b"),
        (PurePosixPath("/x"), "/x"),
        (Colour.RED, "red"),
        (Colour.ODD, "ODD"),
        (Level.HIGH, 3),
        (date(2024, 2, 29), "2024-02-29"),
        (datetime(2024, 2, 29, 12, tzinfo=UTC), "2024-02-29T12:00:00+00:00"),
        (timedelta(minutes=1, milliseconds=500), 60.5),
        (Point(1.5, Path("p")), {"x": 1.5, "where": "p"}),
        ((1, (2, 3)), [1, [2, 3]]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({1, "a"}, ["a", 1]),
        (deque([1, 2]), [1, 2]),
        (range(3), [0, 1, 2]),
        ({"a": 1}.values(), [1]),
        ({"a": 1}.keys(), ["a"]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (
            {1: "a", None: "b", 2.5: "c", (1, 2): "d", Path("q"): "e", False: "f"},
            {"1": "a", "null": "b", "2.5": "c", "[1, 2]": "d", "q": "e", "false": "f"},
        ),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "cpu"),
        (torch.Size([2, 3]), [2, 3]),
        (np.bool_(True), True),
        (np.int16(-3), -3),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.str_("s"), "s"),
        (np.datetime64("2024-02-29T01:02:03.5"), "2024-02-29T01:02:03.500000"),
        (np.datetime64("2024-02-29T01:02:03", "ns"), "2024-02-29T01:02:03"),
        (np.datetime64("NaT"), None),
        (np.timedelta64(1500, "ms"), 1.5),
        (np.array(3), 3),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (np.array([True, False]), [True, False]),
        (np.array([Path("a"), None], dtype=object), ["a", None]),
        (np.zeros((0, 2)), []),
        (torch.tensor(True), True),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.zeros(0), []),
        (torch.nn.Parameter(torch.ones(2)), [1.0, 1.0]),
        (torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_type(value, expected):
    result = json_safe(value)
    assert result == expected
    assert type(result) is type(expected)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_a_tensor_keeps_its_exact_values(dtype, shape):
    tensor = torch.linspace(-3.1, 2.7, max(1, math.prod(shape)))[: math.prod(shape)]
    tensor = tensor.reshape(shape).to(dtype)
    assert json_safe(tensor) == tensor.to(torch.float64).numpy().tolist()


@pytest.mark.parametrize("dtype", INTS)
def test_an_integer_tensor_stays_whole(dtype):
    result = json_safe(torch.tensor([1, 2], dtype=dtype))
    assert result == [1, 2]
    assert all(type(item) is int for item in result)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "wrap",
    [float, np.float32, np.float64, np.float16, torch.tensor, lambda x: torch.tensor(x).bfloat16()],
)
def test_what_is_not_finite_is_null(bad, wrap):
    assert json_safe(wrap(bad)) is None
    assert json_safe({"a": [wrap(bad), 1.0]}) == {"a": [None, 1.0]}
    kept = json_safe(wrap(bad), allow_nan=True)
    assert isinstance(kept, float)
    assert not math.isfinite(kept)


def test_omegaconf_is_resolved():
    config = OmegaConf.create({"lr": 0.1, "again": "${lr}", "list": [1, "${lr}"], "open": "???"})
    assert json_safe(config) == {"lr": 0.1, "again": 0.1, "list": [1, 0.1], "open": "???"}
    assert json_safe({"inner": config.list}) == {"inner": [1, 0.1]}


def test_text_that_no_reader_takes_is_escaped():
    assert json_safe("a\udcff") == "a\\udcff"
    assert json_safe(Path("a\udcff")) == "a\\udcff"


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        (object(), "value", "object"),
        ({"a": [1, {"b": object()}]}, "value.a[1].b", "object"),
        ({"a": b"x"}, "value.a", "bytes"),
        (1j, "value", "complex"),
        ((x for x in []), "value", "generator"),
        ({"f": print}, "value.f", "builtin_function_or_method"),
        ({"n": Namespace(a=1)}, "value.n", "argparse.Namespace"),
        ({"m": torch.nn.ModuleDict()}, "value.m", "torch.nn.modules.container.ModuleDict"),
        ({Point: 1}, "key of value", "type"),
        ({"d": Point(1, object())}, "value.d.where", "object"),
    ],
)
def test_an_unknown_type_is_named_with_its_place(value, place, kind):
    with pytest.raises(TypeError) as info:
        json_safe(value)
    assert str(info.value).startswith(f"`{place}` must be")
    assert str(info.value).endswith(f"got {kind}.")


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1, dtype=torch.complex64), np.zeros(1, complex), torch.zeros(1, device="meta")],
)
def test_no_real_numbers_are_refused(value):
    with pytest.raises(TypeError, match=r"`value.w` must hold real numbers, got an? "):
        json_safe({"w": value})


def test_keys_that_become_one_are_refused():
    with pytest.raises(ValueError, match="`value` must differ as strings, got '1' twice"):
        json_safe({1: "a", "1": "b"})


def test_a_value_inside_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="`value` must not contain itself"):
        json_safe(loop)


def test_default_stands_in_for_unknown_types_at_every_depth():
    value = {"a": [object(), Point], "b": math.nan}
    result = json_safe(value, default=lambda odd: [type(odd).__name__, math.inf])
    assert result == {"a": [["object", None], ["type", None]], "b": None}


def test_default_that_gives_an_unknown_type_back_is_refused():
    with pytest.raises(ValueError, match="`value` must not contain itself"):
        json_safe(object(), default=lambda odd: odd)


def test_inputs_are_not_changed():
    tensor = torch.ones(2, requires_grad=True)
    row = {"a": tensor, "b": [float("nan")]}
    json_safe(row)
    assert row["a"] is tensor
    assert math.isnan(row["b"][0])


def test_flat_row_counts_what_it_hides():
    row = {
        "l2": math.nan,
        "ok": 1.5,
        "n": 3,
        "bins": [1.0, math.inf, math.nan],
        "t": torch.tensor([1.0, math.inf]),
        "name": "x",
        "none": None,
        "flag": np.bool_(False),
        "np": np.float32(math.inf),
    }
    safe, counts = flat_row(row)
    assert safe == {
        "l2": None,
        "ok": 1.5,
        "n": 3,
        "bins": [1.0, None, None],
        "t": [1.0, None],
        "name": "x",
        "none": None,
        "flag": False,
        "np": None,
    }
    assert counts == {"l2": 1, "bins": 2, "t": 1, "np": 1}
    assert list(safe) == list(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1, "odd": object()}, "`odd` must be a number"),
        ({"a": {"b": 1}}, "`a` must be one value of a flat row, got a dict."),
        ({"p": Point(1, Path("x"))}, "`p` must be one value of a flat row, got a Point."),
        ({3: 1}, "The key of a row must be a string, got 3."),
    ],
)
def test_flat_row_refuses(row, message):
    with pytest.raises(TypeError) as info:
        flat_row(row)
    assert message in str(info.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_the_result_is_json_and_a_fixed_point(value):
    once = json_safe(value)
    assert json_safe(once) == once
    assert json.loads(json.dumps(once, allow_nan=False)) == once


@given(st.lists(st.floats(width=32), max_size=20))
def test_a_tensor_equals_its_list(numbers):
    expected = [number if math.isfinite(number) else None for number in numbers]
    assert json_safe(torch.tensor(numbers, dtype=torch.float32)) == expected
    assert json_safe(np.array(numbers, np.float32)) == expected
