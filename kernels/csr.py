"""The three arrays of a sparse matrix by rows."""

from __future__ import annotations

from typing import Any, NamedTuple


class Csr(NamedTuple):
    """Rows of interactions: ``indices[indptr[u]:indptr[u + 1]]`` are the items of user u.

    ``indptr`` (n + 1,) int64, starting at any offset into the other two; ``indices`` (nnz,) int32;
    ``weights`` (nnz,) float32, or None where every interaction weighs 1. It is a class of our own because scipy casts
    ``indptr`` to the type of ``indices``, which overflows from 2^31 non-zeros on.
    """

    indptr: Any
    indices: Any
    weights: Any

    def rows(self, start: int, stop: int) -> Csr:
        """Users ``start`` to ``stop``, sharing memory."""
        return Csr(self.indptr[start : stop + 1], self.indices, self.weights)
