"""Healthy runs of many shapes: no finding above info."""

import numpy as np
import pytest

from lightning_diag.rules import diagnose
from tests.rules.planted import component_row, noise, run_of, trace, whole_row


def converging(rng):
    decay = 0.8 ** np.arange(120)
    return trace({"a": 3.0 * decay, "b": 0.2 * decay * np.exp(rng.normal(0, 0.2, 120))})


def converging_to_zero(rng):
    norms = trace({"a": 2.0 * 0.5 ** np.arange(60), "b": 0.5 ** np.arange(60)})
    for row in norms:
        row["l2"] = 0.0 if row["step"] > 450 else row["l2"]
    return norms


def warming_up(rng):
    ramp = np.minimum(1.0, (1 + np.arange(80)) / 20)
    return trace({"a": noise(rng, 80, 4.0) * ramp, "b": noise(rng, 80, 0.5) * ramp})


def small_batches(rng):
    return trace({name: noise(rng, 300, 1.0, spread=1.0) for name in "abcd"})


def heavy_tails(rng):
    norms = {name: np.abs(rng.standard_t(2, 300)) + 0.05 for name in "ab"}
    return trace(norms)


def sparse_embedding(rng):
    norms = {"embedding": noise(rng, 60, 0.02), "body": noise(rng, 60, 1.0)}
    counts = {"embedding": 50_000_000, "body": 1_000_000}
    return trace(norms, counts=counts, zeros={"embedding": 0.999})


def big_model(rng):
    norms = {
        "embed": noise(rng, 80, 0.05),
        "blocks": noise(rng, 80, 0.3),
        "head": noise(rng, 80, 0.1),
    }
    counts = {"embed": 400_000_000, "blocks": 6_000_000_000, "head": 400_000_000}
    return trace(norms, counts=counts, clip=1.0)


def one_scalar(rng):
    norms = {"tower": noise(rng, 60, 0.5), "temperature": noise(rng, 60, 0.01, spread=0.8)}
    return trace(norms, counts={"tower": 80_000_000, "temperature": 1})


def tiny_scalar(rng):
    norms = {"tower": noise(rng, 60, 0.5), "temperature": noise(rng, 60, 1e-4)}
    return trace(norms, counts={"tower": 80_000_000, "temperature": 1})


def clipped_at_the_start(rng):
    settle = 1.0 + 300.0 * np.exp(-np.arange(90) / 5.0)
    return trace({"a": noise(rng, 90, 0.6) * settle, "b": noise(rng, 90, 0.3)}, clip=1.0)


def always_clipped_a_little(rng):
    return trace({"a": noise(rng, 90, 2.5), "b": noise(rng, 90, 1.0)}, clip=1.0)


def summed_loss(rng):
    return trace({"a": noise(rng, 90, 4000.0), "b": noise(rng, 90, 900.0)})


def steady_that_triples(rng):
    norms = {"a": noise(rng, 90, 60.0, spread=1e-3), "b": noise(rng, 90, 20.0)}
    norms["a"][50:] *= 3.0
    return trace(norms)


def spikes_that_clipping_catches(rng):
    norms = {"a": noise(rng, 300, 0.7), "b": noise(rng, 300, 0.3)}
    norms["a"][[50, 120, 121, 200, 260]] = 400.0
    return trace(norms, clip=1.0)


def gan(rng):
    rows = []
    for index in range(60):
        name, norm = (("generator", 0.4), ("discriminator", 3.0))[index % 2]
        part = component_row(index, name, norm * np.exp(rng.normal(0, 0.4)), optimizer=index % 2)
        idle = ("discriminator", "generator")[index % 2]
        rest = component_row(index, idle, 0.0, count=0, tensors=0, optimizer=index % 2)
        rows += [part, rest, whole_row(index, [part], optimizer=index % 2)]
    return rows


def scaler_settles(rng):
    rows = []
    for index in range(60):
        skipped = index < 12
        part = component_row(index, "net", noise(rng, 1, 1.0)[0], nonfinite=40 if skipped else 0)
        if skipped:
            part.update(first_nonfinite="net.weight")
        scale = 65536.0 * 0.5 ** min(index, 12)
        rows += [part, whole_row(index, [part], skipped=int(skipped), scale=scale)]
    return rows


def frozen_backbone(rng):
    rows = []
    for index in range(40):
        head = component_row(index * 10, "head", noise(rng, 1, 1.0)[0])
        backbone = component_row(index * 10, "backbone", 0.0, count=0, tensors=0, frozen=60)
        rows += [backbone, head, whole_row(index * 10, [backbone, head])]
    return rows


def thawed_later(rng):
    rows = []
    for index in range(40):
        head = component_row(index * 10, "head", noise(rng, 1, 1.0)[0])
        frozen = index < 20
        more = {"count": 0, "tensors": 0, "frozen": 60} if frozen else {}
        backbone = component_row(index * 10, "backbone", 0.0 if frozen else 0.2, **more)
        rows += [backbone, head, whole_row(index * 10, [backbone, head])]
    return rows


def expert_used_now_and_then(rng):
    rows = trace({"router": noise(rng, 100, 1.0), "expert": noise(rng, 100, 0.3)})
    used = rng.random(100) < 0.3
    used[-3:] = False
    for row in rows:
        if row["component"] == "expert" and not used[row["step"] // 10]:
            row.update(l2=0.0, count=0, tensors=0, missing=4)
    return rows


def bias_before_normalization(rng):
    rows = trace({"a": noise(rng, 60, 1.0), "b": noise(rng, 60, 0.5)})
    for row in rows:
        if row["component"] is None:
            row["min_norm"] = 1e-10
    return rows


def uneven_convergence(rng):
    fast = 1.0 * np.exp(-np.arange(100) / 15.0) + 3e-3
    return trace({"fast": fast * noise(rng, 100, 1.0), "slow": noise(rng, 100, 0.8)})


def zero_initialized_head(rng):
    norms = {"body": noise(rng, 50, 1.0), "head": noise(rng, 50, 0.5)}
    norms["body"][0] = 0.0
    norms["body"][1:4] = [1e-6, 1e-4, 1e-2]
    return trace(norms)


def one_component(rng):
    return trace({"net": noise(rng, 50, 0.3)})


def three_rows(rng):
    return trace({"a": [5.0, 1.0, 0.5], "b": [0.1, 0.1, 0.1]}, every=50)


def no_rows(rng):
    return []


HEALTHY = [
    converging,
    converging_to_zero,
    warming_up,
    small_batches,
    heavy_tails,
    sparse_embedding,
    big_model,
    one_scalar,
    tiny_scalar,
    clipped_at_the_start,
    always_clipped_a_little,
    summed_loss,
    steady_that_triples,
    spikes_that_clipping_catches,
    gan,
    scaler_settles,
    frozen_backbone,
    thawed_later,
    expert_used_now_and_then,
    bias_before_normalization,
    uneven_convergence,
    zero_initialized_head,
    one_component,
    three_rows,
    no_rows,
]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", HEALTHY, ids=lambda make: make.__name__)
def test_nothing_above_info(make, seed):
    rows = make(np.random.default_rng(seed))
    findings = diagnose(run_of(rows), on_error="raise")
    assert [one for one in findings if one.rank > 0] == []
