"""Are moments true for whatever a tensor may hold, and do they merge as promised?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_diag.functional.moments import (
    Moments,
    merge,
    merge_by,
    moments,
    neutral,
    quick_moments,
)

BITS = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}
DTYPES = list(BITS)
ODD = [0.0, -0.0, 1e-30, -1e30, 1e30, 1e-42, 5e-324, math.inf, -math.inf, math.nan]


def reference(values: Tensor) -> dict[str, float]:
    """The seven fields in double precision NumPy, sums correctly rounded."""
    x = values.detach().double().numpy().ravel()
    kept = x[np.isfinite(x)]
    return {
        "count": x.size,
        "sum": math.fsum(kept),
        "sum_sq": math.fsum(kept * kept),
        "min": kept.min(initial=np.inf),
        "max": kept.max(initial=-np.inf),
        "zeros": int((x == 0).sum()),
        "nonfinite": int((~np.isfinite(x)).sum()),
        "l1": math.fsum(np.abs(kept)),
    }


def assert_true(found: Moments, *tensors: Tensor, rtol: float = 1e-12) -> None:
    """Each entry of `found` is what NumPy says of the tensor at its place."""
    assert found.sum.shape == (len(tensors),)
    for place, tensor in enumerate(tensors):
        want = reference(tensor)
        # a sum may cancel: its error is measured against the sum of magnitudes
        assert abs(found.sum[place].item() - want["sum"]) <= rtol * want["l1"]
        assert found.sum_sq[place].item() == pytest.approx(want["sum_sq"], rel=rtol, abs=0)
        for name in ("count", "min", "max", "zeros", "nonfinite"):
            assert getattr(found, name)[place].item() == want[name], name


def assert_same(first: Moments, second: Moments) -> None:
    for name, one, other in zip(Moments._fields, first, second, strict=True):
        rtol = 1e-12 if name.startswith("sum") else 0
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True, msg=name)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or draw(st.sampled_from(DTYPES))
    width = BITS[dtype]
    any_value = st.floats(width=width) if width < 64 else st.floats(-1e150, 1e150)
    values = draw(st.lists(st.one_of(any_value, st.sampled_from(ODD)), max_size=12))
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@st.composite
def tame(draw: st.DrawFn) -> Tensor:
    """Values whose sums are exact in double precision, so that order cannot matter."""
    values = st.one_of(st.integers(-1000, 1000), st.sampled_from([math.inf, -math.inf, math.nan]))
    return torch.tensor(draw(st.lists(values, max_size=12)), dtype=torch.float64)


class TestMerging:
    @given(tame(), tame(), tame())
    def test_is_associative_commutative_and_has_a_neutral_element(self, a, b, c):
        x, y, z = moments([a]), moments([b]), moments([c])
        assert_same(merge(merge(x, y), z), merge(x, merge(y, z)))
        assert_same(merge(x, y), merge(y, x))
        assert_same(merge(x, neutral(1)), x)
        assert_same(merge(neutral(1), x), x)

    @given(tensors(torch.float64), tensors(torch.float64))
    def test_gives_the_moments_of_the_concatenation(self, a, b):
        assert_true(merge(moments([a]), moments([b])), torch.cat([a, b]))

    @given(st.lists(st.tuples(tame(), st.integers(0, 3)), min_size=1, max_size=8))
    def test_by_index_gives_the_moments_of_each_group(self, pairs):
        found = merge_by(
            moments([x for x, _ in pairs]), torch.tensor([group for _, group in pairs]), 4
        )
        groups = [
            torch.cat([*(x for x, own in pairs if own == group), torch.empty(0)])
            for group in range(4)
        ]
        assert_true(found, *groups)

    def test_keeps_zeros_unknown_where_one_side_did_not_count_them(self):
        known, unknown = moments([torch.ones(2)]), quick_moments([torch.ones(2)])[0]
        assert merge(known, unknown).zeros.isnan().all()
        found = merge_by(
            Moments(*map(torch.cat, zip(known, unknown, strict=True))), torch.tensor([0, 1]), 2
        )
        assert found.zeros[0] == 0
        assert found.zeros[1].isnan()


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @settings(max_examples=150)
    @given(data=st.data())
    def test_agree_with_double_precision_numpy(self, dtype, data):
        x = data.draw(tensors(dtype))
        found = moments([x])
        assert_true(found, x)
        assert all(field.dtype == torch.float64 for field in found)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_003])
    def test_do_not_depend_on_where_blocks_end(self, dtype, size):
        x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        x[:: size // 7 + 1] = math.nan
        x[-1] = -8.0
        assert_true(moments([x]), x)

    def test_of_several_tensors_stand_in_their_order(self):
        inputs = [torch.ones(3), torch.empty(0), torch.tensor(-2.0), torch.zeros(2, 2)]
        assert_true(moments(inputs), *inputs)
        assert_true(quick_moments(inputs)[0]._replace(zeros=moments(inputs).zeros), *inputs)

    def test_of_nothing_are_neutral(self):
        assert_same(moments([torch.empty(0, 3)]), neutral(1))
        assert_same(moments([]), neutral(0))
        found, doubtful = quick_moments([])
        assert_same(found, neutral(0))
        assert doubtful.shape == (0,)

    def test_double_precision_keeps_what_single_cannot_square(self):
        for size in (1e-30, 1e30, 1e-42):
            x = torch.full((70_000,), size)
            assert moments([x]).l2.item() == pytest.approx(
                x[0].double().item() * math.sqrt(70_000), rel=1e-12
            )

    def test_by_hand(self):
        found = moments([torch.tensor([3.0, 4.0, math.nan, 0.0, -math.inf])])
        assert [field.item() for field in found] == [5, 7, 25, 0, 4, 1, 2]
        assert found.finite.item() == 3
        assert found.mean.item() == pytest.approx(7 / 3)
        assert found.std.item() == pytest.approx(math.sqrt(25 / 3 - 49 / 9))
        assert found.rms.item() == pytest.approx(math.sqrt(25 / 3))
        assert found.l2.item() == 5
        assert found.abs_max.item() == 4

    def test_that_derive_say_what_they_are_where_nothing_is_finite(self):
        for x in (torch.empty(0), torch.tensor([math.nan, math.inf])):
            found = moments([x])
            assert found.mean.isnan()
            assert found.std.isnan()
            assert found.rms.isnan()
            assert found.l2 == 0
            assert found.abs_max == -math.inf

    @given(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
        st.floats(2**-20, 2**20),
    )
    def test_of_a_scaled_tensor_are_the_scaled_moments(self, values, scale):
        x = torch.tensor(values, dtype=torch.float64)
        divided = moments([x * scale]).divided(scale)
        plain = moments([x])
        torch.testing.assert_close(divided.l2, plain.l2, rtol=1e-9, atol=1e-30)
        torch.testing.assert_close(divided.max, plain.max, rtol=1e-9, atol=1e-30)
        torch.testing.assert_close(divided.min, plain.min, rtol=1e-9, atol=1e-30)
        torch.testing.assert_close(divided.sum, plain.sum, rtol=1e-9, atol=1e-3)
        assert divided.count == plain.count
        assert divided.zeros == plain.zeros

    @given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
    def test_that_derive_agree_with_numpy(self, values):
        x = np.array(values)
        found = moments([torch.from_numpy(x)])
        assert found.mean.item() == pytest.approx(x.mean(), abs=1e-9)
        assert found.std.item() == pytest.approx(x.std(), abs=1e-4)
        assert found.abs_max.item() == np.abs(x).max()
        assert found.rms.item() == pytest.approx(math.sqrt((x**2).mean()))


def shapes() -> dict[str, Tensor]:
    base = torch.randn(4, 6, 8, 10, generator=torch.Generator().manual_seed(0))
    base[0, 0, 0, 0], base[1, 2, 3, 4] = 0.0, -50.0
    return {
        "scalar": torch.tensor(-2.5),
        "one": torch.tensor([3.0]),
        "transposed": base[0, 0].T,
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "permuted": base.permute(3, 1, 0, 2),
        "slice": base[:, 1:5:2, ::3],
        "offset": base[1:],
        "offset_permuted": base[2:].permute(1, 0, 3, 2),
        "column": base[0, 0, :, 3],
        "diagonal": base[0, 0].diagonal(),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "expanded_scalar": torch.tensor(2.0).expand(3, 4),
        "overlapping": torch.arange(8.0).unfold(0, 4, 1),
        "negative_view": torch.complex(base[0], base[1]).conj().imag,
        "empty": torch.empty(3, 0, 2),
        "requires_grad": base.clone().requires_grad_(),
    }


class TestLayouts:
    @pytest.mark.parametrize("name", shapes())
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_stride_gives_the_same(self, name, dtype):
        x = shapes()[name].to(dtype)
        assert_true(moments([x]), x)
        found, doubtful = quick_moments([x])
        assert not doubtful.any()
        assert_true(found._replace(zeros=moments([x]).zeros), x)
        assert not any(field.requires_grad for field in [*found, *moments([x])])

    def test_sparse_gradients_count_as_if_they_were_dense(self):
        embedding = torch.nn.Embedding(50, 4, sparse=True)
        (embedding(torch.tensor([3, 3, 7])) * torch.tensor([1.0, -2, 3, 0])).sum().backward()
        gradient = embedding.weight.grad
        assert gradient.is_sparse
        assert not gradient.is_coalesced()
        for x in (gradient, gradient.coalesce()):
            inputs = [x, torch.ones(2)]
            assert_true(moments(inputs), x.to_dense(), torch.ones(2))
            found, doubtful = quick_moments(inputs)
            assert not doubtful.any()
            assert_true(found._replace(zeros=moments(inputs).zeros), x.to_dense(), torch.ones(2))

    @pytest.mark.filterwarnings("ignore:Sparse")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sparse_layouts(self, dtype):
        dense = torch.tensor([[0, 2.0, 0], [0, 0, -1.0], [0, 0, 0]], dtype=dtype)
        full = torch.ones(2, 2, dtype=dtype).to_sparse()
        odd = torch.tensor([[0.0, math.nan], [math.inf, 3.0]], dtype=dtype).to_sparse()
        inputs = [dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), full, odd]
        assert_true(moments(inputs), *(x.to_dense() for x in inputs))
        found, doubtful = quick_moments(inputs[:4])
        assert not doubtful.any()
        counted = found._replace(zeros=moments(inputs[:4]).zeros)
        assert_true(counted, *(x.to_dense() for x in inputs[:4]))
        found, doubtful = quick_moments(inputs)
        assert doubtful[4] or found.nonfinite[4] == 2

    @pytest.mark.filterwarnings("ignore:Sparse")
    def test_a_sparse_tensor_that_stores_nothing_is_all_zeros(self):
        x = torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.long), torch.empty(0), (3, 4))
        assert_true(moments([x]), torch.zeros(3, 4))

    @pytest.mark.parametrize("function", [moments, quick_moments])
    def test_complex_is_refused(self, function):
        with pytest.raises(TypeError, match=r"`tensors` must be real, got torch\.complex64\."):
            function([torch.ones(2), torch.ones(2, dtype=torch.complex64)])

    @pytest.mark.parametrize("function", [moments, quick_moments])
    def test_inputs_are_not_written(self, function):
        inputs = [*shapes().values(), torch.eye(3).to_sparse(), torch.tensor([math.nan])]
        before = [x.detach().to_dense().clone() for x in inputs]
        versions = [x._version for x in inputs]
        function(inputs)
        assert [x._version for x in inputs] == versions
        for x, old in zip(inputs, before, strict=True):
            torch.testing.assert_close(x.detach().to_dense(), old, rtol=0, atol=0, equal_nan=True)


class TestQuick:
    @given(st.lists(tensors(), max_size=5))
    def test_agree_where_they_are_not_doubtful(self, inputs):
        found, doubtful = quick_moments(inputs)
        exact = moments(inputs)
        assert found.zeros.isnan().logical_or(found.zeros == exact.zeros).all()
        calm = ~doubtful
        for name in ("count", "sum_sq", "min", "max", "nonfinite"):
            one, other = getattr(found, name)[calm], getattr(exact, name)[calm]
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=name)
        lost = (found.sum - exact.sum).abs()[calm]
        assert (lost <= 1e-12 * exact.count[calm] * exact.abs_max[calm].clamp(min=0)).all()

    @pytest.mark.parametrize("size", [5, 16_384, 16_385, 100_000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, -1])
    def test_one_non_finite_element_is_doubtful(self, size, dtype, bad, place):
        x = torch.ones(size, dtype=dtype)
        x[place] = bad
        both = torch.ones(size, dtype=dtype)
        both[0], both[-1] = math.inf, -math.inf
        assert quick_moments([x, torch.ones(3), both])[1].tolist() == [True, False, True]

    @pytest.mark.parametrize("size", [1e-20, 1e-23, 1e-30, 1e-42, 1e20, 1e25, 3e38])
    def test_squares_that_leave_single_precision_are_doubtful_or_right(self, size):
        x = torch.full((20_000,), size)
        alone = torch.zeros(20_000)
        alone[7] = size
        found, doubtful = quick_moments([x, alone])
        exact = moments([x, alone])
        for place in range(2):
            right = found.l2[place].item() == pytest.approx(exact.l2[place].item(), rel=1e-4)
            assert right or doubtful[place], place
        assert doubtful[0]

    def test_all_zero_is_not_doubtful(self):
        assert not quick_moments([torch.zeros(10), torch.zeros(20_000)])[1].any()

    @pytest.mark.parametrize("mean", [0.0, 1.0])
    def test_large_tensors_lose_little_in_single_precision(self, mean):
        x = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) + mean
        found, doubtful = quick_moments([x])
        exact = moments([x])
        assert not doubtful
        # single precision sums over 3e5 elements
        torch.testing.assert_close(found.l2, exact.l2, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.mean, exact.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.std, exact.std, rtol=1e-5, atol=0)
        assert found.min == exact.min
        assert found.max == exact.max

    def test_mixed_sizes_and_types_keep_their_order(self):
        generator = torch.Generator().manual_seed(2)
        inputs = [
            torch.randn(20_000, generator=generator),
            torch.randn(5, generator=generator).half(),
            torch.empty(0),
            torch.randn(30_000, generator=generator).double(),
            torch.randn(4, generator=generator),
            torch.randn(40_000, generator=generator),
        ]
        found, doubtful = quick_moments(inputs)
        assert not doubtful.any()
        assert_true(found._replace(zeros=moments(inputs).zeros), *inputs, rtol=1e-5)


def test_neutral_takes_type_and_device_from_its_like():
    found = neutral(2, like=torch.ones(1, dtype=torch.float32))
    assert all(field.dtype == torch.float32 and field.shape == (2,) for field in found)
    assert neutral(0).sum.shape == (0,)
