"""The label that is most frequent: what a classifier must be better than."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

Label = TypeVar("Label", int, bool, str)


def majority_label(labels: Iterable[Label | None]) -> Label:
    """The most frequent label, the smallest of several; None is no label. Raises ValueError if there is none.

    To be found on the training set and measured on another, like any prediction.
    """
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        raise ValueError("labels: there are none")
    return min(counts, key=lambda label: (-counts[label], label))
