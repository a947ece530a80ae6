"""Where attention went: entropy over the run, by module, head and query."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart, points_by
from lightning_diag.report.words import short

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["attention_section", "head_entropy"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_MOST_ROWS = 30
_MOST_HEADS = 12
_MOST_MODULES = 8
_MOST_LINES = 10
_VERDICTS = {
    "peaked": "one key has nearly all the weight",
    "sink": "the first key has most of the weight",
    "uniform": "no key is preferred",
    "duplicate": "the same map as another head",
}


def attention_section(run: "Run") -> Section | None:
    """Entropy and its trend, one line a module, the drivers of each query, and remarkable heads.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `AttentionCapture` wrote nothing.
    """
    frame = run.frame("attention")
    if frame.is_empty() or not {"step", "component"} <= set(frame.columns):
        return None
    rows = frame.to_dicts()
    modules: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["component"] is not None:
            modules.setdefault(str(row["component"]), []).append(row)
    whole = [row for row in rows if row["component"] is None]
    if not modules:
        return Section("Attention", lines=("No attention was seen.",))
    tables = [
        _module_table(modules),
        _query_table(run.frame("attention_query")),
        _head_table(run.frame("attention_head")),
    ]
    return Section(
        "Attention",
        lines=tuple(_lines(whole, modules)),
        tables=tuple(table for table in tables if table.rows),
        charts={
            "attention_entropy": _chart(frame),
            **_named("attention_heads", head_entropy(run.frame("attention_head"))),
        },
    )


def head_entropy(frame: "pl.DataFrame") -> Chart | None:
    """Entropy of each head over the run, one panel a module.

    Of many modules those are drawn whose heads differ most at the end, of many heads the ones at
    both ends.

    Args:
        frame: The rows of ``attention_head``.

    Returns:
        None where there is no entropy of heads.
    """
    domain: tuple[float, float] | None = (0.0, 1.0)
    value, label = "entropy_normalized", "share of the largest entropy"
    if value not in frame.columns or frame[value].null_count() == len(frame):
        value, label, domain = "entropy", "entropy (nats)", None
    if not {"step", "component", "head", value} <= set(frame.columns):
        return None
    modules: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for (module,), own in frame.group_by(["component"], maintain_order=True):
        if module is not None:
            heads = points_by(own, value, by="head", whole="?")
            modules[str(module)] = {
                f"head {head}": heads[head] for head in sorted(heads, key=_place)
            }
    modules = {module: heads for module, heads in modules.items() if _ends(heads)}
    if not modules:
        return None
    widest = sorted(modules, key=lambda module: -_spread(modules[module]))[:_MOST_MODULES]
    said = ["1 is uniform, 0 a single key."] if domain else []
    if len(widest) < len(modules):
        said.append(f"{len(widest)} of {len(modules)} modules, those whose heads differ most.")
    if any(len(heads) > _MOST_LINES for heads in modules.values()):
        said.append(f"Of each module the {_MOST_LINES} heads with the least and the most.")
    panels = [
        Panel(label, _outermost(modules[module]), domain=domain, height=130, title=module)
        for module in modules
        if module in widest
    ]
    return line_chart("Entropy of attention by head", panels, said=said, columns=2)


def _place(head: str) -> tuple[float, str]:
    return (float(head) if head.isdecimal() else math.inf), head


def _ends(heads: Mapping[str, Sequence[tuple[float, float | None]]]) -> dict[str, float]:
    """The last number of each head that has any."""
    found = {}
    for head, points in heads.items():
        known = [value for _, value in points if value is not None and math.isfinite(value)]
        if known:
            found[head] = known[-1]
    return found


def _spread(heads: Mapping[str, Sequence[tuple[float, float | None]]]) -> float:
    ends = _ends(heads).values()
    return max(ends) - min(ends)


def _outermost(
    heads: Mapping[str, list[tuple[float, float | None]]],
) -> dict[str, list[tuple[float, float | None]]]:
    ends = _ends(heads)
    order = sorted(ends, key=lambda head: ends[head])
    half = _MOST_LINES // 2
    kept = order if len(order) <= _MOST_LINES else [*order[:half], *order[-half:]]
    return {head: points for head, points in heads.items() if head in kept}


def _named(name: str, chart: Chart | None) -> dict[str, Chart]:
    return {} if chart is None else {name: chart}


def _lines(whole: Sequence[dict[str, Any]], modules: dict[str, Any]) -> list[str]:
    lines = []
    entropy, normalized = _known(whole, "entropy"), _known(whole, "entropy_normalized")
    if entropy:
        words = (
            f"Mean entropy over {_count(len(modules), 'module')} is {short(_mean(entropy))} nats"
        )
        if normalized:
            share = _mean(normalized)
            words += f", {share:.0%} of the largest possible" if share is not None else ""
        lines.append(f"{words}.")
    lines += _trend(entropy)
    lines.append("Entropy says how widely a head looks, not how important what it looks at is.")
    empty = sum(row.get("captured") == 0 for row in whole)
    if empty:
        lines.append(f"At {_count(empty, 'measured step')} no attention was seen.")
    return lines


def _trend(values: Sequence[float]) -> list[str]:
    """First against last third."""
    third = len(values) // 3
    if third < 1:
        return []
    first, last = _mean(values[:third]), _mean(values[-third:])
    if first is None or last is None or not first:
        return []
    change = last / first - 1
    if abs(change) < 0.01:
        return [f"It stays at {short(last)} nats from the first to the last third of the run."]
    verb = "rises" if change > 0 else "falls"
    return [
        f"It {verb} from {short(first)} to {short(last)} nats ({change:+.0%}) from the first to "
        "the last third of the run."
    ]


def _module_table(modules: dict[str, list[dict[str, Any]]]) -> Table:
    rows = []
    for name, own in list(modules.items())[:_MOST_ROWS]:
        last = own[-1]
        counts = [(last.get(f"heads_{verdict}") or 0, verdict) for verdict in _VERDICTS]
        heads = last.get("heads")
        cells = [short(_mean(_known(own, key))) for key in ("entropy", "entropy_normalized", "max")]
        shares = [_percent(_mean(_known(own, key))) for key in ("peaked_share", "sink_share")]
        remarkable = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
        rows.append(
            (name, *cells, *shares, "-" if heads is None else str(heads), remarkable or "-")
        )
    columns = (
        *("module", "entropy, nats", "of ln(keys)", "largest weight", "rows > 0.9", "on key 0"),
        *("heads", "verdicts at the end"),
    )
    return Table(columns, rows, title=_title("Mean over the run, by module", len(modules)))


def _query_table(frame: "pl.DataFrame") -> Table:
    """What each named query looks at: numbers over the run, drivers at its end."""
    columns = ("module", "query", "entropy, nats", "mean", "spread", "max", "top keys at the end")
    if frame.is_empty() or not {"step", "component", "query"} <= set(frame.columns):
        return Table(columns, [], left=2)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in frame.to_dicts():
        if row["component"] is not None and row["query"] is not None:
            groups.setdefault((str(row["component"]), row["query"]), []).append(row)
    rows = []
    for (name, query), own in list(groups.items())[:_MOST_ROWS]:
        label = own[-1].get("name")
        cells = [short(_mean(_known(own, key))) for key in ("entropy", "mean", "std", "max")]
        rows.append((name, str(query if label is None else label), *cells, _drivers(own[-1])))
    title = _title("By query", len(groups))
    return Table(columns, rows, title=title, left=2)


def _drivers(row: dict[str, Any]) -> str:
    found = []
    for rank in range(1, 6):
        key, mass = row.get(f"key_{rank}"), row.get(f"mass_{rank}")
        if key is None or mass is None:
            break
        name = row.get(f"name_{rank}")
        found.append(f"{f'key {key}' if name is None else name} {_percent(mass)}")
    return ", ".join(found) or "-"


def _head_table(frame: "pl.DataFrame") -> Table:
    """Heads with a verdict at the last measured step."""
    columns = ("verdict", "meaning", "module", "heads")
    if frame.is_empty() or not {"step", "component", "head", "verdict"} <= set(frame.columns):
        return Table(columns, [], left=3)
    groups: dict[tuple[str, str], list[int]] = {}
    for row in frame.filter(frame["step"] == frame["step"].max()).to_dicts():
        if row["verdict"] in _VERDICTS and row["head"] is not None:
            place = (row["verdict"], str(row["component"]))
            groups.setdefault(place, []).append(int(row["head"]))
    order = list(_VERDICTS)
    places = sorted(groups, key=lambda place: order.index(place[0]))
    rows: list[tuple[str, ...]] = [
        (verdict, _VERDICTS[verdict], module, _listed(groups[verdict, module]))
        for verdict, module in places[:_MOST_ROWS]
    ]
    return Table(columns, rows, title=_title("Heads by verdict, at the end", len(places)), left=3)


def _chart(frame: "pl.DataFrame") -> Chart:
    panels = [
        Panel("entropy (nats)", points_by(frame, "entropy")),
        Panel(
            "share of the largest entropy",
            points_by(frame, "entropy_normalized"),
            domain=(0.0, 1.0),
        ),
    ]
    said = ["mean over heads and rows; in the lower panel 1 is uniform, 0 a single key"]
    return line_chart("Entropy of attention", panels, said=said)


def _known(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    values = [row.get(key) for row in rows]
    return [float(x) for x in values if isinstance(x, int | float) and math.isfinite(x)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _listed(heads: Sequence[int]) -> str:
    shown = ", ".join(str(head) for head in sorted(heads)[:_MOST_HEADS])
    more = len(heads) - _MOST_HEADS
    return f"{shown} and {more} more" if more > 0 else shown


def _title(words: str, count: int) -> str:
    return words if count <= _MOST_ROWS else f"{words} (first {_MOST_ROWS} of {count})"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
