"""Does HardwareMonitor say what the machine does, without ever making the training wait?"""

import os
import threading
import time
import types
from dataclasses import dataclass
from itertools import pairwise

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lightning_diag import RunLogger
from lightning_diag.callbacks import hardware_monitor, hardware_sampler
from lightning_diag.callbacks.hardware_gpu import GpuProbe, peak_flops
from lightning_diag.callbacks.hardware_monitor import HardwareMonitor
from lightning_diag.callbacks.hardware_sampler import HostProbe, Sampler
from lightning_diag.callbacks.hardware_stopwatch import Stopwatch
from lightning_diag.functional.batches import batch_size
from lightning_diag.lightning import Callback
from tests.callbacks.witness import Witness, fit, lightning, rows, scaler_plugin
from tests.promises.reads import WatchSteps
from tests.promises.trace import differences, train

THREAD = "lightning_diag-hardware"


def monitor(**arguments):
    return HardwareMonitor(**{"every_n_steps": 1, "on_error": "raise", **arguments})


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not threads()


class Slow(Witness):
    """A step of its own length."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


class SlowData(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return (torch.ones(3),)


class TestStopwatch:
    def test_worked_by_hand(self):
        watch = Stopwatch()
        watch.ready(0)
        watch.starts(3)
        watch.ends(4, 16)
        watch.starts(6)
        watch.ends(9, 16)
        window = watch.take()
        assert (window.batches, window.samples) == (2, 32)
        assert (window.wait_seconds, window.step_seconds, window.seconds) == (5, 4, 9)
        assert watch.take().batches == 0

    def test_a_validation_between_batches_is_no_wait(self):
        watch = Stopwatch()
        watch.starts(0)
        watch.ends(1, 1)
        watch.pauses(2)
        watch.resumes(50)
        watch.starts(53)
        assert watch.take().wait_seconds == 1 + 3

    def test_a_gap_with_a_checkpoint_is_no_wait(self):
        watch = Stopwatch()
        watch.starts(0)
        watch.ends(1, 1)
        watch.skips()
        watch.starts(60)
        assert watch.take().wait_seconds == 0

    def test_a_pause_before_the_first_batch(self):
        watch = Stopwatch()
        watch.pauses(1)
        watch.resumes(2)
        watch.ready(3)
        watch.starts(4)
        assert watch.take().wait_seconds == 1

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9))
    def test_waits_and_steps_are_all_of_the_time(self, lengths):
        watch, now = Stopwatch(), 0
        watch.ready(now)
        for wait, step in lengths:
            now += wait
            watch.starts(now)
            now += step
            watch.ends(now, 2)
        window = watch.take()
        assert window.seconds == now
        assert window.wait_seconds == sum(wait for wait, _ in lengths)
        assert window.samples == 2 * len(lengths)

    def test_an_unknown_size_makes_the_sum_unknown(self):
        watch = Stopwatch()
        for samples in (4, None, 4):
            watch.starts(0)
            watch.ends(1, samples)
        assert watch.take().samples is None
        watch.starts(2)
        watch.ends(3, 4)
        assert watch.take().samples == 4


@dataclass
class Batch:
    name: str
    x: torch.Tensor


class TestBatchSize:
    @pytest.mark.parametrize(
        ("batch", "size"),
        [
            (torch.zeros(5, 2), 5),
            ([torch.zeros(4), torch.zeros(9)], 4),
            ((("text",), {"x": torch.zeros(3, 1)}), 3),
            ({"name": "a", "x": [torch.zeros(2)]}, 2),
            (Batch("b", torch.zeros(6)), 6),
            (torch.tensor(1.0), 1),
            (torch.zeros(0, 3), 0),
            (types.SimpleNamespace(num_graphs=7, x=torch.zeros(30)), 7),
            ("text", None),
            (None, None),
            ([], None),
        ],
        ids=str,
    )
    def test_of(self, batch, size):
        assert batch_size(batch) == size


class TestRows:
    def test_every_n_steps_a_row_of_the_whole_model(self, loader, tmp_path):
        fit(Witness(), monitor(every_n_steps=3), loader, tmp_path, max_epochs=2)
        found = rows(tmp_path, "hardware")
        assert [row["step"] for row in found] == [2, 5, 8, 11, 14]
        assert all(row["component"] is None for row in found)
        assert [row["batches"] for row in found] == [3] * 5
        assert [row["samples"] for row in found] == [12] * 5

    def test_the_wait_for_data_is_seen(self, tmp_path):
        fit(Slow(0.02), monitor(every_n_steps=8), DataLoader(SlowData(0.04)), tmp_path)
        (row,) = rows(tmp_path, "hardware")
        assert row["step_seconds"] == pytest.approx(0.02, rel=0.4)
        assert row["data_wait"] == pytest.approx(0.04 / 0.06, abs=0.12)
        assert row["batches_per_second"] == pytest.approx(1 / 0.06, rel=0.35)
        assert row["samples_per_second"] == row["batches_per_second"]
        assert row["seconds"] == pytest.approx(row["batches"] / row["batches_per_second"])

    def test_a_step_that_computes_waits_for_nothing(self, loader, tmp_path):
        fit(Slow(0.03), monitor(every_n_steps=8), loader, tmp_path)
        (row,) = rows(tmp_path, "hardware")
        assert row["data_wait"] < 0.25

    @pytest.mark.parametrize("between", ["validation", "checkpoint"])
    def test_validation_and_checkpoints_are_no_wait(self, between, loader, tmp_path):
        class Validates(Slow):
            def validation_step(self, batch, batch_idx):
                time.sleep(0.05)

            def val_dataloader(self):
                return DataLoader(torch.zeros(1, 3))

            def on_save_checkpoint(self, checkpoint):
                time.sleep(0.05)

        save = lightning("callbacks").ModelCheckpoint(tmp_path, every_n_train_steps=1)
        if between == "validation":
            options, others = {"val_check_interval": 1}, []
        else:
            options, others = {"enable_checkpointing": True, "limit_val_batches": 0}, [save]
        callbacks = [monitor(every_n_steps=8), *others]
        fit(Validates(0.02), callbacks, loader, tmp_path, **options)
        (row,) = rows(tmp_path, "hardware")
        # seven times 0.05 would lie between
        assert row["data_wait"] * row["seconds"] < 0.25

    def test_the_first_batch_of_an_epoch_is_waited_for_too(self, tmp_path):
        data = DataLoader(SlowData(0.05))
        fit(Witness(), monitor(), data, tmp_path, limit_train_batches=1, max_epochs=4)
        found = rows(tmp_path, "hardware")
        assert all(row["data_wait"] > 0.5 for row in found[1:])

    def test_the_end_of_an_epoch_is_no_wait(self, loader, tmp_path):
        class Ends(Witness):
            def on_train_epoch_end(self):
                time.sleep(0.3)

        fit(Ends(), monitor(), loader, tmp_path, limit_train_batches=1, max_epochs=3)
        for row in rows(tmp_path, "hardware")[1:]:
            assert row["data_wait"] * row["seconds"] < 0.25

    def test_its_cost_is_told(self, loader, tmp_path):
        fit(Witness(), monitor(every_n_steps=2), loader, tmp_path)
        assert rows(tmp_path, "overhead")[-1]["measured"] == 4

    def test_accumulation_writes_one_row_a_step(self, loader, tmp_path):
        options = {"accumulate_grad_batches": 3, "plugins": [scaler_plugin()]}
        fit(Witness(), monitor(), loader, tmp_path, **options)
        found = rows(tmp_path, "hardware")
        assert [row["step"] for row in found] == [0, 1, 2]
        assert [row["batches"] for row in found] == [3, 3, 2]

    def test_manual_optimization_counts_batches(self, loader, tmp_path):
        class Manual(Witness):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.manual_backward(self.loss(batch[0]))
                self.optimizers().step()
                self.optimizers().step()

        fit(Manual(), monitor(every_n_steps=2), loader, tmp_path)
        assert [row["step"] for row in rows(tmp_path, "hardware")] == [1, 3, 5, 7]

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_resumed_run_has_no_gap_and_no_double(self, accumulate, loader, tmp_path):
        save = lightning("callbacks").ModelCheckpoint(
            tmp_path, every_n_train_steps=2, save_last=True
        )
        options = {"enable_checkpointing": True, "accumulate_grad_batches": accumulate}
        fit(Witness(), [monitor(every_n_steps=2), save], loader, tmp_path, max_steps=2, **options)
        options["ckpt_path"] = str(tmp_path / "last.ckpt")
        fit(Witness(), [monitor(every_n_steps=2), save], loader, tmp_path, **options)
        steps = [row["step"] for row in rows(tmp_path, "hardware")]
        assert steps == ([1, 3, 5, 7] if accumulate == 1 else [1, 3])

    def test_batches_without_a_size(self, loader, tmp_path):
        class Words(Witness):
            def training_step(self, batch, batch_idx):
                return self.loss(torch.ones(2, 3))

        fit(Words(), monitor(), DataLoader(["a", "b"]), tmp_path)
        for row in rows(tmp_path, "hardware"):
            assert row["samples"] is None
            assert "samples_per_second" not in row
            assert row["batches_per_second"] > 0

    def test_share_of_the_peak(self, loader, tmp_path):
        fit(Witness(), monitor(flops_per_sample=2e3, peak_flops=1e6), loader, tmp_path)
        for row in rows(tmp_path, "hardware"):
            assert row["mfu"] == pytest.approx(row["samples_per_second"] * 2e3 / 1e6)

    def test_a_peak_that_nobody_knows_is_told(self, loader, tmp_path):
        with pytest.warns(UserWarning, match="of `cpu` are not known: give `peak_flops`"):
            fit(Witness(), monitor(flops_per_sample=1.0), loader, tmp_path)
        assert not any("mfu" in row for row in rows(tmp_path, "hardware"))

    def test_scalars_reach_the_callback_metrics(self, loader, tmp_path):
        trainer = fit(Slow(0.03), monitor(sample_seconds=0.05), loader, tmp_path)
        for key in ("cpu_percent", "data_wait", "samples_per_second", "process_memory"):
            assert f"hardware/{key}" in trainer.callback_metrics
        assert "hardware/batches" not in trainer.callback_metrics

    def test_without_a_gpu_there_are_no_such_numbers_and_it_says_so(self, loader, tmp_path):
        fit(Slow(0.03), monitor(), loader, tmp_path)
        assert not any(key.startswith("gpu") for row in rows(tmp_path, "hardware") for key in row)
        told = [note["message"] for note in rows(tmp_path, "notes")]
        assert told == ["training on `cpu`: rows have no numbers of a GPU."]

    def test_auto(self, loader, tmp_path):
        fit(Witness(), monitor(every_n_steps="auto", overhead_budget=1.0), loader, tmp_path)
        assert rows(tmp_path, "hardware")


class TestHost:
    def test_numbers_are_those_of_the_machine(self, loader, tmp_path):
        fit(Slow(0.04), monitor(sample_seconds=0.05), loader, tmp_path)
        last = rows(tmp_path, "hardware")[-1]
        here = psutil.Process().memory_info().rss / 2**20
        assert last["process_memory"] == pytest.approx(here, rel=0.3)
        assert last["memory_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=15)
        assert 0 <= last["cpu_percent"] <= 100
        assert 0 <= last["process_cpu_percent"] <= 100 * (os.cpu_count() or 1)

    def test_a_busy_process_is_busy_and_a_sleeping_one_is_not(self):
        probe = HostProbe()
        probe.sample()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        busy = probe.sample()["process_cpu_percent"]
        time.sleep(0.2)
        assert probe.sample()["process_cpu_percent"] < 15 < busy

    def test_what_the_system_does_not_tell_is_missing(self, monkeypatch):
        def denied():
            raise psutil.AccessDenied

        probe = HostProbe()
        monkeypatch.setattr(psutil, "cpu_percent", denied)
        assert set(probe.sample()) == {"process_cpu_percent", "memory_percent", "process_memory"}


class TestThread:
    def test_it_lives_during_training_alone(self, loader, tmp_path):
        seen = []

        class Counts(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                seen.append(len(threads()))

        fit(Witness(), [monitor(), Counts()], loader, tmp_path)
        assert seen == [1] * 8
        assert not threads()

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_it_ends_when_training_fails(self, error, loader, tmp_path):
        class Fails(Witness):
            def training_step(self, batch, batch_idx):
                assert threads()
                raise error

        with pytest.raises((error, SystemExit)):
            fit(Fails(), monitor(sample_seconds=60), loader, tmp_path)
        assert not threads()

    def test_it_ends_when_the_monitor_fails(self, loader, tmp_path, monkeypatch):
        def broken(*args):
            raise LookupError("planted")

        monkeypatch.setattr(Stopwatch, "take", broken)
        alive = []

        class Counts(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                alive.append(len(threads()))

        watched = HardwareMonitor(every_n_steps=3)
        with pytest.warns(RuntimeWarning, match="HardwareMonitor has ended .*planted"):
            fit(Witness(), [watched, Counts()], loader, tmp_path)
        assert alive == [1, 1, *[0] * 6]

    def test_a_probe_that_fails_costs_its_own_numbers(self, loader, tmp_path, monkeypatch):
        class Broken:
            def sample(self):
                raise LookupError("planted")

        monkeypatch.setattr(hardware_monitor, "HostProbe", Broken)
        fit(Slow(0.02), monitor(sample_seconds=0.01), loader, tmp_path)
        assert len(rows(tmp_path, "hardware")) == 8
        told = [n["message"] for n in rows(tmp_path, "notes") if "planted" in n["message"]]
        assert told == ["a look at the machine failed and is left out: LookupError: planted."]

    def test_a_slow_look_makes_no_step_slow(self, loader, tmp_path, monkeypatch):
        class Sleepy:
            def sample(self):
                time.sleep(0.3)
                return {"cpu_percent": 1.0}

        monkeypatch.setattr(hardware_monitor, "HostProbe", Sleepy)
        fit(Witness(), monitor(sample_seconds=0.01), loader, tmp_path)
        assert max(row["step_seconds"] for row in rows(tmp_path, "hardware")) < 0.2

    def test_samples_are_taken_at_their_pace(self):
        times = []

        def probe():
            times.append(time.perf_counter())
            return {"x": len(times)}

        sampler = Sampler([probe], 0.05)
        assert sampler.latest() == {}
        sampler.start()
        time.sleep(0.42)
        sampler.stop()
        assert 5 <= len(times) <= 10
        assert sampler.latest() == {"x": len(times)}
        gaps = [later - before for before, later in pairwise(times[1:])]
        assert min(gaps) >= 0.045

    def test_the_first_look_comes_soon(self):
        sampler = Sampler([lambda: {"x": 1}], 600)
        sampler.start()
        time.sleep(3 * hardware_sampler._FIRST_SECONDS)
        assert sampler.latest() == {"x": 1}
        began = time.perf_counter()
        sampler.stop()
        assert time.perf_counter() - began < 1

    def test_worker_processes_may_fork_while_it_runs(self, loader, tmp_path):
        data = DataLoader(loader.dataset, batch_size=4, num_workers=2)
        options = {"max_epochs": 3}
        fit(Witness(), monitor(sample_seconds=0.001), data, tmp_path, **options)
        assert len(rows(tmp_path, "hardware")) == 24

    def test_a_second_fit_begins_anew(self, loader, tmp_path):
        watched = monitor(every_n_steps=4)
        for name in "ab":
            fit(Witness(), watched, loader, tmp_path / name)
            assert [row["batches"] for row in rows(tmp_path / name, "hardware")] == [4, 4]


class TestInvisible:
    @pytest.mark.parametrize("mode", ["plain", "accumulated", "manual", "no_loss"])
    def test_bits_are_the_same(self, mode, tmp_path):
        without, _ = train(mode, tmp_path / "without")
        trace, _ = train(mode, tmp_path / "with", [monitor(sample_seconds=0.001)])
        assert not differences(without, trace)

    def test_nothing_is_read_and_nothing_hangs_on_the_model(self, tmp_path):
        watches = []
        for name, callbacks in {"without": [], "with": [monitor(every_n_steps=3)]}.items():
            watches.append(WatchSteps())
            folder = tmp_path / name
            train("plain", folder, [watches[-1], *callbacks], logger=RunLogger(folder))
        without, watch = watches
        for number, (step, before) in enumerate(zip(watch.steps, without.steps, strict=True)):
            assert not step.own_reads
            assert not step.reads - before.reads
            assert step.hooks == before.hooks
            # a row's numbers become tensors for `callback_metrics`
            assert number % 3 == 2 or not step.own_operations

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sample_seconds": 0}, "`sample_seconds` must be positive, got 0."),
            ({"flops_per_sample": -1.0}, "`flops_per_sample` must be positive, got -1.0."),
            ({"peak_flops": float("nan")}, "`peak_flops` must be positive, got nan."),
            ({"every_n_steps": 0}, '`every_n_steps` must be at least 1 or "auto", got 0.'),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
            HardwareMonitor(**arguments)
        assert str(caught.value) == message


class NVMLError(Exception):
    pass


class FakeNvml(types.ModuleType):
    """Two devices, in another order than CUDA has them."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, **broken):
        super().__init__("pynvml")
        self.broken = broken
        self.open = 0

    def nvmlInit(self):  # noqa: N802
        self._check("init")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self._check("uuid")
        if uuid not in ("GPU-aaa", "GPU-bbb"):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, place):  # noqa: N802
        if place != "00000000:1b:00.0":
            raise NVMLError("Not Found")
        return "GPU-bbb"

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        self._check("use")
        return types.SimpleNamespace(gpu={"GPU-aaa": 11, "GPU-bbb": 97}[handle])

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return types.SimpleNamespace(used=3 * 2**30, total=12 * 2**30)

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        return 64

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        self._check("power")
        return 123_456

    def _check(self, what):
        if what in self.broken:
            raise NVMLError(self.broken[what])


class TestGpu:
    """With a library in place of NVIDIA's, since the numbers need no device, only its answers."""

    @pytest.fixture
    def probe(self, monkeypatch):
        def make(nvml, **properties):
            monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
            found = types.SimpleNamespace(**properties)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
            return GpuProbe(torch.device("cuda", 0))

        return make

    def test_the_device_is_found_by_its_own_number(self, probe):
        nvml = FakeNvml()
        found = probe(nvml, uuid="bbb")
        assert found.sample() == {
            "gpu_percent": 97,
            "gpu_memory_used": 3072,
            "gpu_memory_percent": 25,
            "gpu_temperature": 64,
            "gpu_power": pytest.approx(123.456),
        }
        found.close()
        assert nvml.open == 0

    def test_or_by_its_place_on_the_bus(self, probe):
        place = {"pci_domain_id": 0, "pci_bus_id": 0x1B, "pci_device_id": 0}
        assert probe(FakeNvml(), uuid="zzz", **place).sample()["gpu_percent"] == 97
        assert probe(FakeNvml(), **place).sample()["gpu_percent"] == 97

    def test_what_it_does_not_tell_is_missing(self, probe):
        found = probe(FakeNvml(use="Not Supported", power="Not Supported"), uuid="aaa")
        assert set(found.sample()) == {"gpu_memory_used", "gpu_memory_percent", "gpu_temperature"}

    @pytest.mark.parametrize(
        ("nvml", "message"),
        [
            (FakeNvml(), "NVML does not know `cuda:0`"),
            (FakeNvml(init="Driver Not Loaded"), "NVML does not start: Driver Not Loaded"),
            (None, "`nvidia-ml-py` is not installed"),
        ],
        ids=["unknown", "no driver", "not installed"],
    )
    def test_without_it_there_is_a_reason(self, nvml, message, probe):
        with pytest.raises(RuntimeError) as caught:
            probe(nvml, uuid="ccc")
        assert str(caught.value) == message
        assert nvml is None or nvml.open == 0

    @pytest.mark.parametrize(
        ("name", "peak"),
        [
            ("NVIDIA H100 80GB HBM3", 989e12),
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA H200", 989e12),
            ("NVIDIA A100-SXM4-80GB", 312e12),
            ("Tesla V100-SXM2-16GB", 125e12),
            ("Tesla T4", 65e12),
            ("NVIDIA L4", 121e12),
            ("NVIDIA L40S", 362e12),
            ("NVIDIA GeForce RTX 4090", 165e12),
            ("NVIDIA GeForce GTX 1080", None),
            ("cpu", None),
            ("", None),
        ],
    )
    def test_peaks_by_name(self, name, peak):
        assert peak_flops(name) == peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_of_a_device(loader, tmp_path):
    fit(Slow(0.05), monitor(sample_seconds=0.05), loader, tmp_path, accelerator="gpu")
    last = rows(tmp_path, "hardware")[-1]
    assert 0 <= last["gpu_percent"] <= 100
    assert 0 < last["gpu_memory_percent"] <= 100
    assert last["gpu_memory_reserved"] >= last["gpu_memory_allocated"] > 0
    assert last["gpu_memory_used"] >= last["gpu_memory_reserved"]
    assert 0 < last["gpu_temperature"] < 120
    assert last["gpu_power"] > 0
