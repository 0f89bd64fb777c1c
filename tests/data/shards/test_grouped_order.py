"""The order in groups: every sample once an epoch, a function of the slot alone, each group with shards of its own."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.config import DataConfig
from modstruct.data.shards.grouped_order import NEAR_SUBSTITUTES, GroupedOrder, permuted, require_groups

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
QUICK = settings(max_examples=60, deadline=None)


def grouped(sizes, groups, rows, seed=7, block=4, window=3, sources=None, weights=None) -> GroupedOrder:
    """rows: of a group in a step. sources: the number of shards of each."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    source_starts = np.concatenate([[0], np.cumsum(sources or [len(sizes)])])
    return GroupedOrder(starts, source_starts, seed, block, window, weights, groups, groups * rows)


def group_of(slots: np.ndarray, groups: int, rows: int) -> np.ndarray:
    return slots % (groups * rows) // rows


@QUICK
@given(SHARDS, st.integers(1, 7), st.integers(1, 9), st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**70))
def test_each_sample_comes_once_in_each_epoch(sizes, groups, rows, block, window, seed):
    order = grouped(sizes, groups, rows, seed, block, window)
    total, batch = sum(sizes), groups * rows
    assert order.epoch_samples == total
    steps = -(-3 * total // batch) + 1  # the last rows of an epoch of one group may come a step later than another's
    epochs, samples = order.locate(np.arange(steps * batch))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(samples[epochs == epoch]), np.arange(total))
    begun = -(-total // batch) * batch
    assert (epochs[: begun - batch] == 0).all(), "all groups end an epoch in the same step, or the one after"
    assert (epochs[begun + batch : 2 * total // batch * batch - batch] == 1).all()


@QUICK
@given(SHARDS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 50), st.data())
def test_a_slot_alone_decides_its_sample(sizes, groups, rows, block, data):
    order = grouped(sizes, groups, rows, block=block)
    slots = np.array(data.draw(st.lists(st.integers(0, 5 * sum(sizes)), min_size=1, max_size=30)))
    together = np.stack(order.locate(slots))
    fresh = pickle.loads(pickle.dumps(order))
    one_by_one = np.concatenate([np.stack(fresh.locate(np.array([slot]))) for slot in slots], axis=1)
    np.testing.assert_array_equal(together, one_by_one)


def test_the_order_is_the_recorded_one():
    """Checkpoints are resumed by it: it never changes."""
    orders = [
        grouped([50, 7, 0, 31, 12], 4, 3),
        grouped([50, 7, 0, 31, 12], 1, 5, seed=2**70, block=64),
        grouped([50, 7, 0, 31, 12], 2, 3, sources=[4, 1], weights=[3, 1]),
    ]
    found = [np.stack(order.locate(np.arange(1000))).tobytes() for order in orders]
    assert [hashlib.sha256(order).hexdigest()[:16] for order in found] == [
        "a92c3ad4d7ec0e4d",
        "0da98cc754eafe94",
        "2c02619470365c76",
    ]


@pytest.mark.parametrize("block", [4, 50])
def test_each_group_reads_its_own_shards(block):
    """10 shards a group, and one more where the run of a group begins within a shard."""
    groups, rows = 8, 16
    order = grouped([50] * 80, groups, rows, block=block)
    slots = np.arange(4000 // 128 * 128)
    _, samples = order.locate(slots)
    of_group = [set((samples[group_of(slots, groups, rows) == group] // 50).tolist()) for group in range(groups)]
    assert sum(len(shards) for shards in of_group) <= 80 + groups - 1
    _, later = order.locate(slots + 2 * 4096)
    again = set((later[group_of(slots, groups, rows) == 0] // 50).tolist())
    assert len(again & of_group[0]) < 6, "another epoch gives a group other shards"


def test_blocks_of_whole_shards_are_read_in_turn():
    order = grouped([50] * 80, 2, 16, block=50, window=4)
    slots = np.arange(4000 // 32 * 32)
    _, samples = order.locate(slots)
    for group in range(2):
        shards = samples[group_of(slots, 2, 16) == group] // 50
        for first in range(0, len(shards), 200):
            assert len(np.unique(shards[first : first + 200])) <= 5
        visits = [np.ptp(np.flatnonzero(shards == shard)) for shard in np.unique(shards)]
        assert max(visits) < 2 * 200


def test_a_batch_mixes_the_shards_of_a_window():
    _, samples = grouped([640] * 100, 4, 64, block=64, window=128).locate(np.arange(256))
    assert len(np.unique(samples // 640)) > 50
    assert abs(np.corrcoef(np.arange(64), samples[:64])[0, 1]) < 0.4


def test_another_epoch_and_another_seed_give_another_order():
    def first_epochs(seed):
        _, samples = grouped([100] * 10, 2, 5, seed).locate(np.arange(2000))
        return samples[:1000], samples[1000:]

    (a, b), (c, _) = first_epochs(0), first_epochs(1)
    for one, other in ((a, b), (a, c), (a, np.arange(1000))):
        assert (one == other).mean() < 0.05


@pytest.mark.parametrize("weights", [[3, 1], [0.7, 0.2, 0.1]])
def test_weights_give_exact_shares_in_every_group(weights):
    groups, rows, sources = 4, 10, len(weights)
    order = grouped([30, 27] * sources, groups, rows, sources=[2] * sources, weights=weights)
    slots = np.arange(groups * 10_000)
    epochs, samples = order.locate(slots)
    exact = np.array(weights) / sum(weights) * 10_000
    for group in range(groups):
        counts = np.bincount(samples[group_of(slots, groups, rows) == group] // 57, minlength=sources)
        assert (np.abs(counts - exact) < 1).all()
    for source in range(sources):  # each has epochs of its own, of which every sample comes once
        mine = samples // 57 == source
        for epoch in range(1, 5):
            np.testing.assert_array_equal(np.sort(samples[mine & (epochs == epoch)]), 57 * source + np.arange(57))
    by_batch = [np.bincount(batch // 57, minlength=sources) for batch in samples.reshape(-1, groups * rows)]
    assert np.std(by_batch, axis=0).max() < 4, "groups follow the pattern from different places"


def test_first_substitutes_come_from_the_shards_at_hand_and_later_ones_from_all():
    order = grouped([50] * 80, 4, 16, block=50, window=2)
    slots = np.arange(64, 128)
    _, samples = order.locate(np.arange(6 * 64))  # most of a window of each group
    at_hand = set((samples // 50).tolist())
    near = {order.substitute(int(slot), attempt)[1] // 50 for slot in slots for attempt in (1, NEAR_SUBSTITUTES)}
    assert near <= at_hand
    far = {order.substitute(int(slot), NEAR_SUBSTITUTES + 1)[1] // 50 for slot in slots}
    assert len(far - at_hand) > 10


@QUICK
@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_places_are_permuted(size, word):
    found = permuted(np.arange(size), size, word)
    np.testing.assert_array_equal(np.sort(found), np.arange(size))
    assert found[size // 2] == permuted(np.array([size // 2]), size, word)[0]


def test_permuted_places_look_drawn():
    size = 1000
    drawn = np.stack([permuted(np.arange(size), size, word) for word in range(200)])
    assert (drawn == np.arange(size)).sum() < 300, "200 are expected to stay"
    assert 0 < (np.diff(drawn, axis=1) == 1).sum() < 300, "200 neighbours are expected to stay so"
    counts = np.bincount(drawn[:, :100].ravel() // 100, minlength=10)  # where the first hundred go
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi squared, 9 degrees of freedom


def test_a_billion_samples_cost_little():
    starts = np.arange(0, 10**9 + 1, 1000)
    order = GroupedOrder(starts, np.array([0, len(starts) - 1]), 0, 64, 1024, None, 64, 64 * 512)
    _, samples = order.locate(np.concatenate([np.arange(512), 10**9 + np.arange(512)]))
    assert len(np.unique(samples)) > 1000
    (pool,) = order._pools
    assert sum(run.shards.nbytes + run.ends.nbytes for run in pool._runs.values()) < 64 * 2 * 8 * 10**6 / 64


def test_groups_that_nothing_can_share_are_refused():
    with pytest.raises(ValueError, match=r"^train\.global_batch = 10: .*multiple of data\.groups = 4, such as 8"):
        GroupedOrder(np.array([0, 9]), np.array([0, 1]), 0, 4, 3, None, 4, 10)
    with pytest.raises(ValueError, match=r"^data\.groups = 6: 4 processes cannot take whole groups each"):
        require_groups(6, 12, 4)
    require_groups(1, 12, 5)  # rows of one group go to any number of processes
    with pytest.raises(ValueError, match=r"^data\.groups = 2: more than 1 needs data\.order_version: 2"):
        DataConfig(groups=2)
