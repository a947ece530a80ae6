"""RunLogger: a Lightning logger that writes a run as rows of JSON in a folder of plain files."""

import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from json import JSONEncoder
from pathlib import Path
from typing import Any, cast

from lightning_diag.lightning import Logger, rank_zero_only, rank_zero_warn
from lightning_diag.records.hparams import plain_hparams
from lightning_diag.records.json_safe import Json, flat_row, json_safe
from lightning_diag.records.run_files import RunFiles
from lightning_diag.records.run_info import blank_attempt
from lightning_diag.records.secret_keys import mask_secrets

__all__ = ["RunLogger"]

_COLUMNS = frozenset({"step", "epoch", "time", "attempt"})
_ENDINGS = {"success": "finished"}
_encode = JSONEncoder(allow_nan=False, separators=(",", ":")).encode

Listener = Callable[[str, str], None]
"""Is told each row as it is written: its file's name, and its line of JSON."""


class RunLogger(Logger):
    """Writes what a run measures into one folder, so that nothing is lost when the run dies.

    ``records/<prefix>.jsonl`` holds one row a line, handed to the system as it is measured;
    ``run.json`` says what the run is and lists the attempts at it; ``config.yaml`` holds the
    hyper-parameters. A run that is resumed or restarted goes on in the same files under the next
    attempt number, and `read_run` leaves out the rows which that attempt replaces.

    Only the process of rank 0 writes. Where the disk is full or gone, one warning names the file,
    training goes on, and later rows are tried again; how many were lost becomes a note.

    Args:
        path: The folder of the run. Nothing is made before the first write.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> logger = RunLogger(folder.name)
        >>> logger.log_rows("grad", [{"component": "head", "l2": float("nan")}], step=0, epoch=0)
        >>> row = Path(folder.name, "records", "grad.jsonl").read_text()
        >>> row.partition('"attempt"')[2].strip()
        ':1,"component":"head","l2":null,"l2_nonfinite":1}'
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._session = uuid.uuid4().hex[:12]
        self._files = RunFiles(self.path)
        self._attempt: dict[str, Any] | None = None
        self._open = False
        self._begun = False
        self._last_step = 0
        self._listeners: list[Listener] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path)

    @property
    def root_dir(self) -> str:
        return str(self.path)

    @property
    def log_dir(self) -> str:
        return str(self.path)

    @rank_zero_only
    def begin(
        self,
        *,
        step: int,
        info: Mapping[str, object] | None = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        """Start an attempt at the run; again within the same fit, only merge `info`.

        Args:
            step: The optimizer step that comes next, 0 for a training from scratch. Rows that
                earlier attempts wrote from this step on are replaced by this attempt.
            info: Fields for run.json.
            positions: What `positions` gave when the checkpoint was saved from which this attempt
                goes on: rows before these bytes are kept whatever their step.

        Raises:
            TypeError: `info` holds a value of an unknown type.
        """
        fields = _fields(info or {})
        attempt = self._running(step)
        if not self._begun:
            self._begun = True
            known = {str(prefix): int(position) for prefix, position in (positions or {}).items()}
            resumed_at = known if positions is not None and self._files.fits(known) else None
            attempt.update(first_step=int(step), supersedes=True, resumed_at=resumed_at)
        self._files.save_info(fields, attempt)

    @rank_zero_only
    def log_rows(
        self, prefix: str, rows: Iterable[Mapping[str, object]], *, step: int, epoch: int
    ) -> None:
        """Append rows to ``records/<prefix>.jsonl``: all of them or, on a wrong type, none.

        Args:
            prefix: What the rows are about, a word in lower case.
            rows: Flat rows. ``component`` is the part of the model, None or absent the whole.
            step: Optimizer steps before the measured one.
            epoch: The epoch of that step.

        Raises:
            TypeError: A value is not flat, or its type unknown; the message names its key.
            ValueError: `prefix` is no word, or a row sets a column that the logger fills.
        """
        if not prefix.isidentifier() or not prefix.islower():
            raise ValueError(f"`prefix` must be a word in lower case, got {prefix!r}.")
        number = self._number(step)
        lines = [_line(row, step=step, epoch=epoch, attempt=number) for row in rows]
        for line in lines:
            self._append(prefix, line)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = self._last_step if step is None else int(step)
        self._last_step = step
        row = {
            f"metrics/{key}" if key in _COLUMNS or key == "component" else str(key): value
            for key, value in metrics.items()
            if key != "epoch"
        }
        epoch, number = _whole(metrics.get("epoch")), self._number(step)
        try:
            line = _line(row, step=step, epoch=epoch, attempt=number)
        except (TypeError, ValueError) as error:
            rank_zero_warn(f"A metric was left out: {error}")
            row = {key: value for key, value in row.items() if _is_recordable(key, value)}
            line = _line(row, step=step, epoch=epoch, attempt=number)
        self._append("metrics", line)

    @rank_zero_only
    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        try:
            plain = plain_hparams(params)
        except (TypeError, ValueError) as error:
            rank_zero_warn(f"The hyper-parameters were not recorded: {error}")
            return
        self._files.save_config(plain)

    @rank_zero_only
    def note(
        self,
        message: str,
        *,
        diagnostic: str,
        step: int = 0,
        component: str | None = None,
        severity: str = "info",
    ) -> None:
        """Append a remark for the reader of the run to ``records/notes.jsonl``.

        Args:
            message: One sentence.
            diagnostic: Who says it, a class name.
            step: The optimizer step it is about.
            component: The part of the model it is about, None for the whole.
            severity: ``info``, ``warning`` or ``critical``.
        """
        attempt = self._attempt or self._running(None)
        row = {
            "component": component,
            "diagnostic": diagnostic,
            "message": message,
            "severity": severity,
        }
        self._append("notes", _line(row, step=step, epoch=None, attempt=attempt["attempt"]))

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` every row from now on, on the process that writes.

        Returns:
            A function that ends it.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def positions(self) -> dict[str, int]:
        """Where the record files end now, for a checkpoint to keep and `begin` to receive.

        Returns:
            Bytes by prefix; empty on every rank but 0, and where nothing was written.
        """
        return self._positions() or {}

    @rank_zero_only
    def update_info(self, **fields: object) -> None:
        """Merge fields into run.json.

        Args:
            **fields: Values of the top level, such as ``data="sha256:..."``. A ``stop_reason``
                holds for the attempt that runs.

        Raises:
            TypeError: A value has an unknown type.
            ValueError: A field is ``attempts``, which the logger keeps.
        """
        plain = _fields(fields)
        if self._attempt is not None and "stop_reason" in plain:
            self._attempt["stop_reason"] = plain["stop_reason"]
        self._files.save_info(plain, self._attempt)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        failed = status == "failed"
        attempt = self._attempt if self._open else self._files.running(self._session)
        if attempt is None and failed and self._attempt is None:
            attempt = self._running(None)
        if attempt is None:
            return
        error = sys.exception() if failed else None
        if error is not None:
            attempt["stop_reason"] = _reason(error)
        # Lightning says "failed" of Ctrl-C and SIGTERM too
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            status = "interrupted"
        attempt.update(status=_ENDINGS.get(status, status), ended=time.time())
        self._files.save_info({}, attempt)
        self._attempt, self._open = attempt, False
        self._files.close()

    @rank_zero_only
    def _positions(self) -> dict[str, int]:
        return self._files.positions()

    def _running(self, first_step: int | None) -> dict[str, Any]:
        if self._open and self._attempt is not None:
            return self._attempt
        attempt = {**blank_attempt(self._session), "first_step": first_step}
        self._files.save_info({}, attempt)
        if attempt["attempt"] is None:
            attempt["attempt"] = 1
        self._attempt, self._open, self._begun = attempt, True, False
        return attempt

    def _number(self, step: int) -> int:
        attempt = self._running(int(step))
        if not attempt["supersedes"]:
            self._see(attempt, int(step))
        return int(attempt["attempt"])

    def _see(self, attempt: dict[str, Any], step: int) -> None:
        # without `begin` this may be a lone validation or test; a training goes on to later steps
        if attempt["first_step"] is None:
            attempt["first_step"] = step
        elif step > attempt["first_step"]:
            attempt["supersedes"] = True
        else:
            return
        self._files.save_info({}, attempt)

    def _append(self, prefix: str, line: str) -> None:
        for listener in self._listeners:
            listener(prefix, line)
        if not self._files.append(prefix, line) or not self._files.lost:
            return
        lost, self._files.lost = self._files.lost, Counter()
        rows = ", ".join(f"{count} of {name}.jsonl" for name, count in lost.items())
        message = f"Rows were lost while the disk took none: {rows}."
        self.note(message, diagnostic="RunLogger", step=self._last_step, severity="warning")
        if self._files.lost:
            self._files.lost += lost


def _fields(fields: Mapping[str, object]) -> dict[str, Json]:
    if "attempts" in fields:
        raise ValueError("`attempts` must be left to RunLogger, got it as a field of run.json.")
    return cast("dict[str, Json]", mask_secrets(json_safe(fields)))


def _line(row: Mapping[str, object], *, step: int, epoch: int | None, attempt: int) -> str:
    taken = _COLUMNS.intersection(row)
    if taken:
        raise ValueError(f"A row must leave `{min(taken)}` to RunLogger, got {row[min(taken)]!r}.")
    safe, counts = flat_row(row)
    line: dict[str, Json] = {
        "step": int(step),
        "epoch": None if epoch is None else int(epoch),
        "time": time.time(),
        "attempt": attempt,
        "component": safe.pop("component", None),
    }
    if not counts or safe.get("nonfinite"):
        return _encode({**line, **safe})
    for key, value in safe.items():
        line[key] = value
        if key in counts:
            line[f"{key}_nonfinite"] = counts[key]
    return _encode(line)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        # from another process: its last line is the error itself
        return text.splitlines()[-1][:500]
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:500]


def _whole(value: object) -> int | None:
    try:
        return int(value)  # type: ignore[call-overload,no-any-return]
    except (TypeError, ValueError, OverflowError):
        return None


def _is_recordable(key: str, value: object) -> bool:
    try:
        flat_row({key: value})
    except (TypeError, ValueError):
        return False
    return True
