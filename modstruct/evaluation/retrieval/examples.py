"""Retrieved examples of an embedded set: evenly spaced queries, each with the items that the model ranks first."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from modstruct.data.faults import BadSample
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.measure import DIRECTIONS
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.files import atomic_write

FILE = "examples.json"
QUERIES = 6
"""Of each direction."""
RESULTS = 5
"""Of each query."""
SIDE_PIXELS = 256
"""Of an image's longer side, at most."""
QUALITY = 85


class Images(Protocol):
    """The images of a set by their image rows; BadSample for one that can no longer be read."""

    def __getitem__(self, row: int) -> Image.Image: ...


def write_retrieved_examples(
    embedded: EmbeddedSet, outcomes: dict[str, np.ndarray], images: Images, folder: Path, queries: int = QUERIES
) -> None:
    """Write examples of both directions into a folder: examples.json and the images it names; by one process.

    outcomes: those of `measure_set_retrieval`. images: by image row of the set. queries: of each direction at most,
    spaced evenly over those that have a positive: the same ones for every model. examples.json, written last, is
      {"examples": [{"direction": "text_to_image", "query": ITEM, "rank": …, "results": [ITEM, …]}, …]}
      ITEM = {"key": key, "image": file name} or {"key": text row, "text": …}; of results also "right" and "score"
    rank: of the best right item. Results are the RESULTS exact nearest; "right": one of the query's pairs. An image
    that can no longer be read has no "image". Images of earlier examples are removed at the end.
    """
    image, text, pairs = embedded.rows("image"), embedded.rows("text"), np.asarray(embedded.pairs)
    examples: list[dict[str, Any]] = []
    shown: set[int] = set()
    for direction in DIRECTIONS:
        by_text = direction == "text_to_image"
        having_positive, ranks = outcomes[f"{direction}/query"], outcomes[f"{direction}/rank"]
        places = evenly_spaced(len(having_positive), queries)
        rows = having_positive[places]
        query_rows, gallery = (text, image) if by_text else (image, text)
        found = nearest(query_rows[rows], gallery, RESULTS)
        right_of = {int(row): set(pairs[pairs[:, int(by_text)] == row, 1 - int(by_text)].tolist()) for row in rows}
        for row, rank, results in zip(rows.tolist(), ranks[places].tolist(), found.tolist(), strict=True):
            scores = gallery[results].astype(np.float64) @ query_rows[row].astype(np.float64)
            shown |= set(results) if by_text else {row}
            items = [
                _item(embedded, item, is_image=by_text) | {"right": item in right_of[row], "score": float(score)}
                for item, score in zip(results, scores, strict=True)
            ]
            query = _item(embedded, row, is_image=not by_text)
            examples.append({"direction": direction, "query": query, "rank": rank, "results": items})
    written = _write_images(images, sorted(shown), folder)
    for item in (item for example in examples for item in (example["query"], *example["results"])):
        if item.get("image") not in written:
            item.pop("image", None)
    with atomic_write(folder / FILE) as file:
        file.write((json.dumps({"examples": examples}, indent=1) + "\n").encode())
    for old in folder.glob("retrieved-*.jpg"):
        if old.name not in written:
            old.unlink()


def _item(embedded: EmbeddedSet, row: int, is_image: bool) -> dict[str, Any]:
    if is_image:
        return {"key": embedded.keys[row], "image": _file_name(row)}
    return {"key": str(row), "text": embedded.captions[row]}


def _file_name(row: int) -> str:
    return f"retrieved-{row}.jpg"


def _write_images(images: Images, rows: Iterable[int], folder: Path) -> set[str]:
    """The names of the files written."""
    written = set()
    for row in rows:
        try:
            image = images[row].convert("RGB")
        except BadSample:
            continue
        image.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=QUALITY)
        with atomic_write(folder / _file_name(row)) as file:
            file.write(data.getvalue())
        written.add(_file_name(row))
    return written
