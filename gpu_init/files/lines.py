"""Text files of rows, looked at again once something is wrong with one: which line it is, and what to do.

Lines are numbered as an editor does, from 1. Empty lines are no rows, and line ends within quotes end none.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

from gpu_init.errors import InputError
from gpu_init.files.storage import local


def line_of(path: str, row: int) -> int:
    """Line where a row starts, from 0 for the first one after the header.

    Raises
    ------
    InputError
        There is no such row: the file is not what it was.
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
    """What is wrong with a file, and what to do, from what Arrow said of it; no line may have ``most`` bytes."""
    if "UTF8" in said:
        return f"{path}: {_place(_not_utf8(path))} is not UTF-8 text; save it as UTF-8."
    if "straddling" in said:
        return f"{path}: a line of more than {most:,} bytes, or a quote that is not closed; correct it."
    if "Expected" in said and "columns" in said:
        return f"{path}: {_place(_uneven(path, separator))} has not as many fields as the header; correct or quote it."
    return f"{path}: {said}"


def _opened(path: str) -> IO[str]:
    """Text whose letters are bytes, whatever they mean; lines end in any way."""
    path = local(path)
    return gzip.open(path, "rt", encoding="latin-1") if path.endswith(".gz") else open(path, encoding="latin-1")


def _place(line: int | None) -> str:
    return "a line" if line is None else f"line {line}"


def _not_utf8(path: str) -> int | None:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError:
                return number
    return None


def _uneven(path: str, separator: str) -> int | None:
    with _opened(path) as lines, suppress(csv.Error):
        rows = _rows(csv.reader(lines, delimiter=separator))
        _, header = next(rows, (1, []))
        return next((line for line, fields in rows if fields and len(fields) != len(header)), None)
    return None


def _rows(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Fields of each row, and the line where it starts."""
    line = 1
    for fields in reader:
        yield line, fields
        line = reader.line_num + 1  # type: ignore[attr-defined]
