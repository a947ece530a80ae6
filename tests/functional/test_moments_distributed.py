"""Do the moments of shards add up to the moments of the tensor?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_diag.functional.moments import local_shard, moments, quick_moments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[distributed.DeviceMesh]:
    """A mesh of this process only."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=str)
def test_one_process_sees_all_of_a_distributed_tensor(alone, placement):
    whole = torch.randn(3, 4)
    shard = distribute_tensor(whole, alone, [placement])
    for found, want in zip(moments([shard]), moments([whole]), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)
        assert not isinstance(found, DTensor)


def test_a_pending_sum_is_completed(alone):
    whole = torch.randn(3, 4)
    shard = DTensor.from_local(whole, alone, [Partial()])
    torch.testing.assert_close(local_shard(shard), whole, rtol=0, atol=0)
    assert quick_moments([shard])[0].sum_sq == quick_moments([whole])[0].sum_sq


def test_a_plain_tensor_is_its_own_shard():
    x = torch.randn(3)
    assert local_shard(x) is x


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What two processes found, and the truth, by name."""
    folder = tmp_path_factory.mktemp("spread")
    script = Path(__file__).with_name("sharded_moments.py")
    paths = [os.environ.get("PYTHONPATH"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(Path(folder, "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["exact", "nans", "zeros", "histogram"])
def test_shards_add_up_to_the_tensor(spread, name):
    found, truth = (torch.tensor(values, dtype=torch.float64) for values in spread[name])
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.distributed
def test_quick_shards_add_up_wherever_the_tensor_is_finite(spread):
    found, truth = (torch.tensor(values, dtype=torch.float64) for values in spread["quick"])
    exact = torch.tensor(spread["exact"][1], dtype=torch.float64)
    finite = exact[:, 6] == 0
    assert 0 < finite.sum() < len(finite)
    torch.testing.assert_close(found[finite], truth[finite], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.distributed
def test_every_way_to_spread_a_tensor_was_tried(spread):
    text = " ".join(spread["placements"])
    assert all(kind in text for kind in ("Replicate", "Shard(dim=0)", "Shard(dim=1)", "Partial"))
