"""Schedules that are counted in the wrong unit, end too early, never end their warm-up, or grow."""

from itertools import pairwise
from typing import Any

import torch

from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, ADAMW, SGD, both, learns, worse_than
from tests.faults.networks import Learner
from tests.faults.witness import Witness

STARVED = ("learning_rate_too_low", "update_too_small", "frozen_weights")
FLAT = ("not_learning", "slow_convergence", "loss_plateau")
CONSTANT = {"model": {"schedule": "constant"}}


def scheduled(
    target: str,
    rate: float,
    kind: str,
    steps: int | None = None,
    factor: float = 0.1,
    **trainer: Any,
) -> dict[str, Any]:
    model = {"schedule": kind, "schedule_steps": steps, "schedule_factor": factor}
    return {"optimizer": {"_target_": target, "lr": rate}, "model": model, "trainer": trainer}


def falls_to(share: float, step: int) -> shared.Check:
    """From `step` on the rate is at most this share of the first."""

    def check(witness: Witness) -> None:
        seen = max(witness.rates[step:]) / witness.rates[0]
        assert seen <= share, f"the rate is still {seen:.3g} of the first"

    return check


@fault(
    "exponential_decay_every_step",
    "gru",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    config=scheduled(ADAM, 3e-3, "exponential", factor=0.9),
    verify=both(falls_to(1e-4, 100), worse_than("exponential_decay_every_step", CONSTANT)),
    repairable=True,
    cured=learns(),
)
def _exponential(config: Config) -> Job:
    return shared.gru(config)


@fault(
    "exponential_decay_every_step_sgd",
    "cnn",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    config=scheduled(SGD, 0.02, "exponential", factor=0.8),
    verify=both(falls_to(1e-4, 60), worse_than("exponential_decay_every_step_sgd", CONSTANT)),
    repairable=True,
    cured=learns(),
)
def _exponential_sgd(config: Config) -> Job:
    return shared.cnn(config)


@fault(
    "step_decay_in_epochs_made_every_step",
    "gnn",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    config=scheduled(ADAMW, 1e-3, "step", 10, factor=0.1, max_steps=300),
    verify=both(
        falls_to(1e-5, 60), worse_than("step_decay_in_epochs_made_every_step", CONSTANT, 1.3, 0.0)
    ),
    repairable=True,
    cured=learns(0.8),
)
def _step(config: Config) -> Job:
    return shared.gnn(config)


@fault(
    "cosine_of_ten_epochs_made_every_step",
    "mlp",
    cause="scheduler_misuse",
    found=("loss_oscillation",),
    config=scheduled(SGD, 0.1, "cosine", 10),
    verify=lambda witness: _swings(witness, 15),
    repairable=True,
    cured=learns(),
)
def _cosine(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "cosine_of_five_epochs_made_every_step",
    "transformer",
    cause="scheduler_misuse",
    found=("loss_oscillation",),
    config=scheduled(ADAM, 3e-3, "cosine", 5),
    verify=lambda witness: _swings(witness, 30),
    repairable=True,
    cured=learns(),
)
def _cosine_transformer(config: Config) -> Job:
    return shared.transformer(config)


def _swings(witness: Witness, times: int) -> None:
    top, rates = max(witness.rates), witness.rates
    turns = sum(before < 0.5 * top <= after for before, after in pairwise(rates))
    assert turns >= times / 2, f"the rate comes back {turns} times"
    assert min(rates) < 0.01 * top, "the rate never falls"


@fault(
    "linear_decay_ends_after_thirty_steps",
    "transformer",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    onset=30,
    config=scheduled(ADAM, 3e-4, "linear", 30),
    verify=both(falls_to(0.0, 31), worse_than("linear_decay_ends_after_thirty_steps", CONSTANT)),
    repairable=True,
    cured=learns(),
)
def _linear(config: Config) -> Job:
    return shared.transformer(config)


@fault(
    "linear_decay_of_a_shorter_run",
    "autoencoder",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    onset=100,
    config=scheduled(ADAM, 5e-4, "linear", 100, max_steps=400),
    verify=both(
        falls_to(0.0, 101), worse_than("linear_decay_of_a_shorter_run", CONSTANT, 2.0, 0.0)
    ),
    repairable=True,
    cured=learns(),
)
def _linear_short(config: Config) -> Job:
    return shared.autoencoder(config)


@fault(
    "one_cycle_peaks_far_too_high",
    "mlp",
    cause=("scheduler_misuse", "learning_rate_too_high"),
    found=("exploding_gradient", "update_too_large", "divergence", "loss_spike", "nonfinite_loss"),
    onset=20,
    config=scheduled(SGD, 0.1, "one_cycle", factor=100.0, max_steps=250),
    verify=lambda witness: _peaks(witness, "one_cycle_peaks_far_too_high"),
    repairable=True,
    cured=learns(),
)
def _one_cycle(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "one_cycle_peaks_far_too_high_adam",
    "gru",
    cause=("scheduler_misuse", "learning_rate_too_high"),
    found=(
        "exploding_gradient",
        "update_too_large",
        "divergence",
        "loss_spike",
        "loss_oscillation",
    ),
    onset=20,
    config=scheduled(ADAM, 3e-3, "one_cycle", factor=300.0, max_steps=250),
    verify=lambda witness: _peaks(witness, "one_cycle_peaks_far_too_high_adam"),
    repairable=True,
    cured=learns(),
)
def _one_cycle_gru(config: Config) -> Job:
    return shared.gru(config)


def _peaks(witness: Witness, name: str) -> None:
    top = max(witness.rates) / witness.model.config["optimizer"]["lr"]
    assert top > 50, f"the peak is {top:.3g} times the rate that is asked for"
    worse_than(name, CONSTANT)(witness)


@fault(
    "warm_up_that_never_ends",
    "contrastive",
    cause=("scheduler_misuse", "learning_rate_too_low"),
    found=(*STARVED, *FLAT),
    config=scheduled(ADAM, 3e-3, "warmup", 1_000_000),
    verify=both(
        lambda witness: _stays_low(witness), worse_than("warm_up_that_never_ends", CONSTANT, 2.0)
    ),
    repairable=True,
    cured=learns(),
)
def _warm_up(config: Config) -> Job:
    return shared.contrastive(config)


def _stays_low(witness: Witness) -> None:
    top = max(witness.rates)
    assert top < 1e-3 * 3e-3, f"the rate comes to {top:.3g}"


@fault(
    "rate_that_grows_every_step",
    "mlp",
    cause=("scheduler_misuse", "learning_rate_too_high"),
    found=("exploding_gradient", "update_too_large", "divergence", "loss_spike", "nonfinite_loss"),
    onset=60,
    config=scheduled(SGD, 0.1, "exponential", factor=1.05),
    verify=lambda witness: _grows(witness),
    repairable=True,
    cured=learns(),
)
def _growing(config: Config) -> Job:
    return shared.mlp(config)


def _grows(witness: Witness) -> None:
    assert witness.rates[-1] > 1e3 * witness.rates[0], "the rate does not grow"
    early = witness.mean_loss(40, 60)
    late = max(witness.losses[60:], key=lambda loss: loss if loss == loss else float("inf"))
    assert not late < 5 * early, f"the loss goes from {early:.3g} to {late:.3g} only"


class Plateaued(Learner):
    """Lowers the rate on a plateau, and looks for one after every batch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.config["model"].get("schedule") != "plateau":
            return optimizer
        patience = self.config["model"]["schedule_steps"]
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience)
        following = {"scheduler": scheduler, "interval": "step", "monitor": "train_loss"}
        return [optimizer], [following]


@fault(
    "plateau_schedule_looks_at_every_batch",
    "gnn",
    cause="scheduler_misuse",
    found=(*STARVED, *FLAT),
    onset=10,
    config=scheduled(ADAM, 1e-3, "plateau", 3, max_steps=300),
    verify=both(
        falls_to(1e-3, 100), worse_than("plateau_schedule_looks_at_every_batch", CONSTANT, 1.3, 0)
    ),
    repairable=True,
    cured=learns(0.8),
)
def _plateau(config: Config) -> Job:
    made = shared.gnn(config)
    return Job(Plateaued(made.model.net, made.model.loss, config), made.train, made.val)
