"""Run folders written by hand, with the gradient norms that a test wants."""

import json
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def row(step: int, norm: float | None, **more: Any) -> Row:
    finite = norm is not None
    made = {"step": step, "component": None, "global_norm": norm, "l2": norm, "count": 10}
    return made | {"nonfinite": 0 if finite else 3, "has_nan": int(not finite)} | more


def written(folder: Path, grad: list[Row], config: str = "", losses: Any = ()) -> Path:
    (folder / "records").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text(config)
    parts = [{**one, "component": "head"} for one in grad[:1]]  # rows of parts do not count
    metrics = [{"step": step, "component": None, "train_loss": loss} for step, loss in losses]
    for name, lines in (("grad", [*parts, *grad]), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "records" / f"{name}.jsonl").write_text(text)
    return folder


def healthy(count: int, usual: float = 1.0, seed: int = 0) -> list[float]:
    return list(usual * np.random.default_rng(seed).lognormal(0.0, 0.4, count))


def every(norms: list[float | None], interval: int = 1, **more: Any) -> list[Row]:
    return [row(interval * place, norm, **more) for place, norm in enumerate(norms)]
