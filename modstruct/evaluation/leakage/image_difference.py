"""The second look at two images with near hashes: how much of one is left when the other is fitted to it."""

from __future__ import annotations

from functools import cache

import numpy as np

from modstruct.evaluation.leakage.perceptual_hash import SIDE, VIEWS

COMPARED_SIDE = 16
CELLS = 4
"""A side of the grid in which the worst place is looked for: two faces may differ by their eyes alone."""
CLIPPED_LOW, CLIPPED_HIGH = 3, 252
CLIPPED_WEIGHT = 0.05
"""Of a pixel at either end of the scale in the fit: what a brightened image has lost there, no fit brings back."""
RIDGE = 0.01
LEAST_CONTRAST = 4.0
"""In grey levels: a fainter image is not judged by its noise."""
FLAT_RANGE = 12
"""Of the values of each channel: an image with less is of one colour."""
FLAT_CONTRAST = 20.0
"""What the difference of two colours is divided by: at a limit of 0.2 four levels are as good as none."""
PAIRS_AT_ONCE = 512
LOOSE = 3.0
"""Pairs that are this many times over the limit at the views that the hashes took are not looked at further."""


def flat(thumbnails: np.ndarray) -> np.ndarray:
    """Which images are of one colour, (n,) bool. thumbnails: (n, 3, SIDE, SIDE) uint8."""
    values = thumbnails.reshape(len(thumbnails), 3, SIDE * SIDE)
    return (values.max(axis=2).astype(np.int64) - values.min(axis=2)).max(axis=1, initial=0) <= FLAT_RANGE


def colour_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Difference of images of one colour, by their means: (n, 3), (m, 3) -> (n, m), in units of `FLAT_CONTRAST`."""
    return np.abs(first[:, None] - second[None]).max(axis=2) / FLAT_CONTRAST


def image_differences(first: np.ndarray, second: np.ndarray, views: np.ndarray, limit: float) -> np.ndarray:
    """How far each pair is from being one image: 0 where they are equal, about 1 where they have nothing in common.

    first, second: (p, 3, SIDE, SIDE) uint8, not flat. views: (p,), the views that agreed (see `near_hashes`).
    One image is fitted to the other by gain, offset, small shifts and scalings, alike for all channels, so that
    another colour is a difference; what remains is taken in the worst of 4 x 4 cells, as root mean square, relative to
    the standard deviation of the fainter image. The least over both directions and all pairs of views counts. Where
    the views given are worse than LOOSE * limit, theirs is returned. Returns (p,) float64.
    """
    count = len(VIEWS)
    differences = np.empty(len(first))
    for start in range(0, len(first), PAIRS_AT_ONCE):
        one, other = (t[start : start + PAIRS_AT_ONCE].astype(np.float32) for t in (first, second))
        given = views[start : start + PAIRS_AT_ONCE]
        least = np.empty(len(one))
        for view in np.unique(given):
            taken = given == view
            least[taken] = _either_way(one[taken], other[taken], *divmod(int(view), count))
        for view in [*range(count), *range(count, count * count, count)]:
            near = np.flatnonzero((least <= LOOSE * limit) & (given != view))
            if len(near):
                again = _either_way(one[near], other[near], *divmod(view, count))
                least[near] = np.minimum(least[near], again)
        differences[start : start + len(one)] = least
    return differences


def _either_way(one: np.ndarray, other: np.ndarray, one_view: int, other_view: int) -> np.ndarray:
    one, other = _view(one, one_view), _view(other, other_view)
    return np.minimum(_remainder(one, other), _remainder(other, one))


def _view(thumbnails: np.ndarray, view: int) -> np.ndarray:
    rows, columns = VIEWS[view]
    return _resampling(*rows) @ thumbnails @ _resampling(*columns).T


@cache
def _resampling(first: float, last: float) -> np.ndarray:
    """(COMPARED_SIDE, SIDE): weights of a tent as wide as two pixels of the result, over the part [first, last)."""
    edges = np.linspace(first * SIDE, last * SIDE, COMPARED_SIDE + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    weights = np.clip(1 - np.abs(np.arange(SIDE) + 0.5 - middles[:, None]) / width, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _remainder(fitted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What of target (p, 3, S, S) the fitted image does not explain, in its worst cell, (p,).

    Shift and scaling enter by the image's gradients, to first order.
    """
    pairs, place = len(fitted), np.linspace(-1, 1, COMPARED_SIDE, dtype=np.float32)
    down, right = np.gradient(fitted, axis=2), np.gradient(fitted, axis=3)
    terms = (fitted, np.full_like(fitted, 100), down, right, down * place[:, None], right * place)
    inputs = np.stack(terms, axis=-1).reshape(pairs, -1, len(terms))
    outputs = target.reshape(pairs, -1)
    clipped = (outputs >= CLIPPED_HIGH) | (outputs <= CLIPPED_LOW)
    weighted = (inputs * np.where(clipped, np.float32(CLIPPED_WEIGHT), np.float32(1))[..., None]).swapaxes(1, 2)
    system = (weighted @ inputs).astype(np.float64) + RIDGE * inputs.shape[1] * np.eye(len(terms))
    solution = np.linalg.solve(system, (weighted @ outputs[..., None]).astype(np.float64)).astype(np.float32)
    rest = outputs - np.clip((inputs @ solution)[..., 0], 0, 255)
    side = COMPARED_SIDE // CELLS
    cells = (rest**2).reshape(pairs, 3, CELLS, side, CELLS, side).mean(axis=(1, 3, 5)).reshape(pairs, -1)
    contrast = np.minimum(outputs.std(axis=1), fitted.reshape(pairs, -1).std(axis=1))
    return np.sqrt(cells.max(axis=1)) / np.maximum(contrast, LEAST_CONTRAST)
