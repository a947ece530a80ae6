"""Is the clip value the one that a careful reader of the norms would have chosen?"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diag import GradientHealth, read_run
from lightning_diag.tuning.clip_value import suggest_clip_value, suggest_clip_values
from tests.callbacks.witness import Witness, fit, rows
from tests.tuning.clip_value_runs import every, healthy, row, written


class TestHealthy:
    @pytest.mark.parametrize("percentile", [10.0, 50.0, 90.0, 95.0, 99.0])
    def test_is_the_percentile_rounded_up(self, tmp_path, percentile):
        norms = healthy(400)
        found = suggest_clip_value(written(tmp_path / "run", every(norms)), percentile)
        want = np.percentile(norms[40:], percentile)
        assert want <= found.value < want * 1.1
        assert found.value == pytest.approx(float(f"{found.value:.2g}"), rel=1e-12)
        assert found.norms == 360
        assert found.excluded == {"warm_up": 40}
        assert found.would_clip == np.mean(np.array(norms[40:]) > found.value)
        assert found.overrides == {"trainer.gradient_clip_val": found.value}
        assert found.diverged_at is found.current is found.current_clips is None

    def test_a_hand_worked_one(self, tmp_path):
        norms = [9.0] * 10 + [float(k) for k in range(1, 101)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms)), 95, warmup_share=1 / 11)
        # 5, 10, ..: between the 95th and the 96th of 1..100 at 95.05, upward to two digits
        assert (found.value, found.norms, found.would_clip) == (96.0, 100, 0.04)
        assert "95% of 100 norms before clipping lie below 95" in found.reason

    @pytest.mark.parametrize(
        ("constant", "value"), [(1.0, 1.0), (1.2, 1.2), (0.0956, 0.096), (9.91, 10.0), (1234, 1300)]
    )
    def test_rounds_upward_and_leaves_two_digits_alone(self, tmp_path, constant, value):
        grad = every([constant] * 40, clip_value=5e4, clip_algorithm="norm")
        assert suggest_clip_value(written(tmp_path / "run", grad)).value == value

    def test_lone_spikes_are_what_it_is_there_for(self, tmp_path):
        norms = healthy(400)
        plain = suggest_clip_value(written(tmp_path / "plain", every(norms)))
        for place in (100, 200, 300, 399):
            norms[place] = 500.0
        spiked = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert spiked.diverged_at is None
        assert spiked.norms == 360
        assert plain.value <= spiked.value < 1.3 * plain.value

    def test_a_burst_that_passes_does_not_count(self, tmp_path):
        norms = healthy(400)
        norms[200:260] = [80.0] * 60
        found = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert found.excluded["exploding"] == 60
        assert found.diverged_at is None
        assert found.value < 3

    def test_a_burst_in_which_the_model_learns_does(self, tmp_path):
        norms = healthy(400)
        norms[200:260] = healthy(60, 80.0)
        losses = [(k, 2.0 if k < 200 else 0.5) for k in range(400)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms), losses=losses))
        assert found.excluded == {"warm_up": 40}
        assert found.value == pytest.approx(np.percentile(norms[40:], 95), rel=0.1)

    def test_a_start_that_is_far_above_does_not_count(self, tmp_path):
        norms = [100.0] * 20 + healthy(380)
        found = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert found.value < 3
        assert found.diverged_at is None

    def test_a_slow_fall_is_said(self, tmp_path):
        norms = [10 * 0.99**k for k in range(300)]
        assert "fell from" in suggest_clip_value(written(tmp_path / "run", every(norms))).reason

    def test_the_clip_of_the_run_is_weighed(self, tmp_path):
        grad = every(healthy(400), clip_value=0.5, clip_algorithm="norm")
        found = suggest_clip_value(written(tmp_path / "run", grad))
        assert found.current == 0.5
        assert found.current_clips == np.mean(np.array(healthy(400))[40:] > 0.5)
        assert found.value > 0.5  # healthy: a looser one may be said
        assert "plain SGD needs a learning rate that is lower" in found.reason

    def test_the_clip_of_the_configuration_will_do(self, tmp_path):
        config = "trainer: {gradient_clip_val: 0.7, gradient_clip_algorithm: norm}"
        found = suggest_clip_value(written(tmp_path / "run", every(healthy(100)), config))
        assert found.current == 0.7

    @settings(max_examples=20)
    @given(st.floats(1e-6, 1e6), st.integers(0, 5))
    def test_scales_with_the_norms(self, scale, seed):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            norms = healthy(60, seed=seed)
            one = written(Path(folder, "one"), every(norms))
            other = written(Path(folder, "other"), every([scale * norm for norm in norms]))
            a, b = suggest_clip_value(one).value, suggest_clip_value(other).value
            assert b == pytest.approx(scale * a, rel=0.11)


class TestExplosions:
    def grown(self, usual: int = 300, rate: float = 1.3, length: int = 60) -> list[float]:
        return [*healthy(usual), *(10 * rate**k for k in range(length))]

    def test_only_the_stretch_before_counts_and_the_rate_is_named(self, tmp_path):
        folder = written(tmp_path / "run", every(self.grown(), clip_value=50.0))
        found = suggest_clip_value(folder)
        assert 300 <= found.diverged_at <= 306
        assert found.value < 3
        assert found.excluded["exploding"] >= 54
        assert "Lower the learning rate or warm it up" in found.reason

    def test_never_a_looser_clip(self, tmp_path):
        grad = every(self.grown(), clip_value=0.5, clip_algorithm="norm")
        assert suggest_clip_value(written(tmp_path / "run", grad)).value == 0.5

    def test_a_slow_explosion(self, tmp_path):
        norms = [1.04**k for k in range(300)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert found.diverged_at is not None
        assert found.value < 100

    @pytest.mark.parametrize("more", [{}, {"skipped": 1}], ids=["nan", "skipped"])
    def test_an_end_without_finite_gradients(self, tmp_path, more):
        lost = [row(200 + k, None, **more) for k in range(20)]
        found = suggest_clip_value(written(tmp_path / "run", [*every(healthy(200)), *lost]))
        assert found.diverged_at == 200
        assert found.value < 3
        assert found.excluded["skipped" if more else "nonfinite"] == 20
        assert "no longer finite" in found.reason

    def test_an_explosion_from_the_start_leaves_nothing(self, tmp_path):
        norms = [*healthy(8), *(10 * 1.3**k for k in range(80))]
        found = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert found.value is None
        assert found.diverged_at is not None
        assert found.overrides == {}

    def test_leaving_a_plateau_is_none(self, tmp_path):
        norms = [*healthy(200, 0.01), *healthy(200, 1.0)]
        losses = [(k, 1.0 if k < 200 else 0.3) for k in range(400)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms), losses=losses))
        assert found.diverged_at is None
        assert found.excluded == {"warm_up": 40}
        assert found.value > 1
        worse = [(k, 1.0 if k < 200 else 3.0) for k in range(400)]
        again = suggest_clip_value(written(tmp_path / "worse", every(norms), losses=worse))
        assert again.diverged_at in range(195, 205)
        assert again.value < 0.1

    def test_a_loss_that_falls_first_and_explodes_then_is_none_the_less(self, tmp_path):
        norms = [*healthy(200, 0.01), *healthy(200, 1.0)]
        losses = [(k, 1.0 if k < 200 else 0.3 if k < 350 else 9.0) for k in range(400)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms), losses=losses))
        assert found.diverged_at in range(195, 205)

    def test_a_real_run_that_diverges(self, loader, tmp_path):
        health = GradientHealth(every_n_steps=1, on_error="raise")
        fit(Witness(lr=2.0), health, loader, tmp_path / "bad", max_epochs=20)
        found = suggest_clip_value(tmp_path / "bad", min_norms=1)
        assert found.diverged_at is not None
        largest = max(one["global_norm"] or 0 for one in rows(tmp_path / "bad", component=None))
        assert found.value is None or found.value < largest / 100


class TestWhatCounts:
    def test_each_that_does_not_is_counted_with_its_reason(self, tmp_path):
        grad = every(healthy(200))
        grad[50] |= {"skipped": 1, "global_norm": 1e9, "nonfinite": 2}
        grad[60] |= {"nonfinite": 1, "global_norm": 1e9}
        grad[70] |= {"count": 0, "global_norm": None}
        grad[80] |= {"global_norm": 0.0}
        grad[90] |= {"global_norm": None, "l2": None}  # an overflow
        found = suggest_clip_value(written(tmp_path / "run", grad))
        assert found.excluded == {"skipped": 1, "nonfinite": 2, "no_gradient": 2, "warm_up": 20}
        assert found.norms == 175
        assert "1 of steps that the gradient scaler skipped" in found.reason

    def test_too_few_are_said_with_what_would_do(self, tmp_path):
        found = suggest_clip_value(written(tmp_path / "run", every(healthy(12), interval=50)))
        assert (found.value, found.norms) == (None, 10)
        assert "10 norms count and 20 are needed" in found.reason
        interval = int(found.reason.partition("GradientHealth, ")[2].split()[0])
        again = healthy(600 // interval)
        enough = suggest_clip_value(written(tmp_path / "again", every(again, interval)))
        assert enough.value is not None

    @pytest.mark.parametrize(("percentile", "needed"), [(95, 20), (99, 100), (10, 20), (1, 100)])
    def test_a_far_percentile_needs_more(self, tmp_path, percentile, needed):
        for count, there in ((needed, True), (needed - 1, False)):
            folder = written(tmp_path / str(count), every(healthy(count)))
            found = suggest_clip_value(folder, percentile, warmup_share=0.0)
            assert (found.value is not None) == there

    def test_no_rows_at_all(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        found = suggest_clip_value(tmp_path)
        assert found.value is None
        assert found.reason == "No gradient norms are recorded: train with GradientHealth."

    def test_norms_that_were_clipped_by_hand_say_nothing(self, tmp_path):
        norms = [min(norm, 1.0) for norm in healthy(200)]
        found = suggest_clip_value(written(tmp_path / "run", every(norms)))
        assert found.value is None
        assert "looks like a clip by hand" in found.reason

    def test_several_optimizers_each_have_their_own(self, tmp_path):
        grad = [
            {**one, "optimizer": place}
            for pair in zip(every(healthy(100)), every(healthy(100, 50.0)), strict=True)
            for place, one in enumerate(pair)
        ]
        folder = written(tmp_path / "run", grad)
        small, large = suggest_clip_values(folder)
        assert (small.optimizer, large.optimizer) == (0, 1)
        assert large.value == pytest.approx(50 * small.value, rel=0.11)
        assert suggest_clip_value(folder, optimizer=1) == large
        assert large.overrides == {}
        with pytest.raises(ValueError, match="`optimizer` must be one of 0, 1, got None"):
            suggest_clip_value(folder)

    def test_clipping_by_value_looks_at_the_largest_element(self, tmp_path):
        grad = every(healthy(200, 40.0), clip_value=1.0, clip_algorithm="value")
        for place, one in enumerate(grad):
            one |= {"min": -2.0 if place % 2 else -0.5, "max": 1.0}
        found = suggest_clip_value(written(tmp_path / "run", grad))
        assert (found.algorithm, found.value, found.current) == ("value", 2.0, 1.0)
        assert found.overrides["trainer.gradient_clip_algorithm"] == "value"
        assert suggest_clip_value(tmp_path / "run", algorithm="norm").value > 40

    def test_a_real_run_in_which_the_clip_is_at_work(self, loader, tmp_path):
        health = GradientHealth(every_n_steps=1, on_error="raise")
        witness = Witness(lr=0.001)
        fit(witness, health, loader, tmp_path, max_epochs=5, gradient_clip_val=0.1)
        found = suggest_clip_value(read_run(tmp_path))
        norms = [
            math.sqrt(
                sum(float(g.square().sum()) for g in one["gradients"].values() if g is not None)
            )
            for one in witness.seen
        ]
        assert len(norms) == 40
        want = np.percentile(norms[4:], 95)
        assert want <= found.value <= 1.1 * want
        assert (found.current, found.current_clips) == (0.1, np.mean(np.array(norms[4:]) > 0.1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"percentile": 0}, "`percentile` must be above 0 and below 100, got 0."),
        ({"percentile": 100}, "`percentile` must be above 0 and below 100, got 100."),
        ({"percentile": math.nan}, "`percentile` must be above 0 and below 100, got nan."),
        ({"algorithm": "agc"}, "`algorithm` must be one of norm, value, got 'agc'."),
        ({"warmup_share": 1.0}, "`warmup_share` must be at least 0 and below 1, got 1."),
        ({"min_norms": 0}, "`min_norms` must be at least 1, got 0."),
        ({"optimizer": 3}, "`optimizer` must be None in a run with one, got 3."),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        suggest_clip_value(written(tmp_path / "run", every(healthy(40))), **arguments)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a run folder"):
        suggest_clip_value(tmp_path / "none")


def test_a_long_run_is_read_in_seconds(tmp_path):
    import time

    folder = written(tmp_path / "run", every(healthy(20_000)))
    began = time.perf_counter()
    assert suggest_clip_value(folder).value
    assert time.perf_counter() - began < 10


def test_torch_is_not_asked_for_random_numbers(tmp_path):
    before = torch.get_rng_state()
    suggest_clip_value(written(tmp_path / "run", every(healthy(40))))
    assert torch.equal(torch.get_rng_state(), before)
