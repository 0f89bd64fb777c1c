"""The best few pairs of each query, gathered block by block."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Pairs of rows with a score, the lower the better; three arrays (p,)."""

    query: np.ndarray
    item: np.ndarray
    score: np.ndarray

    @classmethod
    def none(cls) -> Pairs:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))

    def and_best(self, more: Pairs, keep: int) -> Pairs:
        """These and more, of each query the best `keep`; of a tie the lower item. Ascending by query, score, item."""
        query, item, score = (np.concatenate(two) for two in zip(self, more, strict=True))
        order = np.lexsort((item, score, query))
        query, item, score = query[order], item[order], score[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        return Pairs(query[place < keep], item[place < keep], score[place < keep])
