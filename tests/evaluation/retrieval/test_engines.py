"""FAISS's exact lists give the ranks of counting; approximate ones a lower bound, and their recall is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import grid_rows, sets_with_ties

from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries
from modstruct.evaluation.retrieval.nearest import FaissIndex, IndexConfig, RankedByLists
from modstruct.evaluation.retrieval.rows import distinct_rows

MODULE = "modstruct.evaluation.retrieval.nearest"
EVERYTHING = {"ivf": {"lists": 4, "probes": 4}, "hnsw": {"search_width": 4000, "construction_width": 400}}


def similar(count, dimension, noise=1.0):
    random = np.random.default_rng(0)
    image = random.standard_normal((count, dimension))
    text = image + noise * random.standard_normal((count, dimension))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image.astype(np.float32), text.astype(np.float32), np.stack([np.arange(count)] * 2, axis=1)


def assert_same_ranks(queries, gallery, pairs, longest_k):
    listed = RankedByLists(gallery, "faiss_flat", IndexConfig(), [])
    found = ranked_queries(*listed.pairs_ahead(queries, pairs, longest_k), len(gallery))
    right = ranked_queries(*pairs_ahead(queries, gallery, pairs), len(gallery))
    for name in ("query", "positives", "rank", "average_precision_at_r", "tied"):
        np.testing.assert_array_equal(getattr(found, name), getattr(right, name), name)


@settings(max_examples=150)
@given(sets_with_ties(), st.integers(1, 50), st.integers(2, 30))
def test_exact_lists_give_the_ranks_of_counting_ties_included(example, longest_k, block):
    image, text, pairs = example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{MODULE}.GALLERY_BYTES", 4 * image.shape[1] * block)
        patch.setattr(f"{MODULE}.RESULTS_AT_ONCE", 100)
        assert_same_ranks(image, text, pairs, longest_k)
        assert_same_ranks(text, image, pairs[:, ::-1], longest_k)


@pytest.mark.parametrize("noise", [0.5, 4.0, 30.0])  # most positives in the lists, some, hardly any
@pytest.mark.parametrize("captions", [1, 3])
def test_exact_lists_give_the_ranks_of_counting_on_random_rows(captions, noise):
    image, text, _ = similar(600, 24, noise)
    text[500:550] = text[3]  # captions of equal text
    pairs = np.stack([np.arange(600) // captions, np.arange(600)], axis=1)
    assert_same_ranks(text, image, pairs[:, ::-1], 10)
    assert_same_ranks(image, text, pairs, 10)


def test_all_metrics_by_exact_lists_are_those_of_counting():
    image, text = grid_rows(900, 24, 0), grid_rows(900, 24, 1)
    text = np.where(np.random.default_rng(2).random(text.shape) < 0.6, image, text)
    pairs = np.stack([np.arange(900)] * 2, axis=1)
    assert measure_retrieval(image, text, pairs, engine="faiss_flat") == measure_retrieval(image, text, pairs)


@pytest.mark.parametrize("size", [50, 257, 1500])
def test_collapsed_embeddings_get_nothing_by_lists_either(size):
    random = np.random.default_rng(size)
    text = random.normal(size=(300, 512)).astype(np.float32)
    image = np.repeat(random.normal(size=(1, 512)).astype(np.float32), size, axis=0)
    pairs = np.stack([np.arange(300) % size, np.arange(300)], axis=1)
    metrics = measure_retrieval(image, text, pairs, [1, size - 1], "faiss_flat")["text_to_image"]
    assert [metrics[name]["value"] for name in ("recall_at_1", f"recall_at_{size - 1}", "map_at_r")] == [0, 0, 0]


@settings(max_examples=60)
@given(sets_with_ties(), st.sampled_from(["float32", "float16"]))
def test_an_inverted_file_that_looks_everywhere_is_exact(example, storage):
    """Integers are the same in float16; lists of all rows leave nothing out, ties and duplicates included."""
    found = measure_retrieval(*example, [1, 50], "ivf", IndexConfig(storage, probes=10_000))
    for name, metrics in measure_retrieval(*example, [1, 50]).items():
        assert found[name] == metrics
        assert all(recall["value"] == 1 for recall in found[f"index_{name}"].values())


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("engine", ["ivf", "hnsw"])
def test_recall_at_k_of_a_thorough_index_is_the_exact_one(engine, storage):
    image, text = grid_rows(900, 24, 0), grid_rows(900, 24, 1)
    text = np.where(np.random.default_rng(2).random(text.shape) < 0.6, image, text)
    pairs = np.stack([np.arange(900)] * 2, axis=1)
    exact = measure_retrieval(image, text, pairs)
    found = measure_retrieval(image, text, pairs, engine=engine, index=IndexConfig(storage, **EVERYTHING[engine]))
    for direction, metrics in exact.items():
        for k in (1, 5, 10):
            assert found[direction][f"recall_at_{k}"] == metrics[f"recall_at_{k}"]
            assert found[f"index_{direction}"][f"recall_at_{k}"]["value"] > 0.999
        assert found[direction]["mean_reciprocal_rank"]["value"] <= metrics["mean_reciprocal_rank"]["value"]


@pytest.mark.parametrize(("engine", "hasty"), [("ivf", {"lists": 60, "probes": 1}), ("hnsw", {"search_width": 1})])
def test_recall_of_a_hasty_index_is_what_counting_gives(engine, hasty):
    image, text, _ = similar(2400, 24)
    settings = IndexConfig(**hasty, sample=50, neighbours=4, construction_width=8)
    listed = RankedByLists(image, engine, settings, [])
    told = listed.recall(text[:50], [1, 10])
    order = np.argsort(-(text[:50] @ image.T), axis=1)
    _, found = listed.index.search(text[:50], 10)
    for k in (1, 10):
        counted = np.mean([len(set(order[j, :k]) & set(listed.first[found[j, :k]])) / k for j in range(50)])
        assert told[f"recall_at_{k}"] == {"value": pytest.approx(counted), "queries": 50}
    assert told["recall_at_10"]["value"] < 0.95


def test_an_item_that_an_approximate_index_does_not_list_comes_last(monkeypatch):
    image, text, pairs = similar(200, 8, noise=5.0)
    monkeypatch.setattr(f"{MODULE}.RESULTS_AT_ONCE", 40)  # several searches
    _, ahead, _ = RankedByLists(image, "ivf", IndexConfig(lists=1), []).pairs_ahead(text, pairs, 4)
    scores = text @ image.T
    truth = (scores >= np.diag(scores)[:, None]).sum(1) - 1
    np.testing.assert_array_equal(ahead, np.where(truth < 5, truth, 199))


def test_distinct_rows_are_those_that_differ():
    rows = np.array([[1, 0.0], [2, 1], [1, -0.0], [2, 1], [0, 5]], np.float32)
    first, place, occurrences = distinct_rows(rows)
    assert (first.tolist(), place.tolist(), occurrences.tolist()) == ([0, 1, 4], [0, 1, 0, 1, 2], [2, 2, 1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"storage": "int8"}, "index.storage = 'int8'"),
        ({"probes": 0}, "index.probes = 0: at least 1"),
        ({"lists": 0}, "index.lists = 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        IndexConfig(**setting)


def test_an_engine_that_is_none_is_refused():
    rows = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"retrieval.engine = 'flat': one of exact, faiss_flat, ivf, hnsw, cagra"):
        measure_retrieval(rows, rows, np.array([[0, 0]]), engine="flat")


def test_places_of_an_index_are_those_of_its_chosen_rows():
    gallery = grid_rows(40, 8, 0)
    chosen = np.array([5, 30, 2, 17])
    _, found = FaissIndex(gallery, chosen, "hnsw", IndexConfig(), []).search(gallery[chosen], 1)
    assert found[:, 0].tolist() == [0, 1, 2, 3]
