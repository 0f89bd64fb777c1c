"""Lists of the nearest are those of sorting all scores, on the CPU in blocks, and on GPUs that fakes stand for."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from fake_gpus import pretend_gpus
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation.retrieval.nearest import nearest, usable_gpus

module = sys.modules[nearest.__module__]  # the function has the name of its module


def rows(count, dimension, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def sorted_scores(queries, gallery, k):
    return np.argsort(-(queries.astype(np.float64) @ gallery.astype(np.float64).T), axis=1)[:, :k]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 90), st.integers(1, 100), st.integers(1, 30), st.booleans())
def test_lists_are_those_of_sorting_all_scores_in_any_blocks(queries, items, k, block, some):
    x, gallery = rows(queries, 6), rows(items, 6, 1).astype(np.float16)
    chosen = np.random.default_rng(2).permutation(items)[: items // 2 + 1] if some else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GALLERY_BYTES", 4 * 6 * block)
        found = nearest(x, gallery, k, chosen)
    np.testing.assert_array_equal(found, sorted_scores(x, gallery if chosen is None else gallery[chosen], k))


@pytest.mark.parametrize(
    ("queries", "gallery", "message"),
    [
        (rows(2, 3), rows(2, 4), "query embeddings have dimension 3, gallery embeddings 4"),
        (rows(2, 3), np.full((2, 3), np.nan, np.float32), "gallery embeddings are not finite"),
        (np.empty((0, 3), np.float32), rows(2, 3), "at least one row"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, gallery, message):
    with pytest.raises(ValueError, match=message):
        nearest(queries, gallery, 1)


def test_a_process_searches_on_its_own_gpu(monkeypatch):
    made = pretend_gpus(monkeypatch, [(9, 0)] * 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    x, gallery = rows(10, 4), rows(20, 4, 1)
    np.testing.assert_array_equal(nearest(x, gallery, 9), sorted_scores(x, gallery, 9))
    assert [(index.gpus, index.ntotal, index.searches) for index in made] == [([2], 20, 1)]


@pytest.mark.parametrize("fails_at", ["copy", "search"])
def test_a_gpu_that_fails_leaves_the_search_to_the_cpu(monkeypatch, caplog, fails_at):
    pretend_gpus(monkeypatch, [(9, 0)], fails_at)
    x, gallery = rows(10, 4), rows(10, 4, 1)
    np.testing.assert_array_equal(nearest(x, gallery, 3), sorted_scores(x, gallery, 3))
    assert "searching on the CPU instead: out of memory" in caplog.text


def test_a_list_longer_than_a_gpu_selects_is_searched_on_the_cpu(monkeypatch):
    made = pretend_gpus(monkeypatch, [(9, 0)])
    x, gallery = rows(2, 4), rows(2100, 4, 1)
    np.testing.assert_array_equal(nearest(x, gallery, 2100)[:, :50], sorted_scores(x, gallery, 50))
    assert made[0].searches == 0


def test_only_cards_that_faiss_has_kernels_for_are_used(monkeypatch):
    """On another one it would end the process."""
    assert usable_gpus() == []
    pretend_gpus(monkeypatch, [(6, 1), (7, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
    assert usable_gpus() == [1, 2, 3]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert usable_gpus() == []
