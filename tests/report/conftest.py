import json

import numpy as np
import pytest
import yaml

from lightning_diag.records.read_run import read_run
from tests.rules.planted import noise, trace

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture
def write_run(tmp_path):
    """Write rows into a run folder and read it back."""

    def write(rows, *, config=None, info=None, name="a run"):
        folder = tmp_path / name
        (folder / "records").mkdir(parents=True)
        for prefix, some in rows.items():
            base = {"epoch": 0, "time": 1.0, "attempt": 0, "component": None}
            lines = (json.dumps({**base, **row}) + "\n" for row in some)
            (folder / "records" / f"{prefix}.jsonl").write_text("".join(lines))
        (folder / "run.json").write_text(json.dumps(info or {}))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return read_run(folder)

    return write


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def healthy_rows(rng):
    norms = {"encoder": noise(rng, 30, 0.6), "head": noise(rng, 30, 0.3)}
    metrics = [{"step": 10 * i, "train_loss": 2.0 * 0.99**i, "lr-AdamW": 1e-3} for i in range(30)]
    metrics += [{"step": 10 * i, "val_loss": 2.0 * 0.99**i} for i in (10, 20)]
    return {"grad": trace(norms, clip=5.0), "metrics": metrics}


@pytest.fixture
def hostile_rows(rng):
    """A run that is sick in several ways, and whose names are markup."""
    norms = {HOSTILE: noise(rng, 60, 3e-6), "pooler": noise(rng, 60, 0.3)}
    norms["enc`od|er"] = noise(rng, 60, 0.8)
    norms["enc`od|er"][40:] = 1e4
    norms["pooler"][20:] = 0.0
    note = {"step": 0, "diagnostic": HOSTILE, "message": f"about {HOSTILE}", "severity": "warning"}
    cost = {"step": 590, "diagnostic": "GradientHealth", "measured": 60, "seconds": 0.61}
    cost |= {"share": 0.0043, "every_n_steps": 10}
    half = {**cost, "step": 300, "share": 0.5}
    metrics = [{"step": i, f"loss{HOSTILE}": 1.0} for i in range(9)]
    rows = trace(norms)
    return {"grad": rows, "metrics": metrics, "notes": [note], "overhead": [half, cost]}
