"""Cuts files into batches: groups of Parquet rows, and whole lines of text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gpu_init.files.storage import source

TEXT_BLOCK_BYTES = 16 << 20  # bytes of a text file that are read at a time; no line may be longer
LONG_TEXT_BYTES = 256  # a batch of texts longer than this may take much more memory than its file takes on disk


def row_groups(rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Join row groups, given by their numbers of rows, to lists of group numbers with at most ``most`` rows together.

    A row group that has more rows stands alone.
    """
    groups: list[int] = []
    held = 0
    for group, count in enumerate(rows):
        if groups and held + count > most:
            yield groups
            groups, held = [], 0
        groups.append(group)
        held += count
    if groups:
        yield groups


def long_texts(path: str, columns: Iterable[str], options: dict[str, Any]) -> list[str]:
    """Columns whose dictionary holds a long text, which may be repeated: a small file may unpack to gigabytes."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pq.read_schema(source(path))
    kinds = {name: schema.field(name).type for name in columns}
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    found: set[str] = set()
    with pq.ParquetFile(source(path), read_dictionary=texts, **options) as file:
        for group in range(file.num_row_groups) if texts else ():
            for row in itertools.islice(file.iter_batches(1, row_groups=[group], columns=texts), 1):
                lengths = {name: pc.max(pc.binary_length(row.column(name).dictionary)).as_py() for name in texts}
                found.update(name for name, longest in lengths.items() if (longest or 0) > LONG_TEXT_BYTES)
    return sorted(found)


def decoded(batch: Any) -> Iterator[Any]:
    """Write out the dictionaries of a batch, in parts of at most `TEXT_BLOCK_BYTES` of text, or of one row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = [column for column in batch.columns if pa.types.is_dictionary(column.type)]
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in texts:
        lengths = pc.fill_null(pc.binary_length(column.dictionary.cast(pa.large_string())), 0)
        sizes += pc.fill_null(lengths.take(column.indices), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + TEXT_BLOCK_BYTES, side="right")))
        part = batch.slice(start, stop - start)
        columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in part.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        start = stop


def text_parts(stream: Any, size: int) -> Iterator[bytes]:
    """Cut a text file into parts of about ``size`` bytes, each with the file's header before it.

    A part ends where a line ends outside quotes. Where none does in twice as many bytes, a quotation mark is taken to
    stand alone, and the part ends with its last line.
    """
    head, _, rest = stream.read(size).partition(b"\n")
    head = head.removeprefix(b"\xef\xbb\xbf")
    windows = head.endswith(b"\r")
    several = False

    def part(data: bytes) -> bytes:
        joined = b"".join([head, b"\n", data])
        return joined.replace(b"\r\n", b"\n") if windows else joined

    while more := stream.read(size):
        rest += more
        end = _end_of_lines(rest)
        if not end and len(rest) > 2 * size:
            end = rest.rfind(b"\n") + 1
        if end:
            yield part(rest[:end])
            rest, several = rest[end:], True
    if rest or not several:
        yield part(rest)


def _end_of_lines(data: bytes) -> int:
    """Number of bytes up to the end of the last line that ends outside quotes; 0 where no line does."""
    end = data.rfind(b"\n")
    quotes = data.count(b'"', 0, max(end, 0))
    while end >= 0 and quotes % 2:
        before = data.rfind(b"\n", 0, end)
        quotes -= data.count(b'"', max(before, 0), end)
        end = before
    return end + 1
