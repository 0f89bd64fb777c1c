"""Approximate indexes divided among GPUs, with fakes in the place of FAISS's GPU indexes: no GPU has run this yet."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from fake_gpus import pretend_cagra, pretend_gpus
from ranking_cases import grid_rows

from modstruct.evaluation.retrieval.ann_index import AnnIndex, IndexConfig
from modstruct.evaluation.retrieval.measure import measure_retrieval

PAIRS = np.stack([np.arange(300)] * 2, axis=1)


@pytest.fixture
def rows():
    image, text = grid_rows(300, 12, 0), grid_rows(300, 12, 1)
    image[200:210] = image[3]  # equal rows are one item
    return image, np.where(np.random.default_rng(2).random(text.shape) < 0.7, image, text)


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("kind", ["ivf", "cagra"])
def test_an_index_on_gpus_that_looks_everywhere_gives_the_exact_recall(monkeypatch, rows, kind, gpus, storage):
    exact = measure_retrieval(*rows, PAIRS)
    made = pretend_gpus(monkeypatch, [(9, 0)] * gpus)
    pretend_cagra(monkeypatch)
    found = measure_retrieval(*rows, PAIRS, index=IndexConfig(kind, storage, lists=3, probes=3))
    for direction, metrics in exact.items():
        for k in (1, 5, 10):
            assert found[direction][f"recall_at_{k}"] == metrics[f"recall_at_{k}"]
            assert found[f"index_{direction}"][f"recall_at_{k}"]["value"] == 1
    assert made  # of ivf its parts, of both the exact lists that its recall is measured against


def test_an_inverted_file_that_a_gpu_has_no_memory_for_is_searched_on_the_cpu(monkeypatch, caplog, rows):
    pretend_gpus(monkeypatch, [(9, 0)], fails_at="add")
    made = AnnIndex(rows[0], IndexConfig("ivf", lists=3, probes=3))
    assert made.search(rows[1][:5], 4)[1].shape == (5, 4)
    assert "searching on the CPU instead" in caplog.text


def test_cagra_is_refused_by_name_where_faiss_has_none(monkeypatch, rows):
    monkeypatch.delattr(faiss, "GpuIndexCagra", raising=False)
    with pytest.raises(ValueError, match=r"index.kind = 'cagra': faiss .* without cuVS.*install faiss-gpu-cuvs"):
        measure_retrieval(*rows, PAIRS, index=IndexConfig("cagra"))


def test_cagra_is_refused_by_name_without_a_gpu(monkeypatch, rows):
    pretend_cagra(monkeypatch)
    with pytest.raises(ValueError, match=r"index.kind = 'cagra': needs a GPU"):
        measure_retrieval(*rows, PAIRS, index=IndexConfig("cagra"))
