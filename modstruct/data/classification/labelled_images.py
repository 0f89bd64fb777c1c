"""A set of images with class labels, by number: what zero-shot classification and probes embed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from modstruct.config import DataConfig
from modstruct.data.shards.evaluation_samples import EvaluationSample


class LabelledImages(Protocol):
    """What every set is, wherever its images lie. It goes where an EvaluationSamples goes (`evaluation_loader`)."""

    name: str
    """A plain file name, such as cifar10; with -SPLIT behind it where that is not the set's usual split."""
    split: str
    """train, validation or test."""
    fingerprint: str
    """Hash of classes, labels and places of the images: equal wherever the same files lie."""
    classes: Sequence[str]
    """Readable name of each class, by label."""
    templates: Sequence[str]
    """Prompts with one {} each, where the name of the class goes."""
    config: DataConfig
    left_out: Mapping[str, int]
    """Images that were left out when the set was opened, by cause."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EvaluationSample:
        """Image, captions (mostly none) and metadata: "label", -1 where there is none, and "key". Raises BadSample,
        IndexError."""
        ...


class ImageStore(Protocol):
    """Images by number; can be sent to another process, which opens its own files."""

    fingerprint: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of an image within its set."""
        ...

    def picture(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB, upright. Raises BadSample."""
        ...


@dataclass(frozen=True)
class FoundImages:
    """What the reader of a set found in its files."""

    store: ImageStore
    labels: np.ndarray
    """(n,) integers, the class of each image."""
    classes: Sequence[str]
    templates: Sequence[str] | None = None
    """Where the files name some."""
    left_out: Mapping[str, int] = field(default_factory=dict)


class LabelledSet:
    """The LabelledImages of a set whose labels are known before its images are read."""

    def __init__(self, name: str, split: str, found: FoundImages, templates: Sequence[str], config: DataConfig):
        self.name, self.split, self.config = name, split, config
        self.classes, self.templates = tuple(found.classes), tuple(templates)
        self.labels = np.asarray(found.labels, dtype=np.int64)
        """(n,), the class of each image."""
        self.left_out = dict(found.left_out)
        self._store = found.store
        self.fingerprint = hashed(self.classes, self.labels, found.store.fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> EvaluationSample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} of {self.name}")
        picture = self._store.picture(index, self.config.max_image_pixels)
        return EvaluationSample(picture, [], {"label": int(self.labels[index]), "key": self._store.key(index)})


def hashed(*parts: object) -> str:
    """A hash of arrays, by their bytes, and of plain values, by their JSON."""
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else json.dumps(part).encode()
        content.update(len(encoded).to_bytes(8, "little"))
        content.update(encoded)
    return content.hexdigest()
