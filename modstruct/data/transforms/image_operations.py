"""The operations of AutoAugment and RandAugment on batches of images, each image with its own magnitude, on any device.

Equal to Pillow's, which torchvision calls for a single image, bit for bit: integers and roundings are those of its C
code. Images are uint8 (n, 3, side, side), magnitudes float64 (n,) on the CPU, as torchvision draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Affine = Callable[[float, int], tuple[float, ...]]
"""Magnitude and side -> (a, b, c, d, e, f): pixel (x, y) comes from (a x + b y + c, d x + e y + f)."""


def _rotation(degrees: float, side: int) -> tuple[float, ...]:
    angle, middle = -math.radians(degrees % 360.0), side / 2
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (
        *(cosine, sine, middle - cosine * middle - sine * middle),
        *(-sine, cosine, middle + sine * middle - cosine * middle),
    )


def _affine(images: Tensor, magnitudes: np.ndarray, of: Affine) -> Tensor:
    """The nearest pixel; black where there is none."""
    side = images.shape[-1]
    by_image = np.array([of(magnitude, side) for magnitude in magnitudes.tolist()])
    by_image[:, [2, 5]] += (by_image[:, [0, 3]] + by_image[:, [1, 4]]) / 2  # from the middle of a pixel
    fixed = np.floor(by_image * 65536 + 0.5).astype(np.int64)  # as Pillow computes: in units of 1/65536 of a pixel
    a, b, c, d, e, f = sent(fixed.T, images.device)[:, :, None, None]
    along = torch.arange(side, device=images.device)
    x, y = (a * along + b * along[:, None] + c) >> 16, (d * along + e * along[:, None] + f) >> 16
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    places = (y * side + x) * inside
    moved = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)
    return moved * inside[:, None]


def _blended(images: Tensor, magnitudes: np.ndarray, other: Callable[[Tensor], Tensor]) -> Tensor:
    """Beyond the images as seen from `other` of them, by 1 + magnitude."""
    factor = sent((1 + magnitudes).astype(np.float32), images.device)[:, None, None, None]
    start = other(images).float()
    return (start + factor * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(n, 1, side, side), as Pillow converts to mode L."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _mean_grey(images: Tensor) -> Tensor:
    """(n, 1, 1, 1): the mean of each image, rounded."""
    grey = _grey(images)
    pixels = grey[0].numel()
    return (2 * grey.sum(dim=(1, 2, 3), keepdim=True) + pixels) // (2 * pixels)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's filter SMOOTH: means of 3 x 3 pixels, that in the middle five times; the outermost stay."""
    smooth = images.int()
    rows = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (2 * sums + 13) // 26
    return smooth


def _looked_up(images: Tensor, magnitudes: np.ndarray, table: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every value replaced by that of a table. table: makes it, (n, 1 or 3, 256), of the images and magnitudes."""
    found = table(images, sent(magnitudes, images.device)[:, None, None]).clamp(0, 255).to(torch.uint8)
    return found.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device)


def _posterized(images: Tensor, bits: Tensor) -> Tensor:
    dropped = 8 - bits.long()
    return _levels(images) >> dropped << dropped


def _solarized(images: Tensor, threshold: Tensor) -> Tensor:
    levels = _levels(images)
    return torch.where(levels < 255.0 * threshold, levels, 255 - levels)


def _inverted(images: Tensor, _: Tensor) -> Tensor:
    return (255 - _levels(images)).expand(len(images), 1, 256)


def _stretched(images: Tensor, _: Tensor) -> Tensor:
    low, high = _ends(_histogram(images))
    width = (high - low).clamp(min=1).double()
    scale = torch.full_like(width, 255) / width  # torch would take 255 / width for 255 * (1 / width)
    levels = _levels(images)
    return torch.where(high > low, (levels * scale + -low * scale).trunc().long(), levels)


def _equalized(images: Tensor, _: Tensor) -> Tensor:
    counts = _histogram(images)
    _, high = _ends(counts)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, high)) // 255
    before = counts.cumsum(2) - counts
    return torch.where(step > 0, (step // 2 + before) // step.clamp(min=1), _levels(images))


def _histogram(images: Tensor) -> Tensor:
    """(n, 3, 256): how often each level occurs in each channel."""
    levels = images.flatten(2).long()
    return levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))


def _ends(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3, 1): the lowest and the highest level that occur."""
    there = (counts > 0).int()
    return there.argmax(2, keepdim=True), 255 - there.flip(2).argmax(2, keepdim=True)


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on a device, for which the host does not wait."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


OPERATIONS: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
    "Identity": lambda images, _: images,
    "ShearX": partial(_affine, of=lambda by, _: (1.0, by, 0.0, 0.0, 1.0, 0.0)),
    "ShearY": partial(_affine, of=lambda by, _: (1.0, 0.0, 0.0, by, 1.0, 0.0)),
    "TranslateX": partial(_affine, of=lambda by, _: (1.0, 0.0, -int(by), 0.0, 1.0, 0.0)),
    "TranslateY": partial(_affine, of=lambda by, _: (1.0, 0.0, 0.0, 0.0, 1.0, -int(by))),
    "Rotate": partial(_affine, of=_rotation),
    "Brightness": partial(_blended, other=torch.zeros_like),
    "Color": partial(_blended, other=_grey),
    "Contrast": partial(_blended, other=_mean_grey),
    "Sharpness": partial(_blended, other=_smooth),
    "Posterize": partial(_looked_up, table=_posterized),
    "Solarize": partial(_looked_up, table=_solarized),
    "AutoContrast": partial(_looked_up, table=_stretched),
    "Equalize": partial(_looked_up, table=_equalized),
    "Invert": partial(_looked_up, table=_inverted),
}
"""By torchvision's names."""
