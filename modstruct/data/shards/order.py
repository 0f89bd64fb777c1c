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
    """Slots of one epoch of the whole: as many as there are samples."""

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


class Mixture:
    """Which source each slot draws from: without weights all are one pool, else each is one, with exact shares.

    Raises ValueError for a weight too small for the pattern.
    """

    def __init__(self, seed: int, weights: Sequence[float] | None):
        counts = np.array([1]) if weights is None else _largest_remainder(weights, PERIOD)
        require(
            bool((counts > 0).all()),
            "data.train.weight",
            None if weights is None else list(weights),
            f"every weight must be at least 1/{PERIOD} of their sum",
        )
        pattern = np.repeat(np.arange(len(counts)), counts)
        self.pattern = pattern[_permutation(len(pattern), seed, _PATTERN)]
        """(period,) pool of each slot."""
        self._counts = counts
        # How many earlier slots of the pattern went to the same pool.
        self._earlier = np.empty_like(self.pattern)
        for pool, count in enumerate(counts):
            self._earlier[self.pattern == pool] = np.arange(count)

    def turns(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots (n,) -> pool (n,) and how many earlier slots went to the same pool (n,)."""
        round_, place = np.divmod(slots, len(self.pattern))
        pools = self.pattern[place]
        return pools, round_ * self._counts[pools] + self._earlier[place]

    def largest_batches(self, pool_sizes: Sequence[int]) -> list[int]:
        """As Order has it, of the samples in each pool."""
        return [size * len(self.pattern) // int(n) for size, n in zip(pool_sizes, self._counts, strict=True)]


class SampleOrder:
    """Order of one or several sources: data.order_version 1.

    shard_sizes: for each source, the samples in each of its shards. weights: share of each source; None lets the
    sources count as one, of which each sample comes once in an epoch. With weights a seeded pattern of 10,000 slots
    decides the source of each slot, with exact shares, and every source has epochs of its own. block: neighbours kept
    together. window: blocks mixed with each other. Methods as Order has them, errors as Mixture.
    """

    def __init__(
        self,
        shard_sizes: Sequence[np.ndarray],
        seed: int,
        block: int,
        window: int,
        weights: Sequence[float] | None = None,
    ):
        self.seed = seed
        source_sizes = np.array([int(np.sum(sizes)) for sizes in shard_sizes], dtype=np.int64)
        source_starts = np.concatenate([[0], np.cumsum(source_sizes)])  # (sources + 1,)
        self.epoch_samples = int(source_starts[-1])
        pools = [np.concatenate(list(shard_sizes))] if weights is None else list(shard_sizes)
        self._pool_starts = np.zeros(1, dtype=np.int64) if weights is None else source_starts[:-1]
        self._mixture = Mixture(seed, weights)
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
