import io
import re
import tarfile
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from recipes.drivers import tide as tide_module
from recipes.drivers.baselines import ceiling, r_squared, ridge, ridge_scores
from recipes.drivers.data import DriversData
from recipes.drivers.planted import planted_series, planted_signal
from recipes.drivers.series import Series, digest, read_table
from recipes.drivers.tide import TideData, ephemerides, read_levels
from recipes.drivers.windows import Windows, bounds, scale_of


def planted(seed=0, hours=400):
    return planted_series(hours, seed)


# ---- the generator ----


def test_the_signal_is_the_formula_term_by_term():
    generator = np.random.default_rng(3)
    x = generator.standard_normal((48 + 60, 13))
    _, edges, _ = planted()
    signal = planted_signal(x, edges)
    for t in (0, 17, 59):
        for m in range(4):
            total = 0.0
            for k, weight in enumerate((0.6, 0.3, 0.1)):
                then = x[48 + t - edges.lag[m, k], edges.body[m, k]]
                total += edges.sign[m, k] * weight**0.5 * np.tanh(then) / 0.63
            assert signal[t, m] == pytest.approx(total, abs=1e-12)


def test_targets_follow_the_bodies_that_are_handed_out():
    """From the 49th hour on, everything that moved a target stands in the series."""
    series, edges, signal = planted(seed=2)
    again = planted_signal(series.drivers[..., 0], edges)
    np.testing.assert_allclose(again, signal[48:], atol=1e-12)
    noise = series.targets - signal
    assert noise.std() == pytest.approx(0.3, rel=0.05)
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.15


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_edges_keep_to_their_rules(seed):
    _, edges, _ = planted(seed)
    assert edges.body.shape == edges.lag.shape == edges.sign.shape == (4, 3)
    assert all(len(set(row)) == 3 for row in edges.body.tolist())
    assert edges.body.min() >= 0
    assert edges.body.max() <= 12
    assert edges.lag.min() >= 24
    assert edges.lag.max() <= 48
    assert set(edges.sign.ravel().tolist()) <= {-1.0, 1.0}


def test_every_lag_and_sign_is_drawn():
    edges = [planted_series(1, seed)[1] for seed in range(60)]
    assert set(np.concatenate([one.lag.ravel() for one in edges])) == set(range(24, 49))
    assert {s for one in edges for s in one.sign.ravel().tolist()} == {-1.0, 1.0}


def test_bodies_swing_with_their_periods_and_remember_a_day():
    series, _, _ = planted_series(40_000, 1)
    t = np.arange(40_000)
    for b, period in enumerate(np.geomspace(18, 240, 13)):
        x = series.drivers[:, b, 0]
        assert x.var() == pytest.approx(1.0, rel=0.1)
        wave = np.stack([np.sin(2 * np.pi * t / period), np.cos(2 * np.pi * t / period)], axis=1)
        weight, *_ = np.linalg.lstsq(wave, x, rcond=None)
        assert np.hypot(*weight) == pytest.approx(1.0, abs=0.1)
        rest = x - wave @ weight
        assert rest.std() == pytest.approx(0.5**0.5, rel=0.1)
        assert np.corrcoef(rest[:-24], rest[24:])[0, 1] == pytest.approx(np.exp(-1), abs=0.08)


def test_the_same_seed_gives_the_same_data_and_the_global_generators_rest():
    before, global_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = (planted(seed)[0] for seed in (4, 4, 5))
    assert digest(first) == digest(second) != digest(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == global_state).all()


def test_the_digest_sees_names_and_numbers():
    series, _, _ = planted()
    renamed = replace(series, target_names=("a", "b", "c", "d"))
    moved = replace(series, drivers=series.drivers + 1e-3)
    assert len({digest(series), digest(renamed), digest(moved)}) == 3


# ---- windows ----


def test_windows_are_what_was_seen_and_what_came_next():
    data = DriversData(hours=1000)
    data.setup("fit")
    series = data.series
    mean, std = series.targets[:700].mean(0), series.targets[:700].std(0)
    window = data.parts["val"][3]
    begin = 700 + 3
    expected = (series.targets[begin : begin + 96] - mean) / std
    np.testing.assert_allclose(window.history, expected, atol=1e-5)
    expected = (series.targets[begin + 96 : begin + 120] - mean) / std
    np.testing.assert_allclose(window.future, expected, atol=1e-5)
    x = series.drivers
    expected = (x[begin : begin + 96] - x[:700].mean(0)) / x[:700].std(0)
    np.testing.assert_allclose(window.drivers, expected, atol=1e-5)


def test_all_windows_together_are_the_windows_one_by_one():
    data = DriversData(hours=1000)
    data.setup("fit")
    part = data.parts["test"]
    assert len(part) == 150 - 120 + 1
    together = part.together()
    for i in (0, 7, len(part) - 1):
        for batch, one in zip(together, part[i], strict=True):
            assert torch.equal(batch[i], one)


@settings(max_examples=30)
@given(times=st.integers(10, 10_000), first=st.floats(0.1, 0.7), second=st.floats(0.1, 0.25))
def test_parts_follow_one_another_without_overlap(times, first, second):
    parts = bounds(times, (first, second, 1 - first - second))
    assert parts["train"][0] == 0
    assert parts["train"][1] == parts["val"][0]
    assert parts["val"][1] == parts["test"][0]
    assert parts["test"][1] == times


def test_the_future_changes_nothing_in_the_past():
    """Neither the windows of the training part nor the scale know what comes after it."""
    series, _, _ = planted(hours=1000)
    changed = replace(series, drivers=series.drivers.copy(), targets=series.targets.copy())
    changed.drivers[700:] *= 100
    changed.targets[700:] += 55
    for one in (series, changed):
        scale = scale_of(one, 700)
        windows = Windows(one, 0, 700, scale, 96, 24)
        if one is series:
            before, past = scale, windows
    for a, b in zip(before, scale, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(past.together(), windows.together(), strict=True):
        assert torch.equal(a, b)


def test_no_window_lies_in_two_parts():
    data = DriversData(hours=1000)
    data.setup("fit")
    parts = bounds(1000, data.split)
    for name, windows in data.parts.items():
        begin, end = parts[name]
        assert windows.begin == begin
        assert begin + len(windows) - 1 + 96 + 24 == end


def test_a_constant_column_is_left_in_peace():
    series = Series(np.ones((50, 2, 1)), np.zeros((50, 1)), ("a", "b"), ("y",))
    scale = scale_of(series, 30)
    assert (scale.driver_std == 1).all()
    assert Windows(series, 0, 50, scale, 5, 2).drivers.isfinite().all()


def test_the_order_of_batches_follows_the_seed():
    def order(seed):
        data = DriversData(hours=1000, seed=seed)
        data.setup("fit")
        return torch.cat([batch.future for batch in data.train_dataloader()])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_no_batch_of_one_window_is_trained_on():
    data = DriversData(hours=1000, batch_size=10)
    data.setup("fit")
    assert len(data.parts["train"]) == 581
    assert {len(batch.future) for batch in data.train_dataloader()} == {10}
    assert sum(len(batch.future) for batch in data.val_dataloader()) == len(data.parts["val"]) == 31


def test_the_fingerprint_is_of_the_data_and_not_of_the_training():
    prints = []
    for arguments in ({"seed": 1}, {"seed": 2}, {"generator_seed": 1}):
        data = DriversData(hours=1000, **arguments)
        data.setup("fit")
        prints.append(data.fingerprint["sha256"])
    assert prints[0] == prints[1] != prints[2]


# ---- baselines ----


def test_ridge_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((80, 7)) + 3, generator.standard_normal((80, 2)) - 5
    weight, intercept = ridge(torch.from_numpy(x), torch.from_numpy(y), penalty=2.5)
    expected = Ridge(alpha=2.5).fit(x, y)
    np.testing.assert_allclose(weight.T, expected.coef_, atol=1e-9)
    np.testing.assert_allclose(intercept, expected.intercept_, atol=1e-9)


def test_r_squared_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    actual = torch.randn(9, 5, 3, generator=generator, dtype=torch.float64) + 2
    predicted = actual + 0.4 * torch.randn(9, 5, 3, generator=generator, dtype=torch.float64)
    expected = r2_score(actual.reshape(-1, 3), predicted.reshape(-1, 3), multioutput="raw_values")
    np.testing.assert_allclose(r_squared(predicted, actual), expected, atol=1e-12)


def test_the_scores_are_those_of_scikit_learn_on_the_right_columns():
    data = DriversData(hours=1200)
    data.setup("fit")
    train, held_out = data.parts["train"].together(), data.parts["test"].together()
    scores = ridge_scores(data.parts["train"], data.parts["test"], data.edges)

    def score(m, seen, unseen):
        model = Ridge(alpha=100.0).fit(seen.flatten(1).double(), train.future[..., m].double())
        actual = held_out.future[..., m].double().flatten()
        return r2_score(actual, model.predict(unseen.flatten(1).double()).ravel())

    m, own = 2, data.edges.body[2].tolist()
    for name, seen, unseen in (
        ("history", train.history[..., m], held_out.history[..., m]),
        ("planted", train.drivers[:, :, own], held_out.drivers[:, :, own]),
        ("all", train.drivers, held_out.drivers),
    ):
        assert float(scores[name][m]) == pytest.approx(score(m, seen, unseen), abs=1e-6), name


def test_the_ceiling_is_what_the_signal_explains():
    data = DriversData(hours=3000, generator_seed=3)
    data.setup("fit")
    _, _, signal = planted_series(3000, 3)
    begin, end = bounds(3000, data.split)["test"]
    truth, found = [], []
    for i in range(end - begin - 119):
        now = slice(begin + i + 96, begin + i + 120)
        truth.append(data.series.targets[now])
        found.append(signal[now])
    expected = r2_score(np.concatenate(truth), np.concatenate(found), multioutput="raw_values")
    np.testing.assert_allclose(data.baselines("test")["ceiling"], expected, atol=1e-5)
    assert (data.baselines("test")["ceiling"] > 0.85).all()
    assert ceiling(data.parts["val"], data.parts["val"]).tolist() == [1.0] * 4


def test_baselines_come_in_the_order_that_the_construction_says():
    data = DriversData()
    data.setup("fit")
    scores = {name: float(r2.mean()) for name, r2 in data.baselines("test").items()}
    assert scores["history"] < 0.65 < scores["all"] < scores["planted"] < scores["ceiling"] < 0.95


# ---- a table of one's own ----


def table(tmp_path, text):
    path = tmp_path / "own.csv"
    path.write_text(text)
    return str(path)


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path):
    path = table(tmp_path, "y,date,b2,a1,a2,b1\n1,2024-01-01,4,1,2,3\n5,2024-01-02,8,5,6,7\n")
    series = read_table(path, {"a": ["a1", "a2"], "b": ["b1", "b2"]}, ["y"])
    assert series.drivers.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert series.targets.tolist() == [[1], [5]]
    assert (series.driver_names, series.target_names) == (("a", "b"), ("y",))
    assert read_table(path, ["a1", "b1"], ["y"]).drivers[..., 0].tolist() == [[1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("text", "drivers", "targets", "message"),
    [
        ("date,a\n", ["a"], ["y"], "must have the columns ['y'], got ['date', 'a']."),
        ("day,a,y\n", ["a"], ["y"], "must have the columns ['date'], got"),
        ("date,a,y\n", ["a"], [], "`targets` must name at least one column, got none."),
        ("date,a,y\n", [], ["y"], "`drivers` must name columns, as many for each driver, got none"),
        ("date,a,y\n", {"p": ["a"], "q": []}, ["y"], "as many for each driver, got {'p': 1, 'q': "),
        ("date,a,y\n1,nan,2\n", ["a"], ["y"], "finite numbers, got 'nan' in column `a`, line 2."),
        ("date,a,y\n1,2\n", ["a"], ["y"], "finite numbers, got None in column `y`, line 2."),
        ("date,a,y\n2,0,0\n1,0,0\n", ["a"], ["y"], "must rise from line to line"),
        ("date,a,y\n2,0,0\n2,0,0\n", ["a"], ["y"], "got '2' in line 3."),
    ],
)
def test_a_table_that_breaks_a_rule(tmp_path, text, drivers, targets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table(table(tmp_path, text), drivers, targets)


def test_own_data_have_baselines_without_truth(tmp_path):
    lines = [f"{hour:04d},{hour % 7},{(hour * 3) % 11}" for hour in range(300)]
    path = table(tmp_path, "\n".join(["date,a,y", *lines]))
    data = DriversData(path=path, drivers=["a"], targets=["y"], context=12, horizon=4)
    data.setup("fit")
    assert set(data.baselines("val")) == {"history", "all"}
    assert data.edges is None
    assert data.fingerprint["name"] == path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "x.csv"}, "`path`, `drivers` and `targets` must be given together, got x.csv"),
        ({"targets": ["y"]}, "`path`, `drivers` and `targets` must be given together, got None"),
        ({"hours": 0}, "`hours` must be at least 1, got 0."),
        ({"context": 0}, "`context` must be at least 1, got 0."),
        ({"batch_size": 1}, "`batch_size` must be at least 2, got 1."),
        ({"split": (0.5, 0.5)}, "`split` must be three positive shares of one, got [0.5, 0.5]."),
        ({"split": (0.9, 0.2, -0.1)}, "`split` must be three positive shares of one"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DriversData(**arguments)


def test_too_short_a_series_is_refused():
    with pytest.raises(ValueError, match=re.escape("`context` + `horizon` = 120 times, got 75")):
        DriversData(hours=500, split=(0.7, 0.15, 0.15)).setup("fit")


# ---- the tide ----

LEVELS = "Datetime,hourly_height:m\n2017-01-01 00:00:00,-0.128\n2017-01-01 01:00:00,0.103\n"


def archive(tmp_path, name="tappy-1.2.3/tests/8720218_wl.csv", text=LEVELS):
    path = tmp_path / "tappy-1.2.3.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        content = text.encode()
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return str(path)


def test_levels_are_read_from_the_file_and_from_the_archive(tmp_path):
    for path in (table(tmp_path, LEVELS), archive(tmp_path)):
        times, levels = read_levels(path)
        assert times == [datetime(2017, 1, 1, 0), datetime(2017, 1, 1, 1)]
        assert levels.tolist() == [-0.128, 0.103]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "must have the columns ['Datetime', 'hourly_height:m'], got ['a', 'b']."),
        (LEVELS + "2017-01-01 03:00:00,1\n", "levels an hour apart, got ['2017-01-01 03:00:00'"),
        (LEVELS + "2017-01-01 02:00:00,nan\n", "must have finite levels"),
        (LEVELS + "noon,1\n", "must have a time and a level in each line, got ['noon', '1'] in li"),
        (LEVELS + "\n", "must have a time and a level in each line, got [] in line 4."),
    ],
)
def test_levels_that_break_a_rule(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_levels(table(tmp_path, text))


def test_a_missing_archive_is_said_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(ValueError, match=r"pip download tappy==1\.2\.3 .*there is no file"):
        read_levels(str(tmp_path / "nothing.tar.gz"))
    with pytest.raises(ValueError, match=r"must be an archive that holds tests/8720218_wl\.csv"):
        read_levels(archive(tmp_path, name="other/file.csv"))
    (tmp_path / "odd.tar").write_text("no archive")
    with pytest.raises(ValueError, match="must be a CSV file or a tar archive"):
        read_levels(str(tmp_path / "odd.tar"))


def test_a_missing_ephem_is_said(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(tide_module, "import_module", absent)
    with pytest.raises(ImportError, match="need the package ephem: `pip install ephem`"):
        ephemerides([], ["Moon"])


def test_the_sun_comes_back_after_a_day_and_stands_highest_at_noon():
    pytest.importorskip("ephem")
    start = datetime(2017, 3, 20)  # the equinox: no declination
    times = [start + timedelta(hours=h) for h in range(48)]
    sun = ephemerides(times, ["Sun"])[:, 0]
    assert sun.shape == (48, 5)
    np.testing.assert_allclose(sun[24:], sun[:24], atol=0.05)
    slow, _, _, half_cos, half_sin = sun[:24].T
    np.testing.assert_allclose(slow, -0.5, atol=0.01)
    np.testing.assert_allclose(np.hypot(half_cos, half_sin), 1.0, atol=0.01)
    # local noon is at 12 h + 81.4 degrees / 15 + 7 minutes, and midnight 12 hours apart
    assert {int(h) % 12 for h in np.argsort(half_cos)[-2:]} <= {5, 6}


def test_the_moon_is_near_every_month():
    pytest.importorskip("ephem")
    times = [datetime(2017, 1, 1) + timedelta(hours=6 * h) for h in range(4 * 60)]
    moon = ephemerides(times, ["Moon"])[:, 0]
    ratio = np.hypot(moon[:, 3], moon[:, 4])
    assert ratio.max() / ratio.min() > 1.2


def test_a_body_that_ephem_does_not_know():
    pytest.importorskip("ephem")
    with pytest.raises(ValueError, match="`bodies` must be names that ephem knows, got 'Vulcan'"):
        ephemerides([datetime(2017, 1, 1)], ["Vulcan"])
    with pytest.raises(ValueError, match="`bodies` must name at least one body, got none"):
        TideData(bodies=[])


def test_the_tide_becomes_windows(tmp_path):
    pytest.importorskip("ephem")
    start = datetime(2017, 1, 1)
    lines = [f"{start + timedelta(hours=h)},{np.sin(h / 2):.3f}" for h in range(200)]
    path = table(tmp_path, "\n".join(["Datetime,hourly_height:m", *lines]))
    data = TideData(path=path, bodies=["Moon", "Sun"], context=12, horizon=6)
    data.setup("fit")
    window = data.parts["train"][0]
    assert window.drivers.shape == (12, 2, 5)
    assert window.future.shape == (6, 1)
    assert data.series.target_names == ("water_level",)
    assert set(data.baselines("val")) == {"history", "all"}
