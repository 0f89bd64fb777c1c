"""What probes see of caption and image: embeddings row by row of the pairs, and the words of the captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import Scene

DRAWN_SIDE = 64
"""Pixels a side at which a scene is drawn, before it is averaged down."""
WORD = re.compile(r"\w+(?:['-]\w+)*")


class PairedRows:
    """Rows of an embedding in the order of pairs, read when they are used. rows: (n, D); of: (p,), row of each pair."""

    def __init__(self, rows: np.ndarray, of: np.ndarray):
        self._rows, self._of = rows, of
        self.shape = (len(of), rows.shape[1])

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return self._rows[self._of[places]]


def bag_of_words(captions: Sequence[str], largest: int, least: int = 3) -> np.ndarray:
    """Which words and which pairs of neighbouring words a caption has: (n, terms) float16, 0 or 1.

    The terms are the `largest` most frequent ones of those in at least `least` captions; equally frequent ones in
    alphabetical order. They are chosen without looking at any label. Lower case, without punctuation.
    """
    found = [_terms(caption) for caption in captions]
    counts = Counter(term for terms in found for term in terms)
    frequent = sorted((-count, term) for term, count in counts.items() if count >= least)[:largest]
    column = {term: number for number, (_, term) in enumerate(frequent)}
    bags = np.zeros((len(captions), max(len(column), 1)), dtype=np.float16)
    for row, terms in enumerate(found):
        bags[row, [column[term] for term in terms if term in column]] = 1
    return bags


def _terms(caption: str) -> set[str]:
    words = WORD.findall(caption.lower())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def scene_pixels(records: Sequence[Mapping[str, Any]], side: int) -> np.ndarray:
    """Images of built-in scenes drawn anew from their records, averaged down: (n, 3 side^2) float16, 0 … 1."""
    pixels = np.empty((len(records), 3 * side**2), dtype=np.float16)
    for row, record in enumerate(records):
        picture = draw(Scene.from_record(record), DRAWN_SIDE).resize((side, side), Image.Resampling.BOX)
        pixels[row] = np.asarray(picture, dtype=np.float32).ravel() / 255
    return pixels
