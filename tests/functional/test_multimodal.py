"""Are loss shares, image errors and caption scores right, and do they merge over batches?"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.functional import multimodal
from lightning_diag.functional.multimodal import (
    CaptionScores,
    ImageErrors,
    caption_scores,
    caption_scores_merge,
    caption_scores_update,
    caption_scores_value,
    image_errors,
    image_errors_merge,
    image_errors_update,
    image_errors_value,
    loss_shares,
)
from lightning_diag.lightning import LightningModule, Trainer

PAD = 0
NONE = math.nan


def scalars(**parts: float) -> dict[str, Tensor]:
    return {name: torch.tensor(part) for name, part in parts.items()}


def numbers(value: tuple[Tensor, ...]) -> list[float]:
    return [float(field) for field in value]


def image_reference(
    x: Tensor, y: Tensor, own: tuple[float, float], other: tuple[float, float]
) -> list[float]:
    """Both in units of their range, in NumPy: errors for a result in [0, 1]."""
    a, b = (z.double().numpy().ravel() for z in (x, y))
    d = (a - own[0]) / (own[1] - own[0]) - (b - other[0]) / (other[1] - other[0])
    outside = [1 - ((low <= z) & (z <= high)).mean() for z, (low, high) in ((a, own), (b, other))]
    return [(d * d).mean(), np.abs(d).mean(), *outside]


def caption_reference(logits: Tensor, tokens: Tensor, pad: int | None) -> list[float]:
    """Position by position, in double precision NumPy."""
    table, right = logits.double().numpy(), tokens.numpy()
    vocabulary = table.shape[-1]
    hits, nll, entropy = [], [], []
    for z, y in zip(table.reshape(-1, vocabulary), right.ravel(), strict=True):
        if y == pad:
            continue
        p = np.exp(z - z.max())
        p /= p.sum()
        hits.append(z.argmax() == y)
        nll.append(-math.log(p[y]))
        entropy.append(-sum(q * math.log(q) for q in p if q > 0))
    mean = np.mean
    normalized = mean(entropy) / math.log(vocabulary)
    return [mean(hits), math.exp(mean(nll)), mean(entropy), normalized, mean(nll), len(hits)]


def captions(
    batch: int = 4,
    length: int = 6,
    vocabulary: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    tokens[:, 0] = 1  # no caption is empty
    return logits.to(dtype), tokens


class TestLossShares:
    def test_of_a_loss_worked_by_hand(self):
        found = loss_shares(
            scalars(image=0.5, caption=1.0, alignment=1.0), {"caption": 1.0, "alignment": 0.5}
        )
        assert float(found.total) == 2.0
        assert {name: float(x) for name, x in found.weighted.items()} == {
            "image": 0.5,
            "caption": 1.0,
            "alignment": 0.5,
        }
        assert [float(x) for x in found.shares.values()] == [0.25, 0.5, 0.25]

    @given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 10)), min_size=1, max_size=6))
    def test_add_up_to_one_and_do_not_depend_on_scale(self, pairs):
        parts = {str(place): torch.tensor(part).double() for place, (part, _) in enumerate(pairs)}
        weights = {str(place): weight for place, (_, weight) in enumerate(pairs)}
        found = loss_shares(parts, weights)
        want = np.array([part.item() * weights[name] for name, part in parts.items()])
        np.testing.assert_allclose(found.total.item(), want.sum(), rtol=1e-12)
        shares = [x.item() for x in found.shares.values()]
        np.testing.assert_allclose(shares, want / want.sum(), rtol=1e-12)
        scaled = loss_shares({name: 8 * part for name, part in parts.items()}, weights)
        assert [x.item() for x in scaled.shares.values()] == shares

    def test_of_parts_that_cancel_keep_sign_and_size(self):
        found = loss_shares(scalars(reward=-3.0, penalty=3.0))
        assert float(found.total) == 0
        assert numbers(tuple(found.shares.values())) == [-0.5, 0.5]

    @pytest.mark.parametrize(
        ("first", "shares"),
        [(0.0, [NONE, NONE]), (math.nan, [NONE, NONE]), (math.inf, [NONE, 0.0])],
    )
    def test_are_said_where_they_do_not_exist(self, first, shares):
        found = loss_shares(scalars(first=first, second=0.0 if first == 0 else 2.0))
        np.testing.assert_equal(numbers(tuple(found.shares.values())), shares)
        assert float(found.total) == pytest.approx(0 if first == 0 else first, nan_ok=True)

    def test_total_is_the_loss_itself_to_the_bit(self):
        w = torch.randn(5, generator=torch.Generator().manual_seed(1))
        grads = []
        for ours in (True, False):
            x = w.clone().requires_grad_()
            image, caption = x.square().mean(), x.exp().sum()
            found = loss_shares({"image": image, "caption": caption}, {"caption": 0.3})
            loss = found.total if ours else image + 0.3 * caption
            loss.backward()
            grads.append((loss.detach(), x.grad))
            assert not any(
                y.requires_grad for y in (*found.shares.values(), *found.weighted.values())
            )
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])

    def test_half_precision_is_raised_before_it_is_added(self):
        part = torch.tensor(256.0, dtype=torch.bfloat16)
        found = loss_shares({"large": part, "small": torch.ones_like(part)})
        assert found.total.dtype == torch.float32
        assert float(found.total) == 257  # 256 in bfloat16

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"^`parts` must have at least one part, got none\.$"):
            loss_shares({})
        with pytest.raises(ValueError, match=r"be scalars, got shape \(2,\) for `image`\.$"):
            loss_shares({"image": torch.ones(2)})
        with pytest.raises(TypeError, match=r"a floating type, got torch\.int64 for `image`\.$"):
            loss_shares({"image": torch.tensor(1)})
        with pytest.raises(ValueError, match=r"to a part \(`image`, `text`\), got `imag`\.$"):
            loss_shares(scalars(image=1.0, text=1.0), {"imag": 2.0})
        with pytest.raises(ValueError, match=r"^`weights` must be finite, got nan for `image`\.$"):
            loss_shares(scalars(image=1.0), {"image": math.nan})


class TestImageErrors:
    def test_of_an_image_worked_by_hand(self):
        # tanh -1, 0, 1 is black, grey, white
        found = image_errors(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, 0.0]))
        assert numbers(found) == pytest.approx([1 / 3, 1 / 3, 0, 0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5, 4)])
    def test_agree_with_numpy(self, dtype, shape):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(shape, generator=generator).to(dtype)
        y = torch.randn(shape, generator=generator).to(dtype)
        found = image_errors(x, y, prediction_range=(-2, 1), target_range=(-1, 3))
        want = image_reference(x, y, (-2, 1), (-1, 3))
        assert numbers(found) == pytest.approx(want, rel=1e-12, abs=1e-15)
        assert all(field.dtype == torch.float64 for field in found)

    def test_bytes_are_images_too(self):
        y = torch.tensor([0, 51, 255], dtype=torch.uint8)
        found = image_errors(torch.tensor([-1.0, -0.6, 1.0]), y, target_range=(0, 255))
        assert numbers(found) == pytest.approx([0, 0, 0, 0], abs=1e-7)

    @given(st.floats(-5, 5), st.floats(0.1, 9), st.integers(0, 99))
    def test_scale_with_the_result_and_not_with_the_representation(self, low, width, seed):
        generator = torch.Generator().manual_seed(seed)
        x = 2 * torch.rand(30, generator=generator, dtype=torch.float64) - 1
        y = torch.rand(30, generator=generator, dtype=torch.float64)
        plain = image_errors(x, y)
        moved = image_errors(x, low + width * y, target_range=(low, low + width))
        torch.testing.assert_close(plain[:2], moved[:2], rtol=1e-9, atol=1e-12)
        wide = image_errors(x, y, result_range=(low, low + width))
        torch.testing.assert_close(wide.mse, plain.mse * width**2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(wide.l1, plain.l1 * width, rtol=1e-9, atol=1e-12)

    def test_without_one_range_the_loss_is_another_number(self):
        generator = torch.Generator().manual_seed(4)
        x = torch.rand(64, generator=generator).double() * 2 - 1
        y = torch.rand(64, generator=generator).double()
        same = image_errors(x, y, prediction_range=(0, 1))
        torch.testing.assert_close(same.mse, F.mse_loss(x, y))
        torch.testing.assert_close(same.l1, F.l1_loss(x, y))
        assert abs(same.mse - image_errors(x, y).mse) > 0.05
        assert same.prediction_outside > 0.3  # what gives it away

    def test_values_outside_are_counted_and_clamped_where_asked(self):
        x, y = torch.tensor([-3.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 2.0, math.nan])
        found = image_errors(x[:3], y[:3])
        assert numbers(found) == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])
        assert numbers(image_errors(x[:3], y[:3], clamp=True))[:2] == [0, 0]
        wide = image_errors(x[:3] / 2, y[:3], result_range=(2, 4), clamp=True)
        assert numbers(wide) == pytest.approx([0.25 / 3, 0.5 / 3, 1 / 3, 1 / 3])
        odd = image_errors(x, y, clamp=True)
        assert odd.mse.isnan()
        assert odd.l1.isnan()
        assert float(odd.target_outside) == 0.5

    def test_infinite_and_no_elements(self):
        found = image_errors(torch.tensor([math.inf, 0.0]), torch.zeros(2))
        assert numbers(found) == [math.inf, math.inf, 0.5, 0]
        for shape in ((0,), (2, 0, 3)):
            found = image_errors(torch.ones(shape), torch.ones(shape))
            assert all(field.isnan() for field in found)

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 99))
    def test_of_batches_merge_into_those_of_one(self, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(sizes), 2, 3, generator=generator)
        y = torch.randn(sum(sizes), 2, 3, generator=generator)
        whole = image_errors_update(None, x, y)
        pairs = list(zip(x.split(sizes), y.split(sizes), strict=True))
        state = None
        for one, other in pairs:
            state = image_errors_update(state, one, other)
        torch.testing.assert_close(state, whole, rtol=1e-12, atol=0)
        stacked = [image_errors_update(None, *pair) for pair in reversed(pairs)]
        merged = stacked[0]
        for other in stacked[1:]:
            merged = image_errors_merge(merged, other)
        torch.testing.assert_close(merged, whole, rtol=1e-12, atol=0)
        gathered = ImageErrors(*(torch.stack(field) for field in zip(*stacked, strict=True)))
        each = image_errors_value(gathered)
        assert each.mse.shape == (len(sizes),)
        summed = image_errors_value(ImageErrors(*(field.sum(0) for field in gathered)))
        torch.testing.assert_close(
            summed, image_errors_value(whole), rtol=1e-12, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_blocks_do_not_matter(self, monkeypatch, layout):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(3, 4, 5, 6, generator=generator).contiguous(memory_format=layout)
        y = torch.randn(3, 4, 5, 6, generator=generator)
        whole = image_errors_update(None, x, y)
        for block in (1, 7, 250):
            monkeypatch.setattr(multimodal, "_CPU_BLOCK", block)
            torch.testing.assert_close(image_errors_update(None, x, y), whole, rtol=1e-12, atol=0)

    def test_wrong_arguments_are_named(self):
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"prediction's shape \(2, 3\), got \(2, 1\)\.$"):
            image_errors(x, torch.ones(2, 1))
        for name in ("prediction_range", "target_range", "result_range"):
            for bad in ((1.0, 0.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
                with pytest.raises(
                    ValueError, match=rf"^`{name}` must be two finite numbers, low before high, got"
                ):
                    image_errors(x, x, **{name: bad})
        with pytest.raises(TypeError, match=r"^`target` must be real, got torch\.complex64\.$"):
            image_errors(x, x.to(torch.complex64))


class TestCaptionScores:
    def test_of_captions_worked_by_hand(self):
        # probabilities 1/2, 1/4, 1/4; then a guess among three; then padding, which must not count
        logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [9.0, 0.0, 0.0]]]).log()
        found = caption_scores(logits, torch.tensor([[1, 2, 0]]), pad=0)
        nll = (math.log(4) + math.log(3)) / 2
        entropy = (1.5 * math.log(2) + math.log(3)) / 2
        want = [0, math.sqrt(12), entropy, entropy / math.log(3), nll, 2]
        assert numbers(found) == pytest.approx(want, rel=1e-6)

    @pytest.mark.parametrize("pad", [PAD, None])
    @pytest.mark.parametrize(
        ("dtype", "rel"),
        # the softmax of half precision is taken in single: no worse than single's own
        [
            (torch.float64, 1e-12),
            (torch.float32, 1e-6),
            (torch.bfloat16, 1e-6),
            (torch.float16, 1e-6),
        ],
    )
    def test_agree_with_numpy(self, dtype, rel, pad):
        logits, tokens = captions(dtype=dtype)
        found = caption_scores(logits, tokens, pad)
        assert numbers(found) == pytest.approx(caption_reference(logits, tokens, pad), rel=rel)
        assert all(field.dtype == torch.float64 for field in found)

    def test_agree_with_the_loss(self):
        logits, tokens = captions(seed=3)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD)
        found = caption_scores(logits, tokens, PAD)
        torch.testing.assert_close(found.nll, loss)
        torch.testing.assert_close(found.perplexity, loss.exp())

    def test_of_a_guess_among_all_tokens(self):
        found = caption_scores(torch.zeros(2, 3, 50).double(), torch.full((2, 3), 7), PAD)
        want = [0, 50, math.log(50), 1, math.log(50), 6]
        assert numbers(found) == pytest.approx(want)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
    def test_take_any_leading_shape(self, shape):
        generator = torch.Generator().manual_seed(6)
        logits = torch.randn(*shape, 5, generator=generator).double()
        tokens = torch.randint(1, 5, shape, generator=generator)
        want = caption_reference(logits, tokens, PAD)
        assert numbers(caption_scores(logits, tokens, PAD)) == pytest.approx(want, rel=1e-12)

    @settings(max_examples=50)
    @given(st.integers(0, 99), st.integers(0, 9), st.floats(-9, 9))
    def test_do_not_depend_on_padding_shift_or_order(self, seed, more, shift):
        logits, tokens = captions(seed=seed)
        plain = caption_scores(logits, tokens, PAD)
        # whatever the model says of padding, not a number included
        noise = torch.full((4, more, 9), math.nan if seed % 2 else 50.0).double()
        longer = caption_scores(
            torch.cat([logits, noise], dim=1), F.pad(tokens, (0, more), value=PAD), PAD
        )
        torch.testing.assert_close(longer, plain, rtol=1e-12, atol=0)
        shifted = caption_scores(logits + shift, tokens, PAD)
        torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-12)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)) + 1
        order = torch.cat([torch.zeros(1, dtype=torch.long), order])
        renamed = caption_scores(logits[..., order], order.argsort()[tokens], PAD)
        torch.testing.assert_close(renamed, plain, rtol=1e-9, atol=1e-12)

    @settings(max_examples=50)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 99))
    def test_of_batches_merge_into_those_of_one(self, sizes, seed):
        logits, tokens = captions(batch=sum(sizes), seed=seed)
        whole = caption_scores_update(None, logits, tokens, PAD)
        pairs = list(zip(logits.split(sizes), tokens.split(sizes), strict=True))
        state = None
        for pair in pairs:
            state = caption_scores_update(state, *pair, PAD)
        torch.testing.assert_close(state, whole, rtol=1e-12, atol=1e-12)
        stacked = [caption_scores_update(None, *pair, PAD) for pair in reversed(pairs)]
        merged = stacked[0]
        for other in stacked[1:]:
            merged = caption_scores_merge(merged, other)
        torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
        gathered = CaptionScores(*(torch.stack(field) for field in zip(*stacked, strict=True)))
        assert caption_scores_value(gathered).perplexity.shape == (len(sizes),)
        torch.testing.assert_close(
            caption_scores_value(CaptionScores(*(field.sum(0) for field in gathered))),
            caption_scores_value(whole),
            rtol=1e-12,
            atol=1e-12,
            equal_nan=True,
        )

    def test_of_an_epoch_are_not_the_mean_of_its_batches(self):
        logits, tokens = captions(batch=2, seed=8)
        tokens[1, 1:] = PAD
        state = None
        for pair in zip(logits.split(1), tokens.split(1), strict=True):
            state = caption_scores_update(state, *pair, PAD)
        want = caption_reference(logits, tokens, PAD)
        assert numbers(caption_scores_value(state)) == pytest.approx(want, rel=1e-12)
        means = [caption_scores(logits[i : i + 1], tokens[i : i + 1], PAD) for i in range(2)]
        assert abs(sum(x.perplexity for x in means) / 2 - want[1]) > 0.01 * want[1]

    def test_blocks_do_not_matter(self, monkeypatch):
        logits, tokens = captions(batch=5, length=8)
        # a slice of longer captions, as it comes from a language model
        logits, tokens = logits[:, :-1], tokens[:, 1:]
        whole = caption_scores_update(None, logits, tokens, PAD)
        for block in (1, 20, 150):
            monkeypatch.setattr(multimodal, "_CPU_BLOCK", block)
            found = caption_scores_update(None, logits, tokens, PAD)
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)

    def test_temporaries_are_small(self):
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                fresh = isinstance(out, Tensor) and out._base is None
                if fresh and out.untyped_storage().data_ptr() != home:
                    largest = max(largest, out.untyped_storage().nbytes())
                return out

        logits = torch.zeros(4, 101, 8000, dtype=torch.bfloat16)
        home = logits.untyped_storage().data_ptr()
        with Watch():
            caption_scores(logits[:, :-1], torch.ones(4, 100, dtype=torch.long), PAD)
        assert 0 < largest <= 2 * 100 * 8000  # one caption in half precision

    @pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(2, 0)])
    def test_without_a_token_there_are_none(self, tokens):
        found = caption_scores(torch.randn(*tokens.shape, 4), tokens.long(), PAD)
        np.testing.assert_equal(numbers(found), [NONE] * 5 + [0])

    def test_padding_may_lie_outside_the_vocabulary(self):
        logits, tokens = captions(seed=9)
        tokens[1:, 4:] = -100
        found = caption_scores(logits, tokens, -100)
        want = caption_reference(logits, tokens, -100)
        assert numbers(found) == pytest.approx(want, rel=1e-12)
        small = caption_scores(logits, tokens.clamp(min=0).to(torch.uint8), PAD)
        torch.testing.assert_close(small, caption_scores(logits, tokens.clamp(min=0), PAD))

    def test_a_token_outside_the_vocabulary_shows(self):
        logits, tokens = captions()
        for bad in (9, -1):
            tokens[0, 0] = bad
            found = caption_scores(logits, tokens, PAD)
            assert found.nll.isnan()
            assert found.perplexity.isnan()
            assert found.entropy.isfinite()

    def test_ruled_out_tokens_have_no_entropy(self):
        logits = torch.tensor([[0.0, 0.0, -math.inf]])
        found = caption_scores(logits, torch.tensor([1]), PAD)
        assert numbers(found)[1:3] == pytest.approx([2, math.log(2)])
        found = caption_scores(logits, torch.tensor([2]), PAD)
        assert float(found.perplexity) == math.inf
        assert float(found.nll) == math.inf

    def test_perplexity_overflows_to_infinity(self):
        logits = torch.tensor([[800.0, 0.0]])
        found = caption_scores(logits, torch.tensor([1]), PAD)
        assert float(found.perplexity) == math.inf
        assert float(found.nll) == pytest.approx(800)
        found = caption_scores(logits - 100 * torch.tensor([1.0, 0.0]), torch.tensor([1]), PAD)
        assert float(found.perplexity) == pytest.approx(math.exp(700))

    @pytest.mark.parametrize("odd", [math.nan, math.inf])
    def test_odd_logits_show_and_are_no_hit(self, odd):
        logits = torch.tensor([[0.0, odd, 0.0], [0.0, 5.0, 0.0]])
        found = caption_scores(logits, torch.tensor([1, 1]), PAD)
        np.testing.assert_equal(numbers(found), [0.5, NONE, NONE, NONE, NONE, 2])

    def test_a_vocabulary_of_one_leaves_nothing_to_guess(self):
        found = caption_scores(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), None)
        np.testing.assert_equal(numbers(found), [1, 1, 0, NONE, 0, 2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_autocast_changes_nothing(self, dtype):
        logits, tokens = captions(dtype=dtype)
        x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        plain = (caption_scores(logits, tokens, PAD), image_errors(x, y))
        with torch.autocast("cpu", torch.bfloat16):
            cast = (caption_scores(logits, tokens, PAD), image_errors(x, y))
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)

    def test_wrong_arguments_are_named(self):
        logits, tokens = captions()
        with pytest.raises(TypeError, match=r"^`logits` must be of a floating type, got torch\.i"):
            caption_scores(logits.long(), tokens, PAD)
        for bad in (tokens.float(), tokens.bool()):
            with pytest.raises(TypeError, match=rf"^`tokens` must be integers, got {bad.dtype}\.$"):
                caption_scores(logits, bad, PAD)
        for pad in (0.0, True, "<pad>"):
            with pytest.raises(TypeError, match=r"^`pad` must be an integer or None, got"):
                caption_scores(logits, tokens, pad)
        # as `cross_entropy` wants it
        with pytest.raises(
            ValueError,
            match=r"as last dimension, got \(4, 9, 6\) for tokens of shape \(4, 6\)\.$",
        ):
            caption_scores(logits.mT, tokens, PAD)
        with pytest.raises(ValueError, match=r"^`logits` must have the tokens' shape"):
            caption_scores(torch.tensor(1.0), torch.tensor(1), PAD)
        with pytest.raises(ValueError, match=r"must have a vocabulary, got shape \(4, 6, 0\)\.$"):
            caption_scores(logits[..., :0], tokens, PAD)


def test_nothing_is_read_written_or_kept_alive():
    logits, tokens = captions(dtype=torch.float32)
    x, y = torch.randn(2, 3, 4).requires_grad_(), torch.randn(2, 3, 4)
    before = [z.detach().clone() for z in (logits, tokens, x, y)]
    for found in (caption_scores(logits.requires_grad_(), tokens, PAD), image_errors(x, y)):
        assert not any(field.requires_grad for field in found)
    for z, old in zip((logits, tokens, x, y), before, strict=True):
        assert torch.equal(z, old)
    # a tensor without data cannot be read
    meta = [z.detach().to("meta") for z in (logits, tokens, x, y)]
    caption_scores(meta[0], meta[1], PAD)
    image_errors(meta[2], meta[3], clamp=True)
    loss_shares({"image": torch.ones((), device="meta")}, {"image": 2.0})


class Described(LightningModule):
    """The lines of the docstrings, in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 5))

    def on_validation_epoch_start(self) -> None:
        self.captions = None
        self.images = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        _, tokens, image = batch
        logits = self.weight[tokens]
        caption = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        losses = loss_shares({"image": image.mean(), "caption": caption}, {"caption": 0.5})
        self.log_dict({f"loss_share/{k}": v for k, v in losses.shares.items()})
        return losses.total

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits, tokens, image = batch
        self.captions = caption_scores_update(self.captions, logits, tokens, pad=PAD)
        self.images = image_errors_update(self.images, image, image.square())

    def on_validation_epoch_end(self) -> None:
        captions = CaptionScores(*(x.sum(0) for x in self.all_gather(self.captions)))
        self.log_dict(caption_scores_value(captions)._asdict())
        self.log_dict(image_errors_value(self.images)._asdict())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_fits_into_a_module(quiet, recwarn):
    logits, tokens = captions(batch=7, vocabulary=4, dtype=torch.float32)
    images = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(logits, tokens, images), batch_size=3)
    trainer = Trainer(**quiet | {"max_epochs": 1})
    trainer.fit(Described(), loader, loader)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    want = caption_reference(logits, tokens, PAD)
    assert [found[name] for name in multimodal.CaptionScoresValue._fields] == pytest.approx(
        want, rel=1e-5
    )
    reference = image_reference(images, images.square(), (-1, 1), (0, 1))
    assert [found["mse"], found["l1"]] == pytest.approx(reference[:2], rel=1e-5)
    assert found["loss_share/image"] + found["loss_share/caption"] == pytest.approx(1)
    assert not [w for w in recwarn if "self.log" in str(w.message)]
