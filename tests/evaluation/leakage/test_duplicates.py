"""Planted copies are found and nothing else is, by hash and by embedding; images of one colour do not all match."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_images import COPIES, coded, drawn, mirror, thumbnails
from PIL import Image, ImageDraw

from modstruct.evaluation.leakage import duplicates as duplicates_module
from modstruct.evaluation.leakage.duplicates import Thresholds, find_duplicates
from modstruct.evaluation.leakage.perceptual_hash import image_differences
from modstruct.evaluation.leakage.prints import Prints, rows_by_key

IMAGES = 60


def prints(images, name="p") -> Prints:
    rows = thumbnails(images)
    return Prints.of_thumbnails(rows, [f"{name}{n}" for n in range(len(rows))])


def found_pairs(found) -> set[tuple[int, int]]:
    return set(zip(found.evaluation.tolist(), found.train.tolist(), strict=True))


@pytest.fixture(scope="module")
def train():
    return prints([drawn(n) for n in range(IMAGES)], "train")


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found_and_others_not(train, kind):
    """Even rows are copies, each of its own image; odd ones are of no image of the training source."""
    images = [COPIES[kind](drawn(n if n % 2 == 0 else 1000 + n)) for n in range(20)]
    found = find_duplicates(prints(images), train)
    assert found_pairs(found) == {(n, n) for n in range(0, 20, 2)}
    assert found.by_hash.all()
    assert not found.by_embedding.any()
    assert (found.difference <= 0.2).all()


def test_mirrored_copies_are_found_by_choice(train):
    images = prints([mirror(drawn(n)) for n in range(5)])
    assert not len(find_duplicates(images, train).train)
    found = find_duplicates(images, train, Thresholds(mirrored=True))
    assert found_pairs(found) == {(n, n) for n in range(5)}
    assert found.mirrored.all()
    plain = find_duplicates(train, train, Thresholds(mirrored=True))
    assert found_pairs(plain) == {(n, n) for n in range(IMAGES)}
    assert not plain.mirrored.any()


def disc(colour, mark=None) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 88, 88), fill=colour)
    if mark is not None:
        draw.rectangle(mark, fill="black")
    return image


def test_another_colour_or_detail_is_another_image():
    """Their grey images are nearly the same, and so are their hashes: the second look tells them apart."""
    eyes, mouth = (30, 30, 42, 42), (30, 60, 66, 66)
    faces = [disc((240, 120, 40)), disc((240, 60, 180)), disc((240, 120, 40), eyes), disc((240, 120, 40), mouth)]
    found = find_duplicates(prints([coded(face, 85) for face in faces]), prints(faces))
    assert found_pairs(found) == {(n, n) for n in range(4)}


def test_images_of_one_colour_match_those_of_their_colour_only(train):
    colours = [(255, 255, 255), (0, 0, 0), (200, 30, 30), (200, 40, 60), (128, 128, 128)]
    flat = [Image.new("RGB", (64, 64), colour) for colour in colours]
    noisy = [coded(Image.fromarray(np.asarray(p) ^ (np.arange(64)[:, None] % 2).astype(np.uint8)), 80) for p in flat]
    both = prints([*flat, *(drawn(n) for n in range(10))])
    found = find_duplicates(prints([*noisy, drawn(3)]), both)
    assert found_pairs(found) == {(n, n) for n in range(5)} | {(5, 8)}
    assert found.by_hash.all()
    assert not len(find_duplicates(prints(flat), train).train)
    assert not len(find_duplicates(prints([drawn(1000)]), prints(flat)).train)


def test_a_placeholder_that_occurs_thousands_of_times_is_listed_a_few_times(monkeypatch):
    looked_at = []

    def counted(first, *rest):
        looked_at.append(len(first))
        return image_differences(first, *rest)

    monkeypatch.setattr(duplicates_module, "image_differences", counted)
    placeholder = thumbnails([drawn(0)])
    many = Prints.of_thumbnails(np.repeat(placeholder, 3_000, axis=0), [str(n) for n in range(3_000)])
    found = find_duplicates(many_queries(placeholder, 30), many, Thresholds(listed=3))
    assert found_pairs(found) == {(query, item) for query in range(30) for item in range(3)}
    assert sum(looked_at) < 500


def many_queries(placeholder: np.ndarray, count: int) -> Prints:
    return Prints.of_thumbnails(np.repeat(placeholder, count, axis=0), [str(n) for n in range(count)])


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_found_does_not_depend_on_blocks(train, monkeypatch, mirrored):
    images = [COPIES["JPEG 50"](drawn(n % 7)) for n in range(30)] + [Image.new("RGB", (9, 9))]
    thresholds = Thresholds(mirrored=mirrored)
    whole = find_duplicates(prints(images), train, thresholds)
    monkeypatch.setattr(duplicates_module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr("modstruct.evaluation.leakage.perceptual_hash.GALLERY_AT_ONCE", 13)
    monkeypatch.setattr("modstruct.evaluation.leakage.perceptual_hash.QUERIES_AT_ONCE", 3)
    parts = find_duplicates(prints(images), train, thresholds)
    assert found_pairs(parts) == found_pairs(whole) == {(n, n % 7) for n in range(30)}
    for name, values in vars(whole).items():
        np.testing.assert_allclose(getattr(parts, name), values, atol=1e-5)


def test_pairs_by_embedding_join_those_by_hash(train):
    """Image 0 is near by both, 1 by hash alone, 2 by its embedding alone, 3 by neither."""
    evaluation = prints([drawn(0), drawn(1), drawn(1002), drawn(1003)])
    train_rows = np.eye(IMAGES, dtype=np.float32)
    rows = np.zeros((4, IMAGES), dtype=np.float32)
    rows[0, 0] = rows[2, 9] = 1
    rows[1, [1, 30]] = rows[3, [3, 4]] = np.sqrt(0.5)
    found = find_duplicates(evaluation, train, embeddings=(rows, train_rows))
    assert found_pairs(found) == {(0, 0), (1, 1), (2, 9)}
    assert found.by_hash.tolist() == [True, True, False]
    assert found.by_embedding.tolist() == [True, False, True]
    np.testing.assert_allclose(found.cosine, [1, np.sqrt(0.5), 1], atol=1e-6)
    assert found.hamming[2] > 8


def test_embeddings_are_matched_by_key():
    source = prints([drawn(n) for n in range(4)], "k")
    source.keys = ["a", "b", "a", "c"]
    rows = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    assert rows_by_key(source, source.keys, rows) is rows
    found = rows_by_key(source, ["c", "a", "a"], rows)
    assert found.tolist() == [[3, 4], [0, 0], [5, 6], [1, 2]]
    with pytest.raises(ValueError, match="embed the same source"):
        rows_by_key(source, ["x", "y", "z"], rows)
    with pytest.raises(ValueError, match="embeddings = "):
        find_duplicates(source, source, embeddings=(rows, rows))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hamming", 70), ("difference", 0), ("cosine", float("nan")), ("cosine", 2), ("listed", 0)],
)
def test_thresholds_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = "):
        Thresholds(**{field: value})
