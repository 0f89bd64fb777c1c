"""Thumbnails of images with their perceptual hashes, as an embedded set, and the comparison of two thumbnails.

A hash is imagehash's dhash, both ways, and phash: phash alone follows the noise of the coding on mostly blank images,
dhash alone fails where brightening saturates. Hashes propose pairs and `differences`, which is ours, confirms them.
"""

from __future__ import annotations

from pathlib import Path

import imagehash
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.source import EmbeddingSource

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
