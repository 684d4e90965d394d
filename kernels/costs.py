"""How long numpy's kernels take, about, on two cores: small jobs are theirs, since nothing has to be compiled for them.

The constants are seconds for each unit of work, measured by ``benchmarks/first_job.py``. They need not be exact: both
kinds of kernels give the same vectors to rounding, and the rule only has to be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

# What reading takes is counted thrice, since the few kernels that it needs are compiled in a third of the time.
READ_ROW = 3 * 4e-7  # a row of a Parquet file
READ_BYTE = 3 * 3e-8  # a byte of a text file
GATHERED_VALUE = 7e-9  # a value of an interaction's row of features
ASSIGNED_VALUE = 2e-8  # an interaction and a cluster
PLACED_PAIR = 4e-6  # an interaction, where users are clustered on the interactions: some 40 products with a table
USER = 2e-6
ITEM_VALUE = 4e-8  # a value of an item's features
AUTO_CLUSTERS = 64  # that stand for a number of clusters which is still to be chosen


def reading_seconds(rows: int, text_bytes: int) -> float:
    """Seconds to read so many rows of Parquet files and bytes of text files into R."""
    return READ_ROW * rows + READ_BYTE * text_bytes


def fitting_seconds(
    users: int,
    items: int,
    pairs: int,
    widths: Sequence[int],
    clusters: int | str,
    on_interactions: bool = False,
    candidates: int = 1,
) -> float:
    """Seconds to fit and write the vectors of modalities of such widths.

    Parameters
    ----------
    users, items, pairs : int
        Rows, columns and entries of R.
    widths : sequence of int
        Columns of each modality's features, as they are aggregated.
    clusters : int or "auto"
        K.
    on_interactions : bool, default=False
        Whether users are clustered on the interactions.
    candidates : int, default=1
        Settings that are tried.
    """
    most = AUTO_CLUSTERS if isinstance(clusters, str) else clusters
    width, count = sum(widths), len(widths)
    per_pair = GATHERED_VALUE * width + ASSIGNED_VALUE * most * count + PLACED_PAIR * on_interactions
    return candidates * (pairs * per_pair + users * count * USER + items * width * ITEM_VALUE)
