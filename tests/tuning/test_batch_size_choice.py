"""Which size is recommended, and what is said of it: worked by hand, and what holds for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.tuning.batch_size import BatchSizeProfile, markdown, recommend
from lightning_diag.tuning.batch_size_choice import WITHIN, noise

HEADER = (
    "| Batch Size | Time/Epoch | {} | Samples/Sec | Final Train Loss | Final Test Loss | Status |"
)


def row(size, rate, memory, *, spread=0.0, status="ok", **fields):
    """A profile of 1000 samples an epoch whose three epochs lie `spread` of their median apart."""
    time = 1000 / rate
    seconds = (time * (1 - spread / 2), time, time * (1 + spread / 2))
    given_fields = {
        "epochs_completed": 3,
        "avg_time_per_epoch": time,
        "samples_per_second": rate,
        "peak_memory_gb": memory,
        "memory_kind": "gpu reserved",
        "final_train_loss": 45.2341,
        "final_test_loss": 42.1123,
        "epoch_seconds": seconds,
        "epoch_samples": (1000,) * 3,
        "largest_batch": size,
    }
    return BatchSizeProfile(size, status, **{**given_fields, **fields})


KNEE = [row(16, 100, 2), row(32, 190, 4), row(64, 300, 7), row(128, 310, 12), row(256, 305, 15)]


@pytest.mark.parametrize(
    ("memory", "spare", "size"),
    [
        (100, 0.15, 64),  # 300 is 97 % of the best
        (16, 0.0, 64),
        (8, 0.0, 64),
        (8, 0.1, 64),  # 7 is at most 7.2
        (8, 0.15, 32),  # but more than 6.8
        (2.5, 0.15, 16),
        (2.0, 0.0, 16),
        (2.0, 0.01, None),
        (None, 0.15, 64),
    ],
)
def test_the_knee_among_what_leaves_memory_to_spare(memory, spare, size):
    assert recommend(KNEE, memory, spare).batch_size == size
    assert recommend(KNEE[::-1], memory, spare).batch_size == size


def test_the_memory_is_that_which_the_smallest_of_the_profiles_could_have_had():
    rows = [row(16, 100, 2, device_memory_gb=8.0), row(32, 200, 7, device_memory_gb=80.0)]
    assert recommend(rows).batch_size == 16
    assert recommend(rows, 80.0).batch_size == 32
    assert recommend(rows).reasons[1] == "75% of 8.0 GB stay free; 15% were asked for."
    assert "not known" in recommend(KNEE).reasons[1]


def test_what_was_not_measured_to_the_end_or_not_filled_is_never_chosen():
    wrong = [
        row(32, 900, 1, status="killed"),
        row(33, 900, 1, largest_batch=20),
        row(34, 900, 1, samples_per_second=None),
        BatchSizeProfile(512, "out of memory", oom_error=True),
    ]
    assert recommend([row(16, 100, 2), *wrong], 16).batch_size == 16
    nothing = recommend(wrong, 16)
    assert nothing.batch_size is None
    assert nothing.reasons == ("No batch size was measured to the end.",)
    assert recommend([]).batch_size is None


def test_reasons_say_where_the_knee_lies():
    said = " ".join(recommend(KNEE, 100).reasons)
    assert "It reaches 97% of the throughput of 128" in said
    assert "try more" not in said
    assert "throughput still rises: try more" in " ".join(recommend(KNEE[:3], 100).reasons)
    assert "a smaller one may do as well" in " ".join(recommend(KNEE[2:], 100).reasons)
    assert "only size" in " ".join(recommend(KNEE, 2.5).reasons)
    none = recommend(KNEE, 2.0).reasons[0]
    assert none == (
        "No batch size leaves 15% of 2.0 GB free: the smallest, 16, took 2.0 GB; try smaller ones."
    )


def test_noise_that_hides_the_difference_is_said():
    quiet = [row(16, 100, 2, spread=0.04), row(32, 110, 3, spread=0.04)]
    assert recommend(quiet, 16).batch_size == 32
    loud = [row(16, 100, 2, spread=0.2), row(32, 110, 3, spread=0.02)]
    assert recommend(loud, 16).batch_size is None
    assert (
        recommend(loud, 16)
        .reasons[0]
        .startswith(
            "Noise hides the difference: epochs of one size lay up to 20% apart, the sizes 10%."
        )
    )
    some = [row(16, 50, 2, spread=0.2), row(32, 100, 3), row(64, 110, 4)]
    found = recommend(some, 16)
    assert found.batch_size == 64
    assert "up to 20% apart, so 32 may do as well." in found.reasons[2]


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"spare": 1.0}, r"^`spare` must be at least 0 and below 1, got 1\.0\.$"),
        ({"spare": -0.1}, r"^`spare` must be at least 0 and below 1, got -0\.1\.$"),
        ({"device_memory_gb": 0}, r"^`device_memory_gb` must be positive, got 0\.$"),
    ],
)
def test_numbers_out_of_their_range_are_refused(given_arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(KNEE, **given_arguments)


measured = st.builds(
    lambda size, rate, memory, spread: row(size, rate, memory, spread=spread),
    st.integers(1, 4096),
    st.floats(1, 1e5),
    st.floats(0.01, 100),
    st.floats(0, 0.04),
)
profiles = st.lists(measured, min_size=1, max_size=6, unique_by=lambda one: one.batch_size)


@given(rows=profiles, memory=st.floats(0.01, 200), spare=st.floats(0, 0.99))
def test_the_choice_fits_is_fast_and_nothing_smaller_is_both(rows, memory, spare):
    chosen = recommend(rows, memory, spare)
    fits = [one for one in rows if one.peak_memory_gb <= (1 - spare) * memory]
    assert chosen.reasons
    if not fits:
        assert chosen.batch_size is None
        return
    best = max(one.samples_per_second for one in fits)
    fast = [one.batch_size for one in fits if one.samples_per_second >= (1 - WITHIN) * best]
    assert chosen.batch_size == min(fast)


@given(rows=profiles, factor=st.floats(0.01, 100), memory=st.floats(0.01, 200))
def test_a_faster_machine_changes_no_choice(rows, factor, memory):
    faster = [row(r.batch_size, r.samples_per_second * factor, r.peak_memory_gb) for r in rows]
    steady = [row(r.batch_size, r.samples_per_second, r.peak_memory_gb) for r in rows]
    edges = {r.samples_per_second / q.samples_per_second for r in rows for q in rows}
    if all(abs(edge - (1 - WITHIN)) > 1e-9 for edge in edges):
        assert recommend(faster, memory).batch_size == recommend(steady, memory).batch_size


def test_noise_of_one_epoch_is_none():
    assert noise(BatchSizeProfile(8, "ok", 1, 2.0, epoch_seconds=(2.0,))) == 0
    assert noise(BatchSizeProfile(8, "error")) == 0


def test_the_table_has_the_form_that_people_know():
    rows = [
        row(2048, 166, 4.2, avg_time_per_epoch=12.3, device_memory_gb=20.0),
        row(10240, 360, 14.2, avg_time_per_epoch=28.4, device_memory_gb=20.0),
        BatchSizeProfile(
            20480, "out of memory", oom_error=True, error_message="CUDA out of memory <tried>"
        ),
        BatchSizeProfile(40960, "skipped", error_message="Not tried."),
    ]
    lines = markdown(rows, title="d=1024", picture="profile.png").splitlines()
    assert lines[0] == "# Batch Size Profile: d=1024"
    assert lines[2] == HEADER.format("GPU Memory")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:8]]
    assert cells == [
        ["2,048", "12.3s", "4.2 GB", "166", "45.2341", "42.1123", "OK"],
        ["10,240", "28.4s", "14.2 GB", "360", "45.2341", "42.1123", "OK"],
        ["20,480", "-", "-", "-", "-", "-", "OOM"],
        ["40,960", "-", "-", "-", "-", "-", "SKIPPED"],
    ]
    text = "\n".join(lines)
    assert "## Recommendation\n\n**Optimal batch size: 10,240**\n\n- Throughput: 360" in text
    assert "- Time per epoch: 28.4s\n- GPU memory usage: 14.2 GB\n" in text
    assert "- Final test loss: 42.1123\n" in text
    assert "- 2,048: 40 samples/sec/GB\n- 10,240: 25 samples/sec/GB\n" in text
    assert "- 20,480: CUDA out of memory \\<tried\\>\n- 40,960: Not tried." in text
    assert "learning rate" in text
    assert "(profile.png)" in text


def test_without_a_gpu_it_is_memory_and_without_a_choice_that_is_said():
    rows = [row(8, 3.217, 0.4567, memory_kind="resident", avg_time_per_epoch=0.0123)]
    lines = markdown(rows).splitlines()
    assert lines[0] == "# Batch Size Profile"
    assert lines[2] == HEADER.format("Memory")
    assert [cell.strip() for cell in lines[4].split("|")[2:5]] == ["0.0123s", "0.46 GB", "3.2"]
    none = markdown([BatchSizeProfile(8, "timeout")])
    assert "**No batch size can be recommended.**\n\n- No batch size was measured" in none
    assert "nan" in markdown([row(8, 1, 1, final_train_loss=float("nan"))])
