"""Views of images made on the device (`views.on: device`): the loader decodes and draws, the device does the rest.

Of each image the loader sends, once for both views, the pixels that they are made of, uint8, beside each view's draws;
`made_views` crops, resizes and flips whole batches by two matrix products, and carries out AutoAugment by operation.
The views are those that the loader makes of the same pixels, bit for bit and on any device: sums are of integers that
float32 holds, surely so up to 8 pixels of an image for one of a view, so neither their order nor TF32 changes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from modstruct.data.transforms.decoding import Whole
from modstruct.data.transforms.image_operations import OPERATIONS, sent
from modstruct.data.transforms.image_views import Drawn

PIXELS, DRAWS = "image_pixels", "_draws"
"""Names in a batch: the pixels (P, 3) uint8 of all images; behind the name of a view, its draws (B, 17) float64."""
# Of a draw: where the view's part of an image starts in the pixels, and of either axis, in the order in which they are
# resized: how far its next pixel is and how many there are, where the crop begins, how many of its pixels go into one
# of the view, and whether the view is mirrored. SWAPPED: rows come first.
START, SWAPPED, SIDE = range(3)
AXES = (3, 8)
STEP, LENGTH, LOW, SCALE, MIRRORED = range(5)
OPERATION, MAGNITUDE = (13, 15), (14, 16)
COLUMNS = 17
NAMES = tuple(OPERATIONS)
IMAGES_AT_ONCE = 16  # are float32 meanwhile, each as wide and high as the largest among them
FRACTION_BITS, LOW_BITS = 22, 12  # of weights: Pillow's, and those of them that are summed apart
# From version 13 on, Pillow resizes the height first where that is more.
TALL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
Part = tuple[int, int, int, int]
"""Left, top, right, bottom in an image's pixels."""


def as_sent(image: Image.Image, whole: Whole, smaller: int) -> tuple[Image.Image, Whole]:
    """The image at 1 / smaller of the whole one, of means over squares of pixels where it was not decoded so."""
    more = smaller // whole.factor
    return (image.reduce(more), Whole(whole.size, whole.factor * more)) if more > 1 else (image, whole)


class SentImages:
    """What the loader sends of a batch's images, which are added in the order of its rows."""

    def __init__(self, views: Sequence[str], rows: int, side: int):
        """views: their names. side: of the views, in pixels."""
        self.side = side
        self.tiles: list[np.ndarray] = []
        """(n, 3) uint8: together the pixels of the batch."""
        self._draws = [np.zeros((rows, COLUMNS)) for _ in views]
        self.draws = {f"{name}{DRAWS}": torch.from_numpy(draws) for name, draws in zip(views, self._draws, strict=True)}
        """By their names in the batch."""
        self._rows = self._pixels = 0

    def add(self, image: Image.Image, drawn: Sequence[Drawn]) -> None:
        """drawn: for each view."""
        parts = [_part(draw.box, image.size, self.side) for draw in drawn]
        lefts, tops, rights, bottoms = zip(*parts, strict=True)
        around = min(lefts), min(tops), max(rights), max(bottoms)
        sent_parts = [around] if _area(around) <= sum(map(_area, parts)) else parts
        starts = {}
        for cut in dict.fromkeys(sent_parts):
            self.tiles.append(np.asarray(image.crop(cut)).reshape(-1, 3))
            starts[cut] = self._pixels
            self._pixels += _area(cut)
        views = zip(self._draws, drawn, parts, strict=True)
        for (draws, draw, part), cut in zip(views, cycle(sent_parts)):
            width = cut[2] - cut[0]
            start = starts[cut] + (part[1] - cut[1]) * width + part[0] - cut[0]
            low, high = np.array(draw.box, np.float32).reshape(2, 2)  # as Pillow takes it
            scales = (high - low).astype(float) / self.side
            axes = [
                (step, part[axis + 2] - part[axis], float(low[axis]) - part[axis], scales[axis], mirrored)
                for axis, (step, mirrored) in enumerate([(1, draw.flip), (width, False)])
            ]
            swapped = _height_first(image.size, self.side)
            values = [start, swapped, self.side, *axes[swapped], *axes[not swapped]]
            for name, magnitude in draw.operations:
                values += [NAMES.index(name), magnitude]
            draws[self._rows, : len(values)] = values
        self._rows += 1


def made_views(batch: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch, with views (B, 3, side, side) uint8 in place of the pixels and draws if it has these.

    batch: on the device. drawn: the same on the CPU, where the host reads the draws.
    """
    if PIXELS not in batch:
        return batch
    names = [name for name in batch if name.endswith(DRAWS)]
    views = {name.removesuffix(DRAWS): image_view(batch[PIXELS], batch[name], drawn[name].numpy()) for name in names}
    return views | {name: rows for name, rows in batch.items() if name not in (PIXELS, *names)}


def image_view(pixels: Tensor, draws: Tensor, drawn: np.ndarray) -> Tensor:
    """One view of a batch: (B, 3, side, side) uint8. drawn: the draws on the CPU."""
    starts = range(0, len(drawn), IMAGES_AT_ONCE)
    parts = [slice(start, start + IMAGES_AT_ONCE) for start in starts]
    images = torch.cat([_cropped(pixels, draws[part], drawn[part]) for part in parts])
    for operation, magnitude in zip(OPERATION, MAGNITUDE, strict=True):
        numbers = drawn[:, operation].astype(int)
        for number in sorted({*numbers.tolist()} - {0}):  # 0 is the identity
            rows = np.flatnonzero(numbers == number)
            places = sent(rows, images.device)
            images[places] = OPERATIONS[NAMES[number]](images[places], drawn[rows, magnitude])
    return images


def _cropped(pixels: Tensor, draws: Tensor, drawn: np.ndarray) -> Tensor:
    """(n, 3, side, side): each draw's crop, resized and flipped."""
    side, columns = int(drawn[0, SIDE]), draws.T[:, :, None]
    axes = [columns[first : first + 5] for first in AXES]
    lengths = [int(drawn[:, first + LENGTH].max()) for first in AXES]
    # Beyond an image's part its last pixels again, of weight 0.
    inner, outer = (
        axis[STEP].long() * torch.arange(length, device=pixels.device).minimum(axis[LENGTH].long() - 1)
        for axis, length in zip(axes, lengths, strict=True)
    )
    places = columns[START].long()[:, :, None] + outer[:, :, None] + inner[:, None, :]
    images = pixels[places].permute(0, 3, 1, 2).float()
    for axis, length in zip(axes, lengths, strict=True):
        images = _weighted(images, _weights(axis, length, side)).transpose(2, 3)
    return torch.where(columns[SWAPPED, :, :, None, None] > 0, images.mT, images).to(torch.uint8)


def _weights(axis: Tensor, length: int, side: int) -> Tensor:
    """(n, side, length): what each pixel of a line of the image counts for one of the view, in units of 2**-22.

    axis: (5, n, 1), of the draws. The cubic kernel (Keys 1981, a = -1/2) as Pillow has it, as wide as the scale where
    that is above 1.
    """
    place = torch.arange(side, device=axis.device) + 0.5
    place = torch.where(axis[MIRRORED] > 0, side - place, place)
    centre = (axis[LOW] + place * axis[SCALE])[:, :, None]
    pixel = torch.arange(length, device=axis.device)
    far = ((pixel - centre + 0.5) * (1 / axis[SCALE].clamp(min=1))[:, :, None]).abs()
    near = (1.5 * far - 2.5) * far * far + 1
    further = (((far - 5) * far + 8) * far - 4) * -0.5
    kernel = torch.where(far < 1, near, torch.where(far < 2, further, 0.0)) * (pixel < axis[LENGTH])[:, None]
    units = kernel / kernel.sum(2, keepdim=True) * 2**FRACTION_BITS
    return units.sign() * (units.abs() + 0.5).floor()


def _weighted(images: Tensor, weights: Tensor) -> Tensor:
    """(n, 3, m, length) and (n, side, length) -> (n, 3, m, side), rounded to 0 … 255.

    The weights' upper and lower bits are multiplied apart: 11 bits each, which TF32 holds, and sums below 2**24.
    """
    upper = (weights / 2**LOW_BITS).round()
    lower = weights - upper * 2**LOW_BITS
    lines = images.flatten(1, 2)
    sums = [torch.bmm(lines, bits.float().mT).int() for bits in (upper, lower)]
    rounded = (sums[0] * 2**LOW_BITS + sums[1] + 2 ** (FRACTION_BITS - 1)) >> FRACTION_BITS
    return rounded.clamp(0, 255).float().unflatten(1, (3, -1))


def _part(box: tuple[float, float, float, float], size: tuple[int, int], side: int) -> Part:
    """What of an image of this size the view of a box is made of: the kernel reaches two pixels of the view beyond."""
    ends = []
    for low, high, length in zip(box[:2], box[2:], size, strict=True):
        beyond = 2 * max((high - low) / side, 1) + 1
        ends.append((max(math.floor(low - beyond), 0), min(math.ceil(high + beyond), length)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _height_first(size: tuple[int, int], side: int) -> bool:
    """Whether Pillow resizes the height of an image before its width; rounding comes in between."""
    width, height = size
    return TALL_FIRST and height > side and height - side > 2 * (width - side)


def _area(part: Part) -> int:
    return (part[2] - part[0]) * (part[3] - part[1])
