"""The order of training data as a function: slot -> (epoch, sample), without state or replay.

Step s of a run takes the slots [s B, (s + 1) B), B being the global batch. Which samples those are depends on the seed
and on the sizes of the shards alone, so any number of processes and loader workers reads the same batches, and a
position in the data is one integer.

An epoch of a source is a permutation of its samples. The samples of each shard are cut into blocks of `block`
neighbours; the blocks are permuted; each `window` permuted blocks are then permuted sample by sample. Reads thus stay
local, in at most `window` places, while a batch mixes samples of many shards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from modstruct.errors import require

# Slots after which the pattern of weighted sources repeats; shares are exact to 1 / PERIOD.
PERIOD = 10_000

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")
_BLOCKS, _WINDOW, _PATTERN, _SUBSTITUTE = range(4)  # purposes of the streams of random numbers


class Order(Protocol):
    """What the loader asks of an order of data."""

    epoch_samples: int
    """Slots of one epoch of the whole, by epoch_length."""

    def largest_batches(self) -> list[int]:
        """For the whole, or with weights for each source: neighbouring slots that take each of its samples once, as far
        as they lie within one epoch of it."""

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots (n,), in any order -> epoch of the source that the slot draws from, and sample, each (n,) int64.

        Samples are numbered through all sources, as in modstruct.data.shards.samples.Samples.
        """

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """(epoch, sample) that takes the place of a bad sample: a function of (seed, slot, attempt).

        attempt: 1 for the first substitute of the slot, 2 for the next. It comes from the source of the slot and is
        never the slot's own sample, unless that is the only one.
        """


Weights = Sequence[float | Sequence[float]]
"""Of each source: its weight, or its weight in the epochs 0, 1, …, of which the last holds on."""


def weights_by_epoch(weights: Weights | None) -> list[list[float]]:
    """The weights of all sources, for each epoch in which one may differ; [[1]], of one pool, without weights."""
    lists = [[1.0]] if weights is None else [[w] if isinstance(w, float | int) else list(w) for w in weights]
    return [[of_source[min(epoch, len(of_source) - 1)] for of_source in lists] for epoch in range(max(map(len, lists)))]


def epoch_length(
    sizes: Sequence[int], weights: Weights | None = None, max_repeats: Sequence[float | None] | None = None
) -> int:
    """Slots of one epoch of the whole: as many as there are samples, or as none of the sources lets an epoch draw it
    more often than its max_repeats, on average.

    sizes: samples of each source.
    """
    length = float(sum(sizes))
    for of_epoch in weights_by_epoch(weights) if max_repeats else []:
        for size, weight, most in zip(sizes, of_epoch, max_repeats or (), strict=True):
            if most is not None and weight > 0:
                length = min(length, most * size * sum(of_epoch) / weight)
    return max(1, int(length))


class _Pattern:
    """A seeded pattern of slots with exact shares of pools, repeated for ever."""

    def __init__(self, counts: np.ndarray, seed: int):
        pattern = np.repeat(np.arange(len(counts)), counts)
        self.pools = pattern[_permutation(len(pattern), seed, _PATTERN)]  # (period,) pool of each slot
        self.counts = counts
        # (period + 1, pools) slots of each pool before each slot
        self._before = np.concatenate([[counts * 0], np.cumsum(self.pools[:, None] == np.arange(len(counts)), axis=0)])

    def before(self, slots: np.ndarray) -> np.ndarray:
        """Slots (n,) -> earlier slots of each pool (n, pools)."""
        rounds, places = np.divmod(slots, len(self.pools))
        return rounds[:, None] * self.counts + self._before[places]


class Mixture:
    """Which source each slot draws from: without weights all are one pool, else each is one, with exact shares.

    epoch_slots: after so many slots, those of one epoch, the weights of the next one hold. Raises ValueError for a
    weight too small for the pattern, and for an epoch without any.
    """

    def __init__(self, seed: int, weights: Weights | None, epoch_slots: int):
        self._patterns = []
        for epoch, given in enumerate(weights_by_epoch(weights)):
            require(
                sum(given) > 0, "data.train.weight", given, f"epoch {epoch} draws from no source: give one a weight"
            )
            counts = np.array([1]) if weights is None else _largest_remainder(given, PERIOD)
            least = f"every weight must be at least 1/{PERIOD} of their sum"
            require(((counts > 0) == (np.array(given) > 0)).all(), "data.train.weight", given, least)
            self._patterns.append(_Pattern(counts, seed))
        self._starts = np.arange(len(self._patterns)) * epoch_slots
        self.period = len(self._patterns[0].pools)

    def turns(self, slots: np.ndarray, skipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Slots (n,) -> pool (n,) and how many earlier slots went to the same pool (n,).

        skipped: (n,) slots of every epoch's pattern that are left out at its begin; none by default.
        """
        skipped = np.zeros_like(slots) if skipped is None else skipped
        phases = self._starts.searchsorted(slots, side="right") - 1
        pools, turns = np.empty_like(slots), np.empty_like(slots)
        for phase in np.unique(phases).tolist():
            mine = np.flatnonzero(phases == phase)
            skip, pattern = skipped[mine], self._patterns[phase]
            places = slots[mine] - self._starts[phase] + skip
            earlier = pattern.before(places) - pattern.before(skip)
            for past, length in zip(self._patterns[:phase], np.diff(self._starts).tolist(), strict=False):
                earlier += past.before(skip + length) - past.before(skip)
            pools[mine] = pattern.pools[places % self.period]
            turns[mine] = earlier[np.arange(len(mine)), pools[mine]]
        return pools, turns

    def largest_batches(self, pool_sizes: Sequence[int]) -> list[int]:
        """As Order has it, of the samples in each pool, with the largest of its weights."""
        most = np.max([pattern.counts for pattern in self._patterns], axis=0)
        return [size * self.period // int(n) for size, n in zip(pool_sizes, most, strict=True)]


class SampleOrder:
    """Order of one or several sources: data.order_version 1.

    shard_sizes: for each source, the samples in each of its shards. weights: share of each source; None lets the
    sources count as one, of which each sample comes once in an epoch. With weights a seeded pattern of 10,000 slots
    decides the source of each slot, with exact shares, and every source has epochs of its own. block: neighbours kept
    together. window: blocks mixed with each other. max_repeats: of each source, as epoch_length has it. Methods as
    Order has them, errors as Mixture.
    """

    def __init__(
        self,
        shard_sizes: Sequence[np.ndarray],
        seed: int,
        block: int,
        window: int,
        weights: Weights | None = None,
        max_repeats: Sequence[float | None] | None = None,
    ):
        self.seed = seed
        source_sizes = np.array([int(np.sum(sizes)) for sizes in shard_sizes], dtype=np.int64)
        source_starts = np.concatenate([[0], np.cumsum(source_sizes)])  # (sources + 1,)
        self.epoch_samples = epoch_length(source_sizes.tolist(), weights, max_repeats)
        pools = [np.concatenate(list(shard_sizes))] if weights is None else list(shard_sizes)
        self._pool_starts = np.zeros(1, dtype=np.int64) if weights is None else source_starts[:-1]
        self._mixture = Mixture(seed, weights, self.epoch_samples)
        self._pools = [_Epochs(sizes, seed, pool, block, window) for pool, sizes in enumerate(pools)]

    def largest_batches(self) -> list[int]:
        return self._mixture.largest_batches([pool.size for pool in self._pools])

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots = np.asarray(slots, dtype=np.int64)
        pools, turns = self._mixture.turns(slots)
        epochs = np.empty_like(slots)
        samples = np.empty_like(slots)
        for pool in np.unique(pools):
            mine = pools == pool
            epochs[mine], within = self._pools[pool].locate(turns[mine])
            samples[mine] = self._pool_starts[pool] + within
        return epochs, samples

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        epoch, sample = (int(value[0]) for value in self.locate(np.array([slot])))
        pool = int(self._mixture.turns(np.array([slot]))[0][0])
        start, size = int(self._pool_starts[pool]), self._pools[pool].size
        return epoch, start + another(sample - start, size, self.seed, slot, attempt)


class _Epochs:
    """The epochs of one pool of shards: turn t -> epoch t // size and a sample of the pool."""

    def __init__(self, shard_sizes: np.ndarray, seed: int, pool: int, block: int, window: int):
        self.size = int(np.sum(shard_sizes))
        self.seed, self.pool, self.window = seed, pool, window
        shard_starts = np.concatenate([[0], np.cumsum(shard_sizes)])[:-1]
        blocks = -(-np.asarray(shard_sizes) // block)  # in each shard; its last block may be short
        number = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        self._starts = np.repeat(shard_starts, blocks) + number * block
        self._sizes = np.minimum(block, np.repeat(shard_starts + shard_sizes, blocks) - self._starts)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}, "_windows": {}}  # faster to rebuild than to send

    def locate(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns (n,) -> epochs (n,) and samples (n,), numbered within the pool."""
        epochs, places = np.divmod(turns, self.size)
        samples = np.empty_like(turns)
        for epoch in np.unique(epochs).tolist():
            _, starts = self._epoch(epoch)
            window_starts = starts[: -1 : self.window]
            in_epoch = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(window_starts, places[in_epoch], side="right") - 1
            for window in np.unique(windows).tolist():
                mine = in_epoch[windows == window]
                samples[mine] = self._mixed(epoch, window)[places[mine] - window_starts[window]]
        return epochs, samples

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted blocks (blocks,) of an epoch and the place (blocks + 1,) in the epoch where each begins."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            blocks = _permutation(len(self._sizes), self.seed, _BLOCKS, self.pool, epoch)
            return blocks, np.concatenate([[0], np.cumsum(self._sizes[blocks])])

        return remember(self._epochs, epoch, make, limit=2)

    def _mixed(self, epoch: int, window: int) -> np.ndarray:
        """The samples of `window` permuted blocks, mixed."""

        def make() -> np.ndarray:
            blocks = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
            sizes = self._sizes[blocks]
            begins = np.cumsum(sizes) - sizes
            samples = np.arange(int(sizes.sum())) + np.repeat(self._starts[blocks] - begins, sizes)
            return samples[_permutation(len(samples), self.seed, _WINDOW, self.pool, epoch, window)]

        return remember(self._windows, (epoch, window), make, limit=4)


def remember(cache: dict[Key, Made], key: Key, make: Callable[[], Made], limit: int) -> Made:
    """A loader reads step after step, so the last few epochs and windows are worth keeping."""
    if key not in cache:
        while len(cache) >= limit:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]


def random_words(count: int, *words: int) -> np.ndarray:
    """(count,) uint64, a function of the words.

    Raw bits of a bit generator: numpy keeps them from version to version, unlike Generator.permutation and the like.
    """
    return np.random.PCG64(np.random.SeedSequence([word % 2**64 for word in words])).random_raw(count)


def another(place: int, size: int, *words: int) -> int:
    """Another of `size` places, a function of the words; the same if there is no other."""
    step = 1 + int(random_words(1, words[0], _SUBSTITUTE, *words[1:])[0] % np.uint64(max(size - 1, 1)))
    return (place + step) % size


def _permutation(count: int, *words: int) -> np.ndarray:
    return np.argsort(random_words(count, *words), kind="stable")


def _largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to the weights that sum to `total`; the rest goes to the largest remainders."""
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    left = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts
