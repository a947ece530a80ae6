"""The `lightning-diag` command: train with diagnostics, and read a run afterwards."""

import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lightning_diag.commands import lr_cache
from lightning_diag.commands.aggregate import aggregate
from lightning_diag.commands.clip_value import clip_value
from lightning_diag.commands.compare import compare
from lightning_diag.commands.composed import Composed
from lightning_diag.commands.doctor import doctor
from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.commands.help import EPILOG, debugging, named_shell
from lightning_diag.commands.jobs import claim, command, own_process_group, telling
from lightning_diag.commands.monitor import monitor
from lightning_diag.commands.overrides import (
    check_sweep,
    config_groups,
    experiment_files,
    no_key,
    option_names,
    resumed,
    search_path,
    unnamed_experiment,
)
from lightning_diag.commands.training import best_metric, check, progress
from lightning_diag.spelling import did_you_mean, leaf_keys

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_diag.lightning import LightningDataModule, LightningModule

__all__ = ["app", "main", "make_for_batch_size"]

app = typer.Typer(
    name="lightning-diag",
    help="Which part of the network is sick, since when, why, and what to change.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Apply = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml", help="Write the run's experiment, with what to change in it."
    ),
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option(metavar="RULE.THRESHOLD=NUMBER", help="In place of a default; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")]

_HYDRA_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}
_SWEEP = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
_FILES: dict[str, str] = {}  # experiments that are files, by the name that Hydra knows


def main() -> None:
    """Run the command line."""
    named_shell(sys.argv[1:])
    app(prog_name="lightning-diag")


@app.callback()
def everywhere(context: typer.Context, debug: Debug = False) -> None:
    """Take what stands before the name of a command."""
    if debug:
        context.default_map = debugging(context.command)


def train(context: typer.Context, debug: Debug = False) -> None:
    """Train one experiment, watched by the diagnostics: `experiment=NAME [KEY=VALUE ...]`.

    Everything else is passed on to Hydra: `-m seed=42,2025,7` trains once for each seed,
    `--cfg job` shows the configuration, `--info` where it comes from, `--config-dir DIR` adds a
    folder of your own configuration.

    `ckpt_path=RUN/checkpoints/last.ckpt` resumes a run in its own folder, `run_dir=DIR` chooses
    another. `ckpt_path=last` resumes what is in the folder, if anything, as after a requeue.
    """
    with plain_errors(debug):
        _hydra(context.args)


def batch_size(context: typer.Context, debug: Debug = False) -> None:
    """Measure batch sizes: `experiment=NAME batch_sizes=[16,32,64] [epochs=5] [KEY=VALUE ...]`.

    Each size is trained in a process of its own, for one warm-up epoch and `epochs` more, on one
    device and without callbacks and loggers; running out of memory is a result. Writes a table
    and a recommendation into `output=FILE.md`, a chart and JSON beside it.

    `memory_limit_gib=8` tries a smaller device, `timeout_s=600` ends a size that takes longer,
    `spare=0.2` asks for more free memory than 0.15. Everything else is passed on to Hydra.
    """
    with plain_errors(debug):
        from lightning_diag.commands.batch_size import batch_size

        status = batch_size(context.args, _compose_for_batch_sizes, make_for_batch_size)
    raise typer.Exit(status)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    apply: Apply = None,
    force: Annotated[bool, typer.Option("--force", help="Let --apply replace a file.")] = False,
    threshold: Thresholds = None,
    no_fail: Annotated[bool, typer.Option("--no-fail", help="Exit with 0 in any case.")] = False,
    debug: Debug = False,
) -> None:
    """Write RUN/analysis/ and print the findings.

    `--apply FILE.yaml` writes the experiment of the run with the overrides of its findings in it,
    for `lightning-diag train experiment=FILE.yaml`. What one finding explains of another is not
    treated as well. Where no override applies nothing is written; the exit status is the same.

    Exits with 0 on a healthy run, 3 on warnings, 4 on critical findings, 2 on wrong usage.
    """
    with plain_errors(debug):
        from lightning_diag.commands.report import report

        status = report(run, threshold or [], apply, force, _compose_unresolved, config_groups)
    raise typer.Exit(0 if no_fail else status)


def version(debug: Debug = False) -> None:
    """Print the versions of lightning-diag and of what it stands on."""
    with plain_errors(debug):
        for package in ("lightning-diag", "torch", "pytorch-lightning", "hydra-core"):
            typer.echo(f"{package} {metadata.version(package)}")


def _register() -> None:
    """Enter the commands in the order in which a user meets them, each with its line of help."""
    hydra = {"context_settings": _HYDRA_ARGUMENTS}
    own: dict[str, Any] = {}
    for function, settings, line in (
        (train, hydra, "Train one experiment, watched by the diagnostics."),
        (report, own, "Say what is wrong in a run, why, and what to try."),
        (compare, own, "Say what changed from one run to another."),
        (monitor, own, "Show a run on a page while it trains."),
        (aggregate, own, "Sum up runs that differ in their seed."),
        (batch_size, hydra, "Measure which batch size fits, and how fast it is."),
        (clip_value, own, "Suggest a clip value from a run's gradient norms."),
        (doctor, own, "Say what is installed, and what is missing."),
        (version, own, "Print the versions of what this stands on."),
    ):
        name = function.__name__.replace("_", "-")
        app.command(name, short_help=line, **settings)(function)
    line = "List, show or clear the learning rates that were found."
    app.add_typer(lr_cache.app, name="lr-cache", short_help=line)


_register()


def _hydra(arguments: list[str]) -> None:
    """Hand the arguments to Hydra, which calls `_fit` once, or once for each job of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    options, overrides, folder = _split(arguments, "train")
    overrides = _with_experiment_files(overrides, folder)
    sweep = bool(_SWEEP & {*options, *overrides})
    if sweep:
        check_sweep(overrides)
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    sys.path.insert(0, os.getcwd())  # so that `recipes` and a user's own modules are found
    again = [] if sweep else resumed(overrides)
    sys.argv = [before[0], *overrides, *again, *options]
    run = hydra.main("pkg://lightning_diag.conf", config_name="train", version_base="1.3")
    try:
        run(_fit)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, overrides, folder)) from error
    finally:
        sys.argv = before


def _split(arguments: list[str], command: str) -> tuple[list[str], list[str], str | None]:
    """Hydra's options, the overrides, and the user's folder of configuration."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    known = set(re.findall(r"--[a-z-]+", parser.format_usage()))
    for argument in arguments:
        option = argument.partition("=")[0]
        if argument.startswith("--") and option not in known:
            raise UsageError(f"`{command}` has no option `{option}`; {did_you_mean(option, known)}")
    parsed = parser.parse_intermixed_args(arguments)
    for override in parsed.overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"An override must be written KEY=VALUE, got `{override}`.")
    options = [argument for argument in arguments if argument not in parsed.overrides]
    return options, parsed.overrides, parsed.config_dir


def _with_experiment_files(overrides: list[str], folder: str | None) -> list[str]:
    """Overrides in which an experiment that is a file, as of `report --apply`, has a name."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from yaml import YAMLError

    known = []
    for override in overrides:
        taken = {**dict.fromkeys(config_groups(folder).get("experiment", ()), ""), **_FILES}
        files = experiment_files(override, taken)
        for name, file in (files or {}).items():
            try:
                node = OmegaConf.load(file)
            except YAMLError as error:
                raise UsageError(f"`{file}` must be YAML, got {error}.") from error
            ConfigStore.instance().store(name, node, group="experiment", package="_global_")
            _FILES[name] = file
        known.append(override if files is None else f"experiment={','.join(files)}")
    return known


def _fit(config: "DictConfig") -> float | None:
    """Train what a composed configuration describes, and return the metric that it monitors."""
    from hydra.core.hydra_config import HydraConfig

    plain, hydra = _completed(config), HydraConfig.get()
    sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    own = not sweep or hydra.runtime.choices["hydra/launcher"] == "basic"
    given = [_as_file(override) for override in hydra.overrides.task]
    arguments = ["train", *given, *search_path(hydra)]
    with telling(plain["run_dir"]) if sweep else nullcontext():
        check(plain)
        # Lightning starts its other processes with this command: this job alone, in this folder
        with command(arguments, None if own else "lightning_diag.cli"):
            return _train(plain, (hydra.job.num, hydra.overrides.task) if sweep else None)


def _as_file(override: str) -> str:
    """An override as another process has to be told it, which does not know our names of files."""
    key, _, name = override.partition("=")
    return f"experiment={_FILES[name]}" if key == "experiment" and name in _FILES else override


def _train(plain: Mapping[str, Any], job: tuple[int, Sequence[str]] | None) -> float | None:
    from lightning_diag import lightning as door
    from lightning_diag.commands.run_details import RunDetails

    # said once a step or so by torch about Lightning, and nothing that a user can act on
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    import_module(door.PACKAGE).seed_everything(plain["seed"], workers=True, verbose=False)
    data, model = _build(plain["data"], "data"), _build(plain["model"], "model")
    callbacks, loggers = _build_all(plain, "callbacks"), _build_all(plain, "logger")
    callbacks = [RunDetails(plain), *callbacks, *progress(plain, callbacks)]
    trainer = _build(plain["trainer"], "trainer", callbacks=callbacks, logger=loggers)
    if trainer.is_global_zero:
        if job is not None:
            claim(Path(plain["run_dir"]), *job)
        machine = ", ".join(f"{key} {value}" for key, value in plain["hardware"].items())
        typer.echo(f"training into {plain['run_dir']} ({machine})")
    with own_process_group(trainer):
        trainer.fit(model, datamodule=data, ckpt_path=plain["ckpt_path"])
    if trainer.is_global_zero:
        typer.echo(f"trained; next: {shlex.join(['lightning-diag', 'report', plain['run_dir']])}")
    return best_metric(trainer, plain["monitor"])


def _completed(config: "DictConfig") -> dict[str, Any]:
    """The configuration as plain values, with the run's folder and the machine's settings."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict, read_write

    from lightning_diag.tuning.hardware import detect, settings

    hydra = cast("DictConfig", HydraConfig.get())
    folder = Path(hydra.runtime.output_dir)
    inside = Path.cwd() in folder.parents
    config.run_dir = str(folder.relative_to(Path.cwd()) if inside else folder)
    try:
        config.hardware = asdict(settings(detect(), config.hardware))
    except ValueError as error:
        raise UsageError(str(error)) from error
    with read_write(hydra), open_dict(hydra):
        hydra.run.dir = config.run_dir  # for the processes that Lightning starts
    if config.ckpt_path == "last":
        last = Path(config.run_dir, "checkpoints", "last.ckpt")
        config.ckpt_path = str(last) if last.exists() else None
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return cast("dict[str, Any]", plain)


def make_for_batch_size(
    batch_size: int, *, overrides: list[str], folder: str | None
) -> "tuple[dict[str, Any], LightningModule, LightningDataModule]":
    """The arguments of the Trainer, the model and the data of an experiment, for one batch size.

    Called in the processes of `lightning-diag batch-size`, which find it by its name.

    Args:
        batch_size: Samples in a batch.
        overrides: What Hydra composes the experiment from.
        folder: The user's folder of configuration.
    """
    from omegaconf import OmegaConf

    from lightning_diag import lightning as door
    from lightning_diag.tuning.hardware import detect, settings

    chosen = [f"hardware.batch_size={batch_size}", "hardware.devices=1"]
    config = _composed([*overrides, *chosen], folder)
    config.hardware = asdict(settings(detect(), config.hardware))
    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    import_module(door.PACKAGE).seed_everything(plain["seed"], workers=True, verbose=False)
    data, model = _build(plain["data"], "data"), _build(plain["model"], "model")
    trainer = {key: value for key, value in plain["trainer"].items() if key != "_target_"}
    return _build(trainer, "trainer"), model, data


def _compose_for_batch_sizes(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    from omegaconf import OmegaConf

    options, overrides, folder = _split(list(arguments), "batch-size")
    if [option for option in options if option.startswith("-")] not in ([], ["--config-dir"]):
        raise UsageError(f"`batch-size` takes `--config-dir` alone, got `{' '.join(options)}`.")
    config = _composed(overrides, folder)
    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    check(plain)
    return str(plain["name"]), {"overrides": overrides, "folder": folder}


def _composed(overrides: list[str], folder: str | None) -> "DictConfig":
    """The configuration that `train` would get, but for the machine's settings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `recipes` and a user's own modules are found
    overrides = _with_experiment_files(overrides, folder)
    config, _ = _hydra_config(overrides, folder)
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UsageError(_explain(error, overrides, folder)) from error
    return config


def _compose_unresolved(overrides: list[str], folder: str | None) -> Composed:
    """What overrides compose, with its interpolations as they are written, and the choices."""
    from omegaconf import OmegaConf

    config, choices = _hydra_config(overrides, folder)
    return cast("dict[str, Any]", OmegaConf.to_container(config)), choices


def _hydra_config(overrides: list[str], folder: str | None) -> tuple["DictConfig", dict[str, Any]]:
    """What overrides compose, and the option of each group."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("lightning_diag.conf", version_base="1.3"):
            config = compose("train", [*overrides, *_searched(folder)], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, overrides, folder)) from error
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices


def _searched(folder: str | None) -> list[str]:
    return [f"hydra.searchpath=['file://{Path(folder).absolute()}']"] if folder else []


def _build(node: Mapping[str, Any], path: str, **objects: object) -> Any:  # noqa: ANN401
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **objects)
    except InstantiationException as error:
        inner = re.search(r"full_key: (\S+)", str(error))
        place = f"{path}.{inner[1]}" if inner else path
        raise UsageError(f"`{place}` cannot be built: {error.__cause__ or error}") from error


def _build_all(plain: Mapping[str, Any], group: str) -> list[Any]:
    named = (plain.get(group) or {}).items()
    # an experiment may have arguments for one that was not chosen: they name nothing to build
    chosen = [(name, node) for name, node in named if node is not None and "_target_" in node]
    return [_build(node, f"{group}.{name}") for name, node in chosen]


def _explain(error: Exception, overrides: list[str], folder: str | None) -> str:
    """What is wrong with the overrides, with the nearest right name; else what Hydra says."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    said = f"{error}\n{error.__cause__ or ''}".strip()
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as unread:
        return f"`{unread.override}` cannot be read as an override: {unread.message}"
    groups = config_groups(folder)
    groups.setdefault("experiment", []).extend(_FILES)
    chosen = {override.key_or_group: option_names(override.value()) for override in parsed}
    keys = [key for key in chosen if key not in groups and not key.startswith("hydra")]
    chosen = {key: names for key, names in chosen.items() if key in groups}
    wrong = [
        f"`{key}` has no option `{name}`; {did_you_mean(name, groups[key])}"
        for key, names in chosen.items()
        for name in names
        if name not in groups[key]
    ]
    if wrong or not keys:
        return "\n".join(wrong) or unnamed_experiment(said, groups)
    tree = _tree(chosen, folder)
    known = [*leaf_keys(tree), *groups]
    return "\n".join(no_key(key, tree, known) for key in keys if key not in known) or said


def _tree(chosen: Mapping[str, list[str]], folder: str | None) -> dict[str, object]:
    """The configuration that these choices compose."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    lists = {"callbacks", "logger"}
    overrides = [
        f"{key}=[{','.join(names)}]" if key in lists else f"{key}={names[0]}"
        for key, names in chosen.items()
        if names
    ]
    overrides += _searched(folder)
    try:
        with initialize_config_module("lightning_diag.conf", version_base="1.3"):
            config = compose("train", overrides)
    except HydraException:
        return {}
    return cast("dict[str, object]", OmegaConf.to_container(config))


if __name__ == "__main__":
    main()
