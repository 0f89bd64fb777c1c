"""Retrieved examples: queries with what each run ranked first, as images small enough to embed in the page.

Every JSON file in results/SET/examples/ (examples.json, leakage.json) is {"examples": [EXAMPLE, …]} with
EXAMPLE = {"direction": "text_to_image", "query": ITEM, "rank": of the best right item, "results": [ITEM, …]}
ITEM = {"key": …, "image": file name beside it, or "text": …, "right": whether it belongs to the query, "score": …}
where everything but the query and the results may be missing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from modstruct.reporting.loading import Evaluation, read_json

SIDE_PIXELS = 192
"""Longest side of an embedded image: sharp at the 96 pixels it is shown with on a high-resolution screen."""
QUALITY = 82
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
    """What one run found. style: number of the run. rank: of the best right item, from 1."""

    run: str
    style: int
    rank: int | None
    results: tuple[Item, ...]


@dataclass(frozen=True)
class Query:
    item: Item
    found: tuple[Retrieved, ...]


@dataclass(frozen=True)
class Gallery:
    """Queries of one set in one direction, each with what the runs found."""

    set: str
    direction: str
    queries: tuple[Query, ...]


class Images:
    """Embeds images until the page's limit is reached; the same file is read once."""

    def __init__(self, limit: int = LARGEST_PAGE_BYTES):
        self._left = limit
        self._made: dict[Path, str | None] = {}

    def uri(self, path: Path) -> str | None:
        """An image as a small JPEG in a data URI, or None if it would exceed the limit.

        Raises ValueError naming a file that is no image, FileNotFoundError one that is missing.
        """
        if path not in self._made:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: the examples beside it name this image: measure this set again")
            uri = _jpeg_uri(path)
            self._made[path] = uri if len(uri) <= self._left else None
            self._left -= len(uri) if self._made[path] else 0
        return self._made[path]


def galleries(runs: Sequence[Evaluation], images: Images | None = None) -> list[Gallery]:
    """The examples of all runs by set and direction; a query of several runs appears once, with what each found.

    Raises ValueError or FileNotFoundError naming a file that is broken or missing.
    """
    images = images or Images()
    sets = sorted({path.parents[1].name for run in runs for path in run.folder.glob("results/*/examples/*.json")})
    made = []
    for set_name in sets:
        by_query: dict[str, dict[str, list]] = {}
        for style, run in enumerate(runs):
            for path in sorted(run.examples_folder(set_name).glob("*.json")):
                for direction, key, query, found in _read(path):
                    of_query = by_query.setdefault(direction, {}).setdefault(key, [(path.parent, query)])
                    of_query.append((path.parent, run.name, style, found))
        for direction, queries in by_query.items():
            # Queries of most runs come first: they can be compared.
            chosen = sorted(queries.values(), key=lambda entry: -len(entry))[:SHOWN_QUERIES]
            made.append(Gallery(set_name, direction, tuple(_query(entry, images) for entry in chosen)))
    return made


def _read(path: Path) -> Iterator[tuple[str, str, dict, dict]]:
    """Yields (direction, identity of the query, query, example) of a file."""
    examples = read_json(path).get("examples")
    if not isinstance(examples, list):
        raise ValueError(f'{path}: "examples" must be a list: measure this set again')
    for number, example in enumerate(examples):
        query, results = (example.get(k) if isinstance(example, dict) else None for k in ("query", "results"))
        listed = isinstance(results, list) and all(isinstance(result, dict) for result in results)
        if not isinstance(query, dict) or not listed:
            raise ValueError(f"{path}: example {number} lacks a query or its results: measure this set again")
        direction = str(example.get("direction", "retrieved"))
        # The key identifies an image; its file may have another name in each run.
        key, text = query.get("key"), query.get("text")
        yield direction, f"{key}\n{text}" if key else f"{text}\n{_image_file(query)}", query, example


def _query(entry: list, images: Images) -> Query:
    (folder, query), *of_runs = entry
    found = tuple(
        Retrieved(
            name,
            style,
            example.get("rank") if isinstance(example.get("rank"), int) else None,
            tuple(_item(result, beside, images) for result in example["results"][:SHOWN_RESULTS]),
        )
        for beside, name, style, example in of_runs
    )
    return Query(_item(query, folder, images), found)


def _image_file(item: dict) -> object:
    return item.get("image", item.get("picture"))  # the older name of the field


def _item(item: dict, folder: Path, images: Images) -> Item:
    text, right, score = (item.get(key) for key in ("text", "right", "score"))
    file, image = _image_file(item), None
    if file is not None:
        # A name only: a results file must not make the page read other files.
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f'{folder}: an example has "image" = {file!r}: it must name a file of this folder')
        image = images.uri(folder / file)
    return Item(
        name=str(item.get("key") or file or ""),
        text=None if text is None else str(text),
        image=image,
        right=right if isinstance(right, bool) else None,
        score=float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None,
    )


def _jpeg_uri(path: Path) -> str:
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (SIDE_PIXELS, SIDE_PIXELS))
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error}): measure this set again") from error
    image.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
