"""What is embedded: images with captions, images with classes, or both.

Equal captions are one text, and images of equal bytes one image, with the captions of all, wherever images and captions
are compared (retrieval, structure). What counts labels counts every sample, with its own metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from modstruct.data.classification.class_files import ZeroShotClasses
from modstruct.data.classification.labelled_shards import LABEL, LabelledSamples
from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.errors import require
from modstruct.evaluation.embeddings.set_files import is_set_name

log = logging.getLogger(__name__)


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
    content: str = ""
    """Fingerprint of the samples, if other sets may label the same ones by other classes."""
    field: str = ""
    """The recipe's field that it comes from, for messages; empty for a set that is embedded by its name."""

    def __post_init__(self):
        remedy = "a name of letters, digits, - _ . and +, since a folder is called by it"
        require(is_set_name(self.name), "set", self.name, remedy)
        require(len(self.samples) > 0, "set", self.name, "holds no samples")

    @classmethod
    def of_samples(
        cls, name: str, samples: EvaluationSamples, classes: ZeroShotClasses | None = None, field: str = ""
    ) -> EmbeddingSource:
        """Captioned images; classes: of a zero-shot file, for the samples whose metadata have its label."""
        names, templates = (tuple(classes.classes.values()), classes.templates) if classes else ((), ())
        content = samples.samples.content
        return cls(name, samples, content, names, templates, classes, content, field)

    @classmethod
    def of_labelled(cls, images: Any) -> EmbeddingSource:
        """A set of labelled images (modstruct.data.classification)."""
        classes = tuple(images.classes), tuple(images.templates)
        content = images.content if isinstance(images, LabelledSamples) else ""
        return cls(images.name, images, images.fingerprint, *classes, content=content)

    @property
    def label_field(self) -> str | None:
        """Field of the metadata that holds the label."""
        return self.classes.label if self.classes else (LABEL if self.class_names else None)

    @property
    def noted(self) -> dict[str, Any]:
        """What an embedded set keeps of it."""
        source = {"name": self.name, "fingerprint": self.fingerprint, "content": self.content}
        source = {name: value for name, value in source.items() if value or name != "content"}
        named = {"class_names": self.class_names, "templates": self.templates, "label_field": self.label_field}
        return {"source": source} | named

    @property
    def prompts(self) -> list[str]:
        """Class by class."""
        return [template.replace("{}", name) for name in self.class_names for template in self.templates]

    @property
    def classes_fingerprint(self) -> str | None:
        """Of names, templates and label; None without classes."""
        about = [self.class_names, self.templates, self.label_field, self.classes and list(self.classes.classes)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest() if self.class_names else None

    def labels_of(self, metadata: Sequence[dict]) -> np.ndarray:
        """Class row of each image, (n,) int64, -1 for none. Raises ValueError for one that is no class."""
        if self.classes is not None:
            return self.classes.rows_of(metadata)
        given = [fields.get(LABEL) for fields in metadata]
        remedy = f"must be one of the {len(self.class_names)} classes, or -1"
        labels = np.array([-1 if label is None else label for label in given], dtype=np.int64)
        for label in labels.tolist():
            require(-1 <= label < len(self.class_names), f"label of set {self.name}", label, remedy)
        return labels

    @property
    def described(self) -> str:
        """What messages call it."""
        return self.field or f"set {self.name}"

    def bad_sample_counter(self, max_bad_share: float, process: int = 0) -> BadSampleCounter:
        """For counting its unreadable images."""
        section = "data" if self.field else "embedding"
        return BadSampleCounter(self.described, max_bad_share, process, f"{section}.max_bad_share")


def distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kinds of digests, (n,) of DIGEST or numbers, numbered in order of first appearance.

    Returns (u,) int64, the place at which each kind came first, and (n,) int64, the kind of each.
    """
    if names := digests.dtype.names:  # by two columns of numbers: records take several times as long to compare
        kinds = [np.unique(digests[name], return_inverse=True)[1] for name in names]
        digests = kinds[0] * len(digests) + kinds[1]
    _, first, kind = np.unique(digests, return_index=True, return_inverse=True)
    return np.sort(first), np.argsort(np.argsort(first))[kind]


@cache
def say_merged(field: str, samples: int, images: int) -> None:
    """Log, once a source, that so many samples hold fewer images."""
    text = "%s: %d samples hold %d distinct images: byte-equal images are merged for retrieval and structure, with all "
    log.warning(text + "their captions", field, samples, images)


def distinct_captions(captions: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The distinct ones of captions that come image by image, in order of first appearance: the text rows.

    And (p, 2) int64, (image, text row) of each image and each of its captions, sorted, without repetition.
    """
    row: dict[str, int] = {}
    of_images = [sorted({row.setdefault(text, len(row)) for text in texts}) for texts in captions]
    images = np.repeat(np.arange(len(of_images)), [len(rows) for rows in of_images])
    return list(row), np.stack([images, np.fromiter(chain.from_iterable(of_images), np.int64)], axis=1)
