"""Interactions in one piece, as `spectral.fit` asks about them."""

from __future__ import annotations

from typing import Any

from gpu_init.backend.interface import Backend
from gpu_init.method import spectral
from gpu_init.method.matrix import Interactions


class WholeGraph(spectral.Whole):
    """A graph of one part: what a run sums over the parts of the users is here that of all of them."""

    def __init__(self, backend: Backend, interactions: Interactions) -> None:
        super().__init__(backend, interactions)
        self.items, self.pairs = interactions.items, interactions.pairs

    def item_sums(self) -> Any:
        return self._interactions.item_sums(self._backend)

    def large(self, most: int) -> Any:
        labels = spectral.component_labels(self._backend, self._interactions)
        return spectral.large_labels(labels, spectral.component_sizes(self._backend, self._interactions, labels), most)
