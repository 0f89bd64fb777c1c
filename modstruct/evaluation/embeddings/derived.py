"""Sets made of embedded ones without another pass: centred, without images that leaked, or with other classes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.data.classification.labelled_shards import LabelledSamples
from modstruct.distributed.collect import on_main
from modstruct.errors import require
from modstruct.evaluation.embeddings import set_files
from modstruct.evaluation.embeddings.embedded_set import MANIFEST, EmbeddedSet
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, ROWS_AT_ONCE, RowStream
from modstruct.evaluation.embeddings.source import EmbeddingSource

log = logging.getLogger(__name__)
SHARED = {"image": "image", "image_augmented": "image", "text": "text"}
"""The arrays that are centred, and the modality whose mean is taken from each."""
NEAREST = 1e-6
"""Least distance of a row from the mean: a nearer one has no direction."""


def written(folder: Path, make: Callable[[], EmbeddedSet]) -> EmbeddedSet:
    """What `make` gives, as a set in this folder, unless it is there already; every process calls it, the main one
    writes."""

    def write() -> None:
        made = make()
        with suppress(FileNotFoundError, ValueError):  # an unfinished or damaged one is overwritten
            if EmbeddedSet.open(folder).manifest == made.manifest:
                return
        made.save(folder)

    on_main(write)
    return EmbeddedSet.open(folder)


def centred(embedded: EmbeddedSet, folder: Path) -> EmbeddedSet:
    """The set with z' = (z - m) / |z - m| in the place of its shared embeddings, named NAME-centred.

    Post-hoc centring closes the modality gap of any model without training (GR-CLIP and I0T do it): what a regulariser
    gains beside the centred baseline is more than a smaller gap. m is the mean over the set's distinct images, for the
    augmented view too, and over its texts. Class prompts are less the mean text, or, where the set has no texts, the
    mean of all prompts. Features and independent embeddings are those of the given set, and not in the folder; there
    are no splits. The source keeps its fingerprint and has "centred": true. Means are computed in float64, rows keep
    their dtype. Raises ValueError naming the set, array and row of an embedding that equals the mean.
    """
    there = written(folder, lambda: _centred(embedded))
    return replace(there, embeddings={**embedded.embeddings, **there.embeddings})


def _centred(embedded: EmbeddedSet) -> EmbeddedSet:
    """With the centred arrays alone, as streams."""
    modalities = [modality for modality in ("image", "text") if embedded.rows_of(modality)]
    means = {modality: _mean(embedded.distinct_rows(modality)) for modality in modalities}
    streams = {}
    for array in sorted(SHARED.keys() & embedded.arrays):
        rows = embedded.rows(array)
        moved = _moved(f"{embedded.name}: {array}", rows, means[SHARED[array]])
        streams[array] = RowStream(rows.shape, rows.dtype, moved)
    if (prompts := embedded.class_prompts) is not None:
        flat = prompts.reshape(-1, prompts.shape[-1])
        moved = _moved(f"{embedded.name}: class_prompts", flat, means["text"] if "text" in means else _mean(flat))
        prompts = np.concatenate(list(moved)).reshape(prompts.shape)
    source = {"name": f"{embedded.source.get('name', embedded.name)}-centred", "centred": True}
    more: dict[str, Any] = {"class_prompts": prompts, "source": embedded.source | source}
    return replace(embedded, name=f"{embedded.name}-centred", embeddings=streams, splits={}, folder=None, **more)


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


def without(embedded: EmbeddedSet, keys: Iterable[str], folder: Path) -> EmbeddedSet:
    """The set without the images of these keys and their copies under other keys, named NAME-without-leaked.

    A text remains if it belongs to an image that does, or belonged to none. All classes are kept, also those without an
    image left, so that chance stays the same. Raises ValueError for a key that the set does not have, if no image
    remains, and for the folder of the set itself, which would be lost.
    """
    itself = embedded.folder is not None and embedded.folder.resolve() == folder.resolve()
    require(not itself, "folder", str(folder), "is the set itself; name another")
    return written(folder, lambda: _without(embedded, sorted(set(keys))))


def _without(embedded: EmbeddedSet, keys: list[str]) -> EmbeddedSet:
    same, pairs, unknown = embedded.image_row, embedded.pairs, sorted({*keys}.difference(embedded.keys))
    remedy = f"{len(unknown)} of {len(keys)} are not in {embedded.name}: find the leakage of this very set"
    require(not unknown, "keys to leave out", unknown[:3], remedy)
    leaving = {*keys}
    leaves = np.array([key in leaving for key in embedded.keys])
    if more := int(leaves.sum()) - len(keys):
        text = "%s: %d images leave with another of the same key; keys that differ would tell them apart"
        log.warning(text, embedded.name, more)
    stays = ~np.isin(same, same[leaves])
    require(bool(stays.any()), "keys to leave out", len(keys), f"no image of {embedded.name} would be left")
    texts = np.arange(embedded.rows_of("text"))
    lost = np.isin(texts, pairs[:, 1]) & ~np.isin(texts, pairs[stays[pairs[:, 0]], 1])
    images, texts = np.flatnonzero(stays), texts[~lost]

    def stream(name: str) -> RowStream:
        rows, kept = embedded.rows(name), images if name in IMAGE_ARRAYS else texts
        starts = range(0, len(kept), ROWS_AT_ONCE)
        return RowStream((len(kept), rows.shape[1]), rows.dtype, (rows[kept[a : a + ROWS_AT_ONCE]] for a in starts))

    made = [embedded.source, embedded.model, embedded.settings, embedded.embeddings["image"].dtype.name, keys]
    source = {
        "name": f"{embedded.source.get('name', embedded.name)}-without-leaked",
        "fingerprint": hashlib.blake2b(json.dumps(made).encode(), digest_size=16).hexdigest(),
        "left_out": len(embedded.keys) - len(images),
        "of": embedded.source.get("fingerprint"),
    }
    pairs, same = pairs[stays[pairs[:, 0]]], same[images]
    return replace(
        embedded,
        name=f"{embedded.name}-without-leaked",
        embeddings={name: stream(name) for name in embedded.arrays},
        pairs=np.stack((np.searchsorted(images, pairs[:, 0]), np.searchsorted(texts, pairs[:, 1])), axis=1),
        copies=np.searchsorted(images, same[same != images]),
        indices=embedded.indices[images],
        labels=None if embedded.labels is None else embedded.labels[images],
        keys=[embedded.keys[row] for row in images],
        captions=[embedded.captions[row] for row in texts],
        metadata=[embedded.metadata[row] for row in images],
        source=embedded.source | source,
        folder=None,
        splits={},
    )


def twin_of(folder: Path, source: EmbeddingSource, settings: dict[str, Any]) -> Path | None:
    """Beside a set that is to be embedded, a finished one of the same samples, model and settings, with other classes.

    Not where samples were left out: which, is known by reading them.
    """
    if not (source.content and isinstance(source.samples, LabelledSamples)):
        return None
    for path in sorted(folder.parent.glob(f"*/{MANIFEST}")):
        noted = set_files.read_json(path)
        before, of_classes = noted.get("settings", {}), ("source fingerprint", "classes")
        same = all(before.get(name) == value for name, value in settings.items() if name not in of_classes)
        same &= noted.get("source", {}).get("content") == source.content
        if same and noted["rows"]["image"] == len(source.samples) and not noted["skipped"]:
            return path.parent
    return None


def relabelled(twin: EmbeddedSet, source: EmbeddingSource, **more: Any) -> EmbeddedSet:
    """What embedding a source would give, from the embeddings of the same samples with other classes.

    more: class_prompts, settings and command of the set.
    """
    metadata = list(map(source.samples.labelled, twin.metadata, twin.keys))
    more |= source.noted | {"metadata": metadata, "labels": source.labels_of(metadata)}
    return replace(twin, name=source.name, seconds=0.0, folder=None, **more)
