"""Does the section on the range test say what the rows say, and survive odd rows?"""

import pytest

from lightning_diag.report import write_report
from lightning_diag.report.sections.learning_rate import learning_rate_chart, learning_rate_section
from tests.report.conftest import HOSTILE


def summary(**more):
    return {
        "step": 0,
        "lr": 2e-3,
        "lr_before": 1e-3,
        "confidence": "high",
        "slope": -0.31,
        "noise": 0.021,
        "points": 5,
        "diverged": 1,
        "cache_hit": 0,
        "key": "a" * 32,
        "age_hours": None,
        "seconds": 4.25,
        "min_lr": 1e-8,
        "max_lr": 1.0,
        "reason": None,
        **more,
    }


def curve(count=5, **more):
    return [
        {"step": 0, "point": i, "lr": 10.0 ** (i - 4), "loss": 2.5 - i, "smoothed": 2.4 - i, **more}
        for i in range(count)
    ]


def values(chart, what):
    """The rows of a chart's data that have such a label."""
    found, stack = [], [chart.to_dict(validate=False)]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            found += [node] if node.get("what") == what else []
            stack += node.values()
        elif isinstance(node, list):
            stack += node
    return sorted((row["lr"], row["loss"]) for row in found)


def test_nothing_without_rows(write_run):
    assert learning_rate_section(write_run({"grad": []})) is None
    assert learning_rate_section(write_run({"lr_finder": []}, name="empty")) is None
    only_curve = write_run({"lr_finder_curve": curve()}, name="curve")
    assert learning_rate_section(only_curve) is None


def test_a_search(write_run):
    run = write_run({"lr_finder": [summary()], "lr_finder_curve": curve()})
    section = learning_rate_section(run)
    assert section.title == "Learning rate"
    assert section.lines == (
        "A learning rate of 0.002 is suggested, with high confidence, "
        "2 times what is configured (0.001).",
        "5 rates from 1e-08 to 1 were tried in 4.25 s, where the loss diverged before the end.",
    )
    (table,) = section.tables
    (row,) = table.rows
    assert dict(zip(table.columns, row, strict=True)) == {
        "range test": "1, step 0",
        "suggested": "0.002",
        "confidence": "high",
        "configured": "0.001",
        "slope": "-0.31",
        "noise": "0.021",
        "points": "5",
        "range": "1e-08 to 1",
        "diverged": "yes",
        "cache": "miss",
        "seconds": "4.25",
    }
    (chart,) = section.charts.values()
    assert values(chart, "loss") == [(10.0 ** (i - 4), 2.5 - i) for i in range(5)]
    assert values(chart, "smoothed loss") == [
        (10.0 ** (i - 4), pytest.approx(2.4 - i)) for i in range(5)
    ]
    spec = chart.to_dict()
    assert "suggested: 0.002" in str(spec)
    assert "learning rate, log scale" in str(spec)
    assert spec["description"] == (
        "LR range test: the smoothed loss goes from 2.4 at 0.0001 over -1.6 at 1 to -1.6 at 1; "
        "0.002 is suggested."
    )


def test_a_hit(write_run):
    row = summary(cache_hit=1, age_hours=3.21, lr=1e-3, seconds=0.002)
    section = learning_rate_section(write_run({"lr_finder": [row]}))
    assert section.lines[0].endswith("with high confidence, as is configured (0.001).")
    assert section.lines[1] == (
        f"It was read from the cache under the key `{'a' * 32}`; it was found 3.21 hours before."
    )
    assert section.tables[0].rows[0][-2] == "hit"
    assert section.charts == {}


@pytest.mark.parametrize(("applied", "said"), [(1, "it was set"), (0, "it was not set")])
def test_whether_it_was_set(write_run, applied, said):
    section = learning_rate_section(write_run({"lr_finder": [summary(applied=applied)]}))
    assert section.lines[0].endswith(f"(0.001); {said}.")


def test_no_suggestion(write_run):
    row = summary(lr=None, confidence="none", diverged=0, reason="The loss never falls.")
    section = learning_rate_section(write_run({"lr_finder": [row], "lr_finder_curve": curve()}))
    assert section.lines == (
        "No learning rate is suggested: The loss never falls. 0.001 is configured.",
        "5 rates from 1e-08 to 1 were tried in 4.25 s.",
    )
    spec = str(section.charts["lr_range_test"].to_dict())
    assert "suggested:" not in spec
    assert "no learning rate is suggested" in spec


def test_the_curve_of_the_last_test_is_drawn(write_run):
    rows = [*curve(5), *curve(3, loss=7.0)]
    tests = [summary(), summary(lr=0.5, step=9)]
    section = learning_rate_section(write_run({"lr_finder": tests, "lr_finder_curve": rows}))
    assert section.lines[0].startswith("A learning rate of 0.5 is suggested")
    assert len(section.tables[0].rows) == 2
    assert [loss for _, loss in values(section.charts["lr_range_test"], "loss")] == [7.0] * 3


def test_a_curve_of_another_attempt_is_not_drawn(write_run):
    run = write_run({"lr_finder": [summary(attempt=1)], "lr_finder_curve": curve(attempt=0)})
    assert learning_rate_section(run).charts == {}


@pytest.mark.parametrize(
    ("losses", "title"),
    [
        ([1.0, 0.5, 1.9], "loss"),
        ([1.0, 0.5, 40.0], "loss, cut off above 2"),
        ([-1.0, -3.0, 99.0], "loss, cut off above 3"),
        ([1.0, 2.0, 99.0], "loss"),
    ],
)
def test_what_has_left_does_not_flatten_the_rest(losses, title):
    both = {"lr": [0.1, 1.0, 2.0], "loss": losses, "smoothed": losses}
    layer = learning_rate_chart(both, None).to_dict()["layer"][0]
    assert layer["encoding"]["y"]["title"] == title
    assert layer["encoding"]["x"]["title"] == "learning rate, log scale"


@pytest.mark.parametrize(
    "row",
    [
        summary(lr="odd", confidence=HOSTILE, key=HOSTILE, points=None),
        summary(lr=None, reason=f"a ` b {HOSTILE}"),
        summary(lr_before=0.0, seconds=None, min_lr=None),
        {"step": None, "lr": 0.1},
        {"step": 3, "reason": "x"},
        {"step": 3},
    ],
)
@pytest.mark.parametrize(
    "points",
    [
        [],
        [{"step": 0, "point": 0, "lr": None, "loss": 1.0, "smoothed": 1.0}],
        [{"step": 0, "point": 0, "lr": 0.1, "loss": None, "smoothed": "x"}, {"step": 0, "lr": 1.0}],
        [{"step": 0, "point": 1, "lr": -1.0}, {"step": 0, "point": 2, "lr": 1.0}],
    ],
)
def test_odd_rows(write_run, row, points):
    section = learning_rate_section(write_run({"lr_finder": [row], "lr_finder_curve": points}))
    assert section is None or section.title == "Learning rate"
    for chart in section.charts.values() if section else ():
        chart.to_dict()


def test_the_section_is_in_the_report(write_run, healthy_rows):
    rows = {"lr_finder": [summary(reason=HOSTILE)], "lr_finder_curve": curve()}
    report = write_report(write_run({**healthy_rows, **rows}))
    assert "Learning rate" in [section.title for section in report.sections]
    assert report.files["lr_range_test.png"].read_bytes().startswith(b"\x89PNG")
    page = report.files["report.html"].read_text()
    assert 'id="spec-lr_range_test"' in page
    assert HOSTILE not in page
    assert "![Learning rate](lr_range_test.png)" in report.files["report.md"].read_text()
