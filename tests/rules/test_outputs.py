"""Do the rules on units, representations and predictions judge rows whose answer is known?"""

import pytest

from lightning_diag.rules import diagnose
from tests.rules.insides import FALLS, STANDS, check_yaml, every, judge, losses, severity
from tests.rules.planted import MadeUpRun

STEPS = list(range(9, 300, 10))


def test_yaml_repeats_the_python_defaults():
    ids = ("constant_prediction", "dead_relu", "saturated_activation", "representation_collapse")
    check_yaml("outputs", ids)


def relu(dead, steps=STEPS, *, units=64, samples=32, known=True, **more):
    """Rows of one layer: share of dead units, the same for all rows or one a row."""
    dead = dead if isinstance(dead, list) else [dead] * len(steps)
    columns = {"component": "net.body.1", "part": "body", "function": "relu", "units": units}
    columns |= {"count": units * samples, "dead_now": dead, "dead_share": dead if known else None}
    return every(steps, **{**columns, **more})


class TestDeadRelu:
    @pytest.mark.parametrize(
        ("dead", "loss", "expected"),
        [
            (0.0, STANDS, None),
            (0.5, STANDS, None),
            (0.6, STANDS, "warning"),
            (0.95, STANDS, "critical"),
            (0.56, FALLS, "info"),
            (0.7, FALLS, "warning"),
            (0.95, FALLS, "warning"),
        ],
    )
    def test_by_share_and_loss(self, dead, loss, expected):
        assert severity("dead_relu", activation=relu(dead), loss=loss) == expected

    def test_half_of_the_outputs_zero_is_healthy(self):
        rows = relu(0.05, zero_share=0.6)
        assert judge("dead_relu", activation=rows, loss=STANDS) is None

    def test_units_that_die_in_mid_run(self):
        dead = [0.05] * 12 + [0.97] * (len(STEPS) - 12)
        loss = losses(1.4, 0.4, jump_at=120, to=1.38)
        found = judge("dead_relu", activation=relu(dead), loss=loss)
        assert (found.severity, found.component, found.first_step) == ("critical", "body", 129)
        assert "97 % of the 64 units of `net.body.1` (relu)" in found.message
        assert "since step 129" in found.message
        assert found.evidence.file == "records/activation.jsonl"

    def test_units_that_come_back(self):
        dead = [0.9] * 10 + [0.1] * (len(STEPS) - 10)
        assert judge("dead_relu", activation=relu(dead), loss=STANDS) is None

    @pytest.mark.parametrize(("units", "expected"), [(4, None), (8, None), (64, "warning")])
    def test_small_layers_need_more(self, units, expected):
        rows = relu(0.62, units=units)
        assert severity("dead_relu", activation=rows, loss=STANDS) == expected

    def test_of_a_small_batch_only_the_window_counts(self):
        rows = relu(0.7, samples=4, known=False)
        assert judge("dead_relu", activation=rows, loss=STANDS) is None
        rows = relu(0.7, samples=4)
        assert severity("dead_relu", activation=rows, loss=STANDS) == "warning"

    def test_found_before_the_window_is_full(self):
        rows = relu(1.0, STEPS[:3], known=False)
        assert severity("dead_relu", activation=rows, loss=STANDS) == "critical"
        assert judge("dead_relu", activation=rows[:2], loss=STANDS) is None

    def test_several_layers_of_a_part_are_one_finding(self):
        other = [{**row, "component": "net.body.3"} for row in relu(0.7)]
        found = judge("dead_relu", activation=relu(0.95) + other, loss=STANDS)
        assert "(as in `net.body.3`)" in found.message


def tanh(share, **more):
    columns = {"component": "net.body.1", "part": "body", "function": "tanh", "units": 64}
    columns |= {"count": 2048, "saturated_share": share, "saturated_units": 0.1}
    columns |= {"last": 0, "last_of_part": 1, "gate": None}
    return every(STEPS, **{**columns, **more})


class TestSaturatedActivation:
    rule = "saturated_activation"

    @pytest.mark.parametrize(
        ("share", "loss", "expected"),
        [
            (0.3, STANDS, None),
            (0.6, STANDS, "warning"),
            (0.6, FALLS, None),
            (0.9, FALLS, "warning"),
            (0.98, STANDS, "critical"),
        ],
    )
    def test_by_share_and_loss(self, share, loss, expected):
        assert severity(self.rule, activation=tanh(share), loss=loss) == expected

    def test_an_output_may_be_sure(self):
        assert judge(self.rule, activation=tanh(0.99, last=1), loss=STANDS) is None

    def test_the_output_of_a_generator_may_be_sure(self):
        grad = [{"step": 1, "component": "g", "optimizer": i} for i in range(2)]
        rows = tanh(0.99)
        assert judge(self.rule, activation=rows, loss=STANDS, grad=grad) is None
        assert judge(self.rule, activation=rows, loss=STANDS, grad=grad[:1]) is not None

    @pytest.mark.parametrize(("gate", "expected"), [(1, None), (None, None), (0, "critical")])
    def test_a_gate_may_be_shut(self, gate, expected):
        rows = tanh(0.99, function="sigmoid", gate=gate)
        assert severity(self.rule, activation=rows, loss=STANDS) == expected


def latent(cosines, **more):
    cosines = cosines if isinstance(cosines, list) else [cosines] * len(STEPS)
    columns = {"component": "net.head", "side": "input", "features": 32, "mean_cosine": cosines}
    columns |= {"std_ratio": [(1 - c) ** 0.5 for c in cosines], "effective_rank": 1.0}
    return every(STEPS, **{**columns, **more})


class TestRepresentationCollapse:
    rule = "representation_collapse"

    def test_all_the_same(self):
        found = judge(self.rule, latent=latent(0.9999), loss=STANDS)
        assert (found.severity, found.first_step) == ("critical", 9)
        assert "mean cosine between two of them is 0.9999" in found.message

    def test_a_rank_of_one_alone_is_no_fault(self):
        assert judge(self.rule, latent=latent(0.2), loss=STANDS) is None

    def test_the_cosines_of_relu_features(self):
        assert judge(self.rule, latent=latent(0.9), loss=STANDS) is None

    def test_at_the_start_only(self):
        cosines = [0.999] * 5 + [0.5] * (len(STEPS) - 5)
        assert judge(self.rule, latent=latent(cosines), loss=STANDS) is None

    def test_on_its_way_out(self):
        cosines = [1 - 0.0005 * 1.1**i for i in range(len(STEPS))]
        assert judge(self.rule, latent=latent(cosines), loss=STANDS) is None

    @pytest.mark.parametrize(("cosine", "expected"), [(1.0, "warning"), (0.9999, "info")])
    def test_exactly_the_same_from_the_start_though_the_loss_falls(self, cosine, expected):
        assert severity(self.rule, latent=latent(cosine), loss=FALLS) == expected

    def test_a_collapse_that_lowers_the_loss(self):
        cosines = [0.3] * 5 + [0.9999] * (len(STEPS) - 5)
        assert severity(self.rule, latent=latent(cosines), loss=FALLS) == "critical"

    @pytest.mark.parametrize(("norm", "expected"), [(0.0, "critical"), (1.0, None)])
    def test_nothing_but_zeros(self, norm, expected):
        none = [None] * len(STEPS)
        rows = latent(0.0, mean_cosine=none, std_ratio=none, latent_norm=norm)
        assert severity(self.rule, latent=rows, loss=STANDS) == expected

    @pytest.mark.parametrize(("std", "expected"), [(1.0, "info"), (0.001, "critical")])
    def test_answers_that_vary_speak_for_it(self, std, expected):
        looks = looked(std, STEPS, target_std=1.0)
        found = severity(self.rule, latent=latent(0.9999), loss=STANDS, wiring=looks)
        assert found == expected

    def test_the_output_of_the_last_layer(self):
        more = {"output_cosine": [0.4] * 3 + [0.99999] * (len(STEPS) - 3), "output_features": 32}
        found = judge(self.rule, latent=latent(0.3, **more), loss=FALLS)
        assert found.severity == "critical"
        assert "in the output of `net.head` (32 dimensions)" in found.message
        looks = looked(1.0, STEPS, target_std=1.0)
        assert judge(self.rule, latent=latent(0.3, **more), loss=FALLS, wiring=looks) is None
        few = {**more, "output_features": 2}
        assert judge(self.rule, latent=latent(0.3, **few), loss=FALLS) is None


def looked(std, steps=STEPS, at="mse_loss", **more):
    columns = {"component": None, "check": "constant_prediction", "state": "ok", "at": at}
    columns |= {"call": 0, "samples": 32, "from_batch": 1, "std": std, "abs_max": 2.0}
    columns |= {"top_share": None, "target_std": None, "target_top_share": None}
    return every(steps, **{**columns, **more})


class TestConstantPrediction:
    rule = "constant_prediction"

    def test_exactly_the_same(self):
        found = judge(self.rule, wiring=looked(0.0, target_std=1.0), loss=STANDS)
        assert (found.severity, found.first_step) == ("critical", 9)
        assert "nearly the same answer from the first look on" in found.message

    def test_in_mid_run(self):
        std = [0.8] * 12 + [1e-7] * (len(STEPS) - 12)
        found = judge(self.rule, wiring=looked(std, target_std=1.0), loss=STANDS)
        assert (found.severity, found.first_step) == ("critical", 129)
        assert "since step 129" in found.message

    def test_soon_after_it_began(self):
        rows = looked([0.8] * 12 + [1e-7] * 2, STEPS[:14], target_std=1.0)
        assert severity(self.rule, wiring=rows, loss=STANDS) == "warning"

    def test_targets_that_hardly_differ(self):
        rows = looked(0.0008, target_std=0.001, abs_max=100.0)
        assert judge(self.rule, wiring=rows, loss=STANDS) is None

    def test_a_head_of_zeros_that_leaves_them(self):
        std = [0.0, 0.01, 0.02] + [0.3] * (len(STEPS) - 3)
        rows = looked(std, at="cross_entropy")
        assert judge(self.rule, wiring=rows, loss=FALLS) is None
        assert judge(self.rule, wiring=rows[:1], loss=FALLS) is None

    def test_a_slow_start_that_grows(self):
        std = [0.002 * 1.05**i for i in range(len(STEPS))]
        rows = looked(std, at="cross_entropy")
        assert judge(self.rule, wiring=rows, loss=STANDS) is None

    def test_what_is_not_compared_with_the_batch_is_left_alone(self):
        rows = looked(0.0, target_std=1.0, from_batch=0)
        assert judge(self.rule, wiring=rows, loss=STANDS) is None

    def test_predictions_that_shrink_towards_the_mean(self):
        std = [max(0.05, 0.3 - 0.03 * i) for i in range(len(STEPS))]
        rows = looked(std, target_std=1.0)
        assert severity(self.rule, wiring=rows, loss=FALLS) == "warning"
        rows = looked([0.12] * 3 + [0.2] * (len(STEPS) - 3), target_std=1.0)
        assert judge(self.rule, wiring=rows, loss=FALLS) is None

    @pytest.mark.parametrize(
        ("labels", "loss", "expected"),
        [(0.5, STANDS, "warning"), (0.95, STANDS, None), (0.5, FALLS, None)],
    )
    def test_one_class_throughout(self, labels, loss, expected):
        rows = looked(0.4, at="cross_entropy", top_share=1.0, target_top_share=labels)
        assert severity(self.rule, wiring=rows, loss=loss) == expected

    def test_the_variance_of_the_loss_rows(self):
        rows = [{**row, "variance": 1e-14, "top_share": 1.0} for row in STANDS]
        found = judge(self.rule, loss=rows)
        assert (found.severity, found.evidence.file) == ("critical", "records/loss.jsonl")
        tiny = looked(0.0008, target_std=0.001)
        assert judge(self.rule, loss=rows, wiring=tiny) is None


def test_rows_with_few_columns_are_read():
    steps = [{"step": step, "component": "a"} for step in STEPS]
    rows = {"activation": steps, "latent": steps, "wiring": steps, "loss": steps}
    assert diagnose(MadeUpRun(rows=rows), on_error="raise") == []


@pytest.mark.parametrize(("stuck", "found"), [(0.0, False), (0.9, True)])
def test_what_a_part_gives_may_be_black_and_white(stuck, found):
    row = {"component": "net.decoder.out", "part": "decoder", "function": "sigmoid", "gate": 0}
    row |= {"saturated_share": 0.83, "saturated_units": stuck, "last": 0, "last_of_part": 1}
    rows = [{**row, "step": step} for step in range(99, 800, 100)]
    rules = {one.rule for one in diagnose(MadeUpRun({"activation": rows})) if one.rank > 0}
    assert ("saturated_activation" in rules) == found
