"""Structure figures of an embedded set, in the form in which results are saved."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.structure.measure import DEFAULT, structure_metrics
from modstruct.evaluation.structure.sampling import SamplingConfig

OPTIONAL = ("image_augmented", "image_independent", "text_independent")


def measure_set_structure(embedded: EmbeddedSet, config: SamplingConfig = DEFAULT) -> dict[str, Any]:
    """The structure of a set's latent space; one process measures it.

    embedded: with texts and pairs; figures of the augmented view and of the independent heads where the set has them.
    Returns the result (metric, set, figures, curves, settings, rows, source_fingerprint, seconds, command) with the
    figures and curves of `structure_metrics`. Raises ValueError where the set has no texts or no pairs.
    """
    started = time.monotonic()
    image, text, pairs = embedded.rows("image"), embedded.rows("text"), np.asarray(embedded.pairs)
    require(len(pairs) > 0, "pairs", str(embedded.folder), "this set has none: embed one whose images have captions")
    more = {name: embedded.rows(name) for name in OPTIONAL if name in embedded.arrays}
    figures = structure_metrics(image, text, pairs, config=config, **more)
    return {
        "metric": "structure",
        "set": embedded.name,
        "figures": {name: figure for name, figure in figures.items() if name != "curves"},
        "curves": figures["curves"],
        "settings": asdict(config) | {"arrays": ["image", "text", *more]},
        "rows": {"image": len(image), "text": len(text), "pairs": len(pairs)},
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.monotonic() - started,
        "command": list(sys.argv),
    }
