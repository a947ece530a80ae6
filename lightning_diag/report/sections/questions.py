"""Five questions that one asks of every run, answered with its own numbers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_diag.report.groups import Group
from lightning_diag.report.issue_words import what_is_wrong
from lightning_diag.report.question_series import (
    Series,
    loss_parts,
    part_weights,
    series,
    total_loss,
)
from lightning_diag.report.section import Section
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["QUESTIONS", "agreed", "questions_section"]

QUESTIONS = "Five questions"
"""Title of the section."""

_NEEDS = ("metrics", "loss", "latent", "hardware")
_FEW_POINTS = 4
_MANY_NOISES = 3  # the loss must move by so many distances between neighbours
_MANY_TIMES = 100  # growth of the gradient norm
_ADDS_UP = 0.05
_DOMINANT = 0.5
_SAME_COSINE = 0.99
_FEW_DIMENSIONS = 1.5
_SMALL_SHARE = 0.05
_MUCH_RISEN = 0.1  # of what the validation loss had fallen by
_MUCH_WAITING = 0.5
_SOME_WAITING = 0.2
_BUSY_GPU = 50.0
_FULL_MEMORY = 90.0


def questions_section(run: "Run") -> Section | None:
    """Is training healthy, which loss dominates, is the latent space alive, overfitting, hardware?

    Findings are judged by rules, elsewhere; these answers say what the logged numbers show, and
    where they cannot tell, why not.

    Args:
        run: What `read_run` returned.

    Returns:
        None where the run has no rows that bear on any of them.
    """
    if all(run.frame(prefix).is_empty() for prefix in _NEEDS):
        return None
    parts = loss_parts(run.frame("metrics"))
    answers = (
        f"Is training healthy? {_healthy(run)}",
        f"Which loss dominates? {_dominant(run, parts)}",
        *(f"Is the latent space alive? {answer}" for answer in _latents(run)),
        f"Is it overfitting? {_overfitting(run)}",
        f"Is the machine the limit? {_machine(run)}",
    )
    return Section(QUESTIONS, answers)


def agreed(sections: Sequence[Section], groups: Sequence[Group]) -> list[Section]:
    """The sections, in which the curves do not call healthy what the findings call sick.

    Args:
        sections: Those of a report.
        groups: What was found in the run.
    """
    return [_with_findings(one, groups) if one.title == QUESTIONS else one for one in sections]


def _with_findings(section: Section, groups: Sequence[Group]) -> Section:
    question, _, answer = section.lines[0].partition("? ")
    if not groups or answer.startswith("No"):
        return section
    found = what_is_wrong(groups[0].first)
    more = f", and {len(groups) - 1} more above" if len(groups) > 1 else ""
    alone = answer.replace(", as far as its curves show", "")
    line = f"{question}? No: {found}{more}. By its curves alone: {alone}"
    return replace(section, lines=(line, *section.lines[1:]))


def _healthy(run: "Run") -> str:
    stop = run.info.get("stop_reason")
    if isinstance(stop, Mapping):
        said = str(stop.get("message") or stop.get("rule")).rstrip(".")
        return f"No: {stop.get('diagnostic') or 'a diagnostic'} stopped the run: {said}."
    loss = _training_loss(run)
    if loss is None:
        return "Cannot be told: no training loss was logged, under a name such as `train_loss`."
    if loss.lost:
        return (
            f"No: `{loss.name}` was NaN or infinite at {len(loss.lost)} of "
            f"{len(loss.lost) + len(loss.points)} logged steps, first at step {loss.lost[0]}."
        )
    if len(loss.points) < _FEW_POINTS:
        steps = "1 step" if len(loss.points) == 1 else f"{len(loss.points)} steps"
        return f"Cannot be told: `{loss.name}` was logged at {steps} alone."
    start, end = loss.start, loss.end
    fallen = start.median - end.median
    went = (
        f"from {short(start.median)} ({start.words}) to {short(end.median)} ({end.words}, medians)"
    )
    bad, gradient = _gradient(run)
    if -fallen > _MANY_NOISES * loss.noise:
        return f"No: `{loss.name}` rose {went}; {gradient}."
    if bad:
        return f"No: {gradient}; `{loss.name}` went {went}."
    if fallen <= _MANY_NOISES * loss.noise:
        noise = f"its neighbours differ by {short(loss.noise)}"
        return f"Hardly: `{loss.name}` went {went}, and {noise}; {gradient}."
    return f"Yes, as far as its curves show: `{loss.name}` fell {went}; {gradient}."


def _training_loss(run: "Run") -> Series | None:
    """The loss that was logged, else the one that `CollapseStop` saw."""
    logged = total_loss(run.frame("metrics"))
    if logged is not None:
        return logged
    seen = series(run.frame("loss"), "loss")
    lost = [step for step, bad in series(run.frame("loss"), "nonfinite").points if bad]
    return Series("loss", seen.points, lost) if seen.points or lost else None


def _gradient(run: "Run") -> tuple[bool, str]:
    """Whether the gradient of the whole model is out of hand, and how it went."""
    frame = run.frame("grad")
    if "component" in frame.columns:
        frame = frame.filter(frame["component"].is_null())
    norm = series(frame, "l2")
    bad = [step for step, count in series(frame, "nonfinite").points if count]
    if bad or norm.lost:
        first = min([*bad, *norm.lost])
        return True, f"the gradient was NaN or infinite, first at step {first}"
    if not norm.points:
        return False, "no gradient was measured"
    start, end = norm.start, norm.end
    step, most = max(norm.points, key=lambda point: point[1])
    said = f"the gradient norm went from {short(start.median)} to {short(end.median)}"
    grown = end.median > _MANY_TIMES * start.median > 0
    return grown, f"{said}, at most {short(most)} at step {step}"


def _dominant(run: "Run", parts: Mapping[str, Series]) -> str:
    if not parts and _training_loss(run) is not None:
        return (
            "There is one loss, as far as the run shows: no parts of it were logged, under names "
            "such as `loss_image`."
        )
    if len(parts) < 2:
        number = "one part" if parts else "no part"
        return (
            f"Cannot be told: {number} of the loss was logged, under a name such as `loss_image`."
        )
    known = part_weights(run.config, parts)
    weights = {part: known.get(part, 1.0) for part in parts}
    ends = {part: weights[part] * one.end.mean for part, one in parts.items()}
    starts = {part: weights[part] * one.start.mean for part, one in parts.items()}
    mismatch = _mismatch(total_loss(run.frame("metrics")), ends, bool(known))
    if mismatch:
        return f"Cannot be told: {mismatch}."
    name, share = _shares(ends)[0]
    if share != share:
        return "Cannot be told: all parts are zero."
    first, share_before = _shares(starts)[0]
    listed = ", ".join(f"`{part}` {_percent(part_share)}" for part, part_share in _shares(ends))
    verdict = f"`{name}`" if share > _DOMINANT else "None"
    when = parts[name].end.words
    before = f"over {parts[first].start.words} the largest was `{first}` with"
    weighted = "times their weights" if known else "without weights, as none are configured"
    return (
        f"{verdict}: over {when} the loss consisted of {listed} (the parts {weighted}; of the "
        f"loss, not of its gradient); {before} {_percent(share_before)}."
    )


def _shares(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Each part's share, the largest first; NaN where all are zero."""
    whole = sum(abs(value) for value in values.values())
    shares = {part: abs(value) / whole if whole else float("nan") for part, value in values.items()}
    return sorted(shares.items(), key=lambda pair: -pair[1])


def _mismatch(loss: Series | None, ends: Mapping[str, float], weighted: bool) -> str:
    """Why the parts are not the whole; empty where they are, or where no whole was logged."""
    if loss is None or not loss.points:
        return ""
    whole, added = loss.end.mean, sum(ends.values())
    if abs(whole - added) <= _ADDS_UP * max(abs(whole), abs(added)):
        return ""
    how = "times their weights in the configuration" if weighted else "as they were logged"
    return (
        f"the parts {how} add up to {short(added)} over {loss.end.words}, and `{loss.name}` was "
        f"{short(whole)}: there are weights or parts that the run does not show"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _latents(run: "Run") -> Iterable[str]:
    frame = run.frame("latent")
    rows = [row for row in frame.to_dicts() if row.get("step") is not None]
    if not rows:
        return ["Cannot be told: `LatentStats` left no rows."]
    modules: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        modules.setdefault(str(row.get("component") or "model"), []).append(row)
    return [_alive(name, own) for name, own in modules.items()]


def _alive(name: str, rows: list[dict[str, Any]]) -> str:
    """By directions, not by the deviation of all elements: that is mostly the norm."""
    first, last = rows[0], rows[-1]
    if _number(last, "latent_norm") == 0:
        return f"No, it has collapsed: all of `{name}` is zero at {_at(last)}."
    rank, limit = _number(last, "effective_rank"), _number(last, "rank_limit")
    cosine, spread = _number(last, "mean_cosine"), _number(last, "std_ratio")
    if rank is None or cosine is None or not limit:
        return f"Cannot be told: the rows of `{name}` hold no rank or no cosine at {_at(last)}."
    features, dead = _number(last, "features"), _number(last, "dead_dimensions")
    said = f"`{name}` had effective rank {short(rank)} of at most {limit:.0f}"
    before = _number(first, "effective_rank")
    if before is not None and len(rows) > 1:
        said += f" at {_at(last)} ({short(before)} at {_at(first)})"
    else:
        said += f" at {_at(last)}"
    said += f", mean cosine between samples {short(cosine)}"
    if spread is not None:
        said += f", deviation of a dimension {short(spread)} of that of random directions"
    if dead and features:
        said += f", {dead:.0f} of {features:.0f} dimensions dead"
    if cosine > _SAME_COSINE or (rank < _FEW_DIMENSIONS and limit >= 2):
        return f"No, it has collapsed: {said}."
    few = rank < _SMALL_SHARE * limit or (dead and features and dead > features / 2)
    return f"{'In part' if few else 'Yes'}: {said}."


def _overfitting(run: "Run") -> str:
    metrics = run.frame("metrics")
    validation = total_loss(metrics, ("val", "valid", "validation"))
    training = _training_loss(run)
    if validation is None or not validation.points:
        return "Cannot be told: no validation loss was logged, under a name such as `val_loss`."
    if training is None or not training.points:
        return "Cannot be told: no training loss was logged, under a name such as `train_loss`."
    last_step, last = validation.points[-1]
    there = training.around(last_step)
    gap = f"`{validation.name}` was {short(last)} and `{training.name}` {short(there.median)}"
    if len(validation.points) == 1:
        return f"Cannot be told from one validation: {gap} at step {last_step}."
    step, best = min(validation.points, key=lambda point: point[1])
    fallen = validation.points[0][1] - best
    risen = last - best
    if step == last_step:
        # not the first one: the training loss falls fast there, and its window lags behind
        middle_step, middle = validation.points[len(validation.points) // 2]
        apart = short(middle - training.around(middle_step).median)
        return (
            f"No: `{validation.name}` was lowest at the end; at step {step} {gap}, which is "
            f"{short(last - there.median)} apart"
            + (f" ({apart} at step {middle_step})." if middle_step < last_step else ".")
        )
    then = training.around(step)
    went = (
        f"`{validation.name}` was lowest, {short(best)}, at step {step} and {short(last)} at step "
        f"{last_step}, while `{training.name}` went from {short(then.median)} to "
        f"{short(there.median)}"
    )
    if there.median >= then.median:
        return f"No: {went}, which did not fall any further."
    if risen <= _MUCH_RISEN * fallen:
        return f"Hardly: {went}."
    return f"Yes: {went}."


def _machine(run: "Run") -> str:
    frame = run.frame("hardware")
    names = (
        *("data_wait", "samples_per_second", "gpu_percent", "gpu_memory_percent"),
        *("cpu_percent", "memory_percent"),
    )
    found = {name: [value for _, value in series(frame, name).points] for name in names}
    middle = {name: statistics.median(values) for name, values in found.items() if values}
    if "data_wait" not in middle:
        return "Cannot be told: `HardwareMonitor` left no rows on the wait for data."
    wait = middle["data_wait"]
    said = [f"{_percent(wait)} of the time went between batches, mostly in waiting for data"]
    said += [f"{short(middle[name])} {words}" for name, words in _MACHINE.items() if name in middle]
    steps = series(frame, "data_wait").points
    numbers = f"{', '.join(said)} (medians of steps {steps[0][0]} to {steps[-1][0]})"
    memory = max(found["gpu_memory_percent"] or found["memory_percent"], default=0.0)
    full = f" Memory was nearly full: {short(memory)} %." if memory > _FULL_MEMORY else ""
    if wait > _SOME_WAITING:
        much = "Yes" if wait > _MUCH_WAITING else "In part"
        return f"{much}, its input: {numbers}.{full}"
    gpu = middle.get("gpu_percent")
    if gpu is None:
        return f"Not its input: {numbers}; no numbers of a GPU were recorded.{full}"
    idle = gpu < _BUSY_GPU
    return f"{'The GPU had little to do' if idle else 'The GPU was busy'}: {numbers}.{full}"


_MACHINE = {
    "samples_per_second": "samples per second",
    "gpu_percent": "% of the time with the GPU in use",
    "gpu_memory_percent": "% of its memory",
    "cpu_percent": "% of the processors in use",
}


def _at(row: Mapping[str, Any]) -> str:
    return f"step {row['step']}"


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    known = isinstance(value, int | float) and value == value
    return float(value) if known else None  # type: ignore[arg-type]
