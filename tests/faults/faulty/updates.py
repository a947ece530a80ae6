"""Weights that stand still, or that one step throws far away."""

import math
from typing import Any

import torch
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, ADAMW, SGD, both, learns, worse_than
from tests.faults.networks import MLP, Learner
from tests.faults.witness import Witness

STILL = ("update_too_small", "frozen_weights")


def rests(part: str) -> shared.Check:
    """A part has gradients and no parameter of it ever changes, while another does."""

    def check(witness: Witness) -> None:
        names = [name for name in witness.first if name.startswith(f"net.{part}")]
        assert not any(map(witness.changed, names)), f"{part} changes"
        assert any(map(witness.changed, witness.first)), "nothing changes at all"
        norms = [found[name] for found in witness.norms_by_name for name in names]
        assert all(norm is not None for norm in norms), f"{part} has no gradients"
        assert max(norms) > 0, f"{part} has gradients of zero"

    return check


@fault(
    "body_has_a_rate_of_zero",
    "mlp",
    cause=STILL,
    found=("learning_rate_too_low",),
    config={"component_lrs": {"body": 0.0}},
    verify=rests("body"),
    repairable=True,
    cured=lambda witness: _moves(witness, "body"),
)
def _frozen_body(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "blocks_have_a_rate_of_zero",
    "transformer",
    cause=STILL,
    found=("learning_rate_too_low",),
    config={"component_lrs": {"blocks": 0.0}},
    verify=rests("blocks"),
    repairable=True,
    cured=lambda witness: _moves(witness, "blocks"),
)
def _frozen_blocks(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "encoder_has_a_tiny_rate",
    "autoencoder",
    cause=("update_too_small", "learning_rate_too_low", "frozen_weights"),
    found=("slow_convergence",),
    config={"component_lrs": {"encoder": 1e-5}},
    verify=lambda witness: _hardly(witness, "encoder"),
    repairable=True,
    cured=lambda witness: _moves(witness, "encoder"),
)
def _tiny_encoder(config: Config) -> Job:
    return shared.autoencoder(config)


def _relative(witness: Witness, part: str) -> float:
    names = [name for name in witness.first if name.startswith(f"net.{part}")]
    moved = sum(float((witness.last[n] - witness.first[n]).square().sum()) for n in names)
    return math.sqrt(moved / sum(float(witness.first[n].square().sum()) for n in names))


def _hardly(witness: Witness, part: str) -> None:
    seen, whole = _relative(witness, part), _relative(witness, "")
    assert seen < 1e-3 < 0.05 < whole, f"{part} moves by {seen:.3g}, the network by {whole:.3g}"


def _moves(witness: Witness, part: str) -> None:
    assert _relative(witness, part) > 0.02, f"{part} moves by {_relative(witness, part):.3g}"


@fault(
    "features_stop_in_mid_run",
    "cnn",
    cause=STILL,
    found=("learning_rate_too_low", "scheduler_misuse"),
    onset=100,
    config={
        "optimizer": {"_target_": SGD, "lr": 0.02},
        "component_lrs": {"features": 1.0},
        "trainer": {"max_steps": 250},
    },
    verify=lambda witness: _stops(witness),
)
def _stopped_features(config: Config) -> Job:
    made = shared.cnn(config)
    made.model.plans[100] = lambda learner: _note(learner)
    return made


def _note(learner: Learner) -> None:
    shared.times_rate(0.0, "features")(learner)
    learner.at_the_stop = {n: p.detach().clone() for n, p in learner.named_parameters()}


def _stops(witness: Witness) -> None:
    before = witness.model.at_the_stop
    changed = {
        name for name, tensor in before.items() if not torch.equal(tensor, witness.last[name])
    }
    assert changed == {"net.head.weight", "net.head.bias"}, f"{sorted(changed)} change"
    assert witness.changed("net.features.0.weight"), "the features never changed"
    late = [found["net.features.0.weight"] for found in witness.norms_by_name[100:]]
    assert min(late) > 0, "the features have no gradient"


@fault(
    "bfloat16_weights_lose_their_updates",
    "mlp",
    cause=(*STILL, "learning_rate_too_low"),
    found=("slow_convergence", "not_learning"),
    config={
        "optimizer": {"_target_": SGD, "lr": 2e-3},
        "hardware": {"precision": "bf16-true"},
    },
    verify=lambda witness: _rounded_away(witness),
    repairable=True,
    cured=lambda witness: _moves(witness, "body"),
)
def _bfloat16(config: Config) -> Job:
    return shared.mlp(config)


def _rounded_away(witness: Witness) -> None:
    kind = witness.last["net.body.0.weight"].dtype
    assert kind == torch.bfloat16, f"the weights are {kind}"
    assert min(witness.norms) > 0.01, "there are no gradients"
    kept = sum(int((witness.last[n] == t).sum()) for n, t in witness.first.items())
    share = kept / sum(t.numel() for t in witness.first.values())
    assert share > 0.8, f"only {share:.0%} of the weights never changed"


@fault(
    "head_has_a_rate_far_too_high",
    "transformer",
    cause=("update_too_large", "learning_rate_too_high"),
    found=("exploding_gradient", "loss_spike", "loss_oscillation", "divergence"),
    config={
        "optimizer": {"_target_": ADAM, "lr": 2e-3},
        "component_lrs": {"head": 3000.0},
    },
    verify=both(
        lambda witness: _thrown(witness, "head", 5.0),
        worse_than(
            "head_has_a_rate_far_too_high",
            {"component_lrs": {"head": 1.0}},
            5.0,
            0.005,
        ),
    ),
    repairable=True,
    cured=learns(),
)
def _fast_head(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "decoder_has_a_rate_far_too_high",
    "autoencoder",
    cause=("update_too_large", "learning_rate_too_high"),
    found=("exploding_gradient", "loss_spike", "loss_oscillation", "divergence", "dead_relu"),
    config={
        "optimizer": {"_target_": ADAMW, "lr": 1e-3},
        "component_lrs": {"decoder": 1000.0},
    },
    verify=both(
        lambda witness: _thrown(witness, "decoder", 3.0),
        worse_than(
            "decoder_has_a_rate_far_too_high",
            {"component_lrs": {"decoder": 1.0}},
            2.0,
        ),
    ),
    repairable=True,
    cured=learns(),
)
def _fast_decoder(config: Config) -> Job:
    return shared.autoencoder(config)


def _thrown(witness: Witness, part: str, factor: float) -> None:
    seen = _relative(witness, part)
    assert seen > factor, f"{part} moves by {seen:.3g} of its norm"


@fault(
    "body_is_thawed_with_a_huge_rate",
    "mlp",
    cause=("update_too_large", "learning_rate_too_high", "scheduler_misuse"),
    found=("exploding_gradient", "loss_spike", "divergence", "dead_relu", "nonfinite_loss"),
    onset=120,
    config={
        "optimizer": {"_target_": ADAM, "lr": 1e-3},
        "component_lrs": {"body": 0.1},
        "trainer": {"max_steps": 250},
    },
    verify=lambda witness: _leaps(witness, 120),
)
def _thawed(config: Config) -> Job:
    return shared.mlp(config, plans={120: shared.times_rate(5000.0, "body")})


@fault(
    "discriminating_layer_leaps",
    "mlp",
    cause=("update_too_large", "learning_rate_too_high", "scheduler_misuse"),
    found=("exploding_gradient", "loss_spike", "divergence", "gradient_imbalance"),
    onset=100,
    config={
        "optimizer": {"_target_": ADAM, "lr": 2e-3},
        "component_lrs": {"head": 1.0},
    },
    verify=lambda witness: _leaps(witness, 100),
)
def _leaping_head(config: Config) -> Job:
    x, y = data.regression(2048)
    plans: dict[int, Any] = {100: shared.times_rate(300.0, "head")}
    return shared.job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, (x, y), plans=plans)


def _leaps(witness: Witness, step: int) -> None:
    before = max(witness.moves[step - 20 : step])
    after = max(witness.moves[step : step + 10])
    assert after > 20 * before, f"steps of {before:.3g} become {after:.3g}"
    loss, worst = witness.mean_loss(step - 20, step), max(witness.losses[step : step + 40])
    assert not worst < 3 * loss, f"the loss goes from {loss:.3g} to {worst:.3g}"
