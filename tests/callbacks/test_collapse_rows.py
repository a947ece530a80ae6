"""Do rows that are counted in Python give what the tensor operations give?"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag import CollapseStop
from lightning_diag.callbacks.collapse_rows import as_read, raw_rows, step_values
from lightning_diag.functional.collapse_stop import (
    gradient_squares,
    merge_steps,
    prediction_numbers,
    step_numbers,
)
from lightning_diag.lightning import LightningModule, Trainer
from tests.promises.trace import QUIET

KINDS = ["index", "ignored", "float", "odd", "bool", "none", "shape", "several"]


def batch(kind, rows, width, seed, broken):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator)
    for row in range(0, rows if broken is not None else 0, 3):
        logits[row, row % width] = broken
    labels = torch.randint(0, max(2, width), (rows,), generator=generator)
    targets = {
        "index": labels,
        "ignored": torch.where(labels == 1, -100, labels),
        "float": (labels > 0).float(),
        "odd": labels * 0.5,
        "bool": labels > 0,
        "none": None,
        "shape": labels.new_zeros(rows + 1),
        "several": (torch.randn(rows, width, generator=generator) > 0).float(),
    }
    return logits, targets[kind]


def both(gradients, losses, batches, most, scale=2.0, divided_by=3):
    squares, scale = gradient_squares(gradients), torch.tensor(scale)
    found = [prediction_numbers(logits, targets, most) for logits, targets in batches]
    tensors = step_numbers(squares, scale, losses, found, divided_by=divided_by)
    rows = [raw_rows(logits, targets, most) for logits, targets in batches]
    pieces = [scale, squares, *losses]
    for one, numbers in zip(rows, found, strict=True):
        pieces += [numbers] if one is None else one.tensors
    read = as_read(pieces).tolist()
    counted = step_values(read, len(squares), len(losses), rows, divided_by=divided_by)
    return counted, merge_steps(tensors.view(1, -1)).tolist(), rows


class TestAgainstTensors:
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                st.integers(0, 40),
                st.sampled_from([1, 2, 5, 70, 200]),
                st.integers(0, 1000),
                st.sampled_from([None, math.nan, math.inf, -math.inf]),
            ),
            max_size=3,
        ),
        st.sampled_from([2, 16, 256]),
    )
    def test_predictions(self, batches, most):
        counted, want, _ = both([torch.ones(2)], [], [batch(*one) for one in batches], most)
        assert counted == pytest.approx(want, rel=1e-9, abs=1e-12, nan_ok=True)

    @given(st.lists(st.sampled_from([None, 0.0, 1.0, 1e29, 1e200, math.nan, math.inf]), max_size=5))
    def test_gradients(self, values):
        gradients = [
            None if x is None else torch.full((3,), x, dtype=torch.float64) for x in values
        ]
        counted, want, _ = both(gradients, [torch.tensor(1.0), torch.tensor(2.0)], [], 16)
        assert counted == pytest.approx(want, nan_ok=True)
        assert counted[7] == 4.5

    def test_large_classes_are_exact(self):
        logits, targets = torch.zeros(2, 2), torch.tensor([2**24, 2**24 + 1])
        counted, _, rows = both([], [], [(logits, targets)], 16)
        assert rows[0] is not None
        assert counted[16:18] == [-(2.0**24), 2.0**24 + 1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("shape", [(12,), (12, 1), (3, 4, 2, 2), (12, 4)])
    def test_shapes_and_precisions(self, dtype, shape):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        counted, want, _ = both([torch.ones(2)], [], [(logits, None)], 256)
        assert counted == pytest.approx(want, nan_ok=True)

    def test_a_row_that_requires_a_gradient(self):
        rows = raw_rows(torch.ones(4, 2, requires_grad=True), None, 16)
        assert not any(x.requires_grad for x in rows.tensors)


class Huge(LightningModule):
    """Its gradient is as large as it is told; `kind` says what else is odd."""

    def __init__(self, kind, factor=1.0):
        super().__init__()
        self.kind, self.factor = kind, factor
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.other = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def training_step(self, batch, batch_idx):
        if self.kind == "passes":
            return None
        return (self.weight * self.factor).sum()

    def configure_optimizers(self):
        if self.kind == "none":
            return None
        return torch.optim.SGD([self.other if self.kind == "frozen" else self.weight], lr=0.0)


def fit(module, folder, **options):
    stop = CollapseStop(on_error="raise", action="warn", **options)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer = Trainer(callbacks=[stop], **{**QUIET, "default_root_dir": folder, "max_epochs": 1})
    trainer.fit(module, loader)
    return stop


class TestOnATrainer:
    def test_a_huge_gradient_is_finite(self, tmp_path):
        stop = fit(Huge("huge", factor=1e29), tmp_path)
        event = stop._judge.events[0]["gradient_check"]
        assert event["is_exploding_grad"]
        assert not event["has_nan_inf"]
        # the largest that single precision can square; far beyond any threshold
        assert 1.8e19 < event["total_norm"] < float("inf")

    @pytest.mark.parametrize("kind", ["passes", "none", "frozen"])
    def test_without_gradients(self, kind, tmp_path):
        stop = fit(Huge(kind), tmp_path)
        assert not stop._ended
        assert all(norm is None for norm in stop._judge.recent["grad_norms"])
