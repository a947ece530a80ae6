"""The rows of one look, out of what the host knows and what was read from the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.segments import number
from lightning_diag.callbacks.wiring_losses import DIFFERENCES, FACTS, LossCall
from lightning_diag.callbacks.wiring_parameters import Book, Subject, listed
from lightning_diag.functional.wiring_check import DATA_FACTS

__all__ = ["Look", "data_rows", "loss_rows", "plain_row", "summary_row", "zero_rows"]

_UNSCALED_RMS = 50.0
_FEW_LABELS = 4
_FEW_SAMPLES = 8
_CONSTANT = 1e-4
# what an activation can give at the least; at the most it is 1
_ENDS = {"Tanh": -1.0, "Sigmoid": 0.0, "Softmax": 0.0}
_REACH = 0.5
_NO_LOSS = "no loss function of torch.nn.functional was seen"


@dataclass
class Look:
    """One measurement under way: numbers on the device by name, and what belongs to them.

    Attributes:
        step: The step that is looked at.
        began: What `Diagnostic.device_began` gave.
        numbers: Tensors to be read together.
        names: What the entries of `numbers` stand for.
        rows: Rows that need nothing of the device.
        modules: All modules of the model, by name.
        samples: Length of the first tensor of the batch.
    """

    step: int
    began: torch.cuda.Event | None
    numbers: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    samples: int = 0

    def add(self, name: str, values: Tensor | None, names: Sequence[Any] = ()) -> None:
        """Keep numbers for the reading at the end."""
        if values is not None and values.numel():
            self.numbers[name] = values.detach()
            self.names[name] = list(names)

    def packed(self, device: torch.device) -> Tensor:
        """All numbers in one tensor."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        parts = [part.reshape(-1).to(wide) for part in self.numbers.values()]
        parts = [part if part.device == device else part.to(device) for part in parts]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=wide, device=device)

    def unpacked(self, values: Sequence[float]) -> dict[str, list[float]]:
        """The same numbers by name, once they are on the host."""
        found, start = {}, 0
        for name, part in self.numbers.items():
            found[name] = list(values[start : start + part.numel()])
            start += part.numel()
        return found


def plain_row(check: str, state: str, kind: str | None = None, **more: object) -> Row:
    """A row about the whole model."""
    row: Row = {"component": None, "check": check, "state": state}
    return row | ({"kind": kind} if kind else {}) | more


def summary_row(rows: Sequence[Row]) -> Row:
    """How many checks found something, and how many could not be made."""
    states: dict[object, set[object]] = {}
    for row in rows:
        states.setdefault(row["check"], set()).add(row["state"])
    wrong = sum("wrong" in found for found in states.values())
    unknown = sum(found == {"unknown"} for found in states.values())
    row = plain_row("all", "wrong" if wrong else "ok")
    return row | {"wrong": wrong, "unknown": unknown}


def data_rows(look: Look, read: Mapping[str, Sequence[float]], loss: float | None) -> list[Row]:
    """The rows of ``nonfinite_data`` and ``input_scale``."""
    width = len(DATA_FACTS)
    names = look.names.get("batch", [])
    bad = []
    for place, name in enumerate(names):
        facts = dict(zip(DATA_FACTS, read["batch"][place * width :][:width], strict=True))
        if facts["nonfinite"]:
            bad.append((name, facts))
    row = plain_row("nonfinite_data", "wrong" if bad else "ok", count=0)
    if not names:
        row["kind"] = "no floating tensor in the batch"
    if bad:
        elements = sum(facts["nonfinite"] for _, facts in bad)
        row |= {"count": int(elements), "names": listed([name for name, _ in bad])}
        row["value"] = elements / sum(facts["count"] for _, facts in bad)
    row["loss_finite"] = None if loss is None else int(isfinite(loss))
    return [row, *_scale_rows(look, read)]


def _scale_rows(look: Look, read: Mapping[str, Sequence[float]]) -> list[Row]:
    rows, width = [], len(DATA_FACTS)
    for place, (component, name, normalized) in enumerate(look.names.get("entries", [])):
        facts = dict(zip(DATA_FACTS, read["entries"][place * width :][:width], strict=True))
        row = plain_row("input_scale", "wrong" if facts["rms"] > _UNSCALED_RMS else "ok")
        row |= {"component": component, "names": name, "normalized": int(normalized)}
        keys = ("mean", "std", "rms", "abs_max")
        rows.append(row | {key: number(facts[key]) for key in keys})
    return rows or [
        plain_row("input_scale", "unknown", "no layer that learns was seen to get data")
    ]


def loss_rows(calls: Sequence[LossCall], read: Mapping[str, Sequence[float]]) -> list[Row]:
    """The rows of the loss functions: what they are fed, and whether predictions vary."""
    checks = ("double_softmax", "loss_target_mismatch")
    if not calls:
        return [plain_row(check, "unknown", _NO_LOSS) for check in checks]
    rows: list[Row] = []
    for place, call in enumerate(calls):
        facts = dict(zip(FACTS, read["calls"][place * len(FACTS) :][: len(FACTS)], strict=True))
        rows.append(_softmax_row(call, facts))
        rows += _target_rows(call, facts)
        rows += _prediction_rows(call, facts, place)
    return rows


def _softmax_row(call: LossCall, facts: Mapping[str, float]) -> Row:
    slack = 1e-3 if call.single else 2e-2
    between = facts["low"] >= 0 and facts["high"] <= 1 + slack
    several = len(call.shape) > 1 and call.shape[1] > 1
    softmax = call.kind == "cross_entropy" and between and several and facts["sum_off"] <= slack
    # scores may lie between 0 and 1 by chance; where autograd names their origin, it decides
    squashed = call.made_by.startswith(("Sigmoid", "CompiledFunction")) or not call.made_by
    sigmoid = call.kind == "binary_cross_entropy_with_logits" and between and squashed
    spread = facts["high"] > facts["low"]
    kind = "softmax" if softmax else "sigmoid" if sigmoid and spread else None
    row = plain_row("double_softmax", "wrong" if kind else "ok", kind, at=call.kind)
    row |= {"low": number(facts["low"]), "high": number(facts["high"])}
    return row | {"value": number(facts["sum_off"]), "count": _numel(call.shape)}


def _target_rows(call: LossCall, facts: Mapping[str, float]) -> list[Row]:
    low, high, valid = facts["target_low"], facts["target_high"], facts["valid"]
    about: Row = {"at": call.kind, "count": None if isnan(valid) else int(valid)}
    about |= {"input_shape": _words(call.shape), "target_shape": _words(call.target_shape)}
    about |= {"low": number(low), "high": number(high), "from_batch": int(call.from_batch)}
    about["classes"] = _classes(call)
    if not _numel(call.target_shape):
        # as an empty batch has: nothing is wrong with what is not there
        return [plain_row("loss_target_mismatch", "unknown", "empty target", **about)]
    kind = _mismatch(call, facts)
    state = "wrong" if kind else "ok"
    if kind is None and call.from_batch and low == high and valid >= _FEW_LABELS:
        kind, state = "constant", "wrong"
    return [plain_row("loss_target_mismatch", state, kind, **about)]


def _mismatch(call: LossCall, facts: Mapping[str, float]) -> str | None:
    low, high = facts["target_low"], facts["target_high"]
    slack = 1e-3 if call.single else 2e-2
    if call.grows:
        return "shape"
    if facts["valid"] == 0:
        return "no target"
    if call.classes:
        size = _classes(call) or 1
        if size == 1:
            return "one class"
        if low < 0 or high >= size:
            return "out of range"
    if call.kind.startswith("binary") and (low < 0 or high > 1):
        return "out of range"
    if call.kind == "nll_loss" and (facts["high"] > slack or facts["log_off"] > 0.1):
        return "not log-probabilities"
    if call.kind == "poisson_nll_loss" and low < 0:
        return "negative counts"
    if call.kind == "kl_div" and facts["high"] > slack:
        return "not log-probabilities"
    if call.kind in DIFFERENCES:
        for name, lowest in _ENDS.items():
            beyond = high > 1 + _REACH or low < lowest - _REACH
            if call.made_by.startswith(name) and beyond and call.from_batch:
                return "out of reach"
    return None


def _prediction_rows(call: LossCall, facts: Mapping[str, float], place: int) -> list[Row]:
    """Whether predictions vary; a start that is the same for all is judged by later looks."""
    if isnan(facts["rows"]) or facts["rows"] < _FEW_SAMPLES or isnan(facts["spread"]):
        return []
    varied = facts["target_low"] < facts["target_high"]
    constant = varied and facts["size"] > 0 and facts["spread"] <= _CONSTANT * facts["size"]
    row = plain_row("constant_prediction", "wrong" if constant else "ok", at=call.kind)
    row |= {"call": place, "samples": int(facts["rows"]), "from_batch": int(call.from_batch)}
    row |= {"std": number(facts["spread"]), "abs_max": number(facts["size"])}
    row |= {"top_share": number(facts["top_share"])}
    row |= {"target_std": number(facts["target_spread"])}
    return [row | {"target_top_share": number(facts["target_top_share"])}]


def _classes(call: LossCall) -> int | None:
    if not call.classes or not call.shape:
        return None
    return call.shape[0] if len(call.shape) == 1 else call.shape[1]


def zero_rows(book: Book, looks: Mapping[str, int], subjects: Sequence[Subject]) -> list[Row]:
    """Rows of the parameters whose gradient was exactly zero at all looks."""
    rows: list[Row] = []
    by_looks: dict[int, list[Subject]] = {}
    for subject in subjects:
        if subject.name in looks:
            by_looks.setdefault(looks[subject.name], []).append(subject)
    for count, members in by_looks.items():
        rows += book.rows("unused_parameter", members, kind="zero", looks=count)
    return rows


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
