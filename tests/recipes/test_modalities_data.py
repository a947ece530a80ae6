"""Views, splits, and the folders that people bring."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from recipes.modalities.data import ModalitiesData, digit_views
from recipes.modalities.folder import read_folder
from recipes.modalities.views import VIEWS
from recipes.modalities.xor import XorData, xor_views

SIZES = {"left": 32, "right": 32, "spectrum": 40, "gradients": 32, "profiles": 16, "moments": 15}


def ready(data):
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_digits().images


@pytest.fixture(scope="module")
def data() -> ModalitiesData:
    return ready(ModalitiesData())


class TestViews:
    def test_sizes(self, digits):
        assert {name: view(digits).shape for name, view in VIEWS.items()} == {
            name: (1797, size) for name, size in SIZES.items()
        }

    def test_halves_are_the_image(self, digits):
        halves = [VIEWS[side](digits).reshape(-1, 8, 4) for side in ("left", "right")]
        assert np.array_equal(np.concatenate(halves, axis=2), digits)

    def test_the_spectrum_loses_the_place(self, digits):
        moved = np.roll(digits, (1, 2), axis=(1, 2))
        np.testing.assert_allclose(VIEWS["spectrum"](moved), VIEWS["spectrum"](digits), atol=1e-9)
        turned = digits[:, ::-1, ::-1]
        np.testing.assert_allclose(VIEWS["spectrum"](turned), VIEWS["spectrum"](digits), atol=1e-9)
        assert np.abs(VIEWS["moments"](moved) - VIEWS["moments"](digits)).max() > 0.1

    def test_gradients_of_a_ramp(self):
        ramp = np.broadcast_to(np.arange(8.0), (1, 8, 8))
        cells = VIEWS["gradients"](ramp).reshape(2, 2, 8)
        # 16 pixels a quarter, all rising to the right by one
        assert cells[..., 0].tolist() == [[4, 4], [4, 4]]
        assert not cells[..., 1:].any()
        fall = VIEWS["gradients"](np.swapaxes(ramp, 1, 2)[:, ::-1]).reshape(2, 2, 8)
        assert fall[..., 6].tolist() == [[4, 4], [4, 4]]

    def test_profiles_are_sums(self, digits):
        found = VIEWS["profiles"](digits)
        assert np.array_equal(found[:, :8], digits.sum(2))
        assert np.array_equal(found[:, 8:], digits.sum(1))

    def test_moments_of_a_bar(self):
        image = np.zeros((1, 8, 8))
        image[0, 2, 1:6] = 2.0
        mass, x, y, second, mixed, down = VIEWS["moments"](image)[0, :6]
        assert (mass, x, y) == (10, 3, 2)
        assert second == pytest.approx(np.sqrt(2))  # of -2, -1, 0, 1, 2
        assert (mixed, down) == (0, 0)

    def test_an_empty_image(self):
        for view in VIEWS.values():
            assert np.isfinite(view(np.zeros((1, 8, 8)))).all()

    def test_no_view_is_a_copy_of_another(self):
        """Linear regression of one view on another leaves something, for every pair."""
        views, _ = digit_views()
        for a, b in itertools.permutations(views, 2):
            x = np.c_[views[a], np.ones(len(views[a]))]
            y = views[b][:, views[b].std(0) > 0]
            left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
            assert left.var(0).sum() > 0.05 * y.var(0).sum(), (a, b)


class TestDigits:
    def test_splits_are_whole_disjoint_and_stratified(self, data):
        assert {split: len(one) for split, one in data.datasets.items()} == {
            "train": 1257,
            "val": 180,
            "test": 360,
        }
        rows = torch.cat([one.views[0] for one in data.datasets.values()])
        pairs = torch.cat([rows, torch.cat([one.views[1] for one in data.datasets.values()])], 1)
        assert len(pairs.unique(dim=0)) == 1797
        shares = [one.label.bincount() / len(one) for one in data.datasets.values()]
        for share in shares:
            assert (share - 0.1).abs().max() < 0.012

    def test_training_statistics_alone(self, data):
        for view in data.datasets["train"].views:
            assert view.mean(0).abs().max() < 1e-5
            deviation = view.std(0, correction=0)
            # pixels that are never inked stay zero
            assert (((deviation - 1).abs() < 1e-4) | (deviation == 0)).all()
        others = data.datasets["test"].views[2]
        assert others.mean(0).abs().max() > 1e-3
        assert others.isfinite().all()

    def test_the_training_seed_changes_the_order_and_nothing_else(self, data):
        other = ready(ModalitiesData(seed=7))
        assert other.fingerprint == data.fingerprint
        assert torch.equal(other.datasets["val"].views[3], data.datasets["val"].views[3])
        orders = [next(iter(one.train_dataloader())).label for one in (data, other)]
        assert not torch.equal(*orders)
        again = next(iter(ready(ModalitiesData(seed=7)).train_dataloader()))
        assert torch.equal(again.label, orders[1])

    def test_another_split_seed(self, data):
        other = ready(ModalitiesData(split_seed=1))
        assert not torch.equal(other.datasets["val"].label, data.datasets["val"].label)

    def test_nobody_touches_the_global_random_numbers(self):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        ready(ModalitiesData())
        ready(XorData(samples=64))
        assert torch.equal(torch.get_rng_state(), state)
        assert np.random.get_state()[1].tolist() == numpy_state

    @pytest.mark.parametrize("n_views", [2, 4, 6])
    def test_fewer_views(self, n_views):
        data = ready(ModalitiesData(n_views=n_views))
        assert data.view_sizes == dict(list(SIZES.items())[:n_views])
        assert len(next(iter(data.val_dataloader())).views) == n_views

    def test_galleries_have_one_size(self, data):
        assert [len(batch.label) for batch in data.test_dataloader()] == [180, 180]
        assert [len(batch.label) for batch in data.train_dataloader()] == [128] * 9
        small = ready(ModalitiesData(gallery_size=1000))
        assert [len(batch.label) for batch in small.test_dataloader()] == [360]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_views": 1}, "`n_views` must be at least 2 and at most 6, got 1"),
            ({"n_views": 7}, "`n_views` must be at least 2 and at most 6, got 7"),
            ({"val_share": 0.5, "test_share": 0.5}, "leave something to train on, got 0.5 and 0.5"),
            ({"val_share": 0.0}, "`val_share` and `test_share` must be above 0"),
            ({"batch_size": 1}, "`batch_size` must be at least 2, got 1"),
            ({"gallery_size": 1}, "`gallery_size` must be at least 2, got 1"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ModalitiesData(**arguments)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        rng = np.random.default_rng(0)
        label = rng.integers(0, 3, 60)
        table = np.c_[rng.normal(size=(60, 2)), label]
        lines = ["x,y,label", *(",".join(map(str, row)) for row in table)]
        (tmp_path / "b.sound.csv").write_text("\n".join(lines))
        np.save(tmp_path / "a.npy", rng.normal(size=(60, 5)).astype(np.float32))
        (tmp_path / "notes.txt").write_text("not a view")
        return tmp_path

    def test_views_and_labels(self, folder):
        views, label = read_folder(folder)
        assert {name: view.shape for name, view in views.items()} == {
            "a": (60, 5),
            "b.sound": (60, 2),
        }
        assert set(label) == {0, 1, 2}

    def test_a_data_module(self, folder):
        data = ready(ModalitiesData(folder=str(folder), batch_size=8, gallery_size=10))
        assert data.view_sizes == {"a": 5, "b.sound": 2}
        assert data.fingerprint["name"] == folder.name
        assert sum(data.fingerprint["samples"].values()) == 60
        assert set(data.datasets["test"].label.tolist()) == {0, 1, 2}
        for view in data.datasets["train"].views:
            assert view.std(0, correction=0).tolist() == pytest.approx([1] * view.shape[1])

    def test_labels_of_their_own_and_none(self, folder):
        _, label = read_folder(folder)
        np.save(folder / "label.npy", label)
        assert np.array_equal(read_folder(folder)[1], label)
        (folder / "b.sound.csv").unlink()
        np.save(folder / "c.npy", np.ones((60, 1)))
        assert np.array_equal(read_folder(folder)[1], label)
        (folder / "label.npy").unlink()
        assert read_folder(folder)[1] is None
        data = ready(ModalitiesData(folder=str(folder)))
        assert set(data.datasets["train"].label.tolist()) == {-1}
        # a number that never varies is no reason to divide by zero
        assert not data.datasets["train"].views[1].any()

    def test_classes_too_small_to_be_in_every_split(self, folder):
        np.save(folder / "label.npy", np.arange(60))
        (folder / "b.sound.csv").write_text("x\n" + "1\n2\n" * 30)
        assert len(ready(ModalitiesData(folder=str(folder))).datasets["train"]) == 42

    def test_pickles_are_not_loaded(self, folder):
        np.save(folder / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"c\.npy: the file must be a plain numeric array"):
            read_folder(folder)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("c.csv", "x\n1\n", r"must have the same number of rows, got \{'a': 60.*'c': 1"),
            ("c.csv", "x,y\n1\n", r"c\.csv, line 2: the line must have 2 fields, got 1\."),
            ("c.csv", "x\none\n", r"c\.csv, line 2: fields must be numbers, could not convert"),
            ("c.csv", "1,2\n3,4\n", r"c\.csv: the first line must name the columns, got"),
            ("c.csv", "label,x,label\n", r"c\.csv: there must be one column `label`, it has 2\."),
            ("c.csv", "x\n" + "nan\n" * 60, "numbers must be finite, view `c` row 0 is not"),
            ("c.csv", "x,label\n" + "1,9\n" * 60, r"labels must agree, b\.sound\.csv and c\.csv"),
            ("c.npy", np.ones(60), r"c\.npy: the array must be \(rows, features\), got \(60,\)"),
            ("c.npy", np.array(["a"]), r"c\.npy: the array must be numeric, got <U1"),
            ("c.npy", np.ones((60, 0)), "view `c` must hold rows and columns, it is empty"),
            ("label.npy", np.ones((60, 1)), "labels must have one dimension, got 2"),
            ("a.csv", "x\n" + "1\n" * 60, "a view must have one file, `a` has two"),
        ],
    )
    def test_errors(self, folder, name, content, message):
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            np.save(folder / name, content)
        with pytest.raises(ValueError, match=message):
            read_folder(folder)

    def test_labels_are_whole_numbers(self, folder):
        (folder / "b.sound.csv").write_text("x,label\n" + "1,0.5\n" * 60)
        with pytest.raises(ValueError, match=r"labels must be whole numbers, got 0\.5"):
            read_folder(folder)

    def test_no_folder_and_too_few_files(self, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"`folder` must be a folder of CSV or \.npy"):
            read_folder(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="at most the number of files, 2, got 3"):
            ready(ModalitiesData(folder=str(folder), n_views=3))
        (folder / "a.npy").unlink()
        with pytest.raises(ValueError, match=r"at least 2 views, found \['b\.sound'\]"):
            read_folder(folder)


class TestXor:
    @pytest.mark.parametrize("n_views", [3, 5, 8])
    def test_the_last_is_the_exclusive_or(self, n_views):
        *free, last = xor_views(50, n_views, 4, torch.Generator().manual_seed(0))
        assert len(free) == n_views - 1
        want = np.bitwise_xor.reduce([x.numpy().astype(int) for x in free])
        assert np.array_equal(last.numpy(), want)

    def test_no_pair_shows_anything_and_all_three_do(self):
        views = xor_views(20_000, 3, 4, torch.Generator().manual_seed(0))
        signs = [2 * x - 1 for x in views]
        for a, b in itertools.combinations(signs, 2):
            assert ((a.T @ b) / len(a)).abs().max() < 0.03
        assert (signs[0] * signs[1] * signs[2] == -1).all()

    def test_data(self):
        data = ready(XorData(n_views=4, bits=5, samples=96, gallery_size=32, batch_size=16))
        again = ready(XorData(n_views=4, bits=5, samples=96, gallery_size=32, seed=1))
        other = ready(XorData(n_views=4, bits=5, samples=96, gallery_size=32, data_seed=1))
        assert data.view_sizes == {f"view_{k}": 5 for k in range(4)}
        assert {split: len(one) for split, one in data.datasets.items()} == {
            "train": 96,
            "val": 32,
            "test": 32,
        }
        train = [one.datasets["train"].views[3] for one in (data, again, other)]
        assert torch.equal(train[0], train[1])
        assert not torch.equal(train[0], train[2])
        assert data.fingerprint == again.fingerprint != other.fingerprint

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_views": 2}, "`n_views` must be at least 3, got 2"),
            ({"bits": 0}, "`bits` must be at least 1, got 0"),
            ({"samples": 1}, "`samples` must be at least 2, got 1"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            XorData(**arguments)
