"""What was found, written for the report and for evaluation.

FOLDER/
    leakage.json            figures, pairs, settings; written last
    leakage.npz             (n,) bool a way, a value for each evaluation image in order of rows
    leaked_keys.jsonl       key of each evaluation image with a near duplicate, one JSON text a line (see leave_out)
    examples/leakage.json   images side by side, as the report's examples, with "direction": "evaluation_to_training"
    examples/leakage-000-evaluation.jpg, leakage-000-training-0.jpg, …
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.shards.faults import BadSample
from modstruct.evaluation.leakage.duplicates import Duplicates, Thresholds
from modstruct.evaluation.leakage.prints import Prints
from modstruct.files import atomic_write

LARGEST_PICTURE = 384
QUALITY = 90
LEAKED_KEYS = "leaked_keys.jsonl"
MOST_PAIRS = 10_000
"""In the JSON file; leaked_keys.jsonl has them all."""


def outcomes(found: Duplicates, rows: int) -> dict[str, np.ndarray]:
    """Which evaluation images have a near duplicate, (rows,) bool: "by_hash", "by_embedding", "both" ways, "any"."""
    ways = {}
    for way in ("by_hash", "by_embedding"):
        ways[way] = np.zeros(rows, dtype=bool)
        ways[way][found.evaluation[getattr(found, way)]] = True
    both, either = ways["by_hash"] & ways["by_embedding"], ways["by_hash"] | ways["by_embedding"]
    return ways | {"both": both, "any": either}


def write_result(
    folder: Path,
    set_name: str,
    found: Duplicates,
    evaluation: Prints,
    train: Prints,
    thresholds: Thresholds,
    *,
    with_embeddings: bool,
    pictures: tuple[EvaluationSamples, EvaluationSamples] | None = None,
    examples: int = 24,
    command: Sequence[str] = (),
    seconds: float = 0.0,
) -> dict:
    """Write everything; returns what leakage.json holds.

    images: evaluation set and training source, from which the first `examples` leaked images are drawn beside their
    training images, spread evenly. with_embeddings: whether embeddings were compared; without, the figures by
    embedding are left out.
    """
    leaked = outcomes(found, len(evaluation))
    ways = ("any", "by_hash", "by_embedding", "both") if with_embeddings else ("any", "by_hash")
    pairs = [_pair(found, number, evaluation, train) for number in range(min(len(found.train), MOST_PAIRS))]
    result = {
        "metric": "leakage",
        "set": set_name,
        "figures": {way: {"value": float(leaked[way].mean()), "rows": len(evaluation)} for way in ways},
        "pairs": pairs,
        "pairs_found": len(found.train),
        "curves": {},
        "settings": asdict(thresholds),
        "rows": {"image": len(evaluation), "leaked": int(leaked["any"].sum()), "train": len(train)},
        "skipped": {"evaluation": evaluation.skipped, "train": train.skipped},
        "source_fingerprint": evaluation.source_fingerprint,
        "train_fingerprint": train.source_fingerprint,
        "seconds": seconds,
        "command": list(command),
    }
    if pictures is not None:
        _write_examples(folder / "examples", found, evaluation, train, pictures, examples)
    with atomic_write(folder / LEAKED_KEYS) as file:
        for row in np.flatnonzero(leaked["any"]):
            file.write((json.dumps(evaluation.keys[row]) + "\n").encode())
    with atomic_write(folder / "leakage.npz") as file:
        np.savez(file, **{way: leaked[way] for way in ways})
    with atomic_write(folder / "leakage.json") as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def _pair(found: Duplicates, number: int, evaluation: Prints, train: Prints) -> dict:
    difference, cosine = float(found.difference[number]), float(found.cosine[number])
    return {
        "evaluation": evaluation.keys[found.evaluation[number]],
        "train": train.keys[found.train[number]],
        "hamming": int(found.hamming[number]),
        "difference": difference if math.isfinite(difference) else None,
        "cosine": cosine if math.isfinite(cosine) else None,
        "mirrored": bool(found.mirrored[number]),
        "by": [way.removeprefix("by_") for way in ("by_hash", "by_embedding") if getattr(found, way)[number]],
    }


def _write_examples(
    folder: Path,
    found: Duplicates,
    evaluation: Prints,
    train: Prints,
    pictures: tuple[EvaluationSamples, EvaluationSamples],
    count: int,
) -> None:
    for old in (*folder.glob("leakage-*.jpg"), folder / "leakage.json"):
        old.unlink(missing_ok=True)
    rows = np.unique(found.evaluation)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64))]
    examples = []
    for example, row in enumerate(rows):
        name = f"leakage-{example:03d}-evaluation.jpg"
        query = {"key": evaluation.keys[row]} | _saved(folder / name, pictures[0], int(evaluation.indices[row]))
        results = []
        for place, number in enumerate(np.flatnonzero(found.evaluation == row)):
            name, item = f"leakage-{example:03d}-training-{place}.jpg", int(found.train[number])
            about = _pair(found, number, evaluation, train)
            picture = _saved(folder / name, pictures[1], int(train.indices[item]))
            results.append({"key": about.pop("train"), "score": about["cosine"]} | about | picture)
        examples.append({"direction": "evaluation_to_training", "query": query, "results": results})
    with atomic_write(folder / "leakage.json") as file:
        file.write((json.dumps({"examples": examples}, indent=1, allow_nan=False) + "\n").encode())


def _saved(path: Path, samples: EvaluationSamples, number: int) -> dict[str, str]:
    """Save a sample's image, at most LARGEST_PICTURE wide and high; {} where it cannot be read any more."""
    try:
        picture = samples[number].picture
    except BadSample:
        return {}
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return {"picture": path.name}
