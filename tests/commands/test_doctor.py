"""Does the doctor tell what is there and what is missing?"""

from importlib import metadata

import pytest
import torch
import typer
from typer.testing import CliRunner

from lightning_diag.commands import doctor as home


def ask():
    app = typer.Typer()
    app.command()(home.doctor)
    return CliRunner().invoke(app, [])


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed, or of another version."""

    def hide(**versions):
        known = metadata.version

        def version(name):
            if name in versions:
                if versions[name] is None:
                    raise metadata.PackageNotFoundError(name)
                return versions[name]
            return known(name)

        monkeypatch.setattr(home.metadata, "version", version)

    return hide


def test_versions_and_device_are_told():
    said = ask()
    assert said.exit_code == 0
    assert f"torch {torch.__version__}" in said.output
    assert "trains on: " in said.output
    assert "base: complete" in said.output


def test_the_extras_are_those_of_the_package():
    declared = set(metadata.metadata("lightning-diag").get_all("Provides-Extra")) - {"all"}
    assert home.needs().keys() == declared | {"base"}
    assert {one.package for one in home.needs()["wandb"]} == {"wandb"}


def test_a_missing_extra_is_told_and_no_fault(without):
    without(wandb=None)
    said = ask()
    assert said.exit_code == 0
    assert "wandb: 1 of 1 missing" in said.output
    assert "wandb is not installed; wanted >=" in said.output
    assert "to have it: pip install -e '.[wandb]' in a checkout, elsewhere" in said.output
    assert "elsewhere pip install 'wandb>=" in said.output


def test_a_missing_base_package_is_a_fault(without):
    without(polars="0.1.0")
    said = ask()
    assert said.exit_code == 3
    assert "polars is 0.1.0; wanted >=" in said.output


def test_a_local_build_counts_as_what_it_is_a_build_of(without):
    without(torch="2.6.0+cpu")
    assert ask().exit_code == 0
    without(torch="2.5.1+cpu")
    assert ask().exit_code == 3
