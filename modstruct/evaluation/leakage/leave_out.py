"""An embedded set without some of its images, for every metric to measure as it measures any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, write_embedded_set
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, ROWS_AT_ONCE, RowStream


def read_keys(path: str | Path) -> list[str]:
    """Keys of a leaked_keys.jsonl, one JSON text a line. Raises ValueError naming file and line."""
    keys = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                key = json.loads(line)
            except ValueError:
                key = None
            if not isinstance(key, str):
                raise ValueError(f"{path}, line {number}: {line.strip()[:80]!r}: write one key a line, in quotes")
            keys.append(key)
    return keys


def rows_kept(embedded: EmbeddedSet, keys: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images, and of the texts, that stay when the images of these keys are left out.

    A text stays if it belongs to an image that stays, or belonged to none before. Every image of a key goes.
    Returns two ascending arrays int64. Raises ValueError for a key that the set has not, and if no image stays.
    """
    gone = set(keys)
    own = embedded.keys
    unknown = sorted(gone.difference(own))
    require(
        not unknown,
        "keys to leave out",
        unknown[:3],
        f"{len(unknown)} of {len(gone)} are not in {embedded.folder}: find the leakage of this very set",
    )
    stays = np.array([key not in gone for key in own], dtype=bool)
    require(bool(stays.any()), "keys to leave out", len(gone), f"no image of {embedded.folder} would be left")
    texts = embedded.manifest["rows"]["text"]
    pairs = np.asarray(embedded.pairs)
    text_stays = np.ones(texts, dtype=bool)
    text_stays[pairs[:, 1]] = False
    text_stays[pairs[stays[pairs[:, 0]], 1]] = True
    return np.flatnonzero(stays), np.flatnonzero(text_stays)


def leave_out(embedded: EmbeddedSet, keys: Iterable[str], folder: str | Path) -> EmbeddedSet:
    """The set without the images of these keys, written into a folder; what lies there already is taken as it is.

    Its name, and thus the folder of its results, is that of the set with "-without-leaked" behind it. Classes stay as
    they are, also those without an image left, so that chance stays the same. Memory: blocks of rows, and the lists
    of keys, captions and metadata. Raises ValueError as `rows_kept`.
    """
    keys = sorted(set(keys))
    images, texts = rows_kept(embedded, keys)
    made = [embedded.source, embedded.model, embedded.manifest.get("settings"), embedded.manifest["dtype"], keys]
    fingerprint = hashlib.blake2b(json.dumps(made).encode(), digest_size=16)
    source = embedded.source | {
        "name": f"{embedded.source.get('name', embedded.name)}-without-leaked",
        "fingerprint": fingerprint.hexdigest(),
        "left_out": len(embedded.keys) - len(images),
        "of": embedded.source.get("fingerprint"),
    }
    try:
        there = EmbeddedSet.open(folder)
        if there.source == source and there.arrays == embedded.arrays:
            return there
    except (FileNotFoundError, ValueError):
        pass  # there is none, or an unfinished or damaged one, which is written anew
    require(
        Path(folder).resolve() != embedded.folder.resolve(), "folder", str(folder), "is the set itself; name another"
    )
    arrays = {}
    for array in sorted(embedded.arrays):
        rows = embedded.rows(array)
        kept = images if array in IMAGE_ARRAYS else texts
        arrays[array] = RowStream((len(kept), *rows.shape[1:]), rows.dtype, _pieces(rows, kept))
    pairs = np.asarray(embedded.pairs)
    pairs = pairs[np.isin(pairs[:, 0], images)]
    renumbered = np.stack((np.searchsorted(images, pairs[:, 0]), np.searchsorted(texts, pairs[:, 1])), axis=1)
    labels = embedded.labels
    return write_embedded_set(
        folder,
        f"{embedded.name}-without-leaked",
        embedded.model,
        arrays,
        pairs=renumbered if "text" in embedded.arrays else None,
        indices=np.asarray(embedded.indices)[images],
        labels=None if labels is None else np.asarray(labels)[images],
        class_prompts=embedded.class_prompts,
        class_names=embedded.class_names,
        templates=embedded.templates,
        label=embedded.label_field,
        keys=(embedded.keys[row] for row in images),
        captions=(embedded.captions[row] for row in texts),
        metadata=(embedded.metadata[row] for row in images),
        source=source,
        skipped=embedded.manifest.get("skipped"),
    )


def _pieces(rows: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[kept[start : start + ROWS_AT_ONCE]] for start in range(0, len(kept), ROWS_AT_ONCE))
