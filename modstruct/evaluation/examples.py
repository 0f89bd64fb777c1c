"""Examples of retrieval: a grid of images and captions for TensorBoard, and queries with their results for the report.

Examples are spaced evenly over a source, so they are the same for every model.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.transforms.augment import Views
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.measure import DIRECTIONS
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.files import atomic_write, write_json

CELL, LINE = 2.3, 0.16
"""Inches of a drawn image's side, and of a line of text."""
RIGHT, WRONG, INK = "#006e32", "#b41e1e", "#1e1e1e"
LINES, LETTERS = 3, 34
"""Of a caption at most, and of one line."""
SPRITE = 32
"""Pixels of an image's side in the projector."""
FILE = "examples.json"
QUERIES = 6
"""Of each direction."""
RESULTS = 5
"""Of each query."""
SIDE_PIXELS = 256
"""Of an image's longer side, at most."""
QUALITY = 85


@dataclass(frozen=True)
class ProjectedPoints:
    """For TensorBoard's projector: rows (2 n, D), of n images and then of a caption of each; labels, (modality,
    caption) of each; images (2 n, 3, SPRITE, SPRITE) from 0 to 1, white for captions."""

    rows: Tensor
    labels: list[tuple[str, str]]
    images: Tensor


def projected_points(source: EmbeddedSet, samples: EvaluationSamples, views: Views, count: int) -> ProjectedPoints:
    """Of `count` images of the source, evenly spaced; as `retrieved_examples`."""
    image, pairs = source.distinct_rows("image"), source.distinct_pairs
    rows = evenly_spaced(len(image), count)
    texts = np.array([pairs[pairs[:, 0] == row, 1][0] for row in rows])
    captions = [source.captions[text] for text in texts]
    shown = torch.stack([views.evaluation_image(samples[int(index)].image) for index in source.indices[rows]])
    small = F.interpolate(shown.float() / 255, (SPRITE, SPRITE), mode="bilinear", antialias=True)
    both = np.concatenate([image[rows], source.rows("text")[texts]]).astype(np.float32)
    labels = [(kind, caption) for kind in ("image", "text") for caption in captions]
    return ProjectedPoints(torch.from_numpy(both), labels, torch.cat([small, torch.ones_like(small)]))


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


def example_grid(images: Tensor, captions: Sequence[str], retrieved: Sequence[str], columns: int = 4) -> Tensor:
    """Each image with its caption beneath and the caption that was retrieved for it.

    images: (n, 3, H, W) uint8, n >= 1. captions, retrieved: n texts. A retrieved caption is green where it
    equals the image's own and red where not. Returns (3, H', W') uint8, as SummaryWriter.add_image takes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, as it takes long to import
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, TransformedBbox

    columns, lines = min(columns, len(images)), 1 + 2 * LINES
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(CELL * columns, (CELL + LINE * lines) * rows), dpi=100)
    figure.subplots_adjust(0.01, LINE * lines / (CELL + LINE * lines) / rows, 0.99, 0.995, 0.03, LINE * lines / CELL)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, own, found in zip(grid[: len(images)], images, captions, retrieved, strict=True):
        axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        for place, (text, colour) in enumerate(((own, INK), (f"found: {found}", RIGHT if found == own else WRONG))):
            note = axes.annotate(
                textwrap.fill(text[:1000], LETTERS, max_lines=LINES, placeholder="…"),
                (0, 0),
                xycoords="axes fraction",
                xytext=(0, -4 - 72 * LINE * LINES * place),
                textcoords="offset points",
                va="top",
                color=colour,
                fontsize=8,
                parse_math=False,
            )
            note.set(clip_on=True, clip_box=TransformedBbox(Bbox([[0, -3], [1, 1]]), axes.transAxes))
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1).contiguous()


def write_retrieved_examples(
    embedded: EmbeddedSet,
    outcomes: Mapping[str, np.ndarray],
    image_of: Callable[[int], Image.Image],
    folder: Path,
    queries: int = QUERIES,
) -> None:
    """Write examples of both directions into a folder: examples.json and the images it names; by one process.

    outcomes: those of retrieval's result. image_of: the image of a row of the set; BadSample where it can no longer be
    read. queries: of each direction at most, of those that have a positive. examples.json, written last, is
      {"examples": [{"direction": "text_to_image", "query": ITEM, "rank": …, "right": ITEM, "results": [ITEM, …]}, …]}
      ITEM = {"key": key, "image": file name} or {"key": text row, "text": …}; of results and "right" also "score", and
      of results "right": whether it is one of the query's pairs
    rank: of the best right item, which is "right". Results are the RESULTS exact nearest. An image that can no longer
    be read has no "image". Images of earlier examples are removed at the end.
    """
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), np.asarray(embedded.distinct_pairs)
    written: dict[int, dict[str, str]] = {}

    def item(row: int, is_image: bool, **more: Any) -> dict[str, Any]:
        if not is_image:
            return {"key": str(row), "text": embedded.captions[row]} | more
        if row not in written:
            written[row] = save_image(partial(image_of, row), folder / f"retrieved-{row}.jpg", SIDE_PIXELS, QUALITY)
        return {"key": embedded.keys[row]} | written[row] | more

    examples: list[dict[str, Any]] = []
    for direction in DIRECTIONS:
        by_text = direction == "text_to_image"
        places = evenly_spaced(len(outcomes[f"{direction}/query"]), queries)
        rows, ranks = (outcomes[f"{direction}/{name}"][places] for name in ("query", "rank"))
        query_rows, gallery = (text, image) if by_text else (image, text)
        for row, rank, results in zip(rows, ranks, nearest(query_rows[rows], gallery, RESULTS), strict=True):
            positives = pairs[pairs[:, int(by_text)] == row, 1 - int(by_text)]
            query = query_rows[row].astype(np.float64)
            scores = {int(r): float(gallery[r].astype(np.float64) @ query) for r in (*results, *positives)}
            right = max(positives.tolist(), key=lambda positive: scores[positive])
            found = [item(r, by_text, right=r in positives, score=scores[r]) for r in results.tolist()]
            example = {"direction": direction, "query": item(int(row), not by_text), "rank": int(rank)}
            examples.append(example | {"right": item(right, by_text, score=scores[right]), "results": found})
    write_json(folder / FILE, {"examples": examples})
    for old in folder.glob("retrieved-*.jpg"):
        if {"image": old.name} not in written.values():
            old.unlink()


def save_image(open_image: Callable[[], Image.Image], path: Path, side: int, quality: int) -> dict[str, str]:
    """Save an image as JPEG, at most `side` pixels a side: {"image": file name}, or {} if it can no longer be read."""
    try:
        image = open_image().convert("RGB")
    except BadSample:
        return {}
    image.thumbnail((side, side))
    with atomic_write(path) as file:
        image.save(file, "JPEG", quality=quality)
    return {"image": path.name}
