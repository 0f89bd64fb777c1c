"""Post-hoc centring: an embedded set whose shared embeddings are less the mean of their modality.

It closes the modality gap of any model without training (GR-CLIP and I0T do it): what a regulariser gains beside the
centred baseline is more than a smaller gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from modstruct.distributed.collect import on_main
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import ROWS_AT_ONCE, RowStream

SHARED = {"image": "image", "image_augmented": "image", "text": "text"}
"""The arrays that are centred, and the modality whose mean is taken from each."""
NEAREST = 1e-6
"""Least distance of a row from the mean: a nearer one has no direction."""


def centred(embedded: EmbeddedSet) -> EmbeddedSet:
    """The set in memory with z' = (z - m) / |z - m| in the place of its shared embeddings, named NAME-centred.

    m is the mean over the set's distinct images, for the augmented view too, and over its texts. Class prompts are less
    the mean text, or, where the set has no texts, the mean of all prompts. Features and independent embeddings stay as
    they are; there are no splits. The source keeps its fingerprint and has "centred": true. Means are computed in
    float64, rows keep their dtype. Raises ValueError naming the set, array and row of an embedding that equals the
    mean, as the only one of a set does.
    """
    made = _streamed(embedded)
    arrays = {name: np.concatenate(list(rows.pieces)) for name, rows in made.embeddings.items()}  # type: ignore[union-attr]
    return replace(made, embeddings={**embedded.embeddings, **arrays})


def centred_in(folder: Path, embedded: EmbeddedSet) -> EmbeddedSet:
    """As `centred`, with the centred arrays as a set in this folder, unless it is there already.

    Every process calls it; the main one writes. The other arrays are those of the given set.
    """

    def write() -> None:
        made = _streamed(embedded)
        with suppress(FileNotFoundError, ValueError):  # an unfinished or damaged one is overwritten
            if EmbeddedSet.open(folder).manifest == made.manifest:
                return
        made.save(folder)

    on_main(write)
    there = EmbeddedSet.open(folder)
    return replace(there, embeddings={**embedded.embeddings, **there.embeddings})


def _streamed(embedded: EmbeddedSet) -> EmbeddedSet:
    """With the centred arrays alone, as streams."""
    name, prompts = f"{embedded.name}-centred", embedded.class_prompts
    means = {
        modality: _mean(embedded.distinct_rows(modality))
        for modality in ("image", "text")
        if embedded.rows_of(modality)
    }
    streams = {}
    for array in sorted(SHARED.keys() & embedded.arrays):
        rows = embedded.rows(array)
        streams[array] = RowStream(
            rows.shape, rows.dtype, _moved(f"{embedded.name}: {array}", rows, means[SHARED[array]])
        )
    if prompts is not None:
        flat = prompts.reshape(-1, prompts.shape[-1])
        mean = means["text"] if "text" in means else _mean(flat)
        prompts = np.concatenate(list(_moved(f"{embedded.name}: class_prompts", flat, mean))).reshape(prompts.shape)
    source = {"name": f"{embedded.source.get('name', embedded.name)}-centred", "centred": True}
    return replace(
        embedded,
        name=name,
        embeddings=streams,
        class_prompts=prompts,
        source=embedded.source | source,
        splits={},
        folder=None,
    )


def _mean(rows: np.ndarray) -> np.ndarray:
    sums = (rows[a : a + ROWS_AT_ONCE].sum(0, dtype=np.float64) for a in range(0, len(rows), ROWS_AT_ONCE))
    return sum(sums, np.zeros(rows.shape[1])) / len(rows)


def _moved(name: str, rows: np.ndarray, mean: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        moved = rows[first : first + ROWS_AT_ONCE] - mean
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        nearest = int(norms.argmin())
        what = "is the mean of its modality and cannot be centred: the set needs embeddings that differ"
        require(norms[nearest, 0] > NEAREST, name, f"row {first + nearest}", what)
        yield (moved / norms).astype(rows.dtype)
