"""The order of data: a permutation in every epoch, a function of the slot alone, shares exact."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.data.shards.grouped_order import GroupedOrder
from modstruct.data.shards.order import SampleOrder

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(SHARDS, st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**70), st.integers(1, 3))
def test_each_sample_comes_once_in_each_epoch(sizes, block, window, seed, sources):
    parts = [np.array(sizes[start::sources], dtype=np.int64) for start in range(sources)]
    order = SampleOrder(parts, seed, block, window)
    total = sum(sizes)
    assert order.epoch_samples == total
    epoch, sample = order.locate(np.arange(3 * total))
    np.testing.assert_array_equal(epoch, np.repeat([0, 1, 2], total))
    for one in range(3):
        np.testing.assert_array_equal(np.sort(sample[epoch == one]), np.arange(total))


@QUICK
@given(SHARDS, st.integers(1, 50), st.integers(1, 6), st.data())
def test_a_slot_alone_decides_its_sample(sizes, block, window, data):
    order = SampleOrder([np.array(sizes)], 7, block, window)
    slots = np.array(data.draw(st.lists(st.integers(0, 5 * sum(sizes)), min_size=1, max_size=30)))
    together = np.stack(order.locate(slots))
    fresh = pickle.loads(pickle.dumps(order))
    one_by_one = np.concatenate([np.stack(fresh.locate(np.array([slot]))) for slot in slots], axis=1)
    np.testing.assert_array_equal(together, one_by_one)


@QUICK
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9))
def test_a_window_reads_from_no_more_blocks_than_it_holds(shards, block, window):
    order = SampleOrder([np.full(shards, 20)], 1, block, window)
    _, sample = order.locate(np.arange(20 * shards))
    blocks_a_shard = -(-20 // block)
    blocks = sample // 20 * blocks_a_shard + sample % 20 // block
    visits = [np.flatnonzero(blocks == one) for one in np.unique(blocks)]
    assert max(np.ptp(visit) for visit in visits) < window * block


@pytest.mark.parametrize(
    ("sizes", "options", "digest"),
    [
        ([[50, 7, 0, 31], [12]], {"seed": 5, "block": 8, "window": 4}, "7757873f173e3e1177f42e2e191e522a"),
        (
            [[50, 7, 0, 31], [12]],
            {"seed": 5, "block": 8, "window": 4, "weights": [3, 1]},
            "ab8365f4142f96d9245ebcec5bd79f44",
        ),
        ([[40, 33, 9]], {"seed": 2**70, "block": 64, "window": 2}, "10f91959abde89387c87cd0d77bb5116"),
    ],
)
def test_the_order_is_the_recorded_one(sizes, options, digest):
    """Checkpoints are resumed by it: it never changes."""
    epochs, samples = SampleOrder([np.array(source) for source in sizes], **options).locate(np.arange(1000))
    assert hashlib.sha256(epochs.tobytes() + samples.tobytes()).hexdigest()[:32] == digest


def test_another_epoch_and_another_seed_give_another_order():
    def first_epochs(seed):
        _, sample = SampleOrder([np.full(10, 100)], seed, 8, 16).locate(np.arange(2000))
        return sample[:1000], sample[1000:]

    (a, b), (c, _) = first_epochs(0), first_epochs(1)
    for one, other in ((a, b), (a, c), (a, np.arange(1000))):
        assert (one == other).mean() < 0.05


def test_each_epoch_puts_other_blocks_into_a_window():
    _, sample = SampleOrder([np.full(10, 100)], 0, 10, 5).locate(np.arange(2000))
    first, second = set(sample[:50]), set(sample[1000:1050])
    assert len(first & second) < 25


def test_a_batch_mixes_the_shards():
    _, sample = SampleOrder([np.full(100, 640)], 0, 64, 256).locate(np.arange(256))
    assert len(np.unique(sample // 640)) > 50
    assert np.corrcoef(np.arange(256), sample)[0, 1] < 0.3


@pytest.mark.parametrize("weights", [[3, 1], [0.7, 0.2, 0.1], [1, 1, 1], [1e-3, 1]])
def test_weights_give_exact_shares_of_every_period(weights):
    order = SampleOrder([np.array([50, 7])] * len(weights), 5, 8, 4, weights=weights)
    for start in (0, 10_000, 70_000):
        _, sample = order.locate(np.arange(start, start + 10_000))
        exact = np.array(weights) / sum(weights) * 10_000
        counts = np.bincount(sample // 57, minlength=len(weights))
        assert counts.sum() == 10_000
        assert (np.abs(counts - exact) < 1).all()


def test_what_rounding_leaves_goes_to_the_largest_remainder():
    _, sample = SampleOrder([np.array([9])] * 2, 5, 8, 4, weights=[1, 2]).locate(np.arange(10_000))
    assert np.bincount(sample // 9).tolist() == [3333, 6667]


def test_each_weighted_source_has_epochs_of_its_own():
    sizes = [np.array([30, 12]), np.array([5])]
    order = SampleOrder(sizes, 2, 4, 3, weights=[1, 3])
    epoch, sample = order.locate(np.arange(20_000))
    for start, size in ((0, 42), (42, 5)):
        mine = (sample >= start) & (sample < start + size)
        np.testing.assert_array_equal(epoch[mine], np.arange(mine.sum()) // size)
        for turn in range(3):
            np.testing.assert_array_equal(np.sort(sample[mine & (epoch == turn)]), np.arange(start, start + size))


def test_weighted_sources_are_spread_over_the_slots():
    _, sample = SampleOrder([np.array([100])] * 2, 0, 4, 4, weights=[1, 1]).locate(np.arange(2000))
    shares = (sample // 100).reshape(-1, 200).mean(axis=1)
    assert shares.min() > 0.3
    assert shares.max() < 0.7


def test_a_weight_too_small_to_come_up_is_refused():
    with pytest.raises(ValueError, match=r"^data\.train\.weight = .*at least 1/10000"):
        SampleOrder([np.array([5])] * 2, 0, 4, 4, weights=[1, 1e-6])


@pytest.mark.parametrize("groups", [1, 4])
def test_weights_change_by_epoch_and_each_source_goes_on_where_it_was(groups):
    sizes, weights = [3000, 5000, 4000], [[2, 0, 1], 1, [0, 1]]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if groups == 1:
        order = SampleOrder([np.array([size]) for size in sizes], 3, 8, 4, weights)
    else:
        order = GroupedOrder(starts, np.arange(4), 3, 8, 4, weights, groups, 40)
    epochs, samples = order.locate(np.arange(5 * 12_000))
    sources = starts.searchsorted(samples, side="right") - 1
    for epoch, exact in enumerate([[8000, 4000, 0], [0, 6000, 6000], *[[4000, 4000, 4000]] * 3]):
        counts = np.bincount(sources[epoch * 12_000 : (epoch + 1) * 12_000], minlength=3)
        assert np.abs(counts - exact).max() < 150  # 10,000 slots, of which an epoch has a part, have exact shares
    for source, size in enumerate(sizes):
        mine = sources == source
        complete = np.unique(epochs[mine])[:-2]
        assert len(complete) >= 1
        for epoch in complete:
            own = samples[mine & (epochs == epoch)]
            np.testing.assert_array_equal(np.sort(own), np.arange(starts[source], starts[source] + size))
    some = np.array([59_990, 11_999, 12_000, 0, 24_001])
    np.testing.assert_array_equal(
        np.stack(pickle.loads(pickle.dumps(order)).locate(some)), np.stack([epochs, samples])[:, some]
    )


def test_an_epoch_is_as_short_as_the_repeats_of_a_source_have_it():
    sizes, weights = [np.array([100]), np.array([900])], [1, 1]
    order = SampleOrder(sizes, 3, 8, 4, weights, [2, None])
    assert order.epoch_samples == 400
    _, samples = order.locate(np.arange(400))
    assert np.bincount(samples[samples < 100]).max() <= 3  # twice on average
    plain = SampleOrder(sizes, 3, 8, 4, weights)
    assert plain.epoch_samples == 1000
    np.testing.assert_array_equal(samples, plain.locate(np.arange(400))[1])
    with pytest.raises(ValueError, match=r"epoch 1 draws from no source"):
        SampleOrder(sizes, 3, 8, 4, [[1, 0], [1, 0]])


def of_two_sources(size: int) -> SampleOrder:
    return SampleOrder([np.array([size]), np.array([size])], 3, 4, 2, weights=[1, 2])


def of_two_sources_in_groups(size: int) -> GroupedOrder:
    starts = np.array([0, size, 2 * size])
    return GroupedOrder(starts, np.arange(3), 7, 4, 3, weights=[1, 2], groups=2, global_batch=6)


@pytest.mark.parametrize("order_of", [of_two_sources, of_two_sources_in_groups])
@QUICK
@given(st.integers(2, 60), st.integers(0, 10_000), st.integers(1, 200))
def test_a_substitute_is_another_sample_of_the_same_source(order_of, size, slot, attempt):
    order = order_of(size)
    epoch, sample = (int(value[0]) for value in order.locate(np.array([slot])))
    found = order.substitute(slot, attempt)
    assert found[0] == epoch
    assert found[1] != sample
    assert found[1] // size == sample // size
    assert found == pickle.loads(pickle.dumps(order)).substitute(slot, attempt)


def test_substitutes_of_a_slot_differ_and_reach_everything():
    order = SampleOrder([np.array([20])], 3, 4, 2)
    found = {order.substitute(11, attempt)[1] for attempt in range(1, 200)}
    assert len(found) == 19


def test_ten_million_samples_cost_little():
    order = SampleOrder([np.full(1000, 10_000)], 0, 64, 1024)
    order.locate(np.array([0, 9_999_999, 123_456_789]))
    assert len(pickle.dumps(order)) < 4_000_000
