"""Lists of the nearest are those of sorting all scores, on the CPU in blocks, and on GPUs that fakes stand for."""

from __future__ import annotations

import sys

import faiss
import numpy as np
import pytest
import torch
from fake_gpus import pretend_gpus
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation.retrieval.nearest import ShardedIndex, nearest, usable_gpus

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


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("gpus", [1, 2, 3, 7])
def test_a_gallery_is_divided_among_the_gpus(monkeypatch, gpus, storage):
    made = pretend_gpus(monkeypatch, [(9, 0)] * gpus)
    monkeypatch.setattr(module, "RESULTS_AT_ONCE", 12)  # several searches
    x, gallery = rows(10, 4), rows(20, 4, 1)
    found = nearest(x, gallery, 9, storage=storage, gpus=usable_gpus())
    np.testing.assert_array_equal(found, sorted_scores(x, gallery, 9))
    assert sum(index.ntotal for index in made) == 20
    assert [index.config.device for index in made] == list(range(gpus))
    assert {index.config.useFloat16 for index in made} == {storage == "float16"}
    assert max(index.ntotal for index in made) - min(index.ntotal for index in made) <= 1


def test_a_process_takes_its_own_gpu_alone_unless_it_is_given_others(monkeypatch):
    made = pretend_gpus(monkeypatch, [(9, 0)] * 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    nearest(rows(10, 4), rows(20, 4, 1), 9)
    assert [index.config.device for index in made] == [2]


@pytest.mark.parametrize("fails_at", ["add", "search", "second search"])
def test_a_gpu_that_fails_leaves_the_search_to_the_cpu(monkeypatch, caplog, fails_at):
    made = pretend_gpus(monkeypatch, [(9, 0)], fails_at)
    monkeypatch.setattr(module, "RESULTS_AT_ONCE", 12)
    x, gallery = rows(10, 4), rows(10, 4, 1)
    np.testing.assert_array_equal(nearest(x, gallery, 3), sorted_scores(x, gallery, 3))
    assert made
    assert "searching on the CPU instead: out of memory" in caplog.text


def test_only_cards_that_faiss_has_kernels_for_are_used(monkeypatch):
    """On another one it would end the process."""
    assert usable_gpus() == []
    pretend_gpus(monkeypatch, [(6, 1), (7, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
    assert usable_gpus() == [1, 2, 3]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert usable_gpus() == []


def test_parts_of_a_gallery_give_the_list_of_the_whole_one():
    """Also where an index finds fewer than requested."""
    x, gallery = rows(8, 4), rows(30, 4, 1)

    def part(_, places):
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(4), 4, 2, faiss.METRIC_INNER_PRODUCT)
        index.own_fields = False
        index.nprobe = 1 if places.start else 2
        kept.append(index.quantizer)
        index.train(gallery)
        index.add(gallery[places.start : places.stop])
        return index

    kept = []
    scores, found = ShardedIndex(30, [0, 1, 2], part).search(x, 40)
    assert (np.diff(np.where(np.isfinite(scores), scores, -1e9), axis=1) <= 0).all()
    for row, score, query in zip(found, scores, x, strict=True):
        listed = row[row >= 0]
        assert len(set(listed)) == len(listed)
        np.testing.assert_allclose(score[row >= 0], gallery[listed] @ query, rtol=1e-5)
        assert set(range(10)) <= set(listed)  # the first part looks everywhere
    assert torch.isneginf(torch.from_numpy(scores[found < 0])).all()
