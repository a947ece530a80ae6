"""The configuration of the recipe builds it, and repeats its defaults."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from recipes.drivers.data import DriversData
from recipes.drivers.model import DriversForecaster
from recipes.drivers.tide import TideData

CONF = Path(__file__).parents[2] / "conf"
DIAGNOSTICS = ["gradient_health", "wiring_check", "collapse_stop", "update_ratio"]
DIAGNOSTICS += ["component_profiler", "attention_capture", "health_alerts"]


def composed(experiment):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"])
    config.run_dir = "unused"
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:  # what the command fills in by looking at the machine
            config.hardware[key] = value
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize(
    ("experiment", "made"),
    [("drivers", DriversData), ("drivers_full", DriversData), ("drivers_tide", TideData)],
)
def test_an_experiment_builds_data_and_model_that_fit(experiment, made):
    config = composed(experiment)
    data = instantiate(config["data"], _convert_="all")
    model = instantiate(config["model"], _convert_="all")
    assert type(data) is made
    assert isinstance(model, DriversForecaster)
    assert model.sizes[3:] == (data.context, data.horizon)
    optimizer = model.optimizer(model.parameters())
    assert optimizer.defaults["lr"] == config["optimizer"]["lr"]
    assert config["name"] == experiment
    assert [name for name in config["callbacks"] if name in DIAGNOSTICS] == DIAGNOSTICS
    assert set(config["component_lrs"]) <= set(config["components"])


@pytest.mark.parametrize("experiment", ["drivers", "drivers_full", "drivers_tide"])
def test_the_names_of_keys_are_as_many_as_the_keys(experiment):
    config = composed(experiment)
    model = instantiate(config["model"], _convert_="all")
    names = config["callbacks"]["attention_capture"]["key_names"]
    assert len(names["fusion"]) == len(model.wave_patching_composer.place)
    assert len(names["celestial_to_target"]) == model.sizes[0]
    queries = config["callbacks"]["attention_capture"]["query_names"]["celestial_to_target"]
    assert len(queries) == model.sizes[2]
    if experiment == "drivers_tide":
        assert names["celestial_to_target"] == config["data"]["bodies"]


@pytest.mark.parametrize(
    ("file", "made", "wired"),
    [
        ("data/drivers.yaml", DriversData, {"batch_size", "num_workers", "pin_memory", "seed"}),
        ("data/drivers_tide.yaml", TideData, {"batch_size", "num_workers", "pin_memory", "seed"}),
        (
            "model/drivers.yaml",
            DriversForecaster,
            {"optimizer", "component_lrs", "context", "horizon"},
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
    for name in wired:
        assert written[name].startswith("${"), name
