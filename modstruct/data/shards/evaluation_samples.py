"""Every sample of a source once and in order, for evaluation; and captions alone, for training a tokenizer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from modstruct.config import DataConfig, Source
from modstruct.data.faults import BadSample, or_bad
from modstruct.data.shards.ahead import read_ahead
from modstruct.data.shards.reader import RawSample, ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_samples
from modstruct.data.shards.texts import TEXT_FILE, texts_of
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.decoding import decode_image

FEW_PIPES = 8  # that are fetched where some samples are wanted and not all

DIGEST = np.dtype([("high", np.uint64), ("low", np.uint64)])
"""128 bits of BLAKE2b: of 10^9 contents, two would share them once in 10^20 sets."""


def digest_of(content: bytes) -> bytes:
    """What equal contents have in common, the bytes of one DIGEST."""
    return hashlib.blake2b(content, digest_size=DIGEST.itemsize).digest()


@dataclass
class EvaluationSample:
    """One image with all its captions."""

    image: Image.Image
    """Mode RGB, upright."""
    captions: list[str]
    metadata: dict
    key: str = ""
    """Name in the source; if empty, `key` of the metadata counts."""
    digest: bytes = b""
    """`digest_of` the image as it is stored; empty where it is not known: no other image is taken for its equal."""


@dataclass
class EvaluationBatch:
    """Some samples, without those that could not be read."""

    indices: Tensor
    """(B,) int64, number of each sample in its EvaluationSamples."""
    image: Tensor
    """(B, 3, H, W) uint8, Views.evaluation_image of each image."""
    captions: list[list[str]]
    """Captions of each image."""
    metadata: list[dict]
    """Content of each image's KEY.json."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(cause, where) of each sample left out."""
    keys: list[str] = field(default_factory=list)
    """Key of each image."""
    image_augmented: Tensor | None = None
    """As image, Views.augmented_image of each image; None without augmented_seed."""
    digests: np.ndarray | None = None
    """(B,) of DIGEST: EvaluationSample.digest of each image; None where one is not known."""

    @property
    def tried(self) -> int:
        """Samples read, those left out included."""
        return len(self.indices) + len(self.faults)


class EvaluationViews(Protocol):
    """From PIL images to what the image tower takes; pickles to loader workers. `augment.Views` is one."""

    image_size: int
    """Side in pixels."""

    def evaluation_image(self, image: Image.Image) -> Tensor:
        """(3, image_size, image_size)."""

    def augmented_image(self, image: Image.Image, seed: int) -> Tensor:
        """The same of a random view that is drawn from seed."""


class EvaluationSamples:
    """The samples of evaluation sources by number, in order of source, shard and place.

    field: the recipe's field that the sources came from. progress: as in open_samples, as are the errors.
    """

    def __init__(self, sources: Sequence[Source], config: DataConfig, field: str = "data.eval", progress: bool = False):
        self.samples: Samples = open_samples(sources, config, field, progress)
        self.fingerprint, self.config = self.samples.fingerprint, config
        self._reader = ShardReader(self.samples, config)

    @property
    def left_out(self) -> Counter[str]:
        """Samples, by cause, that opening the sources found unusable; they have no number."""
        return self.samples.left_out

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EvaluationSample:
        """The sample of this number. Raises BadSample if it cannot be used, IndexError beyond the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._decoded(self._reader.read(index))

    def read(self, indices: Sequence[int]) -> Iterator[EvaluationSample | BadSample]:
        """The samples of these numbers, or what is wrong with each; read ahead of their decoding."""
        for raw in read_ahead(self._reader, np.asarray(indices), self.config.read_ahead_mib * 2**20):
            yield raw if isinstance(raw, BadSample) else or_bad(self._decoded, raw)

    def _decoded(self, raw: RawSample) -> EvaluationSample:
        image = decode_image(raw.image, self.config.max_image_pixels, raw.where)
        return EvaluationSample(image, raw.captions, raw.metadata, raw.key, digest_of(raw.image))


class _EvaluationBatches(Dataset):
    """Map from a range of sample numbers to an EvaluationBatch."""

    def __init__(self, samples: EvaluationSamples, views: EvaluationViews, augmented_seed: int | None):
        self.samples, self.views, self.augmented_seed = samples, views, augmented_seed

    def __getitem__(self, indices: Sequence[int]) -> EvaluationBatch:
        kept, images, captions, metadata, faults, keys, augmented, digests = [], [], [], [], [], [], [], []
        for index, sample in zip(indices, self.samples.read(indices), strict=True):
            if isinstance(sample, BadSample):
                faults.append((sample.cause, sample.where))
                continue
            kept.append(index)
            images.append(self.views.evaluation_image(sample.image))
            if self.augmented_seed is not None:
                seed = sample_seed(self.augmented_seed, 0, index, "image_augmented")
                augmented.append(self.views.augmented_image(sample.image, seed))
            captions.append(sample.captions)
            metadata.append(sample.metadata)
            keys.append(sample.key or str(sample.metadata.get("key", index)))
            digests.append(sample.digest)
        side = self.views.image_size
        return EvaluationBatch(
            indices=torch.tensor(kept, dtype=torch.int64),
            image=torch.stack(images) if images else torch.empty((0, 3, side, side), dtype=torch.uint8),
            captions=captions,
            metadata=metadata,
            faults=faults,
            keys=keys,
            image_augmented=torch.stack(augmented) if augmented else None,
            digests=np.frombuffer(b"".join(digests), dtype=DIGEST) if all(digests) else None,
        )


def evaluation_loader(
    samples: EvaluationSamples,
    views: EvaluationViews,
    batch: int,
    indices: Sequence[int] | None = None,
    augmented_seed: int | None = None,
    workers: int | None = None,
) -> WorkerLoader:
    """Loader of EvaluationBatches of `batch` samples each (fewer where some are bad, and in the last).

    indices: numbers of the samples, such as one process's share;
    None for all. augmented_seed: makes an augmented view of each image too, drawn from this seed and its
    number. workers: loader processes; None for the samples' data.workers.
    """
    indices = range(len(samples)) if indices is None else indices
    chunks = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    workers = min(samples.config.workers if workers is None else workers, len(chunks))
    dataset = _EvaluationBatches(samples, views, augmented_seed)
    return WorkerLoader(dataset, chunks, workers)


def train_captions(samples: Samples, config: DataConfig, limit: int) -> Iterator[str]:
    """Captions of `spaced` samples, `limit` at most, always the same; bad ones are left out.

    Where lines are captions, a sample gives as many as the limit allows, at least one, and not always its first ones.
    With data.caption_fields it has the texts of each field.
    """
    fields = config.caption_fields or {TEXT_FILE: 1.0}
    reader, numbers = ShardReader(samples, config), list(spaced(samples, limit))
    of_sample = limit // max(len(numbers), 1)

    def texts_of_sample(number: int) -> tuple[str, ...]:
        texts = reader.texts(number) if fields.get(TEXT_FILE) else ()
        metadata = reader.metadata(number) if fields.keys() - {TEXT_FILE} else {}
        texts += tuple(text for name in sorted(fields) if fields[name] for text in texts_of(metadata, name))
        return texts or reader.texts(number)

    for number, texts in reader.each(texts_of_sample, numbers):
        first = number % len(texts)
        yield from (texts[first:] + texts[:first])[:of_sample]


def spaced(samples: Samples, limit: int) -> Iterator[int]:
    """Numbers of up to `limit` samples, evenly spaced and ascending.

    Only eight `pipe:` shards, evenly spaced, have a part in it, because each is fetched whole.
    """
    counts = np.diff(samples.shard_starts)
    pipes = np.flatnonzero(samples.piped())
    if len(pipes) > FEW_PIPES:
        chosen = pipes[np.arange(FEW_PIPES) * len(pipes) // FEW_PIPES]
        counts[np.setdiff1d(pipes, chosen)] = 0
    ends = np.cumsum(counts)
    total = int(ends[-1])
    taken = min(limit, total)
    for place in (np.arange(taken) * total // max(taken, 1)).tolist():
        shard = int(np.searchsorted(ends, place, side="right"))
        yield int(samples.shard_starts[shard] + place - (ends[shard] - counts[shard]))
