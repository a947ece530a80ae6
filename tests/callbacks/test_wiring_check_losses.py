"""Does WiringCheck find data and losses that do not fit, and leave those alone that do?"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_diag.rules import diagnose
from tests.callbacks.wiring_cases import (
    CLASSES,
    WIDTH,
    Plain,
    calm,
    check,
    data,
    findings,
    only,
    wiring,
)
from tests.callbacks.witness import fit, scaler_plugin


class Regression(Plain):
    """A number for each row: the targets are of shape ``(batch,)``."""

    def make(self):
        self.head = nn.Linear(8, 1)

    def loss(self, predicted, wanted):
        return F.mse_loss(predicted, wanted)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


def numbers(**arguments):
    return data(y=torch.randn(128, generator=torch.Generator().manual_seed(1)), **arguments)


class TestSoftmax:
    @pytest.mark.parametrize("how", ["function", "module", "half"])
    def test_applied_twice(self, tmp_path, how):
        class Twice(Plain):
            def training_step(self, batch, batch_idx):
                scores = self(batch[0]).softmax(1)
                scores = scores.bfloat16() if how == "half" else scores
                loss = nn.CrossEntropyLoss() if how == "module" else F.cross_entropy
                return loss(scores, batch[1])

        found = only(findings(Twice(), tmp_path))
        assert found.rule == "double_softmax"
        assert "`cross_entropy` applies a softmax itself" in found.message

    def test_sigmoid_applied_twice(self, tmp_path):
        class Twice(Plain):
            def training_step(self, batch, batch_idx):
                wanted = F.one_hot(batch[1], CLASSES).float()
                return F.binary_cross_entropy_with_logits(self(batch[0]).sigmoid(), wanted)

        assert only(findings(Twice(), tmp_path)).rule == "double_softmax"

    @pytest.mark.parametrize(
        "how", ["logits", "log_softmax", "nll", "sigmoid", "positive", "by chance"]
    )
    def test_healthy_ones(self, tmp_path, how):
        class Once(Plain):
            def training_step(self, batch, batch_idx):
                scores, wanted = self(batch[0]), F.one_hot(batch[1], CLASSES).float()
                if how == "sigmoid":
                    return F.binary_cross_entropy(scores.sigmoid(), wanted)
                if how == "by chance":
                    close = (scores / 100 + 0.5).clamp(0, 1)
                    return F.binary_cross_entropy_with_logits(close, wanted)
                if how == "nll":
                    return F.nll_loss(scores.log_softmax(1), batch[1])
                if how == "positive":
                    return F.cross_entropy(scores.exp(), batch[1])
                return F.cross_entropy(
                    scores.log_softmax(1) if how == "log_softmax" else scores, batch[1]
                )

        assert findings(Once(), tmp_path) == []

    def test_a_measure_beside_the_loss_is_no_loss(self, tmp_path):
        class Measures(Plain):
            def training_step(self, batch, batch_idx):
                scores = self(batch[0])
                F.nll_loss(scores.detach(), batch[1])
                return F.cross_entropy(scores, batch[1])

        assert findings(Measures(), tmp_path) == []


class TestTargets:
    @pytest.mark.parametrize("how", ["mse", "module", "l1", "by hand", "turned"])
    def test_shapes_that_broadcast(self, tmp_path, how):
        class Broad(Regression):
            def loss(self, predicted, wanted):
                if how == "by hand":
                    return (predicted - wanted).square().mean()
                if how == "turned":
                    return (wanted - predicted).abs().mean()
                chosen = {"mse": F.mse_loss, "module": nn.MSELoss(), "l1": F.l1_loss}[how]
                return chosen(predicted, wanted)

        found = only(findings(Broad(), tmp_path, numbers()))
        assert found.rule == "loss_target_mismatch"
        assert "predictions of shape 8x1 with targets of shape 8" in found.message

    def test_no_target_at_all_is_unknown(self, tmp_path):
        class Empty(Plain):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0][:0]), batch[1][:0], reduction="sum")

        assert calm(findings(Empty(), tmp_path))
        found = wiring(tmp_path, "loss_target_mismatch")
        assert {(row["state"], row["kind"]) for row in found} == {("unknown", "empty target")}

    @pytest.mark.parametrize("how", ["squeezed", "number", "one", "pairs"])
    def test_shapes_that_fit(self, tmp_path, how):
        class Fits(Regression):
            def loss(self, predicted, wanted):
                if how == "pairs":
                    gaps = predicted - wanted[None, :]
                    return gaps.square().mean()
                other = {"number": torch.tensor(0.5), "one": torch.ones(1, 1)}
                return F.mse_loss(predicted.squeeze(-1), wanted) + (
                    F.mse_loss(predicted, other[how]) if how in other else 0
                )

        assert calm(findings(Fits(), tmp_path, numbers()))

    def test_a_class_too_many_is_told_before_it_fails(self, tmp_path):
        y = torch.randint(CLASSES + 1, (128,), generator=torch.Generator().manual_seed(1))
        y[0] = CLASSES
        with pytest.raises(IndexError, match="out of bounds"):
            findings(Plain(), tmp_path, data(y=y))
        found = only(diagnose(tmp_path), "critical")
        assert found.rule == "loss_target_mismatch"
        assert f"has {CLASSES} classes, and is given targets from" in found.message

    def test_probabilities_out_of_range(self, tmp_path):
        class Wide(Plain):
            def training_step(self, batch, batch_idx):
                wanted = batch[1].float().unsqueeze(1).expand(-1, CLASSES)
                return F.binary_cross_entropy_with_logits(self(batch[0]), wanted)

        found = only(findings(Wide(), tmp_path))
        assert "has targets between 0 and 1, and is given targets from" in found.message

    def test_scores_for_the_logarithms_of_probabilities(self, tmp_path):
        class Raw(Plain):
            def training_step(self, batch, batch_idx):
                return F.nll_loss(self(batch[0]), batch[1])

        assert "takes logarithms of probabilities" in only(findings(Raw(), tmp_path)).message

    def test_a_single_class(self, tmp_path):
        class Single(Plain):
            def make(self):
                self.head = nn.Linear(8, 1)

        found = findings(Single(), tmp_path, data(y=torch.zeros(128, dtype=torch.long)))
        mismatch = next(one for one in found if one.rule == "loss_target_mismatch")
        assert "has a single class" in mismatch.message

    def test_targets_that_are_all_ignored(self, tmp_path):
        y = torch.full((128,), -100)
        found = findings(Plain(), tmp_path, data(y=y))
        assert any("No target of the batch counts" in one.message for one in found)

    @pytest.mark.parametrize("count", [16, 2])
    def test_targets_of_one_value(self, tmp_path, count):
        y = torch.full((count * 32,), 2)
        found = findings(Plain(), tmp_path, data(torch.randn(count * 32, WIDTH), y, size=32))
        # two looks at 64 targets may be chance, as with rare events
        assert [one.rule for one in found if one.rank] == ["loss_target_mismatch"] * (count > 2)

    def test_constant_targets_of_its_own_making_are_healthy(self, tmp_path):
        class Contrast(Plain):
            def training_step(self, batch, batch_idx):
                # the first of the scores is the right one, as in momentum contrast
                return F.cross_entropy(self(batch[0]), torch.zeros(32, dtype=torch.long))

        loader = data(torch.randn(512, WIDTH), torch.randint(4, (512,)), size=32)
        assert findings(Contrast(), tmp_path, loader) == []

    def test_one_class_a_batch_is_not_one_class(self, tmp_path):
        y = torch.arange(16).repeat_interleave(32) % CLASSES
        assert findings(Plain(), tmp_path, data(torch.randn(512, WIDTH), y, size=32)) == []


class TestReduction:
    def test_a_sum_that_is_never_divided(self, tmp_path):
        class Summed(Plain):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

        found = only(findings(Summed(), tmp_path))
        assert found.rule == "wrong_reduction"
        assert found.observed == pytest.approx(1.0)

    def test_adam_divides_it_out(self, tmp_path):
        class Summed(Plain):
            def training_step(self, batch, batch_idx):
                return nn.MSELoss(reduction="sum")(self(batch[0]), torch.randn(8, CLASSES))

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        found = findings(Summed(), tmp_path)
        assert [one.rule for one in found] == ["wrong_reduction"]
        assert calm(found)

    @pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 4}], ids=str)
    def test_a_sum_that_is_divided(self, tmp_path, arguments):
        class Divided(Plain):
            def training_step(self, batch, batch_idx):
                loss = F.cross_entropy(self(batch[0]), batch[1], reduction="sum")
                return loss / len(batch[0])

        assert findings(Divided(), tmp_path, **arguments) == []

    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: F.cross_entropy(x, y, reduction="none").sum(),
            lambda x, y: F.cross_entropy(x, y) * len(x),
            lambda x, y: (x - F.one_hot(y, CLASSES)).square().sum(),
            lambda x, y: (x - F.one_hot(y, CLASSES)).square().mean(1).sum() + 0.1 * x.abs().mean(),
            lambda x, y: torch.stack([F.cross_entropy(x, y, reduction="sum"), x.mean()]).sum(),
        ],
    )
    def test_a_sum_by_hand(self, tmp_path, make):
        class Summed(Plain):
            def training_step(self, batch, batch_idx):
                return make(self(batch[0]), batch[1])

        assert only(findings(Summed(), tmp_path)).rule == "wrong_reduction"

    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: F.cross_entropy(x, y, reduction="none").sum() / len(x),
            lambda x, y: 5 * F.cross_entropy(x, y),
            lambda x, y: (x - F.one_hot(y, CLASSES)).square().sum(1).mean(),
            lambda x, y: F.cross_entropy(x, y) + 3 * x.new_ones(CLASSES).sum(),
            lambda x, y: F.cross_entropy(x, y) + (0 * x).sum() / (0 * x).sum().clamp(min=1),
            lambda x, y: F.cross_entropy(x, y) + 200 * x.square().sum(),
            lambda x, y: torch.stack([F.cross_entropy(x[i : i + 2], y[:2]) for i in (0, 2)]).sum(),
        ],
    )
    def test_means_by_hand(self, tmp_path, make):
        class Averaged(Plain):
            def training_step(self, batch, batch_idx):
                return make(self(batch[0]), batch[1])

        assert findings(Averaged(), tmp_path) == []

    def test_the_size_of_weights_is_no_sum_over_the_batch(self, tmp_path):
        class Decayed(Plain):
            def training_step(self, batch, batch_idx):
                size = sum(p.square().sum() for p in self.parameters() if p.shape[0] % 8 == 0)
                return F.cross_entropy(self(batch[0]), batch[1]) + size

        assert findings(Decayed(), tmp_path) == []

    def test_the_scale_of_mixed_precision_is_no_weight(self, tmp_path):
        class Averaged(Plain):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1])

        assert findings(Averaged(), tmp_path, plugins=[scaler_plugin(8.0)]) == []
        row = wiring(tmp_path, "wrong_reduction", step=0)[0]
        assert (row["at"], row["kind"], row["value"]) == ("cross_entropy", "mean", 1.0)

    def test_one_that_comes_in_mid_run_counts_with_adam_too(self, tmp_path):
        class Later(Plain):
            def training_step(self, batch, batch_idx):
                loss = F.cross_entropy(self(batch[0]), batch[1])
                return loss * len(batch[0]) if batch_idx > 4 else loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        fit(Later(), check(every_n_steps=1), data(), tmp_path)
        found = diagnose(tmp_path, on_error="raise")
        first = next(one for one in found if one.rule == "wrong_reduction")
        assert (first.severity, first.first_step) == ("warning", 5)

    def test_accumulation_does_not_hide_a_sum(self, tmp_path):
        class Summed(Plain):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

        found = only(findings(Summed(), tmp_path, accumulate_grad_batches=4))
        assert found.observed == pytest.approx(1.0)


class TestData:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_that_are_not_finite(self, tmp_path, bad):
        x = torch.randn(128, WIDTH)
        x[3, 2] = bad
        found = findings(Plain(), tmp_path, data(x))
        assert (found[0].rule, found[0].severity) == ("nonfinite_data", "critical")
        row = wiring(tmp_path, "nonfinite_data", step=0)[0]
        assert (row["count"], row["value"], row["names"]) == (1, 1 / 48, "batch[0]")
        # tanh hides an infinity from the first loss, but not from the gradient
        assert row["loss_finite"] == int(bad == math.inf)

    def test_that_the_model_knows_are_only_noted(self, tmp_path):
        class Careful(Plain):
            def forward(self, x):
                return super().forward(x.nan_to_num(0.0))

        x = torch.randn(128, WIDTH)
        x[:, 1] = math.nan
        found = findings(Careful(), tmp_path, data(x))
        assert [one.rule for one in found] == ["nonfinite_data"]
        assert calm(found)

    def test_raw_pixels(self, tmp_path):
        x = torch.randint(256, (128, WIDTH), generator=torch.Generator().manual_seed(1)).float()
        found = only(findings(Plain(), tmp_path, data(x)))
        assert found.rule == "input_scale"
        assert found.observed == pytest.approx(x.square().mean().sqrt().item(), rel=0.1)
        row = wiring(tmp_path, "input_scale", step=0)[0]
        assert row["rms"] == pytest.approx(x[:8].square().mean().sqrt().item())
        assert row["names"] == "encoder.0"
        assert row["component"] == "encoder"

    def test_raw_pixels_in_front_of_a_normalization_are_only_noted(self, tmp_path):
        class Normed(Plain):
            def make(self):
                self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU())

        x = torch.randint(256, (128, WIDTH)).float()
        found = findings(Normed(), tmp_path, data(x))
        assert [one.rule for one in found] == ["input_scale"]
        assert calm(found)

    def test_scaled_inside_the_model_is_healthy(self, tmp_path):
        class Scales(Plain):
            def forward(self, x):
                return super().forward(x / 255)

        x = torch.randint(256, (128, WIDTH)).float()
        assert findings(Scales(), tmp_path, data(x)) == []

    def test_far_from_zero_is_only_noted(self, tmp_path):
        found = findings(Plain(), tmp_path, data(torch.randn(128, WIDTH) + 30))
        scale = [one for one in found if one.rule == "input_scale"]
        assert len(scale) == 1
        assert calm(scale)

    def test_constant_input_is_healthy(self, tmp_path):
        found = findings(Plain(), tmp_path, data(torch.full((128, WIDTH), 2.0)))
        # the same input gives the same answer, which is said; its scale is no fault
        assert {one.rule for one in found} <= {"constant_prediction"}

    def test_names_in_nested_batches(self, tmp_path):
        class Named(Plain):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch["image"]), batch["label"][0])

        def collate(items):
            x, y = (torch.stack(part) for part in zip(*items, strict=True))
            extra = torch.full((len(x),), math.nan)
            return {"image": x, "label": (y, extra)}

        loader = DataLoader(data().dataset, batch_size=8, collate_fn=collate)
        findings(Named(), tmp_path, loader)
        assert wiring(tmp_path, "nonfinite_data", step=0)[0]["names"] == "label[1]"


class TestHealthy:
    def test_adversaries_with_an_optimizer_each(self, tmp_path):
        class Adversaries(Plain):
            automatic_optimization = False

            def make(self):
                self.critic = nn.Sequential(nn.Linear(CLASSES, 8), nn.LeakyReLU(), nn.Linear(8, 1))

            def training_step(self, batch, batch_idx):
                first, second = self.optimizers()
                made = self(batch[0])
                verdict = self.critic(made)
                first.zero_grad()
                loss = F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
                self.manual_backward(loss)
                first.step()
                second.zero_grad()
                false = self.critic(made.detach())
                true = self.critic(torch.randn_like(made))
                loss = F.binary_cross_entropy_with_logits(false, torch.zeros_like(false))
                loss = loss + F.binary_cross_entropy_with_logits(true, torch.ones_like(true))
                self.manual_backward(loss)
                second.step()

            def configure_optimizers(self):
                own = [*self.encoder.parameters(), *self.head.parameters()]
                return [torch.optim.Adam(own), torch.optim.Adam(self.critic.parameters())]

        assert findings(Adversaries(), tmp_path) == []

    def test_experts_of_which_one_is_chosen(self, tmp_path):
        class Experts(Plain):
            def make(self):
                self.experts = nn.ModuleList([nn.Linear(8, CLASSES) for _ in range(8)])

            def forward(self, x):
                hidden = self.encoder(x)
                self.turn = getattr(self, "turn", -1) + 1
                return self.experts[self.turn % 8](hidden) + self.head(hidden)

        assert findings(Experts(), tmp_path) == []

    def test_embeddings_convolutions_and_recurrence(self, tmp_path):
        class Mixed(Plain):
            def make(self):
                self.embed = nn.Embedding(CLASSES, 8)
                self.conv = nn.Conv1d(8, 8, 3, padding=1)
                self.memory = nn.GRU(8, 8, batch_first=True)
                self.encoder = nn.Identity()

            def forward(self, x):
                words = self.embed((x.abs() * 2).long() % CLASSES)
                hidden, _ = self.memory(self.conv(words.transpose(1, 2)).transpose(1, 2))
                return self.head(hidden[:, -1])

        assert findings(Mixed(), tmp_path) == []

    def test_a_curved_optimizer(self, tmp_path):
        class Curved(Plain):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        assert findings(Curved(), tmp_path) == []

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_precisions(self, tmp_path, precision):
        class Cast(Plain):
            def forward(self, x):
                return super().forward(x.to(self.head.weight.dtype))

        assert calm(findings(Cast(), tmp_path, precision=precision))


class TestConstantPrediction:
    def test_the_numbers_of_a_look(self, tmp_path):
        class Keeps(Plain):
            def training_step(self, batch, batch_idx):
                self.scores = self(batch[0])
                self.kept = [*getattr(self, "kept", []), (self.scores.detach(), batch[1])]
                return F.cross_entropy(self.scores, batch[1])

        module = Keeps()
        findings(module, tmp_path)
        row, (scores, labels) = wiring(tmp_path, "constant_prediction")[0], module.kept[0]
        assert row["state"] == "ok"
        assert row["std"] == pytest.approx(float(scores.std(0, correction=0).mean()))
        assert row["abs_max"] == pytest.approx(float(scores.abs().max()))
        assert row["top_share"] == float(scores.argmax(1).bincount().max()) / len(labels)
        assert row["target_top_share"] == float(labels.bincount().max()) / len(labels)

    def test_a_loss_alone_shows_a_constant(self, tmp_path):
        class Constant(Plain):
            def forward(self, x):
                return self.head(0 * self.encoder(x))

        findings(Constant(), tmp_path)
        assert {row["state"] for row in wiring(tmp_path, "constant_prediction")} == {"wrong"}

    def test_targets_of_a_regression(self, tmp_path):
        class Numbers(Regression):
            def training_step(self, batch, batch_idx):
                return F.mse_loss(self(batch[0]).squeeze(1), batch[1])

        y = torch.randn(128, generator=torch.Generator().manual_seed(1))
        findings(Numbers(), tmp_path, data(y=y))
        row = wiring(tmp_path, "constant_prediction")[0]
        assert row["target_std"] == pytest.approx(float(y[:8].std(correction=0)))
        assert (row["from_batch"], row["top_share"]) == (1, None)


class TestReach:
    @pytest.mark.parametrize(
        ("activation", "scale", "found"),
        [
            (torch.tanh, 30.0, True),
            (torch.sigmoid, -3.0, True),
            (torch.tanh, 0.3, False),
            (lambda x: x, 30.0, False),
        ],
    )
    def test_targets_that_an_activation_cannot_give(self, tmp_path, activation, scale, found):
        class Bounded(Regression):
            def training_step(self, batch, batch_idx):
                return F.mse_loss(activation(self(batch[0]))[:, 0], scale * batch[1])

        rules = [one.rule for one in findings(Bounded(), tmp_path, numbers()) if one.rank > 0]
        assert ("loss_target_mismatch" in rules) == found

    @pytest.mark.parametrize("logarithm", [True, False])
    def test_relative_entropy_takes_logarithms(self, tmp_path, logarithm):
        class Compared(Plain):
            def training_step(self, batch, batch_idx):
                scores = self(batch[0])
                given = scores.log_softmax(1) if logarithm else scores.softmax(1)
                wanted = F.one_hot(batch[1], CLASSES) * 0.9 + 0.02
                return F.kl_div(given, wanted, reduction="batchmean")

        rules = [one.rule for one in findings(Compared(), tmp_path) if one.rank > 0]
        assert ("loss_target_mismatch" in rules) != logarithm

    @pytest.mark.parametrize(("shift", "found"), [(-1.0, True), (0.0, False)])
    def test_counts_are_not_negative(self, tmp_path, shift, found):
        class Counting(Regression):
            def training_step(self, batch, batch_idx):
                return F.poisson_nll_loss(self(batch[0])[:, 0], batch[1].abs() + shift)

        rules = [one.rule for one in findings(Counting(), tmp_path, numbers()) if one.rank > 0]
        assert ("loss_target_mismatch" in rules) == found
