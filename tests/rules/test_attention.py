"""Do the attention rules judge heads whose answer is known?"""

import pytest

from tests.rules.insides import FALLS, STANDS, check_yaml, every, judge, losses, severity

STEPS = list(range(9, 300, 10))


def test_yaml_repeats_the_python_defaults():
    check_yaml("attention", ("attention_collapse", "attention_uniform", "attention_sink"))


def heads(entropies, steps=STEPS, *, sink=0.1, key=3, mass=0.2, keys=12.0, **more):
    """Rows of a module with one head an entry: an entropy, or a list of them by step."""
    rows = []
    for head, entropy in enumerate(entropies):
        columns = {"component": "net.attention", "part": "net", "head": head, "keys": keys}
        columns |= {"entropy_normalized": entropy, "sink_share": sink, "key_1": key}
        rows += every(steps, **columns, mass_1=mass, all_keys=12, **more)
    return rows


class TestCollapse:
    rule = "attention_collapse"

    @pytest.mark.parametrize(
        ("entropy", "mass", "loss", "expected"),
        [
            (0.5, 0.2, STANDS, None),
            (0.05, 0.2, FALLS, "info"),
            (0.05, 0.95, FALLS, "info"),
            (0.05, 0.2, STANDS, "warning"),
            (0.001, 0.99, STANDS, "critical"),
        ],
    )
    def test_by_entropy_and_loss(self, entropy, mass, loss, expected):
        rows = heads([entropy] * 4, mass=mass)
        assert severity(self.rule, attention_head=rows, loss=loss) == expected

    def test_a_minority_of_heads(self):
        rows = heads([0.01, 0.01, 0.5, 0.6])
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None

    def test_in_mid_run_with_a_loss_that_rises(self):
        entropy = [0.7] * 12 + [0.01] * (len(STEPS) - 12)
        rows = heads([entropy] * 4, mass=0.95)
        loss = losses(2.0, 0.2, jump_at=120, to=2.0)
        found = judge(self.rule, attention_head=rows, loss=loss)
        assert (found.severity, found.first_step, found.component) == ("critical", 129, "net")
        assert "4 of 4 heads of `net.attention` look at a single key since step 129" in (
            found.message
        )

    @pytest.mark.parametrize(("before", "expected"), [(0.7, "warning"), (0.2, "info")])
    def test_at_once_though_the_loss_falls(self, before, expected):
        entropy = [before] * 12 + [1e-6] * (len(STEPS) - 12)
        rows = heads([entropy] * 4)
        assert severity(self.rule, attention_head=rows, loss=FALLS) == expected

    def test_two_keys_are_no_choice(self):
        rows = heads([0.01] * 4, keys=2.0)
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None

    def test_by_modules_where_heads_are_not_known(self):
        rows = [{k: v for k, v in row.items() if k != "head"} for row in heads([0.01])]
        assert severity(self.rule, attention=rows, loss=STANDS) == "warning"


class TestUniform:
    rule = "attention_uniform"

    @pytest.mark.parametrize(
        ("entropy", "loss", "expected"),
        [
            (0.97, STANDS, None),
            (0.99, FALLS, "info"),
            (0.99, STANDS, "warning"),
            (0.9999, losses(2.0, 1.6), "warning"),
            (0.99, losses(2.0, 1.6), "info"),
            (1.0, FALLS, "warning"),
        ],
    )
    def test_by_entropy_and_loss(self, entropy, loss, expected):
        rows = heads([entropy] * 4)
        assert severity(self.rule, attention_head=rows, loss=loss) == expected

    def test_one_head_that_chooses_is_enough(self):
        rows = heads([0.999, 0.999, 0.999, 0.8])
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None

    def test_every_transformer_begins_so(self):
        rows = heads([0.999] * 4, STEPS[:6])
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None

    def test_a_fall_back_in_mid_run(self):
        entropy = [0.6] * 12 + [1.0] * 3
        rows = heads([entropy] * 4, STEPS[:15])
        found = judge(self.rule, attention_head=rows, loss=FALLS)
        assert (found.severity, found.first_step) == ("warning", 129)
        assert "scores are exactly the same" in found.message


class TestSink:
    rule = "attention_sink"

    @pytest.mark.parametrize(
        ("sink", "loss", "expected"),
        [
            (0.3, STANDS, None),
            (0.7, FALLS, "info"),
            (0.7, STANDS, "warning"),
            (0.97, FALLS, "warning"),
        ],
    )
    def test_by_share_and_loss(self, sink, loss, expected):
        rows = heads([0.4] * 4, sink=sink)
        assert severity(self.rule, attention_head=rows, loss=loss) == expected

    def test_few_keys_have_large_shares(self):
        rows = heads([0.4] * 4, sink=0.55, keys=3.0)
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None

    def test_a_mask_that_leaves_one_key(self):
        rows = heads([None] * 4, sink=1.0, keys=1.0, key=0, mass=1.0)
        found = judge(self.rule, attention_head=rows, loss=STANDS)
        assert found.severity == "warning"
        assert "4 of 4 heads of `net.attention` give 100 % of their weight" in found.message

    def test_a_single_key_is_no_sink(self):
        rows = [{**row, "all_keys": 1} for row in heads([None] * 4, sink=1.0, keys=1.0)]
        assert judge(self.rule, attention_head=rows, loss=STANDS) is None
