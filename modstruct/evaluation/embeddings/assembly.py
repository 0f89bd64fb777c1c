"""What one pass over a source's images made, joined into a set: equal captions are one, copies of images come last."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, compress
from typing import Any

import numpy as np

from modstruct.data.shards.evaluation_samples import DIGEST
from modstruct.distributed import is_main
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.passes import Made, stream_of
from modstruct.evaluation.embeddings.set_files import RowStream, merged_pairs
from modstruct.evaluation.embeddings.source import (
    EmbeddingSource,
    at_places,
    distinct,
    distinct_captions,
    say_merged,
)

log = logging.getLogger(__name__)


class Assembly:
    """The order of a set's rows, and its arrays and lists in that order, read piece by piece.

    pairs: (p, 2) of all images. copies: as in EmbeddedSet. texts: number of distinct captions. skipped: samples left
    out, by cause.
    """

    def __init__(self, source: EmbeddingSource, images: Made, max_bad_share: float):
        """Raises TooManyBadSamples above max_bad_share, ValueError where no image could be read."""
        self._images = images
        counter, total = source.bad_sample_counter(max_bad_share), len(source.samples)
        counter.add(images.notes("faults"), total, say=False)  # the process that met them has reported them
        # The whole source was tried, so its fraction is exact, however small it is.
        counter.check(counter.bad, total, fewest=1)
        if counter.bad == total:
            refuse(
                source.field or "set", source.name, f"none of its {total} samples could be used: {counter.summary()}"
            )
        self.skipped = dict(source.left_out_before() + counter.counts)
        self.images = total - counter.bad
        self._places, pairs = distinct_captions(images.notes("captions"))
        self.texts = len(self._places)
        self.copies, self._copied = self._find_copies(source)
        order = np.argsort(self._copied, kind="stable")
        rows = np.empty(self.images, dtype=np.int64)
        rows[order] = np.arange(self.images)
        self.pairs = merged_pairs(pairs, rows)

    def _find_copies(self, source: EmbeddingSource) -> tuple[np.ndarray, np.ndarray]:
        """Rows that the copies are copies of, (c,), and (n,) whether each image is a copy of an earlier one."""
        digests = np.concatenate([np.empty(0, dtype=DIGEST), *self._images.pieces("digests")])
        copied = np.zeros(self.images, dtype=bool)
        if len(digests) < self.images:
            if self.texts:
                log.warning(
                    "%s: %d of %d images were embedded by an earlier version, and equal images are not merged; "
                    "--embedding.overwrite true embeds the set again",
                    source.described,
                    self.images - len(digests),
                    self.images,
                )
            return np.empty(0, dtype=np.int64), copied
        first, image_row = distinct(digests)
        copied[:] = True
        copied[first] = False
        if copied.any() and is_main():
            say_merged(source.described, self.images, len(first))
        return image_row[copied], copied

    def captions(self) -> Iterator[str]:
        """The distinct captions."""
        return at_places(chain.from_iterable(self._images.notes("captions")), self._places)

    def notes(self, name: str) -> Iterator[Any]:
        """A list of the images; what was made is read twice where there are copies."""
        if not len(self.copies):
            return self._images.notes(name)
        of_copies = compress(self._images.notes(name), self._copied)
        return chain(compress(self._images.notes(name), ~self._copied), of_copies)

    def faults(self) -> Iterator[dict[str, str]]:
        return ({"cause": cause, "where": where} for cause, where in self._images.notes("faults"))

    def column(self, array: str) -> np.ndarray:
        """A small array of the images."""
        return np.concatenate(list(self._pieces(array)))

    def stream(self, array: str, dtype: str) -> RowStream:
        """An array of the images."""
        return replace(stream_of(self._images, array, self.images, dtype), pieces=self._pieces(array))

    def _pieces(self, array: str) -> Iterator[np.ndarray]:
        for copies in (False, True) if len(self.copies) else (None,):
            start = 0
            for piece in self._images.pieces(array):
                yield piece if copies is None else piece[self._copied[start : start + len(piece)] == copies]
                start += len(piece)
