"""When does a diagnostic measure, where do its numbers go, and what if something fails?"""

from pathlib import Path
from types import SimpleNamespace

import polars
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diag import GradientHealth, RunLogger
from lightning_diag.callbacks import Diagnostic
from lightning_diag.lightning import Logger
from tests.callbacks.witness import Witness, fit, lightning, rows
from tests.conftest import Halving


class Timed(Diagnostic):
    """Measures nothing but when it is due, and spends time on it."""

    prefix = "timed"

    def __init__(self, clock: "FakeClock | None" = None, cost: float = 0.0, **arguments) -> None:
        super().__init__(on_error="raise", **arguments)
        self.clock = clock
        self.cost = cost
        self.steps: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.is_due(trainer, optimizer):
            self.steps.append(trainer.global_step)
            if self.clock is not None:
                self.clock.now += self.cost
            self.read(torch.zeros(1), lambda values: None, None)


class FakeClock:
    """A clock that moves only when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("lightning_diag.callbacks.base.perf_counter", self.read)
        namespace = SimpleNamespace(perf_counter=self.read)
        monkeypatch.setattr("lightning_diag.callbacks.clock.time", namespace)

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


class Slow(Halving):
    """Each batch takes one second of the fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 1.0
        return super().training_step(batch, batch_idx)


class Memory(Logger):
    """Keeps what it is given; may refuse what a diagnostic sends."""

    def __init__(self, refuse: bool = False) -> None:
        super().__init__()
        self.refuse = refuse
        self.offered = 0
        self.given: dict[int, dict[str, float]] = {}

    name = version = "memory"

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("grad/") for key in metrics):
            self.offered += 1
            if self.refuse:
                raise OSError("no room")
        self.given.setdefault(step, {}).update(metrics)


class TestSchedule:
    @pytest.mark.parametrize(
        ("every", "accumulate", "epochs", "steps"),
        [
            (1, 1, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
            (3, 1, 1, [2, 5]),
            (3, 1, 2, [2, 5, 8, 11, 14]),
            (2, 3, 2, [1, 3, 5]),
            (8, 1, 1, [7]),
            (9, 1, 1, []),
        ],
    )
    def test_measures_each_nth_optimizer_step(
        self, loader, tmp_path, every, accumulate, epochs, steps
    ):
        timed = Timed(every_n_steps=every)
        fit(
            Halving(),
            timed,
            loader,
            tmp_path,
            accumulate_grad_batches=accumulate,
            max_epochs=epochs,
        )
        assert timed.steps == steps

    def test_validation_in_between_changes_nothing(self, loader, tmp_path):
        class Validated(Halving):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.log("val_loss", batch[0].sum())

            def val_dataloader(self) -> DataLoader:
                return loader

        timed = Timed(every_n_steps=3)
        arguments = {"val_check_interval": 2, "num_sanity_val_steps": 1, "max_epochs": 2}
        fit(Validated(), [timed, GradientHealth(every_n_steps=3)], loader, tmp_path, **arguments)
        assert timed.steps == [2, 5, 8, 11, 14]
        found = [row["step"] for row in rows(tmp_path, component=None)]
        assert found == timed.steps


class TestAutomaticInterval:
    @pytest.mark.parametrize(
        ("budget", "cost", "interval"), [(0.01, 0.045, 5), (0.1, 0.05, 1), (0.01, 0.495, 50)]
    )
    def test_is_the_shortest_that_keeps_to_the_budget(
        self, loader, tmp_path, clock, budget, cost, interval
    ):
        timed = Timed(clock, cost, every_n_steps="auto", overhead_budget=budget)
        fit(Slow(clock), timed, loader, tmp_path, max_epochs=30)
        assert len(timed.steps) == (240 - 4 + interval - 1) // interval
        assert {b - a for a, b in zip(timed.steps, timed.steps[1:], strict=False)} == {interval}
        last = rows(tmp_path, "overhead")[-1]
        assert last["every_n_steps"] == interval
        assert last["measured"] == len(timed.steps)
        assert last["seconds"] == pytest.approx(cost * len(timed.steps))
        assert last["elapsed"] == pytest.approx(240 + cost * len(timed.steps))
        assert last["step_seconds"] == pytest.approx(1.0)
        assert last["share"] == pytest.approx(last["seconds"] / last["elapsed"])
        assert last["share"] <= budget * 1.05

    def test_follows_when_measuring_becomes_dearer(self, loader, tmp_path, clock):
        timed = Timed(clock, 0.015, every_n_steps="auto")

        class Dearer(Slow):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 10:
                    timed.cost = 0.195

        fit(Dearer(clock), timed, loader, tmp_path, max_epochs=50)
        gaps = [b - a for a, b in zip(timed.steps, timed.steps[1:], strict=False)]
        assert gaps[0] == 2
        assert gaps[-1] == 20

    def test_a_number_is_kept_whatever_it_costs(self, loader, tmp_path, clock):
        timed = Timed(clock, 100.0, every_n_steps=2)
        fit(Slow(clock), timed, loader, tmp_path)
        assert timed.steps == [1, 3, 5, 7]
        assert rows(tmp_path, "overhead")[-1]["share"] == pytest.approx(400 / 408)


class TestLoggers:
    def test_scalars_stand_beside_lightnings_own(self, loader, tmp_path):
        """The loss of step s is half the squared gradient norm of step s, on the same line."""
        csv = lightning("loggers").CSVLogger(tmp_path / "csv", name="", version="")
        logger = [csv, RunLogger(tmp_path)]
        fit(
            Halving(),
            GradientHealth(every_n_steps=2),
            loader,
            tmp_path,
            logger=logger,
            log_every_n_steps=1,
            max_epochs=2,
            accumulate_grad_batches=2,
        )
        frame = polars.read_csv(tmp_path / "csv" / "metrics.csv")
        measured = frame.filter(polars.col("grad/global_norm").is_not_null())
        assert measured["step"].to_list() == [1, 3, 5, 7]
        losses = frame.filter(polars.col("train_loss").is_not_null())
        both = measured.select("step", "grad/global_norm").join(
            losses.select("step", "train_loss"), on="step"
        )
        assert len(both) == 4
        for _, norm, loss in both.iter_rows():
            assert loss == pytest.approx(norm**2 / 2, rel=1e-5)

    def test_keys_are_those_of_the_documentation(self, loader, tmp_path):
        memory = Memory()
        fit(
            Halving(),
            GradientHealth(every_n_steps=8),
            loader,
            tmp_path,
            logger=memory,
            gradient_clip_val=0.1,
        )
        per_part = {"l2", "rms", "mean", "std", "min", "max", "zeros", "nonfinite", "missing"}
        whole = {"global_norm", "max_norm", "min_norm", "mean_norm", "has_nan", "has_inf"}
        clip = {"clip_coefficient", "clipped", "clipped_share"}
        keys = {f"grad/{key}" for key in per_part | whole | clip}
        keys |= {f"grad/{part}/{key}" for part in ("encoder", "head") for key in per_part}
        assert {key for key in memory.given[7] if key.startswith("grad/")} == keys
        assert all(isinstance(memory.given[7][key], float) for key in keys)

    def test_numbers_are_those_of_the_rows(self, loader, tmp_path):
        memory = Memory()
        logger = [memory, RunLogger(tmp_path)]
        fit(Witness(), GradientHealth(every_n_steps=3), loader, tmp_path, logger=logger)
        compared = 0
        for row in rows(tmp_path):
            place = "grad" if row["component"] is None else f"grad/{row['component']}"
            for key in ("l2", "mean", "missing", "global_norm"):
                if row.get(key) is not None:
                    assert memory.given[row["step"]][f"{place}/{key}"] == row[key]
                    compared += 1
        assert compared > 10
        assert "grad/idle/l2" not in memory.given[2]
        assert memory.given[2]["grad/idle/missing"] == 2

    def test_one_that_fails_is_left_out_and_the_others_go_on(self, loader, tmp_path):
        broken, memory = Memory(refuse=True), Memory()
        logger = [broken, memory, RunLogger(tmp_path)]
        message = "GradientHealth writes no more to Memory: OSError: no room"
        with pytest.warns(UserWarning, match=message) as warned:
            trainer = fit(
                Halving(), GradientHealth(every_n_steps=2), loader, tmp_path, logger=logger
            )
        assert trainer.global_step == 8
        assert broken.offered == 1
        assert sum(message in str(warning.message) for warning in warned) == 1
        assert {step for step, row in memory.given.items() if "grad/l2" in row} == {1, 3, 5, 7}
        assert [row["step"] for row in rows(tmp_path, component=None)] == [1, 3, 5, 7]

    def test_one_that_fails_is_said_where_errors_are_to_be_raised(self, loader, tmp_path):
        with pytest.raises(OSError, match="no room"):
            fit(
                Halving(),
                GradientHealth(every_n_steps=2, on_error="raise"),
                loader,
                tmp_path,
                logger=[Memory(refuse=True)],
            )

    def test_scalars_are_seen_by_early_stopping(self, loader, tmp_path):
        # the norm of step 8 k - 1 is 0.9 ** (8 k - 1) of the first: below half of it in epoch 1
        callbacks = lightning("callbacks")
        start = sum(p.square().sum() for p in Halving().parameters()).sqrt().item()
        stop = callbacks.EarlyStopping(
            "grad/global_norm", stopping_threshold=start * 0.3, patience=100
        )
        trainer = fit(
            Halving(), [stop, GradientHealth(every_n_steps=8)], loader, tmp_path, max_epochs=10
        )
        assert trainer.current_epoch == 2
        assert stop.stopped_epoch == 1
        assert trainer.callback_metrics["grad/global_norm"].item() == pytest.approx(
            start * 0.9**15, rel=1e-4
        )

    def test_scalars_are_seen_by_model_checkpoint(self, loader, tmp_path):
        callbacks = lightning("callbacks")
        best = callbacks.ModelCheckpoint(tmp_path / "best", monitor="grad/head/l2", mode="max")
        fit(
            Halving(),
            [GradientHealth(every_n_steps=4), best],
            loader,
            tmp_path,
            max_epochs=3,
            enable_checkpointing=True,
        )
        row = rows(tmp_path, step=7, component="head")[0]
        assert best.best_model_score.item() == pytest.approx(row["l2"])
        assert "step=8" in best.best_model_path

    def test_scalars_after_validation_are_still_there(self, loader, tmp_path):
        class Validated(Halving):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.log("val_loss", batch[0].sum())

            def val_dataloader(self) -> DataLoader:
                return loader

        callbacks = lightning("callbacks")
        stop = callbacks.EarlyStopping("grad/global_norm", patience=100)
        trainer = fit(
            Validated(), [GradientHealth(every_n_steps=8), stop], loader, tmp_path, max_epochs=2
        )
        assert {"val_loss", "grad/global_norm"} <= set(trainer.callback_metrics)
        assert stop.best_score == trainer.callback_metrics["grad/global_norm"]


class TestRunFolder:
    def test_is_added_beside_another_logger(self, loader, tmp_path):
        csv = lightning("loggers").CSVLogger(tmp_path, name="", version="")
        trainer = fit(Halving(), GradientHealth(every_n_steps=4), loader, tmp_path, logger=csv)
        (found,) = Path(tmp_path).rglob("grad.jsonl")
        run = found.parents[1]
        assert run == tmp_path / "diagnostics" / "version_0"
        assert [row["step"] for row in rows(run, component=None)] == [3, 7]
        assert isinstance(trainer.loggers[-1], RunLogger)
        assert rows(run, "metrics")

    def test_is_added_where_there_is_no_logger(self, loader, tmp_path):
        for number in range(2):
            fit(
                Halving(),
                [GradientHealth(every_n_steps=4), Timed(every_n_steps=4)],
                loader,
                tmp_path,
                logger=False,
                default_root_dir=tmp_path,
            )
            run = tmp_path / "diagnostics" / f"version_{number}"
            assert [row["step"] for row in rows(run, component=None)] == [3, 7]
        assert len(list(tmp_path.rglob("grad.jsonl"))) == 2

    def test_is_not_added_in_a_fast_development_run(self, loader, tmp_path):
        trainer = fit(
            Halving(),
            GradientHealth(every_n_steps=1, on_error="raise"),
            loader,
            tmp_path,
            fast_dev_run=2,
            logger=True,
            default_root_dir=tmp_path,
        )
        assert not list(tmp_path.rglob("*.jsonl"))
        assert trainer.callback_metrics["grad/global_norm"] > 0

    def test_says_so_when_nothing_was_measured(self, loader, tmp_path):
        words = "nothing was measured: training ended before step 50, and `every_n_steps` is 50"
        with pytest.warns(UserWarning, match=words):
            fit(Halving(), GradientHealth(), loader, tmp_path)
        (note,) = rows(tmp_path, "notes")
        assert words in note["message"]
        assert (note["diagnostic"], note["severity"]) == ("GradientHealth", "warning")


class TestState:
    def test_two_instances_have_keys_of_their_own(self, loader, tmp_path):
        first = GradientHealth(every_n_steps=2)
        second = GradientHealth({"head": "head"}, every_n_steps=2)
        third = GradientHealth(every_n_steps=4)
        assert len({first.state_key, second.state_key, third.state_key}) == 3
        trainer = fit(Halving(), [first, second, third], loader, tmp_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
        assert states[first.state_key]["measured"] == 4
        assert states[second.state_key]["measured"] == 4
        assert states[third.state_key]["measured"] == 2

    def test_round_trip(self, loader, tmp_path):
        health = GradientHealth(every_n_steps=2)
        fit(Halving(), health, loader, tmp_path, gradient_clip_val=0.1)
        state = health.state_dict()
        other = GradientHealth(every_n_steps=2)
        other.load_state_dict(state)
        # asking for the state takes time too
        assert {**other.state_dict(), "seconds": state["seconds"]} == state
        assert state["measured"] == 4
        assert state["seconds"] > 0

    @pytest.mark.parametrize("interval", [2, 3, "auto"])
    def test_goes_on_counting_after_a_resume_with_another_interval(
        self, loader, tmp_path, interval
    ):
        trainer = fit(Halving(), GradientHealth(every_n_steps=2), loader, tmp_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        resumed = GradientHealth(every_n_steps=interval)
        fit(Halving(), resumed, loader, tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "x.ckpt"))
        whole = [row["step"] for row in rows(tmp_path, component=None)]
        assert whole[:4] == [1, 3, 5, 7]
        assert all(step > 7 for step in whole[4:])
        assert resumed.state_dict()["measured"] == len(whole)
        assert len(whole) > 4

    def test_an_instance_that_is_new_at_resume_starts_from_nothing(self, loader, tmp_path):
        trainer = fit(Halving(), GradientHealth(every_n_steps=2), loader, tmp_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        old, new = GradientHealth(every_n_steps=2), GradientHealth({"a": "*"}, every_n_steps=4)
        fit(Halving(), [old, new], loader, tmp_path, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
        assert old.state_dict()["measured"] == 8
        assert new.state_dict()["measured"] == 2

    @pytest.mark.parametrize(("every", "steps"), [("auto", [4, 9, 14]), (3, [2, 5, 8, 11, 14])])
    def test_a_second_fit_starts_anew(self, loader, tmp_path, clock, every, steps):
        timed = Timed(clock, 0.045, every_n_steps=every)
        for folder in ("first", "second"):
            timed.steps.clear()
            fit(Slow(clock), timed, loader, tmp_path / folder, max_epochs=2)
            assert timed.steps == steps
            last = rows(tmp_path / folder, "overhead")[-1]
            assert last["measured"] == len(steps)
            assert last["seconds"] == pytest.approx(0.045 * len(steps))

    def test_of_auto_keeps_its_interval_over_a_resume(self, loader, tmp_path, clock):
        first = Timed(clock, 0.045, every_n_steps="auto")
        trainer = fit(Slow(clock), first, loader, tmp_path, max_epochs=3)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        second = Timed(clock, 0.045, every_n_steps="auto")
        fit(Slow(clock), second, loader, tmp_path, max_epochs=6, ckpt_path=tmp_path / "x.ckpt")
        steps = [*first.steps, *second.steps]
        assert steps == list(range(4, 48, 5))


class TestErrors:
    def test_end_the_diagnostic_and_not_the_run(self, loader, tmp_path):
        class Failing(Timed):
            def on_train_batch_end(self, *args) -> None:
                super().on_train_batch_end(*args)
                if len(self.steps) == 3:
                    raise KeyError("lost")

        failing = Failing(every_n_steps=1)
        failing.on_error = "warn"
        words = "Failing has ended and training goes on: in on_train_batch_end, KeyError: 'lost'"
        with pytest.warns(RuntimeWarning, match=words):
            trainer = fit(Halving(), failing, loader, tmp_path)
        assert trainer.global_step == 8
        assert failing.steps == [0, 1, 2]

    def test_are_raised_where_asked_for(self, loader, tmp_path):
        class Failing(Timed):
            def on_train_batch_start(self, *args) -> None:
                raise KeyError("lost")

        with pytest.raises(KeyError, match="lost"):
            fit(Halving(), Failing(), loader, tmp_path)

    def test_an_ended_diagnostic_starts_anew_in_the_next_fit(self, loader, tmp_path):
        class Once(Timed):
            fail = True

            def on_train_start(self, *args) -> None:
                super().on_train_start(*args)
                if self.fail:
                    raise RuntimeError("once")

        once = Once(every_n_steps=4)
        once.on_error = "warn"
        with pytest.warns(RuntimeWarning, match="once"):
            fit(Halving(), once, loader, tmp_path / "first")
        once.fail = False
        fit(Halving(), once, loader, tmp_path / "second")
        assert once.steps == [3, 7]
