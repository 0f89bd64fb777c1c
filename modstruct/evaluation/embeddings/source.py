"""What is embedded: images with captions, images with classes, or both; equal captions are one text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modstruct.config.training import EmbeddingConfig
from modstruct.data.classification.class_files import ZeroShotClasses
from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.set_files import is_set_name

LABEL = "label"
"""Field of a labelled set's metadata that holds the number of the class."""


@dataclass(frozen=True)
class EmbeddingSource:
    """A set by name. samples: EvaluationSamples, or any `LabelledImages`; classes: of either, or None."""

    name: str
    samples: Any
    fingerprint: str
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    classes: ZeroShotClasses | None = None
    """Of captioned samples, whose metadata hold labels of their own."""

    def __post_init__(self):
        require(
            is_set_name(self.name),
            "set",
            self.name,
            "a name of letters, digits, - _ . and +, since a folder is called by it",
        )
        require(len(self.samples) > 0, "set", self.name, "holds no samples")

    @classmethod
    def of_samples(
        cls, name: str, samples: EvaluationSamples, classes: ZeroShotClasses | None = None
    ) -> EmbeddingSource:
        """Captioned images; classes: of a zero-shot file, for the samples whose metadata have its label."""
        if classes is None:
            return cls(name, samples, samples.samples.fingerprint)
        names = tuple(classes.classes.values())
        return cls(name, samples, samples.samples.fingerprint, names, classes.templates, classes)

    @classmethod
    def of_labelled(cls, images: Any) -> EmbeddingSource:
        """A set of labelled images (modstruct.data.classification)."""
        return cls(images.name, images, images.fingerprint, tuple(images.classes), tuple(images.templates))

    @property
    def label_field(self) -> str | None:
        """Field of the metadata that holds the label."""
        return self.classes.label if self.classes else (LABEL if self.class_names else None)

    @property
    def prompts(self) -> list[str]:
        """Every class name in every template, class by class."""
        return [template.replace("{}", name) for name in self.class_names for template in self.templates]

    @property
    def classes_fingerprint(self) -> str | None:
        """Of names, templates and label; None without classes."""
        if not self.class_names:
            return None
        about = [self.class_names, self.templates, self.label_field, self.classes and list(self.classes.classes)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def labels_of(self, metadata: Sequence[dict]) -> np.ndarray:
        """Class row of each image, (n,) int64, -1 for none. Raises ValueError for one that is no class."""
        if self.classes is not None:
            return self.classes.rows_of(metadata)
        labels = [fields.get(LABEL) for fields in metadata]
        for label in labels:
            if label is not None and not -1 <= label < len(self.class_names):
                refuse(f"label of set {self.name}", label, f"must be one of the {len(self.class_names)} classes, or -1")
        return np.array([-1 if label is None else int(label) for label in labels], dtype=np.int64)

    def bad_sample_counter(self, config: EmbeddingConfig, process: int = 0) -> BadSampleCounter:
        """For counting its unreadable images."""
        return BadSampleCounter(f"set {self.name}", config.max_bad_share, process, "embedding.max_bad_share")

    def left_out_before(self) -> Counter[str]:
        """Samples, by cause, that indexing found unusable; they are not among `samples`."""
        return left_out_when_indexed(self.samples) if isinstance(self.samples, EvaluationSamples) else Counter()


DIGEST = np.dtype([("high", np.uint64), ("low", np.uint64)])


class DistinctCaptions:
    """Text rows and pairs of captions that come image by image; keeps 24 bytes a caption, not the texts.

    Texts are told apart by 128 bits of BLAKE2b: of 10^9 texts, two would share them once in 10^20 sets.
    """

    def __init__(self):
        self._digests: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, captions: Iterable[Sequence[str]]) -> None:
        """The captions of each of the next images."""
        captions = list(captions)
        texts = (text.encode(errors="surrogatepass") for of_image in captions for text in of_image)
        digests = b"".join(hashlib.blake2b(text, digest_size=DIGEST.itemsize).digest() for text in texts)
        self._digests.append(np.frombuffer(digests, dtype=DIGEST))
        self._counts.append(np.array([len(of_image) for of_image in captions], dtype=np.int64))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and pairs.

        places: (m,) int64, the place, among all captions added, at which each distinct one came first, in this order.
        pairs: (p, 2) int64, (image, text row) of each image and each of its captions, sorted, without repetition.
        """
        digests = np.concatenate([np.empty(0, dtype=DIGEST), *self._digests])
        counts = np.concatenate([np.empty(0, dtype=np.int64), *self._counts])
        _, first, distinct = np.unique(digests, return_index=True, return_inverse=True)
        order = np.argsort(first)
        row = np.empty(len(first), dtype=np.int64)
        row[order] = np.arange(len(first))
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), row[distinct.reshape(-1)]], axis=1)
        return first[order].astype(np.int64), np.unique(pairs, axis=0).reshape(-1, 2).astype(np.int64)


def at_places(texts: Iterable[str], places: np.ndarray) -> Iterator[str]:
    """Of texts one after the other those at places, which rise."""
    wanted = iter(places.tolist())
    place = next(wanted, None)
    for number, text in enumerate(texts):
        if number == place:
            yield text
            place = next(wanted, None)


def left_out_when_indexed(samples: EvaluationSamples) -> Counter[str]:
    """Samples, by cause, that indexing found unusable: they are not among `samples`."""
    return sum((Counter(shard["faults"]) for shard in samples.samples.shard_faults), Counter())
