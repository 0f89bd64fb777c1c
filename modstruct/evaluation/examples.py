"""Examples of retrieval: a grid of images and captions for TensorBoard, and queries with their results for the report.

Examples are spaced evenly over a source, so they are the same for every model.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.transforms.augment import Views
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.measure import DIRECTIONS
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.files import atomic_write

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = 224
"""Side of a drawn image, in pixels."""
MARGIN = 10
FONT_SIZE = 14
LINES = 4
"""Lines of text that one caption may take."""
INK, RIGHT, WRONG, GROUND = (30, 30, 30), (0, 110, 50), (180, 30, 30), (255, 255, 255)

FILE = "examples.json"
QUERIES = 6
"""Of each direction."""
RESULTS = 5
"""Of each query."""
SIDE_PIXELS = 256
"""Of an image's longer side, at most."""
QUALITY = 85


def retrieved_examples(source: EmbeddedSet, samples: EvaluationSamples, views: Views, count: int) -> Tensor:
    """Draw `count` images of the source, each with the caption nearest to it.

    For the main process, which holds the rows of `source`; `samples` and `views` are those that it was embedded with.
    Returns (3, H, W) uint8, as `example_grid` draws it.
    """
    image, pairs = source.distinct_rows("image"), source.distinct_pairs
    rows = evenly_spaced(len(image), count)
    best = (image[rows] @ source.rows("text").T).argmax(axis=1)
    own, found = [], []
    for row, text in zip(rows, best, strict=True):
        positives = pairs[pairs[:, 0] == row, 1]
        own.append(source.captions[text if text in positives else positives[0]])
        found.append(source.captions[text])
    images = [views.evaluation_image(samples[int(index)].image) for index in source.indices[rows]]
    return example_grid(torch.stack(images), own, found)


def example_grid(
    images: Tensor, captions: Sequence[str], retrieved: Sequence[str] | None = None, columns: int = 4
) -> Tensor:
    """Each image with its caption beneath and, where given, the caption that was retrieved for it.

    images: (n, 3, H, W) uint8, n >= 1. captions, retrieved: n texts. A retrieved caption is green where it
    equals the image's own and red where not. Returns (3, H', W') uint8, as SummaryWriter.add_image takes it.
    """
    if len(images) == 0 or len(captions) != len(images) or (retrieved is not None and len(retrieved) != len(images)):
        counts = f"{len(images)} images, {len(captions)} captions, {len(retrieved or [])} retrieved captions"
        raise ValueError(f"example_grid got {counts}: give at least one image, and a text of each kind for each")
    font = _font()
    line_height = FONT_SIZE + 4
    texts = [[(caption, INK)] for caption in captions]
    for own, found in zip(texts, retrieved or [], strict=False):
        own.append((f"found: {found}", RIGHT if found == own[0][0] else WRONG))
    blocks = [[(line, ink) for text, ink in cell for line in wrap(text, font, CELL)] for cell in texts]

    columns = min(columns, len(images))
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [CELL + 2 * MARGIN + line_height * max(len(blocks[i]) for i in row) for row in rows]
    canvas = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), MARGIN + sum(heights)), GROUND)
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (CELL + MARGIN)
            image = Image.fromarray(images[i].permute(1, 2, 0).cpu().numpy())
            # Small images keep their pixels as they are seen by the model; large ones are averaged down.
            kind = Image.Resampling.NEAREST if max(image.size) <= CELL else Image.Resampling.LANCZOS
            canvas.paste(image.resize((CELL, CELL), kind), (left, top))
            for number, (line, ink) in enumerate(blocks[i]):
                draw.text((left, top + CELL + 4 + number * line_height), line, fill=ink, font=font)
        top += height
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def wrap(text: str, font: Font, width: int, lines: int = LINES) -> list[str]:
    """Text cut into lines of at most `width` pixels, broken at spaces or, where a word is too long, inside it.

    What does not fit into `lines` lines ends in an ellipsis.
    """
    words = text[: 2 * lines * width].split()  # no letter is narrower than half a pixel: the rest could not be seen
    wrapped = [""]
    while words and len(wrapped) <= lines:
        word = words.pop(0)
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        elif wrapped[-1]:
            wrapped.append("")
            words.insert(0, word)
        else:
            # The longest start of the word that fits, but at least one letter, or this would never end.
            lengths = range(1, len(word) + 1)
            fits = max(1, bisect_right(lengths, float(width), key=lambda n: font.getlength(word[:n])))
            wrapped[-1] = word[:fits]
            if word[fits:]:
                wrapped.append("")
                words.insert(0, word[fits:])
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], f"{last}…"]
    return wrapped


def _font() -> Font:
    """DejaVu where the system has it: Pillow's own font has plain Latin letters only and shows boxes for others."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", FONT_SIZE)
    except OSError:
        return ImageFont.load_default(FONT_SIZE)


class Images(Protocol):
    """The images of a set by their image rows; BadSample for one that can no longer be read."""

    def __getitem__(self, row: int) -> Image.Image: ...


def write_retrieved_examples(
    embedded: EmbeddedSet, outcomes: dict[str, np.ndarray], images: Images, folder: Path, queries: int = QUERIES
) -> None:
    """Write examples of both directions into a folder: examples.json and the images it names; by one process.

    outcomes: those of `measure_set_retrieval`. images: by image row of the set. queries: of each direction at most,
    of those that have a positive. examples.json, written last, is
      {"examples": [{"direction": "text_to_image", "query": ITEM, "rank": …, "results": [ITEM, …]}, …]}
      ITEM = {"key": key, "image": file name} or {"key": text row, "text": …}; of results also "right" and "score"
    rank: of the best right item. Results are the RESULTS exact nearest; "right": one of the query's pairs. An image
    that can no longer be read has no "image". Images of earlier examples are removed at the end.
    """
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), np.asarray(embedded.distinct_pairs)
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
