"""Times of interactions, and what age makes of their weights: ``2^(-(t_u - t) / half_life)`` (design, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_init import ids
from gpu_init.backend.interface import Backend
from gpu_init.errors import InputError
from gpu_init.settings import half_life
from gpu_init.where import kind_of, time_counts

_LATEST_SECOND = 1e11  # the year 5138: beyond, a number is of milliseconds or less
_DAY = 86_400.0
LEAST = 1e-30  # weights below count as 0: float32 keeps too few digits of them


class Recency:
    """A half-life, and times to go with it.

    Parameters
    ----------
    value : str or float
        With a unit, such as "30d": columns of numbers are of seconds, and both they and dates and times count from
        1970 in UTC. A number alone is in the unit of the column, which must be of numbers.
    """

    def __init__(self, value: str | float) -> None:
        self.half_life, self._unit = half_life(value)

    def times(self, backend: Backend, column: Any, place: str, row: Callable[[int], str]) -> Any:
        """Times of a column, (n,) float64: seconds, or as they stand where the half-life has no unit.

        Raises
        ------
        InputError
            A time that is missing or none, or one in another unit than the half-life; which row.
        """
        missing = column.isna()
        if bool(missing.any()):
            raise InputError(f"{place}: {row(ids.first_true(missing))} has no time; drop such rows or give them one.")
        kind = kind_of(column)
        if kind == "time":
            counts, per_day = time_counts(column)
            return self._of_calendar(backend.asarray(counts.astype("float64").values) * (_DAY / per_day), place)
        if kind in ("text", "category"):
            text = column.astype("str") if kind == "category" else column
            numbers = backend.asarray(backend.tables.to_numeric(text, errors="coerce").astype("float64").values)
            if bool(backend.xp.isnan(numbers).any()):
                return self._of_calendar(backend.asarray(_parsed(backend.host_column(text), place, row)), place)
        elif kind in ("integer", "float", "decimal"):
            numbers = backend.asarray(column.astype("float64").values)
        else:
            raise InputError(f"{place} holds {kind}; times are numbers, or dates and times.")
        limit = _LATEST_SECOND if self._unit else 1e300
        wrong = ~(abs(numbers) <= limit)
        if bool(wrong.any()):
            at = int(wrong.argmax())
            why = (
                "no seconds since 1970; a half-life in the column's own unit is a number alone"
                if self._unit
                else "none"
            )
            raise InputError(f"{place}: {row(at)} has time {float(numbers[at]):.15g}, which is {why}.")
        return numbers

    def decayed(self, backend: Backend, weights: Any, ages: Any) -> Any:
        """Weights (n,) float32, or None for ones, of interactions that are older than the user's newest by ``ages``."""
        xp = backend.xp
        left = xp.exp2(-xp.maximum(ages, 0.0) / self.half_life)  # only what has no weight is newer than the newest
        left = left if weights is None else left * weights
        return xp.where(left < LEAST, 0.0, left).astype(xp.float32)

    def _of_calendar(self, seconds: Any, place: str) -> Any:
        if self._unit is None:
            raise InputError(
                f"{place} holds dates and times, but --half-life {self.half_life:g} has no unit; such as 30d."
            )
        return seconds


def _parsed(text: Any, place: str, row: Callable[[int], str]) -> Any:
    """Seconds since 1970 (n,) float64 of a pandas Series of dates and times in ISO 8601; without a zone, UTC."""
    import pandas as pd

    times = pd.to_datetime(text.astype("str"), errors="coerce", format="ISO8601", utc=True)
    missing = times.isna()
    if missing.any():
        at = ids.first_true(missing)
        raise InputError(
            f"{place}: {row(at)} is {str(text.iloc[at])[:60]!r}; times are numbers, or such as 2024-01-31 18:00:00."
        )
    return (times - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy("float64")


def newest(backend: Backend, rows: Any, times: Any, count: int) -> Any:
    """Latest of ``times`` (n,) at each of ``rows`` (n,), (count,) float64; 0 at rows without one."""
    xp = backend.xp
    order = xp.argsort(times, kind="stable")
    order = order[xp.argsort(rows[order], kind="stable")]
    last = order[xp.searchsorted(rows[order], xp.arange(count), side="right") - 1]
    found = xp.zeros(count)
    found[rows[last]] = times[last]
    return found
