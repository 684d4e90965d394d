"""Looks at a text file again when a row of it is wrong, to name the line and what to do.

Lines are numbered as in an editor, from 1. Empty lines are no rows, and a line end within quotes does not end a row.
"""

from __future__ import annotations

import csv
import gzip
from contextlib import suppress
from typing import IO

from gpu_init.errors import InputError
from gpu_init.files.storage import local


def line_of(path: str, row: int) -> int:
    """Number of the line where a row starts; row 0 is the first one after the header.

    Raises
    ------
    InputError
        There is no such row, so the file has changed.
    """
    found, open_quote = -2, False
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not open_quote and line != "\n":
                found += 1
                if found == row:
                    return number
            open_quote ^= line.count('"') % 2 == 1
    raise InputError(f"{path}: changed while it was read; run again when it is complete.")


def trouble(path: str, separator: str, said: str, most: int) -> str:
    """Say what is wrong with a file and what to do, from Arrow's message; a line may have at most ``most`` bytes."""
    if "UTF8" in said:
        return f"{path}: {_not_utf8(path)} is not UTF-8 text; save it as UTF-8."
    if "straddling" in said:
        return f"{path}: a line of more than {most:,} bytes, or a quote that is not closed; correct it."
    if "Expected" in said and "columns" in said:
        return f"{path}: {_uneven(path, separator)} has not as many fields as the header; correct or quote it."
    return f"{path}: {said}"


def _opened(path: str) -> IO[str]:
    """Open a file as text with one letter for each byte, whatever its encoding and its line ends."""
    path = local(path)
    return gzip.open(path, "rt", encoding="latin-1") if path.endswith(".gz") else open(path, encoding="latin-1")


def _not_utf8(path: str) -> str:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError:
                return f"line {number}"
    return "a line"


def _uneven(path: str, separator: str) -> str:
    with _opened(path) as lines, suppress(csv.Error):
        rows = csv.reader(lines, delimiter=separator)
        width = len(next(rows, []))
        before = rows.line_num
        for fields in rows:
            if fields and len(fields) != width:
                return f"line {before + 1}"
            before = rows.line_num
    return "a line"
