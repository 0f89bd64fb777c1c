"""Training batches: step s -> this process's rows of the global batch of step s, whole or in micro-batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modstruct import distributed
from modstruct.config import DataConfig, refuse, require
from modstruct.data.augment import Views, sample_seed
from modstruct.data.faults import BadSample, TooManyBadSamples
from modstruct.data.masking import with_blanks
from modstruct.data.order import SampleOrder
from modstruct.data.pictures import decode_picture
from modstruct.data.reader import RawSample, ShardReader
from modstruct.data.samples import Samples
from modstruct.data.sources import is_pipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.workers import WorkerLoader, require_shared_memory

EXTRA_FIELDS = frozenset(
    {"image_augmented", "text_augmented", "text_masked", "masked_labels", "image_id", "text_id", "slot"}
)
"""What a batch may hold beside image and text. image_augmented, text_augmented: as these, of the augmented view.
text_masked (B, L): the caption with blanks, and masked_labels (B, L): the true ids there, else -100. image_id, text_id
(B,): equal where two pairs have the same picture, or the same caption. slot (B,): place in the order of the data."""

# In a source of which nine tenths are bad, 200 substitutes in a row fail once in 10^9 slots.
SUBSTITUTES = 200


@dataclass
class TrainBatch:
    """One process's rows of one step, or a micro-batch of them, and what went wrong on the way."""

    tensors: dict[str, Tensor]
    """image uint8 (B, 3, H, W), text int64 (B, L), and, where asked for, others of EXTRA_FIELDS."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(cause, where) of each bad sample that a substitute stands for."""
    tried: int = 0
    """Samples read, substitutes included."""

    def pin_memory(self) -> TrainBatch:
        """Called by the DataLoader for a copy that travels to the GPU on its own."""
        return TrainBatch({name: rows.pin_memory() for name, rows in self.tensors.items()}, self.faults, self.tried)


class LocalBatches(Dataset):
    """Map from s * parts + i to the i-th part of step s, a TrainBatch of at most `micro_batch` rows.

    Row r of the global batch of step s is slot s * global_batch + r of `order`; process p of W has the rows
    [p B / W, (p + 1) B / W), cut into equal parts but for the last. extra: which of EXTRA_FIELDS to make. seed: of the
    views. masked_rate: share of a caption's tokens that text_masked hides.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        views: Views,
        tokenizer: Tokenizer,
        extra: Collection[str],
        max_image_pixels: int,
        global_batch: int,
        micro_batch: int | None,
        seed: int,
        process: int,
        processes: int,
        masked_rate: float = 0.15,
    ):
        require(
            global_batch % processes == 0,
            "train.global_batch",
            global_batch,
            f"must be a multiple of the {processes} processes, such as {max(global_batch // processes, 1) * processes}",
        )
        self.reader, self.order = reader, order
        self.views, self.tokenizer = views, tokenizer
        self.extra = frozenset(extra)
        self.masked_rate = masked_rate
        self.max_image_pixels = max_image_pixels
        self.global_batch, self.rows = global_batch, global_batch // processes
        self.part_rows = min(micro_batch or self.rows, self.rows)
        self.parts = math.ceil(self.rows / self.part_rows)
        self.first_row = process * self.rows
        self.seed = seed

    def __getitem__(self, index: int) -> TrainBatch:
        step, part = divmod(index, self.parts)
        rows = np.arange(part * self.part_rows, min((part + 1) * self.part_rows, self.rows))
        slots = step * self.global_batch + self.first_row + rows
        epochs, samples = self.order.locate(slots)
        batch = TrainBatch({})
        places = zip(slots.tolist(), epochs.tolist(), samples.tolist(), strict=True)
        texts: dict[str, list[str]] = {}
        pictures: dict[str, np.ndarray] = {}
        numbers: dict[str, list[int]] = {}
        for row, place in enumerate(places):
            for name, view in self._views(*place, batch).items():
                if isinstance(view, str):
                    texts.setdefault(name, []).append(view)
                    continue
                if isinstance(view, int):
                    numbers.setdefault(name, []).append(view)
                    continue
                if name not in pictures:
                    pictures[name] = np.empty((len(rows), *view.shape), dtype=np.uint8)
                # At once: a list of pictures, stacked at the end, would ask the system for new memory every time.
                pictures[name][row] = view.numpy()
        batch.tensors = {name: torch.from_numpy(array) for name, array in pictures.items()}
        batch.tensors |= {name: self.tokenizer(texts_of_view) for name, texts_of_view in texts.items()}
        if "text_masked" in self.extra:
            seeds = numbers.pop("mask_seed")
            hidden, labels = with_blanks(batch.tensors["text"], seeds, self.masked_rate, self.tokenizer)
            batch.tensors |= {"text_masked": hidden, "masked_labels": labels}
        batch.tensors |= {name: torch.tensor(values) for name, values in numbers.items()}
        if "slot" in self.extra:
            batch.tensors["slot"] = torch.from_numpy(slots)
        return batch

    def _views(self, slot: int, epoch: int, sample: int, batch: TrainBatch) -> dict[str, Tensor | str | int]:
        """Views of a slot's sample, or of its first good substitute; the bad ones are noted in the batch."""
        for attempt in range(1, SUBSTITUTES + 2):
            batch.tried += 1
            try:
                return self._sample_views(self.reader.read(sample), epoch, sample)
            except BadSample as bad:
                batch.faults.append((bad.cause, bad.where))
            epoch, sample = self.order.substitute(slot, attempt)
        raise TooManyBadSamples(
            f"{SUBSTITUTES + 1} samples in a row cannot be used, the last: {': '.join(batch.faults[-1])}; "
            "repair the shards"
        )

    def _sample_views(self, raw: RawSample, epoch: int, sample: int) -> dict[str, Tensor | str | int]:
        picture = decode_picture(raw.image, self.max_image_pixels, raw.where)

        def seed(salt: str) -> int:
            return sample_seed(self.seed, epoch, sample, salt)

        views = {
            "image": self.views.plain_image(picture, seed("image")),
            "text": self.views.plain_text(raw.caption),
        }
        if "image_augmented" in self.extra:
            views["image_augmented"] = self.views.augmented_image(picture, seed("image_augmented"))
        if "text_augmented" in self.extra:
            views["text_augmented"] = self.views.augmented_text(raw.caption, seed("text_augmented"))
        if "text_masked" in self.extra:
            views["mask_seed"] = seed("text_masked")
        if "image_id" in self.extra:
            views["image_id"] = identity(raw.image)
        if "text_id" in self.extra:
            views["text_id"] = identity(raw.caption.encode(errors="surrogatepass"))
        return views


def identity(content: bytes) -> int:
    """A number of 63 bits, equal for equal bytes; others share it once in 10^9 pictures."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def train_order(samples: Samples, config: DataConfig, seed: int) -> SampleOrder:
    """The order that data.shuffle_block, data.shuffle_window, the sources' weights and train.seed make."""
    return SampleOrder(samples.shard_sizes(), seed, config.shuffle_block, config.shuffle_window, samples.weights)


def train_loader(
    samples: Samples,
    config: DataConfig,
    views: Views,
    tokenizer: Tokenizer,
    extra: Collection[str],
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    stop_step: int,
    micro_batch: int | None = None,
    process: int | None = None,
    processes: int | None = None,
    masked_rate: float = 0.15,
) -> WorkerLoader:
    """Loader of the TrainBatches of the steps start_step … stop_step - 1; any start is as quick as the first.

    micro_batch: rows of a TrainBatch at most, so that a step comes in several; `steps_of` puts them together.
    extra: the subset of EXTRA_FIELDS that the model needs. process, processes: rank of this process and their number,
    by default those of torch.distributed. masked_rate: share of a caption's tokens that text_masked hides. Raises
    ValueError if global_batch is no multiple of the number of processes, if pipes do not fit their cache, or if batches
    do not fit the shared memory.
    """
    _require_pipe_room(samples, config)
    dataset = LocalBatches(
        reader=ShardReader(samples, config),
        order=train_order(samples, config, seed),
        views=views,
        tokenizer=tokenizer,
        extra=extra,
        masked_rate=masked_rate,
        max_image_pixels=config.max_image_pixels,
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=seed,
        process=distributed.rank() if process is None else process,
        processes=distributed.world_size() if processes is None else processes,
    )
    image_bytes = 3 * views.image_size**2 * (1 + ("image_augmented" in extra))
    require_shared_memory(dataset.part_rows * image_bytes, config.workers)
    items = range(start_step * dataset.parts, stop_step * dataset.parts)
    return WorkerLoader(dataset, items, config.workers, pin_memory=distributed.on_gpu())


def steps_of(loader: WorkerLoader) -> Iterator[list[TrainBatch]]:
    """The parts of one step after the other."""
    parts = []
    for batch in loader:
        parts.append(batch)
        if len(parts) == loader.dataset.parts:
            yield parts
            parts = []


def _require_pipe_room(samples: Samples, config: DataConfig) -> None:
    """Refuse a pipe cache that shuffled reading would empty and fill again all the time."""
    piped = np.array([is_pipe(shard) for shard in samples.shards])
    counts = np.diff(samples.shard_starts)
    sizes = samples.size_bytes[piped]
    if len(sizes) and config.shuffle_block >= counts[piped].max():
        # Blocks are whole shards: one window of them is read at a time, and the next one begun.
        sizes = np.sort(sizes)[-2 * config.shuffle_window :]
    needed_gib = float(sizes.sum()) / 2**30
    if needed_gib > config.pipe_cache_gib:
        refuse(
            "data.pipe_cache_gib",
            config.pipe_cache_gib,
            f"the pipe: shards that shuffling reads side by side take {needed_gib:.3g} GiB; give as much, or have "
            f"whole shards read in turn: data.shuffle_block: {counts[piped].max()} and a small data.shuffle_window",
        )
