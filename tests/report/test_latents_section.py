"""Does the section on the representation say where it came from and where it is?"""

import pytest

from lightning_diag.report.sections.latents import latents_section
from tests.report.conftest import HOSTILE


def latent(step, component="encoder", **more):
    return {
        "step": step,
        "component": component,
        "side": "output",
        "rows": 512,
        "features": 64,
        "latent_std": 0.5,
        "latent_norm": 4.0,
        "std_ratio": 0.9,
        "mean_cosine": 0.1,
        "effective_rank": 50.0,
        "participation": 40.0,
        "rank_limit": 63,
        "dead_dimensions": 0,
        "nonfinite": 0,
        **more,
    }


def test_nothing_without_rows(write_run):
    assert latents_section(write_run({"grad": []})) is None


def test_table_and_sentences(write_run):
    rows = [latent(49), latent(99), latent(149, effective_rank=1.5, mean_cosine=0.99)]
    rows.append(latent(49, "head", side="input", nonfinite=3))
    section = latents_section(write_run({"latent": rows}))
    assert section.lines == (
        "Output of `encoder`, 64 dimensions, 512 rows: effective rank 1.5 of at most 63 "
        "at step 149.",
        "Input of `head`, 64 dimensions, 512 rows: effective rank 50 of at most 63 at step 49; "
        "3 elements are NaN or infinite.",
    )
    (table,) = section.tables
    assert [row[:2] for row in table.rows] == [
        *(("encoder", "49"), ("encoder", "149"), ("head", "49"))
    ]
    assert table.rows[1][2:] == ("0.5", "4", "0.9", "0.99", "1.5", "40", "0")
    assert "isotropic" in str(section.charts["latents"].to_dict())


@pytest.mark.parametrize(
    "row",
    [
        {"step": 3},
        {"step": 3, "component": HOSTILE, "effective_rank": None},
        {"step": 3, "component": "a", "latent_std": "odd"},
        {"step": None, "component": "a"},
    ],
)
def test_odd_rows(write_run, row):
    section = latents_section(write_run({"latent": [row]}))
    for chart in section.charts.values() if section else ():
        chart.to_dict()
