"""Unscale, measure, clip, step: do we keep Lightning's order, and measure what it is about to clip?

The truth is worked out apart from the training: from the weights at the start of a window and its
batches, in double precision, with autograd alone.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lightning_diag
from lightning_diag import RunLogger, diagnose
from lightning_diag.callbacks import gradient_health
from lightning_diag.lightning import Callback, Trainer
from lightning_diag.suites import SUITES
from lightning_diag.tuning.clip_value import suggest_clip_value
from tests.callbacks.witness import lightning, rows
from tests.promises.networks import Classifier, batches
from tests.promises.trace import QUIET, differences, seed, snapshot

WINDOW, WINDOWS, SCALE = 2, 6, 1024.0
CLIPS = {"norm": 1.3, "value": 0.3}


class Scaler(torch.amp.GradScaler):
    """A real gradient scaler that says when it is at work."""

    def __init__(self, events: list[str]) -> None:
        super().__init__("cpu", init_scale=SCALE)
        self.events = events

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append("unscale")
        super().unscale_(optimizer)


class Told(Classifier):
    """A network without chance in it, which keeps what a window began with, and its gradients.

    It computes in single precision whatever the Trainer says, so that scaling alone is on trial.
    """

    def __init__(self, plant_at: int | None = None) -> None:
        seed()
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.net.attend.dropout = 0.0
        self.plant_at, self.window = plant_at, WINDOW
        self.events: list[str] = []
        self.windows: list[tuple[dict[str, Tensor], list[list[Tensor]]]] = []
        self.stepped: list[tuple[float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx % self.window == 0:
            self.windows.append((deepcopy(self.net.state_dict()), []))
        self.windows[-1][1].append(batch)
        return self.clear_loss(batch)

    def clear_loss(self, batch: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.loss(batch, -1)

    def on_after_backward(self) -> None:
        if len(self.windows) - 1 == self.plant_at:
            self.net.head.weight.grad[0, 0] = torch.inf

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.events.append("clip")
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: self.events.append("begin"))
        optimizer.register_step_post_hook(lambda *_: self._stepped())
        return optimizer

    def _stepped(self) -> None:
        self.events.append("step")
        self.stepped.append(sizes([p.grad for p in self.net.parameters()]))


class ByHand(Told):
    """Manual optimization, with the clip where Lightning's order puts it."""

    automatic_optimization = False

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.early, self.window = early, 1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.early:
            self._clip(optimizer.optimizer)
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.early:
            self._clip(optimizer)

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append("clip")
        self.clip_gradients(optimizer, CLIPS["norm"], "norm")


def sizes(gradients: list[Tensor | None]) -> tuple[float, float]:
    """Norm and largest magnitude of all gradients together, in double precision."""
    whole = torch.cat([g.detach().double().reshape(-1) for g in gradients if g is not None])
    return float(whole.norm()), float(whole.abs().max())


def truth(module: Told) -> list[tuple[float, float]]:
    """Norm and largest magnitude of the gradient of each window: its mean loss, differentiated."""
    other = Told()
    found = []
    for weights, members in module.windows:
        other.net.float().load_state_dict(weights)
        other.net.double()
        loss = sum(other.loss(batch, -1) for batch in members) / len(members)
        found.append(
            sizes(list(torch.autograd.grad(loss, list(other.net.parameters()), allow_unused=True)))
        )
    return found


def everything() -> list[Callback]:
    """The suite "full", measuring at every step."""
    kinds = [getattr(lightning_diag, name) for name in SUITES["full"]]
    quiet = {"HealthAlerts": {"console": False}, "ComponentProfiler": {"table": False}}
    return [
        kind(every_n_steps=1, on_error="raise", **quiet.get(kind.__name__, {}))
        if kind.__name__ != "BlobMetrics"
        else kind(on_error="raise")
        for kind in kinds
    ]


def train(
    module: Told, folder: Path, callbacks: list[Callback], *, scaled: bool = True, **options: Any
) -> Trainer:
    """Train; "measure" among the module's events is the moment at which gradients are read."""
    seed()
    if scaled:
        precision = lightning("plugins.precision").MixedPrecision
        options["plugins"] = [precision("16-mixed", "cpu", scaler=Scaler(module.events))]
    settings = {**QUIET, "max_epochs": 1, "limit_val_batches": 0, "default_root_dir": folder}
    settings["logger"] = RunLogger(folder)
    if module.automatic_optimization:
        settings["accumulate_grad_batches"] = WINDOW
    trainer = Trainer(callbacks=callbacks, **settings | options)
    read = gradient_health.gradient_table

    def measured(*args: Any, **kwargs: Any) -> Any:
        module.events.append("measure")
        return read(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_health, "gradient_table", measured)
        trainer.fit(module, batches(module.window * WINDOWS))
    return trainer


def order(scaled: bool) -> list[str]:
    """Lightning's order; without a scaler the optimizer's step is what calls the backward pass."""
    with_scaler = ["unscale", "measure", "clip", "begin", "step"]
    return with_scaler if scaled else ["begin", "measure", "clip", "step"]


def whole(folder: Path) -> list[dict[str, Any]]:
    return rows(folder, component=None)


def clipping(algorithm: str) -> dict[str, Any]:
    return {"gradient_clip_val": CLIPS[algorithm], "gradient_clip_algorithm": algorithm}


class Run(NamedTuple):
    algorithm: str
    scaled: bool
    module: Told
    trainer: Trainer
    rows: list[dict[str, Any]]
    truth: list[tuple[float, float]]


@pytest.fixture(scope="module", params=[(a, s) for a in CLIPS for s in (True, False)], ids=str)
def run(request, tmp_path_factory) -> Run:
    algorithm, scaled = request.param
    module, folder = Told(), tmp_path_factory.mktemp("run")
    trainer = train(module, folder, everything(), scaled=scaled, **clipping(algorithm))
    return Run(algorithm, scaled, module, trainer, whole(folder), truth(module))


class TestWhatIsMeasured:
    def test_is_unscaled_accumulated_and_not_yet_clipped(self, run):
        assert len(run.rows) == len(run.truth) == WINDOWS
        for row, (norm, largest) in zip(run.rows, run.truth, strict=True):
            assert row["global_norm"] == pytest.approx(norm, rel=1e-4)
            assert max(-row["min"], row["max"]) == pytest.approx(largest, rel=1e-4)

    def test_is_what_clipping_then_shortens(self, run):
        kind, limit = list(CLIPS).index(run.algorithm), CLIPS[run.algorithm]
        for row, before, after in zip(run.rows, run.truth, run.module.stepped, strict=True):
            size = before[kind]
            assert after[kind] == pytest.approx(min(size, limit), rel=1e-4)
            assert (row["clip_algorithm"], row["clip_value"]) == (run.algorithm, limit)
            assert row["clip_coefficient"] == pytest.approx(min(1, limit / size), rel=1e-4)
            assert row["clipped"] == (size > limit)
        # this is worth something only where some steps are clipped and some are not
        assert 0 < sum(row["clipped"] for row in run.rows) < WINDOWS

    def test_the_order_is_that_of_a_run_without_us(self, run, tmp_path):
        alone = Told()
        without = train(alone, tmp_path, [], scaled=run.scaled, **clipping(run.algorithm))
        assert run.module.events == order(run.scaled) * WINDOWS
        assert alone.events == [event for event in run.module.events if event != "measure"]
        assert not differences(snapshot(run.trainer, run.module), snapshot(without, alone))


@pytest.fixture(scope="module")
def skipped(tmp_path_factory) -> tuple[Told, Path]:
    module, folder = Told(plant_at=3), tmp_path_factory.mktemp("skipped")
    train(module, folder, everything(), **clipping("norm"))
    return module, folder


class TestASkippedStep:
    def test_is_skipped_and_no_more(self, skipped):
        module, folder = skipped
        assert [row["skipped"] for row in whole(folder)] == [0, 0, 0, 1, 0, 0]
        assert [row["skipped_total"] for row in whole(folder)] == [0, 0, 0, 1, 1, 1]
        assert module.events.count("clip") == WINDOWS
        assert module.events.count("step") == WINDOWS - 1

    def test_is_not_counted_as_clipped(self, skipped):
        found = whole(skipped[1])
        assert (found[3]["clipped"], found[3]["clip_coefficient"]) == (0, None)
        for place, row in enumerate(found):
            seen = [one["clipped"] for one in found[: place + 1] if not one["skipped"]]
            assert row["clipped_share"] == pytest.approx(sum(seen) / len(seen))

    def test_is_no_explosion(self, skipped):
        folder = skipped[1]
        bad = {"exploding_gradient", "nonfinite_gradient", "clipping_dominates"}
        assert not [one for one in diagnose(folder) if one.rule in bad]
        assert not rows(folder, "collapse", event=1)
        assert suggest_clip_value(folder).excluded["skipped"] == 1


class TestByHand:
    @pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "plain"])
    def test_a_clip_in_the_modules_hook_keeps_the_order(self, tmp_path, scaled):
        module = ByHand()
        train(module, tmp_path, everything(), scaled=scaled)
        assert module.events == order(scaled) * WINDOWS
        # a backward pass by hand stands under autocast, and computes in half precision there
        rel = 3e-3 if scaled else 1e-4
        for row, before, after in zip(whole(tmp_path), truth(module), module.stepped, strict=True):
            assert row["global_norm"] == pytest.approx(before[0], rel=rel)
            assert after[0] == pytest.approx(min(before[0], CLIPS["norm"]), rel=rel)
            assert "clip_value" not in row

    @pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "plain"])
    def test_a_clip_before_the_step_hides_the_norm(self, tmp_path, scaled):
        module = ByHand(early=True)
        train(module, tmp_path, everything(), scaled=scaled)
        assert [one for one in module.events if one in ("clip", "measure")][:2] == [
            "clip",
            "measure",
        ]
        for row, before in zip(whole(tmp_path), truth(module), strict=True):
            # and where there is a scaler, it cuts what is still scaled
            left = CLIPS["norm"] / SCALE if scaled else min(before[0], CLIPS["norm"])
            assert row["global_norm"] == pytest.approx(left, rel=1e-4)
