"""Near duplicates written for the report and for evaluation, and embedded sets without them.

FOLDER/
    leakage.json            metrics, pairs, settings; written last
    leakage.npz             (n,) bool by hash, embedding, both and any, in the order of rows
    leaked_keys.jsonl       key of each evaluation image with a near duplicate, one JSON text a line (see leave_out)
    examples/leakage.json   images side by side, as the report's examples, with "direction": "evaluation_to_training"
    examples/leakage-000-evaluation.jpg, leakage-000-training-0.jpg, …
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, SetContents, write_embedded_set
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, ROWS_AT_ONCE, RowStream
from modstruct.evaluation.leakage.duplicates import Duplicates, Thresholds
from modstruct.evaluation.leakage.prints import Prints
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.files import atomic_write

log = logging.getLogger(__name__)

LARGEST_SIDE = 384
QUALITY = 90
LEAKED_KEYS = "leaked_keys.jsonl"
MOST_PAIRS = 10_000
"""Listed in leakage.json; leaked_keys.jsonl is complete."""


def outcomes(found: Duplicates, rows: int) -> dict[str, np.ndarray]:
    """Which evaluation images have a near duplicate, (rows,) bool: "by_hash", "by_embedding", by "both", by "any"."""
    ways = {}
    for way, pairs in (("by_hash", found.by_hash), ("by_embedding", found.by_embedding)):
        ways[way] = np.zeros(rows, dtype=bool)
        ways[way][found.evaluation[pairs]] = True
    both, either = ways["by_hash"] & ways["by_embedding"], ways["by_hash"] | ways["by_embedding"]
    return ways | {"both": both, "any": either}


@dataclass(frozen=True)
class Comparison:
    """An evaluation set, a training source, and the near duplicates between them."""

    evaluation: Prints
    train: Prints
    thresholds: Thresholds
    with_embeddings: bool
    """Whether embeddings were compared; without, the metrics by embedding are left out."""
    found: Duplicates


def write_result(
    folder: Path,
    set_name: str,
    compared: Comparison,
    samples: tuple[EvaluationSamples, EvaluationSamples] | None = None,
    examples: int = 24,
    command: Sequence[str] = (),
    seconds: float = 0.0,
) -> dict:
    """Write everything; returns the content of leakage.json.

    samples: evaluation set and training source, from which `examples` evenly spaced leaked images are drawn beside
    their training images.
    """
    found, evaluation, train = compared.found, compared.evaluation, compared.train
    leaked = outcomes(found, len(evaluation))
    ways = ("any", "by_hash", "by_embedding", "both") if compared.with_embeddings else ("any", "by_hash")
    result = {
        "metric": "leakage",
        "set": set_name,
        "figures": {way: {"value": float(leaked[way].mean()), "rows": len(evaluation)} for way in ways},
        "pairs": [_pair(compared, number) for number in range(min(len(found.train), MOST_PAIRS))],
        "pairs_found": len(found.train),
        "curves": {},
        "settings": asdict(compared.thresholds),
        "rows": {"image": len(evaluation), "leaked": int(leaked["any"].sum()), "train": len(train)},
        "skipped": {"evaluation": evaluation.skipped, "train": train.skipped},
        "source_fingerprint": evaluation.source_fingerprint,
        "train_fingerprint": train.source_fingerprint,
        "seconds": seconds,
        "command": list(command),
    }
    if samples is not None:
        _write_examples(folder / "examples", compared, samples, examples)
    with atomic_write(folder / LEAKED_KEYS) as file:
        for row in np.flatnonzero(leaked["any"]):
            file.write((json.dumps(evaluation.keys[row]) + "\n").encode())
    with atomic_write(folder / "leakage.npz") as file:
        np.savez(file, **{way: leaked[way] for way in ways})  # type: ignore[arg-type]
    with atomic_write(folder / "leakage.json") as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def _pair(compared: Comparison, number: int) -> dict:
    found = compared.found
    difference, cosine = float(found.difference[number]), float(found.cosine[number])
    return {
        "evaluation": compared.evaluation.keys[found.evaluation[number]],
        "train": compared.train.keys[found.train[number]],
        "hamming": int(found.hamming[number]),
        "difference": difference if math.isfinite(difference) else None,
        "cosine": cosine if math.isfinite(cosine) else None,
        "mirrored": bool(found.mirrored[number]),
        "by": [way for way, ways in (("hash", found.by_hash), ("embedding", found.by_embedding)) if ways[number]],
    }


def _write_examples(
    folder: Path, compared: Comparison, samples: tuple[EvaluationSamples, EvaluationSamples], count: int
) -> None:
    for old in (*folder.glob("leakage-*.jpg"), folder / "leakage.json"):
        old.unlink(missing_ok=True)
    found, evaluation, train = compared.found, compared.evaluation, compared.train
    rows = np.unique(found.evaluation)
    rows = rows[evenly_spaced(len(rows), count)]
    examples = []
    for example, row in enumerate(rows):
        name = f"leakage-{example:03d}-evaluation.jpg"
        query = {"key": evaluation.keys[row]} | _saved(folder / name, samples[0], int(evaluation.indices[row]))
        results = []
        for place, number in enumerate(np.flatnonzero(found.evaluation == row).tolist()):
            name, item = f"leakage-{example:03d}-training-{place}.jpg", int(found.train[number])
            about = _pair(compared, number)
            image = _saved(folder / name, samples[1], int(train.indices[item]))
            results.append({"key": about.pop("train"), "score": about["cosine"]} | about | image)
        examples.append({"direction": "evaluation_to_training", "query": query, "results": results})
    with atomic_write(folder / "leakage.json") as file:
        file.write((json.dumps({"examples": examples}, indent=1, allow_nan=False) + "\n").encode())


def _saved(path: Path, samples: EvaluationSamples, number: int) -> dict[str, str]:
    """Save a sample's image, at most LARGEST_SIDE wide and high; {} if it can no longer be read."""
    try:
        image = samples[number].image
    except BadSample:
        return {}
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return {"image": path.name}


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
    """Rows of the images, and of the texts, that remain without the images of these keys.

    A text remains if it belongs to an image that does, or belonged to none. All images of a key are left out, and
    their copies under other keys. Returns two ascending arrays int64. Raises ValueError for a key that the set does not
    have, and if no image remains.
    """
    left_out = set(keys)
    own = embedded.keys
    unknown = sorted(left_out.difference(own))
    require(
        not unknown,
        "keys to leave out",
        unknown[:3],
        f"{len(unknown)} of {len(left_out)} are not in {embedded.folder}: find the leakage of this very set",
    )
    leaves = np.array([key in left_out for key in own], dtype=bool)
    if more := int(leaves.sum()) - len(left_out):
        twice = next(key for key, times in Counter(own).items() if times > 1 and key in left_out)
        text = "%s: %d images leave with another of the same key (first %r); keys that differ would tell them apart"
        log.warning(text, embedded.folder, more, twice)
    same = embedded.image_row
    stays = np.bincount(same, weights=leaves, minlength=len(own))[same] == 0
    require(bool(stays.any()), "keys to leave out", len(left_out), f"no image of {embedded.folder} would be left")
    texts = embedded.manifest["rows"]["text"]
    pairs = np.asarray(embedded.pairs)
    text_stays = np.ones(texts, dtype=bool)
    text_stays[pairs[:, 1]] = False
    text_stays[pairs[stays[pairs[:, 0]], 1]] = True
    return np.flatnonzero(stays), np.flatnonzero(text_stays)


def leave_out(embedded: EmbeddedSet, keys: Iterable[str], folder: str | Path) -> EmbeddedSet:
    """The set without the images of these keys, written into a folder unless it is there already.

    Its name, and so the folder of its results, is that of the set with "-without-leaked" appended. All classes are
    kept, also those without an image left, so that chance stays the same. Memory: blocks of rows, and the lists of
    keys, captions and metadata. Raises ValueError as `rows_kept`.
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
        pass  # there is none, or an unfinished or damaged one, which is overwritten
    apart = embedded.folder is None or Path(folder).resolve() != embedded.folder.resolve()
    require(apart, "folder", str(folder), "is the set itself; name another")
    arrays: dict[str, np.ndarray | RowStream] = {}
    for array in sorted(embedded.arrays):
        rows = embedded.rows(array)
        kept = images if array in IMAGE_ARRAYS else texts
        arrays[array] = RowStream((len(kept), *rows.shape[1:]), rows.dtype, _pieces(rows, kept))
    pairs = np.asarray(embedded.pairs)
    pairs = pairs[np.isin(pairs[:, 0], images)]
    renumbered = np.stack((np.searchsorted(images, pairs[:, 0]), np.searchsorted(texts, pairs[:, 1])), axis=1)
    labels, same = embedded.labels, embedded.image_row
    copies = np.searchsorted(images, same[images[same[images] != images]])
    return write_embedded_set(
        folder,
        SetContents(
            f"{embedded.name}-without-leaked",
            embedded.model,
            arrays,
            pairs=renumbered if "text" in embedded.arrays else None,
            copies=copies if len(copies) else None,
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
        ),
    )


def _pieces(rows: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[kept[start : start + ROWS_AT_ONCE]] for start in range(0, len(kept), ROWS_AT_ONCE))
