"""Degrees, and the sparse operators of the local part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.method.matrix import Interactions, power


def weighting(
    backend: Backend, interactions: Interactions, present: Any, kind: str, item_factors: Any = None
) -> Weighting:
    """Degrees over the items that have the modality, and the operator A from them.

    Parameters
    ----------
    present : array, shape (I,), bool
        Which items have the modality.
    kind : {"mean", "sym"}
        ``mean``: A = D_U^-1 R; ``sym``: A = D_U^-1/2 R D_I^-1/2.
    item_factors : array, shape (I,), float64, optional
        D_I^-1/2 of other interactions than these, 0 for items without the modality.
    """
    xp = backend.xp
    present = present.astype(xp.float64)
    degrees = interactions.user_degrees(backend, present)
    mean_rows = power(xp, degrees, -1.0)
    if kind == "mean":
        return Weighting(mean_rows, present, mean_rows, present)
    if item_factors is None:
        item_factors = present * power(xp, interactions.item_sums(backend), -0.5)
    return Weighting(power(xp, degrees, -0.5), item_factors, mean_rows, present)


@dataclass(frozen=True)
class Weighting:
    """Row and item factors of the sparse operators of one modality, all float64.

    ``local = diag(local_rows) R diag(local_items)`` is A, which makes the local part, ``means = diag(mean_rows) R
    diag(present)`` the interaction-weighted means D_U^-1 R. A row factor of 0 marks a cold user.
    """

    local_rows: Any
    local_items: Any
    mean_rows: Any
    present: Any

    @property
    def warm(self) -> Any:
        """Users with a usable interaction in this modality, (U,) bool."""
        return self.mean_rows > 0
