"""collapse_report.json: a collapse told in one file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lightning_diag.callbacks.collapse_judge import Judge
from lightning_diag.lightning import rank_zero_only, rank_zero_warn
from lightning_diag.records import write_json

__all__ = ["write_collapse_report"]


@rank_zero_only
def write_collapse_report(
    path: Path,
    judge: Judge,
    *,
    collapsed: bool,
    total_steps: int,
    settings: Mapping[str, object],
    rollbacks: Sequence[Mapping[str, object]],
    nonfinite: Sequence[Mapping[str, object]],
    stop_reason: Mapping[str, object] | None,
) -> None:
    """Write the report whole; a disk that does not take it costs a warning.

    Args:
        path: The file.
        judge: What was seen.
        collapsed: Whether the run is in a collapse now.
        total_steps: Optimizer steps so far.
        settings: Further settings for ``config``.
        rollbacks: What was done about it.
        nonfinite: Where NaN and infinity came from.
        stop_reason: Why the run was stopped, if it was.
    """
    limits = judge.limits
    report = {
        "timestamp": datetime.now(UTC).isoformat(),
        "collapsed": collapsed,
        "total_steps": total_steps,
        "collapse_events": judge.events,
        "config": {
            "window_size": limits.window_steps,
            "collapse_threshold": limits.events_in_a_row,
            "grad_norm_epsilon": limits.gradient_norm_min,
            "grad_norm_max": limits.gradient_norm_max,
            "prediction_variance_min": limits.variance_min,
            "spike_factor": limits.spike_factor,
            "min_predictions": limits.min_predictions,
            "warmup_steps": limits.warmup_steps,
            "class_patience_steps": limits.class_patience_steps,
            **settings,
        },
        "statistics": {
            "total_collapse_events": judge.total,
            "max_consecutive_collapses": judge.longest,
            **{f"recent_{name}": list(values) for name, values in judge.recent.items()},
            "judged_steps": judge.judged,
            "events_left_out": judge.total - len(judge.events),
        },
        "rollbacks": list(rollbacks),
        "nonfinite": list(nonfinite),
        "stop_reason": stop_reason,
    }
    try:
        write_json(path, report)
    except OSError as error:
        rank_zero_warn(f"`{path}` cannot be written ({error.strerror or error}).")
