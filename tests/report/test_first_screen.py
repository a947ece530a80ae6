"""Does the page begin with the verdict, the findings with their evidence, and what to try?"""

import re
from html import unescape

import pytest

from lightning_diag.report import write_report
from lightning_diag.report import write_report as module_of_report
from tests.report.conftest import HOSTILE
from tests.report.test_write_report import Page, page_of
from tests.rules.insides import STANDS, every
from tests.rules.planted import noise, trace

CONFIG = {"optimizer": {"lr": 0.1}, "hardware": {"num_workers": 0}}


@pytest.fixture
def sick_rows(rng):
    """Dead units, a part without gradient because of them, and a machine that waits."""
    norms = {"body": noise(rng, 60, 0.5), "head": noise(rng, 60, 0.5)}
    norms["body"][20:] = 0.0
    shares = [0.0 if step < 150 else 0.9 for step in range(9, 599, 10)]
    units = {"function": "relu", "count": 6400, "units": 64, "zero_share": 0.5}
    activation = every(
        range(9, 599, 10), component=HOSTILE, part="body", dead_now=shares, dead_share=shares
    )
    return {
        "grad": trace(norms),
        "activation": [row | units for row in activation],
        "hardware": every(range(9, 599, 10), data_wait=0.8, batches=10, seconds=1.0),
        "loss": STANDS,
    }


def first_screen(page):
    return page[page.index("<header") : page.index("<nav")]


def test_verdict_findings_evidence_and_what_to_try_come_first(write_run, sick_rows):
    report = write_report(write_run(sick_rows, config=CONFIG))
    screen = first_screen(page_of(report))
    assert report.verdict.headline in unescape(screen)
    assert report.verdict.headline.startswith("Critical: many units of 'body' are switched off")
    cards = re.findall(r"<article.*?</article>", screen, re.S)
    assert len(cards) == 2
    for number, card in enumerate(cards, start=1):
        assert f'data-chart="evidence_{number}"' in card
        assert "Try first:" in card
        words = "".join(Page(card).text)
        assert re.search(r"since step \d+|from the start", words)
    assert "hardware.num_workers=" in cards[1]
    path = re.escape(str(report.run)).replace(r"\ ", " ")
    assert re.search(
        rf"lightning-diag report '?{path}'? --apply fixed.yaml", "".join(Page(screen).text)
    )


def test_a_consequence_stands_under_its_cause(write_run, sick_rows):
    report = write_report(write_run(sick_rows, config=CONFIG))
    dead = next(one for one in report.findings if one.rule == "dead_component")
    assert dead.caused_by == "dead_relu"
    cards = re.findall(r"<article.*?</article>", first_screen(page_of(report)), re.S)
    assert "consequence" in cards[0]
    assert "gets a gradient of exactly zero" in cards[0]
    assert "gradient of exactly zero" not in cards[1]
    text = report.files["report.md"].read_text()
    assert text.index("Consequences:") < text.index("### 2.")


def test_no_command_without_an_override(write_run, sick_rows):
    screen = first_screen(page_of(write_report(write_run(sick_rows, config={"a": 1}))))
    assert "Try first:" in screen
    assert "--apply" not in screen


def test_a_healthy_run_has_no_findings_on_the_first_screen(write_run, healthy_rows):
    screen = first_screen(page_of(write_report(write_run(healthy_rows))))
    assert "Nothing wrong was seen by 1 diagnostic in 291 steps." in screen
    assert "<article" not in screen


def test_a_finding_that_cannot_be_drawn_is_still_told(write_run, sick_rows, monkeypatch):
    def fails(run, finding):
        raise RuntimeError("no chart today")

    import sys

    monkeypatch.setattr(sys.modules[module_of_report.__module__], "evidence_chart", fails)
    screen = first_screen(page_of(write_report(write_run(sick_rows))))
    assert "evidence_" not in screen
    assert screen.count("No rows of this run can be drawn to show it.") == 2
    assert "switched off for every sample" in screen


def test_everything_has_words_for_those_who_do_not_see_it(write_run, sick_rows):
    text = page_of(write_report(write_run(sick_rows, config=CONFIG)))
    page = Page(text)
    described = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(described) == page.tags.count("img") == page.tags.count("figure")
    assert all(len(value) > 20 for value in described)
    began = [value for value in described if "Began at step" in value or "From the start" in value]
    assert len(began) == 2
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    assert set(described) <= set(labels)


def test_hostile_names_are_escaped_in_cards_and_charts(write_run, sick_rows):
    sick_rows["activation"] = [row | {"part": "<b>body</b>"} for row in sick_rows["activation"]]
    text = page_of(write_report(write_run(sick_rows, config=CONFIG, name="a'b <i>run</i>")))
    page = Page(text)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;body&lt;/b&gt;</code> are switched off" in text


def test_no_address_of_another_place(write_run, sick_rows):
    text = page_of(write_report(write_run(sick_rows, config=CONFIG)))
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # the bundle names its makers
    assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", markup)
    assert 'fetch("' not in markup


def test_the_page_stays_small(write_run, sick_rows):
    report = write_report(write_run(sick_rows, config=CONFIG))
    assert report.files["report.html"].stat().st_size < 1_800_000


def test_alerts_and_replays_have_their_place(write_run, sick_rows):
    alert = {"step": 199, "component": HOSTILE, "rule": "dead_relu", "state": "raised"}
    gone = {"step": 299, "rule": "dead_relu", "state": "cleared"}
    replay = {"step": 20, "message": "The first infinity was made by `aten.div`."}
    rows = {"health": every([199, 299], findings=1), "health_alert": [alert, gone]}
    rows |= {
        "nonfinite": [replay],
        "collapse": [{"step": 20, "event": 1, "kinds": "nonfinite_loss"}],
    }
    report = write_report(write_run(sick_rows | rows))
    found = {section.title: section for section in report.sections}
    assert found["Alerts"].lines == (
        "2 looks while the run went on, the last at step 299: 1 alert.",
    )
    assert found["Alerts"].tables[0].rows[1][:4] == ("299", "cleared", "whole model", "dead relu")
    assert f"Step 20 was made again: {replay['message']}" in found["Collapse"].lines
    quiet = write_report(write_run({"health": every([99], findings=0)}, name="quiet"))
    (section,) = quiet.sections
    assert section.lines == ("1 looks while the run went on, the last at step 99: no alerts.",)
