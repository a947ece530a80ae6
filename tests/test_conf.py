"""Every configuration file composes, and builds what it names."""

import inspect
import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_diag import suite
from lightning_diag.callbacks import Diagnostic
from lightning_diag.lightning import Callback, Logger, Trainer
from lightning_diag.spelling import locate, unknown_arguments
from lightning_diag.suites import SUITES

CONF = Path(__file__).parents[1] / "conf"
# lists of callbacks, beside the files of one callback each
PRESETS = ("default", *SUITES)


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


SINGLE = [name for name in names("callbacks") if name not in PRESETS]


def composed(run_dir, *overrides):
    """The configuration without data and model, as plain values."""
    given = ["~data", "~model", "~optimizer", f"run_dir='{run_dir}'", *overrides]
    with initialize_config_module("lightning_diag.conf", version_base="1.3"):
        config = compose("train", given)
    return OmegaConf.to_container(config, resolve=True)


def arguments(node):
    return {key: value for key, value in node.items() if not key.startswith("_")}


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_opens_with_one_comment_that_says_what_it_is(path):
    header = list(itertools.takewhile(lambda line: line.startswith("#"), path.open()))
    assert len([line for line in header if not line.startswith("# @package ")]) == 1


@pytest.mark.parametrize("name", SINGLE)
def test_a_callback_builds_under_its_own_name(tmp_path, name):
    nodes = composed(tmp_path, f"callbacks=[{name}]")["callbacks"]
    assert list(nodes) == [name]
    assert not list(unknown_arguments(nodes))
    assert isinstance(instantiate(nodes[name], _convert_="all"), Callback)


@pytest.mark.parametrize("name", SINGLE)
def test_a_callback_lists_its_arguments_a_diagnostic_all_with_pythons_defaults(tmp_path, name):
    node = composed(tmp_path, f"callbacks=[{name}]")["callbacks"][name]
    parameters = inspect.signature(locate(node["_target_"])).parameters
    assert arguments(node).keys() <= parameters.keys()
    if not node["_target_"].startswith("lightning_diag.lightning."):
        assert arguments(node) == {key: value.default for key, value in parameters.items()}


@pytest.mark.parametrize("name", SUITES)
def test_a_preset_is_the_suite_of_its_name_and_what_every_run_needs(tmp_path, name):
    nodes = composed(tmp_path, f"callbacks={name}")["callbacks"]
    built = [instantiate(node, _convert_="all") for node in nodes.values()]
    diagnostics = [type(one).__name__ for one in built if isinstance(one, Diagnostic)]
    assert diagnostics == [type(one).__name__ for one in suite(name)] == list(SUITES[name])
    rest = [key for key in nodes if key.startswith(("checkpoint", "lr_"))]
    assert rest == ["checkpoint_best", "checkpoint_last", "checkpoint_steps", "lr_monitor"]
    assert len(rest) + len(diagnostics) == len(nodes)


def test_callbacks_combine_in_the_order_given(tmp_path):
    nodes = composed(tmp_path, "callbacks=[lr_monitor,gradient_health]")["callbacks"]
    assert list(nodes) == ["lr_monitor", "gradient_health"]


def test_components_reach_the_diagnostics(tmp_path):
    parts = "+components={encoder:[net.encoder.*]}"
    node = composed(tmp_path, parts)["callbacks"]["gradient_health"]
    assert node["components"] == {"encoder": ["net.encoder.*"]}


def test_the_three_checkpoints_live_together(tmp_path, quiet):
    nodes = composed(tmp_path)["callbacks"]
    kept = [
        instantiate(node, _convert_="all")
        for key, node in nodes.items()
        if key.startswith("checkpoint")
    ]
    Trainer(**{**quiet, "enable_checkpointing": True}, callbacks=kept, logger=False)
    assert len(kept) == 3
    assert {str(callback.dirpath) for callback in kept} == {str(tmp_path / "checkpoints")}


@pytest.mark.parametrize("name", [name for name in names("logger") if name != "default"])
def test_a_logger_builds_under_its_own_name_and_writes_into_the_run(tmp_path, name):
    if name == "wandb":
        pytest.importorskip("wandb")
    nodes = composed(tmp_path, f"logger=[{name}]")["logger"]
    assert list(nodes) == [name]
    logger = instantiate(nodes[name], _convert_="all")
    assert isinstance(logger, Logger)
    assert Path(logger.save_dir).is_relative_to(tmp_path)


def test_the_run_logger_comes_first_since_the_others_follow_its_folder(tmp_path):
    assert list(composed(tmp_path)["logger"]) == ["run", "tensorboard"]


@pytest.mark.parametrize("name", names("trainer"))
@pytest.mark.parametrize("hardware", names("hardware"))
def test_a_trainer_builds(tmp_path, name, hardware):
    chosen = [f"trainer={name}", f"hardware={hardware}", "hardware.accelerator=cpu"]
    chosen += ["hardware.devices=1", "hardware.precision=32-true", "hardware.accumulate=3"]
    node = composed(tmp_path, *chosen)["trainer"]
    trainer = instantiate(node, _convert_="all", logger=False, enable_checkpointing=False)
    assert trainer.accumulate_grad_batches == 3
    assert trainer.gradient_clip_val == 1.0
    assert trainer.default_root_dir == str(tmp_path)
    assert trainer.limit_train_batches == (4 if name == "quick" else 1.0)


@pytest.mark.parametrize("hardware", names("hardware"))
def test_hardware_names_the_fields_of_the_settings(tmp_path, hardware):
    fields = inspect.signature(locate("lightning_diag.tuning.hardware.Settings")).parameters
    assert list(composed(tmp_path, f"hardware={hardware}")["hardware"]) == list(fields)


@pytest.mark.parametrize("name", names("experiment"))
def test_an_experiment_names_only_what_exists(tmp_path, name):
    with initialize_config_module("lightning_diag.conf", version_base="1.3"):
        config = compose("train", [f"experiment={name}", f"run_dir='{tmp_path}'"])
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert list(unknown_arguments(plain)) == []
    assert plain["name"] != "train"


def test_runs_never_share_a_folder():
    with initialize_config_module("lightning_diag.conf", version_base="1.3"):
        config = compose("train", ["~data", "~model", "~optimizer"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    assert hydra["run"]["dir"] == "${run_dir}"
    assert config.run_dir.startswith("runs/train/")
    assert len(config.run_dir.rpartition("-")[2]) == 6  # microseconds
    assert hydra["sweep"]["dir"].endswith("-%f}")
    assert hydra["sweep"]["subdir"] == "${hydra:job.num}"
