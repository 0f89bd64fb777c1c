"""The order of training data in groups, each of which reads shards of its own: data.order_version 2.

With G groups and a global batch of B, the rows [g B / G, (g + 1) B / G) of every step come from group g alone. Place i
of epoch e of a source with N samples is taken by the slot of group (e N + i) mod G, so the groups share every epoch
equally, to one sample. The shards of an epoch are permuted and laid one after the other; group g has the g-th run of
their samples, so a shard at a boundary belongs to two groups. Processes that take whole groups thus read the same
samples in the same batches, whatever their number, and each reads the shards of its groups only.

A run is cut into blocks of `block` neighbours; the blocks are permuted; each `window` permuted blocks are then permuted
sample by sample. Blocks at least as large as every shard are left in place: shards are then read whole, in turn.

Permutations are computed for the places that are asked for, not kept: a source of 10^9 samples costs no more than 8
bytes for each shard of the groups that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np

from modstruct.data.shards.order import Mixture, Weights, another, epoch_length, random_words, remember
from modstruct.errors import require

_SHARDS, _BLOCKS, _WINDOW, _LANE = range(10, 14)  # purposes of random numbers; order.py has others
ROUNDS = 6  # of the Feistel network; four make a pseudorandom permutation (Luby and Rackoff 1988)
CHUNK = 4096  # shards whose samples are summed at a time
# First substitutes of a bad sample, which come from the shards that its neighbours are in, so that nothing else is
# fetched for them; where all these are bad, too, the whole source serves.
NEAR_SUBSTITUTES = 16


class GroupedOrder:
    """Order of one or several sources in groups.

    shard_starts: (shards + 1,) number of the first sample of each shard, and the total. source_starts: (sources + 1,)
    the same of the first shard of each source. global_batch: slots of a step, a multiple of groups. seed, block,
    window, weights, max_repeats: as SampleOrder has them; each group follows the pattern of weights from a place of its
    own.
    """

    def __init__(
        self,
        shard_starts: np.ndarray,
        source_starts: np.ndarray,
        seed: int,
        block: int,
        window: int,
        weights: Weights | None,
        groups: int,
        global_batch: int,
        max_repeats: Sequence[float | None] | None = None,
    ):
        require_groups(groups, global_batch)
        self.seed, self.global_batch, self.group_rows = seed, global_batch, global_batch // groups
        sizes = np.diff(shard_starts[source_starts]).tolist()
        self.epoch_samples = epoch_length(sizes, weights, max_repeats)
        edges = source_starts[[0, -1]] if weights is None else source_starts
        parts = [shard_starts[first : last + 1] for first, last in pairwise(edges)]
        self._pools = [_Epochs(starts, seed, pool, block, window, groups) for pool, starts in enumerate(parts)]
        self._mixture = Mixture(seed, weights, -(-self.epoch_samples // groups))
        lanes = random_words(groups, seed, _LANE) % np.uint64(self._mixture.period)
        self._lanes = lanes.astype(np.int64)  # (groups,) slots of the pattern that each group skips

    def largest_batches(self) -> list[int]:
        return self._mixture.largest_batches([pool.size for pool in self._pools])

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        groups, pools, turns = self._turns(np.asarray(slots, dtype=np.int64))
        epochs, samples = np.empty_like(turns), np.empty_like(turns)
        for pool in np.unique(pools).tolist():
            mine = pools == pool
            epochs[mine], samples[mine] = self._pools[pool].locate(groups[mine], turns[mine])
        return epochs, samples

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        group, pool, turn = (int(value[0]) for value in self._turns(np.array([slot], dtype=np.int64)))
        return self._pools[pool].substitute(group, turn, slot, attempt)

    def _turns(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots (n,) -> group, pool, and how many earlier slots of the group went to the same pool, each (n,)."""
        steps, rows = np.divmod(slots, self.global_batch)
        groups, rows = np.divmod(rows, self.group_rows)
        return groups, *self._mixture.turns(steps * self.group_rows + rows, self._lanes[groups])


def require_groups(groups: int, global_batch: int, processes: int = 1) -> None:
    """Refuse groups that do not divide the batch, or that the processes cannot share. Raises ValueError."""
    most = (global_batch // groups) * groups or groups
    remedy = f"must be a multiple of data.groups = {groups}, such as {most}"
    require(global_batch % groups == 0, "train.global_batch", global_batch, remedy)
    require(
        groups == 1 or groups % processes == 0,
        "data.groups",
        groups,
        f"{processes} processes cannot take whole groups each; start a number of processes that divides it",
    )


@dataclass
class _Run:
    """What one group reads in one epoch."""

    first_turn: int
    """Of the group."""
    length: int
    shards: np.ndarray
    """(n,) uint32: those that the run reaches into, in order."""
    ends: np.ndarray
    """(n,) where each ends, counted from the start of the first of them; as few bytes as hold it."""
    skipped: int
    """Samples of the first shard that belong to the group before."""


class _Epochs:
    """The epochs of one pool of shards: turn t of group g -> epoch and sample."""

    def __init__(self, starts: np.ndarray, seed: int, pool: int, block: int, window: int, groups: int):
        self.starts = starts
        self.size = int(starts[-1] - starts[0])
        self.words, self.groups = (seed, pool), groups
        self.block, self.span = block, block * window
        chunks = range(0, len(starts) - 1, CHUNK)
        self.in_turn = all(block >= np.diff(starts[first : first + CHUNK + 1]).max() for first in chunks)
        self._sums: dict[int, np.ndarray] = {}
        self._runs: dict[tuple[int, int], _Run] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_sums": {}, "_runs": {}}

    def locate(self, groups: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Groups (n,) and turns (n,) -> epochs (n,) and samples (n,)."""
        epochs, samples = (turns * self.groups + groups) // self.size, np.empty_like(turns)
        reads = epochs * self.groups + groups
        found = np.unique(reads)
        for read in found.tolist():
            epoch, group = divmod(read, self.groups)
            run, mine = self._run(epoch, group, keep=2 * len(found)), reads == read
            samples[mine] = self._samples(run, turns[mine] - run.first_turn, (*self.words, epoch, group))
        return epochs, samples

    def substitute(self, group: int, turn: int, slot: int, attempt: int) -> tuple[int, int]:
        """As Order has it."""
        epoch = (turn * self.groups + group) // self.size
        run, words = self._run(epoch, group, keep=2), (*self.words, epoch, group)
        place = turn - run.first_turn
        first = place // self.span * self.span
        size, draw = min(self.span, run.length - first), (self.words[0], slot, attempt)
        if attempt <= NEAR_SUBSTITUTES and size > 1:
            place = first + another(place - first, size, *draw)
            return epoch, int(self._samples(run, np.array([place]), words)[0])
        first_sample, own = int(self.starts[0]), int(self._samples(run, np.array([place]), words)[0])
        return epoch, first_sample + another(own - first_sample, self.size, *draw)

    def _samples(self, run: _Run, places: np.ndarray, words: tuple[int, ...]) -> np.ndarray:
        """The samples at places (n,) of a run."""
        windows, mixed = np.divmod(places, self.span)
        for window in np.unique(windows).tolist():
            mine = windows == window
            size = min(self.span, run.length - window * self.span)
            mixed[mine] = permuted(mixed[mine], size, *words, _WINDOW, window)
        blocks, within = np.divmod(windows * self.span + mixed, self.block)
        if not self.in_turn:
            whole = blocks < run.length // self.block  # what is left at the end is no block: it stays there
            blocks[whole] = permuted(blocks[whole], run.length // self.block, *words, _BLOCKS)
        along = run.skipped + blocks * self.block + within
        number = run.ends.searchsorted(along.astype(run.ends.dtype), side="right")
        shards = run.shards[number]
        # Counted from the shard's end, since the start of the run's first shard is no end of another.
        return self.starts[shards + 1] - (run.ends[number].astype(np.int64) - along)

    def _run(self, epoch: int, group: int, keep: int) -> _Run:
        def make() -> _Run:
            first, last = (self._samples_before(edge, epoch) for edge in (group, group + 1))
            if self.groups == 1:  # all of it: no chunk needs to be found, for which the shards are permuted first
                begin, end, edges = 0, -(-(len(self.starts) - 1) // CHUNK), (0, self.size)
            else:
                sums = self._chunk_sums(epoch)  # where each chunk of shards begins
                begin, end = int(sums.searchsorted(first, "right")) - 1, int(sums.searchsorted(last, "left"))
                edges = int(sums[begin]), int(sums[end])
            chunks = [self._shards(epoch, chunk * CHUNK) for chunk in range(begin, end)]
            shards = np.concatenate([np.empty(0, dtype=np.uint32), *chunks])
            counts = np.concatenate([np.empty(0, dtype=np.uint32), *map(self._counts, chunks)])
            ends = np.cumsum(counts, dtype=np.min_scalar_type(edges[1] - edges[0]))
            start, stop = (ends.dtype.type(edge - edges[0]) for edge in (first, last))
            reached = slice(int(ends.searchsorted(start, "right")), int(ends.searchsorted(stop, "left")) + 1)
            shards, counts, ends = shards[reached], counts[reached], ends[reached]
            skipped = int(start) - int(ends[0] - counts[0]) if len(ends) else 0
            turn = -((group - epoch * self.size) // self.groups)
            return _Run(turn, last - first, shards, ends - (start - ends.dtype.type(skipped)), skipped)

        return remember(self._runs, (epoch, group), make, limit=max(keep, 2))

    def _samples_before(self, group: int, epoch: int) -> int:
        """Samples that the groups before this one take of an epoch."""

        def before(place: int) -> int:  # places of all epochs before this one
            return place // self.groups * group + min(place % self.groups, group)

        return before((epoch + 1) * self.size) - before(epoch * self.size)

    def _chunk_sums(self, epoch: int) -> np.ndarray:
        """(chunks + 1,) samples of the permuted shards before each chunk of them."""

        def make() -> np.ndarray:
            chunks = range(0, len(self.starts) - 1, CHUNK)
            counts = [self._counts(self._shards(epoch, first)).sum(dtype=np.int64) for first in chunks]
            return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))])

        return remember(self._sums, epoch, make, limit=2)

    def _shards(self, epoch: int, first: int) -> np.ndarray:
        """Up to CHUNK of the permuted shards of an epoch, uint32."""
        shards = len(self.starts) - 1
        places = np.arange(first, min(first + CHUNK, shards))
        return permuted(places, shards, *self.words, _SHARDS, epoch).astype(np.uint32)

    def _counts(self, shards: np.ndarray) -> np.ndarray:
        """Samples of shards (n,), uint32."""
        return (self.starts[shards + 1] - self.starts[shards]).astype(np.uint32)


def permuted(places: np.ndarray, size: int, *words: int) -> np.ndarray:
    """Where a permutation of `size` places, a function of the words, takes each of places (n,) int64.

    A Feistel network on the square of numbers that holds them (Black and Rogaway 2002): what leaves the places is
    permuted again until it is one of them.
    """
    side = isqrt(max(size - 1, 0)) + 1
    keys = random_words(ROUNDS, *words)
    found = _feistel(places, side, keys)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _feistel(found[outside], side, keys)
    return found


def _feistel(places: np.ndarray, side: int, keys: np.ndarray) -> np.ndarray:
    half, modulus = np.uint64(32), np.uint64(side)  # side < 2^32
    left, right = np.divmod(places.astype(np.uint64), modulus)
    for key in keys:
        mixed = right ^ key  # splitmix64's finalizer (Steele, Lea and Flood 2014), its upper half scaled to the side
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        moved = left + (((mixed >> half) * modulus) >> half)
        left, right = right, moved - modulus * (moved >= modulus)
    return (left * modulus + right).astype(np.int64)
