"""A whole source embedded by all processes: images, captions, and which belong together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.evaluation_samples import DIGEST, EvaluationSamples, evaluation_loader
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.distributed import is_main, rank
from modstruct.distributed.collect import collect_rows, collect_values, my_batches
from modstruct.evaluation.embeddings.set_files import merged_pairs
from modstruct.evaluation.embeddings.source import (
    DistinctCaptions,
    at_places,
    distinct,
    left_out_when_indexed,
    say_merged,
)

Encode = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""A batch that holds "image" or "text" -> the fields of Embeddings that it allows: the engine in evaluation mode."""


@dataclass
class EmbeddedPairs:
    """Embedded images and captions, each distinct, and which belong together.

    image and text hold their rows on the main process only, and no rows elsewhere; the rest is the same everywhere.
    """

    image: np.ndarray
    """(n, D) float32."""
    text: np.ndarray
    """(m, D) float32; equal captions are one row."""
    pairs: np.ndarray
    """(p, 2) int64, (image row, text row) of each image and each of its captions, without repetition."""
    captions: list[str]
    """Caption of each text row."""


@dataclass
class EmbeddedSource(EmbeddedPairs):
    """Every distinct image and caption of a source's readable samples, in order of first appearance."""

    indices: np.ndarray
    """(n,) int64, number of each image in its EvaluationSamples, where it came first."""
    image_row: np.ndarray
    """(s,) int64, row of the image of each readable sample; several samples have one where images have equal bytes."""
    metadata: list[dict]
    """Of each readable sample, the requested fields that its metadata has."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples left out, by cause."""


@torch.no_grad()
def embed_source(
    encode: Encode,
    samples: EvaluationSamples,
    views: Views,
    tokenizer: Tokenizer,
    batch: int,
    device: torch.device,
    metadata_fields: Sequence[str] = (),
    field_name: str = "data.eval",
) -> EmbeddedSource:
    """Embed a source with all processes; every process calls this, and it returns on every process.

    batch: samples embedded at once by each process. device: where encode wants its batches; collectives run there too.
    metadata_fields: what to keep of each sample's metadata. field_name: the recipe's field of the source, for messages.
    Raises TooManyBadSamples, on all processes, above data.max_bad_share.
    """
    batches = math.ceil(len(samples) / batch)
    mine = my_batches(batches)
    read = _Read(BadSampleCounter(field_name, samples.config.max_bad_share, rank()), metadata_fields)
    numbers = range(mine.start * batch, min(mine.stop * batch, len(samples)))
    image = collect_rows(
        lambda images: encode({"image": images})["image"],
        read.images(evaluation_loader(samples, views, batch, numbers), device),
        torch.zeros((1, 3, views.image_size, views.image_size), dtype=torch.uint8, device=device),
        batches,
        batch,
        "embedding images",
    )
    everyone = _Read.joined(collect_values(read.values(), device))
    skipped = left_out_when_indexed(samples) + Counter(everyone["skipped"])
    # The whole source was tried, so its share is exact, however small it is.
    read.counter.check(sum(everyone["skipped"].values()), len(samples), fewest=1)
    if not everyone["indices"]:
        raise ValueError(f"{field_name}: none of its {len(samples)} samples could be used: {dict(skipped)}")

    indices = np.array(everyone["indices"], dtype=np.int64)
    first, image_row = distinct(everyone["digests"])
    if len(first) < len(indices):
        if is_main():
            say_merged(field_name, len(indices), len(first))
            image = image[first]
        indices = indices[first]
    texts = [[views.plain_text(caption) for caption in captions] for captions in everyone["captions"]]
    distinct_captions = DistinctCaptions()
    distinct_captions.add(texts)
    places, pairs = distinct_captions.rows()
    captions = list(at_places(chain.from_iterable(texts), places))
    return EmbeddedSource(
        image=image,
        text=embed_texts(encode, captions, tokenizer, batch, device, "embedding captions"),
        pairs=merged_pairs(pairs, image_row),
        indices=indices,
        image_row=image_row,
        captions=captions,
        metadata=everyone["metadata"],
        skipped=dict(skipped),
    )


@torch.no_grad()
def embed_texts(
    encode: Encode, texts: Sequence[str], tokenizer: Tokenizer, batch: int, device: torch.device, title: str
) -> np.ndarray:
    """Embed texts, the same list on every process, with all processes.

    Returns (len(texts), D) float32 on the main process, in order; (0, D) elsewhere. title: of the progress bar.
    """
    batches = math.ceil(len(texts) / batch)
    starts = (number * batch for number in my_batches(batches))
    return collect_rows(
        lambda ids: encode({"text": ids})["text"],
        (tokenizer(texts[start : start + batch]).to(device) for start in starts),
        tokenizer([""]).to(device),
        batches,
        batch,
        title,
    )


class _Read:
    """What one process reads of the samples besides the images' embeddings."""

    def __init__(self, counter: BadSampleCounter, metadata_fields: Sequence[str]):
        self.counter, self.metadata_fields = counter, metadata_fields
        self.indices: list[int] = []
        self.captions: list[list[str]] = []
        self.metadata: list[dict] = []
        self.digests: list[np.ndarray] = []

    def images(self, batches, device: torch.device) -> Iterator[Tensor]:
        """The images of each EvaluationBatch, the rest of it noted down."""
        for batch in batches:
            self.counter.add(batch.faults, batch.tried)
            self.indices += batch.indices.tolist()
            self.captions += batch.captions
            for metadata in batch.metadata:
                self.metadata.append({name: metadata[name] for name in self.metadata_fields if name in metadata})
            assert batch.digests is not None  # shards give the bytes of every image
            self.digests.append(batch.digests)
            yield batch.image.to(device)

    def values(self) -> dict:
        """All of it in plain JSON types."""
        return {
            "indices": self.indices,
            "captions": self.captions,
            "metadata": self.metadata,
            "digests": b"".join(digests.tobytes() for digests in self.digests).hex(),
            "skipped": dict(self.counter.counts),
        }

    @staticmethod
    def joined(parts: Sequence[dict]) -> dict:
        """The values of all processes, in order of rank, as one."""
        whole = {name: [item for part in parts for item in part[name]] for name in ("indices", "captions", "metadata")}
        digests = np.frombuffer(bytes.fromhex("".join(part["digests"] for part in parts)), dtype=DIGEST)
        skipped: Counter[str] = sum((Counter(part["skipped"]) for part in parts), Counter())
        return whole | {"digests": digests, "skipped": skipped}
