"""Several findings become one set of changes, in which causes come first."""

from lightning_diag.rules import Finding
from lightning_diag.rules.repair import changed_config, changes, left_out

CONFIG = {
    "optimizer": {"lr": 1.0},
    "trainer": {"gradient_clip_val": None},
    "component_lrs": {"head": 8.0, "net.body": 1.0},
}


def finding(rule, overrides, severity="warning", caused_by=None, component=None):
    return Finding(rule, severity, component, 3, overrides=overrides, caused_by=caused_by)


def told(findings):
    return {change.path: change.value for change in changes(findings, CONFIG)}


def test_the_first_finding_wins_a_key():
    findings = [
        finding("learning_rate_too_high", {"optimizer.lr": 0.1}),
        finding("loss_spike", {"optimizer.lr": 0.3, "trainer.gradient_clip_val": 1.0}),
    ]
    assert told(findings) == {("optimizer", "lr"): 0.1, ("trainer", "gradient_clip_val"): 1.0}
    assert left_out(findings, CONFIG) == [
        (findings[1], "optimizer.lr is changed for learning_rate_too_high")
    ]


def test_a_symptom_changes_nothing_where_its_cause_is_found():
    cause = finding("scheduler_misuse", {"model.schedule": "constant"})
    symptom = finding("update_too_small", {"optimizer.lr": 9.0}, caused_by="scheduler_misuse")
    assert told([cause, symptom]) == {("model", "schedule"): "constant"}
    assert left_out([cause, symptom], CONFIG) == [(symptom, "explained by scheduler_misuse")]
    # a cause that is a note, or that is not there, is no reason to leave it as it is
    note = finding("scheduler_misuse", {}, severity="info")
    assert told([note, symptom]) == told([symptom]) == {("optimizer", "lr"): 9.0}


def test_notes_and_what_is_so_already_change_nothing():
    assert told([finding("loss_spike", {"optimizer.lr": 0.5}, severity="info")]) == {}
    assert told([finding("loss_spike", {"optimizer.lr": 1.0})]) == {}


def test_rates_of_components_are_merged_entry_by_entry():
    rates = CONFIG["component_lrs"]
    findings = [
        finding("update_too_large", {"component_lrs": {**rates, "head": 1.0}}, component="head"),
        finding("vanishing_gradient", {"component_lrs": {**rates, "net.body": 3.0}}),
        finding("vanishing_gradient", {"component_lrs": {**rates, "net.body": 5.0}}),
    ]
    assert told(findings) == {("component_lrs", "head"): 1.0, ("component_lrs", "net.body"): 3.0}
    assert changes(findings, CONFIG)[0].before == 8.0
    mended = changed_config(CONFIG, changes(findings, CONFIG))
    assert mended["component_lrs"] == {"head": 1.0, "net.body": 3.0}
    assert CONFIG["component_lrs"] == {"head": 8.0, "net.body": 1.0}


def test_what_no_key_treats_is_said():
    cause = finding("detached_graph", {}, component="head")
    symptom = finding("vanishing_gradient", {}, caused_by="detached_graph")
    note = finding("loss_spike", {}, severity="info")
    expected = [(cause, "no key of the configuration treats it")]
    assert left_out([cause, symptom, note], CONFIG) == expected


def test_a_mapping_takes_the_place_of_null():
    config = {"component_lrs": None}
    made = changes([finding("vanishing_gradient", {"component_lrs": {"a": 3.0}})], config)
    assert [(one.key, one.before) for one in made] == [("component_lrs.a", None)]
    assert changed_config(config, made) == {"component_lrs": {"a": 3.0}}


def test_a_rate_is_not_raised_along_with_what_may_be_why_it_was_slow():
    network = finding("vanishing_gradient", {"model.activation": "gelu"})
    for asked in ({"optimizer.lr": 5.0}, {"component_lrs": {"tail": 20.0}}):
        slow = finding("update_too_small", asked, component="tail")
        assert told([network, slow]) == {("model", "activation"): "gelu"}
        assert left_out([network, slow], CONFIG) == [
            (slow, "waits for what a change of model.activation does")
        ]
        assert told([slow]) == told([finding("input_bound", {}), slow])
        # the first cause comes first, and what only makes batches come faster is no reason to wait
        assert len(told([slow, network])) == 2
        assert len(told([finding("input_bound", {"hardware.num_workers": 2}), slow])) == 2
    lower = finding("learning_rate_too_high", {"optimizer.lr": 0.1})
    assert len(told([network, lower])) == 2


def test_several_parts_are_raised_at_once():
    first = finding("update_too_small", {"component_lrs": {"tail": 20.0}}, component="tail")
    second = finding("update_too_small", {"component_lrs": {"neck": 20.0}}, component="neck")
    everywhere = finding("learning_rate_too_low", {"optimizer.lr": 5.0})
    assert len(told([first, second])) == 2
    # not both: the part would be raised twice
    assert told([everywhere, second]) == {("optimizer", "lr"): 5.0}
