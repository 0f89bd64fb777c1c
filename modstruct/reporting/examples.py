"""Retrieved examples: queries with what each run ranked first, as images small enough to embed in the page.

Every JSON file in results/SET/examples/ (examples.json, leakage.json) is {"examples": [EXAMPLE, …]} with
EXAMPLE = {"direction": "text_to_image", "query": ITEM, "rank": of the best right item, "right": that item, "results":
[ITEM, …]} and ITEM = {"key": …, "image": file name beside it, or "text": …, "right": whether it belongs to the query,
"score": …}, where everything but the query and the results may be missing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modstruct.evaluation.result import is_number, read_json, refuse_file
from modstruct.reporting.loading import Evaluation

SIDE_PIXELS = 192
"""Longest side of an embedded image: sharp at the 96 pixels it is shown with on a high-resolution screen."""
SHOWN_QUERIES = 6
"""Of each set and direction."""
SHOWN_RESULTS = 5
LARGEST_PAGE_BYTES = 6 << 20
"""Of all images in the page; later ones are named instead of shown."""


@dataclass(frozen=True)
class Item:
    """An image or a text. image: data URI, None for a text and for an image beyond the page's limit. name: its key."""

    name: str
    text: str | None
    image: str | None
    right: bool | None
    score: float | None


@dataclass(frozen=True)
class Retrieved:
    """What one run found of a query. run: its number. rank: of the best right item, from 1. right: that item."""

    run: int
    rank: int | None
    query: Item
    right: Item | None
    results: tuple[Item, ...]


def galleries(
    runs: Sequence[Evaluation], limit: int = LARGEST_PAGE_BYTES
) -> dict[tuple[str, str], list[list[Retrieved]]]:
    """By set and direction the queries, each with what the runs found of it. limit: bytes of all images.

    Raises ValueError naming a file that is broken or missing.
    """
    found: dict[tuple[str, str], dict[tuple, list[tuple[int, Path, dict[str, Any]]]]] = {}
    for i, run in enumerate(runs):
        for path in sorted(run.folder.glob("results/*/examples/*.json")):
            for example in _read(path):
                of_set = found.setdefault((path.parents[1].name, str(example.get("direction", "retrieved"))), {})
                query = example["query"]
                # The key identifies an image; its file may have another name in each run.
                of_set.setdefault((query.get("key") or query.get("image"), query.get("text")), []).append(
                    (i, path, example)
                )
    images: dict[Path, str | None] = {}

    def retrieved(i: int, path: Path, example: dict[str, Any]) -> Retrieved:
        shown = [example["query"], *example["results"][:SHOWN_RESULTS]]
        query, *results = (_item(item, path, images, limit) for item in shown)
        right = _item(example["right"], path, images, limit) if "right" in example else None
        return Retrieved(i, example.get("rank"), query, right, tuple(results))

    # Queries of most runs come first: they can be compared.
    return {
        place: [
            [retrieved(*one) for one in of] for of in sorted(queries.values(), key=len, reverse=True)[:SHOWN_QUERIES]
        ]
        for place, queries in sorted(found.items(), key=lambda entry: entry[0][0])
    }


def _read(path: Path) -> list[dict[str, Any]]:
    examples: Any = read_json(path).get("examples")
    for example in examples if isinstance(examples, list) else [{}]:
        found = example if isinstance(example, dict) else {}
        results = found.get("results")
        items = [found.get("query"), *results, found.get("right", {})] if isinstance(results, list) else [None]
        if not all(isinstance(item, dict) for item in items):
            refuse_file(path, '"examples" must be a list of objects with a query and its results')
    return examples


def _item(item: dict[str, Any], beside: Path, made: dict[Path, str | None], limit: int) -> Item:
    """made: the images so far, each file once; `limit` bytes of them at most."""
    text, right, score = (item.get(key) for key in ("text", "right", "score"))
    file = item.get("image", item.get("picture"))  # the older name of the field
    # A name only: a results file must not make the page read other files.
    if file is not None and (not isinstance(file, str) or Path(file).name != file):
        refuse_file(beside, f'"image" = {file!r}: it must name a file of this folder')
    if file and (path := beside.parent / file) not in made:
        uri = _data_uri(path)
        made[path] = uri if len(uri) + sum(len(other or "") for other in made.values()) <= limit else None
    return Item(
        str(item.get("key") or file or ""),
        None if text is None else str(text),
        made[beside.parent / file] if file else None,
        right if isinstance(right, bool) else None,
        score if is_number(score) else None,
    )


def _data_uri(path: Path) -> str:
    """An image as a small JPEG."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (SIDE_PIXELS, SIDE_PIXELS))
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        refuse_file(path, f"not an image that can be read ({error})")
    image.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
