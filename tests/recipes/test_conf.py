"""The configuration of the recipe builds it, and repeats its defaults."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_diag import Components
from recipes.code.data import CodeData
from recipes.code.model import CodeTransformer

CONF = Path(__file__).parents[2] / "conf"


def _composed(experiment: str, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides])
    config.run_dir = "unused"
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:  # what the command fills in by looking at the machine
            config.hardware[key] = value
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", ["code_transformer", "code_transformer_full"])
def test_an_experiment_builds_data_and_model(experiment):
    config = _composed(experiment, "seed=7")
    data = instantiate(config["data"], _convert_="all")
    model = instantiate(config["model"], _convert_="all")
    assert isinstance(data, CodeData)
    assert isinstance(model, CodeTransformer)
    assert data.seed == 7
    assert data.vocabulary_size == model.embedding.token.num_embeddings
    optimizer = model.optimizer(model.parameters())
    assert optimizer.defaults["lr"] == config["model"]["optimizer"]["lr"]
    assert config["components"] is None


@pytest.mark.parametrize(("name", "made"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_another_optimizer(name, made):
    model = instantiate(_composed("code_transformer", f"optimizer={name}")["model"])
    assert type(model.optimizer(model.parameters())) is made


def test_the_finer_components_take_every_parameter():
    patterns = _composed("code_transformer", "components=code_transformer")["components"]
    assignment = Components(patterns).assign(CodeTransformer(layers=2))
    assert assignment.names == ["embedding", "attention", "feed_forward", "norm", "head"]
    assert all(assignment.parameters.values())
    assert assignment.notes == []


def test_the_default_components_are_none():
    assert _composed("code_transformer", "components=default")["components"] is None


@pytest.mark.parametrize(
    ("file", "made", "wired"),
    [
        ("data/code.yaml", CodeData, {"batch_size", "num_workers", "pin_memory", "seed"}),
        (
            "model/code_transformer.yaml",
            CodeTransformer,
            {"optimizer", "component_lrs", "components", "vocabulary_size"},
        ),
    ],
)
def test_the_yaml_repeats_the_arguments_and_their_defaults(file, made, wired):
    written = OmegaConf.to_container(OmegaConf.load(CONF / file), resolve=False)
    assert written.pop("_target_") == f"{made.__module__}.{made.__name__}"
    taken = inspect.signature(made).parameters
    assert set(written) == set(taken)
    for name in set(written) - wired:
        default = taken[name].default
        assert written[name] == (list(default) if isinstance(default, tuple) else default), name
