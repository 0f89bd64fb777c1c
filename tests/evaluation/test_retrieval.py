"""Recall agrees with counting, ties included, and chance with what random rankings give."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation import retrieval as module
from modstruct.evaluation.retrieval import chance_of_hit, items_ahead, retrieval


def counted_recall(queries, gallery, pairs, k):
    """Recall by the definition, in float64, one query after the other."""
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    hits = []
    for query in np.unique(pairs[:, 0]):
        positive = np.zeros(len(gallery), dtype=bool)
        positive[pairs[pairs[:, 0] == query, 1]] = True
        ahead = np.sum(~positive & (scores[query] >= scores[query][positive].max()))
        hits.append(ahead < k)
    return np.mean(hits)


def counted_chance(gallery_size, pairs, k):
    k = min(k, gallery_size)
    pairs = np.unique(pairs, axis=0)
    counts = [np.sum(pairs[:, 0] == query) for query in np.unique(pairs[:, 0])]
    return np.mean([1 - comb(gallery_size - p, k) / comb(gallery_size, k) for p in counts])


def assert_agrees(image, text, pairs, recall_at):
    measured = retrieval(image, text, pairs, recall_at)
    for direction, queries, gallery, p in (
        ("image_to_text", image, text, pairs),
        ("text_to_image", text, image, pairs[:, ::-1]),
    ):
        for k in recall_at:
            figure = measured[direction][f"recall_at_{k}"]
            assert figure["value"] == pytest.approx(counted_recall(queries, gallery, p, k), abs=1e-12)
            assert figure["chance"] == pytest.approx(counted_chance(len(gallery), p, k), abs=1e-9)


@st.composite
def sets_with_ties(draw):
    """Small integer vectors: scores are exact, and many of them equal; some rows occur several times."""
    seed = draw(st.integers(0, 2**32 - 1))
    images, texts, dimension = draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.integers(1, 4))
    random = np.random.default_rng(seed)
    image = random.integers(-2, 3, (images, dimension)).astype(np.float32)
    text = random.integers(-2, 3, (texts, dimension)).astype(np.float32)
    count = draw(st.integers(1, 80))
    pairs = np.stack([random.integers(0, images, count), random.integers(0, texts, count)], axis=1)
    return image, text, pairs


@settings(max_examples=150, deadline=None)
@given(sets_with_ties(), st.lists(st.integers(1, 90), min_size=1, max_size=3, unique=True))
def test_recall_and_chance_agree_with_counting_with_ties_and_large_k(example, recall_at):
    assert_agrees(*example, recall_at)


def test_recall_agrees_with_counting_on_larger_random_sets():
    random = np.random.default_rng(1)
    image = random.integers(-3, 4, (700, 8)).astype(np.float32)
    text = np.repeat(random.integers(-3, 4, (600, 8)).astype(np.float32), 3, axis=0)  # every text three times
    pairs = np.stack([random.integers(0, 700, 2500), random.integers(0, 1800, 2500)], axis=1)
    pairs = np.concatenate([pairs, [[5, row] for row in range(400)]])  # one image with very many captions
    assert_agrees(image, text, pairs, [1, 5, 10, 650, 5000])


def test_recall_does_not_depend_on_how_many_queries_are_searched_at_once(monkeypatch):
    random = np.random.default_rng(2)
    image, text = (random.integers(-2, 3, (90, 3)).astype(np.float32) for _ in range(2))
    pairs = np.stack([random.integers(0, 90, 150), random.integers(0, 90, 150)], axis=1)
    whole = retrieval(image, text, pairs, [1, 5])
    monkeypatch.setattr(module, "RESULTS_AT_ONCE", 40)
    assert retrieval(image, text, pairs, [1, 5]) == whole


@pytest.mark.parametrize("size", [50, 257, 1500])
def test_collapsed_embeddings_get_nothing(size):
    """512 dimensions and 300 queries: there FAISS gives equal rows scores that differ in the last bit."""
    random = np.random.default_rng(size)
    text = random.normal(size=(300, 512)).astype(np.float32)
    image = np.repeat(random.normal(size=(1, 512)).astype(np.float32), size, axis=0)
    pairs = np.stack([np.arange(300) % size, np.arange(300)], axis=1)
    figures = retrieval(image, text, pairs, [1, size - 1])["text_to_image"]
    assert [figure["value"] for figure in figures.values()] == [0, 0]


def test_perfect_embeddings_get_everything_and_a_positive_duplicate_does_no_harm():
    rows = np.eye(30, dtype=np.float32)
    pairs = np.stack([np.arange(30), np.arange(30)], axis=1)
    for direction in retrieval(rows, rows, pairs, [1]).values():
        assert direction["recall_at_1"]["value"] == 1
    twice = np.concatenate([rows, rows])  # each image a second time, as another positive of the same caption
    both = np.concatenate([pairs, pairs + np.array([30, 0])])
    assert retrieval(twice, rows, both, [1])["text_to_image"]["recall_at_1"]["value"] == 1
    assert retrieval(twice, rows, pairs, [1, 2])["text_to_image"]["recall_at_1"]["value"] == 0
    assert retrieval(twice, rows, pairs, [1, 2])["text_to_image"]["recall_at_2"]["value"] == 1


def test_minus_zero_ties_with_zero():
    image = np.array([[0.0, 1.0], [-0.0, 1.0]], dtype=np.float32)
    text = np.array([[0.0, 1.0]], dtype=np.float32)
    assert retrieval(image, text, np.array([[0, 0]]), [1])["text_to_image"]["recall_at_1"]["value"] == 0


def test_queries_without_a_positive_are_left_out_and_stay_in_the_gallery():
    image = np.array([[1, 0], [0, 1], [3, 0]], dtype=np.float32)
    text = np.array([[1, 0], [0, 1]], dtype=np.float32)
    figures = retrieval(image, text, np.array([[0, 0], [1, 1]]), [1])
    assert figures["image_to_text"]["recall_at_1"] == {"value": 1.0, "chance": 0.5}
    assert figures["text_to_image"]["recall_at_1"]["value"] == 0.5  # the image without a text is ahead of image 0
    assert figures["text_to_image"]["recall_at_1"]["chance"] == pytest.approx(1 / 3)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chance_is_the_exact_hypergeometric_figure(data):
    size = data.draw(st.integers(1, 300))
    positives = np.array(data.draw(st.lists(st.integers(1, size), min_size=1, max_size=20)))
    k = data.draw(st.integers(1, size))
    exact = [1 - comb(size - int(p), k) / comb(size, k) for p in positives]
    np.testing.assert_allclose(chance_of_hit(positives, size, k), exact, atol=1e-12)


def test_random_embeddings_score_near_chance():
    random = np.random.default_rng(3)
    image, text = (random.normal(size=(2000, 16)).astype(np.float32) for _ in range(2))
    pairs = np.stack([np.arange(2000), np.arange(2000)], axis=1)
    for direction in retrieval(image, text, pairs, [100]).values():
        assert direction["recall_at_100"]["value"] == pytest.approx(0.05, abs=0.025)  # 5 standard deviations


def test_items_ahead_are_exact_below_k():
    random = np.random.default_rng(4)
    queries, gallery = (random.integers(-2, 3, (40, 3)).astype(np.float32) for _ in range(2))
    pairs = np.stack([np.arange(40), random.integers(0, 40, 40)], axis=1)
    scores = queries @ gallery.T
    truth = np.array([np.sum(scores[q] >= scores[q, p]) - 1 for q, p in pairs])
    ahead = items_ahead(queries, gallery, pairs, 7)
    np.testing.assert_array_equal(ahead[truth < 7], truth[truth < 7])
    assert (ahead[truth >= 7] >= 7).all()


@pytest.mark.parametrize(
    ("image", "pairs", "message"),
    [
        (np.full((2, 2), np.nan, np.float32), [[0, 0]], "not finite"),
        (np.ones((2, 2), np.float32), np.empty((0, 2)), "no image-text pair"),
        (np.ones((2, 2), np.float32), [[2, 0]], "outside"),
        (np.ones((2, 2), np.float32), [[-1, 0]], "outside"),
        (np.ones((0, 2), np.float32), [[0, 0]], "at least one row"),
        (np.ones((2, 3), np.float32), [[0, 0]], "dimension"),
    ],
)
def test_what_cannot_be_measured_is_refused(image, pairs, message):
    with pytest.raises(ValueError, match=message):
        retrieval(image, np.ones((2, 2), np.float32), np.array(pairs), [1])


class GpuIndex:
    """FAISS's index on a GPU that runs out of memory at the named step."""

    def __init__(self, fails_at):
        self.fails_at = fails_at
        self.searches = 0

    def add(self, rows):
        if self.fails_at == "add":
            raise RuntimeError("out of memory")
        self.rows = rows

    def search(self, queries, length):
        self.searches += 1
        if self.fails_at == "search" or (self.fails_at == "second search" and self.searches == 2):
            raise RuntimeError("out of memory")
        scores = queries @ self.rows.T
        order = np.argsort(-scores, axis=1)[:, :length]
        return np.take_along_axis(scores, order, axis=1), order


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU: gpu(capability, fails_at) -> the list of the indexes made on it."""
    import faiss
    import torch

    def pretend(capability, fails_at=None):
        made = []

        def to_gpu(*_):
            made.append(GpuIndex(fails_at))
            return made[-1]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
        monkeypatch.setattr(module, "RESULTS_AT_ONCE", 12)  # several searches a query set
        return made

    return pretend


def recall_of_ten():
    random = np.random.default_rng(5)
    image, text = (random.standard_normal((10, 4)).astype(np.float32) for _ in range(2))
    return retrieval(image, text, np.stack([np.arange(10)] * 2, axis=1), [1, 3])


@pytest.mark.parametrize("fails_at", ["add", "search", "second search"])
def test_a_gpu_that_fails_leaves_the_search_to_the_cpu(gpu, caplog, fails_at):
    expected = recall_of_ten()
    made = gpu((9, 0), fails_at)
    assert recall_of_ten() == expected
    assert made
    assert "searching on the CPU instead: out of memory" in caplog.text


@pytest.mark.parametrize(
    ("capability", "used"),
    [((6, 1), False), ((7, 0), True), ((8, 6), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)],
)
def test_only_cards_that_faiss_has_kernels_for_are_used(gpu, capability, used):
    """On another one it would end the process."""
    expected = recall_of_ten()
    made = gpu(capability)
    assert recall_of_ten() == expected
    assert bool(made) == used
