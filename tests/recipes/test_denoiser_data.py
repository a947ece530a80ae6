"""The denoiser's data: exactly so many ones, everywhere as often, the same for the same seed."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recipes.denoiser.data import DenoiserData
from recipes.denoiser.stream import BatchKeys, NoisyStream, Rows, TwoHot, generator_of

SMALL = {"features": 12, "n_train": 70, "n_val": 30, "batch_size": 20}


def _data(**arguments):
    data = DenoiserData(**{**SMALL, **arguments})
    data.setup("fit")
    return data


def _epoch(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def _clean(batches):
    return torch.cat([batch.clean for batch in batches])


def _same(left, right):
    return all(
        torch.equal(a.noisy, b.noisy) and torch.equal(a.clean, b.clean)
        for a, b in zip(left, right, strict=True)
    )


@given(
    st.integers(1, 9).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d))),
    st.integers(0, 5),
)
@settings(max_examples=40)
def test_a_vector_has_exactly_so_many_ones(shape, seed):
    features, ones = shape
    clean = TwoHot(features, ones).take(seed, 0, 0, 50)
    assert clean.shape == (50, features)
    assert set(clean.unique().tolist()) <= {0.0, 1.0}
    assert (clean.sum(dim=1) == ones).all()


@pytest.mark.parametrize("ones", [1, 2, 3, 5])
def test_every_set_of_places_is_as_likely(ones):
    clean = TwoHot(6, ones).take(1, 0, 0, 30_000)
    codes = (clean @ 2 ** torch.arange(6.0)).long().tolist()
    sets = [sum(2**place for place in places) for places in combinations(range(6), ones)]
    counts = [codes.count(one) for one in sets]
    assert sum(counts) == 30_000
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_chi_square_sees_places_that_are_not_uniform():
    places = np.random.default_rng(0).integers(0, 6, 30_000) % 5
    assert stats.chisquare(np.bincount(places, minlength=6)).pvalue < 1e-4


def test_the_noise_is_gaussian_with_the_variance_given():
    batch = NoisyStream(TwoHot(40, 2), 5000, 5000, 0.005, 3)[0, 0]
    noise = (batch.noisy - batch.clean).double().flatten().numpy()
    # 200,000 numbers: the variance is known to 0.3 %
    assert abs(noise.var() / 0.005 - 1) < 0.015
    assert abs(noise.mean()) < 5 * (0.005 / len(noise)) ** 0.5
    assert stats.kstest(noise, "norm", args=(0, 0.005**0.5)).pvalue > 1e-4
    # apart from the ones too
    assert abs(np.corrcoef(noise, batch.clean.flatten().numpy())[0, 1]) < 0.02


def test_without_noise_the_vectors_are_clean():
    batch = _data(noise_variance=0.0).val_dataloader().dataset[0]
    assert torch.equal(batch.noisy, batch.clean)


def test_an_epoch_has_its_length_whatever_the_batch_size():
    batches = _epoch(_data(), 0)
    assert [len(batch.clean) for batch in batches] == [20, 20, 20, 10]
    assert len(_data().train_dataloader()) == 4
    assert [len(batch.clean) for batch in _data().val_dataloader()] == [20, 10]


def test_the_same_seed_gives_the_same_and_another_does_not():
    assert _same(_epoch(_data(), 3), _epoch(_data(), 3))
    assert not _same(_epoch(_data(), 3), _epoch(_data(), 4))
    assert not _same(_epoch(_data(), 3), _epoch(_data(seed=7), 3))


@pytest.mark.slow
def test_workers_make_the_same_batches_in_the_same_order():
    alone, several = _data(), _data(num_workers=2)
    loader = several.train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        assert _same(_epoch(alone, epoch), list(loader))


def test_no_vector_of_noise_comes_twice():
    data = _data(features=40, ones=2)
    batches = [*_epoch(data, 0), *_epoch(data, 1), *data.val_dataloader()]
    noise = torch.cat([batch.noisy - batch.clean for batch in batches])
    assert len(noise) == 170
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9


def test_validation_is_fixed_whatever_seed_and_batch_size():
    expected = _data().validation.vectors
    for other in ({"seed": 7}, {"batch_size": 7}):
        found = list(_data(**other).val_dataloader())
        assert torch.equal(torch.cat([batch.noisy for batch in found]), expected.noisy)
        assert torch.equal(_clean(found), expected.clean)
    assert not torch.equal(_data(val_seed=1).validation.vectors.clean, expected.clean)


def test_validation_is_no_part_of_the_training():
    data = _data(features=60, val_seed=42, seed=42, n_train=30, n_val=30, batch_size=30)
    (train,) = _epoch(data, 0)
    assert not torch.equal(train.clean, data.validation.vectors.clean)


def test_pytorchs_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    data = _data()
    _epoch(data, 0)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_differ_by_purpose_and_numbers():
    seeds = {
        generator_of(purpose, a, b).initial_seed()
        for purpose in ("noise", "places")
        for a in range(10)
        for b in range(-1, 10)
    }
    assert len(seeds) == 220


def test_devices_share_the_batches_of_an_epoch():
    stream = NoisyStream(TwoHot(12, 2), 80, 20, 0.0, 0)
    keys = [BatchKeys(stream, 2, rank) for rank in (0, 1)]
    for one in keys:
        one.set_epoch(5)
    assert [list(one) for one in keys] == [[(5, 0), (5, 2)], [(5, 1), (5, 3)]]


def test_the_fingerprint_is_that_of_the_data_and_not_of_the_seed():
    assert _data().fingerprint == _data(seed=7, batch_size=9).fingerprint
    assert _data().fingerprint != _data(val_seed=1).fingerprint
    assert _data().fingerprint != _data(noise_variance=0.1).fingerprint
    assert _data().fingerprint["samples"] == {"train": 70, "val": 30}


# ---- data of your own ----


def _table(rows=25, columns=12):
    return np.random.default_rng(1).uniform(0.5, 1.5, (rows, columns)).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    table = _table()
    np.save(tmp_path / "a.npy", table)
    np.savetxt(tmp_path / "b.csv", table, delimiter=",", fmt="%.9g")
    names = ",".join(f"x{i}" for i in range(12))
    np.savetxt(tmp_path / "c.csv", table, delimiter=",", fmt="%.9g", header=names, comments="")
    return tmp_path


@pytest.mark.parametrize("name", ["a.npy", "b.csv", "c.csv"])
def test_the_rows_of_a_file_are_split_and_seen_once_an_epoch(files, name):
    data = _data(path=str(files / name), n_val=5)
    seen = [_clean(_epoch(data, epoch)) for epoch in (0, 1)]
    fixed = data.validation.vectors.clean
    assert not torch.equal(*seen)
    for one in seen:
        rows = {tuple(row) for row in torch.cat([one, fixed]).tolist()}
        assert rows == {tuple(row) for row in _table().tolist()}
    assert data.fingerprint["sha256"] == _digest(data.stream.clean)
    assert data.fingerprint["samples"] == {"train": 20, "val": 5}


def _digest(rows):
    assert isinstance(rows, Rows)
    return hashlib.sha256(rows.table.numpy().tobytes()).hexdigest()


def test_the_noise_on_a_file_is_new_in_every_epoch(files):
    data = _data(path=str(files / "a.npy"), n_val=5)
    noise = []
    for epoch in (0, 1):
        batches = _epoch(data, epoch)
        order = _clean(batches)[:, 0].argsort()
        noise.append(torch.cat([batch.noisy - batch.clean for batch in batches])[order])
    assert not torch.allclose(*noise)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "1,2", r"`path` must end in \.npy or \.csv, got .*x\.txt\."),
        ("x.csv", "1,2\n", r"x\.csv must hold at least 2 rows of numbers, got shape \(1, 2\)\."),
        ("x.csv", "1,2\n3,4\n", r"`features` must be the number of columns of .*, 2, got 12\."),
        ("x.csv", "1,2\n3,b\n", r"x\.csv must hold numbers with commas between them: .*"),
        ("x.csv", "1,2\n3,4,5\n", r"x\.csv must hold numbers with commas between them: .*"),
        ("x.npy", "no array", r"x\.npy must be an array as `numpy\.save` writes it: .*"),
    ],
)
def test_a_file_that_breaks_a_rule_is_named_with_the_rule(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        _data(path=str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must be a file, got .*none\.npy\."):
        _data(path=str(tmp_path / "none.npy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * 0, r"must hold a number other than 0, got none\."),
        (
            lambda t: np.where(t == t[3, 2], np.nan, t),
            r"finite numbers alone, got another in row 4",
        ),
        (lambda t: t[0], r"must hold at least 2 rows of numbers, got shape \(12,\)\."),
        (lambda t: t.astype(str), r"must hold real numbers, got <U"),
        (lambda t: t.astype(object), r"must be an array as `numpy\.save` writes it"),
        (lambda t: t[:5], r"`n_val` must be less than the rows of .*, 5, got 5\."),
    ],
)
def test_an_array_that_breaks_a_rule_is_named_with_the_rule(tmp_path, change, message):
    np.save(tmp_path / "x.npy", change(_table()))
    with pytest.raises(ValueError, match=message):
        _data(path=str(tmp_path / "x.npy"), n_val=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, r"`features` must be at least 1, got 0\."),
        ({"ones": 0}, r"`ones` must be at least 1, got 0\."),
        ({"ones": 13}, r"`ones` must be at most `features`, 12, got 13\."),
        ({"n_train": 0}, r"`n_train` must be at least 1, got 0\."),
        ({"n_val": 0}, r"`n_val` must be at least 1, got 0\."),
        ({"batch_size": 0}, r"`batch_size` must be at least 1, got 0\."),
        ({"noise_variance": -0.1}, r"`noise_variance` must be at least 0, got -0\.1\."),
    ],
)
def test_an_argument_that_breaks_a_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenoiserData(**{**SMALL, **arguments})
