"""What is needed next is read ahead, in order and in few reads; coming shards are fetched before they are needed."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
from crafted_shards import config, opened, sample, write_shards, write_tar

from modstruct.data.faults import BadSample
from modstruct.data.shards import ahead as ahead_module
from modstruct.data.shards import reader as reader_module
from modstruct.data.shards.ahead import SAMPLE_BYTES, SLOW_READS, ComingShards, PipesAhead, ReadAhead
from modstruct.data.shards.pipes import PipeCache
from modstruct.data.shards.reader import RawSample, ShardReader


def windows(step: int) -> list[int]:
    """Three shards a window of four steps."""
    return [step // 4 * 3 + shard for shard in range(3)]


def test_shards_are_seen_once_as_far_ahead_as_they_fit():
    coming = ComingShards(windows, np.full(30, 10), room_bytes=60, stop_step=40)
    assert coming.newly_seen(0) == [0, 1, 2, 3, 4, 5]
    assert [coming.newly_seen(step) for step in (1, 2, 3)] == [[], [], []]
    assert coming.needed == [0, 1, 2, 3, 4, 5]
    assert coming.newly_seen(4) == [6, 7, 8]
    assert coming.needed == [3, 4, 5, 6, 7, 8]
    assert coming.newly_seen(30) == [21, 22, 23, 24, 25, 26]  # a loader process that takes every n-th step
    assert coming.newly_seen(39) == [27, 28, 29]


def test_the_step_at_hand_is_seen_even_if_it_does_not_fit():
    coming = ComingShards(windows, np.full(30, 10), room_bytes=1, stop_step=40)
    assert coming.newly_seen(5) == [3, 4, 5]
    assert coming.newly_seen(8) == [6, 7, 8]


def test_what_is_done_with_leaves_the_cache_before_what_was_fetched_ahead(tmp_path):
    """Eight windows of three shards through a cache of six: each is fetched once, though used after it was fetched."""
    cache = PipeCache(tmp_path / "pipes", 12)
    shards = [f"pipe:echo {shard} >> {tmp_path}/log; printf {shard:02}" for shard in range(24)]
    ahead = PipesAhead(ComingShards(windows, np.full(24, 2), 12, stop_step=32), cache, shards)
    for step in range(32):
        ahead.advance(step)
        for thread in ahead._threads:
            thread.join()
        for shard in windows(step):
            os.close(cache.open(shards[shard], 2))
    fetched = (tmp_path / "log").read_text().split()
    assert sorted(map(int, fetched)) == list(range(24))


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


def test_samples_are_read_in_order_however_far_ahead(tmp_path):
    """Sound and bad samples, of one read or many, in this thread or others."""
    data = config(tmp_path, max_bad_share=0.5)
    members = [sample(n, **({"txt": b" "} if n % 7 == 3 else {})) for n in range(40)]
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [m for of_sample in members[10 * shard :][:10] for m in of_sample])
    samples = opened(tmp_path / "*.tar", data)
    os.unlink(tmp_path / "2.tar")
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 2)).reshape(8, 10)

    def told(results):
        return [one.caption if isinstance(one, RawSample) else str(one) for one in results]

    def alone(number):
        try:
            return ShardReader(samples, data).read(number)
        except BadSample as bad:
            return bad

    expected = [told(map(alone, item.tolist())) for item in order]
    assert sum("missing shard" in one for item in expected for one in item) == 20
    rooms = ((1, 0, True), (3 * SAMPLE_BYTES, 0, True), (2**20, 0, True), (2**20, SLOW_READS, True), (2**20, 0, False))
    for room_bytes, slow_reads, beyond in rooms:
        ahead = ReadAhead(ShardReader(samples, data), order.__getitem__, room_bytes, 2, 8, beyond)
        ahead._slow_reads = slow_reads
        for item in (0, 2, 4, 6, 1, 3, 3, 0):
            assert told(ahead.read(item, 10)) == expected[item], (room_bytes, item)
            assert beyond or not ahead._coming


def test_neighbours_are_fetched_by_one_read_and_several_reads_run_at_once(tmp_path, monkeypatch):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [16] * 8), data)
    order = np.random.default_rng(0).permutation(128)
    under_way, most, reads, plain = 0, 0, 0, os.pread
    full = threading.Event()

    def slow(*arguments):
        nonlocal under_way, most, reads
        under_way, reads = under_way + 1, reads + 1
        most = max(most, under_way)
        if most >= 4:
            full.set()
        full.wait(30)  # until four are under way
        under_way -= 1
        return plain(*arguments)

    ahead = ReadAhead(ShardReader(samples, data), lambda item: order[16 * item :][:16], 2**22, stride=1, stop=8)
    ahead._slow_reads = SLOW_READS
    monkeypatch.setattr(os, "pread", slow)
    captions = [one.caption for item in range(8) for one in ahead.read(item, 16)]
    assert captions == [f"thing {number}" for number in order]
    assert reads == 8, "each shard is a block"
    assert most >= 4


def test_no_more_is_held_than_the_room_allows(tmp_path):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [100]), data)
    taken = SAMPLE_BYTES + int(samples.rows["image_bytes"][0])
    ahead = ReadAhead(ShardReader(samples, data), lambda item: np.arange(100), 20 * taken, stride=1, stop=1)
    for _ in ahead.read(0, 100):
        assert len(ahead._coming) <= 20


def test_slow_reads_are_noticed(tmp_path, monkeypatch):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [60]), data)
    monkeypatch.setattr(ahead_module, "SLOW_READ_SECONDS", 0.0)
    monkeypatch.setattr(reader_module, "LARGEST_READ", 1)
    ahead = ReadAhead(ShardReader(samples, data), lambda item: np.arange(60), 2**22, stride=1, stop=1)
    assert len(list(ahead.read(0, 60))) == 60
    assert ahead._slow_reads == SLOW_READS
    assert ahead._threads._threads
