"""Decodes JPEG, PNG and WebP to upright RGB images."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from modstruct.data.faults import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
# Keys of an image's `info` in which Pillow looks for an orientation.
ORIENTATION_IN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
BACKGROUND = (255, 255, 255)  # of transparent parts
BAND_ROWS = 256  # of a transparent image are composited at once: the whole would take four times its memory
# A progressive JPEG has ten or so; each costs a pass over all pixels, though it may be a few bytes long.
MOST_SCANS = 100
SCAN_MARKER = re.compile(b"\xff\xda")


def decode_image(content: bytes, max_pixels: int, where: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode an image to mode RGB, turned upright by its EXIF orientation.

    Transparent parts become white, 16-bit greys are scaled to 8 bits, palettes and CMYK are converted; of an animation
    the first frame counts. max_pixels: largest area that is decoded; the header is checked first. (Pillow itself
    refuses above 179 million.) Decoding takes 8 bytes of memory a pixel, 20 for a WebP. formats: Pillow's names of
    those that are read. Raises BadSample with `where`.
    """
    return decode_reduced(content, max_pixels, where, lambda size: 1, formats)[0]


def as_decoded(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened, or that a program has made, as decode_image gives it."""
    image.load()
    return _upright(image.copy() if _orientation(image) > 1 else image)


class Whole(NamedTuple):
    """The upright image that a smaller one was decoded from."""

    size: tuple[int, int]
    """Width and height, in pixels."""
    factor: int = 1
    """Pixel (x, y) of the smaller one is the mean of those from (factor x, factor y) on."""


def decode_reduced(
    content: bytes,
    max_pixels: int,
    where: str,
    factor: Callable[[tuple[int, int]], int],
    formats: tuple[str, ...] = FORMATS,
) -> tuple[Image.Image, Whole]:
    """As decode_image, but a JPEG at 1 / factor(width and height) of its size: 1, 2, 4 or 8.

    libjpeg leaves out the cosines that the smaller image cannot show, which costs a fraction of the time.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise BadSample("decompression bomb", f"{where} ({image.width} x {image.height} pixels)")
            if _too_many_scans(content):
                raise BadSample("decompression bomb", f"{where} (a JPEG of more than {MOST_SCANS} scans)")
            wanted = 1
            if image.format == "JPEG":
                turned = _orientation(image)
                wanted = factor(image.size if turned < 5 else (image.height, image.width))
                if turned > 1 and (image.width % wanted or image.height % wanted):
                    wanted = 1  # the last pixels, of less than a whole factor, would come first
            size = image.size
            if wanted > 1:
                image.draft(None, (image.width // wanted, image.height // wanted))
            image.load()
            lying = image.size
            return _upright(image), Whole(size if image.size == lying else size[::-1], wanted)
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("decompression bomb", where) from None
    except Exception as error:  # a damaged image raises nearly anything, from SyntaxError to struct.error
        raise BadSample("undecodable image", f"{where} ({type(error).__name__})") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned in place, in mode RGB."""
    if _orientation(image) > 1:  # a PNG's may stand behind its pixels
        with suppress(Exception):  # what else a damaged EXIF block holds, told when the pixels are turned
            ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _too_many_scans(content: bytes) -> bool:
    # re finds the marker in half the time of bytes.count.
    if (
        not content.startswith(b"\xff\xd8")
        or next(islice(SCAN_MARKER.finditer(content), MOST_SCANS, None), None) is None
    ):
        return False
    # The two bytes also occur in metadata and thumbnails; only walking the markers is exact.
    scans, place = 0, 2
    while 0 <= place < len(content) - 3 and scans <= MOST_SCANS:
        marker = content[place + 1]
        if content[place] != 0xFF or marker == 0 or 0xD0 <= marker <= 0xD7:  # entropy-coded data
            place = content.find(b"\xff", place + 1)
        elif marker == 0xFF:  # fill bytes
            place += 1
        elif marker == 0xD9:
            return False
        else:
            scans += marker == 0xDA
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return scans > MOST_SCANS


def _orientation(image: Image.Image) -> int:
    """That of EXIF, 1 to 8: 1 upright, from 5 on turned by 90 degrees."""
    if image.info.keys().isdisjoint(ORIENTATION_IN):
        return 1  # Pillow would build an empty EXIF block first
    with suppress(Exception):  # a damaged EXIF block leaves it unknown; the image is intact
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in range(2, 9) else 1
    return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # Pillow would copy it
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion may clip instead of scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND_ROWS):
        box = (0, top, image.width, min(top + BAND_ROWS, image.height))
        layer = image.crop(box).convert("RGBA")
        background = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        rgb.paste(Image.alpha_composite(background, layer).convert("RGB"), box)
    return rgb
