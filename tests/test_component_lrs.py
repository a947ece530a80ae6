"""Does a learning rate by component reach the steps, through schedules, resumes and processes?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from lightning_diag import RunLogger, UpdateRatio, WiringCheck, param_groups
from lightning_diag.lightning import LightningModule, Trainer
from recipes.code.model import CodeTransformer
from tests.callbacks.witness import lightning, rows
from tests.component_lrs_jobs import FACTORS, ByComponent, Rates, train_ddp
from tests.promises.networks import batches
from tests.promises.processes import needs_fork, run_ranks
from tests.promises.trace import QUIET, seed

BASE = 0.01


def peaks(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


KEEPING = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 8),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "one_cycle": lambda o: schedules.OneCycleLR(o, peaks(o), total_steps=9),
    "warmup_cosine": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 2), schedules.CosineAnnealingLR(o, 6)], [2]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
}
LEVELLING = {
    "one_cycle": lambda o: schedules.OneCycleLR(o, BASE, total_steps=9),
    "cosine_floor": lambda o: schedules.CosineAnnealingLR(o, 8, eta_min=BASE / 2),
}


class Scheduled(ByComponent):
    """The schedule, the factors and the optimizer are those given."""

    def __init__(
        self, make: Any = KEEPING["lambda"], factors: dict[str, float] = FACTORS, **options: Any
    ) -> None:
        super().__init__()
        self.make, self.factors, self.options = make, factors, options

    def configure_optimizers(self) -> dict[str, Any]:
        groups = param_groups(self, self.factors, base_lr=BASE, **self.options)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        config = {"scheduler": self.make(optimizer), "interval": "step", "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def fit(module: LightningModule, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    seed()
    ckpt_path = options.pop("ckpt_path", None)
    settings = {**QUIET, "max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1}
    settings |= {"default_root_dir": folder, "logger": RunLogger(folder)}
    trainer = Trainer(callbacks=list(callbacks), **settings | options)
    trainer.fit(module, batches(8), ckpt_path=ckpt_path)
    return trainer


def assert_ratios(steps: list[dict[str, float]], factors: dict[str, float] = FACTORS) -> None:
    assert len({step["other"] for step in steps}) > 1, "the schedule did nothing"
    for step in steps:
        assert step == pytest.approx({name: factors.get(name, 1) * step["other"] for name in step})


class TestSchedules:
    @pytest.mark.parametrize("name", KEEPING)
    def test_keep_the_ratios_and_the_monitor_names_the_groups(self, tmp_path, name):
        rates = Rates()
        monitor = lightning("callbacks").LearningRateMonitor("step")
        fit(Scheduled(KEEPING[name]), tmp_path, rates, monitor)
        assert_ratios(rates.steps)
        logged = [row for row in rows(tmp_path, "metrics") if "lr-AdamW/other" in row]
        keys = {"lr-AdamW/embed", "lr-AdamW/head", "lr-AdamW/other"}
        assert {key for row in logged for key in row if key.startswith("lr-")} == keys
        assert len(logged) == len(rates.steps) == 8
        for row, step in zip(logged, rates.steps, strict=True):
            assert {key: row[f"lr-AdamW/{key}"] for key in step} == pytest.approx(step)

    @pytest.mark.parametrize("name", LEVELLING)
    def test_that_name_one_rate_for_all_lose_them(self, tmp_path, name):
        rates = Rates()
        fit(Scheduled(LEVELLING[name]), tmp_path, rates)
        end = rates.steps[-1]
        assert end["embed"] > 0.5 * end["other"]

    @pytest.mark.parametrize("name", KEEPING)
    def test_leave_a_rate_of_zero_at_zero(self, tmp_path, name):
        rates, module = Rates(), Scheduled(KEEPING[name], {"embed": 0.0})
        before = module.net.embed.weight.detach().clone()
        fit(module, tmp_path, rates)
        assert {step["embed"] for step in rates.steps} == {0.0}
        assert torch.equal(module.net.embed.weight, before)


def wiring_faults(folder: Path) -> list[dict[str, Any]]:
    return rows(folder, "wiring", state="wrong")


class TestTraining:
    @pytest.mark.parametrize(
        "options",
        [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}],
        ids=["plain", "bf16", "accumulated"],
    )
    def test_a_part_moves_at_its_rate(self, tmp_path, options):
        # the first step of Adam moves each weight by its learning rate, whatever the gradient
        module = Scheduled(KEEPING["lambda"], {"body": 0.25})
        before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        fit(module, tmp_path, max_steps=1, **options)
        for name, weight in module.net.named_parameters():
            if name in ("body.0.weight", "norm.bias", "head.bias"):
                moved = float((weight.detach() - before[name]).abs().median())
                factor = 0.25 if name.startswith("body") else 1.0
                assert moved == pytest.approx(factor * BASE, rel=1e-3), name

    def test_resuming_goes_on_with_the_rates_of_the_checkpoint(self, tmp_path):
        whole, first, second = Rates(), Rates(), Rates()
        fit(Scheduled(), tmp_path / "whole", whole, max_epochs=2)
        trainer = fit(Scheduled(), tmp_path / "first", first)
        trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
        options = {"max_epochs": 2, "ckpt_path": str(tmp_path / "half.ckpt")}
        # other factors are given, and have no effect
        fit(Scheduled(factors={"embed": 0.7, "head": 0.7}), tmp_path / "second", second, **options)
        assert first.steps + second.steps == whole.steps
        assert_ratios(second.steps)

    def test_a_checkpoint_of_other_groups_is_refused(self, tmp_path):
        trainer = fit(Scheduled(), tmp_path)
        trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            fit(
                Scheduled(factors={"head": 2.0}),
                tmp_path / "again",
                ckpt_path=str(tmp_path / "half.ckpt"),
                max_epochs=2,
            )

    def test_a_frozen_part_has_no_group_and_one_of_rate_zero_has(self, tmp_path):
        rates, module = Rates(), Scheduled(factors={"embed": 0.1, "head": 0.0})
        module.net.embed.requires_grad_(False)
        fit(module, tmp_path, rates, WiringCheck(every_n_steps=1, on_error="raise"))
        assert set(rates.steps[0]) == {"head", "other"}
        wrong = {row["check"]: row.get("component") for row in wiring_faults(tmp_path)}
        assert not wrong.keys() & {"unoptimized_parameter", "frozen_in_optimizer"}
        # that a rate of zero freezes is said: `requires_grad_(False)` does it for less
        assert wrong["frozen_weights"] == "head"

    def test_tied_weights_move_at_the_rate_of_the_first_that_names_them(self, tmp_path):
        class Tied(Scheduled):
            def __init__(self, **options):
                super().__init__(**options)
                self.net.head.weight = self.net.embed.weight

        module = Tied(factors={"embed": 0.1})
        fit(module, tmp_path)
        (optimizer,) = module.trainer.optimizers
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(module.parameters()))
        first = optimizer.param_groups[0]
        assert (first["name"], first["params"][0] is module.net.head.weight) == ("embed", True)

    @needs_fork
    @pytest.mark.distributed
    def test_two_processes_keep_them(self, tmp_path):
        run_ranks(train_ddp, tmp_path, timeout=120)
        left = [torch.load(tmp_path / f"left_{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert left[0]["rates"] == left[1]["rates"]
        assert len(left[0]["rates"]) == 6
        assert_ratios(left[0]["rates"])
        for name, weight in left[0]["weights"].items():
            if "running" not in name:
                assert torch.equal(weight, left[1]["weights"][name]), name


class TestSeenInTheRun:
    def test_update_rows_have_the_rate_of_each_component(self, tmp_path):
        rates = Rates()
        fit(Scheduled(), tmp_path, rates, UpdateRatio(every_n_steps=1, on_error="raise"))
        found = rows(tmp_path, "update")
        parts = {"embed", "attend", "body", "norm", "head"}
        for step, want in enumerate(rates.steps):
            own = {row["component"]: row["lr"] for row in found if row["step"] == step}
            assert parts <= set(own)
            for part in parts:
                assert own[part] == pytest.approx(want.get(part, want["other"])), part
            assert own[None] == pytest.approx(max(want.values()))

    def test_named_components_are_the_same_parts_in_rows_and_groups(self, tmp_path):
        parts = {"tables": "*embed*", "norms": ["*norm*"]}
        module = Scheduled(factors={"norms": 0.5, "other": 0.2}, components=parts)
        rates = Rates()
        ratio = UpdateRatio(components=parts, every_n_steps=1, on_error="raise")
        fit(module, tmp_path, rates, ratio)
        assert set(rates.steps[0]) == {"tables", "norms", "other"}
        for row in rows(tmp_path, "update"):
            if row["component"] in rates.steps[0]:
                assert row["lr"] == pytest.approx(rates.steps[row["step"]][row["component"]])


def groups(model: nn.Module, lrs: dict[str, Any], **options: Any) -> dict[str, tuple[float, int]]:
    made = param_groups(model, lrs, base_lr=1.0, **options)
    assert len({group["name"] for group in made}) == len(made)
    return {group["name"]: (group["lr"], len(group["params"])) for group in made}


class TestGroups:
    def net(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("encoder", "middle", "head")})

    def test_other_may_be_named_without_taking_the_rest_along(self):
        parts = {"a": "encoder", "b": "middle"}
        made = groups(self.net(), {"other": 0.5}, components=parts)
        assert made == {"a": (1.0, 2), "b": (1.0, 2), "other": (0.5, 2)}

    def test_none_is_as_if_not_named(self):
        assert groups(self.net(), {"encoder": None, "head": 2.0}) == {
            "other": (1.0, 4),
            "head": (2.0, 2),
        }

    def test_parts_and_globs_mix_and_the_first_wins(self):
        model = nn.ModuleDict({"net": self.net()})
        assert groups(model, {"encoder": 0.1, "*.bias": 0.5}) == {
            "encoder": (0.1, 2),
            "*.bias": (0.5, 2),
            "other": (1.0, 2),
        }

    def test_a_key_with_nothing_left_is_told_who_took_it(self):
        words = "`encoder.bias` has nothing left .*`encoder` stands first and takes them"
        with pytest.raises(ValueError, match=words):
            groups(self.net(), {"encoder": 0.1, "encoder.bias": 0.5})
        assert len(groups(self.net(), {"encoder.bias": 0.5, "encoder": 0.1})) == 3

    def test_a_part_whose_weights_are_all_tied_is_told_so(self):
        net = self.net()
        net["head"] = nn.Linear(2, 2, bias=False)
        net["head"].weight = net["encoder"].weight
        with pytest.raises(ValueError, match=r"`head` has nothing left .* tied to .*`encoder`"):
            groups(net, {"head": 0.5})

    def test_with_components_only_their_names_will_do(self):
        words = "must be for a component of the model, got `encoder`; there are a, b, other."
        with pytest.raises(ValueError, match=words):
            groups(self.net(), {"encoder": 1.0}, components={"a": "encoder", "b": "middle"})
        with pytest.raises(ValueError, match=r"got `tabel`; did you mean `table`\?"):
            groups(self.net(), {"tabel": 1.0}, components={"table": "encoder"})

    @pytest.mark.parametrize("bad", ["1e-3", True, [0.1]])
    def test_a_rate_is_a_number(self, bad):
        with pytest.raises(TypeError, match=r"Learning rates must be numbers, got .* for `head`"):
            groups(self.net(), {"head": bad})

    def test_rates_are_a_mapping(self):
        with pytest.raises(TypeError, match="must be a mapping of components to numbers, got int"):
            param_groups(self.net(), 3)


SMALL = {"vocabulary_size": 64, "width": 16, "layers": 2, "heads": 2}
FINER = {"attention": "encoder.blocks.*.attention", "norm": ["encoder.blocks.*_norm"]}


class TestRecipe:
    def test_the_names_of_the_configured_components_are_keys(self):
        model = CodeTransformer(
            **SMALL, components=FINER, component_lrs={"attention": 0.1, "norm": 0.0}
        )
        made = {group["name"]: group["lr"] for group in model.parameter_groups(0.5)}
        assert made == {"attention": 0.05, "norm": 0.0, "other": 0.5}

    def test_an_unknown_name_is_told_when_the_model_is_made(self):
        with pytest.raises(ValueError, match=r"got `embeding`; .*`embedding`"):
            CodeTransformer(**SMALL, component_lrs={"embeding": 0.1})

    def test_components_and_rates_reach_the_model_by_hydra(self):
        from hydra import compose, initialize_config_dir

        conf = str(Path(__file__).parents[1] / "conf")
        with initialize_config_dir(conf, version_base="1.3"):
            config = compose(
                "train",
                [
                    "experiment=code_transformer",
                    "components=code_transformer",
                    "component_lrs={attention:0.1}",
                ],
            )
        assert dict(config.model.component_lrs) == {"attention": 0.1}
        assert "feed_forward" in config.model.components
