"""Bytes of a JPEG, PNG or WebP -> an upright RGB image."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from itertools import islice

import numpy as np
from PIL import Image, ImageOps

from modstruct.data.faults import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
# Keys of an image's `info` that Pillow looks for an orientation in.
ORIENTATION_IN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
PAPER = (255, 255, 255)  # what shows through transparent parts
BAND_ROWS = 256  # of a transparent image are laid on paper at once: whole, it would take four times its memory
# A progressive JPEG has ten or so; each costs a pass over all pixels, though it may be a few bytes long.
MOST_SCANS = 100
SCAN_MARK = re.compile(b"\xff\xda")


def decode_image(content: bytes, max_pixels: int, where: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode an image to mode RGB, turned upright by its EXIF orientation.

    Transparent parts become white, 16-bit greys are scaled to 8 bits, palettes and CMYK are converted; of an animation
    the first frame counts. max_pixels: largest area that is decoded; the header is looked at first. (Pillow itself
    refuses above 179 million.) Meanwhile a pixel takes 8 bytes of memory, of a WebP 20. formats: what is read, by
    Pillow's names. Raises BadSample with `where`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadSample("decompression bomb", f"{where} ({picture.width} x {picture.height} pixels)")
            if _too_many_scans(content):
                raise BadSample("decompression bomb", f"{where} (a JPEG of more than {MOST_SCANS} scans)")
            picture.load()
            return _rgb(_upright(picture))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("decompression bomb", where) from None
    except Exception as error:  # a damaged image raises nearly anything, from SyntaxError to struct.error
        raise BadSample("undecodable image", f"{where} ({type(error).__name__})") from None


def _too_many_scans(content: bytes) -> bool:
    # re finds the mark in half the time of bytes.count.
    if not content.startswith(b"\xff\xd8") or next(islice(SCAN_MARK.finditer(content), MOST_SCANS, None), None) is None:
        return False
    # The two bytes occur by chance in what cameras put beside the image; only walking from mark to mark is sure.
    scans, place = 0, 2
    while 0 <= place < len(content) - 3 and scans <= MOST_SCANS:
        mark = content[place + 1]
        if content[place] != 0xFF or mark == 0 or 0xD0 <= mark <= 0xD7:  # coded pixels
            place = content.find(b"\xff", place + 1)
        elif mark == 0xFF:  # filling
            place += 1
        elif mark == 0xD9:
            return False
        else:
            scans += mark == 0xDA
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return scans > MOST_SCANS


def _upright(picture: Image.Image) -> Image.Image:
    if picture.info.keys().isdisjoint(ORIENTATION_IN):
        return picture  # Pillow would build an empty EXIF block first
    with suppress(Exception):  # a damaged EXIF block says nothing of the orientation; the image is sound
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture  # Pillow would copy it
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion may clip instead of scale
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgb = Image.new("RGB", picture.size)
    for top in range(0, picture.height, BAND_ROWS):
        box = (0, top, picture.width, min(top + BAND_ROWS, picture.height))
        layer = picture.crop(box).convert("RGBA")
        paper = Image.new("RGBA", layer.size, (*PAPER, 255))
        rgb.paste(Image.alpha_composite(paper, layer).convert("RGB"), box)
    return rgb
