"""Approximate indexes: right where their lists are, a lower bound elsewhere, and their recall is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import grid_rows, sets_with_ties

from modstruct.evaluation.retrieval import ann_index
from modstruct.evaluation.retrieval.ann_index import AnnIndex, IndexConfig, ann_pairs_ahead, ann_recall
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.rows import distinct_rows

EVERYTHING = {"ivf": {"lists": 4, "probes": 4}, "hnsw": {"search_width": 4000, "construction_width": 400}}


def similar(count, dimension, noise=1.0):
    random = np.random.default_rng(0)
    image = random.standard_normal((count, dimension))
    text = image + noise * random.standard_normal((count, dimension))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image.astype(np.float32), text.astype(np.float32), np.stack([np.arange(count)] * 2, axis=1)


@settings(max_examples=60)
@given(sets_with_ties(), st.sampled_from(["float32", "float16"]))
def test_an_inverted_file_that_looks_everywhere_is_exact(example, storage):
    """Integers are the same in float16; lists of all rows leave nothing out, ties and duplicates included."""
    found = measure_retrieval(*example, [1, 50], IndexConfig("ivf", storage, probes=10_000))
    for name, metrics in measure_retrieval(*example, [1, 50]).items():
        assert found[name] == metrics
        assert all(recall["value"] == 1 for recall in found[f"index_{name}"].values())


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_at_k_of_a_thorough_index_is_the_exact_one(kind, storage):
    image, text = grid_rows(900, 24, 0), grid_rows(900, 24, 1)
    text = np.where(np.random.default_rng(2).random(text.shape) < 0.6, image, text)
    pairs = np.stack([np.arange(900)] * 2, axis=1)
    exact = measure_retrieval(image, text, pairs)
    found = measure_retrieval(image, text, pairs, index=IndexConfig(kind, storage, **EVERYTHING[kind]))
    for direction, metrics in exact.items():
        for k in (1, 5, 10):
            assert found[direction][f"recall_at_{k}"] == metrics[f"recall_at_{k}"]
            assert found[f"index_{direction}"][f"recall_at_{k}"]["value"] > 0.999
        assert found[direction]["mean_reciprocal_rank"]["value"] <= metrics["mean_reciprocal_rank"]["value"]


@pytest.mark.parametrize(("kind", "hasty"), [("ivf", {"lists": 60, "probes": 1}), ("hnsw", {"search_width": 1})])
def test_recall_of_a_hasty_index_is_what_counting_gives(kind, hasty):
    image, text, _ = similar(2400, 24)
    made = AnnIndex(image, IndexConfig(kind, **hasty, sample=50, neighbours=4, construction_width=8))
    told = ann_recall(text[:50], made, [1, 10])
    order = np.argsort(-(text[:50] @ image.T), axis=1)
    _, found = made.search(text[:50], 10)
    for k in (1, 10):
        counted = np.mean([len(set(order[j, :k]) & set(made.first[found[j, :k]])) / k for j in range(50)])
        assert told[f"recall_at_{k}"] == {"value": pytest.approx(counted), "queries": 50}
    assert told["recall_at_10"]["value"] < 0.95


def test_an_item_that_is_not_listed_comes_last(monkeypatch):
    image, text, pairs = similar(200, 8, noise=5.0)
    monkeypatch.setattr(ann_index, "RESULTS_AT_ONCE", 40)  # several searches
    made = AnnIndex(image, IndexConfig("ivf", lists=1))
    _, ahead, _ = ann_pairs_ahead(text, made, pairs, 4)
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
        ({"kind": "flat"}, "index.kind = 'flat': one of exact, ivf, hnsw, cagra"),
        ({"storage": "int8"}, "index.storage = 'int8'"),
        ({"probes": 0}, "index.probes = 0: at least 1"),
        ({"lists": 0}, "index.lists = 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        IndexConfig(**setting)
