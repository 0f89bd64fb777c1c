"""Batches of a downstream task: step s -> this rank's entries of the global batch of step s, images decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from modstruct import distributed
from modstruct.config import TaskDataConfig
from modstruct.data.faults import BadSample, TooManyBadSamples
from modstruct.data.shards.loader import SUBSTITUTES, TrainBatch
from modstruct.data.shards.order import SampleOrder
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.decoding import decode_image
from modstruct.distributed.collect import my_batches

LARGEST_IMAGE_BYTES = 256 << 20
Seed = Callable[[str], int]
"""Salt, which distinguishes the draws of one sample -> seed of that draw."""


class Composer(Protocol):
    """How entries of a task become tensors; picklable, for loader processes."""

    def sample(self, entry: Any, read: Callable[[Path], Image.Image], seed: Seed | None, /) -> dict[str, Any]:
        """One entry's views. read: decodes an image file, or raises BadSample. seed: None in evaluation: no draws."""

    def collate(self, samples: list[dict[str, Any]], /) -> dict[str, Tensor]:
        """Samples -> one batch."""


def read_image(path: Path, max_pixels: int) -> Image.Image:
    """An image file, decoded. Raises BadSample."""
    try:
        if path.stat().st_size > LARGEST_IMAGE_BYTES:
            raise BadSample("decompression bomb", f"{path} (more than {LARGEST_IMAGE_BYTES >> 20} MiB)")
        content = path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable image", f"{path}: {error.strerror or error}") from None
    return decode_image(content, max_pixels, str(path))


class TaskBatches(Dataset):
    """Map from a step to a TrainBatch of this rank's rows of the global batch.

    The entries of a step depend on seed and step alone, as in data/shards/loader.py; an entry with an unreadable image
    is replaced by another one, always the same.
    """

    def __init__(
        self,
        composer: Composer,
        entries: Sequence[Any],
        config: TaskDataConfig,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
    ):
        self.composer, self.entries = composer, entries
        self.read = partial(read_image, max_pixels=config.max_image_pixels)
        self.order = task_order(len(entries), seed)
        self.global_batch, self.rows = global_batch, global_batch // world_size
        self.first_row = rank * self.rows
        self.seed = seed

    def __getitem__(self, step: int) -> TrainBatch:
        slots = step * self.global_batch + self.first_row + np.arange(self.rows)
        epochs, samples = self.order.locate(slots)
        batch = TrainBatch({})
        places = zip(slots.tolist(), epochs.tolist(), samples.tolist(), strict=True)
        batch.tensors = self.composer.collate([self._sample(*place, batch) for place in places])
        return batch

    def _sample(self, slot: int, epoch: int, number: int, batch: TrainBatch) -> dict[str, Any]:
        for attempt in range(1, SUBSTITUTES + 2):
            batch.tried += 1

            def seed(salt: str, epoch: int = epoch, number: int = number) -> int:
                return sample_seed(self.seed, epoch, number, salt)

            try:
                made = self.composer.sample(self.entries[number], self.read, seed)
                return made | {"slot": slot}
            except BadSample as bad:
                batch.faults.append((bad.cause, bad.where))
            epoch, number = self.order.substitute(slot, attempt)
        raise TooManyBadSamples(
            f"data.train: {SUBSTITUTES + 1} entries in a row cannot be used, the last: {': '.join(batch.faults[-1])}; "
            "repair its files or give others"
        )


def task_order(entries: int, seed: int) -> SampleOrder:
    """Every epoch a permutation of all entries."""
    return SampleOrder([np.array([entries])], seed, block=1, window=entries)


def task_loader(
    composer: Composer,
    entries: Sequence[Any],
    config: TaskDataConfig,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    stop_step: int,
) -> WorkerLoader:
    """Loader of the TrainBatches of the steps start_step … stop_step - 1; any start is as fast as the first."""
    dataset = TaskBatches(composer, entries, config, global_batch, seed, distributed.rank(), distributed.world_size())
    return WorkerLoader(dataset, range(start_step, stop_step), config.workers)


@dataclass
class EntryBatch:
    """Some entries of a split, without those whose image cannot be read."""

    tensors: dict[str, Tensor]
    numbers: list[int]
    """The entry number of each row; empty where no entry is readable."""
    faults: list[tuple[str, str]] = field(default_factory=list)


class _EntryBatches(Dataset):
    def __init__(self, composer: Composer, entries: Sequence[Any], config: TaskDataConfig):
        self.composer, self.entries = composer, entries
        self.read = partial(read_image, max_pixels=config.max_image_pixels)

    def __getitem__(self, numbers: Sequence[int]) -> EntryBatch:
        samples, kept, faults = [], [], []
        for number in numbers:
            try:
                samples.append(self.composer.sample(self.entries[number], self.read, None))
                kept.append(number)
            except BadSample as bad:
                faults.append((bad.cause, bad.where))
        return EntryBatch(self.composer.collate(samples) if samples else {}, kept, faults)


def entry_batches(
    composer: Composer, entries: Sequence[Any], config: TaskDataConfig, batch: int
) -> Iterator[EntryBatch]:
    """This rank's part of a split, in order: the batches that `my_batches` assigns to it."""
    chunks = [
        range(number * batch, min((number + 1) * batch, len(entries)))
        for number in my_batches(math.ceil(len(entries) / batch))
    ]
    dataset = _EntryBatches(composer, entries, config)
    return iter(WorkerLoader(dataset, chunks, min(config.workers, len(chunks))))
