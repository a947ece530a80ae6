"""The real hosts and one corpus of them, made once for all tests of the recipe."""

import pytest

from recipes.code import corpus as corpus_module
from recipes.code.corpus import Parameters, Sample, generate
from recipes.code.hosts import Host, package_hosts

PARAMETERS = Parameters(samples=4000, seed=1)


@pytest.fixture(scope="session")
def hosts() -> list[Host]:
    return package_hosts()


@pytest.fixture(scope="session")
def corpus(hosts: list[Host]) -> list[Sample]:
    return list(generate(PARAMETERS, hosts))


@pytest.fixture
def known_hosts(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the reading of sympy."""
    monkeypatch.setattr(corpus_module, "package_hosts", lambda package: hosts)
