"""Does the headline say what was looked at and what is sick, so that a stranger understands?"""

import re

import pytest

from lightning_diag.report.groups import grouped
from lightning_diag.report.issue_words import WORDS, noted, since, what_is_wrong
from lightning_diag.report.looked import DIAGNOSTICS, Looked, looked_at
from lightning_diag.report.verdict import judge
from lightning_diag.rules import RULES, Finding
from tests.report.conftest import HOSTILE
from tests.rules.insides import every
from tests.rules.planted import MadeUpRun

EVERYTHING = {name: what for name, (what, _) in DIAGNOSTICS.items()}
ALL = Looked(EVERYTHING, {}, 0, 599)
STEPS = range(0, 600, 10)


def found(rule, severity="warning", **more):
    return Finding(rule, severity, first_step=more.pop("first_step", 40), last_step=599, **more)


def headline(*findings, looked=ALL, steps=STEPS, info=None):
    return judge(findings, steps, info or {}, looked).headline


def test_a_cause_its_consequences_and_what_else_there_is():
    rate = found("learning_rate_too_high")
    effects = [
        found("divergence", "critical", caused_by="learning_rate_too_high"),
        found("loss_spike", caused_by="divergence"),
        found("dead_relu", component="body", caused_by="learning_rate_too_high"),
    ]
    assert headline(rate, *effects) == (
        "Critical: the learning rate is too high since step 40; 3 consequences."
    )
    assert headline(rate, *effects[1:2], found("input_bound")) == (
        "Warning: the learning rate is too high since step 40; 2 other problems."
    )
    assert headline(found("input_bound", first_step=0)) == (
        "Warning: training waits for data, from the start."
    )
    two = [found("dead_relu", component=name) for name in ("body", "head")]
    assert headline(*two) == (
        "Warning: many units of 'body' are switched off for good since step 40 "
        "(also in 1 other part)."
    )


def test_silence_says_who_looked():
    assert headline() == "Nothing wrong was seen by 8 diagnostics in 600 steps."
    verdict = judge([], STEPS, {}, Looked({"LatentStats": "representation"}, {}, 0, 599))
    assert verdict.headline == "Nothing wrong was seen by 1 diagnostic in 600 steps."
    some = dict(list(EVERYTHING.items())[:3])
    rest = {name: what for name, what in EVERYTHING.items() if name not in some}
    sentence = judge([], STEPS, {}, Looked(some, rest, 9000, 9599)).sentence
    assert sentence == (
        "Looked at in steps 9,000 to 9,599: gradients, weight updates, loss and predictions. Not "
        "looked at: wiring, activations, representation, attention, machine."
    )


def test_without_gradients_it_is_said_and_the_status_stays():
    without = {name: what for name, what in EVERYTHING.items() if name != "GradientHealth"}
    verdict = judge([], [], {}, Looked(without, {"GradientHealth": "gradients"}, 0, 599))
    assert verdict.headline == (
        "Nothing wrong was seen by 7 diagnostics, but gradients were not measured."
    )
    assert (verdict.state, verdict.exit_code) == ("nothing measured", 3)
    assert "`GradientHealth`" in verdict.sentence
    assert judge([], [], {}, Looked({}, EVERYTHING)).headline == "Nothing was measured."
    assert headline(steps=range(3)).endswith("but too little was measured to judge by.")


@pytest.mark.parametrize(
    ("findings", "code"),
    [([], 0), ([found("input_bound")], 3), ([found("divergence", "critical")], 4)],
)
def test_the_status_is_that_of_the_gravest(findings, code):
    assert judge(findings, STEPS, {}, ALL).exit_code == code
    assert judge(findings, STEPS, {}).exit_code == code


def test_a_stop_is_critical_and_notes_are_none():
    reason = {"stop_reason": {"diagnostic": "CollapseStop", "message": "The loss is NaN."}}
    assert headline(info=reason) == "Critical: a diagnostic stopped this run."
    assert headline(found("loss_plateau", "info")).startswith("Nothing wrong")


def test_every_rule_has_words_without_jargon():
    assert set(WORDS) == set(RULES)
    for rule in RULES:
        words = what_is_wrong(Finding(rule, "warning", component="body"))
        assert words[0].islower() or words[0] == "`"
        assert not words.endswith(".")
        assert "_" not in words
        assert "{" not in words
        assert len(words) <= 75


def test_hostile_names_are_cut_and_keep_the_prose_whole():
    words = what_is_wrong(found("dead_relu", component=f"\x1b[31ma`b{HOSTILE}{'x' * 10_000}"))
    assert len(words) < 100
    assert words.isprintable()
    assert words.count("`") == 2
    assert what_is_wrong(Finding("a_rule_of_yours", "info")) == "a rule of yours"
    assert what_is_wrong(Finding("a_rule", "info", component="head")) == "a rule in `head`"


def test_when():
    assert since(Finding("loss_spike", "info")) == ""
    assert since(Finding("loss_spike", "info", first_step=0, last_step=99), 99) == "from the start"
    assert since(Finding("loss_spike", "info", first_step=50, last_step=99), 99) == "since step 50"
    over = Finding("loss_spike", "info", first_step=50, last_step=60)
    assert since(over, 500) == "from step 50 to 60"
    assert since(Finding("loss_spike", "info", first_step=50, last_step=50), 500) == "at step 50"


def test_who_looked_is_read_from_the_rows():
    rows = {"grad": every(range(0, 50, 10), l2=1.0), "attention": every([49], captured=0)}
    rows |= {"health": every([900], findings=0), "component": every([700], parameters=3)}
    looked = looked_at(MadeUpRun(rows=rows))
    assert looked.seen == {"GradientHealth": "gradients"}  # no head of attention was seen
    assert looked.absent == {"AttentionCapture": "attention"}
    assert "AttentionCapture" not in looked.unseen
    assert (
        "Looked for, but not there: attention. Not looked at: "
        in judge([], [], {}, looked).sentence
    )
    assert (looked.first, looked.last, looked.steps) == (0, 49, "50 steps")
    assert looked_at(MadeUpRun()).steps == ""
    said = "no activation function was seen in the forward pass; nothing is measured."
    notes = [{"step": 9, "diagnostic": "ActivationHealth", "message": said}]
    notes += [{"step": 9, "diagnostic": "LatentStats", "message": "no rows: the disk is full."}]
    looked = looked_at(MadeUpRun(rows={"notes": notes}))
    assert looked.absent == {"ActivationHealth": "activations"}
    assert "LatentStats" in looked.unseen


def test_every_diagnostic_that_rules_judge_is_known():
    needed = {prefix for rule in RULES.values() for prefix in rule.needs}
    known = {prefix for _, prefixes in DIAGNOSTICS.values() for prefix in prefixes}
    assert needed - known == {"metrics", "nonfinite", "attention"}
    assert known <= needed


def test_what_another_explains_stands_under_it():
    rate = found("learning_rate_too_high")
    near = found("dead_relu", component="body", caused_by="learning_rate_too_high")
    far = found("dead_component", component="body", caused_by="dead_relu")
    lone = found("dead_component", component="head", caused_by="not_here")
    first, second = grouped([rate, near, far, lone, found("loss_plateau", "info")])
    assert (first.first, first.consequences) == (rate, (near, far))
    assert (second.first, second.consequences) == (lone, ())


def test_what_was_said_is_not_said_again():
    same = f"Step 6 was made again: the first NaN was made in `net.norm`{' by a root' * 9}."
    cause = found("nonfinite_gradient", message=f"The gradient held NaN. {same}")
    effect = found(
        "nonfinite_loss", message=f"The loss was NaN. {same}", caused_by="nonfinite_gradient"
    )
    other = found("divergence", message="The loss rises. It fell.", caused_by="nonfinite_gradient")
    (group,) = grouped([cause, effect, other])
    assert group.told(cause) == cause.message
    assert group.told(effect) == "The loss was NaN."
    assert group.told(other) == other.message


def test_a_note_names_its_part_once():
    note = Finding("dead_relu", "info", component="body", message="Half are off.")
    assert noted(note) == "`body`: Half are off."
    named = Finding("dead_relu", "info", component="body", message="Half of `body` are off.")
    assert noted(named) == named.message
    assert noted(Finding("loss_spike", "info", message="Once.")) == "Once."


def test_findings_that_explain_each_other_are_not_lost():
    one = found("dead_component", caused_by="unused_parameter")
    other = found("unused_parameter", "critical", caused_by="dead_component")
    (group,) = grouped([one, other])
    assert (group.first, group.consequences, group.severity) == (one, (other,), "critical")
    itself = found("dead_relu", component="a", caused_by="dead_relu")
    (group,) = grouped([itself])
    assert group.first is itself


def test_no_name_of_a_rule_is_in_the_headlines():
    for rule in RULES:
        assert not re.search(r"\b[a-z]+_[a-z]+\b", headline(found(rule)))
