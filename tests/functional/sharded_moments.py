"""Two processes take the moments of distributed tensors; rank 0 prints them beside the truth."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.multiprocessing import start_processes

from lightning_diag.functional.gradient_health import (
    gradient_table,
    magnitude_histogram,
    merge_tables,
    nan_counts,
    zero_counts,
)


def full_tensors() -> list[torch.Tensor]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[4, 3], x[2, 1] = torch.nan, torch.inf, 0.0
    return [x, torch.randn(1, 3), torch.zeros(0, 4), torch.tensor(2.0)]


def cases(rank: int) -> list[tuple[torch.Tensor, DTensor]]:
    """Whole tensors, and the same spread over two ranks in every way."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    pairs = []
    for whole in full_tensors():
        placements: list[Placement] = [Replicate()]
        placements += [Shard(dim) for dim in range(whole.dim())]
        pairs += [(whole, distribute_tensor(whole, mesh, [place])) for place in placements]
    whole = torch.arange(6.0) - 2
    # the ranks hold -1 and 2 times the whole: to be added up before they are squared
    pairs.append((whole, DTensor.from_local(whole * (3 * rank - 1), mesh, [Partial()])))
    return pairs


def work(rank: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    pairs = cases(rank)
    shards = [shard for _, shard in pairs]
    found = {}
    for quick in (False, True):
        table, _ = gradient_table(shards, quick=quick)
        tables = [torch.empty_like(table) for _ in range(2)]
        distributed.all_gather(tables, table)
        found["quick" if quick else "exact"] = merge_tables(torch.stack(tables))
    for name, function in {
        "nans": nan_counts,
        "zeros": zero_counts,
        "histogram": magnitude_histogram,
    }.items():
        found[name] = function(shards)
        distributed.all_reduce(found[name])
    wholes = [whole for whole, _ in pairs]
    truth = {
        "exact": gradient_table(wholes)[0],
        "quick": gradient_table(wholes, quick=True)[0],
        "nans": nan_counts(wholes),
        "zeros": zero_counts(wholes),
        "histogram": magnitude_histogram(wholes),
    }
    if rank == 0:
        text = {name: [found[name].tolist(), truth[name].tolist()] for name in truth}
        text["placements"] = [str(shard.placements) for shard in shards]
        Path(folder, "found.json").write_text(json.dumps(text))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
