"""Rows made up by hand for the rules on outputs, attention and the machine."""

import dataclasses
from pathlib import Path

import numpy as np
import yaml

from lightning_diag.rules import RULES, diagnose
from tests.rules.planted import MadeUpRun

CONF = Path(__file__).parents[2] / "conf" / "rules"


def judge(rule, **rows):
    """What one rule finds in rows by prefix; None if nothing."""
    found = diagnose(MadeUpRun(rows=rows), on_error="raise")
    mine = [one for one in found if one.rule == rule]
    assert len(mine) <= 1
    return mine[0] if mine else None


def severity(rule, **rows):
    found = judge(rule, **rows)
    return None if found is None else found.severity


def every(steps, **columns):
    """Rows at steps; a column is one value for all, or a list."""
    return [
        {
            "step": step,
            "epoch": 0,
            **{
                key: value[place] if isinstance(value, list) else value
                for key, value in columns.items()
            },
        }
        for place, step in enumerate(steps)
    ]


def losses(start, end, steps=300, *, jump_at=None, to=None):
    """A loss that goes from `start` to `end`, with a little noise, by windows of ten steps."""
    rng = np.random.default_rng(0)
    count = steps // 10
    means = np.linspace(start, end, count) + 0.005 * rng.normal(size=count)
    if jump_at is not None:
        means[jump_at // 10 :] = to
    return [
        {"step": 10 * i + 9, "first_step": 10 * i, "steps": 10, "loss": float(mean)}
        for i, mean in enumerate(means)
    ]


FALLS, STANDS = losses(1.4, 0.2), losses(1.4, 1.39)


def check_yaml(family, ids):
    """Whether the YAML file of a family repeats the defaults, with a comment on every line."""
    text = (CONF / f"{family}.yaml").read_text()
    python = {
        id: dataclasses.asdict(one.thresholds) for id, one in RULES.items() if one.family == family
    }
    assert yaml.safe_load(text) == python
    assert set(python) == set(ids)
    assert all(" # " in line for line in text.splitlines() if line.startswith("  "))
