"""Promise 1: training is the same to the last bit with and without the diagnostics."""

from functools import cache

import pytest
import torch

from lightning_diag.records import read_run
from tests.promises.cases import CASES, ONCE, build, kinds
from tests.promises.jobs import train_rank
from tests.promises.modes import DISTRIBUTED, QUICK, WORKERS
from tests.promises.networks import TOKENS
from tests.promises.processes import needs_fork, run_ranks
from tests.promises.trace import differences, train


@cache
def reference(mode, folder):
    return train(mode, folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


def assert_measured(folder, case, beside=()):
    """Training that was never looked at would be the same too; `beside`: those that do not look."""
    (run,) = (folder / "diagnostics").iterdir()
    last = {row["diagnostic"]: row["measured"] for row in read_run(run).overhead.to_dicts()}
    for kind in {*kinds(case)} - {*beside}:
        assert last[kind] >= (1 if kind in ONCE else 2), kind


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", QUICK)
def test_bits_are_the_same(mode, case, folder, tmp_path):
    trace, _ = train(mode, tmp_path, build(case))
    assert not differences(reference(mode, folder), trace)
    assert_measured(tmp_path, case)


@pytest.mark.parametrize("mode", WORKERS)
def test_bits_are_the_same_with_shuffled_workers(mode, tmp_path):
    without, _ = train(mode, tmp_path / "without")
    trace, _ = train(mode, tmp_path / "with", build("all"))
    assert not differences(without, trace)


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bits_and_graphs_are_the_same_when_compiled(mode, tmp_path):
    traces = []
    for name, callbacks in {"without": (), "with": build("all")}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trace, _ = train(mode, tmp_path / name, callbacks)
        stats = dict(torch._dynamo.utils.counters["stats"])
        traces.append({**trace, "graphs": stats})
    assert traces[0]["graphs"]["unique_graphs"] >= 1
    assert not differences(*traces)


@needs_fork
@pytest.mark.distributed
@pytest.mark.parametrize("mode", DISTRIBUTED)
def test_bits_are_the_same_on_two_ranks(mode, tmp_path):
    for name, case in {"without": None, "with": "all"}.items():
        (tmp_path / name).mkdir()
        run_ranks(train_rank, mode, case, tmp_path / name)
    for rank in range(2):
        traces = [
            torch.load(tmp_path / name / f"trace_{rank}.pt", weights_only=False)
            for name in ("without", "with")
        ]
        assert not differences(*traces)
        cut = traces[0]["weights"]["net.head.weight"].shape[0] < TOKENS
        assert cut == (mode == "fsdp2")
    # no learning rate is searched where weights are sharded
    assert_measured(tmp_path / "with", "all", ONCE if mode == "fsdp2" else ())


def test_modes_do_what_they_are_named_for(folder):
    """A trace is worth comparing only where the mode has left its mark in it."""
    plain = reference("plain", folder)
    assert reference("accumulated", folder)["global_step"] < plain["global_step"]
    for mode in ("scaler_overflow", "scaler_fused"):
        trace = reference(mode, folder)
        made = trace["optimizers"][0]["state"][0]["step"]
        assert made < trace["global_step"]
    for mode in set(QUICK) - {"plain", "scaler_overflow", "scaler_fused"}:
        assert differences(plain["weights"], reference(mode, folder)["weights"])
    drawn = [step["generators"] for step in plain["steps"]]
    for generator in ("python", "numpy", "torch"):
        assert differences(drawn[0][generator], drawn[1][generator])
