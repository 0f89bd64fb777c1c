"""The searches find what brute force finds, ties at the threshold included, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation.leakage import duplicates, perceptual_hash
from modstruct.evaluation.leakage.duplicates import Pairs, near_embeddings
from modstruct.evaluation.leakage.perceptual_hash import least_distances, near_hashes


def crowded(count: int, views: int, random: np.random.Generator) -> np.ndarray:
    """Hashes near to few centres, so that there are many pairs and ties at any distance."""
    centres = random.integers(0, 2**63, (3, 1), dtype=np.uint64)
    flips = np.zeros((count, views), dtype=np.uint64)
    for _ in range(6):
        flips ^= np.uint64(1) << random.integers(0, 64, (count, views)).astype(np.uint64)
    return centres[random.integers(0, 3, count)] ^ flips


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 14), st.integers(1, 30), st.integers(1, 60))
@settings(max_examples=40)
def test_hashes_within_a_distance_are_those_of_brute_force(seed, views, distance, queries, gallery):
    random = np.random.default_rng(seed)
    first, second = crowded(queries, views, random), crowded(gallery, views, random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual_hash, "QUERIES_AT_ONCE", 7)
        patch.setattr(perceptual_hash, "GALLERY_AT_ONCE", 11)
        blocks = list(near_hashes(first, second, distance))
    found = {}
    for query, item, near, view in (pair for block in blocks for pair in zip(*block, strict=True)):
        assert (query, item) not in found
        found[query, item] = near
        a, b = divmod(int(view), views)
        assert 0 in (a, b)
        assert int(first[query, a] ^ second[item, b]).bit_count() == near
    expected = {}
    for query in range(queries):
        for item in range(gallery):
            ways = [(0, v) for v in range(views)] + [(v, 0) for v in range(views)]
            least = min(int(first[query, a] ^ second[item, b]).bit_count() for a, b in ways)
            if least <= distance:
                expected[query, item] = least
    assert found == expected


def test_least_distances_agree_with_the_search():
    random = np.random.default_rng(4)
    first, second = crowded(20, 3, random), crowded(20, 3, random)
    ((query, item, near, _),) = near_hashes(first, second, 64)
    assert len(query) == 400
    assert np.array_equal(least_distances(first[query], second[item])[0], near)


@pytest.mark.parametrize("distance", [-1, 65])
def test_a_distance_that_no_hashes_have_is_refused(distance):
    with pytest.raises(ValueError, match=f"hamming = {distance}"):
        list(near_hashes(np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.uint64), distance))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_embeddings_of_high_cosine_are_those_of_brute_force(monkeypatch, dtype):
    """Rows of four entries ±1/2: cosines are 0, ±1/2 and ±1, so 0.5 is a tie at the threshold in thousands of pairs."""
    random = np.random.default_rng(0)

    def rows(count):
        made = np.zeros((count, 6), dtype)
        for row in made:
            row[random.choice(6, 4, replace=False)] = random.choice([-0.5, 0.5], 4)
        return made

    monkeypatch.setattr(duplicates, "QUERIES_AT_ONCE", 16)
    first, second = rows(50), rows(90)
    scores = first.astype(np.float64) @ second.astype(np.float64).T
    for threshold in (0.5, 0.75, 1.0):
        found = near_embeddings(first, second, threshold, keep=90)
        assert set(zip(found.query, found.item, strict=True)) == set(zip(*np.nonzero(scores >= threshold), strict=True))
        few = near_embeddings(first, second, threshold, keep=3)
        for query in range(50):
            ranked = sorted((-scores[query, item], item) for item in np.flatnonzero(scores[query] >= threshold))[:3]
            assert few.item[few.query == query].tolist() == [item for _, item in ranked]


def test_rows_in_float16_are_near_to_themselves():
    rows = np.random.default_rng(1).standard_normal((300, 64))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    found = near_embeddings(rows, rows, 1.0, keep=5)
    assert np.array_equal(found.query, np.arange(300))
    assert np.array_equal(found.item, np.arange(300))


def test_embeddings_that_cannot_be_compared_are_refused():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"cosine = 1.5"):
        near_embeddings(rows, rows, 1.5, keep=1)
    with pytest.raises(ValueError, match="dimension 3, training embeddings 2"):
        near_embeddings(rows, rows[:, :2], 0.9, keep=1)
    with pytest.raises(ValueError, match="not finite"):
        near_embeddings(rows, rows * np.nan, 0.9, keep=1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_the_best_pairs_of_blocks_are_the_best_of_all(seed, keep):
    random = np.random.default_rng(seed)
    query, score = random.integers(0, 5, 40), random.integers(0, 4, 40).astype(float)
    best = Pairs.none()
    for part in np.array_split(np.arange(40), 6):
        best = best.and_best(Pairs(query[part], part, score[part]), keep)
    for number in range(5):
        mine = sorted((score[item], item) for item in np.flatnonzero(query == number))[:keep]
        assert best.item[best.query == number].tolist() == [item for _, item in mine]
