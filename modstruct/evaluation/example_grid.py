"""Examples of a source for TensorBoard: images with their captions, and the captions retrieved for them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.transforms.augment import Views
from modstruct.evaluation.embeddings.in_memory import EmbeddedSource
from modstruct.evaluation.retrieval.rows import evenly_spaced


def retrieved_examples(source: EmbeddedSource, samples: EvaluationSamples, views: Views, count: int) -> Tensor:
    """Draw `count` images spread evenly over the source, always the same ones, each with the caption nearest to it.

    For the main process, which holds the rows of `source`; `samples` and `views` are those that it was embedded with.
    Returns (3, H, W) uint8, as `example_grid` draws it.
    """
    rows = evenly_spaced(len(source.image), count)
    nearest = (source.image[rows] @ source.text.T).argmax(axis=1)
    own, found = [], []
    for row, text in zip(rows, nearest, strict=True):
        positives = source.pairs[source.pairs[:, 0] == row, 1]
        own.append(source.captions[text if text in positives else positives[0]])
        found.append(source.captions[text])
    images = [views.evaluation_image(samples[int(index)].picture) for index in source.indices[rows]]
    return example_grid(torch.stack(images), own, found)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = 224
"""Side of a drawn image, in pixels."""
MARGIN = 10
FONT_SIZE = 14
LINES = 4
"""Lines of text that one caption may take."""
INK, RIGHT, WRONG, GROUND = (30, 30, 30), (0, 110, 50), (180, 30, 30), (255, 255, 255)


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
