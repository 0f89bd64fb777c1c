"""Images of an evaluation set that are near duplicates of training images, by hash and by embedding.

Of each image a thumbnail is kept with its hash: imagehash's dhash, both ways, and phash; phash alone follows the noise
of the coding on mostly blank images, dhash alone fails where brightening saturates. Hashes propose pairs and
`differences`, which is ours, confirms them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import faiss
import imagehash
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from modstruct import distributed
from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.errors import require
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import distinct_rows

SIDE = 24
"""Pixels a side of a thumbnail."""
HASH_BITS = 192
COMPARED_SIDE, CELLS = 16, 4
"""Pixels and cells a side of what is compared; the worst cell counts: two faces may differ by their eyes alone."""
CENTRE = 0.95
"""Share of width and height that is compared: a crop has lost the edge."""
STEPS = 3
LOOSE = 3.0
"""Pairs above this many times the limit after one step are not aligned further."""
CLIPPED = (3, 252, 0.05)
"""Values at either end of the scale, where a brightened image has lost its own, and their weight in the fit."""
RIDGE = (*[0.01] * 2, *[0.64] * 4)
LEAST_CONTRAST = 4.0
"""In grey levels: lower bound of the contrast, so that a faint image is not judged by its noise."""
FLAT_RANGE, FLAT_CONTRAST = 12, 20.0
"""An image whose channels all have at most this range is of one colour; the unit of the difference of two colours."""
PAIRS_AT_ONCE = 512


class ThumbnailViews:
    """Views of the embedder: each image's thumbnail."""

    image_size = SIDE

    def evaluation_image(self, image: Image.Image) -> Tensor:
        """An image in mode RGB, averaged down to a square: (3, SIDE, SIDE) uint8."""
        small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=4)
        return torch.from_numpy(np.array(small).transpose(2, 0, 1).copy())

    def augmented_image(self, image: Image.Image, seed: int) -> Tensor:
        raise NotImplementedError("thumbnails have one view")


def thumbnail_set(samples: EvaluationSamples, name: str, folder: Path) -> EmbeddedSet:
    """The thumbnails of a source, an interrupted run being resumed: "image_features" holds pixels, "image" signs of the
    hashes' bits. name: what the source is called in messages. Raises as `embed`."""
    data, arrays = samples.config, ["image", "image_features"]
    config = EmbeddingConfig(arrays, part_batches=64, workers=data.workers, max_bad_share=data.max_bad_share)
    about = {"name": "thumbnails", "fingerprint": "1", "dimension": HASH_BITS, "arrays": frozenset(config.arrays)}
    model = EmbeddingModel(encode=_encode, views=ThumbnailViews(), tokenize=len, **about)  # type: ignore[arg-type]
    return embed(model, EmbeddingSource.of_samples(name, samples, field=name), config, folder)


def of_images(images: list[Image.Image], name: str = "images") -> EmbeddedSet:
    """The same of images in memory, in mode RGB."""
    views = torch.stack([ThumbnailViews().evaluation_image(image) for image in images])
    return EmbeddedSet(name, {"name": "thumbnails"}, {a: rows.numpy() for a, rows in _encode({"image": views}).items()})


def _encode(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    images = batch["image"].cpu()
    signs = np.unpackbits(hashes(images.numpy()), axis=1) * 2.0 - 1
    return {"image": torch.from_numpy(signs) / HASH_BITS**0.5, "image_features": images.flatten(1).float()}


def pixels(thumbnails: EmbeddedSet, rows: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Thumbnails of some rows, (n, 3, SIDE, SIDE) uint8; mirrored: with left and right exchanged."""
    found = thumbnails.rows("image_features")[rows].astype(np.uint8).reshape(-1, 3, SIDE, SIDE)
    return found[..., ::-1].copy() if mirrored else found


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 3, SIDE, SIDE) uint8 -> (n, HASH_BITS / 8) uint8; of images of one colour 0, since theirs would be noise."""
    found = np.zeros((len(thumbnails), HASH_BITS // 8), dtype=np.uint8)
    for row in np.flatnonzero(~flat(thumbnails)):
        image = Image.fromarray(thumbnails[row].transpose(1, 2, 0).copy()).convert("L")
        made = (imagehash.dhash(image), imagehash.dhash_vertical(image), imagehash.phash(image))
        found[row] = np.packbits([hashed.hash for hashed in made])
    return found


def flat(thumbnails: np.ndarray) -> np.ndarray:
    """Which images are of one colour, (n,) bool."""
    return (thumbnails.max(axis=(2, 3)).astype(int) - thumbnails.min(axis=(2, 3)) <= FLAT_RANGE).all(axis=1)


def differences(first: np.ndarray, second: np.ndarray, limit: float) -> np.ndarray:
    """Difference of each pair of thumbnails, (p,): 0 where they are equal, about 1 where they are unrelated.

    first, second: (p, 3, SIDE, SIDE) uint8. The centre of each is compared with the other, fitted by gain, offset,
    shift and scale, the same for all channels, so that another colour is a difference. The residual is the root mean
    square in the worst cell, relative to the deviation of the fainter image; the lesser of both counts. An image of one
    colour is compared by its mean, and no other is like it. Differences above LOOSE limits are not exact.
    """
    found, one, other = np.full(len(first), np.inf), flat(first), flat(second)
    means = [images[one & other].mean(axis=(2, 3)) for images in (first, second)]
    found[one & other] = np.abs(means[0] - means[1]).max(axis=1, initial=0) / FLAT_CONTRAST
    solid = np.flatnonzero(~one & ~other)
    for start in range(0, len(solid), PAIRS_AT_ONCE):
        rows = solid[start : start + PAIRS_AT_ONCE]
        a, b = (_smooth(images[rows]) for images in (first, second))
        found[rows] = residuals = _residuals(a, b, limit).numpy()
        near = residuals <= LOOSE * limit
        if near.any():
            found[rows[near]] = np.minimum(residuals[near], _residuals(b[near], a[near], limit).numpy())
    return found


def _smooth(images: np.ndarray) -> Tensor:
    kernel = torch.tensor([0.25, 0.5, 0.25])
    padded = functional.pad(torch.from_numpy(images).float(), (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, torch.outer(kernel, kernel).expand(3, 1, 3, 3), groups=3)


def _residuals(image: Tensor, target: Tensor, limit: float) -> Tensor:
    """Residual of the target's centre, (p,), the least of STEPS steps of Gauss-Newton's method."""
    zoom = CENTRE * torch.eye(2, 3).repeat(len(image), 1, 1)  # (p, 2, 3), from places of the result to the image's
    target, rows, least = _sampled(target, zoom), torch.arange(len(image)), torch.full((len(image),), torch.inf)
    for _ in range(STEPS):
        residual, moves = _step(_sampled(image[rows], zoom), target[rows])
        least[rows] = torch.minimum(least[rows], residual)
        zoom[:, :, 2] += zoom[:, [0, 1], [0, 1]] * moves[:, :2]
        zoom[:, [0, 1], [0, 1]] *= 1 + moves[:, 2:]
        near = residual <= LOOSE * limit
        rows, zoom = rows[near], zoom[near]
        if not len(rows):
            break
    return least


def _sampled(images: Tensor, zoom: Tensor) -> Tensor:
    grid = functional.affine_grid(zoom, [len(images), 3, COMPARED_SIDE, COMPARED_SIDE], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _step(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Fit gain, offset, shift and scale, the latter two to first order by the image's gradients.

    image, target: (p, 3, S, S). Returns the residual in the worst cell (p,) and the moves (p, 4): shift right and down,
    scale across and down, in units of half a side.
    """
    side, (low, high, weight) = COMPARED_SIDE, CLIPPED
    place = (torch.arange(side) + 0.5) * 2 / side - 1
    down, right = (gradient * side / 2 for gradient in torch.gradient(image, dim=(2, 3)))
    terms = torch.stack((image, torch.full_like(image, 100), right, down, right * place, down * place[:, None]), dim=-1)
    inputs, outputs = terms.flatten(1, 3), target.flatten(1)
    weighted = (inputs * torch.where((outputs >= high) | (outputs <= low), weight, 1.0)[..., None]).transpose(1, 2)
    system = (weighted @ inputs).double() + torch.tensor(RIDGE).double().diag() * inputs.shape[1]
    solution = torch.linalg.solve(system, (weighted @ outputs[..., None]).double()).float()
    rest = (outputs - (inputs @ solution)[..., 0].clamp(0, 255)).square()
    cells = rest.view(-1, 3, CELLS, side // CELLS, CELLS, side // CELLS).mean(dim=(1, 3, 5))
    contrast = torch.minimum(outputs.std(dim=1, correction=0), image.flatten(1).std(dim=1, correction=0))
    residual = cells.amax(dim=(1, 2)).sqrt() / contrast.clamp(min=LEAST_CONTRAST)
    return residual, (solution[:, 2:, 0] / solution[:, :1, 0].clamp(min=0.2)).clamp(-0.15, 0.15)


ROWS_AT_ONCE = 4096
QUERIES_AT_ONCE = 64
CANDIDATES = 256
"""Of an image, nearest by hash, are compared: bounds the time where a source has many images of one layout."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a near duplicate; tools/benchmarks/leakage.py measures recall and errors of the defaults."""

    hamming: int = 48
    """Most differing bits, of 192, of two hashes whose images are compared."""
    difference: float = 0.2
    """Largest `differences` of a match: 0 for equal images, about 1 for unrelated ones."""
    cosine: float = 0.95
    """Least cosine of embeddings; what it means depends on the model."""
    mirrored: bool = False
    """Whether a mirror image counts too."""
    listed: int = 5
    """Most training images listed for an image: by hash, by the hash of its mirror image and by embedding, each."""

    def __post_init__(self) -> None:
        require(0 <= self.hamming <= HASH_BITS, "hamming", self.hamming, f"give differing bits, from 0 to {HASH_BITS}")
        for name in ("difference", "cosine"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "give a number above 0, up to 1")
        require(self.listed >= 1, "listed", self.listed, "at least 1")


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Pair:
    """An evaluation image and a training image. difference: None where one alone is of one colour. cosine: None where
    there are no embeddings of both. mirrored: whether the evaluation image was, for hamming and difference."""

    evaluation: int
    train: int
    hamming: int
    difference: float | None
    cosine: float | None
    mirrored: bool
    by: tuple[str, ...]
    """"hash", "embedding" or both."""


def find_duplicates(
    evaluation: EmbeddedSet,
    train: EmbeddedSet,
    limits: Thresholds = DEFAULT,
    embeddings: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Pair]:
    """All evaluation images with a near duplicate in the training source, with the nearest few of each.

    evaluation, train: of `thumbnail_set`. embeddings: (n, D) and (N, D), a row for each thumbnail (see rows_by_key);
    zeros where an image has none. By hash: hashes within limits.hamming and thumbnails within limits.difference, of
    the CANDIDATES nearest hashes. By embedding: cosine of at least limits.cosine. Of equal training thumbnails the
    first is listed. Ascending by evaluation row, nearest hashes first.
    """
    turns = (False, True) if limits.mirrored else (False,)
    found = [pairs for turned in turns for pairs in _by_hash(evaluation, train, limits, turned)]
    if embeddings is not None:
        items = nearest(*embeddings, limits.listed)
        pairs = np.stack((np.repeat(np.arange(len(items)), items.shape[1]), items.ravel()), axis=1)
        found.append(pairs[cosines(*embeddings, pairs) >= limits.cosine])
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
    scores = np.stack([_scores(evaluation, train, pairs, limits, turned) for turned in turns])  # (turns, 2, p)
    within = (scores[:, 0] <= limits.hamming) & (scores[:, 1] <= limits.difference)
    by_hash, turned = np.logical_or.reduce(within), within.argmax(axis=0)  # 0 where both ways, or none, are near
    hamming, difference = scores[turned, :, np.arange(len(pairs))].T
    cosine = np.full(len(pairs), np.nan) if embeddings is None else cosines(*embeddings, pairs)
    listed = []
    for place in np.lexsort((pairs[:, 1], -np.nan_to_num(cosine), hamming, pairs[:, 0])):
        ways = {"hash": by_hash[place], "embedding": cosine[place] >= limits.cosine}
        by = tuple(way for way, found_so in ways.items() if found_so)
        (one, other), near = pairs[place].tolist(), int(hamming[place])
        apart, alike = (float(of[place]) if np.isfinite(of[place]) else None for of in (difference, cosine))
        listed.append(Pair(one, other, near, apart, alike, bool(turned[place]), by))
    return listed


def _by_hash(evaluation: EmbeddedSet, train: EmbeddedSet, limits: Thresholds, mirrored: bool) -> Iterator[np.ndarray]:
    """Yields (p, 2): of some images the nearest pairs by hash whose thumbnails are alike, `listed` at most of each."""
    distinct, _, _ = distinct_rows(train.rows("image_features"))  # a placeholder may occur a hundred thousand times
    index = faiss.IndexBinaryFlat(HASH_BITS)
    for start in range(0, len(distinct), ROWS_AT_ONCE):
        index.add(_codes(train, distinct[start : start + ROWS_AT_ONCE]))
    starts = range(0, len(evaluation.keys), QUERIES_AT_ONCE)
    for start in tqdm(starts, desc="comparing hashes", disable=not distributed.is_main(), leave=False):
        rows = np.arange(start, min(start + QUERIES_AT_ONCE, len(evaluation.keys)))
        near, items = index.search(_codes(evaluation, rows, mirrored), min(CANDIDATES, len(distinct)))
        query, place = np.nonzero(near <= limits.hamming)
        pairs = np.stack((rows[query], distinct[items[query, place]]), axis=1)
        alike = pairs[_scores(evaluation, train, pairs, limits, mirrored)[1] <= limits.difference]
        yield alike[np.arange(len(alike)) - np.searchsorted(alike[:, 0], alike[:, 0]) < limits.listed]


def _codes(thumbnails: EmbeddedSet, rows: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Hashes of some rows, (n, HASH_BITS / 8) uint8."""
    plain = thumbnails.rows("image")
    return hashes(pixels(thumbnails, rows, True)) if mirrored else np.packbits(plain[rows] > 0, axis=1)


def _scores(
    evaluation: EmbeddedSet, train: EmbeddedSet, pairs: np.ndarray, limits: Thresholds, mirrored: bool
) -> np.ndarray:
    """Hamming distance and difference of each pair, (2, p)."""
    one, other = pairs.T
    hamming = np.bitwise_count(_codes(evaluation, one, mirrored) ^ _codes(train, other)).sum(axis=1, dtype=np.int64)
    return np.stack((hamming, differences(pixels(evaluation, one, mirrored), pixels(train, other), limits.difference)))


def cosines(first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows (p, 2) in float64, (p,); 0 of a row of zeros."""
    found = np.empty(len(pairs))
    for start in range(0, len(found), ROWS_AT_ONCE):
        some = pairs[start : start + ROWS_AT_ONCE].T
        one, other = (rows[at].astype(np.float64) for rows, at in zip((first, second), some, strict=True))
        norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        found[start : start + ROWS_AT_ONCE] = (one * other).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return found


def rows_by_key(thumbnails: EmbeddedSet, embedded: EmbeddedSet) -> np.ndarray:
    """Rows (n, D) of an embedded set's images in the order of the thumbnails of its source, zeros where there is none.

    Repeated keys are matched in order. Raises ValueError if no key is shared.
    """
    place = {key: row for row, key in enumerate(_numbered(embedded.keys))}
    found = np.array([place.get(key, -1) for key in _numbered(thumbnails.keys)], dtype=np.int64)
    keys = f"its keys are like {embedded.keys[0]!r}, the source's like {thumbnails.keys[0]!r}"
    require(bool((found >= 0).any()), "embedded set", embedded.name, f"{keys}: embed the same source")
    rows = embedded.rows("image")
    return np.where(found[:, None] >= 0, rows[found], np.zeros((), rows.dtype))


def _numbered(keys: Sequence[str]) -> list[tuple[str, int]]:
    seen: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(key, next(seen[key])) for key in keys]
