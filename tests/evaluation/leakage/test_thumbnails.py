"""A hash stays nearly as it is when an image is coded, scaled, cropped or brightened, and tells images apart."""

from __future__ import annotations

import imagehash
import numpy as np
import pytest
from drawn_images import COPIES, coded, drawn, mirror
from PIL import Image, ImageDraw

from modstruct.evaluation.leakage.duplicates import (
    HASH_BITS,
    Thresholds,
    _codes,
    differences,
    flat,
    hashes,
    of_images,
    pixels,
)

IMAGES = 20
ALL = np.arange(IMAGES)


@pytest.fixture(scope="module")
def originals():
    return of_images([drawn(n) for n in range(IMAGES)])


def test_hashes_are_kept_as_signs_of_unit_norm_and_thumbnails_exactly(originals):
    rows = originals.rows("image")
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-6)
    assert np.array_equal(_codes(originals, ALL), hashes(pixels(originals, ALL)))
    grey = Image.fromarray(pixels(originals, ALL[:1])[0].transpose(1, 2, 0).copy()).convert("L")
    assert np.array_equal(np.unpackbits(_codes(originals, ALL[:1]))[:64], imagehash.dhash(grey).hash.ravel())


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_nearly_the_same_hash_and_little_difference(originals, kind):
    copies = of_images([COPIES[kind](drawn(n)) for n in range(IMAGES)])
    differing = np.bitwise_count(_codes(copies, ALL) ^ _codes(originals, ALL)).sum(axis=1)
    assert differing.max() <= Thresholds().hamming
    assert differences(pixels(copies, ALL), pixels(originals, ALL), 0.2).max() <= 0.2


def test_other_images_have_other_hashes_and_differ(originals):
    first, second = np.triu_indices(IMAGES, 1)
    differing = np.bitwise_count(_codes(originals, first) ^ _codes(originals, second)).sum(axis=1)
    assert differing.min() > Thresholds().hamming
    assert differences(pixels(originals, first), pixels(originals, second), 0.2).min() > 0.4


def test_differences_are_zero_of_equals_and_symmetric(originals):
    first, second = pixels(originals, ALL), pixels(of_images([coded(drawn(n), 20) for n in range(IMAGES)]), ALL)
    assert differences(first, first, 0.2).max() < 0.01
    np.testing.assert_allclose(differences(first, second, 0.2), differences(second, first, 0.2), atol=1e-5)
    assert differences(first[:0], first[:0], 0.2).shape == (0,)


def disc(colour, mark=None) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 88, 88), fill=colour)
    if mark is not None:
        draw.rectangle(mark, fill="black")
    return image


def test_another_colour_or_detail_is_another_image():
    """Their grey images are nearly the same, and so are their hashes: the comparison tells them apart."""
    eyes, mouth = (30, 30, 42, 42), (30, 60, 66, 66)
    faces = [disc((240, 120, 40)), disc((240, 60, 180)), disc((240, 120, 40), eyes), disc((240, 120, 40), mouth)]
    one, other = np.divmod(np.arange(16), 4)
    found = differences(
        pixels(of_images([coded(face, 85) for face in faces]), one), pixels(of_images(faces), other), 0.2
    )
    assert np.array_equal(found <= 0.2, one == other)


def test_images_of_one_colour_are_compared_by_it_and_have_no_hash():
    noise = np.random.default_rng(0).integers(-2, 3, (64, 64, 1))
    levels = [100, 102, 110]
    images = [Image.fromarray((np.full((64, 64, 3), level) + noise).astype(np.uint8)) for level in levels]
    rows = pixels(of_images([*images, drawn(0)]), np.arange(4))
    assert flat(rows).tolist() == [True, True, True, False]
    assert hashes(rows)[:3].sum() == 0
    assert 8 * hashes(rows).shape[1] == HASH_BITS
    found = differences(rows[[0, 0, 0]], rows[[1, 2, 3]], 0.2)
    assert found[:2] == pytest.approx([0.1, 0.5], abs=0.02)
    assert np.isinf(found[2])


def test_a_mirrored_thumbnail_is_that_of_the_mirrored_image():
    image = of_images([drawn(3), mirror(drawn(3))])
    assert np.array_equal(pixels(image, np.array([0]), mirrored=True), pixels(image, np.array([1])))
