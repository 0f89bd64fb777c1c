"""A set of images with class labels, by index, and where its images are stored: as files or as rows of one array."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSample
from modstruct.data.transforms.decoding import FORMATS, decode_image

# GTSRB is published as PPM, and some files of Oxford Pets that are called .jpg are GIF or BMP.
FILE_FORMATS = (*FORMATS, "PPM", "GIF", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".gif", ".bmp")
LARGEST_FILE_BYTES = 1 << 28


class LabelledImages(Protocol):
    """What every set is, however its images are stored. Usable where EvaluationSamples are (`evaluation_loader`)."""

    name: str
    """A plain file name, such as cifar10; with -SPLIT behind it where that is not the set's usual split."""
    split: str
    """train, validation or test."""
    fingerprint: str
    """Hash of classes, labels and image keys: equal wherever the same files lie."""
    classes: Sequence[str]
    """Readable name of each class, by label."""
    templates: Sequence[str]
    """Prompts with one {} each, where the name of the class goes."""
    config: DataConfig
    left_out: Mapping[str, int]
    """Number of images left out when the set was opened, by cause."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EvaluationSample:
        """Image, captions (mostly none) and metadata: "label" (-1: none) and "key". Raises BadSample, IndexError."""
        ...


class ImageStore(Protocol):
    """Images by index; picklable, since each loader process opens its own files."""

    fingerprint: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of an image within its set."""
        ...

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB, upright. Raises BadSample."""
        ...


class ImageFiles:
    """Image files by their paths in a folder, which are their keys."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        """paths: relative to the folder, at least one."""
        self.folder = folder
        self._paths = np.array([os.fsencode(path) for path in paths])  # a third of the memory of a list of str
        self.fingerprint = hashed(list(paths))

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return os.fsdecode(self._paths[index].item())

    def image(self, index: int, max_pixels: int) -> Image.Image:
        path = self.folder / self.key(index)
        try:
            with open(path, "rb") as file:
                content = file.read(LARGEST_FILE_BYTES + 1)
        except OSError as error:
            raise BadSample("unreadable image", f"{path}: {error.strerror or error}") from None
        if len(content) > LARGEST_FILE_BYTES:
            raise BadSample("oversized image", str(path))
        return decode_image(content, max_pixels, str(path), FILE_FORMATS)


class ImageArray:
    """Images as rows of an array (n, H, W, 3) uint8, which each process loads at first use.

    load: returns the array; picklable. key: what stands before the number in an image's key.
    """

    def __init__(self, load: Callable[[], np.ndarray], key: str):
        self._load, self._key = load, key
        self._pixels: np.ndarray | None = load()
        self.fingerprint = hashed(self._pixels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None}  # SVHN's gigabyte would be sent to every loader process

    def __len__(self) -> int:
        return len(self._array())

    def key(self, index: int) -> str:
        return f"{self._key}{index:06d}"

    def image(self, index: int, max_pixels: int) -> Image.Image:
        pixels = self._array()[index]
        if pixels.shape[0] * pixels.shape[1] > max_pixels:
            raise BadSample("decompression bomb", self.key(index))
        return Image.fromarray(np.ascontiguousarray(pixels))

    def _array(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self._load()
        return self._pixels


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
        self.classes: Sequence[str] = tuple(found.classes)
        self.templates: Sequence[str] = tuple(templates)
        self.labels = np.asarray(found.labels, dtype=np.int64)
        """(n,), the class of each image."""
        self.left_out: Mapping[str, int] = dict(found.left_out)
        self._store = found.store
        self.fingerprint = hashed(self.classes, self.labels, found.store.fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> EvaluationSample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} of {self.name}")
        image = self._store.image(index, self.config.max_image_pixels)
        return EvaluationSample(image, [], {"label": int(self.labels[index]), "key": self._store.key(index)})


def hashed(*parts: object) -> str:
    """A hash of arrays, by their bytes, and of plain values, by their JSON."""
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else json.dumps(part).encode()
        content.update(len(encoded).to_bytes(8, "little"))
        content.update(encoded)
    return content.hexdigest()
