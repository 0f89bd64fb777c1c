"""Views of images: centre crop, random crop and flip, AutoAugment; PIL images in, uint8 tensors out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from modstruct.config import ViewsConfig
from modstruct.data.transforms.decoding import Whole
from modstruct.errors import require

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of a random crop, as in Inception's and torchvision's RandomResizedCrop
LOG_ASPECT_RATIOS = tuple(math.log(ratio) for ratio in ASPECT_RATIOS)
CROP_ATTEMPTS = 10

MILD = (
    *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
)
"""Operations of ALBEF's code: none that changes colours, which captions name."""


class _Noting:
    """Over torchvision's transforms: can draw operations without carrying them out."""

    noted: list[tuple[str, float]] | None = None

    def operations(self, side: int) -> list[tuple[str, float]]:
        """What it draws for an image of this side: torchvision's name and the magnitude of each operation."""
        noted: list[tuple[str, float]] = []
        self.noted = noted
        self(Image.new("L", (side, side)))  # type: ignore[operator]  # a transform is called
        self.noted = None
        return noted

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, *more, **named):
        if self.noted is None:
            return super()._apply_image_or_video_transform(image, transform_id, magnitude, *more, **named)  # type: ignore[misc]
        self.noted.append((transform_id, magnitude))
        return image


class AutoAugment(_Noting, v2.AutoAugment):
    """torchvision's AutoAugment, which can be asked for its draws."""


class MildRandAugment(_Noting, v2.RandAugment):
    """torchvision's RandAugment with ALBEF's choice of operations."""

    _AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name] for name in MILD}  # noqa: RUF012


class Drawn(NamedTuple):
    """What is drawn for a view."""

    box: tuple[float, float, float, float]
    """Its crop: left, top, right, bottom in pixels of the decoded image."""
    flip: bool = False
    operations: Sequence[tuple[str, float]] = ()
    """torchvision's name and the magnitude of each."""


class ImageViews:
    """Views of PIL images of any size and mode as uint8 tensors (3, image_size, image_size).

    into: an array of that shape to write the view to, such as a row of a batch. whole: what the image was decoded from,
    if that is larger; the view is the same but for rounding.
    """

    def __init__(self, config: ViewsConfig, image_size: int):
        """image_size: side of the square view, in pixels."""
        require(image_size >= 1, "model.vision.image_size", image_size, "at least 1 pixel")
        self.image_size = image_size
        self.on_device = config.on == "device"
        """Whether training makes them on the device, of what is `drawn` here."""
        self._plain_is_random = config.plain == "crop_flip"
        self._squeeze = config.evaluation == "squeeze"
        self._crop_scale = config.crop_scale
        self._flip = config.flip
        self._rand_augment = (
            MildRandAugment(num_ops=2, magnitude=7, num_magnitude_bins=11) if config.rand_augment else None
        )
        self._auto_augment = AutoAugment(v2.AutoAugmentPolicy.IMAGENET) if config.auto_augment else None

    def plain_image(
        self, image: Image.Image, seed: int, into: np.ndarray | None = None, whole: Whole | None = None
    ) -> Tensor:
        """The view of `views.plain`: the centre, or a random crop and flip drawn from seed."""
        if not self._plain_is_random:
            return _to_tensor(centre_crop(_rgb(image), self.image_size, whole), into)
        return _to_tensor(self._changed(image, seed, self._rand_augment, whole), into)

    def augmented_image(
        self, image: Image.Image, seed: int, into: np.ndarray | None = None, whole: Whole | None = None
    ) -> Tensor:
        """A random crop, a flip and AutoAugment, as the recipe says, drawn from seed."""
        return _to_tensor(self._changed(image, seed, self._auto_augment, whole), into)

    def drawn(self, whole: Whole, plain_seed: int, augmented_seed: int | None) -> list[Drawn]:
        """What plain_image and, where it is made, augmented_image draw from their seeds."""
        changes = [(plain_seed, self._rand_augment)] * self._plain_is_random
        changes += [] if augmented_seed is None else [(augmented_seed, self._auto_augment)]
        draws = [] if self._plain_is_random else [Drawn(centre_box(self.image_size, whole))]
        for seed, change in changes:
            box, flip, further = self._drawn(seed, whole)
            with _torch_seeded(further):
                draws.append(Drawn(box, flip, change.operations(self.image_size) if change else []))
        return draws

    def smaller(self, size: tuple[int, int], plain_seed: int, augmented_seed: int | None) -> int:
        """The largest number, at least 1, by which an image of this width and height can be divided so that each view's
        crop of it is still no smaller than the view. augmented_seed: None where that view is not made."""
        if min(size) < 2 * self.image_size:
            return 1  # whatever is drawn
        seeds = [plain_seed] * self._plain_is_random + [augmented_seed] * (augmented_seed is not None)
        crops = [_draws_of(seed, size, self._crop_scale, self._flip)[0][2:] for seed in seeds]
        crops += [] if self._plain_is_random else [size]
        return max(1, min(map(min, crops)) // self.image_size)

    def reduction(self, size: tuple[int, int], plain_seed: int, augmented_seed: int | None) -> int:
        """Likewise, of 1, 2, 4, 8, by which a JPEG is decoded smaller."""
        least = self.smaller(size, plain_seed, augmented_seed)
        return next(factor for factor in (8, 4, 2, 1) if least >= factor)

    def evaluation_image(self, image: Image.Image) -> Tensor:
        """The view of `views.evaluation`, the centre or the whole image squeezed, regardless of `views.plain`."""
        if self._squeeze:
            return _to_tensor(_rgb(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), None)
        return _to_tensor(centre_crop(_rgb(image), self.image_size), None)

    def _changed(self, image: Image.Image, seed: int, change: v2.Transform | None, whole: Whole | None) -> Image.Image:
        """Cropped and flipped, then changed by `change`, all drawn from seed."""
        box, flip, further = self._drawn(seed, whole or Whole(image.size))
        image = self._crop_and_flip(_rgb(image), box, flip)
        if change is not None:
            with _torch_seeded(further):
                image = change(image)
        return image

    def _crop_and_flip(self, image: Image.Image, box: tuple[float, float, float, float], flip: bool) -> Image.Image:
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image

    def _drawn(self, seed: int, whole: Whole) -> tuple[tuple[float, float, float, float], bool, int]:
        """Crop in pixels of the decoded image, flip, and the seed of what else is drawn."""
        (left, top, width, height), flip, further = _draws_of(seed, whole.size, self._crop_scale, self._flip)
        k = whole.factor
        return (left / k, top / k, (left + width) / k, (top + height) / k), flip, further


@lru_cache(maxsize=8)  # decoding asks for the crops first
def _draws_of(
    seed: int, size: tuple[int, int], scale: tuple[float, float], flips: bool
) -> tuple[tuple[int, int, int, int], bool, int]:
    """`random_crop_box`, whether the view is flipped, and the seed of what else is drawn."""
    generator = random.Random(seed)
    return random_crop_box(*size, scale, generator), flips and generator.random() < 0.5, generator.getrandbits(63)


def centre_crop(image: Image.Image, size: int, whole: Whole | None = None) -> Image.Image:
    """The image with its shorter side resized to size (bicubic, antialiased), its centre (size, size) cut out.

    whole: what the image was decoded from, if that is larger, of which this is then the centre.

    The same as torchvision's Resize and CenterCrop but for rounding; only the kept pixels are computed, so an image of
    1 x 100,000 pixels is never enlarged whole.
    """
    if image.size == (size, size):
        return image
    box = centre_box(size, whole or Whole(image.size))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def centre_box(size: int, whole: Whole) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what centre_crop cuts out, in pixels of the decoded image."""
    sides, factor = whole
    shorter = min(sides)
    box: list[tuple[float, float]] = []
    for side in sides:
        resized = size * side // shorter
        start = round((resized - size) / 2) * side / resized
        box.append((start / factor, min(start + size * side / resized, side) / factor))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], generator: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, width and height, in pixels, of a random crop of an image (Szegedy et al. 2015).

    The crop's share of the area is uniform in scale, its aspect ratio log-uniform in 3/4 to 4/3. Where no such
    crop fits, it is the largest centred one whose aspect ratio lies in that range.
    """
    (least, most), (low, high) = scale, LOG_ASPECT_RATIOS
    # The draws of Random.uniform and Random.randint, without their several times slower calls.
    for _ in range(CROP_ATTEMPTS):
        area = width * height * (least + (most - least) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = _below(width - crop_width + 1, generator)
            top = _below(height - crop_height + 1, generator)
            return left, top, crop_width, crop_height
    crop_width = min(width, round(height * ASPECT_RATIOS[1]))
    crop_height = min(height, round(width / ASPECT_RATIOS[0]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _below(end: int, generator: random.Random) -> int:
    """A uniform number from 0 to end - 1."""
    bits = end.bit_length()
    drawn = end
    while drawn >= end:
        drawn = generator.getrandbits(bits)
    return drawn


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_tensor(image: Image.Image, into: np.ndarray | None) -> Tensor:
    """The pixels (3, H, W) of an image of mode RGB, written into `into` if given."""
    width, height = image.size
    if into is None:
        into = np.empty((3, height, width), dtype=np.uint8)
    # "RGB;L": of each line its reds, greens and blues; whole lines are copied faster than single bytes.
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8).reshape(height, 3, width)
    into[...] = lines.transpose(1, 0, 2)
    return torch.from_numpy(into)


@contextmanager
def _torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU, which AutoAugment draws from, and put it back afterwards.

    Not torch.random.fork_rng: that takes 50 times as long, and torch.manual_seed reseeds the GPUs as well. No other
    thread of this process may draw meanwhile.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
