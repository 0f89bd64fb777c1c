"""What is embedded: images with captions, images with classes, or both."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modstruct.config.embedding import EmbeddingConfig
from modstruct.data.classification.class_files import ZeroShotClasses
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.shards.faults import BadSampleCounter
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.embedded_files import is_set_name
from modstruct.evaluation.embeddings.in_memory import left_out_when_indexed

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
    def of_labelled(cls, pictures: Any) -> EmbeddingSource:
        """A set of labelled images (modstruct.data.classification)."""
        return cls(pictures.name, pictures, pictures.fingerprint, tuple(pictures.classes), tuple(pictures.templates))

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

    def ledger(self, config: EmbeddingConfig, process: int = 0) -> BadSampleCounter:
        """For counting its unreadable images."""
        return BadSampleCounter(f"set {self.name}", config.max_bad_share, process, "embedding.max_bad_share")

    def left_out_before(self) -> Counter[str]:
        """Samples, by cause, that indexing found unusable; they are not among `samples`."""
        return left_out_when_indexed(self.samples) if isinstance(self.samples, EvaluationSamples) else Counter()
