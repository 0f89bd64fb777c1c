"""Planted copies are found and nothing else is, by hash and by embedding; images of one colour do not all match."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drawn_images import COPIES, coded, drawn, mirror
from PIL import Image

from modstruct.evaluation.leakage import duplicates
from modstruct.evaluation.leakage.duplicates import Thresholds, cosines, find_duplicates, of_images, rows_by_key

IMAGES = 60


def found_pairs(found) -> set[tuple[int, int]]:
    return {(pair.evaluation, pair.train) for pair in found}


@pytest.fixture(scope="module")
def train():
    return of_images([drawn(n) for n in range(IMAGES)], "train")


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found_and_others_not(train, kind):
    """Even rows are copies, each of its own image; odd ones are of no image of the training source."""
    images = [COPIES[kind](drawn(n if n % 2 == 0 else 1000 + n)) for n in range(20)]
    found = find_duplicates(of_images(images), train)
    assert [(pair.evaluation, pair.train) for pair in found] == [(n, n) for n in range(0, 20, 2)]
    assert all(pair.by == ("hash",) and pair.difference <= 0.2 and pair.cosine is None for pair in found)


def test_mirrored_copies_are_found_by_choice(train):
    images = of_images([mirror(drawn(n)) for n in range(5)])
    assert find_duplicates(images, train) == []
    found = find_duplicates(images, train, Thresholds(mirrored=True))
    assert found_pairs(found) == {(n, n) for n in range(5)}
    assert all(pair.mirrored and pair.by == ("hash",) for pair in found)
    plain = find_duplicates(train, train, Thresholds(mirrored=True))
    assert found_pairs(plain) == {(n, n) for n in range(IMAGES)}
    assert not any(pair.mirrored for pair in plain)


def test_images_of_one_colour_match_those_of_their_colour_only(train):
    colours = [(255, 255, 255), (0, 0, 0), (200, 30, 30), (200, 40, 60), (128, 128, 128)]
    flat = [Image.new("RGB", (64, 64), colour) for colour in colours]
    noisy = [coded(Image.fromarray(np.asarray(p) ^ (np.arange(64)[:, None] % 2).astype(np.uint8)), 80) for p in flat]
    both = of_images([*flat, *(drawn(n) for n in range(10))])
    found = find_duplicates(of_images([*noisy, drawn(3)]), both)
    assert found_pairs(found) == {(n, n) for n in range(5)} | {(5, 8)}
    assert find_duplicates(of_images(flat), train) == []
    assert find_duplicates(of_images([drawn(1000)]), of_images(flat)) == []


def test_a_placeholder_that_occurs_thousands_of_times_is_compared_and_listed_once(monkeypatch):
    looked_at, compared = [], duplicates.differences

    def counted(first, *rest):
        looked_at.append(len(first))
        return compared(first, *rest)

    monkeypatch.setattr(duplicates, "differences", counted)
    many = of_images([drawn(0)] * 3_000)
    found = find_duplicates(of_images([drawn(0)] * 30), many)
    assert found_pairs(found) == {(query, 0) for query in range(30)}
    assert sum(looked_at) <= 60


def test_the_nearest_are_listed(train):
    several = of_images([coded(drawn(n % 2), quality) for quality in (95, 30, 60, 20) for n in range(4)])
    found = find_duplicates(of_images([drawn(0), drawn(1)]), several, Thresholds(listed=2))
    all_found = find_duplicates(of_images([drawn(0), drawn(1)]), several, Thresholds(listed=9))
    assert len(found) == 4
    for image in range(2):
        distances = [pair.hamming for pair in all_found if pair.evaluation == image]
        assert distances == sorted(distances)
        assert [pair.hamming for pair in found if pair.evaluation == image] == distances[:2]


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_found_does_not_depend_on_blocks(train, monkeypatch, mirrored):
    images = of_images([COPIES["JPEG 50"](drawn(n % 7)) for n in range(30)] + [Image.new("RGB", (9, 9))])
    whole = find_duplicates(images, train, Thresholds(mirrored=mirrored))
    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", 13)
    monkeypatch.setattr(duplicates, "QUERIES_AT_ONCE", 4)
    parts = find_duplicates(images, train, Thresholds(mirrored=mirrored))
    assert found_pairs(parts) == found_pairs(whole) == {(n, n % 7) for n in range(30)}
    assert [replace(pair, difference=0) for pair in parts] == [replace(pair, difference=0) for pair in whole]


def test_pairs_by_embedding_join_those_by_hash(train):
    """Image 0 is near by both, 1 by hash alone, 2 by its embedding alone, 3 by neither."""
    evaluation = of_images([drawn(0), drawn(1), drawn(1002), drawn(1003)])
    train_rows = np.eye(IMAGES, dtype=np.float32)
    rows = np.zeros((4, IMAGES), dtype=np.float32)
    rows[0, 0] = rows[2, 9] = 1
    rows[1, [1, 30]] = rows[3, [3, 4]] = np.sqrt(0.5)
    found = find_duplicates(evaluation, train, embeddings=(rows, train_rows))
    assert [(pair.evaluation, pair.train) for pair in found] == [(0, 0), (1, 1), (2, 9)]
    assert [pair.by for pair in found] == [("hash", "embedding"), ("hash",), ("embedding",)]
    np.testing.assert_allclose([pair.cosine for pair in found], [1, np.sqrt(0.5), 1], atol=1e-6)
    assert found[2].hamming > Thresholds().hamming


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_embeddings_at_the_threshold_are_those_of_brute_force(train, dtype):
    """Rows of four entries ±1/2: cosines are 0, ±1/2 and ±1, so 0.5 is a tie at the threshold in hundreds of pairs."""
    random = np.random.default_rng(0)

    def rows(count):
        made = np.zeros((count, 6), dtype)
        for row in made:
            row[random.choice(6, 4, replace=False)] = random.choice([-0.5, 0.5], 4)
        return made

    first, second = rows(5), rows(IMAGES)
    scores = first.astype(np.float64) @ second.astype(np.float64).T
    evaluation = of_images([drawn(2000 + n) for n in range(5)])
    for threshold in (0.5, 0.75, 1.0):
        limits = Thresholds(cosine=threshold, listed=IMAGES)
        expected = set(zip(*(axis.tolist() for axis in np.nonzero(scores >= threshold)), strict=True))
        assert found_pairs(find_duplicates(evaluation, train, limits, (first, second))) == expected
    every = np.argwhere(scores > -2)
    np.testing.assert_allclose(cosines(first, second, every), scores.ravel(), atol=1e-12)


def test_embeddings_are_matched_by_key():
    source = of_images([drawn(n) for n in range(4)])
    source.keys = ["a", "b", "a", "c"]
    embedded = of_images([drawn(n) for n in range(3)])
    rows = embedded.rows("image")
    embedded.keys = ["c", "a", "a"]
    assert np.array_equal(rows_by_key(source, embedded), np.stack([rows[1], 0 * rows[0], rows[2], rows[0]]))
    embedded.keys = ["x", "y", "z"]
    with pytest.raises(ValueError, match="embed the same source"):
        rows_by_key(source, embedded)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hamming", 193), ("difference", 0), ("cosine", float("nan")), ("cosine", 2), ("listed", 0)],
)
def test_thresholds_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = "):
        Thresholds(**{field: value})
