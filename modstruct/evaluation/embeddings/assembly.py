"""From parts to the finished set, by the main process alone and in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.config.embedding import EmbeddingConfig
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.embedded_files import IMAGE_ARRAYS, TEXT_ARRAYS
from modstruct.evaluation.embeddings.embedded_set import write_embedded_set
from modstruct.evaluation.embeddings.parts import Parts
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.embeddings.texts import read_texts
from modstruct.evaluation.retrieval.distinct_captions import DistinctCaptions, at_places
from modstruct.files import atomic_write


class Assembly:
    """Puts the parts of one set together: `gather` when all images are embedded, `finish` when all texts are too."""

    def __init__(self, source: EmbeddingSource, pictures: Parts, captions_file: Path):
        self._source, self._images, self._captions_file = source, pictures, captions_file

    def gather(self, config: EmbeddingConfig) -> int:
        """Count what was read, and write the distinct captions to their file. Returns how many they are.

        Raises TooManyBadSamples above config.max_bad_share, ValueError where no image could be read.
        """
        ledger, captions = self._source.ledger(config), DistinctCaptions()
        total = len(self._source.samples)
        ledger.add(self._noted("faults"), total, say=False)  # who met them has said so
        for of_part in self._images.notes("captions"):
            captions.add(of_part)
        # The whole source was tried, so its share is exact, however small it is.
        ledger.check(ledger.bad, total, fewest=1)
        if ledger.bad == total:
            refuse("set", self._source.name, f"none of its {total} samples could be used: {ledger.summary()}")
        self._skipped = self._source.left_out_before() + ledger.counts
        places, self._pairs = captions.rows()
        with atomic_write(self._captions_file) as file:
            for caption in at_places(chain.from_iterable(self._noted("captions")), places):
                file.write((json.dumps(caption) + "\n").encode())
        return len(places)

    def finish(
        self,
        folder: Path,
        captions: Parts | None,
        prompts: Parts,
        arrays: Sequence[str],
        dtype: str,
        **manifest: Any,
    ) -> None:
        """Write the set of these arrays. captions: None where no texts are wanted. manifest: what else
        `write_embedded_set` takes."""
        source, pictures, kind = self._source, self._images, np.dtype(dtype)
        indices = self._column("indices")
        streams = {a: pictures.stream(a, len(indices), kind) for a in arrays if a in IMAGE_ARRAYS}
        texts: dict[str, Any] = {}
        if captions is not None:
            streams |= {a: captions.stream(a, captions.items, kind) for a in arrays if a in TEXT_ARRAYS}
            texts = {"pairs": self._pairs, "captions": read_texts(self._captions_file)}
        classes: dict[str, Any] = {}
        if source.class_names:
            shape = (len(source.class_names), len(source.templates), -1)
            rows = list(prompts.pieces("text"))
            classes = {
                "labels": self._column("labels"),
                "class_prompts": np.concatenate(rows).reshape(shape) if rows else None,
                "class_names": source.class_names,
                "templates": source.templates,
                "label": source.label_field,
            }
        write_embedded_set(
            folder,
            source.name,
            arrays=streams,
            indices=indices,
            keys=self._noted("keys"),
            metadata=self._noted("metadata"),
            source={"name": source.name, "fingerprint": source.fingerprint},
            skipped=dict(self._skipped),
            left_out=({"cause": cause, "where": where} for cause, where in self._noted("faults")),
            **texts,
            **classes,
            **manifest,
        )

    def _noted(self, name: str) -> Iterator[Any]:
        """The notes of this name, of all images."""
        return chain.from_iterable(self._images.notes(name))

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate(list(self._images.pieces(name)))
