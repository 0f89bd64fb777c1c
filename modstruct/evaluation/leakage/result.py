"""Near duplicates written for the report and for evaluation.

FOLDER/
    leakage.json, leakage.npz   a Result; its outcomes say which images leaked, by each way, in the order of rows
    leaked_pairs.jsonl      {"evaluation": key, "train": key, "hamming", "difference", "cosine", …}, a pair a line
    leaked_keys.jsonl       key of each evaluation image with a near duplicate, one JSON text a line: what to leave out
    examples/leakage.json   images side by side, as the report's examples, with "direction": "evaluation_to_training"
    examples/leakage-000-evaluation.jpg, leakage-000-training-0.jpg, …
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import write_lines
from modstruct.evaluation.examples import save_image
from modstruct.evaluation.leakage.duplicates import Pair, Thresholds
from modstruct.evaluation.result import Result, Value
from modstruct.evaluation.retrieval.rows import evenly_spaced

LEAKED_KEYS = "leaked_keys.jsonl"
LARGEST_SIDE, QUALITY = 384, 90
LABELS = {
    "any": "Found in any way",
    "by_hash": "By perceptual hash",
    "by_embedding": "By embedding",
    "both": "Found in both ways",
}
ABOUT = (
    "Share of the set's images that also occur, wholly or nearly, in what the model was trained on. A share above zero "
    "makes this set's other metrics too good. It is about the data, so no direction is marked as better."
)


def leakage(
    evaluation: EmbeddedSet, train: EmbeddedSet, pairs: Sequence[Pair], limits: Thresholds, with_embeddings: bool
) -> Result:
    """The shares of evaluation images with a near duplicate, by each way that was looked for.

    evaluation, train: thumbnails; pairs: of `find_duplicates`.
    """
    count = len(evaluation.keys)
    by_hash, by_embedding = (
        np.isin(np.arange(count), [pair.evaluation for pair in pairs if way in pair.by])
        for way in ("hash", "embedding")
    )
    ways = {"any": by_hash | by_embedding, "by_hash": by_hash}
    if with_embeddings:
        ways |= {"by_embedding": by_embedding, "both": by_hash & by_embedding}
    return Result(
        metric="leakage",
        set=evaluation.name,
        values={way: Value(float(rows.mean()), LABELS[way], "share", rows=count) for way, rows in ways.items()},
        title="Leakage",
        about=ABOUT,
        headlines=("any",),
        settings=asdict(limits) | {"train_fingerprint": train.source.get("fingerprint")},
        rows={
            "image": count,
            "leaked": int(ways["any"].sum()),
            "train": len(train.keys),
            "unreadable": sum(evaluation.skipped.values()),
            "unreadable_train": sum(train.skipped.values()),
        },
        fingerprint=evaluation.source.get("fingerprint"),
        outcomes=ways,
    )


def write_lists(folder: Path, evaluation: EmbeddedSet, train: EmbeddedSet, pairs: Sequence[Pair]) -> None:
    """Write the pairs, and the keys that evaluation leaves out."""
    write_lines(folder / "leaked_pairs.jsonl", (_named(pair, evaluation, train) for pair in pairs))
    write_lines(folder / LEAKED_KEYS, (evaluation.keys[row] for row in sorted({pair.evaluation for pair in pairs})))


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


def _named(pair: Pair, evaluation: EmbeddedSet, train: EmbeddedSet) -> dict[str, Any]:
    return asdict(pair) | {"evaluation": evaluation.keys[pair.evaluation], "train": train.keys[pair.train]}


def write_examples(
    folder: Path,
    evaluation: EmbeddedSet,
    train: EmbeddedSet,
    pairs: Sequence[Pair],
    samples: Mapping[str, EvaluationSamples],
    count: int,
) -> None:
    """Draw `count` evenly spaced leaked images beside their training images, over earlier ones.

    samples: "evaluation" and "train", the images of both.
    """
    for old in (*folder.glob("leakage-*.jpg"), folder / "leakage.json"):
        old.unlink(missing_ok=True)
    of_image = [list(group) for _, group in groupby(pairs, lambda pair: pair.evaluation)]

    def saved(name: str, source: str, number: int) -> dict[str, str]:
        return save_image(lambda: samples[source][int(number)].image, folder / name, LARGEST_SIDE, QUALITY)

    examples = []
    for example, place in enumerate(evenly_spaced(len(of_image), count)):
        row, start, results = of_image[place][0].evaluation, f"leakage-{example:03d}", []
        for number, pair in enumerate(of_image[place]):
            image = saved(f"{start}-training-{number}.jpg", "train", train.indices[pair.train])
            about = _named(pair, evaluation, train)
            results.append({"key": about.pop("train"), "score": about["cosine"]} | about | image)
        query = saved(f"{start}-evaluation.jpg", "evaluation", evaluation.indices[row])
        query["key"] = evaluation.keys[row]
        examples.append({"direction": "evaluation_to_training", "query": query, "results": results})
    write_lines(folder / "leakage.json", [{"examples": examples}])
