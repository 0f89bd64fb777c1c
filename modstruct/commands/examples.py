"""Retrieved images and captions for the report, read from the source where it still is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modstruct.cli import parse_recipe_text
from modstruct.commands.sets import read_set
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.examples import write_retrieved_examples


def write_examples(results: Path, noted: dict[str, Any], embedded: EmbeddedSet, noted_set: dict[str, str]) -> None:
    """Write the examples of a set's retrieval, unless they are newer than it; one process does.

    noted: what `embed` noted of the evaluation, noted_set: of the set. Raises ValueError or OSError where the source
    cannot be read any more, or is another one now.
    """
    retrieval, listed = results / "retrieval.npz", results / "examples" / "examples.json"
    if not retrieval.is_file() or (listed.is_file() and listed.stat().st_mtime_ns > retrieval.stat().st_mtime_ns):
        return
    recipe = parse_recipe_text(noted_set["recipe"])
    recipe.data.allow_pipe = False  # whoever made the folder wrote it
    source = read_set(noted_set["word"], recipe, noted["image_size"])
    embedded_of = embedded.source.get("of", embedded.source.get("fingerprint"))
    if source.fingerprint != embedded_of:
        raise ValueError(f"{noted_set['word']} holds other samples now than those embedded: embed it anew")
    with np.load(retrieval, allow_pickle=False) as outcomes:
        write_retrieved_examples(embedded, dict(outcomes), _Images(source.samples, embedded.indices), listed.parent)


class _Images:
    """Images of a source by row of the embedded set."""

    def __init__(self, samples: Any, indices: np.ndarray):
        self.samples, self.indices = samples, indices

    def __getitem__(self, row: int):
        return self.samples[int(self.indices[row])].picture
