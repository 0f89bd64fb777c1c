"""Coming shards are known as far ahead as they fit, and fetched before they are needed, each once."""

from __future__ import annotations

import time

import numpy as np

from modstruct.data.shards.ahead import ComingShards, PipesAhead
from modstruct.data.shards.pipes import PipeCache


def windows(step: int) -> list[int]:
    """Three shards a window of four steps."""
    return [step // 4 * 3 + shard for shard in range(3)]


def test_shards_are_seen_once_as_far_ahead_as_they_fit():
    coming = ComingShards(windows, np.full(30, 10), room_bytes=60, stop_step=40)
    assert coming.newly_seen(0) == [0, 1, 2, 3, 4, 5]
    assert [coming.newly_seen(step) for step in (1, 2, 3)] == [[], [], []]
    assert 0 in coming
    assert coming.newly_seen(4) == [6, 7, 8]
    assert 0 not in coming
    assert coming.newly_seen(30) == [21, 22, 23, 24, 25, 26]  # a loader process that takes every n-th step
    assert coming.newly_seen(39) == [27, 28, 29]


def test_the_step_at_hand_is_seen_even_if_it_does_not_fit():
    coming = ComingShards(windows, np.full(30, 10), room_bytes=1, stop_step=40)
    assert coming.newly_seen(5) == [3, 4, 5]
    assert coming.newly_seen(8) == [6, 7, 8]


def test_pipes_are_fetched_before_they_are_needed(tmp_path):
    cache = PipeCache(tmp_path / "pipes", 10**6)
    shards = [f"pipe:echo {shard} >> {tmp_path}/log; printf {shard:02}" for shard in range(6)]
    shards[1] = f"pipe:echo 1 >> {tmp_path}/log; printf wrong"
    ahead = PipesAhead(ComingShards(windows, np.full(6, 2), 10, stop_step=8), cache, shards)
    ahead.advance(0)
    end = time.monotonic() + 60
    while not all(cache.path(shards[shard]).exists() for shard in (0, 2, 3, 4)):
        assert time.monotonic() < end
        time.sleep(0.01)
    ahead.advance(4)
    while not cache.path(shards[5]).exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    with open(cache.open(shards[4], 2), "rb") as file:
        assert file.read() == b"04"
    fetched = [line for line in (tmp_path / "log").read_text().split() if line != "1"]
    assert sorted(fetched) == ["0", "2", "3", "4", "5"]
