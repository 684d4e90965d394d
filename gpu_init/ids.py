"""Raw ids of users and items, which follow one rule in every file format.

If all ids of a column are whole numbers, they are integers, whether the file stores them as numbers or as text, so that
the same interactions give the same rows from CSV and from Parquet. All other ids are text, which is kept as it is:
"007" stays "007".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpu_init.errors import InputError

# Each number has one spelling: no leading zero, no plus sign, and at most 18 digits, which always fit 64 bits.
WHOLE_NUMBER = r"^(?:0|-?[1-9][0-9]{0,17})$"
_WRITTEN_AS_FLOAT = r"^-?[0-9]+\.0+$"


def normalize(column: Any, place: str, row: Callable[[int], str] = "row {}".format) -> Any:
    """Check a column of raw ids and convert it to int64 or text.

    Parameters
    ----------
    column : pandas or cudf Series, shape (n,)
        Integers, text or categories of text, as a file has them.
    place : str
        Name of the column in an error: the file and the column's name.
    row : callable, optional
        It returns the name of a position of the column in an error, such as "line 12".

    Returns
    -------
    Series, shape (n,)
        int64 if every id is a whole number, else text.

    Raises
    ------
    InputError
        An id is missing, an id is beyond 2^63 - 1, or ids have another type.
    """
    refuse_missing(column.isna(), place, row, "id")
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
    refuse_missing(column == "", place, row, "id")
    if _all_match(column, WHOLE_NUMBER):
        return column.astype("int64[pyarrow]" if "pyarrow" in kind else "int64").astype("int64")
    if _all_match(column, _WRITTEN_AS_FLOAT):
        raise InputError(
            f"{place}: ids such as {shown(column.iloc[0])}, whole numbers turned into decimals; write them as integers."
        )
    return column


def refuse_missing(missing: Any, place: str, row: Callable[[int], str], what: str) -> None:
    """Refuse a column if any of ``missing``, a Series of booleans, is True; the message names the first such row."""
    if bool(missing.any()):
        raise InputError(f"{place}: {row(first_true(missing))} has no {what}; drop such rows or give them one.")


def _all_match(column: Any, pattern: str) -> bool:
    """Whether every text matches. The first one is tried alone, because most often it decides."""
    return bool(column.iloc[:1].str.match(pattern).all()) and bool(column.str.match(pattern).all())


def is_text(kind: str) -> bool:
    """Whether a dtype's name, in pandas or cudf, means text."""
    return kind == "object" or kind.startswith(("string", "large_string")) or kind == "str"


def same_kind(columns: Iterable[Any]) -> list[Any]:
    """Convert columns of ids, each int64 or text, to text if one of them is text."""
    columns = list(columns)
    text = any(is_text(str(column.dtype)) for column in columns)
    return [column.astype("str") for column in columns] if text else columns


def first_true(mask: Any) -> int:
    """Return the position of the first True in a Series of booleans."""
    return int(mask.to_numpy().argmax())


def shown(value: Any) -> str:
    """Write an id, or another value of a row, for an error, in at most about 60 characters if it is a text."""
    return repr(value if not isinstance(value, str) or len(value) <= 60 else value[:60] + "...")
