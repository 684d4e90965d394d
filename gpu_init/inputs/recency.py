"""Times of interactions, and the decay of their weights with age.

An interaction at time t of a user whose newest one is at time t_u has its weight multiplied by
``2^(-(t_u - t) / half_life)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_init import ids
from gpu_init.backend.interface import Backend
from gpu_init.errors import InputError
from gpu_init.settings import half_life
from gpu_init.where import kind_of, time_counts

_LATEST_SECOND = 1e11  # It is in the year 5138. A larger number counts milliseconds or a smaller unit.
_DAY_SECONDS = 86_400.0
LEAST = 1e-30  # A smaller weight counts as 0, because float32 keeps too few of its digits.


class Recency:
    """A half-life, and the reading of times that fit it.

    Parameters
    ----------
    value : str or float
        With a unit, such as "30d": the column holds dates and times, or numbers of seconds since 1970 in UTC. A number
        alone is in the unit of the column, which must hold numbers.
    """

    def __init__(self, value: str | float) -> None:
        self.half_life, self._unit = half_life(value)

    def times(self, backend: Backend, column: Any, place: str, row: Callable[[int], str]) -> Any:
        """Return the times of a column, (n,) float64 on the device.

        They are seconds since 1970, or the column's own numbers if the half-life has no unit.

        Raises
        ------
        InputError
            A value is missing, is not a time, or has another unit than the half-life. The message names the row.
        """
        ids.refuse_missing(column.isna(), place, row, "time")
        kind = kind_of(column)
        if kind == "time":
            counts, per_day = time_counts(column)
            return self._as_seconds(backend.asarray(counts.astype("float64").values) * (_DAY_SECONDS / per_day), place)
        if kind in ("text", "category"):
            text = column.astype("str") if kind == "category" else column
            numbers = backend.asarray(backend.tables.to_numeric(text, errors="coerce").astype("float64").values)
            if bool(backend.xp.isnan(numbers).any()):
                return self._as_seconds(backend.asarray(_parsed(backend.host_column(text), place, row)), place)
        elif kind in ("integer", "float", "decimal"):
            numbers = backend.asarray(column.astype("float64").values)
        else:
            raise InputError(f"{place} holds {kind}; times are numbers, or dates and times.")
        limit, why = 1e300, "not a finite number"
        if self._unit:
            limit = _LATEST_SECOND
            why = "not in seconds since 1970; a half-life in the column's own unit is a number alone"
        wrong = ~(abs(numbers) <= limit)
        if bool(wrong.any()):
            at = int(wrong.argmax())
            raise InputError(f"{place}: {row(at)} has time {float(numbers[at]):.15g}, which is {why}.")
        return numbers

    def decayed(self, backend: Backend, weights: Any, ages: Any) -> Any:
        """Return the decayed weights (n,) float32 of interactions.

        ``weights`` (n,) are 1 if None. ``ages`` (n,) are counted from the user's newest interaction with a weight above
        0, so that only interactions of weight 0 have a negative age.
        """
        xp = backend.xp
        decayed = xp.exp2(-xp.maximum(ages, 0.0) / self.half_life)
        decayed = decayed if weights is None else decayed * weights
        return xp.where(decayed < LEAST, 0.0, decayed).astype(xp.float32)

    def _as_seconds(self, seconds: Any, place: str) -> Any:
        if self._unit is None:
            remedy = "give it one, such as 30d"
            raise InputError(
                f"{place} holds dates and times, but --half-life {self.half_life:g} has no unit; {remedy}."
            )
        return seconds


def _parsed(text: Any, place: str, row: Callable[[int], str]) -> Any:
    """Return seconds since 1970, (n,) float64, given a pandas Series of ISO 8601 texts; without a zone, in UTC."""
    import pandas as pd

    times = pd.to_datetime(text.astype("str"), errors="coerce", format="ISO8601", utc=True)
    missing = times.isna()
    if missing.any():
        at = ids.first_true(missing)
        remedy = "times are numbers, or text such as 2024-01-31 18:00:00"
        raise InputError(f"{place}: {row(at)} is {str(text.iloc[at])[:60]!r}; {remedy}.")
    return (times - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy("float64")


def newest(backend: Backend, rows: Any, times: Any, count: int) -> Any:
    """Return the latest time of each row, (count,) float64, or 0 for a row that is not among ``rows``.

    ``times`` (n,) are those of interactions, and ``rows`` (n,) the rows of their users.
    """
    xp = backend.xp
    order = xp.argsort(times, kind="stable")
    order = order[xp.argsort(rows[order], kind="stable")]
    last = order[xp.searchsorted(rows[order], xp.arange(count), side="right") - 1]
    found = xp.zeros(count)
    found[rows[last]] = times[last]
    return found
