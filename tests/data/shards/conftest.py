from __future__ import annotations

import pytest
from crafted_shards import config, opened, sample, write_tar


@pytest.fixture
def damaged(tmp_path):
    """Three shards with bad samples among the good: fewer shards than processes, no multiple of the batch."""
    for shard in range(3):
        members = []
        for number in range(shard * 10, shard * 10 + 10):
            other = {"png": b"bad"} if number % 10 == 4 else {"txt": b" "} if number % 10 == 7 else {}
            members += sample(number, **other)
        write_tar(tmp_path / f"shard-{shard}.tar", members)
    data = config(tmp_path, max_bad_share=0.5)
    return opened(tmp_path / "shard-*.tar", data), data
