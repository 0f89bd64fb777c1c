"""Exact metrics agree with their definitions and with FAISS, ties, blocks and files included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import faiss_items_ahead, grid_rows, items_ahead, plain_metrics, sets_with_ties

from modstruct.evaluation.retrieval import exact
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval

DIRECTIONS = ("image_to_text", "text_to_image")


def both_ways(image, text, pairs):
    return (image, text, pairs), (text, image, pairs[:, ::-1])


def assert_metrics(image, text, pairs, recall_at):
    measured = measure_retrieval(image, text, pairs, recall_at)
    for name, arguments in zip(DIRECTIONS, both_ways(image, text, pairs), strict=True):
        plain = plain_metrics(*arguments, recall_at)
        assert {metric: pair["value"] for metric, pair in measured[name].items()} == pytest.approx(plain, abs=1e-12)


@settings(max_examples=150)
@given(sets_with_ties(), st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True))
def test_metrics_agree_with_their_definitions(example, recall_at):
    assert_metrics(*example, recall_at)


@settings(max_examples=25)
@given(sets_with_ties(), st.integers(5, 30), st.integers(20, 400))
def test_blocks_of_gallery_and_pairs_change_nothing(example, block, pairs_at_once):
    whole = measure_retrieval(*example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "GALLERY_BYTES", 4 * example[0].shape[1] * block)
        patch.setattr(exact, "PAIRS_AT_ONCE", pairs_at_once)
        assert measure_retrieval(*example) == whole


@settings(max_examples=50)
@given(sets_with_ties())
def test_the_best_positive_has_the_items_ahead_that_faiss_finds(example):
    for queries, gallery, pairs in both_ways(*example):
        np.testing.assert_array_equal(items_ahead(queries, gallery, pairs), faiss_items_ahead(queries, gallery, pairs))


def test_rounded_scores_of_a_blocked_gallery_tie_as_in_a_whole_one(monkeypatch):
    """Unit rows of 300 dimensions: scores are rounded, and copies of an item must tie with it across blocks."""
    random = np.random.default_rng(0)
    image = random.standard_normal((700, 300)).astype(np.float32)
    text = image + random.standard_normal((700, 300)).astype(np.float32) * 4
    text[random.permutation(700)[:100]] = text[7]
    pairs = np.stack([np.arange(700), np.arange(700)], axis=1)
    whole = [pairs_ahead(*arguments)[1] for arguments in both_ways(image, text, pairs)]
    monkeypatch.setattr(exact, "GALLERY_BYTES", 4 * 300 * 64)
    monkeypatch.setattr(exact, "PAIRS_AT_ONCE", 50)
    for arguments, right in zip(both_ways(image, text, pairs), whole, strict=True):
        np.testing.assert_array_equal(pairs_ahead(*arguments)[1], right)
    assert (whole[0][text[:, 0] == text[7, 0]] >= 100).all()


def test_metrics_of_larger_sets_and_of_files_agree_with_their_definitions(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "GALLERY_BYTES", 4 * 32 * 128)
    image, text = grid_rows(300, 32, 0), np.repeat(grid_rows(400, 32, 1), 2, axis=0)
    random = np.random.default_rng(2)
    pairs = np.stack([random.integers(0, 300, 900), random.integers(0, 800, 900)], axis=1)
    pairs = np.concatenate([pairs, [[5, row] for row in range(200)]])  # one image with very many captions
    assert_metrics(image, text, pairs, [1, 5, 10])
    for name, array in (("image", image), ("text", text)):
        np.save(tmp_path / f"{name}.npy", array.astype(np.float16))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("image", "text")]
    assert measure_retrieval(*mapped, pairs) == measure_retrieval(image, text, pairs)


@pytest.mark.parametrize("size", [50, 257, 1500])
def test_collapsed_embeddings_get_nothing(size):
    """512 dimensions and 300 queries: there products of matrices give equal rows scores that differ in the last bit."""
    random = np.random.default_rng(size)
    text = random.normal(size=(300, 512)).astype(np.float32)
    image = np.repeat(random.normal(size=(1, 512)).astype(np.float32), size, axis=0)
    pairs = np.stack([np.arange(300) % size, np.arange(300)], axis=1)
    metrics = measure_retrieval(image, text, pairs, [1, size - 1])["text_to_image"]
    assert [metrics[name]["value"] for name in ("recall_at_1", f"recall_at_{size - 1}", "map_at_r")] == [0, 0, 0]
    assert metrics["median_rank"]["value"] == size


def test_a_duplicate_does_no_harm_where_it_is_a_positive_too():
    rows, pairs = np.eye(30, dtype=np.float32), np.stack([np.arange(30)] * 2, axis=1)
    twice = np.concatenate([rows, rows])  # each image a second time
    both = np.concatenate([pairs, pairs + np.array([30, 0])])
    recall = {f"recall_at_{k}": k for k in (1, 2)}
    found = measure_retrieval(twice, rows, both, [1, 2])["text_to_image"]
    assert [found[name]["value"] for name in recall] == [1, 1]
    found = measure_retrieval(twice, rows, pairs, [1, 2])["text_to_image"]
    assert [found[name]["value"] for name in recall] == [0, 1]


def test_minus_zero_ties_with_zero():
    image = np.array([[0.0, 1.0], [-0.0, 1.0]], dtype=np.float32)
    text = np.array([[0.0, 1.0]], dtype=np.float32)
    assert items_ahead(text, image, np.array([[0, 0]])).tolist() == [1]


def test_queries_without_a_positive_are_left_out_and_stay_in_the_gallery():
    image = np.array([[1, 0], [0, 1], [3, 0]], dtype=np.float32)
    text = np.array([[1, 0], [0, 1]], dtype=np.float32)
    metrics = measure_retrieval(image, text, np.array([[0, 0], [1, 1]]), [1])
    assert metrics["image_to_text"]["recall_at_1"] == {"value": 1.0, "chance": 0.5}
    assert metrics["text_to_image"]["recall_at_1"]["value"] == 0.5  # the image without a text is ahead of image 0
    assert metrics["text_to_image"]["recall_at_1"]["chance"] == pytest.approx(1 / 3)
    assert items_ahead(image, text, np.array([[0, 0]])).tolist() == [0, 2, 2]


def test_perfect_embeddings_get_everything_and_so_does_one_item():
    for count in (1, 30):
        pairs = np.stack([np.arange(count)] * 2, axis=1)
        for metrics in measure_retrieval(np.eye(count), np.eye(count), pairs).values():
            found = {name: metric["value"] for name, metric in metrics.items()}
            assert found == dict.fromkeys(metrics, 1.0) | {"mean_log_rank": 0.0}


@pytest.mark.parametrize(
    ("image", "pairs", "recall_at", "message"),
    [
        (
            np.full((2, 2), np.nan, np.float16),
            [[0, 0]],
            [1],
            "2 of 2 image embeddings are not finite, the first is row 0",
        ),
        (np.ones((2, 2), np.float32), np.empty((0, 2)), [1], "no image-text pair"),
        (np.ones((2, 2), np.float32), [[0, 0], [2, 0]], [1], r"pair \(2, 0\) names a row outside"),
        (np.ones((2, 2), np.float32), [[-1, 0]], [1], "outside"),
        (np.ones((2, 2), np.float32), [[0.5, 0]], [1], "pairs are float64"),
        (np.ones((2, 2), np.float32), [[0, 0]], [5, 0], "recall_at = 0"),
        (np.ones((0, 2), np.float32), [[0, 0]], [1], "at least one row"),
        (np.ones((2, 2), np.int64), [[0, 0]], [1], "image embeddings are int64"),
        (np.ones((2, 3), np.float32), [[0, 0]], [1], "image embeddings have dimension 3, text embeddings 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(image, pairs, recall_at, message):
    with pytest.raises(ValueError, match=message):
        measure_retrieval(image, np.ones((2, 2), np.float32), np.array(pairs), recall_at)
