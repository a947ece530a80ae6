"""The suites hold what they say, and each holds the one before it."""

import pytest

import lightning_diag
from lightning_diag import suite
from lightning_diag.callbacks import Diagnostic
from lightning_diag.suites import SUITES


def classes(name, **arguments):
    return [type(diagnostic).__name__ for diagnostic in suite(name, **arguments)]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_a_list_of_new_diagnostics(name):
    assert classes(name) == list(SUITES[name])
    assert all(isinstance(diagnostic, Diagnostic) for diagnostic in suite(name))
    first, second = suite(name), suite(name)
    assert not any(one is other for one in first for other in second)


def test_each_suite_holds_the_one_before_and_full_holds_all():
    cheap, standard, full = (set(classes(name)) for name in ("cheap", "standard", "full"))
    assert cheap < standard < full
    public = {getattr(lightning_diag, name) for name in lightning_diag.__all__}
    kinds = {
        one.__name__ for one in public if isinstance(one, type) and issubclass(one, Diagnostic)
    }
    # which sets the learning rate, and is therefore asked for by name
    assert full == kinds - {"LRCache"}


@pytest.mark.parametrize("name", SUITES)
def test_what_judges_rows_comes_after_what_writes_them(name):
    assert classes(name)[-1] == "HealthAlerts"


def test_components_reach_all_that_speak_of_parts():
    parts = {"encoder": "net.encoder"}
    for diagnostic in suite("full", components=parts):
        speaks = "components" in type(diagnostic).__init__.__annotations__
        given = diagnostic.components.patterns
        assert given == ({"encoder": ["net.encoder"]} if speaks else None)


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"one of cheap, standard, full, got 'all'\."):
        suite("all")
