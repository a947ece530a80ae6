"""What CollapseStop thinks of one step, given those before it: plain numbers, no tensors."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lightning_diag.callbacks.base import Row
from lightning_diag.functional.collapse_stop import BINS, PREDICTION_FIELDS, STEP_FIELDS

__all__ = ["HARD", "Judge", "Limits", "Numbers", "Verdict"]

HARD = ("nonfinite_loss", "nonfinite_gradient")
_MOST_EVENTS = 100
_SUMS = 6
# shares of the window: of labels that are missed, of predictions of another class
_MISSED = 0.1


@dataclass(frozen=True)
class Limits:
    """Where a step becomes an event, see the arguments of `CollapseStop`."""

    events_in_a_row: int
    window_steps: int
    gradient_norm_min: float
    gradient_norm_max: float
    variance_min: float
    spike_factor: float
    min_predictions: int
    warmup_steps: int
    class_patience_steps: int


class Numbers(NamedTuple):
    """One step, read from the device.

    Attributes:
        step: The step.
        values: `STEP_FIELDS`, by name.
        bins: How often each class was predicted.
        has_scaler: Whether a gradient scaler is at work.
    """

    step: int
    values: dict[str, float]
    bins: list[int]
    has_scaler: bool

    @classmethod
    def of(cls, step: int, values: Sequence[float], has_scaler: bool) -> "Numbers":
        """From what `merge_steps` gave, as a list."""
        named = dict(zip(STEP_FIELDS, values, strict=False))
        return cls(step, named, list(map(int, values[-BINS:])), has_scaler)

    @property
    def norm(self) -> float | None:
        """Norm of all gradients; None where there is none."""
        return math.sqrt(self.values["sum_sq"]) if self.values["tensors"] else None

    @property
    def loss(self) -> float | None:
        """The loss; None where there is none."""
        return self.values["loss"] if self.values["losses"] else None

    @property
    def skipped(self) -> bool:
        """Whether the scaler skips this step because its scale is too large."""
        bad = self.values["nan"] + self.values["inf"] > 0
        return bad and self.has_scaler and self.values["scale"] > 1


@dataclass(frozen=True)
class Verdict:
    """What is thought of one step.

    Attributes:
        step: The step.
        kinds: The events, most severe first; none on a healthy step.
        streak: Events in a row up to this step.
        ended: Length of the streak that this step has ended, else 0.
        collapsed: Whether there are enough events in a row.
        first_step: Step of the first event of the streak.
        row: The numbers, for a row of records.
        observed: What was observed and its limit, for each kind.
    """

    step: int
    kinds: tuple[str, ...]
    streak: int
    ended: int
    collapsed: bool
    first_step: int
    row: Row
    observed: dict[str, tuple[float | None, float | None]]


@dataclass
class Judge:
    """Judges steps in their order, and remembers what it needs for that.

    A step that the scaler skips is no event, and neither goes on with a streak nor ends it. Within
    the warm-up, and for a while after a rollback, only what is not finite is an event.

    Args:
        limits: The limits.

    Attributes:
        events: The first hundred events, then the last hundred, as collapse_report.json lists them.
        total: Number of events so far.
        longest: Longest streak so far.
        judged: Number of steps judged.
        quiet_until: Step before which only what is not finite counts.
        had_classes: Whether the predictions of a window have been of several classes.
        well: Whether nothing at all was found in the last step, not even what does not count yet.
    """

    limits: Limits
    judged: int = 0
    total: int = 0
    streak: int = 0
    longest: int = 0
    first_step: int = 0
    quiet_until: int = 0
    well: bool = True
    one_class_steps: int = 0
    first_events: list[dict[str, Any]] = field(default_factory=list)
    last_events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))

    def __post_init__(self) -> None:
        size = self.limits.window_steps
        self.quiet_until = self.limits.warmup_steps
        self._finite_losses: deque[float] = deque(maxlen=size)
        self._batches: deque[list[float]] = deque()
        self.recent: dict[str, deque[float | None]] = {
            name: deque(maxlen=size) for name in ("grad_norms", "losses", "prediction_variances")
        }

    @property
    def events(self) -> list[dict[str, Any]]:
        return [*self.first_events, *self.last_events]

    def see(self, numbers: Numbers) -> Verdict:
        """Judge one step."""
        gradient = self._gradient(numbers)
        loss, mean = self._loss(numbers)
        prediction = self._prediction(numbers)
        checks = {"gradient_check": gradient, "prediction_check": prediction, "loss_check": loss}
        found = {
            "nonfinite_loss": loss["is_nan"] or loss["is_inf"],
            "nonfinite_gradient": gradient["has_nan_inf"] and not numbers.skipped,
            "exploding_gradient": gradient["is_exploding_grad"] and not numbers.skipped,
            # a loss of exactly 0 has nothing left to teach: every margin is met
            "vanishing_gradient": gradient["is_zero_grad"] and numbers.loss != 0,
            "loss_spike": loss["is_spike"],
            "constant_prediction": prediction["is_constant"],
            "one_class": prediction["is_mode_collapse"],
        }
        self.well = not any(found.values())
        quiet = numbers.step < self.quiet_until
        kinds = tuple(kind for kind, yes in found.items() if yes and (kind in HARD or not quiet))
        families = {
            "gradient_check": ("nonfinite_gradient", "exploding_gradient", "vanishing_gradient"),
            "prediction_check": ("one_class", "constant_prediction"),
            "loss_check": ("nonfinite_loss", "loss_spike"),
        }
        for name, family in families.items():
            checks[name]["collapse_detected"] = any(kind in kinds for kind in family)
        ended = self._count(numbers, kinds)
        if kinds:
            self._remember(numbers.step, loss["loss"], checks)
        limits = self.limits
        return Verdict(
            step=numbers.step,
            kinds=kinds,
            streak=self.streak,
            ended=ended,
            collapsed=self.streak >= limits.events_in_a_row and bool(kinds),
            first_step=self.first_step,
            row=self._row(numbers, kinds, prediction, mean),
            observed={
                "nonfinite_loss": (loss["loss"], None),
                "nonfinite_gradient": (gradient["total_norm"], None),
                "exploding_gradient": (gradient["total_norm"], limits.gradient_norm_max),
                "vanishing_gradient": (gradient["total_norm"], limits.gradient_norm_min),
                "loss_spike": (loss["loss"], None if mean is None else limits.spike_factor * mean),
                "one_class": (prediction["unique_predictions"], 2),
                "constant_prediction": (prediction["variance"], limits.variance_min),
            },
        )

    def start_anew(self, quiet_until: int) -> None:
        """After a rollback: no streak and empty windows; soft events count from a later step."""
        self.streak, self.well = 0, True
        self.quiet_until = max(quiet_until, self.quiet_until)
        self._finite_losses.clear()
        self._batches.clear()

    def state(self) -> dict[str, Any]:
        """The memory, in primitives."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "first_events": list(self.first_events),
            "last_events": list(self.last_events),
            "finite_losses": list(self._finite_losses),
            "batches": [list(batch) for batch in self._batches],
            "recent": {name: list(values) for name, values in self.recent.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a memory; windows keep what fits into them."""
        for name in _COUNTERS:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.quiet_until = max(self.quiet_until, self.limits.warmup_steps)
        self.first_events = list(state["first_events"])
        self.last_events.extend(state["last_events"])
        self._finite_losses.extend(state["finite_losses"])
        self._batches.extend(state["batches"])
        for name, values in state["recent"].items():
            self.recent[name].extend(values)

    # ---- the three checks, each in the words of the report ----

    def _gradient(self, numbers: Numbers) -> dict[str, Any]:
        norm, values = numbers.norm, numbers.values
        self.recent["grad_norms"].append(norm)
        return {
            "total_norm": norm,
            "num_params": int(values["tensors"]),
            "zero_grad_params": int(values["zero"]),
            "nan_grad_params": int(values["nan"]),
            "inf_grad_params": int(values["inf"]),
            "is_zero_grad": norm is not None and norm < self.limits.gradient_norm_min,
            "is_exploding_grad": norm is not None and norm > self.limits.gradient_norm_max,
            "has_nan_inf": values["nan"] + values["inf"] > 0,
            "skipped_by_scaler": numbers.skipped,
        }

    def _loss(self, numbers: Numbers) -> tuple[dict[str, Any], float | None]:
        loss, before = numbers.loss, self._finite_losses
        mean = sum(before) / len(before) if len(before) > 1 else None
        finite = loss is not None and math.isfinite(loss)
        # of losses of both signs the mean may be near zero, and ten times it says nothing
        spike = (
            mean is not None
            and min(before) > 0
            and loss is not None
            and math.inf > loss > mean * self.limits.spike_factor
        )
        if loss is not None and finite:
            before.append(loss)
        self.recent["losses"].append(loss)
        check = {
            "loss": loss,
            "is_nan": loss is not None and math.isnan(loss),
            "is_inf": loss is not None and math.isinf(loss),
            "is_spike": spike,
        }
        return check, mean

    def _prediction(self, numbers: Numbers) -> dict[str, Any]:
        batch = [numbers.values[name] for name in PREDICTION_FIELDS]
        if batch[2]:
            self._batches.append([*batch, *map(float, numbers.bins)])
        enough, size = self.limits.min_predictions, self.limits.window_steps
        while len(self._batches) > size and sum(b[2] for b in list(self._batches)[1:]) >= enough:
            self._batches.popleft()
        variance = self._variance() if batch[2] else None
        self.recent["prediction_variances"].append(variance)
        merged = _merged(list(self._batches))
        one_label = merged["highest_label"] == -merged["lowest_label"]
        knows = (
            bool(batch[2])
            and len(self._batches) >= size
            and merged["predictions"] >= enough
            and not merged["odd_labels"]
            and not one_label
            and merged["misses"] > _MISSED * merged["labels"]
        )
        one_class = merged["highest"] == -merged["lowest"]
        bins = merged["bins"]
        total, unique = sum(bins), BINS - bins.count(0)
        # classes beyond the bins share them: two at least, where the ends differ
        unique = unique if one_class or not self._batches else max(2, unique)
        top = max(bins) / total if total else None
        # to predict the majority for a while is how many healthy classifiers begin
        self.one_class_steps = self.one_class_steps + 1 if knows and one_class else 0
        lasted = self.one_class_steps + size - 1 if self.one_class_steps else 0
        return {
            "variance": variance,
            "unique_predictions": unique,
            "is_constant": variance is not None and variance < self.limits.variance_min,
            "is_mode_collapse": lasted > self.limits.class_patience_steps,
            "predictions": int(merged["predictions"]),
            "top_share": top,
            "labels_known": merged["labels"] > 0 and not merged["odd_labels"],
        }

    def _variance(self) -> float | None:
        """Within batches, over the fewest last ones that have predictions enough."""
        deviations = freedom = rows = 0.0
        for batch in reversed(self._batches):
            deviations, freedom, rows = deviations + batch[0], freedom + batch[1], rows + batch[2]
            if rows >= self.limits.min_predictions:
                return deviations / freedom if freedom else None
        return None

    def _count(self, numbers: Numbers, kinds: tuple[str, ...]) -> int:
        """Go on with the streak or end it; returns the length of the one that ended."""
        self.judged += 1
        if kinds:
            self.first_step = self.first_step if self.streak else numbers.step
            self.streak += 1
            self.total += 1
            self.longest = max(self.longest, self.streak)
            return 0
        if numbers.skipped:
            return 0
        ended, self.streak = self.streak, 0
        return ended

    def _remember(self, step: int, loss: float | None, checks: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat()
        event = {"step": step, "timestamp": now, "loss": loss, **checks}
        full = len(self.first_events) >= _MOST_EVENTS
        (self.last_events if full else self.first_events).append(event)

    def _row(
        self,
        numbers: Numbers,
        kinds: tuple[str, ...],
        prediction: dict[str, Any],
        mean: float | None,
    ) -> Row:
        return {
            "event": int(bool(kinds)),
            "kinds": ",".join(kinds) or None,
            "streak": self.streak,
            "events_total": self.total,
            "gradient_norm": numbers.norm,
            "skipped": int(numbers.skipped),
            "loss": numbers.loss,
            "loss_before": mean,
            "variance": prediction["variance"],
            "unique_predictions": prediction["unique_predictions"] or None,
            "top_share": prediction["top_share"],
            "predictions": prediction["predictions"],
        }


_COUNTERS = (
    "judged",
    "total",
    "streak",
    "longest",
    "first_step",
    "quiet_until",
    "well",
    "one_class_steps",
)


def _merged(batches: list[list[float]]) -> dict[str, Any]:
    """The batches of the window taken together."""
    if not batches:
        return {**dict.fromkeys(PREDICTION_FIELDS, 0.0), "bins": [0.0] * BINS}
    columns = list(zip(*batches, strict=True))
    size = len(PREDICTION_FIELDS)
    merged: dict[str, Any] = {
        name: sum(columns[place]) if place < _SUMS else max(columns[place])
        for place, name in enumerate(PREDICTION_FIELDS)
    }
    merged["bins"] = list(map(sum, columns[size:]))
    return merged
