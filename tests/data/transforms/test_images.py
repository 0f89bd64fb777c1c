"""Every sound image becomes upright RGB; every unsound one is a bad sample with its cause."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modstruct.config import ViewsConfig
from modstruct.data.faults import BadSample
from modstruct.data.transforms.decoding import decode_image, decode_reduced
from modstruct.data.transforms.image_views import ImageViews


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def decoded(content: bytes) -> np.ndarray:
    image = decode_image(content, 10_000_000, "here")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colours_survive(kind):
    content = encoded(Image.new("RGB", (9, 7), (200, 30, 60)), kind)
    assert decoded(content).shape == (7, 9, 3)
    np.testing.assert_allclose(decoded(content)[3, 3], (200, 30, 60), atol=6)


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for content, colour in (
        (encoded(image), (10, 20, 30)),
        (encoded(image, "WEBP", lossless=True), (10, 20, 30)),
        (encoded(grey), (40, 40, 40)),
        (encoded(palette, transparency=1), (10, 20, 30)),
        (encoded(image.convert("RGB"), transparency=(0, 0, 0)), (10, 20, 30)),
    ):
        np.testing.assert_array_equal(decoded(content)[0], [colour, (255, 255, 255)])


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(levels)))[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_are_converted(mode):
    content = encoded(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode))
    np.testing.assert_array_equal(decoded(content), np.full((4, 4, 3), 255))


def test_cmyk_is_converted():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    np.testing.assert_allclose(decoded(content)[4, 4], (255, 0, 0), atol=8)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    upright = decoded(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.shape == (16, 8, 3)
    assert upright[:6].min() > 200
    assert upright[10:].max() < 50


@pytest.mark.parametrize("orientation", [0, 9, 100])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, whole = decode_reduced(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=exif), 10_000, "here", lambda size: 2)
    assert (image.size, whole.size) == ((8, 4), (16, 8))


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (16, 8)), "PNG", exif=exif)
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4])
    moved = content[:at] + content[end:-12] + content[at:end] + content[-12:]  # before the last chunk, IEND
    assert decoded(content).shape == decoded(moved).shape == (16, 8, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_cost_the_image():
    content = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xffgarbage")
    assert decoded(content).shape == (8, 8, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and holds no pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(5000, 5000), (30_000, 30_000), (100, 200_000)])
def test_a_decompression_bomb_is_told_by_its_header(size):
    with pytest.raises(BadSample) as bad:
        decode_image(png_header(*size), 10_000_000, "here")
    assert bad.value.cause == "decompression bomb"
    assert bad.value.where.startswith("here")


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive grey JPEG in which all scans but the first say "nothing changes", in a few bytes each."""

    def segment(mark: int, data: bytes) -> bytes:
        return b"\xff" + bytes([mark]) + struct.pack(">H", len(data) + 2) + data

    blocks = (side // 8) ** 2
    frame = struct.pack(">BHHBB", 8, side, side, 1, 1) + b"\x11\0"
    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame)
    for table in (b"\0", b"\x10"):
        tables += segment(0xC4, table + bytes([1] + [0] * 15) + b"\0")  # one code: no difference, or end of block
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8)
    return b"\xff\xd8" + tables + first + (segment(0xDA, b"\1\1\0\1\x3f\0") + bytes(blocks // 8)) * scans + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_a_bomb():
    assert decode_image(jpeg_of_scans(16, 50), 10_000, "here").size == (16, 16)
    with pytest.raises(BadSample, match=r"decompression bomb: here .*scans"):
        decode_image(jpeg_of_scans(16, 5000), 10_000, "here")


def test_what_cameras_put_beside_a_jpeg_counts_as_no_scan():
    content = encoded(Image.new("RGB", (16, 16), "red"), "JPEG", comment=b"\xff\xda" * 200)
    assert decoded(content + b"\xff\xda" * 5000).shape == (16, 16, 3)


# Of each kind an image of 16 million pixels in at most 80,000 bytes.
@pytest.mark.parametrize(("kind", "mode", "most"), [("PNG", "RGB", 9), ("PNG", "RGBA", 9), ("WEBP", "RGBA", 21)])
def test_decoding_takes_the_memory_that_the_recipe_says(kind, mode, most):
    script = (
        "import sys, resource; from modstruct.data.transforms.decoding import decode_image, decode_reduced\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "content = sys.stdin.buffer.read(); before = peak()\n"
        "decode_image(content, 16_000_000, ''); print((peak() - before) / 16e6)"
    )
    content = encoded(Image.new(mode, (4000, 4000), (1, 2, 3, 9)[: len(mode)]), kind, lossless=True)
    assert len(content) < 80_000
    done = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, check=True)
    assert float(done.stdout) < most


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(Image.effect_noise((64, 64), 50))[:900],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        png_header(10, 10),
        encoded(Image.new("RGB", (4, 4)), "GIF"),  # whatever its name says, only three formats are decoded
        encoded(Image.new("RGB", (4, 4)), "EPS"),
    ],
)
def test_what_is_no_image_is_undecodable(content):
    with pytest.raises(BadSample) as bad:
        decode_image(content, 10_000_000, "here")
    assert bad.value.cause == "undecodable image"
    assert bad.value.where.startswith("here")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_damage_anywhere_gives_an_image_or_a_bad_sample(kind, place, damage):
    content = bytearray(encoded(Image.effect_noise((24, 24), 60).convert("RGB"), kind))
    place %= len(content)
    content[place : place + len(damage)] = damage
    cause = None
    try:
        assert decode_image(bytes(content), 10_000_000, "here").mode == "RGB"
    except BadSample as bad:
        cause = bad.cause
    assert cause in (None, "undecodable image", "decompression bomb")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("plain", ["center_crop", "crop_flip"])
def test_views_of_a_jpeg_decoded_smaller_are_those_of_the_whole(plain, orientation):
    """A smooth picture, of odd sides unless it is turned: pixels differ by less than half of one of 256 levels."""
    width, height = (1024, 768) if orientation == 6 else (1021, 767)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [127 + 60 * np.sin(x / 37 + k) + 60 * np.cos(y / 53 - k) for k in range(3)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.stack(waves, -1).astype(np.uint8)), "JPEG", quality=95, exif=exif)
    views = ImageViews(ViewsConfig(plain=plain, auto_augment=False, crop_scale=(0.3, 1.0)), 100)
    seen = set()
    for seed in range(6):
        asked = []

        def factor(size, seed=seed, asked=asked):
            asked.append(size)
            return views.reduction(size, seed, seed + 10)

        image, whole = decode_reduced(content, 10_000_000, "here", factor)
        assert asked == [whole.size] == [(height, width) if orientation == 6 else (width, height)]
        assert image.size == tuple(math.ceil(side / whole.factor) for side in whole.size)
        seen.add(whole.factor)
        full = decode_image(content, 10_000_000, "here")
        for make, drawn in ((views.plain_image, seed), (views.augmented_image, seed + 10)):
            near, exact = make(image, drawn, None, whole).float(), make(full, drawn).float()
            assert (near - exact).abs().mean() < 0.5
    assert seen <= {2, 4}
    assert 4 in seen


def test_nothing_is_decoded_smaller_than_its_views_or_but_for_a_jpeg():
    views = ImageViews(ViewsConfig(plain="center_crop"), 100)
    sizes = [((199, 5000), 1), ((200, 200), 2), ((399, 800), 2), ((400, 400), 4), ((9000, 9000), 8)]
    for size, factor in sizes:
        assert views.reduction(size, 0, None) == factor
    assert views.reduction((400, 400), 0, 1) in (1, 2)  # the augmented view's crop is smaller
    image, whole = decode_reduced(encoded(Image.new("RGB", (64, 32))), 10_000, "here", lambda size: 8)
    assert image.size == whole.size == (64, 32)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encoded(Image.new("RGB", (65, 32)), "JPEG", exif=exif)
    image, odd = decode_reduced(turned, 10_000, "here", lambda size: 8)
    assert image.size == odd.size == (65, 32)
    assert whole.factor == odd.factor == 1
