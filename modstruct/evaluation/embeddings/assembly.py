"""Parts of an embedded set joined into its contents, in bounded memory: equal captions are one, copies come last."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import DIGEST
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.embedded_set import SetContents
from modstruct.evaluation.embeddings.parts import Parts, read_texts
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS, merged_pairs
from modstruct.evaluation.embeddings.source import DistinctCaptions, EmbeddingSource, at_places, distinct, say_merged
from modstruct.files import atomic_write

log = logging.getLogger(__name__)


class Assembly:
    """Joins the parts of one set: `gather` when all images are embedded, `contents` when all texts are too."""

    def __init__(self, source: EmbeddingSource, images: Parts, captions_file: Path):
        self._source, self._images, self._captions_file = source, images, captions_file

    def gather(self, config: EmbeddingConfig) -> int:
        """Count what was read, find copies, and write the distinct captions to their file. Returns how many they are.

        Raises TooManyBadSamples above config.max_bad_share, ValueError where no image could be read.
        """
        counter, captions = self._source.bad_sample_counter(config), DistinctCaptions()
        total = len(self._source.samples)
        counter.add(self._noted("faults"), total, say=False)  # the process that met them has reported them
        for of_part in self._images.notes("captions"):
            captions.add(of_part)
        # The whole source was tried, so its share is exact, however small it is.
        counter.check(counter.bad, total, fewest=1)
        if counter.bad == total:
            refuse("set", self._source.name, f"none of its {total} samples could be used: {counter.summary()}")
        self._skipped = self._source.left_out_before() + counter.counts
        places, pairs = captions.rows()
        self._pairs = merged_pairs(pairs, self._put_copies_last(total - counter.bad, len(places) > 0))
        with atomic_write(self._captions_file) as file:
            for caption in at_places(chain.from_iterable(self._noted("captions")), places):
                file.write((json.dumps(caption) + "\n").encode())
        return len(places)

    def _put_copies_last(self, samples: int, captioned: bool) -> np.ndarray:
        """Find the images of equal bytes, and the row that each of the readable samples gets, (samples,)."""
        digests = np.concatenate([np.empty(0, dtype=DIGEST), *self._images.pieces("digests")])
        self._copied, self._copies = np.zeros(samples, dtype=bool), np.empty(0, dtype=np.int64)
        if len(digests) == samples:
            first, image_row = distinct(digests)
            self._copied[:] = True
            self._copied[first] = False
            self._copies = image_row[self._copied]
        elif captioned:
            log.warning(
                "set %s: %d of %d images were embedded by an earlier version, and equal images are not merged; "
                "--embedding.overwrite true embeds the set again",
                self._source.name,
                samples - len(digests),
                samples,
            )
        if len(self._copies):
            say_merged(f"set {self._source.name}", samples, samples - len(self._copies))
        rows = np.empty(samples, dtype=np.int64)
        rows[np.concatenate([np.flatnonzero(~self._copied), np.flatnonzero(self._copied)])] = np.arange(samples)
        return rows

    def contents(
        self, model: dict[str, Any], captions: Parts | None, prompts: Parts, arrays: Sequence[str], dtype: str
    ) -> SetContents:
        """The set of these arrays, most of it as streams. captions: None where no texts are wanted."""
        source, kind = self._source, np.dtype(dtype)
        indices = self._column("indices")
        streams = {
            a: replace(self._images.stream(a, len(indices), kind), pieces=self._pieces(a))
            for a in arrays
            if a in IMAGE_ARRAYS
        }
        made = SetContents(
            source.name,
            model,
            streams,
            copies=self._copies if len(self._copies) else None,
            indices=indices,
            keys=self._copies_last("keys"),
            metadata=self._copies_last("metadata"),
            source={"name": source.name, "fingerprint": source.fingerprint},
            skipped=dict(self._skipped),
            left_out=({"cause": cause, "where": where} for cause, where in self._noted("faults")),
        )
        if captions is not None:
            streams |= {a: captions.stream(a, captions.items, kind) for a in arrays if a in TEXT_ARRAYS}
            made.pairs, made.captions = self._pairs, read_texts(self._captions_file)
        if source.class_names:
            made.class_names, made.templates, made.label = source.class_names, source.templates, source.label_field
            made.labels = self._column("labels")
            rows = list(prompts.pieces("text"))
            if rows:
                made.class_prompts = np.concatenate(rows).reshape(len(source.class_names), len(source.templates), -1)
        return made

    def _noted(self, name: str) -> Iterator[Any]:
        """The notes of this name, of all images."""
        return chain.from_iterable(self._images.notes(name))

    def _copies_last(self, name: str) -> Iterator[Any]:
        """The notes of this name in the order of rows."""
        if not len(self._copies):
            return self._noted(name)
        return chain(compress(self._noted(name), ~self._copied), compress(self._noted(name), self._copied))

    def _pieces(self, name: str) -> Iterator[np.ndarray]:
        """An array of the images, in the order of rows; the parts are read twice where there are copies."""
        if not len(self._copies):
            yield from self._images.pieces(name)
            return
        for copies in (False, True):
            start = 0
            for piece in self._images.pieces(name):
                yield piece[self._copied[start : start + len(piece)] == copies]
                start += len(piece)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate(list(self._pieces(name)))
