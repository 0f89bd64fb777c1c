"""What a pass over a source's images made, as a set: rows in their order, copies of images last, equal captions one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, compress
from typing import Any

import numpy as np

from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import DIGEST
from modstruct.distributed import is_main
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.passes import Gathered
from modstruct.evaluation.embeddings.set_files import RowStream, merged_pairs
from modstruct.evaluation.embeddings.source import EmbeddingSource, at_places, distinct, distinct_captions, say_merged


def assembled(
    source: EmbeddingSource, images: Gathered, model: EmbeddingModel, config: EmbeddingConfig, arrays: Sequence[str]
) -> EmbeddedSet:
    """The set of a source, yet without embeddings of texts and class prompts.

    arrays: the embeddings of images. They and the lists are streams, which can be read once; of what the pass made they
    read a part at a time, twice where there are copies. Raises TooManyBadSamples above config.max_bad_share, ValueError
    where no image could be read.
    """
    counter, total = source.bad_sample_counter(config.max_bad_share), len(source.samples)
    counter.add(images.notes("faults"), total, say=False)  # the process that met them has reported them
    # The whole source was tried, so its fraction is exact, however small it is.
    counter.check(counter.bad, total, fewest=1)
    count = total - counter.bad
    if count == 0:
        cause = f"none of its {total} samples could be used: {counter.summary()}"
        refuse(source.field or "set", source.name, cause)

    copied, copies = np.zeros(count, dtype=bool), np.empty(0, dtype=np.int64)
    digests = np.concatenate([np.empty(0, dtype=DIGEST), *images.pieces("digests")])
    if len(digests) == count:  # those of every image are known
        first, image_row = distinct(digests)
        copied = ~np.isin(np.arange(count), first)
        copies = image_row[copied]
        if len(copies) and is_main():
            say_merged(source.described, count, len(first))
    places, pairs = distinct_captions(images.notes("captions"))
    rounds = (~copied, copied) if len(copies) else (~copied,)

    def notes(name: str) -> Iterator[Any]:
        return chain.from_iterable(compress(images.notes(name), kept) for kept in rounds)

    def pieces(name: str) -> Iterator[np.ndarray]:
        for kept in rounds:
            start = 0
            for piece in images.pieces(name):
                yield piece[kept[start : start + len(piece)]]
                start += len(piece)

    def stream(name: str) -> RowStream:
        return RowStream((count, *next(images.pieces(name)).shape[1:]), np.dtype(config.dtype), pieces(name))

    lists: dict[str, Any] = {"keys": notes("keys"), "metadata": notes("metadata")}
    lists["captions"] = at_places(chain.from_iterable(images.notes("captions")), places)
    return EmbeddedSet(
        source.name,
        model.described(),
        {name: stream(name) for name in arrays},
        pairs=merged_pairs(pairs, np.argsort(np.argsort(copied, kind="stable"))),
        copies=copies,
        indices=np.concatenate(list(pieces("indices"))),
        labels=np.concatenate(list(pieces("labels"))) if source.class_names else None,
        class_names=source.class_names,
        templates=source.templates,
        label_field=source.label_field,
        **lists,
        source={"name": source.name, "fingerprint": source.fingerprint},
        skipped=dict(source.left_out_before() + counter.counts),
        left_out=({"cause": cause, "where": where} for cause, where in images.notes("faults")),
    )
