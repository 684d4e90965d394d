"""Reading of interactions, from a table to the matrix R: time, and memory beyond R against the promised 1 GB.

It is compared with pandas, which reads the table and numbers the ids (`factorize`), and scipy's CSR. Each run is a
process of its own, started by this script as ``reader.py ours|pandas KIND ITEMS TABLE FACTS``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Cost, arguments, interactions, plot, process_cost, row, show

OURS, BASELINE = "ours", "pandas"
PROMISED = 10**9  # bytes beyond R, at most
USER, ITEM, WEIGHT = "user_id", "item_id", "weight"


class Size(NamedTuple):
    """Size of the table."""

    users: int
    items: int
    interactions: int


SIZES = {
    "quick": Size(2_000, 300, 20_000),
    "default": Size(1_000_000, 100_000, 10_000_000),
    "large": Size(10_000_000, 1_000_000, 100_000_000),
}
KINDS = ("row numbers", "numbers with gaps, weights", "text", "row numbers, CSV")


def main() -> None:
    given = arguments(__doc__)
    size = SIZES[given.size]
    lines = []
    seconds: dict[str, list[float]] = {OURS: [], BASELINE: []}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            table = Path(name) / f"interactions.{'csv' if 'CSV' in kind else 'parquet'}"
            write(table, kind, size)
            costs = {}
            for way in (OURS, BASELINE):
                facts_path = Path(name) / way
                told = [way, kind, str(size.items), str(table), str(facts_path)]
                cost = process_cost([sys.executable, __file__, *told], warm_up=way == OURS)
                costs[way] = Cost(json.loads(facts_path.read_text())["seconds"], cost.peak)
            csr = json.loads((Path(name) / OURS).read_text())["csr_bytes"]
        facts = {
            "seconds": costs[OURS].seconds,
            "pandas_s": costs[BASELINE].seconds,
            "speedup": costs[BASELINE].seconds / costs[OURS].seconds,
            "csr_mib": csr >> 20,
            "beyond_csr_mib": (costs[OURS].peak - csr) >> 20,
            "promised_mib": PROMISED >> 20,
            "pandas_beyond_mib": (costs[BASELINE].peak - csr) >> 20,
        }
        row(given.results / "reader.csv", **size._asdict(), kind=kind, **facts)
        lines.append([kind, *facts.values()])
        for way in (OURS, BASELINE):
            seconds[way].append(costs[way].seconds)
    title = f"reader, {size.interactions:,} interactions, {size.users:,} users, {size.items:,} items"
    heads = ["seconds", "pandas seconds", "times faster", "R MiB", "beyond R MiB"]
    heads += ["promised MiB", "pandas beyond R MiB"]
    show(title, ["ids", *heads], lines)
    plot(given.results / "reader.png", title, "seconds", KINDS, seconds)


def write(path: Path, kind: str, size: Size) -> None:
    """Write a table of interactions with one kind of ids."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    names = {axis: named(kind, axis, count) for axis, count in ((USER, size.users), (ITEM, size.items))}
    rng = np.random.default_rng(0)

    def tables() -> Iterator[pa.Table]:
        for who, what in interactions(*size):
            columns = {USER: names[USER](who), ITEM: names[ITEM](what)}
            if "weights" in kind:
                columns[WEIGHT] = rng.uniform(0.1, 1, len(who)).astype(np.float32)
            yield pa.table(columns)

    made = tables()
    first = next(made)
    with (pc.CSVWriter if path.suffix == ".csv" else pq.ParquetWriter)(path, first.schema) as writer:
        writer.write_table(first)
        for table in made:
            writer.write_table(table)


def named(kind: str, axis: str, count: int) -> Callable[[Any], Any]:
    """Give a function from row numbers to ids."""
    import pyarrow as pa

    if kind == "text":
        texts = pa.array([f"{axis[:4]}-{number:09}" for number in range(count)])
        return lambda rows: texts.take(pa.array(rows))
    return lambda rows: 7 * rows + 3 if "gaps" in kind else rows


def ours(kind: str, path: str, items: int) -> int:
    """Read a table with gpu-init; give the bytes of R."""
    import pandas as pd

    from gpu_init.backend.select import select
    from gpu_init.inputs.axes import ItemAxis
    from gpu_init.inputs.interactions import read
    from gpu_init.inputs.tables import Columns

    by_row = "row numbers" in kind
    known = named(kind, ITEM, items)(np.arange(items))
    axis = ItemAxis(items) if by_row else ItemAxis(None, [pd.Series(known.to_pandas() if kind == "text" else known)])
    columns = Columns(USER, ITEM, WEIGHT if "weights" in kind else None)
    csr = read(select("cpu"), path, columns, axis, None).interactions.csr
    return sum(array.nbytes for array in csr if array is not None)


def pandas_reads(kind: str, path: str, _: int) -> int:
    """Read a table with pandas, number ids that are not row numbers, and give the bytes of scipy's CSR."""
    import pandas as pd
    import scipy.sparse

    table = pd.read_csv(path) if path.endswith(".csv") else pd.read_parquet(path)
    users, items = (
        table[axis].to_numpy() if "row numbers" in kind else table[axis].factorize()[0] for axis in (USER, ITEM)
    )
    weights = table[WEIGHT].to_numpy() if "weights" in kind else np.ones(len(table), np.float32)
    csr = scipy.sparse.coo_matrix((weights, (users, items))).tocsr()
    return int(csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes)


def read_one(way: str, kind: str, items: str, path: str, facts: str) -> None:
    """Read one table in this process, after libraries and kernels are loaded, and write the seconds to a file."""
    import time

    reading = {OURS: ours, BASELINE: pandas_reads}[way]
    small = Size(50, 40, 1000)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / Path(path).name, kind, small)
        reading(kind, str(Path(name) / Path(path).name), small.items)
    start = time.perf_counter()
    csr_bytes = reading(kind, path, int(items))
    Path(facts).write_text(json.dumps({"seconds": time.perf_counter() - start, "csr_bytes": csr_bytes}))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in (OURS, BASELINE):
        read_one(*sys.argv[1:])
    else:
        main()
