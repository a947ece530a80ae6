"""Entries to store, and jobs that other processes run on one store."""

import math
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lightning_diag.tuning.lr_store import Entry, LRStore, key_of

PARTS = {"model": "mlp", "batch": 64, "optimizer.betas": [0.9, 0.999], "clip": None}
POINTS = 100


def curve(points=POINTS):
    rates = [1e-8 * 10 ** (8 * i / max(1, points - 1)) for i in range(points)]
    loss = [2.3 + math.sin(i) / 3 for i in range(points)]
    return {"lr": rates, "loss": loss, "smoothed": [value / 3 for value in loss]}


def entry(hours=0.0, lr=1e-3, parts=None, **more):
    """An entry that is so many hours old."""
    parts = {**(PARTS if parts is None else parts), **more}
    return Entry(
        key=key_of(parts),
        created=(datetime.now(UTC) - timedelta(hours=hours)).isoformat(),
        lr=lr,
        confidence="high",
        slope=-0.31,
        noise=0.02,
        parts=parts,
        curve=curve(),
        versions={"torch": "2.13"},
    )


def search(folder, seconds, mark=""):
    """What the callback does: read, else lock, read again, search, write."""
    store, wanted = LRStore(folder), entry()
    found = store.read(wanted.key)
    if found is None:
        with store.lock(wanted.key, lambda: _note(folder, f"waits {mark}")):
            found = store.read(wanted.key)
            if found is None:
                _note(folder, f"searches {mark}")
                time.sleep(seconds)
                store.write(wanted)
                return
    assert found.lr == wanted.lr
    _note(folder, f"reads {mark}")


def fail(folder, mark=""):
    """A search that finds nothing and stores nothing."""
    with LRStore(folder).lock(entry().key):
        _note(folder, f"begins {mark}")
        time.sleep(0.02)
        _note(folder, f"ends {mark}")


def _note(folder, text):
    path = Path(f"{folder}.log")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)
