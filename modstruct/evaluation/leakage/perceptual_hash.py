"""Perceptual hashes: 63 signs of an image's lowest spatial frequencies, of the whole and of slight crops of it.

As pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1), a bit says
whether a coefficient of the grey image's 8 x 8 lowest discrete cosines is above a threshold. pHash's threshold is
their median. Ours is a tenth of their root mean square: of an image that is symmetric, or mostly blank, many
coefficients are nearly 0, beside the median, and their bits would follow the noise of the coding.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 24
"""Of the thumbnail that hashes are made of, in pixels."""
FREQUENCIES = 8
BITS = 64
"""Of a hash; the first, of the mean, is always 0."""
CROP = 0.05
"""Share of width and height that the cropped views lack."""
VIEWS: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = (
    ((0.0, 1.0), (0.0, 1.0)),
    ((CROP / 2, 1 - CROP / 2), (CROP / 2, 1 - CROP / 2)),
    *(((top, top + 1 - CROP), (left, left + 1 - CROP)) for top in (0.0, CROP) for left in (0.0, CROP)),
)
"""Parts of an image that are hashed: ((top, bottom), (left, right)) as shares; the first is the whole."""
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
RELATIVE_THRESHOLD = 0.1
LEAST_THRESHOLD = 0.25
"""In grey levels: what is less is noise, even where there is nothing else."""
PICTURES_AT_ONCE = 4096


class ThumbnailViews:
    """What `evaluation_loader` wants of a model's views: each image's thumbnail."""

    image_size = SIDE
    value_bytes = 1

    def evaluation_image(self, picture: Image.Image) -> Tensor:
        """(3, SIDE, SIDE) uint8 of an image in mode RGB."""
        return torch.from_numpy(thumbnail(picture))


def thumbnail(picture: Image.Image) -> np.ndarray:
    """An image in mode RGB, averaged down and made square: (3, SIDE, SIDE) uint8."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=4)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def image_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 3, SIDE, SIDE) uint8 -> (n, len(VIEWS)) uint64, a hash of each view."""
    hashes = np.empty((len(thumbnails), len(VIEWS)), dtype=np.uint64)
    for start in range(0, len(thumbnails), PICTURES_AT_ONCE):
        grey = np.einsum("nchw,c->nhw", thumbnails[start : start + PICTURES_AT_ONCE].astype(np.float32), GREY)
        for view, (rows, columns) in enumerate(VIEWS):
            coefficients = _cosines(*rows) @ grey @ _cosines(*columns).T  # (n, 8, 8)
            hashes[start : start + len(grey), view] = _signs(coefficients.reshape(len(grey), BITS))
    return hashes


def mirrored(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails with left and right exchanged."""
    return np.ascontiguousarray(thumbnails[..., ::-1])


@cache
def _cosines(first: float, last: float) -> np.ndarray:
    """(FREQUENCIES, SIDE): weights that give the cosine coefficients of the part [first, last) of SIDE pixels."""
    low, high = first * SIDE, last * SIDE
    edges = np.arange(SIDE)
    covered = np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, 1)
    place = (np.clip(edges + 0.5, low, high) - low) / (high - low)
    waves = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * place) * covered / (high - low)
    waves[1:] *= np.sqrt(2)
    return waves.astype(np.float32)


def _signs(coefficients: np.ndarray) -> np.ndarray:
    coefficients[:, 0] = 0  # brightness says nothing of the content
    size = np.sqrt((coefficients**2).mean(axis=1, keepdims=True))
    bits = coefficients > np.maximum(RELATIVE_THRESHOLD * size, LEAST_THRESHOLD)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]
