"""Random images, and the ways in which an image is changed on its way into another collection."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


def drawn(number: int, side: int = 128) -> Image.Image:
    """A smooth random image; equal numbers give equal images."""
    random = np.random.default_rng(number)
    rough = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return rough.resize((side, side), Image.Resampling.BICUBIC)


def coded(image: Image.Image, quality: int) -> Image.Image:
    """Through a JPEG file and back."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def cropped(image: Image.Image, share: float, left: float = 0.5, top: float = 0.5) -> Image.Image:
    """Without a share of its width and height, the fractions `left` and `top` of it at the left and at the top."""
    width, height = (round(side * (1 - share)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


COPIES = {
    "the same": lambda image: image,
    "JPEG 50": lambda image: coded(image, 50),
    "JPEG 20": lambda image: coded(image, 20),
    "half the size": lambda image: coded(image.resize((64, 64), Image.Resampling.BICUBIC), 90),
    "larger": lambda image: coded(image.resize((200, 200), Image.Resampling.BICUBIC), 90),
    "other proportions": lambda image: image.resize((120, 90), Image.Resampling.BICUBIC),
    "a crop of 5 % from the middle": lambda image: cropped(image, 0.05),
    "a crop of 5 % from a corner": lambda image: cropped(image, 0.05, 1, 0),
    "a crop of 4 % at the left": lambda image: cropped(image, 0.04, 1, 0.3),
    "brighter": lambda image: brighter(image, 1.1),
    "darker": lambda image: brighter(image, 0.9),
}


def mirror(image: Image.Image) -> Image.Image:
    return ImageOps.mirror(image)
