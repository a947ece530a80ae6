"""The configuration of the recipe builds it, and repeats its defaults."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_diag import Components
from recipes.modalities.data import ModalitiesData
from recipes.modalities.model import ViewContrast
from recipes.modalities.xor import XorData

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = ["modalities", "modalities_full", "modalities_xor", "modalities_starved"]


def _composed(experiment: str, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides])
    config.run_dir = "unused"
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:  # what the command fills in by looking at the machine
            config.hardware[key] = value
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_builds_data_and_model(experiment):
    config = _composed(experiment, "seed=7")
    data = instantiate(config["data"], _convert_="all")
    model = instantiate(config["model"], _convert_="all")
    assert isinstance(data, XorData if experiment == "modalities_xor" else ModalitiesData)
    assert isinstance(model, ViewContrast)
    assert data.seed == model.seed == 7
    optimizer = model.optimizer(model.temperature.parameters())
    assert optimizer.defaults["lr"] == config["optimizer"]["lr"]
    assert (config["monitor"], config["monitor_mode"]) == ("val_recall_1", "max")


def test_the_components_are_the_encoders():
    config = _composed("modalities_starved")
    data, model = (instantiate(config[key], _convert_="all") for key in ("data", "model"))
    data.setup("fit")
    built = ViewContrast(view_sizes=data.view_sizes)
    assignment = Components(config["components"]).assign(built)
    assert assignment.names == [*data.view_sizes, "temperature"]
    assert all(assignment.parameters.values())
    assert assignment.notes == []
    assert model.length == "unit"


@pytest.mark.parametrize(
    ("file", "made", "wired"),
    [
        (
            "data/modalities.yaml",
            ModalitiesData,
            {"batch_size", "num_workers", "pin_memory", "seed"},
        ),
        ("data/modalities_xor.yaml", XorData, {"batch_size", "num_workers", "pin_memory", "seed"}),
        ("model/modalities.yaml", ViewContrast, {"optimizer", "component_lrs", "seed"}),
    ],
)
def test_the_yaml_repeats_the_arguments_and_their_defaults(file, made, wired):
    written = OmegaConf.to_container(OmegaConf.load(CONF / file), resolve=False)
    assert written.pop("_target_") == f"{made.__module__}.{made.__name__}"
    taken = inspect.signature(made).parameters
    assert set(written) == set(taken)
    for name in set(written) - wired:
        assert written[name] == taken[name].default, name
