"""Learning rates that were found before: a folder with one JSON file a search."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_diag.tuning.lr_store_entry import (
    KEY_DIGITS,
    CorruptError,
    Entry,
    decoded,
    differences,
    encoded,
    key_of,
    sentence,
)
from lightning_diag.tuning.lr_store_files import locked, sweep, write_whole

__all__ = ["Entry", "LRStore", "key_of"]

_AHEAD_HOURS = 1.0
_STALE_SECONDS = 60.0  # younger ones may be just about to be locked
_ENTRY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")
_ASIDE = ".json.corrupt"


class LRStore:
    """The entries in one folder, which any number of processes may use at once.

    Nothing is made on disk before the first `lock` or `write`. An entry is too old to be read after
    `max_age_hours`; one from more than an hour ahead of this machine's clock is not read either,
    since its age is unknown. Both stay until they are replaced or cleared.

    Args:
        folder: Where the entries are; None for the user's own cache folder.
        max_age_hours: How old an entry may be, in hours; `inf` for any age.

    Raises:
        TypeError: `max_age_hours` is no number.
        ValueError: `max_age_hours` is not above 0, or `folder` is a file.

    Example:
        >>> LRStore("/nowhere").read(key_of({"batch": 64})) is None
        True
    """

    def __init__(self, folder: Path | str | None = None, max_age_hours: float = 168.0) -> None:
        if isinstance(max_age_hours, bool) or not isinstance(max_age_hours, int | float):
            raise TypeError(f"`max_age_hours` must be a number, got {max_age_hours!r}.")
        if math.isnan(max_age_hours) or max_age_hours <= 0:
            raise ValueError(f"`max_age_hours` must be above 0, got {max_age_hours}.")
        # absolute, since a sweep changes the working folder
        self.folder = (_default() if folder is None else Path(folder).expanduser()).absolute()
        if self.folder.is_file():
            raise ValueError(f"`folder` must be a folder, got {folder}, which is a file.")
        self.max_age_hours = float(max_age_hours)

    def path(self, key: str) -> Path:
        """The file of an entry.

        Args:
            key: What `key_of` returned.

        Raises:
            ValueError: It is no key, so that no path outside of the folder can come of it.
        """
        if not isinstance(key, str) or not _ENTRY.fullmatch(key):
            raise ValueError(f"A key must be {KEY_DIGITS} hexadecimal digits, got {key!r}.")
        return self.folder / f"{key}.json"

    def read(self, key: str) -> Entry | None:
        """The entry of a key.

        A corrupt file is renamed to `<key>.json.corrupt`, with a warning. One that a version of
        this package with another format wrote is left as it is, until it is replaced.

        Args:
            key: What `key_of` returned.

        Returns:
            The entry; None where there is none, or none that is young enough and whole.
        """
        path = self.path(key)
        try:
            entry = _load(path)
        except CorruptError as error:
            self._set_aside(path, error)
            return None
        except OSError as error:
            said = error.strerror or error
            warnings.warn(f"`{path}` cannot be read ({said}): it is passed over.", stacklevel=2)
            return None
        return entry if entry is not None and self._usable(entry) else None

    def write(self, entry: Entry) -> None:
        """Store an entry in place of an older one of its key.

        A process that is killed meanwhile leaves no entry or a whole one.

        Args:
            entry: What was found.

        Raises:
            OSError: The folder cannot be written, or the disk is full.
        """
        write_whole(self.path(entry.key), encoded(entry))

    def difference(self, parts: Mapping[str, object]) -> str | None:
        """Why these parts find no entry: in what they differ from the entry most like them.

        Args:
            parts: What a key was made of.

        Returns:
            Of the entries young enough, the one with the fewest other parts, as
            `batch: 64 -> 32, seed: 1 -> 2`; the newest of several. Where only the age is in the
            way, or all are too old, that is said. None for an empty store, or where nothing
            differs.
        """
        found = [(differences(entry.parts, parts), entry) for entry in self.entries()]
        same = next((entry for unlike, entry in found if not unlike), None)
        if same is not None:
            return None if self._usable(same) else f"the entry is expired: {self._age(same)}"
        usable = [one for one in found if self._usable(one[1])]
        if not found:
            return None
        unlike, nearest = min(usable or found, key=lambda one: len(one[0]))
        old = "" if usable else f" (and that entry is expired: {self._age(nearest)})"
        return sentence(unlike) + old

    def entries(self) -> list[Entry]:
        """All entries, the newest first, also those that are too old; no corrupt ones."""
        found = []
        for path in self._files():
            with suppress(CorruptError, OSError):
                entry = _load(path)
                if entry is not None:
                    found.append(entry)
        return sorted(found, key=lambda entry: (entry.age_hours, entry.key))

    def full_key(self, beginning: str) -> str:
        """The key of the one file that begins so.

        Args:
            beginning: The first digits of a key, or all of them.

        Raises:
            ValueError: It is no beginning of a key, or that of none or of several.
        """
        if not re.fullmatch(rf"[0-9a-f]{{1,{KEY_DIGITS}}}", beginning):
            raise ValueError(f"A key must be hexadecimal digits, got {beginning!r}.")
        keys = [path.stem for path in self._files() if path.stem.startswith(beginning)]
        if not keys:
            raise ValueError(f"No entry has a key that begins with `{beginning}`.")
        if len(keys) > 1:
            raise ValueError(
                f"A key must be told from the others, got `{beginning}`, with which {len(keys)} "
                "begin."
            )
        return keys[0]

    def clear(
        self, keys: Iterable[str] | None = None, *, older_than_hours: float | None = None
    ) -> int:
        """Remove entries, readable or not, and lock files that no process holds.

        Args:
            keys: Keys or their beginnings; None for all entries, and what was set aside.
            older_than_hours: Keep what is not older than that; what cannot be read is as old as
                its file.

        Returns:
            How many entries were removed, with those that had been set aside.

        Raises:
            ValueError: A key is none, or names no entry; or an age is negative. Nothing is removed.
            OSError: An entry cannot be removed.
        """
        if older_than_hours is not None and not older_than_hours >= 0:
            raise ValueError(f"`older_than_hours` must be at least 0, got {older_than_hours}.")
        if keys is None:
            paths = [*self._files(), *self._aside()]
        else:
            paths = [self.path(key) for key in sorted({self.full_key(key) for key in keys})]
        if older_than_hours is not None:
            paths = [path for path in paths if _file_age(path) > older_than_hours]
        for path in paths:
            path.unlink(missing_ok=True)
        sweep(self.folder)
        return len(paths)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Let one process at a time search for a key; read again once inside.

        A holder that is killed frees the lock. Where no lock can be made, as on a disk that cannot
        be written, a warning says so and the caller goes on without one.

        Args:
            key: What `key_of` returned.
            waiting: Called once if another process holds the lock.
        """
        name = self.path(key).stem
        with locked(self.folder / "locks" / f"{name}.lock", waiting):
            yield
        sweep(self.folder, _STALE_SECONDS)

    def _usable(self, entry: Entry) -> bool:
        return -_AHEAD_HOURS <= entry.age_hours <= self.max_age_hours

    def _age(self, entry: Entry) -> str:
        if entry.age_hours < 0:
            return f"it is dated {entry.created}, which is to come"
        return f"{entry.age_hours:.1f} h old, at most {self.max_age_hours:g} h are allowed"

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.json")) if _ENTRY.fullmatch(path.stem)]

    def _aside(self) -> list[Path]:
        paths = sorted(self.folder.glob(f"*{_ASIDE}"))
        return [path for path in paths if _ENTRY.fullmatch(path.name.removesuffix(_ASIDE))]

    def _set_aside(self, path: Path, error: CorruptError) -> None:
        aside = path.with_name(path.stem + _ASIDE)
        try:
            path.replace(aside)
        except FileNotFoundError:
            return  # another process was faster, and says it
        except OSError:
            done = "it is passed over"
        else:
            done = f"it is set aside as {aside.name}"
        warnings.warn(f"`{path}` is corrupt, {error}: {done}.", stacklevel=3)


def _default() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("lightning_diag") / "learning_rates"


def _load(path: Path) -> Entry | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return decoded(content, path.stem)


def _file_age(path: Path) -> float:
    with suppress(CorruptError, OSError):
        entry = _load(path)
        if entry is not None:
            return entry.age_hours
    with suppress(FileNotFoundError):
        return (time.time() - path.stat().st_mtime) / 3600
    return math.inf
