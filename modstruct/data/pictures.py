"""Bytes of a JPEG, PNG or WebP -> an upright RGB picture."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from modstruct.data.faults import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
PAPER = (255, 255, 255)  # what shows through transparent parts


def decode_picture(content: bytes, max_pixels: int, where: str) -> Image.Image:
    """Decode a picture to mode RGB, turned upright by its EXIF orientation.

    Transparent parts become white, 16-bit greys are scaled to 8 bits, palettes and CMYK are converted; of an animation
    the first frame counts. max_pixels: largest area that is decoded; the header is looked at first. (Pillow itself
    refuses above 179 million.) Raises BadSample with `where`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadSample("decompression bomb", f"{where} ({picture.width} x {picture.height} pixels)")
            picture.load()
            return _rgb(_upright(picture))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("decompression bomb", where) from None
    except Exception as error:  # a damaged picture raises nearly anything, from SyntaxError to struct.error
        raise BadSample("undecodable picture", f"{where} ({type(error).__name__})") from None


# Where Pillow looks for an orientation.
ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def _upright(picture: Image.Image) -> Image.Image:
    if picture.info.keys().isdisjoint(ORIENTATION):
        return picture  # Pillow would copy it
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block says nothing of the orientation; the picture is sound
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture  # Pillow would copy it
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion may clip instead of scale
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (*PAPER, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return picture.convert("RGB")
