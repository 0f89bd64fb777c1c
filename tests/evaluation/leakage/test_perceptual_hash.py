"""A hash stays nearly as it is when an image is coded, scaled, cropped or brightened, and tells images apart."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_images import COPIES, drawn, mirror, thumbnails
from PIL import Image
from scipy.fft import dctn

from modstruct.evaluation.leakage.perceptual_hash import GREY, SIDE, VIEWS, image_hashes, least_distances, mirrored

IMAGES = 40


@pytest.fixture(scope="module")
def originals():
    return image_hashes(thumbnails(drawn(n) for n in range(IMAGES)))


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_nearly_the_same_hash(originals, kind):
    copies = image_hashes(thumbnails(COPIES[kind](drawn(n)) for n in range(IMAGES)))
    assert least_distances(copies, originals)[0].max() <= 8


def test_other_images_have_other_hashes(originals):
    first, second = np.triu_indices(IMAGES, 1)
    assert least_distances(originals[first], originals[second])[0].min() > 12


def test_bits_are_signs_of_the_lowest_cosines():
    images = thumbnails(drawn(n) for n in range(5))
    for image, code in zip(images, image_hashes(images)[:, 0], strict=True):
        grey = np.einsum("chw,c->hw", image.astype(np.float64), GREY)
        lowest = dctn(grey, norm="ortho")[:8, :8].ravel() / SIDE
        lowest[0] = 0
        bits = np.unpackbits(np.array([code]).view(np.uint8)).astype(bool)
        threshold = max(0.1 * np.sqrt((lowest**2).mean()), 0.25)
        clear = np.abs(lowest - threshold) > 1e-3
        assert clear.sum() > 50
        assert (bits == (lowest > threshold))[clear].all()


def test_each_view_is_the_hash_of_a_crop(originals):
    (top, bottom), (left, right) = VIEWS[3]
    side = 1200
    box = tuple(round(side * share) for share in (left, top, right, bottom))
    crops = thumbnails(drawn(n, side).crop(box) for n in range(10))
    views = image_hashes(thumbnails(drawn(n, side) for n in range(10)))[:, 3]
    assert np.bitwise_count(image_hashes(crops)[:, 0] ^ views).max() <= 4


def test_a_mirrored_thumbnail_is_that_of_the_mirrored_image():
    image = drawn(3)
    assert np.array_equal(mirrored(thumbnails([image])), thumbnails([mirror(image)]))


def test_noise_on_one_colour_sets_no_bit():
    noisy = Image.fromarray(np.random.default_rng(0).integers(126, 130, (256, 256, 3), dtype=np.uint8))
    assert not image_hashes(thumbnails([noisy, Image.new("RGB", (20, 20), (255, 255, 255))])).any()


def test_the_noise_of_coding_changes_few_bits_of_a_symmetric_image():
    """Half of its cosines are 0: as signs, or against their median, they would follow the noise."""
    half = np.asarray(drawn(1))[:, :64]
    symmetric = Image.fromarray(np.concatenate((half, half[:, ::-1]), axis=1))
    codes = image_hashes(thumbnails([symmetric, COPIES["JPEG 20"](symmetric)]))
    assert np.bitwise_count(codes[0, 0] ^ codes[1, 0]) <= 2
