"""Do the rules on the machine judge rows whose answer is known?"""

import numpy as np
import pytest

from tests.rules.insides import check_yaml, every, judge, severity

STEPS = list(range(9, 300, 10))
COUNT = len(STEPS)


def test_yaml_repeats_the_python_defaults():
    check_yaml("machine", ("input_bound", "memory_growth", "gpu_underused"))


def speed(wait, step=10.0, steps=STEPS, **more):
    """Rows of ten batches: milliseconds of waiting and of computing for each."""
    wait = wait if isinstance(wait, list) else [wait] * len(steps)
    share = [one / (one + step) for one in wait]
    seconds = [10 * (one + step) / 1000 for one in wait]
    columns = {"component": None, "batches": 10, "seconds": seconds, "data_wait": share}
    return every(steps, step_seconds=step / 1000, **columns, **more)


class TestInputBound:
    rule = "input_bound"

    @pytest.mark.parametrize(
        ("wait", "step", "expected"),
        [(1.0, 10.0, None), (30.0, 10.0, "warning"), (2.0, 1.0, "info"), (9.0, 10.0, None)],
    )
    def test_by_share_and_milliseconds(self, wait, step, expected):
        assert severity(self.rule, hardware=speed(wait, step)) == expected

    def test_the_start_of_the_workers(self):
        assert judge(self.rule, hardware=speed([500.0] + [1.0] * (COUNT - 1))) is None

    def test_in_mid_run(self):
        found = judge(self.rule, hardware=speed([1.0] * 10 + [50.0] * (COUNT - 10)))
        assert (found.severity, found.first_step) == ("warning", 109)
        assert "waits for data 83 % of its time since step 109: 50.0 ms" in found.message

    def test_epochs_of_one_batch(self):
        rows = [{**row, "epoch": row["step"]} for row in speed(50.0)]
        assert severity(self.rule, hardware=rows) == "info"

    def test_a_while_that_is_over(self):
        rows = speed([1.0] * 5 + [50.0] * 5 + [1.0] * (COUNT - 10))
        assert judge(self.rule, hardware=rows) is None


def memory(values, name="process_memory", **more):
    """Rows of four an epoch."""
    rows = every(STEPS[: len(values)], component=None, **{name: list(values), **more})
    return [{**row, "epoch": place // 4} for place, row in enumerate(rows)]


class TestMemoryGrowth:
    rule = "memory_growth"

    def test_a_leak(self):
        noise = np.random.default_rng(0).normal(0, 1, COUNT)
        found = judge(self.rule, hardware=memory(400 + 10 * np.arange(COUNT) + noise))
        assert found.severity == "warning"
        assert found.first_step < 30
        assert "KiB a step, and does not level off" in found.message

    def test_on_the_gpu(self):
        rows = memory(2000 + 50.0 * np.arange(COUNT), "gpu_memory_allocated")
        assert "memory on the GPU rises" in judge(self.rule, hardware=rows).message

    @pytest.mark.parametrize(
        "values",
        [
            np.full(COUNT, 400.0),
            400 + 300 * (1 - np.exp(-np.arange(COUNT) / 4)),
            np.where(np.arange(COUNT) < 15, 400.0, 700.0),
            400 + 300 * (np.arange(COUNT) % 2),
            400 + 0.5 * np.arange(COUNT),
            700 - 10.0 * np.arange(COUNT),
        ],
        ids=["flat", "levels off", "a leap", "up and down", "a little", "falls"],
    )
    def test_no_leak(self, values):
        assert judge(self.rule, hardware=memory(values)) is None

    def test_a_cache_that_fills_in_the_first_epoch(self):
        rows = memory(400 + 3.0 * np.arange(COUNT))
        assert judge(self.rule, hardware=rows) is not None
        rows = [{**row, "epoch": 0} for row in rows]
        assert judge(self.rule, hardware=rows) is None

    def test_soon_after_it_began(self):
        values = 400 + 20.0 * np.clip(np.arange(COUNT) - 12, 0, None)
        found = judge(self.rule, hardware=memory(values[:18]))
        assert (found.severity, found.observed) == ("warning", 100.0)

    def test_in_mid_run(self):
        values = 400 + 15.0 * np.clip(np.arange(COUNT) - 12, 0, None)
        assert judge(self.rule, hardware=memory(values)).first_step in range(110, 140)

    def test_nearly_full(self):
        rows = memory(9000 + 100.0 * np.arange(COUNT), memory_percent=95.0)
        assert severity(self.rule, hardware=rows) == "critical"


class TestGpuUnderused:
    rule = "gpu_underused"

    @pytest.mark.parametrize(
        ("percent", "step", "expected"),
        [(95.0, 100.0, None), (50.0, 100.0, "info"), (10.0, 100.0, "warning"), (5.0, 2.0, "info")],
    )
    def test_by_use_and_time(self, percent, step, expected):
        rows = speed(1.0, step, gpu_percent=percent)
        assert severity(self.rule, hardware=rows) == expected

    def test_waiting_for_data_explains_it(self):
        rows = speed(500.0, 100.0, gpu_percent=10.0)
        assert judge(self.rule, hardware=rows) is None

    def test_without_a_gpu(self):
        assert judge(self.rule, hardware=speed(1.0, 100.0)) is None
