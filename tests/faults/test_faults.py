"""A fixed part of what `make faults` trains, and whether the frame around the cases stands."""

import pytest

from lightning_diag.rules import RULES
from tests.faults.case import CASES, all_cases
from tests.faults.trial import attempt

FAULTY = (
    *("sgd_rate_ten_times_too_large", "adam_rate_hundred_times_mlp", "ten_sigmoid_layers"),
    *("logarithm_of_zero_at_the_start", "distance_of_a_sample_to_itself_in_mid_run"),
    *("cosine_of_ten_epochs_made_every_step", "adamw_rate_too_small_transformer"),
    *("mlp_relu_shifted_start", "gate_closes_in_mid_run", "towers_without_negatives"),
    *("transformer_mask_leaves_the_first_key", "mlp_softmax_before_cross_entropy"),
    *("gru_optimizer_has_a_copy", "cnn_features_detached_from_120", "mlp_manual_without_zero_grad"),
    *("cnn_pictures_from_0_to_255", "mlp_missing_values_are_nan", "wide_network_on_few_samples"),
    # between layers of one part; put back; replaced; tiny; from mid-run on; before a break; clipped
    *("seven_sigmoid_layers_with_momentum", "gnn_average_of_weights_put_back_from_100"),
    *("cnn_head_replaced_at_100", "cnn_pictures_divided_by_255_twice"),
    *("mlp_features_no_longer_standardized_from_120", "recurrent_network_explodes"),
    *("clip_a_thousand_times_too_tight", "gan_generator_judged_by_detached_points"),
)
HEALTHY = (
    *("mlp_adam", "mean_teacher", "distillation", "weight_norm", "second_loss_starts_late"),
    *("straight_through_codes", "values_from_a_slow_copy", "triplets_without_loss"),
)

all_cases()


def test_there_are_enough_cases_of_both_kinds():
    faulty = [one for one in CASES.values() if not one.healthy]
    healthy = [one for one in CASES.values() if one.healthy]
    assert len(faulty) >= 60
    assert len(healthy) >= 60
    assert sum(bool(one.tricky) for one in healthy) >= 40


def test_cases_name_rules_that_exist():
    named = {rule for one in CASES.values() for rule in (*one.found, *one.cause)}
    assert named <= set(RULES)


def test_every_rule_is_the_cause_of_a_case():
    # several processes, or a device: they have tests of their own
    elsewhere = {"replica_drift", "gpu_underused"}
    causes = {rule for one in CASES.values() for rule in one.cause}
    assert set(RULES) - causes - elsewhere == set()


def test_both_halves_hold_a_fair_share():
    for healthy in (True, False):
        group = [one for one in CASES.values() if one.healthy == healthy]
        assert 0.35 < sum(one.held_out for one in group) / len(group) < 0.65


@pytest.mark.parametrize("name", FAULTY)
def test_a_planted_fault_is_found_with_its_cause(name, tmp_path):
    trial = attempt(CASES[name], tmp_path / "run")
    assert not trial.error
    assert trial.found
    assert trial.right_cause, [one.rule for one in trial.accusations]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name, tmp_path):
    trial = attempt(CASES[name], tmp_path / "run")
    assert not trial.error
    assert trial.accusations == []
