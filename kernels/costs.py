"""Estimates how long the numpy kernels take on two cores: they do small jobs, because nothing has to be compiled.

The constants are seconds per unit of work, measured by ``benchmarks/first_job.py``. They need not be exact: both kinds
of kernels give the same vectors to rounding, and the rule only has to be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

# Reading counts three times, because the few kernels that it needs compile in a third of the time.
READ_ROW = 3 * 4e-7  # a row of a Parquet file
READ_BYTE = 3 * 3e-8  # a byte of a text file
GATHERED_VALUE = 7e-9  # a value of an interaction's row of features
ASSIGNED_VALUE = 2e-8  # a pair of an interaction and a cluster
PLACED_PAIR = 4e-6  # an interaction with cluster_on = "interactions": about 40 products with a table
USER = 2e-6  # a user
ITEM_VALUE = 4e-8  # a value of an item's features
AUTO_CLUSTERS = 64  # K for an estimate while `clusters = "auto"` has not chosen one


def reading_seconds(rows: int, text_bytes: int) -> float:
    """Seconds to read a number of Parquet rows and of bytes of text files into R."""
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
    """Seconds to fit and write the vectors of all modalities.

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
        Number of settings that are tried.
    """
    most = AUTO_CLUSTERS if isinstance(clusters, str) else clusters
    width, count = sum(widths), len(widths)
    per_pair = GATHERED_VALUE * width + ASSIGNED_VALUE * most * count + PLACED_PAIR * on_interactions
    return candidates * (pairs * per_pair + users * count * USER + items * width * ITEM_VALUE)
