"""Real processes that open the same shards at once index them once, and read their own rows of the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from processes import run_on_processes

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "shards"))
from crafted_shards import LengthTokenizer, config, opened, views, write_shards

from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader

STEPS = 3


def batches(pattern: str, folder: str) -> dict[str, object]:
    """What one process reads; called on all at once, in an empty cache."""
    data = config(Path(folder))
    samples = opened(pattern, data)
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer()), BatchPlan(12, 5, 1, 1 + STEPS))
    return {"fingerprint": samples.fingerprint, "images": [batch.tensors["image"] for batch in loader]}


def test_processes_read_their_rows_of_the_same_batches(tmp_path):
    pattern = write_shards(tmp_path / "shards", [7, 9, 3])
    parts = run_on_processes(batches, 3, pattern, str(tmp_path / "shared"))
    alone = batches(pattern, str(tmp_path / "alone"))
    assert {part["fingerprint"] for part in parts} == {alone["fingerprint"]}
    for step in range(STEPS):
        assert torch.equal(torch.cat([part["images"][step] for part in parts]), alone["images"][step])
    assert len(list((tmp_path / "shared" / "cache" / "indexes").glob("*.npz"))) == 3
