"""FAISS's indexes divided among GPUs, with fakes in the place of its GPU indexes: no GPU has run this yet."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from fake_gpus import pretend_cagra, pretend_gpus
from ranking_cases import grid_rows

from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.nearest import IndexConfig, RankedByLists

PAIRS = np.stack([np.arange(300)] * 2, axis=1)


@pytest.fixture
def rows():
    image, text = grid_rows(300, 12, 0), grid_rows(300, 12, 1)
    image[200:210] = image[3]  # equal rows are one item
    return image, np.where(np.random.default_rng(2).random(text.shape) < 0.7, image, text)


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("engine", ["ivf", "cagra"])
def test_an_index_on_gpus_that_looks_everywhere_gives_the_exact_recall(monkeypatch, rows, engine, gpus, storage):
    exact = measure_retrieval(*rows, PAIRS)
    made = pretend_gpus(monkeypatch, [(9, 0)] * gpus)
    pretend_cagra(monkeypatch)
    found = measure_retrieval(*rows, PAIRS, engine=engine, index=IndexConfig(storage, lists=3, probes=3))
    for direction, metrics in exact.items():
        for k in (1, 5, 10):
            assert found[direction][f"recall_at_{k}"] == metrics[f"recall_at_{k}"]
            assert found[f"index_{direction}"][f"recall_at_{k}"]["value"] == 1
    assert {tuple(index.gpus) for index in made} == {tuple(range(gpus))}  # of cagra the lists it is compared with


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("fails_at", [None, "second search"])
def test_exact_lists_of_gpus_give_the_metrics_of_counting(monkeypatch, rows, storage, fails_at):
    exact = measure_retrieval(*rows, PAIRS)
    made = pretend_gpus(monkeypatch, [(9, 0)] * 2, fails_at)
    monkeypatch.setattr("modstruct.evaluation.retrieval.nearest.RESULTS_AT_ONCE", 500)  # several searches
    assert measure_retrieval(*rows, PAIRS, engine="faiss_flat", index=IndexConfig(storage)) == exact
    assert {index.options.useFloat16 for index in made} == {storage == "float16"}
    assert [index.searches for index in made] == ([7, 7] if fails_at is None else [2, 2])


@pytest.mark.parametrize("fails_at", ["copy", "add"])
def test_an_inverted_file_that_a_gpu_has_no_memory_for_is_searched_on_the_cpu(monkeypatch, caplog, rows, fails_at):
    pretend_gpus(monkeypatch, [(9, 0)], fails_at=fails_at)
    made = RankedByLists(rows[0], "ivf", IndexConfig(lists=3, probes=3), [0])
    assert made.index.search(rows[1][:5], 4)[1].shape == (5, 4)
    assert "searching on the CPU instead" in caplog.text


def test_cagra_is_refused_by_name_where_faiss_has_none(monkeypatch, rows):
    monkeypatch.delattr(faiss, "GpuIndexCagra", raising=False)
    with pytest.raises(ValueError, match=r"retrieval.engine = 'cagra': FAISS .* without cuVS.*install faiss-gpu-cuvs"):
        measure_retrieval(*rows, PAIRS, engine="cagra")


def test_cagra_is_refused_by_name_without_a_gpu(monkeypatch, rows):
    pretend_cagra(monkeypatch)
    with pytest.raises(ValueError, match=r"retrieval.engine = 'cagra': needs a GPU"):
        measure_retrieval(*rows, PAIRS, engine="cagra")
