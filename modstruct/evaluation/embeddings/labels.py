"""Classes of an embedded set's images: those that it was embedded with, or the values of a field of the metadata."""

from __future__ import annotations

from itertools import islice

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

SET_LABEL = "label"
"""Name of the classes that a set was embedded with, where they came from no field of the metadata."""


def label_numbers(embedded: EmbeddedSet, label: str, option: str = "labels") -> tuple[np.ndarray, list[str]]:
    """Class of each image, (n,) int64, -1 for none, and the classes that occur, in alphabetical order or the set's.

    label: a field of the metadata, or the name of the classes that the set was embedded with. option: what errors call
    it. Raises ValueError for a label that no image has, or of fewer than two values, or of others than texts and whole
    numbers.
    """
    if embedded.labels is not None and label == (embedded.label_field or SET_LABEL):
        values: list = [None if number < 0 else int(number) for number in embedded.labels]
        known = sorted({number for number in values if number is not None})
        names = [embedded.class_names[number] for number in known]
    else:
        values = [record.get(label) for record in embedded.metadata]
        fields = sorted({field for record in islice(embedded.metadata, 100) for field in record})
        require(any(v is not None for v in values), option, label, f"no image has it: name one of {fields}")
        broken = next((v for v in values if not isinstance(v, str | int | bool | None)), None)
        require(broken is None, option, label, f"has the value {broken!r}: name a field of texts or whole numbers")
        known = sorted({v for v in values if v is not None}, key=lambda v: (isinstance(v, str), v))
        names = [str(value) for value in known]
    require(len(names) > 1, option, label, f"all images have the value {names[0] if names else None!r}: give two")
    place = {value: number for number, value in enumerate(known)} | {None: -1}
    return np.array([place[value] for value in values], dtype=np.int64), names


def distinct_classes(embedded: EmbeddedSet, label: str, option: str) -> np.ndarray | None:
    """As `label_numbers`, of the images that are no copies, (n,); of the set's own classes where label is empty, and
    None where it has no two of them."""
    if not label:
        if embedded.labels is None or len(np.unique(embedded.labels[embedded.labels >= 0])) < 2:
            return None
        label = embedded.label_field or SET_LABEL
    return label_numbers(embedded, label, option)[0][: embedded.rows_of("image") - len(embedded.copies)]
