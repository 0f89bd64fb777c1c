"""FAISS's GPU indexes as the CPU's, so that what is written for GPUs runs where there is none."""

from __future__ import annotations

import faiss
import numpy as np
import torch


class FakeGpuIndex:
    """A CPU index under the name of one that is divided among GPUs, out of memory at the named step."""

    def __init__(self, index, options, gpus, fails_at):
        assert options.shard
        self._index, self.options, self.gpus, self._fails_at, self.searches = index, options, gpus, fails_at, 0

    @property
    def ntotal(self):
        return self._index.ntotal

    def add(self, rows):
        assert self._index.ntotal or not isinstance(self._index, faiss.IndexFlat), "FAISS divides a filled flat index"
        self._fail("add")
        self._index.add(rows)

    def search(self, queries, length):
        assert length <= 2048
        self.searches += 1
        self._fail("search")
        if self.searches == 2:
            self._fail("second search")
        return self._index.search(queries, length)

    def _fail(self, step):
        if self._fails_at == step:
            raise RuntimeError("out of memory")


class Settings:
    """Of one of FAISS's configurations."""


def pretend_gpus(monkeypatch, capabilities, fails_at=None) -> list[FakeGpuIndex]:
    """Pretends a GPU of each compute capability; returns the list of the indexes that will be divided among them."""
    made = []

    def divided(index, co, gpus):
        if fails_at == "copy":
            raise RuntimeError("out of memory")
        made.append(FakeGpuIndex(faiss.clone_index(index), co, gpus, fails_at))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr("modstruct.evaluation.retrieval.exact.has_kernels_for", lambda device: False)
    for name, fake in (
        ("get_num_gpus", lambda: len(capabilities)),
        ("StandardGpuResources", lambda: None),
        ("GpuMultipleClonerOptions", Settings),
        ("index_cpu_to_gpus_list", divided),
    ):
        monkeypatch.setattr(faiss, name, fake, raising=False)
    return made


class FakeCagra:
    """faiss.GpuIndexCagra as FAISS documents it, exact: filled by one call of train, searched with parameters."""

    def __init__(self, resources, dimension, metric, config):
        assert metric == faiss.METRIC_INNER_PRODUCT
        self.config, self._index = config, faiss.IndexFlatIP(dimension)

    def train(self, rows, *, numeric_type):
        assert self._index.ntotal == 0
        assert config_fits(self.config, len(rows))
        self.kind = numeric_type
        assert rows.dtype == (np.float16 if numeric_type == faiss.Float16 else np.float32)
        self._index.add(rows.astype(np.float32))

    def search(self, queries, length, *, params, numeric_type):
        assert numeric_type == self.kind
        assert params.itopk_size >= length
        return self._index.search(queries, length)


def config_fits(config, rows) -> bool:
    return 0 < config.graph_degree <= config.intermediate_graph_degree < rows


def pretend_cagra(monkeypatch) -> None:
    monkeypatch.setattr(faiss, "GpuIndexCagra", FakeCagra, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexCagraConfig", Settings, raising=False)
    monkeypatch.setattr(faiss, "SearchParametersCagra", Settings, raising=False)
