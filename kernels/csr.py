"""What kernels are given: the three arrays of a sparse matrix by rows, and the terms of a blend."""

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


class BlendTerms(NamedTuple):
    """What `Kernels.aggregate_blend` mixes with the local part ``A F`` of n users.

    With ``user_labels``, ``G_u`` is the centroid of the user's label. With ``item_labels`` instead, it is the mean of
    the centroids of the user's items, weighted by the interactions: ``mean_scale_u * sum_i w_ui C[label_i]`` over the
    items whose label is not negative.
    """

    lam: Any  # (n,) float64, the share of the local part
    centroids: Any  # (K, D) float32
    user_labels: Any  # (n,) int32, or None
    item_labels: Any  # (I,) int32, or None
    mean_scale: Any  # (n,) float64, or None where there are no item labels
    cold: Any  # (D,) the row of a cold user
    scale: float  # multiplies every row
