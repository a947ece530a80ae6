"""What remedies ask for can be trained with, and mends: sick runs of the corpus, trained again."""

import pytest

from tests.faults import repair as repairs
from tests.faults.case import CASES, all_cases

all_cases()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        # one cause at a time: no rate is raised for parts that the activation starves
        ("ten_sigmoid_layers", {"model.activation": "gelu"}),
        ("sgd_dampening", {"optimizer.dampening": 0.0}),
        ("decoder_has_a_rate_far_too_high", {"component_lrs.decoder": 1.0}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bfloat16_weights_lose_their_updates", {"hardware.precision": "bf16-mixed"}),
                ("adam_in_float16_divides_by_zero", {"hardware.precision": "bf16-mixed"}),
                ("sgd_rate_too_small_gru", {"optimizer.lr": pytest.approx(0.0954, rel=0.2)}),
            )
        ),
    ],
)
def test_a_sick_run_is_mended_in_one_round(name, overrides, tmp_path):
    done = repairs.repair(CASES[name], tmp_path)
    assert (done.end, done.rounds, done.overrides) == ("healthy", 1, overrides)


def test_overrides_that_do_not_train_are_no_repair(tmp_path, monkeypatch):
    train = repairs.train

    def once(case, config, folder):
        if folder.name != "round_0":
            raise ValueError("no such key")
        return train(case, config, folder)

    monkeypatch.setattr(repairs, "train", once)
    done = repairs.repair(CASES["sgd_dampening"], tmp_path)
    assert done.end == "does not train: ValueError: no such key"
    assert (done.mended, done.rounds, done.cause) == (False, 1, "learning_rate_too_low")
