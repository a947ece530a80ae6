import html.parser
import io
import json
import re

import pytest
from rich.console import Console

from lightning_diag.report import print_summary, write_report
from lightning_diag.report.verdict import judge
from lightning_diag.rules import Finding
from tests.report.conftest import HOSTILE
from tests.rules.planted import component_row, trace

FILES = {
    "gradient_norms.csv",
    "gradient_flow.png",
    "training.png",
    "recommendations.json",
    "findings.json",
    "report.md",
    "report.html",
}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page, without what stands in scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def page_of(report):
    return report.files["report.html"].read_text("utf-8")


def test_healthy_run(write_run, healthy_rows):
    run = write_run(healthy_rows, info={"attempts": [{"attempt": 0, "status": "finished"}]})
    report = write_report(run.path)
    assert {file.name for file in (run.path / "analysis").iterdir()} == FILES
    assert set(report.files) == FILES
    assert report.exit_code == 0
    assert report.verdict.headline == "Nothing wrong was seen by 1 diagnostic in 291 steps."
    assert report.verdict.sentence.startswith("Looked at in 291 steps: gradients. Not looked at: ")
    assert json.loads(report.files["recommendations.json"].read_text()) == []
    assert report.files["gradient_norms.csv"].read_text().startswith("step,encoder,head,global\n")


def test_sick_run(write_run, hostile_rows):
    report = write_report(write_run(hostile_rows))
    assert report.exit_code == 4
    listed = json.loads(report.files["recommendations.json"].read_text())
    assert all({"component", "issue", "severity", "suggestion"} <= set(one) for one in listed)
    assert {one["severity"] for one in listed} == {"critical", "warning"}
    assert listed[0]["severity"] == "critical"
    found = json.loads(report.files["findings.json"].read_text())
    assert [Finding.from_dict(one) for one in found] == report.findings
    dead = next(one for one in found if one["rule"] == "dead_component")
    assert (dead["component"], dead["first_step"]) == ("pooler", 200)


def test_warnings_alone_exit_with_three(write_run, healthy_rows):
    for row in healthy_rows["grad"]:
        if row["component"] == "head":
            row["l2"] = 2e-6
    assert write_report(write_run(healthy_rows)).exit_code == 3


def test_nothing_measured_is_not_called_healthy(write_run):
    for rows in ({}, {"grad": [component_row(i, "a", None) for i in range(20)]}):
        run = write_run({"metrics": [{"step": 0, "loss": 1.0}], **rows}, name=f"run {len(rows)}")
        report = write_report(run)
        assert report.verdict.state == "nothing measured"
        assert report.exit_code == 3
        page = page_of(report)
        words = re.sub("<style>.*?</style>|<script.*?</script>", "", page, flags=re.S)
        assert "healthy" not in words.replace("Is training healthy?", "")


def test_few_rows_are_not_called_healthy(write_run):
    report = write_report(write_run({"grad": trace({"a": [1.0, 0.9, 0.8]})}))
    assert report.verdict.headline.endswith("but too little was measured to judge by.")
    assert "3 measured steps (0 to 20), which are too few" in report.verdict.sentence
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ({"status": "running"}, "still going on, or was broken off"),
        ({"status": "failed", "stop_reason": "ValueError: x"}, "ended as failed: ValueError: x."),
        ({"status": "finished"}, None),
    ],
)
def test_verdict_says_how_the_run_ended(attempt, words):
    sentence = judge([], range(20), {"attempts": [attempt]}).sentence
    assert (words is None) == ("The run" not in sentence)
    assert words is None or words in sentence


def test_a_rule_that_failed_is_in_the_verdict():
    failed = Finding("dead_component", "info", confidence=0.0)
    assert "1 rule could not be checked." in judge([failed], range(20), {}).sentence


def test_page_needs_nothing_from_outside(write_run, hostile_rows):
    page = Page(page_of(write_report(write_run(hostile_rows))))
    loads = [one for one in page.attributes if one[1] in ("src", "href", "srcset", "data")]
    assert loads
    inside = ("data:image/svg+xml;base64,", "#")
    assert all(value.startswith(inside) for *_, value in loads)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for *_, value in loads if value.startswith("#")} <= anchors
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    style = page_of(write_report(write_run({}, name="b"))).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_page_has_one_bundle_for_all_charts(write_run, healthy_rows):
    text = page_of(write_report(write_run(healthy_rows)))
    assert text.count("<script>") == 2  # the bundle, and what draws
    assert len(text) < 3_000_000


def test_names_with_markup_stay_text(write_run, hostile_rows):
    config = {"name": HOSTILE, HOSTILE: 1}
    run = write_run(hostile_rows, config=config, info={"devices": [HOSTILE], HOSTILE: HOSTILE})
    text = page_of(write_report(run))
    page = Page(text)
    images = [one for one in page.attributes if one[:2] == ("img", "src")]
    assert len(images) == 5  # two charts, and the evidence of three findings
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert page.tags.count("script") == 9  # two themes, five charts, the bundle, what draws
    assert HOSTILE in "".join(page.text)


def test_charts_in_the_page_can_be_read_back(write_run, hostile_rows):
    text = page_of(write_report(write_run(hostile_rows)))
    found = re.findall(
        r'<script type="application/json" id="([a-z0-9_-]+)">(.*?)</script>', text, re.S
    )
    specs = {name: json.loads(one) for name, one in found}
    evidence = {f"spec-evidence_{number}" for number in (1, 2, 3)}
    assert set(specs) == {"light", "dark", "spec-gradient_flow", "spec-training", *evidence}
    names = {row["component"] for row in specs["spec-gradient_flow"]["datasets"]["lines"]}
    assert HOSTILE in names


def test_page_is_readable_by_machines_for_people(write_run, hostile_rows):
    page = Page(page_of(write_report(write_run(hostile_rows))))
    assert page.tags.count("h1") == 1
    assert page.tags.count("figure") == page.tags.count("figcaption") == 5
    described = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert all(len(value) > 20 for value in described)
    assert ("html", "lang", "en") in page.attributes
    words = "".join(page.text)
    order = ["What is wrong, and what to try", "Five questions", "Gradients by component"]
    order += ["Configuration and versions"]
    places = [words.rindex(heading) for heading in order]
    assert places == sorted(places)


def test_cost_is_that_of_the_last_row(write_run, hostile_rows):
    report = write_report(write_run(hostile_rows))
    (cost,) = report.overheads
    assert (cost.diagnostic, cost.share, cost.measured) == ("GradientHealth", 0.0043, 60)
    assert "0.43 %" in page_of(report)


def test_markdown_escapes_names(write_run, hostile_rows):
    text = write_report(write_run(hostile_rows)).files["report.md"].read_text()
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<", outside)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[:6]}) == 1


def test_reports_are_replaced_whole(write_run, healthy_rows):
    run = write_run(healthy_rows)
    write_report(run)
    write_report(run.path)
    assert {file.name for file in (run.path / "analysis").iterdir()} == FILES


def test_a_name_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def summary(report, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_summary(report, console)
    return console.file.getvalue()


def test_console_shows_norms_verdict_and_findings(write_run, hostile_rows):
    report = write_report(write_run(hostile_rows))
    text = summary(report, 140)
    assert re.search(r"^pooler +[\d.]+ +[\d.]+ +[\d.]+ +0 ", text, re.M)
    assert report.verdict.headline in text.replace("\n", " ")
    assert "CRITICAL Dead component: pooler (steps 200 to 590)" in text
    assert "Try: The part is connected" in text
    assert "GradientHealth took 0.43% of training." in text
    assert str(report.files["report.html"]) in text.replace("\n", "")


def test_console_fits_a_narrow_terminal(write_run, healthy_rows):
    text = summary(write_report(write_run(healthy_rows)), 60)
    assert "Nothing wrong was seen by 1 diagnostic" in text
    table = text.split("Verdict")[0].splitlines()
    assert all(len(line) <= 60 for line in table)
    assert re.search(r"^encoder +0\.\d+", text, re.M)


def test_console_takes_names_literally(write_run):
    rows = {"grad": trace({"[bold]x[/bold]": [1.0] * 12})}
    assert "[bold]x[/bold]" in summary(write_report(write_run(rows)), 100)


def test_a_run_that_a_diagnostic_stopped_is_sick(write_run, healthy_rows):
    reason = {"diagnostic": "CollapseStop", "rule": "collapse", "message": "The loss is NaN."}
    info = {"status": "finished", "stop_reason": reason}
    report = write_report(write_run(healthy_rows, info=info))
    assert report.exit_code == 4
    assert report.verdict.state == "critical"
    assert "CollapseStop stopped the run: The loss is NaN." in report.verdict.sentence
