"""Does WiringCheck find each planted fault of wiring, once, by its name, and nothing else?"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_diag import GradientHealth
from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.wiring_check import WiringCheck
from lightning_diag.callbacks.wiring_losses import LossWatch
from lightning_diag.callbacks.wiring_tensors import Memories
from lightning_diag.lightning import Callback
from lightning_diag.rules import diagnose
from tests.callbacks.wiring_cases import (
    CLASSES,
    WIDTH,
    Adapted,
    Plain,
    calm,
    check,
    data,
    findings,
    only,
    wiring,
)
from tests.callbacks.witness import fit, rows, scaler_plugin
from tests.promises.networks import Classifier, batches
from tests.promises.reads import WatchSteps
from tests.promises.trace import differences, seed, train


class TestParameters:
    @pytest.mark.parametrize("kind", ["list", "dictionary", "parameter"])
    def test_in_a_plain_list(self, tmp_path, kind):
        class Hidden(Plain):
            def make(self):
                extra = nn.Parameter(torch.eye(8)) if kind == "parameter" else nn.Linear(8, 8)
                self.extra = {"one": extra} if kind == "dictionary" else [extra]

            def forward(self, x):
                y = self.encoder(x)
                for one in self.extra.values() if kind == "dictionary" else self.extra:
                    y = y @ one if kind == "parameter" else one(y)
                return self.head(y)

        found = only(findings(Hidden(), tmp_path))
        assert found.rule == "unoptimized_parameter"
        name = {"list": "extra[0].weight", "dictionary": "extra[one].weight"}
        assert name.get(kind, "extra[0]") in found.message
        assert "plain list or dictionary" in found.message

    def test_a_teacher_in_a_plain_list_is_kept_apart(self, tmp_path):
        class Distilled(Plain):
            def make(self):
                self.teachers = [nn.Linear(WIDTH, CLASSES)]

            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    wanted = self.teachers[0](batch[0]).softmax(1)
                return F.cross_entropy(self(batch[0]), wanted)

        assert calm(findings(Distilled(), tmp_path))

    def test_trainable_in_no_optimizer(self, tmp_path):
        class Forgotten(Plain):
            def configure_optimizers(self):
                return torch.optim.SGD(self.encoder.parameters(), lr=0.05)

        found = only(findings(Forgotten(), tmp_path))
        assert (found.rule, found.component) == ("unoptimized_parameter", "head")
        assert "`head.weight`, `head.bias`" in found.message
        assert found.first_step == 0
        module = Forgotten()
        total = sum(p.numel() for p in module.parameters())
        own = sum(p.numel() for p in module.head.parameters())
        assert found.observed == pytest.approx(own / total)
        row = wiring(tmp_path, "unoptimized_parameter", step=0)[0]
        assert (row["count"], row["parameters"], row["component_share"]) == (2, own, 1.0)

    def test_a_teacher_in_no_optimizer_is_only_noted(self, tmp_path):
        class Taught(Plain):
            def make(self):
                self.teacher = nn.Linear(WIDTH, CLASSES)

            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    wanted = self.teacher(batch[0]).softmax(1)
                return F.cross_entropy(self(batch[0]), wanted)

            def configure_optimizers(self):
                own = [*self.encoder.parameters(), *self.head.parameters()]
                return torch.optim.SGD(own, lr=0.05)

        found = findings(Taught(), tmp_path)
        assert calm(found)
        assert [one.component for one in found] == ["teacher"]

    def test_an_optimizer_of_an_older_model(self, tmp_path):
        class Stale(Plain):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
                self.head = nn.Linear(8, CLASSES)
                return optimizer

        found = findings(Stale(), tmp_path)
        loose = next(one for one in found if one.rule == "unoptimized_parameter")
        assert (loose.severity, loose.component) == ("warning", "head")
        assert "hold 2 parameters that the model does not have" in loose.message

    def test_frozen_is_no_fault_and_in_an_optimizer_only_noted(self, tmp_path):
        class Frozen(Plain):
            def make(self):
                self.encoder.requires_grad_(False)

        class Left(Frozen):
            def configure_optimizers(self):
                return torch.optim.SGD(self.head.parameters(), lr=0.05)

        assert findings(Left(), tmp_path / "left") == []
        found = findings(Frozen(), tmp_path / "in")
        assert [one.rule for one in found] == ["frozen_in_optimizer"]
        assert calm(found)

    def test_frozen_with_an_old_gradient_goes_on_moving(self, tmp_path):
        class Late(Plain):
            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx == 2:
                    for parameter in self.encoder.parameters():
                        parameter.requires_grad_(False)
                        parameter.grad = torch.ones_like(parameter)

            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                self.head.zero_grad()

        found = [one for one in findings(Late(), tmp_path) if one.rank > 0]
        assert [one.rule for one in found] == ["frozen_in_optimizer"]

    def test_a_part_that_is_never_called(self, tmp_path):
        class Skipped(Plain):
            def make(self):
                self.transformer = nn.Linear(64, 64)

        found = only(findings(Skipped(), tmp_path), "critical")
        assert (found.rule, found.component) == ("unused_parameter", "transformer")
        assert "never called" in found.message
        assert "4,160 elements, 96.2% of all" in found.message
        # each step was watched, not the looks alone
        assert wiring(tmp_path, "unused_parameter")[-1]["steps"] == 16

    def test_an_output_that_the_loss_leaves_out(self, tmp_path):
        class Lost(Plain):
            def make(self):
                self.extra = nn.Linear(8, 8)

            def forward(self, x):
                hidden = self.encoder(x)
                self.extra(hidden)
                return self.head(hidden)

        found = only(findings(Lost(), tmp_path))
        assert (found.rule, found.component) == ("unused_parameter", "extra")
        assert "the loss does not depend on" in found.message

    def test_a_branch_that_is_taken_at_odd_steps_is_healthy(self, tmp_path):
        class Rare(Plain):
            def make(self):
                self.rare = nn.Linear(WIDTH, CLASSES)

            def training_step(self, batch, batch_idx):
                scores = self.rare(batch[0]) if batch_idx == 9 else self(batch[0])
                return F.cross_entropy(scores, batch[1])

        assert findings(Rare(), tmp_path) == []

    def test_a_small_unused_rest_is_only_noted(self, tmp_path):
        class Rest(Plain):
            def make(self):
                self.encoder.append(nn.Linear(8, 400))
                self.head = nn.Linear(400, CLASSES)
                self.head.spare = nn.Parameter(torch.zeros(3))

        found = findings(Rest(), tmp_path)
        assert [one.rule for one in found] == ["unused_parameter"]
        assert calm(found)

    def test_few_steps_are_only_noted(self, tmp_path):
        class Skipped(Plain):
            def make(self):
                self.idle = nn.Linear(8, 8)

        found = findings(Skipped(), tmp_path, max_steps=4)
        assert [one.rule for one in found] == ["unused_parameter"]
        assert calm(found)

    def test_a_gradient_of_zeros(self, tmp_path):
        class Gated(Plain):
            def forward(self, x):
                return self.head(self.encoder(x)) + 0 * self.extra(x)

            def make(self):
                self.extra = nn.Linear(WIDTH, CLASSES)

        found = only(findings(Gated(), tmp_path))
        assert (found.rule, found.component) == ("unused_parameter", "extra")
        assert "nothing but zeros" in found.message

    def test_unused_explains_dead_component(self, tmp_path):
        class Skipped(Plain):
            def make(self):
                self.idle = nn.Linear(8, 8)

        callbacks = [check(), GradientHealth(every_n_steps=2, on_error="raise")]
        fit(Skipped(), callbacks, data(), tmp_path)
        found = [one for one in diagnose(tmp_path) if one.rank > 0]
        assert [(one.rule, one.caused_by) for one in found[:2]] == [
            ("unused_parameter", None),
            ("dead_component", "unused_parameter"),
        ]

    def test_weights_that_never_move_are_recorded(self, tmp_path):
        class Still(Plain):
            def configure_optimizers(self):
                groups = [
                    {"params": self.encoder.parameters(), "lr": 0.0},
                    {"params": self.head.parameters()},
                ]
                return torch.optim.SGD(groups, lr=0.05)

        fit(Still(), check(), data(), tmp_path)
        last = wiring(tmp_path, "frozen_weights", step=15)
        assert [row["component"] for row in last] == ["encoder"]
        assert last[0]["looks"] == 6


class Attentive(Plain):
    """Attention whose last projection gets no gradient, though attention runs."""

    def make(self):
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        hidden = self.encoder(x)[:, None]
        weights = self.attention(hidden, hidden + 1, hidden)[1]
        return self.head(hidden.squeeze(1) + weights.mean((1, 2))[:, None])


class TestGraph:
    def test_the_projection_of_attention_ran(self, tmp_path):
        findings(Attentive(), tmp_path)
        found = wiring(tmp_path, "unused_parameter", component="attention")
        found = [row for row in found if row["kind"] != "zero"]
        assert {(row["kind"], row["names"]) for row in found} == {
            ("ran", "attention.out_proj.weight, attention.out_proj.bias")
        }

    @pytest.mark.parametrize("how", ["detach", "data", "no_grad"])
    def test_a_cut_is_found_with_its_place(self, tmp_path, how):
        class Cut(Plain):
            def forward(self, x):
                with torch.set_grad_enabled(how != "no_grad"):
                    hidden = self.encoder(x)
                return self.head({"detach": hidden.detach(), "data": hidden.data}.get(how, hidden))

        found = only(findings(Cut(), tmp_path), "critical")
        assert (found.rule, found.component) == ("detached_graph", "encoder")
        place = "`encoder.0` runs without a graph"
        assert (place if how == "no_grad" else "between `encoder` and `head`") in found.message

    def test_detaching_on_the_way_to_another_loss_is_healthy(self, tmp_path):
        class Stops(Plain):
            def make(self):
                self.probe = nn.Linear(8, CLASSES)

            def training_step(self, batch, batch_idx):
                hidden = self.encoder(batch[0])
                side = F.cross_entropy(self.probe(hidden.detach()), batch[1])
                return F.cross_entropy(self.head(hidden), batch[1]) + side

        assert findings(Stops(), tmp_path) == []

    def test_a_loss_that_is_cut_off_is_told_before_it_fails(self, tmp_path):
        class Off(Plain):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx).detach()

        with pytest.raises(RuntimeError, match="does not require grad"):
            findings(Off(), tmp_path)
        found = only(diagnose(tmp_path), "critical")
        assert found.rule == "detached_graph"
        assert "cut off from every parameter" in found.message

    def test_a_loss_that_does_not_depend_on_the_batch(self, tmp_path):
        class Constant(Plain):
            def training_step(self, batch, batch_idx):
                return 0 * F.cross_entropy(self(batch[0]), batch[1]) + 0.7

        found = [one for one in findings(Constant(), tmp_path) if one.rank > 0]
        assert [one.rule for one in found] == ["detached_graph"]
        assert "different batches" in found[0].message
        same = data(torch.ones(128, WIDTH), torch.arange(CLASSES).repeat(32))
        again = findings(Constant(), tmp_path / "same", same)
        assert not [one for one in again if one.rule == "detached_graph"]

    def test_a_loss_that_has_reached_zero_is_only_noted(self, tmp_path):
        class Done(Plain):
            def training_step(self, batch, batch_idx):
                return (self(batch[0]) - 1e6).clamp(min=0).mean()

        assert calm(findings(Done(), tmp_path))


class TestZeroGrad:
    def test_automatic_optimization_that_does_not_zero(self, tmp_path):
        class Piling(Plain):
            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                pass

        found = only(findings(Piling(), tmp_path))
        assert found.rule == "missing_zero_grad"
        assert found.first_step == 1

    @pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}], ids=str)
    @pytest.mark.parametrize("to_none", [True, False])
    def test_zeroed_is_healthy(self, tmp_path, arguments, to_none):
        class Zeroing(Plain):
            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                optimizer.zero_grad(set_to_none=to_none)

        assert findings(Zeroing(), tmp_path, **arguments) == []
        assert {row["state"] for row in wiring(tmp_path, "missing_zero_grad")} >= {"ok"}

    def test_a_gradient_scaler_is_healthy(self, tmp_path):
        assert findings(Plain(), tmp_path, plugins=[scaler_plugin()]) == []

    @pytest.mark.parametrize("zeroes", [None, "to none", "in place"])
    @pytest.mark.parametrize("every", [1, 3, 4])
    def test_by_hand(self, tmp_path, zeroes, every):
        class ByHand(Plain):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                if batch_idx % every == every - 1:
                    optimizer.step()
                    if zeroes:
                        optimizer.zero_grad(set_to_none=zeroes == "to none")

        found = [one.rule for one in findings(ByHand(), tmp_path) if one.rank > 0]
        # a window of several batches, not seen whole, is not judged
        wrong = not zeroes and every == 1
        assert found == (["missing_zero_grad"] if wrong else [])

    def test_two_backward_passes_for_one_step(self, tmp_path):
        class Twice(Plain):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad(set_to_none=False)
                for _ in range(2):
                    self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        assert findings(Twice(), tmp_path) == []
        assert {row["state"] for row in wiring(tmp_path, "missing_zero_grad")} >= {"ok"}

    @pytest.mark.parametrize("to_none", [True, False])
    @pytest.mark.parametrize("forgets", [None, 0, 1])
    def test_two_optimizers_that_add_to_each_other(self, tmp_path, forgets, to_none):
        class Rivals(Plain):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for index, optimizer in enumerate(self.optimizers()):
                    if index != forgets:
                        optimizer.zero_grad(set_to_none=to_none)
                    self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                    optimizer.step()

            def configure_optimizers(self):
                return [
                    torch.optim.SGD(part.parameters(), lr=0.05)
                    for part in (self.encoder, self.head)
                ]

        found = [one for one in findings(Rivals(), tmp_path) if one.rank > 0]
        assert [one.rule for one in found] == ["missing_zero_grad"] * (forgets is not None)
        if forgets is not None:
            assert f"optimizer {forgets}" in found[0].message


class TestModes:
    def dropping(self):
        class Dropping(Plain):
            def make(self):
                self.encoder.append(nn.Dropout(0.2))
                self.encoder.append(nn.BatchNorm1d(8))

        return Dropping()

    def test_a_part_in_evaluation_mode(self, tmp_path):
        module = self.dropping()
        module.encoder.eval()
        found = only(findings(module, tmp_path))
        assert (found.rule, found.component) == ("eval_mode_in_training", "encoder")
        assert found.message.startswith(
            "In evaluation mode while the model trains, with parameters that train: `encoder`."
        )

    def test_the_whole_model_in_evaluation_mode(self, tmp_path):
        module = self.dropping()
        module.eval()
        assert "`the whole model`" in only(findings(module, tmp_path)).message

    def test_left_behind_inside_the_step(self, tmp_path):
        class Sampling(type(self.dropping())):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.encoder.eval()
                return loss

        assert only(findings(Sampling(), tmp_path)).rule == "eval_mode_in_training"

    def test_healthy_ones(self, tmp_path):
        assert findings(self.dropping(), tmp_path / "train") == []
        frozen = self.dropping()
        frozen.encoder.eval().requires_grad_(False)
        assert calm(findings(frozen, tmp_path / "frozen"))
        plain = Plain().eval()  # nothing in it behaves otherwise
        assert findings(plain, tmp_path / "plain") == []
        norm = self.dropping()
        norm.encoder[-1].eval()
        found = findings(norm, tmp_path / "norm")
        assert [one.rule for one in found] == ["eval_mode_in_training"]
        assert calm(found)


class Language(Plain):
    """Tokens in, tokens out; the output map is the embedding."""

    tie = True

    def make(self):
        self.embed = nn.Embedding(CLASSES, 8)
        self.encoder = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        if self.tie:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.encoder(self.embed(x[:, 0].abs().long() % CLASSES)))


class TestTies:
    def test_that_came_apart(self, tmp_path):
        class Apart(Language):
            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx == 2:
                    self.head.weight = nn.Parameter(self.head.weight.detach().clone())

        found = [one for one in findings(Apart(), tmp_path) if one.rank > 0]
        broken = next(one for one in found if one.rule == "tied_weight_broken")
        assert "`head.weight and embed.weight` were one parameter" in broken.message
        assert broken.first_step == 2

    def test_that_hold(self, tmp_path):
        assert findings(Language(), tmp_path) == []

    def test_a_copy_was_meant_to_be_tied(self, tmp_path):
        class Copied(Language):
            tie = False

            def make(self):
                super().make()
                self.head.weight.data.copy_(self.embed.weight.data)

        found = only(findings(Copied(), tmp_path))
        assert found.rule == "tied_weight_broken"
        assert "started with equal values" in found.message

    def test_two_of_one_shape_are_nothing(self, tmp_path):
        class Free(Language):
            tie = False

        assert findings(Free(), tmp_path) == []

    def test_what_a_configuration_says(self, tmp_path):
        class Config:
            tie_word_embeddings = True

        class Pretrained(Language):
            tie = False
            _tied_weights_keys = ("head.weight",)
            config = Config()

            def get_input_embeddings(self):
                return self.embed

            def get_output_embeddings(self):
                return self.head

        found = only(findings(Pretrained(), tmp_path))
        assert "tied by the model's configuration" in found.message


class TestLooks:
    def test_steps(self, tmp_path):
        fit(Plain(), check(every_n_steps=5), data(), tmp_path)
        assert sorted({row["step"] for row in rows(tmp_path, "wiring")}) == [0, 1, 2, 4, 9, 14]

    def test_only_each_nth(self, tmp_path):
        fit(Plain(), check(every_n_steps=5, first_steps=0), data(), tmp_path)
        assert sorted({row["step"] for row in rows(tmp_path, "wiring")}) == [4, 9, 14]

    def test_accumulation_looks_once_a_step(self, tmp_path):
        fit(Plain(), check(), data(), tmp_path, accumulate_grad_batches=4)
        summary = wiring(tmp_path, "all")
        assert [row["step"] for row in summary] == [0, 1, 2, 3]
        assert {row["wrong"] for row in summary} == {0}

    def test_scalar_for_loggers(self, tmp_path):
        trainer = fit(Plain(), check(), data(), tmp_path)
        assert float(trainer.callback_metrics["wiring/wrong"]) == 0.0

    def test_compiled_parts_are_watched_without_a_mode(self, tmp_path):
        class Compiled(Plain):
            def make(self):
                self.encoder = torch.compile(self.encoder, backend="aot_eager")
                self.loss = nn.CrossEntropyLoss()

            def training_step(self, batch, batch_idx):
                return self.loss(self(batch[0]).softmax(1), batch[1])

        torch._dynamo.reset()
        found = only(findings(Compiled(), tmp_path))
        assert found.rule == "double_softmax"

    def test_a_loss_of_ones_own_is_unknown(self, tmp_path):
        class Own(Plain):
            def training_step(self, batch, batch_idx):
                return self(batch[0]).square().mean()

        assert findings(Own(), tmp_path) == []
        assert {row["state"] for row in wiring(tmp_path, "double_softmax")} == {"unknown"}

    def test_a_step_without_a_loss_is_not_watched(self, tmp_path):
        class Pausing(Plain):
            def make(self):
                self.idle = nn.Linear(8, 8)

            def training_step(self, batch, batch_idx):
                return None if batch_idx < 12 else super().training_step(batch, batch_idx)

        assert calm(findings(Pausing(), tmp_path))
        assert wiring(tmp_path, "unused_parameter")[-1]["steps"] == 4

    def test_a_resumed_run_goes_on(self, tmp_path):
        class Skipped(Plain):
            def make(self):
                self.idle = nn.Linear(8, 8)

        trainer = fit(Skipped(), check(), data(count=6), tmp_path)
        trainer.save_checkpoint(tmp_path / "six.ckpt")
        arguments = {"max_epochs": 2, "ckpt_path": str(tmp_path / "six.ckpt")}
        fit(Skipped(), check(), data(count=6), tmp_path, **arguments)
        steps = sorted({row["step"] for row in rows(tmp_path, "wiring")})
        assert steps == [0, 1, 2, 3, 5, 7, 9, 11]  # 5 and 9: what the host alone knows
        assert wiring(tmp_path, "unused_parameter")[-1]["steps"] == 12

    def test_inside_a_transform_nothing_is_kept(self, tmp_path):
        states = []
        for callbacks in ([], [check(every_n_steps=1)]):
            seed()
            module = Adapted()
            fit(module, callbacks, data(), tmp_path)
            states.append(module.state_dict())
        assert not differences(*states)
        said = [row for row in rows(tmp_path, "notes") if "torch.func" in row["message"]]
        assert [row["severity"] for row in said] == ["info"]
        # the loss of all samples together is no part of the transform
        assert {row["at"] for row in wiring(tmp_path, "loss_target_mismatch")} == {"cross_entropy"}
        assert calm(diagnose(tmp_path, on_error="raise"))

    def test_what_compiled_functions_call_is_left_out(self, tmp_path):
        class Compiled(Plain):
            def training_step(self, batch, batch_idx):
                return loss(self(batch[0]), batch[1])

        torch._dynamo.reset()
        loss = torch.compile(F.cross_entropy, backend="aot_eager", fullgraph=True)
        fit(Compiled(), check(), data(), tmp_path)
        assert {row["state"] for row in wiring(tmp_path, "double_softmax")} == {"unknown"}

    def test_dynamo_traces_nothing_of_the_mode(self, monkeypatch):
        watch = LossWatch(lambda function: function, Memories())
        x = torch.randn(4, CLASSES, requires_grad=True)
        with watch.inside(Scope({}, shadow=False, compiled=False)):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            F.cross_entropy(x, torch.zeros(4, dtype=torch.long))
            assert not watch.calls
            monkeypatch.undo()
            F.cross_entropy(x, torch.zeros(4, dtype=torch.long))
        assert len(watch.calls) == 1

    def test_attributes_that_raise(self, tmp_path):
        class Dropping(nn.Linear):
            _tied_weights_keys = ("weight",)

            @property
            def config(self):
                raise RuntimeError("no configuration")

            @property
            def p(self):
                raise RuntimeError("no rate")

        class Odd(Plain):
            def make(self):
                self.encoder[0] = Dropping(WIDTH, 8)

            def on_train_start(self):
                self.encoder[0].eval()

        assert calm(findings(Odd(), tmp_path))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"first_steps": -1}, "`first_steps` must be at least 0, got -1."),
            ({"every_n_steps": 0}, '`every_n_steps` must be at least 1 or "auto", got 0.'),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            WiringCheck(**arguments)

    @pytest.mark.parametrize("mode", ["plain", "accumulated", "scaler", "manual", "two_optimizers"])
    def test_bits_are_the_same(self, tmp_path, mode):
        without, _ = train(mode, tmp_path / "without")
        trace, _ = train(mode, tmp_path / "with", [check(every_n_steps=2)])
        assert not differences(without, trace)

    def test_bits_are_the_same_on_the_fast_path_of_attention(self, tmp_path):
        class Fast(Classifier):
            def __init__(self):
                super().__init__()
                layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
                self.frozen = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)

            def loss(self, batch, batch_idx):
                with torch.no_grad():
                    hidden = self.frozen(self.net.embed(batch[0]))
                return super().loss(batch, batch_idx) + self.net.head(hidden.mean(1)).mean()

        traces = []
        for callbacks in ([], [check(every_n_steps=1)]):
            seed()
            module = Fast()
            fit(module, callbacks, batches(), tmp_path)
            traces.append(module.state_dict())
        assert not differences(*traces)

    def test_nothing_hangs_on_the_model_when_training_fails(self, tmp_path):
        class Fails(Callback):
            def on_before_zero_grad(self, trainer, module, optimizer):
                raise ZeroDivisionError

        module = Plain()
        with pytest.raises(ZeroDivisionError):
            fit(module, [check(), Fails()], data(), tmp_path)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class TestCost:
    @pytest.mark.parametrize("mode", ["plain", "scaler", "manual", "two_optimizers", "sparse"])
    def test_one_read_a_look_and_nothing_else_at_other_steps(self, tmp_path, mode):
        watch = WatchSteps()
        looks = [0, 1, 2, 3, 7, 11]
        train(mode, tmp_path, [watch, check(every_n_steps=4)])
        for number, step in enumerate(watch.steps):
            own = [read for read in step.own_reads if "wiring" in read]
            assert len(own) == (number in looks), (number, step.own_reads)
            if number not in looks:
                assert not step.own_operations, number

    def test_no_hook_at_other_steps(self, tmp_path):
        counts = []

        class Counts(Callback):
            def on_before_zero_grad(self, trainer, module, optimizer):
                hooks = sum(len(m._forward_hooks) for m in module.modules())
                modes = torch._C._len_torch_function_stack()
                counts.append((hooks, modes, "training_step" in vars(module)))

        fit(Plain(), [check(), Counts()], data(), tmp_path)
        assert set(counts) == {(0, 0, False)}


class TestSevered:
    """What ends a gradient is named, where the part behind it has none."""

    @pytest.mark.parametrize(
        ("cut", "place"),
        [
            (lambda x: F.one_hot(x.argmax(1), 8).float(), "argmax"),
            (lambda x: torch.tensor(x.tolist()), "tolist"),
            (lambda x: torch.from_numpy(x.detach().numpy().copy()), "detach"),
            (lambda x: (20 * x).long().float(), "long"),
        ],
    )
    def test_the_operation_is_named(self, tmp_path, cut, place):
        class Chosen(Plain):
            def forward(self, x):
                return self.head(cut(self.encoder(x)))

        found = only(findings(Chosen(), tmp_path), "critical")
        assert found.rule == "detached_graph"
        assert f"at `{place}`" in found.message

    def test_a_part_whose_answer_nobody_takes_is_unused(self, tmp_path):
        class Aside(Plain):
            def make(self):
                super().make()
                self.aside = nn.Linear(8, 30)

            def forward(self, x):
                y = self.encoder(x)
                self.aside(y)
                return self.head(y)

            def training_step(self, batch, batch_idx):
                scores = self(batch[0])
                self.log("accuracy", (scores.argmax(1) == batch[1]).float().mean())
                return F.cross_entropy(scores, batch[1])

        found = [one for one in findings(Aside(), tmp_path) if one.rank > 0]
        assert [one.rule for one in found] == ["unused_parameter"]
