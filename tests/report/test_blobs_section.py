"""Does the report say how many blobs there are, since when and where, whatever the rows hold?"""

import pytest
import vl_convert

from lightning_diag.report.sections.blobs import blob_history, blobs_section
from tests.report.conftest import HOSTILE


def blob_row(step, clusters, component="net", **more):
    row = {
        "step": step,
        "component": component,
        "n_clusters_dbscan": clusters,
        "weight_correlation": 0.1 * clusters,
        "encoder_std": 0.2,
        "decoder_std": 0.02,
        "silhouette_score": 0.9 if clusters > 1 else None,
        "cluster_centers": [[1.5 * i, 0.1 * i] for i in range(min(clusters, 3))] or [[0.0, 0.0]],
        "cluster_stds": [[0.09, 0.012]] * min(clusters, 3),
        "cluster_shares": [0.5**i for i in range(1, clusters + 1)],
        "n_noise_points": 5,
        "noise_share": 0.001,
        "n_pairs_analyzed": 5000,
        "n_pairs": 524288,
        "nonfinite": 0,
    }
    return row | more


def point_row(step, component="net", clusters=(0, 1, -1)):
    x = [float(i) for i in range(len(clusters))]
    return {
        "step": step,
        "component": component,
        "encoder": x,
        "decoder": [-value for value in x],
        "cluster": list(clusters),
    }


def drawn(chart):
    spec = chart.to_dict()
    assert vl_convert.vegalite_to_png(spec)
    assert spec["description"]
    return spec


def values(spec):
    """All points of a chart."""
    found = list(spec.get("datasets", {}).values())
    return [row for rows in found for row in rows]


def test_none_without_rows(write_run):
    assert blobs_section(write_run({})) is None
    assert blobs_section(write_run({"blob": [{"step": 1}]}, name="other")) is None


def test_what_is_said(write_run):
    rows = [blob_row(29 + 30 * i, n) for i, n in enumerate([1, 3, 2, 3, 3])]
    points = [point_row(29), point_row(149)]
    section = blobs_section(write_run({"blob": rows, "blob_sample": points}))
    assert section.title == "Blobs"
    assert section.lines == (
        "`net` has 3 clusters at step 149 in 5,000 of 524,288 pairs; first so at step 119; "
        "silhouette 0.90; correlation of the two sides 0.30.",
    )
    (table,) = section.tables
    assert table.rows == [
        ("net", "1", "50.00 %", "0", "0", "0.09", "0.012"),
        ("net", "2", "25.00 %", "1.5", "0.1", "0.09", "0.012"),
        ("net", "3", "12.50 %", "3", "0.2", "0.09", "0.012"),
        ("net", "noise", "0.10 %", "", "", "", ""),
    ]
    assert set(section.charts) == {"blob_history", "blob_spread", "blobs"}
    scatter = values(drawn(section.charts["blobs"]))
    assert [point["cluster"] for point in scatter] == ["1", "2", "noise"]
    assert [point["decoder"] for point in scatter] == [0.0, -1.0, -2.0]
    history = values(drawn(section.charts["blob_history"]))
    assert {row["name"] for row in history if "name" in row} == {"net"}
    spread = values(drawn(section.charts["blob_spread"]))
    assert {row["name"] for row in spread} == {"net, encoder", "net, decoder"}


def test_the_four_panels_hold_what_the_rows_say(write_run):
    rows = [blob_row(29 + 30 * i, n) for i, n in enumerate([1, 3, 2])]
    losses = [{"step": 9, "train_loss": 2.5}, {"step": 29, "train_loss": 0.5}]
    losses += [{"step": 29, "val_loss": 0.75}]
    spec = drawn(blob_history(write_run({"blob": rows, "metrics": losses})))
    panels = {}
    for panel in spec["concat"]:
        layer = panel["layer"][0]
        data = layer.get("data") or panel["data"]
        points = data.get("values") or spec["datasets"][data["name"]]
        title = layer["encoding"]["y"]["title"]
        panels[title] = {(row["name"], row["x"], row["y"]) for row in points}
    assert list(panels) == ["silhouette", "clusters", "correlation of the weights", "loss"]
    assert panels["clusters"] == {("net", 29, 1.0), ("net", 59, 3.0), ("net", 89, 2.0)}
    assert panels["loss"] == {
        ("training", 9, 2.5),
        ("training", 29, 0.5),
        ("validation", 29, 0.75),
    }


def test_a_panel_without_numbers_keeps_its_place_and_says_why(write_run):
    row = {"step": 9, "n_clusters_dbscan": 1, "silhouette_score": None}
    spec = drawn(blob_history(write_run({"blob": [row]})))
    assert len(spec["concat"]) == 4
    assert "No silhouette: it needs two clusters." in str(spec)
    assert "No loss: none was logged." in str(spec)


def test_the_last_sample_is_drawn(write_run):
    samples = [point_row(59, clusters=(0,)), point_row(29, clusters=(0, 0))]
    section = blobs_section(write_run({"blob": [blob_row(59, 1)], "blob_sample": samples}))
    assert len(values(drawn(section.charts["blobs"]))) == 1
    assert "step 59" in str(section.charts["blobs"].to_dict())


def test_one_cluster_and_what_was_left_out(write_run):
    section = blobs_section(write_run({"blob": [blob_row(9, 1, nonfinite=4)]}))
    assert section.lines[0].startswith("`net` has 1 cluster at step 9 in 5,000")
    assert section.lines[0].endswith("; 4 pairs left out as NaN or infinite.")
    assert set(section.charts) == {"blob_history", "blob_spread"}


def test_many_pairs_of_weights(write_run):
    names = [f"layer {i}" for i in range(14)]
    run = write_run(
        {
            "blob": [blob_row(9, 2, name) for name in names],
            "blob_sample": [point_row(9, name) for name in names],
        }
    )
    section = blobs_section(run)
    assert len(section.lines) == 10
    spec = drawn(section.charts["blobs"])
    assert "4 of 14 pairs of weights are drawn." in spec["title"]["subtitle"]


@pytest.mark.parametrize(
    "row",
    [
        {"step": 1, "n_clusters_dbscan": None},
        {"step": 1, "n_clusters_dbscan": 2},
        {"step": 1, "n_clusters_dbscan": "many"},
        {"step": 1, "n_clusters_dbscan": 0, "cluster_centers": [], "cluster_shares": []},
        {"step": 1, "n_clusters_dbscan": 1, "cluster_centers": "x", "cluster_shares": [0.5]},
        {"step": 1, "n_clusters_dbscan": 1, "cluster_centers": [[None]], "cluster_shares": [None]},
        {"step": 1, "n_clusters_dbscan": 2, "silhouette_score": "nan", "noise_share": None},
        blob_row(1, 2, None),
        blob_row(1, 2, HOSTILE),
    ],
)
def test_odd_rows(write_run, row):
    section = blobs_section(write_run({"blob": [row]}))
    assert len(section.lines) == 1
    drawn(section.charts["blob_history"])


@pytest.mark.parametrize(
    "points",
    [
        {"step": 1, "encoder": [1.0], "decoder": [2.0]},
        {"step": 1, "encoder": [1.0, None], "decoder": [2.0, 1.0], "cluster": [None, 0]},
        {"step": 1, "encoder": [], "decoder": [], "cluster": []},
        {"step": 1, "encoder": 3.0, "decoder": "x", "cluster": 0},
        {"step": None, "encoder": [1.0], "decoder": [2.0], "cluster": [0]},
    ],
)
def test_odd_samples(write_run, points):
    section = blobs_section(write_run({"blob": [blob_row(1, 2)], "blob_sample": [points]}))
    assert "blobs" not in section.charts
