"""Sets of arrays for the tests of structure."""

from __future__ import annotations

import numpy as np

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.structure.measure import StructureConfig, measure


def structure_metrics(image, text, pairs=None, config=None, **more):
    """Values and curves of a set of these arrays. pairs: by default row j with row j."""
    pairs = np.repeat(np.arange(len(image))[:, None], 2, axis=1) if pairs is None else pairs
    found = measure(
        EmbeddedSet("made", {}, {"image": image, "text": text} | more, pairs=pairs), config or StructureConfig()
    )
    return found.values, found.curves
