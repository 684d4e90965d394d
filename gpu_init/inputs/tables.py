"""Tables of interactions: which column holds what, which rows are kept, and where in a file a row is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_init import ids
from gpu_init.backend.batches import TEXT_BLOCK_BYTES
from gpu_init.backend.interface import Backend, one_line
from gpu_init.errors import InputError
from gpu_init.files.lines import line_of, trouble
from gpu_init.files.storage import expand, file_state, source, stream
from gpu_init.where import Where

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PARQUET_EXTENSIONS = (".parquet", ".pq")
TEXT_EXTENSIONS = (".csv", ".tsv", ".inter", ".csv.gz", ".tsv.gz", ".inter.gz")
EXTENSIONS = (*PARQUET_EXTENSIONS, ".npz", *TEXT_EXTENSIONS)
USER_EXTENSIONS = (*PARQUET_EXTENSIONS, ".txt", *TEXT_EXTENSIONS)

USER_NAMES = ("user_id", "userid", "user", "uid", "visitor_id", "session_id")
TIME_NAMES = ("timestamp", "time", "ts", "datetime", "event_time")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "product_id", "asin")
SPLIT_NAMES = ("x_label", "split")
HEADER_BYTES = 1 << 20  # The first line of a text file has at most so many bytes.
_PACKED = 4  # One byte of a .gz file holds about so many bytes of text.
_RECBOLE_TYPES = (":token", ":float", ":token_seq", ":float_seq")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what. A column that is None is looked for by its usual names.

    A ``session`` column takes the place of ``user``. ``half_life`` is a number, or a text with a unit such as "30d";
    without it, times are not read.
    """

    user: str | None = None
    item: str | None = None
    weight: str | None = None
    where: Where | None = None
    session: str | None = None
    time: str | None = None
    half_life: str | float | None = None

    @property
    def row(self) -> tuple[str | None, str]:
        """The column whose ids are the rows of R, and the flag that names this column."""
        return (self.user, "--user-column") if self.session is None else (self.session, "--session-column")


@dataclass(frozen=True)
class Table:
    """A file of interactions whose columns are known.

    Attributes
    ----------
    path : str
    separator : str or None
        The character between columns of a text file; None for Parquet.
    user, item : str
        Names of the columns, as the file has them.
    weight : str or None
        None: each interaction has the weight 1.
    time : str or None
        None: times are not read.
    where : dict
        It maps a column's name in ``--where`` to its name in the file.
    whole : int or None
        Number of rows, if the file stores both ids as integers, so that reading it twice costs little; else None.
    state : tuple of int
        Size and time of the last change, from `file_state`.
    """

    path: str
    separator: str | None
    user: str
    item: str
    weight: str | None
    time: str | None
    where: dict[str, str]
    whole: int | None
    state: tuple[int, int]


class Batch(NamedTuple):
    """Some rows of a table: the frame of those that ``--where`` keeps, and the number of rows before it.

    ``row`` returns the name of a row of the frame, which is its place in the file.
    """

    frame: Any
    read: int
    row: Callable[[int], str]


def open_table(path: str, columns: Columns, warnings: list[str]) -> Table:
    """Find the columns of a file. What the user should know is appended to ``warnings``.

    Raises
    ------
    InputError
        The file is not a table, a column is missing, or the file says which rows are for validation and test, but
        there is no ``--where``.
    """
    state = file_state(path)
    separator, names = header(path)
    row, flag = columns.row
    user = find_column(path, names, row, USER_NAMES, flag)
    item = find_column(path, names, columns.item, ITEM_NAMES, "--item-column")
    weight = find_column(path, names, columns.weight, (), "--weight-column") if columns.weight else None
    timed = columns.half_life is not None
    time = find_column(path, names, columns.time, TIME_NAMES, "--time-column") if timed else None
    asked = columns.where.columns if columns.where else ()
    where = {name: find_column(path, names, name, (), "--where") for name in asked}
    _check_split(path, names, columns.where, where, warnings)
    whole = _whole_numbers(path, (user, item)) if separator is None else None
    return Table(path, separator, user, item, weight, time, where, whole, state)


def batches(
    backend: Backend, table: Table, where: Where | None, wanted: Sequence[str], groups: range | None = None
) -> Iterator[Batch]:
    """Read the columns ``wanted`` of a table, or of some row groups of it, batch by batch and in order.

    Raises
    ------
    InputError
        The file is broken, or a value cannot be compared with what ``--where`` says.
    """
    before = 0 if groups is None else sum(_group_rows(table.path)[: groups.start])
    columns = list(dict.fromkeys([*wanted, *table.where.values()]))
    for frame in backend.batches(table.path, table.separator, columns, groups):
        read = len(frame)
        positions: Any = range(before, before + read)
        if where:
            named = frame.rename(columns={actual: name for name, actual in table.where.items()})
            keep = where.mask(named, table.path, _row_names(table.path, table.separator, positions))
            frame = frame[keep].reset_index(drop=True)  # noqa: PLW2901
            positions = before + backend.xp.flatnonzero(backend.asarray(keep.to_numpy().astype(bool)))
        before += read
        yield Batch(frame, read, _row_names(table.path, table.separator, positions))


def _whole_numbers(path: str, names: Sequence[str]) -> int | None:
    """Return the number of rows of a Parquet file whose columns ``names`` are integers, else None."""
    import pyarrow as pa

    with _metadata(path) as metadata:
        schema = metadata.schema.to_arrow_schema()
        return int(metadata.num_rows) if all(pa.types.is_integer(schema.field(name).type) for name in names) else None


def pieces(tables: Sequence[Table], least: int, most: int) -> list[tuple[Table, range | None]]:
    """Cut Parquet files into runs of row groups, in order, with at least about ``least`` rows each.

    There are about ``most`` runs in all. A text file is one piece, whose range is None.
    """
    by_table = [_group_rows(table.path) if table.separator is None else [] for table in tables]
    rows = max(least, sum(map(sum, by_table)) // most)
    found: list[tuple[Table, range | None]] = []
    for table, counts in zip(tables, by_table, strict=True):
        if table.separator is not None:
            found.append((table, None))
            continue
        start = held = 0
        for group, count in enumerate(counts):
            if group > start and held + count > rows:
                found.append((table, range(start, group)))
                start, held = group, 0
            held += count
        found.append((table, range(start, len(counts))))
    return found


def _group_rows(path: str) -> list[int]:
    with _metadata(path) as metadata:
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@contextmanager
def _metadata(path: str) -> Iterator[pq.FileMetaData]:
    """Give the metadata of a Parquet file. Errors while they are read, and in the block, say in which file they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield pq.read_metadata(source(path))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def stated_rows(pattern: str) -> int:
    """Return the number of rows that the Parquet files of a path, folder or glob announce.

    Raises
    ------
    InputError
        One of them cannot be read.
    """
    rows = 0
    for path in expand(pattern, EXTENSIONS):
        if path.endswith(PARQUET_EXTENSIONS):
            with _metadata(path) as metadata:
                rows += metadata.num_rows
    return rows


def text_bytes(pattern: str) -> int:
    """Estimate the bytes of the text files of a path, folder or glob, after unpacking."""
    texts = (path for path in expand(pattern, EXTENSIONS) if path.endswith(TEXT_EXTENSIONS))
    return sum(file_state(path)[0] * (_PACKED if path.endswith(".gz") else 1) for path in texts)


def row_name(path: str, separator: str | None, position: int) -> str:
    """Name a row for an error: its line in a text file, as an editor counts lines, or its number from 0 in Parquet."""
    return f"row {position}" if separator is None else f"line {line_of(path, position)}"


def _row_names(path: str, separator: str | None, positions: Any) -> Callable[[int], str]:
    """Return a function that names the rows of a batch, whose positions in the file are ``positions``."""
    return lambda at: row_name(path, separator, int(positions[at]))


def header(path: str) -> tuple[str | None, list[str]]:
    """Return the separator (None for Parquet) and the names of the columns of a table.

    Raises
    ------
    InputError
        The file cannot be read, or is not a table.
    """
    import pyarrow as pa
    import pyarrow.csv as pc

    if path.endswith(PARQUET_EXTENSIONS):
        with _metadata(path) as metadata:
            return None, list(metadata.schema.to_arrow_schema().names)
    try:
        with stream(path) as file:
            start = file.read(HEADER_BYTES)
        if len(start) == HEADER_BYTES and b"\n" not in start:
            raise InputError(f"{path}: its first line, which names the columns, is longer than {HEADER_BYTES:,} bytes.")
        first = start.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
        if not first.strip():
            raise InputError(f"{path}: no header line; the first line names the columns.")
        separator = "\t" if "\t" in first else ","
        quoted = pa.BufferReader((first + "\n").encode())
        table = pc.read_csv(quoted, parse_options=pc.ParseOptions(delimiter=separator))
        return separator, list(table.column_names)
    except UnicodeDecodeError:
        raise InputError(f"{path}: the first line is not UTF-8 text.") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def find_column(path: str, names: list[str], wanted: str | None, known: tuple[str, ...], flag: str) -> str:
    """Find the column that a name means. A typed header of RecBole (``user_id:token``) counts as its bare name.

    Raises
    ------
    InputError
        No such column, or several.
    """
    if wanted is not None and names.count(wanted) == 1:
        return wanted
    if wanted is not None:
        found = [name for name in names if wanted in (name, bare(name))]
    else:
        usual = ([name for name in names if bare(name).lower() in (one, one.replace("_", ""))] for one in known)
        found = next(filter(None, usual), [])
    if len(found) == 1:
        return found[0]
    listed = textwrap.shorten(", ".join(name[:40] for name in names[:20]), 300, placeholder=", ...")
    listed += ", ..." if len(names) > 20 and not listed.endswith("...") else ""
    if found:
        raise InputError(f"{path}: column {found[0]} is there {len(found)} times; the columns are {listed}.")
    if wanted is not None:
        raise InputError(f"{path}: no column {wanted} ({flag}); the columns are {listed}.")
    raise InputError(
        f"{path}: none of the columns is named {', '.join(known)}; name it with {flag}. The columns are {listed}."
    )


def bare(name: str) -> str:
    """Return a column's name without RecBole's type."""
    ending = next((ending for ending in _RECBOLE_TYPES if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _check_split(path: str, names: list[str], where: Where | None, asked: dict[str, str], warned: list[str]) -> None:
    """Refuse a table that says which rows are for validation and test, unless there is a ``--where``."""
    split = next((name for name in names if bare(name).lower() in SPLIT_NAMES), None)
    if split is None or split in asked.values():
        return
    leak = "vectors made from validation or test rows leak them into training"
    if where is None:
        raise InputError(
            f"{path} has a split column, {split}: {leak}.\n"
            f'Say which rows to take, such as --where "{bare(split)} == 0".'
        )
    warned.append(f"{path} has a split column, {split}, which --where does not look at: {leak}")


def read_user_ids(backend: Backend, path: str, user_column: str | None) -> Any:
    """Read ``--users PATH``: the ids of the users' rows, in order.

    The file is Parquet, or CSV or TSV with a header, and the ids are in the user column, in a column with a usual
    name, or in the only column; or it is a .txt with one id per line.

    Returns
    -------
    pandas Series, shape (U,)

    Raises
    ------
    InputError
        The file has no ids, an id is missing, or an id is there twice.
    """
    paths = expand(path, USER_EXTENSIONS)
    parts = [part for one in paths for part in _user_id_batches(backend, one, user_column)]
    if sum(map(len, parts)) == 0:
        raise InputError(f"{path}: no user ids.")
    column = joined(backend, parts)
    twice = column.duplicated()
    if bool(twice.any()):
        at = ids.first_true(twice)
        user = ids.shown(backend.host_column(column.iloc[[at]]).tolist()[0])
        raise InputError(f"{path}: user {user} is there twice (again in row {at}); a user has one row.")
    return backend.host_column(column)


def _user_id_batches(backend: Backend, path: str, user_column: str | None) -> Iterator[Any]:
    before = 0
    if path.endswith(".txt"):
        for lines in _lines(path):
            numbers = range(before + 1, before + len(lines) + 1)
            yield ids.normalize(backend.tables.Series(lines, dtype="str"), path, _line_names(numbers))
            before += len(lines)
        return
    separator, names = header(path)
    only = names[0] if len(names) == 1 and user_column is None else None
    name = only or find_column(path, names, user_column, USER_NAMES, "--user-column")
    for frame in backend.batches(path, separator, [name]):
        row = _row_names(path, separator, range(before, before + len(frame)))
        yield ids.normalize(frame[name].reset_index(drop=True), f"{path}, column {name}", row)
        before += len(frame)


def _line_names(numbers: Sequence[int]) -> Callable[[int], str]:
    return lambda at: f"line {numbers[at]}"


def _lines(path: str) -> Iterator[list[str | None]]:
    """Read the lines of a text file, some megabytes at a time; an empty line is None."""
    import pyarrow as pa
    import pyarrow.csv as pc

    if file_state(path)[0] == 0:
        return
    try:
        with stream(path) as file:
            for batch in pc.open_csv(
                file,
                pc.ReadOptions(block_size=TEXT_BLOCK_BYTES, column_names=["id"]),
                pc.ParseOptions(delimiter="\x1f", quote_char=False, ignore_empty_lines=False),
                pc.ConvertOptions(column_types={"id": pa.string()}, null_values=[""], strings_can_be_null=True),
            ):
                yield batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(trouble(path, "\x1f", one_line(error), TEXT_BLOCK_BYTES)) from None


def joined(backend: Backend, parts: list[Any]) -> Any:
    """Concatenate the columns of batches; if one of them holds text, the whole numbers of the others become text."""
    parts = ids.same_kind(parts)
    return parts[0] if len(parts) == 1 else backend.tables.concat(parts, ignore_index=True)
