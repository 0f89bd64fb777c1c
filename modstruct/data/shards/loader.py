"""Training batches: step s -> this process's rows of the global batch of step s, whole or in micro-batches."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from modstruct import distributed
from modstruct.config import DataConfig
from modstruct.data.faults import BadSample, TooManyBadSamples, or_bad
from modstruct.data.shards.ahead import ComingShards, PipesAhead, ReadAhead
from modstruct.data.shards.grouped_order import GroupedOrder, require_groups
from modstruct.data.shards.image_rows import FinishedRows, ImageRows, RowsForDevice
from modstruct.data.shards.order import Order, SampleOrder
from modstruct.data.shards.reader import RawSample, ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.texts import TEXT_FILE, texts_of
from modstruct.data.shards.workers import OutgoingRows, WorkerLoader
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import BITS, Views, sample_seed
from modstruct.data.transforms.decoding import decode_reduced
from modstruct.data.transforms.text_views import mask_tokens, masked_places
from modstruct.errors import refuse, require

EXTRA_FIELDS = frozenset(
    {"image_augmented", "text_augmented", "text_masked", "masked_labels", "image_id", "text_id", "slot", "patch_seed"}
)
"""What a batch may hold beside image and text. image_augmented, text_augmented: as these, of the augmented view.
text_masked (B, L): the caption with masked tokens, and masked_labels (B, L): the true ids there, else -100; with it
comes masked_places (M, 2): where these are, so that no GPU is asked how many. image_id, text_id (B,): equal where two
pairs have the same image, or the same caption. slot (B,): position in the data order. patch_seed (B,): draws the
patches that a ViT leaves out; steps from BatchPlan.unmasked_from on have none."""

# Where nine tenths of a source are bad, 200 substitutes in a row fail once in 10^9 slots.
SUBSTITUTES = 200
# Of the pipe cache: what the coming steps need; the rest holds what the steps at hand still read.
SHARE_AHEAD = 0.5
BAD_SAMPLES, FALLBACKS = "bad_samples", "caption_fallbacks"
Seeds = dict[str, int]
"""Of each random view of a sample."""
RANDOM_VIEWS = ("image", "image_augmented", "text_augmented", "text_masked")
CAPTION = "caption"
"""The draw of one of several texts: lines of KEY.txt, where each is a caption, or a list in KEY.json."""
CAPTION_FIELD = "caption_field"
"""The draw of data.caption_fields."""


@dataclass
class TrainBatch:
    """One process's rows of one step, or a micro-batch of them, with the bad samples met on the way."""

    tensors: dict[str, Tensor]
    """image uint8 (B, 3, H, W), text int64 (B, L), and any of EXTRA_FIELDS. With views.on `device`, in place of image
    and image_augmented, image_pixels and the views' draws (transforms/device_views.py)."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(cause, where) of each bad sample that was substituted."""
    tried: int = 0
    """Samples read, substitutes included."""
    sources: list[int] = field(default_factory=list)
    """Of each row, the number of its source, where there are several."""
    counts: Counter[str] = field(default_factory=Counter)
    """What else is counted, by names of `counted`."""

    def pinned(self) -> TrainBatch:
        """A copy whose transfer to the GPU is asynchronous."""
        return replace(self, tensors={name: rows.pin_memory() for name, rows in self.tensors.items()})


@dataclass(frozen=True)
class BatchContents:
    """What training batches hold."""

    views: Views
    tokenizer: Tokenizer
    fields: Collection[str] = ()
    """The subset of EXTRA_FIELDS that the model needs."""
    masked_rate: float = 0.15
    """Share of a caption's tokens that text_masked masks."""


@dataclass(frozen=True)
class BatchPlan:
    """Which batches a loader makes: those of the steps start_step … stop_step - 1."""

    global_batch: int
    seed: int
    """Of the order of samples and of their views."""
    start_step: int
    stop_step: int
    micro_batch: int | None = None
    """Rows of a TrainBatch at most, so that a step comes in several; None for one a step."""
    unmasked_from: int = 0
    """The first step that takes all patches of its images."""


class LocalBatches(Dataset[TrainBatch]):
    """Map from s * parts + i to the i-th part of step s, a TrainBatch of at most `micro_batch` rows.

    Row r of the global batch of step s is slot s * global_batch + r of `order`; process p of W has the rows
    [p B / W, (p + 1) B / W), cut into equal parts but for the last.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: DataConfig,
        contents: BatchContents,
        plan: BatchPlan,
        process: int,
        processes: int,
    ):
        batch = plan.global_batch
        require(
            batch % processes == 0,
            "train.global_batch",
            batch,
            f"must be a multiple of the {processes} processes, such as {max(batch // processes, 1) * processes}",
        )
        require_groups(config.groups, batch, processes)
        self.reader, self.config, self.plan = reader, config, plan
        self.views, self.tokenizer = contents.views, contents.tokenizer
        self.fields, self.masked_rate = frozenset(contents.fields), contents.masked_rate
        self.text_field = self.views.text_field if "text_augmented" in self.fields else None
        self.image_views = [name for name in ("image", "image_augmented") if name in self.fields | {"image"}]
        self.rows = batch // processes
        self.part_rows = min(plan.micro_batch or self.rows, self.rows)
        self.parts = math.ceil(self.rows / self.part_rows)
        self.local_rows = process * self.rows + np.arange(self.rows)
        several = any(reader.samples.caption_lines) or config.caption_fields
        self.draws = (
            *RANDOM_VIEWS,
            *([CAPTION] if several else []),
            *([CAPTION_FIELD] if config.caption_fields else []),
        )
        self._caption_fields = sorted((config.caption_fields or {}).items())
        self._caption_ends = np.cumsum([weight for _, weight in self._caption_fields])
        starts = reader.samples.shard_starts[reader.samples.source_starts[1:-1]]
        self.source_starts = starts.tolist()
        """Numbers of the first samples of the second and each further source."""
        self._outgoing = OutgoingRows()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("order", "_ahead", "_pipes_ahead")}

    @cached_property
    def order(self) -> Order:
        """Made in each process that uses it: that is quicker than sending it."""
        return train_order(self.reader.samples, self.config, self.plan.seed, self.plan.global_batch)

    @cached_property
    def _pipes_ahead(self) -> PipesAhead | None:
        samples = self.reader.samples
        piped = samples.piped()
        if not piped.any():
            return None

        def shards_of(step: int) -> list[int]:
            _, numbers = self.order.locate(step * self.plan.global_batch + self.local_rows)
            found = np.unique(samples.shard_starts.searchsorted(numbers, side="right") - 1)
            return found[piped[found]].tolist()

        sharing = 1 if self.config.groups == 1 else distributed.local_world_size()
        room_bytes = self.config.pipe_cache_gib * 2**30 * SHARE_AHEAD / sharing
        coming = ComingShards(shards_of, samples.size_bytes, room_bytes, self.plan.stop_step)
        return PipesAhead(coming, self.reader.pipes, samples.shards)

    def __getitem__(self, index: int) -> TrainBatch:
        step = index // self.parts
        if self._pipes_ahead is not None:
            self._pipes_ahead.advance(step)
        slots, epochs, samples = self._located(index)
        batch = TrainBatch({})
        images = self._image_rows(len(slots))
        captions, augmented, drawn, image_ids = [], [], [], []
        places = zip(slots.tolist(), samples.tolist(), strict=True)
        read = zip(places, self._ahead.read(index, len(slots)), self._seeds(epochs, samples), strict=True)
        for place, raw, seeds in read:
            raw, seeds, text = self._pair(*place, raw, seeds, images, batch)
            captions.append(self._caption(raw, seeds, batch))
            augmented.append(text)
            drawn.append(seeds)
            if "image_id" in self.fields:
                image_ids.append(identity(raw.image))
        batch.tensors = images.tensors() | self._text_views(captions, augmented, drawn)
        if image_ids:
            batch.tensors["image_id"] = torch.tensor(image_ids)
        if "text_id" in self.fields:
            text_ids = [identity(caption.encode(errors="surrogatepass")) for caption in captions]
            batch.tensors["text_id"] = torch.tensor(text_ids)
        if "slot" in self.fields:
            batch.tensors["slot"] = torch.from_numpy(slots)
        if "patch_seed" in self.fields and index // self.parts < self.plan.unmasked_from:
            patch_seeds = sample_seed(self.plan.seed, epochs, samples, "patches")
            batch.tensors["patch_seed"] = torch.from_numpy(patch_seeds.astype(np.int64))
        batch.tensors = self._outgoing.sent(batch.tensors)
        return batch

    def _text_views(
        self, captions: Sequence[str], augmented: Sequence[str], seeds: Sequence[Seeds]
    ) -> dict[str, Tensor]:
        texts = {"text": [self.views.plain_text(caption) for caption in captions]}
        if "text_augmented" in self.fields:
            drawn = [seeds_of_row["text_augmented"] for seeds_of_row in seeds]
            of_eda = self.text_field is None
            texts["text_augmented"] = [*map(self.views.augmented_text, captions, drawn)] if of_eda else [*augmented]
        ids = self.tokenizer([text for texts_of_view in texts.values() for text in texts_of_view])
        views = dict(zip(texts, ids.split(len(captions)), strict=True))
        if "text_masked" in self.fields:
            drawn = [seeds_of_row["text_masked"] for seeds_of_row in seeds]
            masked, labels = mask_tokens(views["text"], drawn, self.masked_rate, self.tokenizer)
            views |= {"text_masked": masked, "masked_labels": labels, "masked_places": masked_places(labels)}
        return views

    @cached_property
    def _ahead(self) -> ReadAhead:
        worker = get_worker_info()  # loader processes take items in turn
        stride = 1 if worker is None else worker.num_workers
        room_bytes, stop = self.config.read_ahead_mib * 2**20, self.plan.stop_step * self.parts
        # Pipes lie on the local disk, each no longer than the steps at hand need it.
        beyond = self._pipes_ahead is None
        return ReadAhead(self.reader, lambda item: self._located(item)[2], room_bytes, stride, stop, beyond)

    def _located(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, epochs and samples of an item, each (rows,)."""
        step, part = divmod(item, self.parts)
        rows = self.local_rows[part * self.part_rows : (part + 1) * self.part_rows]
        slots = step * self.plan.global_batch + rows
        return slots, *self.order.locate(slots)

    def _seeds(self, epochs: np.ndarray, samples: np.ndarray) -> list[Seeds]:
        columns = [sample_seed(self.plan.seed, epochs, samples, name).tolist() for name in self.draws]
        return [dict(zip(self.draws, seeds, strict=True)) for seeds in zip(*columns, strict=True)]

    def _caption(self, raw: RawSample, seeds: Seeds, batch: TrainBatch) -> str:
        if self._caption_fields:
            ends = self._caption_ends
            place = ends.searchsorted(seeds[CAPTION_FIELD] / 2**BITS * ends[-1], side="right")
            drawn = self._caption_fields[int(place)][0]
            if drawn != TEXT_FILE:
                texts = texts_of(raw.metadata, drawn)
                if texts:
                    return texts[seeds[CAPTION] % len(texts)]
                batch.counts[FALLBACKS] += 1
        return raw.drawn_caption(seeds.get(CAPTION, 0))

    def _pair(
        self,
        slot: int,
        sample: int,
        raw: RawSample | BadSample,
        seeds: Seeds,
        images: ImageRows,
        batch: TrainBatch,
    ) -> tuple[RawSample, Seeds, str]:
        """The slot's sample, or its first usable substitute, with its seeds and the text of the field that augmented
        captions come from, if they do; adds its image.

        sample, raw, seeds: of the slot's own sample. Sources and bad samples are noted in the batch.
        """
        for attempt in range(1, SUBSTITUTES + 2):
            batch.tried += 1
            source = bisect_right(self.source_starts, sample)
            try:
                if isinstance(raw, BadSample):
                    raise raw
                text = "" if self.text_field is None else raw.drawn_text(self.text_field, seeds["text_augmented"])
                self._add_image(raw, seeds, images)
                if self.source_starts:
                    batch.sources.append(source)
                return raw, seeds, text
            except BadSample as bad:
                batch.faults.append((bad.cause, bad.where))
                batch.counts[f"{BAD_SAMPLES}/{self.reader.samples.names[source]}"] += 1
            epoch, sample = self.order.substitute(slot, attempt)
            raw, (seeds,) = or_bad(self.reader.read, sample), self._seeds(np.array([epoch]), np.array([sample]))
        raise TooManyBadSamples(
            f"{SUBSTITUTES + 1} samples in a row cannot be used, the last: {': '.join(batch.faults[-1])}; "
            "repair the shards"
        )

    def _image_rows(self, rows: int) -> ImageRows:
        if self.views.on_device:
            return RowsForDevice(self.views, self.image_views, rows, self._outgoing)
        return FinishedRows(self.views, self.image_views, rows, self._outgoing)

    def _add_image(self, raw: RawSample, seeds: Seeds, images: ImageRows) -> None:
        plain, augmented = seeds["image"], seeds["image_augmented"] if "image_augmented" in self.fields else None

        def factor(size: tuple[int, int]) -> int:
            return self.views.reduction(size, plain, augmented) if self.config.scaled_decoding else 1

        image, whole = decode_reduced(raw.image, self.config.max_image_pixels, raw.where, factor)
        images.add(image, whole, plain, augmented)


def counted(samples: Samples, config: DataConfig) -> list[str]:
    """Names of what TrainBatch.counts may hold: bad_samples/SOURCE where there are several sources, caption_fallbacks
    (captions that KEY.txt stands in for) with data.caption_fields."""
    of_sources = [f"{BAD_SAMPLES}/{name}" for name in samples.names] if len(samples.names) > 1 else []
    return [*of_sources, *([FALLBACKS] if config.caption_fields else [])]


def identity(content: bytes) -> int:
    """A number of 63 bits, equal for equal bytes, rarely for others."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def train_order(samples: Samples, config: DataConfig, seed: int, global_batch: int) -> Order:
    """The order by data.order_version, data.groups, data.shuffle_block, data.shuffle_window, the sources' weights and
    max_repeats, train.seed and, where there are groups, train.global_batch. Raises ValueError, naming the field."""
    block, window, weights, most = config.shuffle_block, config.shuffle_window, samples.weights, samples.max_repeats
    if config.order_version == 1:
        return SampleOrder(samples.shard_sizes(), seed, block, window, weights, most)
    starts = samples.shard_starts, samples.source_starts
    return GroupedOrder(*starts, seed, block, window, weights, config.groups, global_batch, most)


def train_loader(
    samples: Samples,
    config: DataConfig,
    contents: BatchContents,
    plan: BatchPlan,
    process: int | None = None,
    processes: int | None = None,
) -> WorkerLoader[TrainBatch]:
    """Loader of the plan's TrainBatches; any start is as quick as the first. `steps_of` groups the parts of a step.

    process, processes: rank of this process and their number, by default those of torch.distributed. Raises ValueError
    if global_batch is no multiple of the number of processes, if these cannot share the groups, or if pipes do not fit
    their cache.
    """
    processes = distributed.world_size() if processes is None else processes
    dataset = LocalBatches(
        reader=ShardReader(samples, config),
        config=config,
        contents=contents,
        plan=plan,
        process=distributed.rank() if process is None else process,
        processes=processes,
    )
    _require_pipe_room(samples, config, min(1.0, distributed.local_world_size() / processes))
    items = range(plan.start_step * dataset.parts, plan.stop_step * dataset.parts)
    return WorkerLoader(dataset, items, config.workers, parts=dataset.parts)


def steps_of(loader: WorkerLoader[TrainBatch]) -> Iterator[list[TrainBatch]]:
    """The parts of one step after the other."""
    parts = []
    for batch in loader:
        parts.append(batch)
        if len(parts) == loader.parts:
            yield parts
            parts = []


def _require_pipe_room(samples: Samples, config: DataConfig, host_share: float) -> None:
    """Refuse a pipe cache that shuffled reading would thrash. host_share: of the processes, those of this host."""
    piped = samples.piped()
    if not piped.any():
        return
    counts, sizes = np.diff(samples.shard_starts)[piped], np.sort(samples.size_bytes[piped])
    groups = math.ceil(config.groups * host_share)
    if config.shuffle_block >= counts.max():
        # Blocks are whole shards: one window of them is read at a time, while the next begins.
        of_window = config.shuffle_window
        if config.order_version == 2:  # windows are equally long, and reach into two more shards
            of_window = math.ceil(of_window * config.shuffle_block / counts.mean()) + 2
        together = 2 * of_window * groups
    else:
        together = math.ceil(len(sizes) * groups / config.groups) + groups
    needed_gib = float(sizes[-together:].sum()) / 2**30
    if needed_gib > config.pipe_cache_gib:
        refuse(
            "data.pipe_cache_gib",
            config.pipe_cache_gib,
            f"the pipe: shards that shuffling reads side by side take {needed_gib:.3g} GiB; give as much, or have "
            f"whole shards read in turn: data.shuffle_block: {counts.max()} and a small data.shuffle_window",
        )
