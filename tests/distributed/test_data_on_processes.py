"""Real processes that open the same shards at once index them once, and read their own rows of the same batches."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import torch
from processes import run_on_processes

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "shards"))
from crafted_shards import LengthTokenizer, config, number_of, opened, views, write_shards

from modstruct import distributed
from modstruct.config import Source
from modstruct.data.shards.index import index_file_name, index_tar
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.shards.samples import open_samples

STEPS = 3


def batches(pattern: str, folder: str) -> dict[str, object]:
    """What one process reads; called on all at once, in an empty cache."""
    data = config(Path(folder))
    samples = opened(pattern, data)
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer()), BatchPlan(12, 5, 1, 1 + STEPS))
    return {"fingerprint": samples.fingerprint, "images": [batch.tensors["image"] for batch in loader]}


def fetches(store: str, index: str, folder: str) -> dict[str, object]:
    """What one process reads of pipes in two epochs, a host of its own, and which shards it fetches meanwhile."""
    host = Path(folder) / f"host-{distributed.rank()}"
    os.environ.update(FETCHED=str(host / "fetched"), LOCAL_WORLD_SIZE="1")
    room_gib = 8.5 * Path(store, "shard-000.tar").stat().st_size / 2**30
    data = config(host, allow_pipe=True, pipe_cache_gib=room_gib, groups=4, order_version=2)
    data.shuffle_block, data.shuffle_window = 6, 2
    pattern = f"pipe:n={{000..044}}; echo $n >> $FETCHED; cat {store}/shard-$n.tar"
    samples = open_samples([Source(pattern, index=index)], data, "data.train")
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer()), BatchPlan(16, 5, 0, 2 * 270 // 16))
    numbers = [number_of(image) for batch in loader for image in batch.tensors["image"]]
    return {"numbers": numbers, "fetched": (host / "fetched").read_text().split()}


def test_each_host_fetches_its_shards_once_an_epoch(tmp_path):
    """45 shards in 4 groups: three are at a boundary of two."""
    write_shards(tmp_path / "store", [6] * 45)
    for number in range(45):
        name = f"pipe:n={number:03}; echo $n >> $FETCHED; cat {tmp_path}/store/shard-$n.tar"
        index_tar(tmp_path / f"store/shard-{number:03}.tar").save(tmp_path / "index" / index_file_name(name))
    hosts = run_on_processes(fetches, 4, str(tmp_path / "store"), str(tmp_path / "index"), str(tmp_path))
    read = Counter(number for host in hosts for number in host["numbers"])
    assert set(read) == set(range(270))
    assert set(read.values()) <= {1, 2}
    fetched = sum(len(host["fetched"]) for host in hosts)
    assert 90 <= fetched <= 1.1 * 90
    assert max(max(Counter(host["fetched"]).values()) for host in hosts) <= 2, "no shard twice in an epoch"


def test_processes_read_their_rows_of_the_same_batches(tmp_path):
    pattern = write_shards(tmp_path / "shards", [7, 9, 3])
    parts = run_on_processes(batches, 3, pattern, str(tmp_path / "shared"))
    alone = batches(pattern, str(tmp_path / "alone"))
    assert {part["fingerprint"] for part in parts} == {alone["fingerprint"]}
    for step in range(STEPS):
        assert torch.equal(torch.cat([part["images"][step] for part in parts]), alone["images"][step])
    assert len(list((tmp_path / "shared" / "cache" / "indexes").glob("*.npz"))) == 3
