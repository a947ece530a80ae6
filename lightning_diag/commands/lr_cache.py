"""`lightning-diag lr-cache`: the learning rates that were found before."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.records.files import write_bytes
from lightning_diag.report.words import short
from lightning_diag.tuning.lr_store import Entry, LRStore

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["app"]

app = typer.Typer(
    help="The learning rates that range tests found before.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Folder = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="The folder of the cache; your own cache folder by default.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first digits.")]
Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY", help="Keys or their first digits; all without."),
]
Picture = Annotated[
    Path | None, typer.Option("--png", metavar="OUT", help="Draw the curve into this PNG file.")
]
Older = Annotated[
    float | None, typer.Option("--older-than", metavar="HOURS", help="Keep the younger ones.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_DIGITS = 12
_WIDTH, _HEIGHT = 64, 12  # characters of the drawn curve


@app.command("list")
def list_entries(cache_dir: Folder = None, debug: Debug = False) -> None:
    """List what is stored, the newest first."""
    with plain_errors(debug):
        store = _store(cache_dir)
        entries = store.entries()
        if not entries:
            typer.echo(f"No learning rate is stored in {store.folder}.")
            return
        names = ("key", "age", "learning rate", "confidence", "model", "batch")
        rows = [
            (
                entry.key[:_DIGITS],
                _age(entry),
                short(entry.lr),
                entry.confidence,
                _shown(entry.parts.get("model")),
                _shown(entry.parts.get("batch")),
            )
            for entry in entries
        ]
        _print(_table(names, rows))


@app.command()
def show(key: Key, png: Picture = None, cache_dir: Folder = None, debug: Debug = False) -> None:
    """Show one entry: what was found, for what, and the curve."""
    with plain_errors(debug):
        if png is not None and png.suffix.lower() != ".png":
            raise UsageError(f"`--png` must name a file that ends in .png, got `{png}`.")
        store = _store(cache_dir)
        entry = _entry(store, key)
        facts = {
            "key": entry.key,
            "file": str(store.path(entry.key)),
            "created": f"{entry.created} ({_age(entry)} ago)",
            "learning rate": short(entry.lr),
            "confidence": entry.confidence,
            "slope": f"{short(entry.slope)} loss by factor e of the learning rate",
            "noise": f"{short(entry.noise)} loss",
            **{f"version of {name}": text for name, text in sorted(entry.versions.items())},
        }
        _print(_table(("found", ""), list(facts.items())))
        typer.echo()
        parts = [(name, _shown(value)) for name, value in sorted(entry.parts.items())]
        _print(_table(("for", ""), parts))
        typer.echo()
        if png is None:
            typer.echo(_drawn(entry.curve, entry.lr))
        else:
            _draw(entry, png)
            typer.echo(f"The curve is in {png}.")


@app.command()
def clear(
    keys: Keys = None,
    older_than: Older = None,
    yes: Yes = False,
    cache_dir: Folder = None,
    debug: Debug = False,
) -> None:
    """Remove entries: those named, or all, or the old ones of them."""
    with plain_errors(debug):
        store = _store(cache_dir)
        if not keys and not yes:
            which = (
                "all entries" if older_than is None else f"all entries older than {older_than:g} h"
            )
            typer.confirm(f"Remove {which} of {store.folder}?", abort=True)
        try:
            count = store.clear(keys or None, older_than_hours=older_than)
        except ValueError as error:
            raise UsageError(str(error)) from error
        typer.echo(f"{count} {'entry was' if count == 1 else 'entries were'} removed.")


def _store(folder: Path | None) -> LRStore:
    try:
        return LRStore(folder, math.inf)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _entry(store: LRStore, beginning: str) -> Entry:
    try:
        key = store.full_key(beginning)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for entry in store.entries():
        if entry.key == key:
            return entry
    raise UsageError(f"`{store.path(key)}` is corrupt, or of another version of this package.")


def _age(entry: Entry) -> str:
    hours = entry.age_hours
    if abs(hours) < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if abs(hours) < 48 else f"{hours / 24:.1f} days"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(one) for one in value)
    return "-" if value is None else str(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def _drawn(curve: Mapping[str, Sequence[float]], lr: float) -> str:
    """The curve in characters: `.` a loss, `#` the smoothed one, `|` the suggestion."""
    rates, smoothed = [math.log10(rate) for rate in curve["lr"]], curve["smoothed"]
    left, right = min(rates), max(rates)
    values = [*curve["loss"], *smoothed]
    low, high = min(values), max(values)

    def column(rate: float) -> int:
        share = (rate - left) / (right - left) if right > left else 0.5
        return min(max(round(share * (_WIDTH - 1)), 0), _WIDTH - 1)

    def line(loss: float) -> int:
        share = (high - loss) / (high - low) if high > low else 0.5
        return round(share * (_HEIGHT - 1))

    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for row in grid:
        row[column(math.log10(lr))] = "|"
    for mark, losses in ((".", curve["loss"]), ("#", smoothed)):
        for rate, loss in zip(rates, losses, strict=True):
            grid[line(loss)][column(rate)] = mark
    labels = [f"{high:.4g}", *[""] * (_HEIGHT - 2), f"{low:.4g}"]
    wide = max(map(len, labels))
    lines = [
        f"{label:>{wide}} {''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)
    ]
    first, last = f"{10**left:.3g}", f"{10**right:.3g}"
    middle = "learning rate, log scale".center(_WIDTH - len(first) - len(last))
    return "\n".join(
        [
            f"loss ('.'), smoothed ('#'), suggestion ('|' at {lr:.3g})",
            *lines,
            f"{'':{wide}} {first}{middle}{last}",
        ]
    )


def _draw(entry: Entry, path: Path) -> None:
    from lightning_diag.report.sections.learning_rate import learning_rate_chart

    chart = learning_rate_chart(entry.curve, entry.lr, title=f"LR range test {entry.key[:_DIGITS]}")
    write_bytes(path, _png(chart))


def _png(chart: Any) -> bytes:  # noqa: ANN401 - the annotations of Altair do not fit one another
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    spec = chart.to_dict(validate=False)
    picture: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    return picture
