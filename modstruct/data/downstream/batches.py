"""Batches of a downstream task: step s -> this process's entries of the global batch of step s, images decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from modstruct import distributed
from modstruct.config import TaskDataConfig
from modstruct.data.shards.faults import BadSample, TooManyBadSamples
from modstruct.data.shards.loader import SUBSTITUTES, TrainBatch
from modstruct.data.shards.order import SampleOrder
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.decoding import decode_image
from modstruct.distributed.collect import my_batches

LARGEST_PICTURE_BYTES = 256 << 20
Seed = Callable[[str], int]
"""A salt, which tells the draws of one sample apart -> the seed of that draw."""


class Composer(Protocol):
    """How entries of a task become tensors; travels to loader processes."""

    def sample(self, entry: Any, picture: Callable[[Path], Image.Image], seed: Seed | None) -> dict[str, Any]:
        """One entry's views. image: reads a file, or raises BadSample. seed: None in evaluation: nothing is drawn."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples -> one batch."""


def read_image(path: Path, max_pixels: int) -> Image.Image:
    """An image file, decoded. Raises BadSample."""
    try:
        if path.stat().st_size > LARGEST_PICTURE_BYTES:
            raise BadSample("decompression bomb", f"{path} (more than {LARGEST_PICTURE_BYTES >> 20} MiB)")
        content = path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable image", f"{path}: {error.strerror or error}") from None
    return decode_image(content, max_pixels, str(path))


class TaskBatches(Dataset):
    """Map from a step to a TrainBatch of this process's rows: those of every global batch that fall to it.

    The entries of a step depend on the seed and the step alone, as in data/loader.py; an entry whose image cannot be
    read is replaced by another one, always the same.
    """

    def __init__(
        self,
        composer: Composer,
        entries: Sequence[Any],
        config: TaskDataConfig,
        global_batch: int,
        seed: int,
        process: int,
        processes: int,
    ):
        self.composer, self.entries = composer, entries
        self.max_pixels = config.max_image_pixels
        self.order = task_order(len(entries), seed)
        self.global_batch, self.rows, self.parts = global_batch, global_batch // processes, 1
        self.first_row = process * self.rows
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
                made = self.composer.sample(self.entries[number], self._image, seed)
                return made | {"slot": slot}
            except BadSample as bad:
                batch.faults.append((bad.cause, bad.where))
            epoch, number = self.order.substitute(slot, attempt)
        raise TooManyBadSamples(
            f"{SUBSTITUTES + 1} images in a row cannot be used, the last: {': '.join(batch.faults[-1])}"
        )

    def _image(self, path: Path) -> Image.Image:
        return read_image(path, self.max_pixels)


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
    """Loader of the TrainBatches of the steps start_step … stop_step - 1; any start is as quick as the first."""
    dataset = TaskBatches(composer, entries, config, global_batch, seed, distributed.rank(), distributed.world_size())
    return WorkerLoader(dataset, range(start_step, stop_step), config.workers, pin_memory=distributed.on_gpu())


@dataclass
class EntryBatch:
    """Some entries of a split, those whose image cannot be read left out."""

    tensors: dict[str, Tensor]
    numbers: list[int]
    """Of each row, its entry's number; empty for a batch of no readable entry."""
    faults: list[tuple[str, str]] = field(default_factory=list)


class _EntryBatches(Dataset):
    def __init__(self, composer: Composer, entries: Sequence[Any], config: TaskDataConfig):
        self.composer, self.entries, self.max_pixels = composer, entries, config.max_image_pixels

    def __getitem__(self, numbers: Sequence[int]) -> EntryBatch:
        samples, kept, faults = [], [], []
        for number in numbers:
            try:
                samples.append(self.composer.sample(self.entries[number], self._image, None))
                kept.append(number)
            except BadSample as bad:
                faults.append((bad.cause, bad.where))
        return EntryBatch(self.composer.collate(samples) if samples else {}, kept, faults)

    def _image(self, path: Path) -> Image.Image:
        return read_image(path, self.max_pixels)


def entry_batches(
    composer: Composer, entries: Sequence[Any], config: TaskDataConfig, batch: int
) -> Iterator[EntryBatch]:
    """This process's share of a split, in order; see evaluation/collect.py for which batches these are."""
    chunks = [
        range(number * batch, min((number + 1) * batch, len(entries)))
        for number in my_batches(math.ceil(len(entries) / batch))
    ]
    dataset = _EntryBatches(composer, entries, config)
    return iter(WorkerLoader(dataset, chunks, min(config.workers, len(chunks)), pin_memory=False))
