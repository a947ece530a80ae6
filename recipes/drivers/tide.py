"""A real tide with real ephemerides: the water level at Mayport, Florida, hour by hour in 2017."""

import csv
import io
import math
import tarfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from recipes.drivers.data import SeriesData
from recipes.drivers.planted import Edges
from recipes.drivers.series import Array, Series

__all__ = ["BODIES", "TideData", "ephemerides", "read_levels"]

BODIES = (
    *("Moon", "Sun", "Mercury", "Venus", "Mars"),
    *("Jupiter", "Saturn", "Uranus", "Neptune", "Pluto"),
)
_FILE = "8720218_wl.csv"
_FETCH = "pip download tappy==1.2.3 --no-deps --no-binary tappy"
_COLUMNS = ["Datetime", "hourly_height:m"]
# Mayport (Bar Pilots Dock), NOAA station 8720218
_LONGITUDE, _LATITUDE = "-81.4279", "30.3982"


class TideData(SeriesData):
    """The water level at one gauge as target, ten bodies of the sky as drivers.

    Args:
        path: the source archive of the package tappy, or the file 8720218_wl.csv from it.
        bodies: names of the bodies, as the package ephem has them.
        context: hours that the forecaster sees.
        horizon: hours that it foretells.
        split: shares of the hours that are for training, validation and test.
        batch_size: windows a batch, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which windows are seen.

    Raises:
        ValueError: An argument breaks a rule.
    """

    def __init__(
        self,
        *,
        path: str = "tappy-1.2.3.tar.gz",
        bodies: Sequence[str] = BODIES,
        context: int = 96,
        horizon: int = 24,
        split: Sequence[float] = (0.7, 0.15, 0.15),
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(
            context=context,
            horizon=horizon,
            split=split,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        if not bodies:
            raise ValueError("`bodies` must name at least one body, got none.")
        self.path = path
        self.bodies = tuple(bodies)

    def read(self) -> tuple[str, Series, Edges | None, Array | None]:
        times, levels = read_levels(self.path)
        drivers = ephemerides(times, self.bodies)
        series = Series(drivers, levels[:, None], self.bodies, ("water_level",))
        return "NOAA 8720218 Mayport 2017", series, None, None


def read_levels(path: str) -> tuple[list[datetime], Array]:
    """Times (UTC) and water levels (m above the mean sea level), an hour apart.

    Args:
        path: The source archive of tappy, or 8720218_wl.csv itself.

    Returns:
        Times, and levels of shape ``(times,)``.

    Raises:
        ValueError: If there is no such file, or it is not what it should be.
    """
    rows = csv.reader(io.StringIO(_text(Path(path))))
    if (head := next(rows, [])) != _COLUMNS:
        raise ValueError(f"`{path}` must have the columns {_COLUMNS}, got {head}.")
    times: list[datetime] = []
    levels = []
    for line, row in enumerate(rows, start=2):
        try:
            time, level = datetime.fromisoformat(row[0]), float(row[1])
        except (IndexError, ValueError):
            raise ValueError(
                f"`{path}` must have a time and a level in each line, got {row} in line {line}."
            ) from None
        if not math.isfinite(level) or (times and time - times[-1] != timedelta(hours=1)):
            raise ValueError(
                f"`{path}` must have finite levels an hour apart, got {row} in line {line}."
            )
        times.append(time)
        levels.append(level)
    return times, np.asarray(levels)


def ephemerides(times: Sequence[datetime], bodies: Sequence[str]) -> Array:
    r"""What each body would do to an ocean that follows at once: five numbers an hour.

    With declination :math:`\delta`, local hour angle :math:`H` and distance :math:`r` (:math:`r_0`
    in the first hour), they are the
    parts of the tidal potential of degree two, without the body's mass:

    .. math::
        (r_0 / r)^3 \left(\tfrac{3 \sin^2 \delta - 1}{2},\ \sin 2\delta \cos H,\
        \sin 2\delta \sin H,\ \cos^2 \delta \cos 2H,\ \cos^2 \delta \sin 2H\right)

    that is, the slow, the daily and the half-daily tide.

    Args:
        times: Universal time.
        bodies: Names, as the package ephem has them.

    Returns:
        Shape ``(times, bodies, 5)``.

    References:
        Doodson (1921), The harmonic development of the tide-generating potential,
        https://doi.org/10.1098/rspa.1921.0088, section 2.
    """
    ephem = _ephem()
    observer = ephem.Observer()
    observer.lon, observer.lat = _LONGITUDE, _LATITUDE
    made = []
    for name in bodies:
        if not hasattr(ephem, name):
            raise ValueError(f"`bodies` must be names that ephem knows, got {name!r}.")
        made.append(getattr(ephem, name)())
    angles = np.empty((len(times), len(bodies), 3))
    for i, time in enumerate(times):
        observer.date = time
        sidereal = float(observer.sidereal_time())
        for j, body in enumerate(made):
            body.compute(observer)
            angles[i, j] = float(body.g_dec), sidereal - float(body.g_ra), body.earth_distance
    declination, hour, distance = np.moveaxis(angles, -1, 0)
    parts: Array = np.stack(
        [
            (3 * np.sin(declination) ** 2 - 1) / 2,
            np.sin(2 * declination) * np.cos(hour),
            np.sin(2 * declination) * np.sin(hour),
            np.cos(declination) ** 2 * np.cos(2 * hour),
            np.cos(declination) ** 2 * np.sin(2 * hour),
        ],
        axis=-1,
    )
    near: Array = (distance[0] / distance) ** 3
    return parts * near[..., None]


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"`path` must be tappy's source archive, which `{_FETCH}` fetches, or the {_FILE} "
            f"from it; there is no file `{path}`."
        )
    if path.suffix == ".csv":
        return path.read_text(encoding="utf-8")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(f"/tests/{_FILE}"):
                    file = archive.extractfile(member)
                    if file is not None:
                        return file.read().decode("utf-8")
    except tarfile.TarError as error:
        raise ValueError(f"`path` must be a CSV file or a tar archive, got `{path}`.") from error
    raise ValueError(f"`path` must be an archive that holds tests/{_FILE}, got `{path}`.")


def _ephem() -> Any:  # noqa: ANN401
    try:
        return import_module("ephem")
    except ImportError as error:
        raise ImportError(
            "The positions of the bodies need the package ephem: `pip install ephem`."
        ) from error
