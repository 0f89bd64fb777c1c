"""Embedded sets without the images that leaked, to be measured beside the whole ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, ROWS_AT_ONCE, RowStream

log = logging.getLogger(__name__)
LEAKED_KEYS = "leaked_keys.jsonl"
"""In the folder of a set's results: the keys to leave out, one JSON text a line."""


def read_keys(path: Path) -> list[str]:
    """The keys of such a file. Raises ValueError naming file and line."""
    keys = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            key = json.loads(line)
        except ValueError:
            key = None
        place = f"{path}, line {number}"
        require(isinstance(key, str), place, line.strip()[:80], "write one key a line, in quotes")
        keys.append(key)
    return keys


def rows_kept(embedded: EmbeddedSet, keys: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images, and of the texts, that remain without the images of these keys; ascending, int64.

    A text remains if it belongs to an image that does, or belonged to none. All images of a key are left out, and
    their copies under other keys. Raises ValueError for a key that the set does not have, and if no image remains.
    """
    left_out, same, pairs = set(keys), embedded.image_row, embedded.pairs
    unknown = sorted(left_out.difference(embedded.keys))
    remedy = f"{len(unknown)} of {len(left_out)} are not in {embedded.name}: find the leakage of this very set"
    require(not unknown, "keys to leave out", unknown[:3], remedy)
    leaves = np.array([key in left_out for key in embedded.keys])
    if more := int(leaves.sum()) - len(left_out):
        text = "%s: %d images leave with another of the same key; keys that differ would tell them apart"
        log.warning(text, embedded.name, more)
    stays = ~np.isin(same, same[leaves])
    require(bool(stays.any()), "keys to leave out", len(left_out), f"no image of {embedded.name} would be left")
    texts = np.arange(embedded.rows_of("text"))
    lost = np.isin(texts, pairs[:, 1]) & ~np.isin(texts, pairs[stays[pairs[:, 0]], 1])
    return np.flatnonzero(stays), np.flatnonzero(~lost)


def leave_out(embedded: EmbeddedSet, keys: Iterable[str], folder: Path) -> EmbeddedSet:
    """The set without the images of these keys, written into a folder unless it is there already.

    Its name, and so the folder of its results, is that of the set with "-without-leaked" appended. All classes are
    kept, also those without an image left, so that chance stays the same. Raises ValueError as `rows_kept`, and for
    the folder of the set itself, which would be lost.
    """
    itself = embedded.folder is not None and embedded.folder.resolve() == folder.resolve()
    require(not itself, "folder", str(folder), "is the set itself; name another")
    keys = sorted(set(keys))
    images, texts = rows_kept(embedded, keys)
    made = [embedded.source, embedded.model, embedded.settings, embedded.embeddings["image"].dtype.name, keys]
    source = embedded.source | {
        "name": f"{embedded.source.get('name', embedded.name)}-without-leaked",
        "fingerprint": hashlib.blake2b(json.dumps(made).encode(), digest_size=16).hexdigest(),
        "left_out": len(embedded.keys) - len(images),
        "of": embedded.source.get("fingerprint"),
    }
    with suppress(FileNotFoundError, ValueError):  # an unfinished or damaged one is overwritten
        there = EmbeddedSet.open(folder)
        if there.source == source and there.arrays == embedded.arrays:
            return there

    def stream(name: str) -> RowStream:
        rows, kept = embedded.rows(name), images if name in IMAGE_ARRAYS else texts
        starts = range(0, len(kept), ROWS_AT_ONCE)
        return RowStream((len(kept), rows.shape[1]), rows.dtype, (rows[kept[a : a + ROWS_AT_ONCE]] for a in starts))

    pairs, same = embedded.pairs[np.isin(embedded.pairs[:, 0], images)], embedded.image_row[images]
    rest = replace(
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
        source=source,
        folder=None,
        splits={},
    )
    return rest.save(folder)
