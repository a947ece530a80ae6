import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.tuning.hardware import Device, Settings, detect, gpu_key, settings


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("nvidia geforce rtx3090", "rtx3090"),
        ("RTX-4090", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("A100-SXM4-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 3080", ""),
        ("NVIDIA A10", ""),
        ("NVIDIA L40", ""),
        ("NVIDIA T400 4GB", ""),
        ("AMD Instinct MI300X", ""),
        ("", ""),
    ],
)
def test_gpu_key_reads_the_names_that_drivers_give(name, key):
    assert gpu_key(name) == key


@pytest.mark.parametrize(
    ("name", "memory_gib", "batch_size", "accumulate", "num_workers"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, 64, 1, 8),
        ("Tesla V100-SXM2-16GB", 15.8, 48, 2, 6),
        ("Tesla T4", 14.6, 32, 2, 4),
        ("NVIDIA GeForce RTX 3090", 23.7, 48, 2, 6),
        ("NVIDIA GeForce RTX 4090", 23.5, 56, 1, 8),
        ("NVIDIA H200", 139.8, 128, 1, 8),
        ("NVIDIA A10", 22.0, 48, 2, 6),  # no row: the tier of its memory
        ("NVIDIA GeForce GTX 1650", 3.8, 8, 8, 2),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, 8, 8, 2),  # a slice is not the whole
    ],
)
def test_settings_of_a_gpu(name, memory_gib, batch_size, accumulate, num_workers):
    found = settings(Device("cuda", name, memory_gib, bf16=True, cores=64))
    assert (found.batch_size, found.accumulate) == (batch_size, accumulate)
    assert found.num_workers == num_workers
    assert found.accelerator == "cuda"
    assert found.precision == "bf16-mixed"
    assert found.pin_memory


@given(name=st.text(max_size=20), memory_gib=st.floats(0, 1000), bf16=st.booleans())
def test_an_unknown_gpu_never_gets_what_the_cpu_gets(name, memory_gib, bf16):
    found = settings(Device("cuda", name, memory_gib, bf16=bf16, count=2, cores=32))
    assert (found.accelerator, found.devices, found.pin_memory) == ("cuda", 2, True)
    assert found.precision == ("bf16-mixed" if bf16 else "16-mixed")
    assert found.batch_size * found.accumulate >= 64


@given(small=st.floats(0, 300), large=st.floats(0, 300))
def test_more_memory_never_means_a_smaller_batch(small, large):
    small, large = sorted((small, large))
    sizes = [settings(Device("cuda", "new", gib)).batch_size for gib in (small, large)]
    assert sizes[0] <= sizes[1]


def test_settings_of_the_cpu():
    found = settings(Device("cpu", cores=8))
    assert found == Settings("cpu", 1, "32-true", 16, 1, 2, pin_memory=False)


def test_apples_gpu_trains_in_single_precision():
    found = settings(Device("mps", "mps", 24.0, cores=8))
    assert (found.accelerator, found.devices, found.precision) == ("mps", 1, "32-true")
    assert found.batch_size == 48
    assert not found.pin_memory


@pytest.mark.parametrize(("cores", "count", "workers"), [(1, 1, 0), (4, 1, 3), (16, 4, 3)])
def test_workers_leave_a_core_to_each_process(cores, count, workers):
    found = settings(Device("cuda", "NVIDIA H100", 80, count=count, cores=cores))
    assert found.num_workers == workers


def test_every_field_can_be_overridden_and_null_means_decide():
    given_fields = {
        "accelerator": "cpu",
        "devices": 4,
        "precision": "64-true",
        "batch_size": 3,
        "accumulate": 5,
        "num_workers": 0,
        "pin_memory": False,
    }
    device = Device("cuda", "NVIDIA L4", 22.0, bf16=True, cores=8)
    assert set(given_fields) == {field.name for field in dataclasses.fields(Settings)}
    assert settings(device, given_fields) == Settings(**given_fields)
    assert settings(device, dict.fromkeys(given_fields)) == settings(device)


def test_a_misspelt_field_is_refused_with_the_nearest():
    message = r"^`hardware` has no field `batchsize`; did you mean `batch_size`\?$"
    with pytest.raises(ValueError, match=message):
        settings(Device("cpu"), {"batchsize": 3})


def test_detect_finds_what_torch_can_use():
    found = detect()
    if torch.cuda.is_available():
        assert (found.accelerator, found.count) == ("cuda", torch.cuda.device_count())
        assert found.name == torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        assert found.accelerator == "mps"
    else:
        assert (found.accelerator, found.count) == ("cpu", 1)
    assert found.cores >= 1


def test_detect_describes_the_smallest_of_several_gpus(monkeypatch):
    class Properties:
        def __init__(self, name, total_memory, major):
            self.name, self.total_memory, self.major = name, total_memory, major

    gpus = [Properties("NVIDIA H100", 80 * 2**30, 9), Properties("Tesla T4", 16 * 2**30, 7)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    found = detect()
    assert (found.name, found.memory_gib, found.count) == ("Tesla T4", 16.0, 2)
    assert not found.bf16
