"""A run's experiment as text: only what differs, in order, with the reason of each change."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_diag.report.experiment import difference, experiment_yaml, not_taken_away
from lightning_diag.rules import Finding
from lightning_diag.rules.repair import Change

BASE = {
    "seed": 42,
    "run_dir": "runs/${name}",
    "optimizer": {"lr": 1e-3},
    "model": {"optimizer": "${optimizer}", "width": 4},
    "callbacks": {"a": {"x": 1}, "b": {"y": 2}},
    "rules": None,
}


def laid(base, over):
    """What Hydra makes of an experiment over its groups."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = laid(result[key], value) if both else value
    return result


def test_difference_by_hand():
    config = {
        "seed": 7,
        "run_dir": "elsewhere",
        "optimizer": {"lr": 3},
        "model": {"optimizer": "${optimizer}", "width": 4, "depth": [1]},
        "callbacks": {"a": {"x": 1}},
    }
    assert difference(BASE, config) == {
        "seed": 7,
        "optimizer": {"lr": 3},
        "model": {"depth": [1]},
        "callbacks": {"b": None},
    }
    assert not_taken_away(BASE, config) == []
    assert not_taken_away(BASE, {**config, "model": {}}) == ["model.optimizer", "model.width"]


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.just(1))
)
trees = st.recursive(
    leaves, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1), max_leaves=8
)
configs = st.dictionaries(st.sampled_from("abcd"), trees)


@given(configs, configs)
def test_the_difference_laid_over_the_base_is_the_configuration(base, other):
    config = laid(base, other)  # a configuration that lacks nothing of its base
    assert laid(base, difference(base, config)) == config
    assert difference(base, base) == {}


def change(path, before, value, **more):
    return Change(path, before, value, Finding("loss_spike", "warning", **more))


def test_text_by_hand():
    made = [
        change(("optimizer", "lr"), 3.0, 9e-5, first_step=20),
        change(("component_lrs", "net.body"), None, 1.0, component="net.body\nx"),
    ]
    text = experiment_yaml(
        {"data": "tiny", "callbacks": ["a", "b"], "extra": None},
        ["extra"],
        {"name": "mine", "optimizer": {"lr": 3.0, "betas": [0.9, "${x}"]}, "empty": {}},
        made,
        title="Two\nlines",
        kept=["model.width"],
    )
    assert (
        text
        == """\
# @package _global_
# Two lines
# The run did not have `model.width`, which comes back with its group.
defaults:
  - /extra: null
  - override /data: tiny
  - override /callbacks: [a, b]

name: mine
optimizer:
  # was 3.0; loss_spike, whole model, since step 20
  lr: 9.0e-05
  betas: [0.9, '${x}']
empty: {}
component_lrs:
  # was null; loss_spike, net.body x
  net.body: 1.0
"""
    )


@given(configs)
def test_the_body_reads_back(body):
    text = experiment_yaml({}, [], body, [], title="t")
    read = yaml.safe_load(text) or {}
    read.pop("defaults")
    assert read == body


WORDS = ["1e-3", "1e3", "-2E5", "1_0", ".5", "0x1F", "1:30", "2020-01-01", "on", "~", "a\x1bb"]


@pytest.mark.parametrize("word", [*WORDS, "32-true", "v1.2.3", "a,b]", "{a: b}", "- a", "é"])
def test_a_word_is_a_word_to_hydra_too(word):
    """Which reads more words as numbers than PyYAML does."""
    text = experiment_yaml({}, [], {"key": word, "many": [word]}, [], title="t")
    read = OmegaConf.create(text)
    assert (read["key"], read["many"]) == (word, [word])


@pytest.mark.parametrize("number", [1e-3, 1e-5, -2e5, 3, 1e300, 0.1])
def test_a_number_is_a_number_to_hydra_too(number):
    read = OmegaConf.create(experiment_yaml({}, [], {"key": number}, [], title="t"))
    assert read["key"] == number
    assert type(read["key"]) is type(number)


HOSTILE = "a\x1b[31m\x00\n- evil: 1\u2028#'\"${oc.env:HOME}<b>"


def test_hostile_names_stay_names():
    made = [change(("component_lrs", HOSTILE), HOSTILE, 2.0, component=HOSTILE)]
    groups = {"data": HOSTILE, f"x@{HOSTILE}": "a"}
    kept = [f"model.{HOSTILE}"]
    text = experiment_yaml(groups, [f"x@{HOSTILE}"], {}, made, title=HOSTILE, kept=kept)
    assert yaml.safe_load(text) == {
        "defaults": [{f"/x@{HOSTILE}": "a"}, {"override /data": HOSTILE}],
        "component_lrs": {HOSTILE: 2.0},
    }


def test_a_change_inside_of_what_an_interpolation_stands_for_keeps_the_rest():
    body = {"mine": {"a": 1.0, "b": 2.0}, "component_lrs": "${mine}"}
    made = [change(("component_lrs", "a"), 1.0, 0.5)]
    config = {"mine": body["mine"], "component_lrs": {"a": 1.0, "b": 2.0}}
    read = yaml.safe_load(experiment_yaml({}, [], body, made, title="t", config=config))
    assert read["component_lrs"] == {"a": 0.5, "b": 2.0}
    assert read["mine"] == config["component_lrs"] == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("value", ["a: b\n# c", "'", '"', "null", "3", "${a.b}", "é\u2028"])
def test_odd_words_read_back(value):
    text = experiment_yaml({}, [], {"key": value, value: 1}, [], title="t")
    assert yaml.safe_load(text) == {"defaults": None, "key": value, value: 1}


def test_a_number_of_another_kind_is_another_value():
    assert difference({"a": 1, "b": 1}, {"a": 1.0, "b": True}) == {"a": 1.0, "b": True}
