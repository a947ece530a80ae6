"""`lightning-diag report --apply` and `--threshold`, on runs that Hydra made and on others."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from typer.testing import CliRunner

import lightning_diag.rules  # noqa: F401 - enters the rules into the registry
from lightning_diag import read_run
from lightning_diag.cli import app
from lightning_diag.commands.overrides import experiment_files
from lightning_diag.rules import RULES
from lightning_diag.rules.remedies import calm_steps

APP = Path(__file__).parents[1] / "tiny_app"
LOUD = {"exploding_gradient": {"max_l2": 2.0}}
NAMED = ["--threshold", "exploding_gradient.max_l2=2"]


def grad(norms):
    return [
        {"step": step, "epoch": 0, "time": 0.0, "attempt": 1, "component": component, "l2": norm}
        | {"count": 10, "nonfinite": 0, "tensors": 1, "missing": 0, "frozen": 0, "share": 1.0}
        | ({} if component else {"global_norm": norm, "has_nan": 0, "has_inf": 0})
        for step, norm in enumerate(norms)
        for component in (None, "encoder")
    ]


def written(folder, norms, config=None, **info):
    """A run with these gradient norms, one a step."""
    (folder / "records").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in grad(norms))
    (folder / "records" / "grad.jsonl").write_text(lines)
    attempts = [{"attempt": 1, "first_step": 0, "status": "finished", "supersedes": True}]
    info = {"status": "finished", "attempts": attempts, **info}
    (folder / "run.json").write_text(json.dumps(info))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


RISING = [0.1] * 40 + [50.0] * 20


def composed(folder, *overrides, conf=None):
    """A run folder as `train` leaves it, without training; gradients explode in it."""
    path = [f"hydra.searchpath=['file://{conf}']"] if conf else []
    given = [*overrides, f"run_dir='{folder}'", *path]
    with initialize_config_module("lightning_diag.conf", version_base="1.3"):
        config = compose("train", given)
        hydra = compose("train", given, return_hydra_config=True).hydra
    choices = OmegaConf.to_container(hydra.runtime.choices)
    with_hydra = OmegaConf.to_container(config)
    config.hardware.accelerator = "cpu"  # as the command completes it
    plain = OmegaConf.to_container(config, resolve=True)
    run = written(folder, RISING, plain)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(with_hydra, sort_keys=False))
    sources = [{"provider": "main", "path": "lightning_diag.conf"}]
    sources += [{"provider": "command-line", "path": str(conf)}] if conf else []
    kept = {"hydra": {"runtime": {"choices": choices, "config_sources": sources}}}
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(kept))
    return run


@pytest.fixture
def call(monkeypatch):
    # whichever remedy the rule has
    mended = dataclasses.replace(RULES["exploding_gradient"], remedy=calm_steps)
    monkeypatch.setitem(RULES, "exploding_gradient", mended)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    return call


def recomposed(file, conf=None):
    """What Hydra makes of a written experiment that lies in a folder named `experiment`."""
    folders = [f"file://{folder}" for folder in (file.parent.parent, conf) if folder]
    path = f"hydra.searchpath={folders}"
    with initialize_config_module("lightning_diag.conf", version_base="1.3"):
        config = compose("train", [f"experiment={file.stem}", path])
    return OmegaConf.to_container(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=drivers"],
        ["experiment=code_transformer", "optimizer=sgd", "seed=7", "callbacks=standard"],
        ["experiment=drivers", "callbacks=[gradient_health,lr_monitor]", "~callbacks.lr_monitor"],
        ["experiment=modalities", "component_lrs={a: 2.0}", "trainer=quick"],
        ["experiment=denoiser_3blob", "hardware=cpu", "+trainer.detect_anomaly=true"],
    ],
    ids=lambda value: " ".join(value),
)
def test_the_written_experiment_is_the_runs_own_but_for_the_changes(tmp_path, call, overrides):
    run = composed(tmp_path / "run", *overrides)
    file = tmp_path / "experiment" / "fixed.yaml"
    done = call(run, "--apply", file, *NAMED)
    assert done.exit_code in (3, 4), done.output
    was = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    now = recomposed(file)
    assert was["optimizer"]["lr"] * 0.3 == pytest.approx(now["optimizer"]["lr"], rel=0.01)
    assert now["trainer"]["gradient_clip_val"] <= 1.0
    for one in (was, now):
        one["optimizer"].pop("lr")
        one["trainer"].pop("gradient_clip_val")
        one.pop("run_dir")
        one["callbacks"] = {name: node for name, node in one["callbacks"].items() if node}
    assert now == was
    assert "exploding_gradient" in file.read_text()
    assert f"next: lightning-diag train experiment={file}" in done.output


def test_a_users_own_folder_of_configuration(tmp_path, call):
    conf = Path(shutil.copytree(APP / "conf", tmp_path / "conf"))
    run = composed(tmp_path / "run", "experiment=tiny", "model.width=9", conf=conf)
    file = tmp_path / "fixed.yaml"
    done = call(run, "--apply", file, *NAMED)
    assert f"next: lightning-diag train --config-dir {conf} experiment={file}" in done.output
    text = file.read_text()
    assert "  - override /model: tiny\n" in text
    assert "  width: 9\n" in text
    shutil.rmtree(conf)
    again = call(run, "--apply", file, "--force")
    assert again.exit_code == 2
    assert f"composed with `--config-dir {conf}`, which is not there." in again.stderr


def own_groups(conf):
    """Somebody's configuration with a group in a group, and groups that the package has not."""
    head = "# @package _global_\ndefaults:\n"
    body = "  - override /data: tiny\n  - override /model: {model}\n  - override /optimizer: tiny\n"
    for name, text in {
        "model/encoder/small": "depth: 1\n",
        "model/encoder/big": "depth: 9\n",
        "model/nested": "defaults:\n  - tiny\n  - encoder: small\n  - _self_\n",
        "extra/a": "x: 1\n",
        "extra/b": "y: 1\n",
        "experiment/nested": head + body.format(model="nested") + "name: n\n",
        "experiment/big": head + body.format(model="nested") + "  - override /model/encoder: big\n",
        "experiment/none": head
        + body.format(model="nested")
        + "  - override /model/encoder: null\n",
        "experiment/two": head + "  - /optimizer@critic: adamw\n" + body.format(model="tiny"),
        "experiment/listed": head + "  - /extra: [a, b]\n" + body.format(model="tiny"),
    }.items():
        file = conf / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return conf


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=nested"],
        ["experiment=big"],
        ["experiment=none"],
        ["experiment=nested", "~model/encoder"],
        ["experiment=two", "critic.lr=0.5"],
        ["experiment=listed"],
        ["experiment=tiny", "+extra=a", "extra.x=2"],
        ["experiment=tiny", "callbacks=[]", "logger=[run,csv]"],
        ["experiment=tiny", "~logger", "++trainer.mine='1e-3'", "+model.note='on'"],
    ],
    ids=lambda value: " ".join(value),
)
def test_groups_of_somebodys_own_come_back(tmp_path, call, overrides):
    conf = own_groups(Path(shutil.copytree(APP / "conf", tmp_path / "conf")))
    run = composed(tmp_path / "a run", *overrides, conf=conf)
    file = tmp_path / "experiment" / "fixed.yaml"
    done = call(run, "--apply", file, *NAMED)
    assert done.exit_code in (3, 4), done.output
    was = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    now = recomposed(file, conf)
    for one in (was, now):
        assert one["optimizer"].pop("lr") > 0
        one["trainer"].pop("gradient_clip_val")
        one.pop("run_dir")
        one["logger"] = one.get("logger") or {}
    assert now == was


def test_a_folder_that_a_search_path_named(tmp_path, call):
    conf = Path(shutil.copytree(APP / "conf", tmp_path / "conf"))
    run = composed(tmp_path / "run", "experiment=tiny", conf=conf)
    kept = yaml.safe_load((run / ".hydra" / "hydra.yaml").read_text())
    sources = kept["hydra"]["runtime"]["config_sources"]
    sources[1] |= {"provider": "hydra.searchpath in command-line", "schema": "file"}
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(kept))
    done = call(run, "--apply", tmp_path / "fixed.yaml", *NAMED)
    assert f"next: lightning-diag train --config-dir {conf} experiment=" in done.output
    sources.append({"provider": "command-line", "schema": "file", "path": "elsewhere"})
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(kept))
    refused = call(run, "--apply", tmp_path / "other.yaml", *NAMED)
    assert refused.exit_code == 2
    assert f"besides the package's, got {conf}, elsewhere." in refused.stderr


def test_what_the_experiment_cannot_take_away_is_said(tmp_path, call):
    run = composed(tmp_path / "run", "experiment=drivers", "~optimizer.weight_decay")
    done = call(run, "--apply", tmp_path / "fixed.yaml", *NAMED)
    said = "optimizer.weight_decay: comes back with its group, the run did not have it"
    assert said in done.output


def test_a_file_is_replaced_only_if_told_so(tmp_path, call):
    run = composed(tmp_path / "run", "experiment=drivers")
    file = tmp_path / "fixed.yaml"
    file.write_text("mine")
    refused = call(run, "--apply", file, *NAMED)
    assert refused.exit_code == 2
    assert f"must name a new file; `{file}` exists, `--force` replaces it." in refused.stderr
    assert file.read_text() == "mine"
    assert call(run, "--apply", file, "--force", *NAMED).exit_code in (3, 4)
    assert file.read_text().startswith("# @package _global_\n")
    wrong = call(run, "--apply", tmp_path / "fixed.txt")
    assert wrong.exit_code == 2
    assert "must name a file that ends in .yaml" in wrong.stderr


def test_where_nothing_applies_nothing_is_written(tmp_path, call):
    run = composed(tmp_path / "run", "experiment=drivers")
    lines = "".join(json.dumps(row) + "\n" for row in grad([0.1] * 60))
    (run / "records" / "grad.jsonl").write_text(lines)
    done = call(run, "--apply", tmp_path / "fixed.yaml")
    assert done.exit_code == 0
    assert f"No override applies, so `{tmp_path}/fixed.yaml` is not written." in done.output
    assert not (tmp_path / "fixed.yaml").exists()


def test_a_run_that_hydra_did_not_make(tmp_path, call):
    run = written(tmp_path / "run", RISING)
    done = call(run, "--apply", tmp_path / "fixed.yaml")
    assert done.exit_code == 2
    assert "`--apply` needs a run that `lightning-diag train` made" in done.stderr
    assert not (tmp_path / "fixed.yaml").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max_l2=3", "must be written RULE.THRESHOLD=NUMBER, got `max_l2=3`."),
        ("exploding_gradient.max_l2", "must be written RULE.THRESHOLD=NUMBER, got"),
        (
            "exploding_gradient.max_l2=big",
            "`exploding_gradient.max_l2` must be a number, got `big`.",
        ),
        ("exploding_gradient.max_l2=nan", "`exploding_gradient.max_l2` must be finite, got nan."),
        ("exploding_gradent.max_l2=3", "did you mean `exploding_gradient`?"),
        ("exploding_gradient.max_12=3", "did you mean `max_l2`?"),
    ],
)
def test_a_threshold_that_is_none_is_answered_with_the_right_name(tmp_path, call, given, message):
    run = written(tmp_path / "run", RISING)
    done = call(run, "--threshold", given)
    assert done.exit_code == 2
    assert message in done.stderr


def found(run):
    rows = json.loads((run / "analysis" / "findings.json").read_text())
    return {row["rule"]: row["threshold"] for row in rows if row["severity"] != "info"}


def test_thresholds_come_from_the_run_and_the_command_line_wins(tmp_path, call):
    silent = written(tmp_path / "silent", RISING)
    assert call(silent).exit_code == 0
    assert "exploding_gradient" not in found(silent)
    assert call(silent, *NAMED).exit_code in (3, 4)
    assert found(silent)["exploding_gradient"] == 2.0
    loud = written(tmp_path / "loud", RISING, {"rules": LOUD})
    assert call(loud).exit_code in (3, 4)
    assert found(loud)["exploding_gradient"] == 2.0
    assert call(loud, "--threshold", "exploding_gradient.max_l2=1e6").exit_code == 0
    wrong = written(tmp_path / "wrong", RISING, {"rules": {"exploding": {}}})
    done = call(wrong)
    assert done.exit_code == 2
    assert (
        "`rules` must name rules, got 'exploding'; did you mean `exploding_gradient`?"
        in done.stderr
    )


def test_train_refuses_rules_that_do_not_exist(tmp_path, monkeypatch):
    project = shutil.copytree(APP, tmp_path / "project")
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    given = ["train", "--config-dir", "conf", "experiment=tiny", "+rules.dead_componen.min_rows=2"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert "`rules` must name rules, got 'dead_componen'; did you mean `dead_component`?" in (
        done.stderr
    )


def test_an_experiment_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    done = CliRunner().invoke(app, ["train", "experiment=fixed.yaml"])
    assert done.exit_code == 2
    assert "`experiment` names a file that is not there, got `fixed.yaml`." in done.stderr


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The configuration that `train` composes from experiments in files of these names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])

    def shown(name, text, override=None):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        given = ["train", "--cfg", "job", override or f"experiment={name}"]
        return CliRunner().invoke(app, given)

    return shown


FILE = """\
# @package _global_
defaults:
  - override /data: drivers
  - override /model: drivers
seed: 77
"""


@pytest.mark.parametrize(
    "name",
    [
        *("null.yaml", "12.yaml", "1e5.yaml", "v1.2.yaml", "a b.yaml", "é.yaml", "-x.yaml"),
        *("drivers.yaml", ".yaml.yaml", "dir (1)/it's.yaml"),
    ],
)
def test_an_experiment_file_may_have_any_name(shown, name):
    done = shown(name, FILE)
    assert done.exit_code == 0, done.stderr
    assert "seed: 77\n" in done.output


def test_two_files_of_one_name_are_two_experiments(shown):
    for folder, seed in (("one", 5), ("two", 6)):
        done = shown(f"{folder}/fixed.yaml", FILE.replace("77", str(seed)))
        assert f"seed: {seed}\n" in done.output, done.stderr
    named = experiment_files("experiment=one/fixed.yaml,two/fixed.yaml", {"fixed": ""})
    assert list(named) == ["fixed_file", "fixed_file_file"]
    assert [Path(file).parts[-2:] for file in named.values()] == [
        ("one", "fixed.yaml"),
        ("two", "fixed.yaml"),
    ]


def test_an_experiment_file_that_is_no_yaml(shown):
    done = shown("torn.yaml", "a: [1")
    assert done.exit_code == 2
    assert "torn.yaml` must be YAML, got " in done.stderr
    quoted = shown("a b.yaml", FILE, "experiment='a b.yaml'")
    assert quoted.exit_code == 0, quoted.stderr


@pytest.mark.slow
def test_train_report_apply_train_again(tmp_path):
    """Without a mock anywhere: a rate that the tiny model does not survive."""
    project = shutil.copytree(APP, tmp_path / "project")

    def run(*arguments):
        command = [sys.executable, "-m", "lightning_diag.cli", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)

    given = ["experiment=tiny", "optimizer.lr=1.5", "trainer.gradient_clip_val=null"]
    given += ["trainer.max_epochs=8", "run_dir='si ck'"]
    given += ["rules={dead_component: {min_rows: 4}}"]
    callbacks = "callbacks=[gradient_health,update_ratio,collapse_stop,health_alerts]"
    options = ["callbacks.update_ratio.every_n_steps=2", "callbacks.collapse_stop.action=warn"]
    trained = run("train", "--config-dir", "conf", *given, callbacks, *options)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.endswith("next: lightning-diag report 'si ck'\n")
    sick = read_run(project / "si ck")
    assert sick.config["callbacks"]["health_alerts"]["thresholds"] == sick.config["rules"]
    done = run("report", "si ck", "--apply", "fixed.yaml")
    assert done.returncode == 4, done.stderr
    assert "written: fixed.yaml" in done.stdout
    again = run("train", "--config-dir", "conf", "experiment=fixed.yaml", "run_dir=well")
    assert again.returncode == 0, again.stderr
    well = read_run(project / "well")
    assert well.config["optimizer"]["lr"] < 1.5
    assert well.config["rules"] == sick.config["rules"]
    assert well.metrics["val_loss"].drop_nulls().to_list()[-1] < 10
    assert run("compare", "si ck", "well", "--fail-on", "warning").returncode == 0
    assert run("compare", "well", "si ck", "--fail-on", "warning").returncode == 4
