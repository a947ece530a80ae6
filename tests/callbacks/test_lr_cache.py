"""A learning rate is searched once, without a trace, and is the same as one set by hand."""

import importlib
import itertools
import json
import signal
import time
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_diag import LRCache, read_run
from lightning_diag.lightning import PACKAGE, Trainer
from lightning_diag.tuning.lr_search import range_test
from tests.callbacks.lr_jobs import (
    Data,
    Finds,
    Manual,
    Network,
    Rows,
    Straight,
    left,
    loader,
    losses_on_rank,
    quiet,
    search_on_rank,
    search_slowly,
    seed,
)
from tests.promises.processes import kill, needs_fork, run_ranks, start


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        for _ in range(8 * 32):
            x = torch.randn(20, generator=generator)
            yield x, (x[:2].sum() > 0).long()


class Compiled(Network):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.encoder = torch.compile(self.encoder, backend="eager")


class TwoLoaders(Network):
    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + self.loss(batch["b"])


class WithoutIndex(Network):
    def training_step(self, batch):
        return {"loss": self.loss(batch)}


def scaled():
    """A scaler whose first steps overflow, as they do on a GPU."""
    plugins = importlib.import_module(f"{PACKAGE}.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    return {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def plain():
    return {}


# the module, its data, and options of the Trainer
CASES = {
    "warmup": (Network, loader, plain),
    "cosine": (lambda lr=1e-3: Network(lr, "cosine"), loader, plain),
    "constant": (lambda lr=1e-3: Network(lr, None), loader, plain),
    "accumulated": (Network, loader, lambda: {"accumulate_grad_batches": 3}),
    "clipped": (Network, loader, lambda: {"gradient_clip_val": 0.1}),
    "bf16": (Network, loader, lambda: {"precision": "bf16-mixed"}),
    "scaler": (Network, loader, scaled),
    "data_module": (Network, Data, plain),
    "own_generator": (
        Network,
        lambda: loader(generator=torch.Generator().manual_seed(4)),
        plain,
    ),
    "workers": (Network, lambda: loader(num_workers=1), plain),
    "persistent_workers": (
        Network,
        lambda: loader(num_workers=1, persistent_workers=True),
        plain,
    ),
    "stream": (Network, lambda: DataLoader(Stream(), 32), plain),
    "two_loaders": (TwoLoaders, lambda: {"a": loader(), "b": loader()}, plain),
    "without_index": (WithoutIndex, loader, plain),
    "compiled": (Compiled, loader, plain),
    "few_batches": (Network, loader, lambda: {"limit_train_batches": 3}),
}


def fit(folder, case, callbacks=(), lr=1e-3, **options):
    module_of, data, chosen = CASES[case]
    seed()
    module = module_of(lr=lr)
    trainer = Trainer(**quiet(folder, **{**chosen(), **options}), callbacks=[*callbacks])
    trainer.fit(module, data())
    return left(module, trainer), trainer


def searching(folder, **options):
    return LRCache(folder / "cache", **{"num_steps": 60, "on_error": "raise", **options})


def differing(one, other):
    return [name for name in one if one[name] != other[name]]


@pytest.mark.parametrize("case", CASES)
def test_searched_kept_and_set_by_hand_are_the_same_to_the_bit(case, tmp_path):
    search, again, finds = searching(tmp_path), searching(tmp_path), Finds()
    searched, trainer = fit(tmp_path / "1", case, [search, finds])
    lr = search.suggestion.lr
    assert lr is not None
    assert lr != 1e-3
    assert searched["lr"] == (lr, lr)
    kept, _ = fit(tmp_path / "2", case, [again])
    by_hand, _ = fit(tmp_path / "3", case, lr=lr)
    assert not differing(by_hand, searched)
    assert not differing(by_hand, kept)
    # ... and the search was one
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    rows = [read_run(tmp_path / n / "run").lr_finder.to_dicts()[0] for n in ("1", "2")]
    assert [row["cache_hit"] for row in rows] == [0, 1]
    assert rows[0]["seconds"] > rows[1]["seconds"]
    # ... that no other callback has seen
    assert finds.batches == trainer.fit_loop.total_batch_idx + 1
    assert finds.steps == trainer.global_step


def test_rows_and_callback_metrics(tmp_path):
    search = searching(tmp_path)
    _, trainer = fit(tmp_path, "warmup", [search], log_every_n_steps=1)
    run = read_run(tmp_path / "run")
    (row,) = run.lr_finder.to_dicts()
    found = search.suggestion
    assert (row["lr"], row["lr_before"], row["applied"]) == (found.lr, 1e-3, 1)
    assert (row["confidence"], row["cache_hit"], row["age_hours"]) == (found.confidence, 0, None)
    assert row["slope"] == found.slope < 0
    assert row["set"] == ["hparams.lr", "lr"]
    assert (row["min_lr"], row["max_lr"]) == (1e-8, 1.0)
    curve = run.frame("lr_finder_curve")
    assert curve["point"].to_list() == list(range(row["points"]))
    assert curve["lr"][0] == 1e-8
    assert float(trainer.callback_metrics["lr_finder/lr"]) == pytest.approx(found.lr)
    assert {"train_loss", "train_twice"} <= set(run.metrics.columns)
    assert run.metrics["step"].min() >= 0


def test_apply_false_only_records(tmp_path):
    without, _ = fit(tmp_path / "1", "warmup")
    recorded, _ = fit(tmp_path / "2", "warmup", [searching(tmp_path, apply=False)])
    assert not differing(without, recorded)
    (row,) = read_run(tmp_path / "2" / "run").lr_finder.to_dicts()
    assert row["applied"] == 0
    assert row["lr"] is not None


def test_the_losses_are_those_of_steps_taken_by_hand(tmp_path):
    """Brute force: the same batches, rates and random numbers in a loop of our own."""
    seed()
    module, rates, losses, before = Straight(), [1e-4, 1e-3, 1e-2, 1e-1], [], []

    class Search(LRCache):
        def on_train_start(self, trainer, pl_module):
            torch.manual_seed(11)
            found = range_test(trainer, pl_module, trainer.optimizers[0], rates)
            losses.extend(found.found)
            before.extend(found.before)

    options = quiet(tmp_path, limit_train_batches=4, accumulate_grad_batches=2, max_epochs=1)
    Trainer(**options, callbacks=[Search()], gradient_clip_val=2.0).fit(module, loader())

    assert losses == pytest.approx(_by_hand(rates, train=True), rel=1e-5)
    assert before == pytest.approx(_by_hand(rates, train=False), rel=1e-5)


def _by_hand(rates, train):
    seed()
    by_hand = Straight()
    by_hand.train()
    optimizer, expected = by_hand.configure_optimizers(), []
    torch.manual_seed(11)
    rows = loader()
    batches = itertools.chain.from_iterable(itertools.islice(rows, 4) for _ in range(2))
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        parts = [by_hand.loss(next(batches)) for _ in range(2)]
        for part in parts:
            (part / 2).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 2.0)
        if train:
            optimizer.step()
        expected.append(float(sum(parts)) / 2)
    return expected


def test_a_step_that_the_scaler_skips_is_made_again(tmp_path):
    made, found = [], []

    class Search(LRCache):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            hook = optimizer.register_step_post_hook(lambda *_: made.append(1))
            found.append(range_test(trainer, pl_module, optimizer, [1e-12] * 20))
            hook.remove()

    seed()
    options = quiet(tmp_path, max_epochs=1, **scaled())
    Trainer(**options, callbacks=[Search()]).fit(Network(), loader())
    (losses,) = found
    assert len(made) == len(losses.found) == len(losses.before) == 20
    # each is compared with its own batch, and not with one that was skipped
    assert losses.found == pytest.approx(losses.before, abs=1e-3)
    assert max(losses.before) - min(losses.before) > 0.05


# ---- where it does nothing, and where it fails ----


def test_a_resumed_run_keeps_its_rate(tmp_path):
    whole, _ = fit(tmp_path / "1", "warmup", [searching(tmp_path)], max_epochs=3)
    cut = searching(tmp_path)
    _, trainer = fit(tmp_path / "2", "warmup", [cut], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    seed(9)
    resumed, module = searching(tmp_path, refresh=True), Network()
    later = Trainer(**quiet(tmp_path / "3", max_epochs=3), callbacks=[resumed])
    later.fit(module, loader(), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    lr = cut.suggestion.lr
    assert resumed.suggestion is None
    assert (module.lr, module.hparams.lr) == (lr, lr) == whole["lr"]
    assert later.lr_scheduler_configs[0].scheduler.base_lrs == [lr * 0.1, lr]
    (note,) = read_run(tmp_path / "3" / "run").notes.filter(diagnostic="LRCache").to_dicts()
    assert "resumed" in note["message"]


def test_fast_dev_run_searches_nothing(tmp_path):
    search = searching(tmp_path)
    fit(tmp_path, "warmup", [search], fast_dev_run=True, logger=False)
    assert search.suggestion is None
    assert not (tmp_path / "cache").exists()


def test_nothing_found_changes_nothing_and_is_not_kept(tmp_path):
    class Deaf(Network):
        def loss(self, batch):
            return super().loss(batch) * 0 + torch.rand(())

    traces = []
    for name, callbacks in {"1": [], "2": [searching(tmp_path)]}.items():
        seed()
        module = Deaf()
        trainer = Trainer(**quiet(tmp_path / name), callbacks=callbacks)
        if callbacks:
            with pytest.warns(match="supports no learning rate, 0.001 stays: the loss does not"):
                trainer.fit(module, loader())
        else:
            trainer.fit(module, loader())
        traces.append(left(module, trainer))
    assert not differing(*traces)
    assert not list((tmp_path / "cache").glob("*.json"))
    (row,) = read_run(tmp_path / "2" / "run").lr_finder.to_dicts()
    assert row["lr"] is None
    assert row["applied"] == 0
    assert "does not fall" in row["reason"]


@pytest.mark.parametrize("when", [0, 7])
def test_an_error_in_the_search_leaves_training_as_it_was(when, tmp_path):
    class Breaks(Network):
        armed = True

        def training_step(self, batch, batch_idx):
            if self.armed and self.calls == when:
                type(self).armed = False
                raise ArithmeticError("planted")
            return super().training_step(batch, batch_idx)

    traces = []
    for callbacks in ([], [searching(tmp_path, on_error="warn")]):
        seed()
        Breaks.armed = bool(callbacks)
        module = Breaks(lr=0.01)
        trainer = Trainer(**quiet(tmp_path / str(len(traces))), callbacks=callbacks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader())
        traces.append(left(module, trainer))
    assert not differing(*traces)
    assert any("LRCache has ended and training goes on" in str(one.message) for one in caught)


def test_a_loader_that_cannot_begin_again_is_left_alone(tmp_path):
    search = searching(tmp_path, on_error="warn")
    trainer = Trainer(**quiet(tmp_path, max_epochs=1), callbacks=[search])
    with pytest.warns(RuntimeWarning, match="must be able to begin again, got a generator"):
        trainer.fit(Network(), (batch for batch in list(loader())))
    assert trainer.global_step == 11


def test_a_loss_made_of_derivatives(tmp_path):
    class Smooth(Network):
        def loss(self, batch):
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self.encoder(x).sum(), x, create_graph=True)
            return super().loss(batch) + 0.01 * slope.square().mean()

    seed()
    search = searching(tmp_path)
    Trainer(**quiet(tmp_path), callbacks=[search]).fit(Smooth(), loader())
    assert search.suggestion.reason == "" or search.suggestion.lr is not None


def test_a_loss_that_is_not_finite_before_training(tmp_path):
    class Odd(Network):
        def loss(self, batch):
            return super().loss(batch) * (torch.nan if self.calls == 3 else 1.0)

    seed()
    search = searching(tmp_path)
    with pytest.warns(match="supports no learning rate"):
        Trainer(**quiet(tmp_path), callbacks=[search]).fit(Odd(), loader())
    assert "finite points" in search.suggestion.reason


def test_batches_of_all_sizes_are_used(tmp_path):
    rows = Rows()
    sizes = [list(range(start, start + 5 + start % 7)) for start in range(0, 300, 10)]
    read = []

    class Counts(Network):
        def training_step(self, batch, batch_idx):
            read.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    seed()
    trainer = Trainer(**quiet(tmp_path, max_epochs=1), callbacks=[searching(tmp_path)])
    trainer.fit(Counts(), DataLoader(rows, batch_sampler=sizes))
    assert len(set(read)) > 3
    assert len(read) <= 60 + 60 + len(sizes)


def test_two_searches_in_one_trainer(tmp_path):
    both = [searching(tmp_path, optimizer=n, loss="train_loss", apply=False) for n in (0, 1)]
    seed()
    Trainer(**quiet(tmp_path), callbacks=both).fit(Manual(), loader())
    assert read_run(tmp_path / "run").lr_finder["optimizer"].to_list() == [0, 1]


def test_of_several_optimizers_one_must_be_named(tmp_path):
    seed()
    with pytest.warns(RuntimeWarning, match="`optimizer` must say which of several optimizers"):
        Trainer(**quiet(tmp_path), callbacks=[searching(tmp_path, on_error="warn")]).fit(
            Manual(), loader()
        )
    with pytest.raises(ValueError, match="must be below the number of them, 2; got 2"):
        Trainer(**quiet(tmp_path), callbacks=[searching(tmp_path, optimizer=2)]).fit(
            Manual(), loader()
        )


def test_manual_optimization_with_a_logged_loss(tmp_path):
    def trained(folder, lr, callbacks):
        seed()
        module = Manual(lr)
        trainer = Trainer(**quiet(folder), callbacks=callbacks)
        trainer.fit(module, loader())
        return left(module, trainer)

    search = searching(tmp_path, optimizer=1, loss="train_loss", num_steps=100)
    searched = trained(tmp_path / "1", 1e-3, [search])
    by_hand = trained(tmp_path / "2", search.suggestion.lr, [])
    assert not differing(by_hand, searched)


def test_a_loss_that_nobody_logs_is_an_error(tmp_path):
    seed()
    with pytest.raises(ValueError, match="none logged as `train_los`"):
        Trainer(**quiet(tmp_path), callbacks=[searching(tmp_path, loss="train_los")]).fit(
            Network(), loader()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 0.0}, "`min_lr` must be above 0 and below `max_lr`, got 0.0 and 1.0."),
        ({"min_lr": 2.0}, "`min_lr` must be above 0 and below `max_lr`, got 2.0 and 1.0."),
        ({"num_steps": 19}, "`num_steps` must be at least 20, got 19."),
        ({"max_age_hours": 0}, "`max_age_hours` must be above 0, got 0."),
        ({"every_n_steps": 3}, "`every_n_steps` must be None: it searches once; got 3."),
        ({"bounds": [1e-3]}, "`bounds` must be a smallest and a largest learning rate above 0"),
        ({"bounds": [1e-3, 1e-4]}, "`bounds` must be a smallest and a largest"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message.replace("`", ".").replace("[", r"\[")):
        LRCache(**options)


def test_bounds_are_kept_to(tmp_path):
    search = searching(tmp_path, bounds=(1e-5, 5e-5))
    searched, _ = fit(tmp_path, "warmup", [search])
    assert searched["lr"] == (5e-5, 5e-5)
    assert "outside of the bounds" in search.suggestion.reason


# ---- the cache ----


def test_a_miss_says_what_differs(tmp_path, capsys):
    fit(tmp_path / "1", "warmup", [searching(tmp_path)])
    fit(tmp_path / "2", "accumulated", [searching(tmp_path)])
    said = capsys.readouterr().out
    assert "the nearest entry differs: batch: 32 -> 96" in said
    fit(tmp_path / "3", "warmup", [searching(tmp_path)])
    assert "(kept 0.0 h ago, confidence" in capsys.readouterr().out


def test_refresh_searches_again(tmp_path):
    fit(tmp_path / "1", "warmup", [searching(tmp_path)])
    fit(tmp_path / "2", "warmup", [searching(tmp_path, refresh=True)])
    assert read_run(tmp_path / "2" / "run").lr_finder["cache_hit"].to_list() == [0]


def test_a_corrupt_entry_is_searched_again_and_set_aside(tmp_path):
    fit(tmp_path / "1", "warmup", [searching(tmp_path)])
    (entry,) = (tmp_path / "cache").glob("*.json")
    whole = json.loads(entry.read_text())
    entry.write_text(entry.read_text()[:-20])
    with pytest.warns(match="set aside"):
        fit(tmp_path / "2", "warmup", [searching(tmp_path)])
    assert json.loads(entry.read_text())["lr"] == whole["lr"]
    assert len(list((tmp_path / "cache").glob("*.corrupt"))) == 1


def test_a_cache_that_cannot_be_written_costs_the_entry_alone(tmp_path):
    (tmp_path / "blocked").write_text("")
    search = LRCache(tmp_path / "blocked" / "cache", num_steps=60, on_error="raise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        searched, _ = fit(tmp_path / "1", "warmup", [search])
    assert searched["lr"][0] == search.suggestion.lr != 1e-3
    assert any("cannot be kept" in str(one.message) for one in caught)


# ---- processes ----


def entries(folder):
    """Whole entries; a file that is not whole would not parse."""
    return [json.loads(path.read_text()) for path in (folder / "cache").glob("*.json*")]


@needs_fork
@pytest.mark.distributed
def test_processes_that_start_together_search_once(tmp_path):
    jobs = [
        start(search_slowly, tmp_path, tmp_path / f"started_{n}", 0.02, n) for n in (42, 2025, 7)
    ]
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    rows = [read_run(tmp_path / str(n)).lr_finder.to_dicts()[0] for n in (42, 2025, 7)]
    assert sorted(row["cache_hit"] for row in rows) == [0, 1, 1]
    assert len({row["lr"] for row in rows}) == len({row["key"] for row in rows}) == 1
    assert len(entries(tmp_path)) == 1


@needs_fork
@pytest.mark.distributed
@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_nothing_behind(tmp_path):
    for number, delay in enumerate([0.05, 0.2, 0.4, 0.6, 0.8, 1.0]):
        started = tmp_path / f"started_{number}"
        job = start(search_slowly, tmp_path, started, 0.02, number)
        while not started.exists():
            time.sleep(0.005)
        time.sleep(delay)
        kill(job)
        assert job.exitcode == -signal.SIGKILL
        assert len(entries(tmp_path)) <= 1
        root = tmp_path / f"root_{number}"
        assert not root.exists() or not list(root.iterdir())
    known = {"run.json", "config.yaml", "records", "cache"}
    stray = [
        path
        for path in tmp_path.iterdir()
        if not (path.name.startswith(("started", "root")) or path.name.isdigit())
        and path.name not in known
    ]
    assert stray == []
    # and whoever comes next is not kept waiting
    job = start(search_slowly, tmp_path, tmp_path / "started_99", 0.0, 99)
    job.join(60)
    assert job.exitcode == 0
    assert len(entries(tmp_path)) == 1


@needs_fork
@pytest.mark.distributed
def test_two_ranks_agree(tmp_path):
    run_ranks(search_on_rank, tmp_path, "ddp", timeout=120)
    ranks = [torch.load(tmp_path / f"rank_{n}.pt", weights_only=True) for n in range(2)]
    for found in ranks:
        assert found["searched"]["lr"] == found["kept"]["lr"] == ranks[0]["searched"]["lr"]
        assert found["searched"]["lr"][0] != 1e-3
        assert not differing(found["by_hand"], found["searched"])
        assert not differing(found["by_hand"], found["kept"])
    for name in ("encoder.0.weight", "head.1.weight"):
        assert len({str(found["searched"]["weights"][name]) for found in ranks}) == 1


@needs_fork
@pytest.mark.distributed
def test_two_ranks_search_as_one_with_twice_the_batch(tmp_path):
    run_ranks(losses_on_rank, tmp_path, 32, 2, timeout=120)
    losses_on_rank(tmp_path, 64, 1)
    alone, first, second = (
        torch.load(tmp_path / f"losses_{name}.pt", weights_only=True)
        for name in ("1_0", "2_0", "2_1")
    )
    assert first == second
    assert len(alone) == 10
    assert first == pytest.approx(alone, rel=1e-5)


def test_a_hit_trains_no_step(tmp_path, monkeypatch):
    fit(tmp_path / "1", "warmup", [searching(tmp_path)])

    def never(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("lightning_diag.callbacks.lr_cache.range_test", never)
    fit(tmp_path / "2", "warmup", [searching(tmp_path)])
    with pytest.raises(AssertionError, match="searched again"):
        fit(tmp_path / "3", "accumulated", [searching(tmp_path)])
