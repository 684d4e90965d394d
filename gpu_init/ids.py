"""Raw ids of users and items: one rule for every format.

Ids that are all written as whole numbers are integers, whether a file stores them as numbers or as text,
so that the same interactions give the same rows from CSV and from Parquet. Everything else is text, and
text is never made a number: "007" stays "007".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_init.errors import InputError

# One spelling a number: no leading zero, no plus, at most 18 digits (which always fit 64 bits).
WHOLE_NUMBER = r"^(?:0|-?[1-9][0-9]{0,17})$"
_WRITTEN_AS_FLOAT = r"^-?[0-9]+\.0+$"


def _row(position: int) -> str:
    return f"row {position}"


def normalize(column: Any, place: str, row: Callable[[int], str] = _row) -> Any:
    """Check a column of raw ids and give it as int64 or as text.

    Parameters
    ----------
    column : pandas or cudf Series, shape (n,)
        Integers, text or categories of text, as read.
    place : str
        What to call the column in an error: file and column name.
    row : callable, optional
        Names a position of the column in an error, such as "line 12".

    Returns
    -------
    Series, shape (n,)
        int64 where every id is a whole number, else text.

    Raises
    ------
    InputError
        A missing id, ids beyond 64 bits, ids of another type.
    """
    missing = column.isna()
    if bool(missing.any()):
        raise InputError(f"{place}: {row(first_true(missing))} has no id; drop such rows or give them one.")
    kind = str(column.dtype)
    if kind.lower().startswith(("int", "uint")):
        if "uint64" in kind.lower() and len(column) and int(column.max()) > 2**63 - 1:
            raise InputError(f"{place}: ids beyond 2^63 - 1; write them as text.")
        return column.astype("int64")
    if kind.startswith(("dictionary", "category")):
        column = column.astype("str")
        kind = str(column.dtype)
    if not is_text(kind):
        raise InputError(f"{place}: ids of type {kind}; they must be whole numbers or text.")
    if len(column) == 0:
        return column
    blank = column == ""
    if bool(blank.any()):
        raise InputError(f"{place}: {row(first_true(blank))} has no id; drop such rows or give them one.")
    if _all_match(column, WHOLE_NUMBER):
        return column.astype("int64[pyarrow]" if "pyarrow" in kind else "int64").astype("int64")
    if _all_match(column, _WRITTEN_AS_FLOAT):
        raise InputError(
            f"{place}: ids such as {shown(column.iloc[0])}, whole numbers turned into decimals; write them as integers."
        )
    return column


def _all_match(column: Any, pattern: str) -> bool:
    """Whether every text matches; the first one, looked at alone, mostly says no at once."""
    return bool(column.iloc[:1].str.match(pattern).all()) and bool(column.str.match(pattern).all())


def is_text(kind: str) -> bool:
    """Whether a dtype's name, in pandas or cudf, means text."""
    return kind == "object" or kind.startswith(("string", "large_string")) or kind == "str"


def first_true(mask: Any) -> int:
    """Position of the first True in a boolean Series."""
    return int(mask.to_numpy().argmax())


def shown(value: Any) -> str:
    """Id, or another value of a row, for an error: short whatever it is."""
    return repr(value if not isinstance(value, str) or len(value) <= 60 else value[:60] + "...")
