import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.spelling import (
    did_you_mean,
    leaf_keys,
    locate,
    nearest,
    takes,
    unknown_arguments,
)

KEYS = ["seed", "optimizer", "optimizer.lr", "model.dropout", "callbacks.gradient_health"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("optimiser.lr", "optimizer.lr"),
        ("optimizer.rl", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("sed", "seed"),
        ("callbacks.gradient_helth", "callbacks.gradient_health"),
        ("quite_another_thing", None),
        ("optimizer.quite_another_thing", None),
    ],
)
def test_nearest(written, meant):
    assert nearest(written, KEYS) == meant


@given(st.sampled_from(KEYS))
def test_the_nearest_to_a_right_name_is_itself(key):
    assert nearest(key, KEYS) == key


def test_without_a_near_name_all_are_listed():
    assert did_you_mean("quite_another_thing", ["b", "a"]) == "there are a, b."
    assert did_you_mean("x", []) == "there are none."


def test_takes_knows_arguments_that_the_configuration_leaves_out():
    tree = {"a": {"b": {"_target_": "torch.optim.SGD", "lr": 1}, "c": {"_target_": "no.such"}}}
    assert takes(tree, "a.b.momentum") == "torch.optim.SGD"
    for key in ("a.b.momentun", "a.c.momentum", "a.momentum", "momentum", "x.y.z"):
        assert takes(tree, key) is None


def test_leaf_keys_name_inner_nodes_too():
    tree = {"a": {"b": {"c": 1}, "d": []}, "e": None}
    assert list(leaf_keys(tree)) == ["a", "a.b", "a.b.c", "a.d", "e"]


def test_locate_finds_modules_and_what_is_in_them():
    import os.path

    assert locate("os.path.join") is os.path.join
    assert locate("os.path") is os.path


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("os.path.jion", AttributeError, r"^`os.path` has no `jion`; did you mean `os.path.join`"),
        ("os.path.qqqq", AttributeError, r"^`os.path` has no `qqqq`; check the path\.$"),
        ("no_such_package.x", ModuleNotFoundError, "no_such_package"),
    ],
)
def test_locate_says_what_is_missing(path, error, message):
    with pytest.raises(error, match=message):
        locate(path)


def test_locate_passes_on_a_missing_dependency_of_a_module(tmp_path, monkeypatch):
    package = tmp_path / "half_there"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text("import a_dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        locate("half_there.inner")


def test_unknown_arguments_are_found_at_any_depth():
    node = {
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "_partial_": True,
            "lr": 1,
            "weight_deca": 0,
        },
        "list": [{"_target_": "torch.nn.Liner"}],
        "free": {"_target_": "builtins.dict", "anything": 1},
        "plain": {"weight_deca": 0},
    }
    assert list(unknown_arguments(node)) == [
        "`optimizer.weight_deca` is no argument of `torch.optim.AdamW`; "
        "did you mean `weight_decay`?",
        "`list[0]` names `torch.nn.Liner`, which cannot be imported: "
        "`torch.nn` has no `Liner`; did you mean `torch.nn.Linear`?",
    ]
