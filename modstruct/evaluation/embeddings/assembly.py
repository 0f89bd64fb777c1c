"""What a pass over a source's images made, in the order of a set's rows: copies of images last, equal captions one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, compress
from typing import Any

import numpy as np

from modstruct.data.shards.evaluation_samples import DIGEST
from modstruct.distributed import is_main
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.passes import Gathered
from modstruct.evaluation.embeddings.set_files import RowStream, merged_pairs
from modstruct.evaluation.embeddings.source import EmbeddingSource, at_places, distinct, distinct_captions, say_merged


class Assembly:
    """Arrays and lists of a set, read piece by piece.

    pairs: (p, 2), of all images. copies: as in EmbeddedSet. texts: number of distinct captions. skipped: samples left
    out, by cause.
    """

    def __init__(self, source: EmbeddingSource, images: Gathered, max_bad_share: float):
        """Raises TooManyBadSamples above max_bad_share, ValueError where no image could be read."""
        self._made, total = images, len(source.samples)
        counter = source.bad_sample_counter(max_bad_share)
        counter.add(images.notes("faults"), total, say=False)  # the process that met them has reported them
        # The whole source was tried, so its fraction is exact, however small it is.
        counter.check(counter.bad, total, fewest=1)
        if counter.bad == total:
            cause = f"none of its {total} samples could be used: {counter.summary()}"
            refuse(source.field or "set", source.name, cause)
        self.skipped = dict(source.left_out_before() + counter.counts)
        self.images = total - counter.bad
        self._copied, self.copies = np.zeros(self.images, dtype=bool), np.empty(0, dtype=np.int64)
        digests = np.concatenate([np.empty(0, dtype=DIGEST), *images.pieces("digests")])
        if len(digests) == self.images:  # those of every image are known
            first, image_row = distinct(digests)
            self._copied = ~np.isin(np.arange(self.images), first)
            self.copies = image_row[self._copied]
            if len(self.copies) and is_main():
                say_merged(source.described, self.images, len(first))
        self._places, pairs = distinct_captions(images.notes("captions"))
        self.texts = len(self._places)
        rows = np.argsort(np.argsort(self._copied, kind="stable"))
        self.pairs = merged_pairs(pairs, rows)

    def captions(self) -> Iterator[str]:
        """The distinct captions."""
        return at_places(chain.from_iterable(self._made.notes("captions")), self._places)

    def faults(self) -> Iterator[dict[str, str]]:
        """Of each sample left out, as left_out.jsonl has it."""
        return ({"cause": cause, "where": where} for cause, where in self._made.notes("faults"))

    def notes(self, name: str) -> Iterator[Any]:
        """A list of the images; what was made is read twice where there are copies, as it is for arrays."""
        if not len(self.copies):
            return self._made.notes(name)
        first = compress(self._made.notes(name), ~self._copied)
        return chain(first, compress(self._made.notes(name), self._copied))

    def column(self, array: str) -> np.ndarray:
        """A small array of the images."""
        return np.concatenate(list(self._pieces(array)))

    def stream(self, array: str, dtype: str) -> RowStream:
        """An array of the images."""
        width = next(self._made.pieces(array)).shape[1:]
        return RowStream((self.images, *width), np.dtype(dtype), self._pieces(array))

    def _pieces(self, array: str) -> Iterator[np.ndarray]:
        for last in (False, True) if len(self.copies) else (None,):
            start = 0
            for piece in self._made.pieces(array):
                yield piece if last is None else piece[self._copied[start : start + len(piece)] == last]
                start += len(piece)
