"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in both published forms, "python version" and "binary version".

The python version is pickles, which are read without unpickling: nothing in them is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.data.classification.class_names import readable
from modstruct.data.classification.image_stores import ImageArray
from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.pickled_values import PickledArray, read_pickled
from modstruct.data.classification.set_folder import SetFolder

SIDE = 32
PIXELS = 3 * SIDE * SIDE
LARGEST_BATCH_BYTES = 1 << 30  # CIFAR-100's train file, the largest, takes 155 MB


@dataclass(frozen=True)
class _Version:
    """How the files of a set are called and laid out."""

    pickles: str
    """Folder of the python version."""
    binary: str
    """Folder of the binary version."""
    batches: dict[str, tuple[str, ...]]
    """Files of each split, in the binary version with .bin behind their names."""
    label_key: str
    """Of the labels in a pickle."""
    names: tuple[str, str, str]
    """Pickle with the names of the classes, the key of them in it, and the binary version's file of names."""
    label_bytes: int
    """Before the pixels of an image in the binary version; the last of them is the label."""


_CIFAR10 = _Version(
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "labels",
    ("batches.meta", "label_names", "batches.meta.txt"),
    1,
)
_CIFAR100 = _Version(
    "cifar-100-python",
    "cifar-100-binary",
    {"train": ("train",), "test": ("test",)},
    "fine_labels",
    ("meta", "fine_label_names", "fine_label_names.txt"),
    2,
)


def read_cifar10(place: SetFolder, split: str) -> FoundImages:
    """50,000 images for training and 10,000 for test, 32 x 32, of ten classes."""
    return _read(place, split, _CIFAR10)


def read_cifar100(place: SetFolder, split: str) -> FoundImages:
    """50,000 images for training and 10,000 for test, 32 x 32, of a hundred ("fine") classes."""
    return _read(place, split, _CIFAR100)


def _read(place: SetFolder, split: str, version: _Version) -> FoundImages:
    pickled = any((place.root / folder / version.names[0]).exists() for folder in (version.pickles, "."))
    if pickled:
        folder = place.folder_with(version.names[0], version.pickles)
        content = _unpickled(place, folder / version.names[0])
        names = content.get(version.names[1])
        if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
            place.refuse(f"{folder / version.names[0]} has no list {version.names[1]!r} of names")
        classes = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]
        files = tuple(folder / name for name in version.batches[split])
        labels = np.concatenate([_pickled_batch(place, version, file)[1] for file in files])
        load = partial(_pickled_pixels, place, version, files)
    else:
        folder = place.folder_with(version.names[2], version.binary, version.pickles)
        classes = place.lines(folder / version.names[2])
        files = tuple(folder / f"{name}.bin" for name in version.batches[split])
        labels = np.concatenate([_rows(place, version, file)[:, version.label_bytes - 1] for file in files])
        load = partial(_binary_pixels, place, version, files)
    if labels.max() >= len(classes) or labels.min() < 0:
        place.refuse(f"a label of {files[0].name} is outside the {len(classes)} classes of {folder}")
    return FoundImages(ImageArray(load, f"{split}/"), labels, [readable(name) for name in classes])


def _binary_pixels(place: SetFolder, version: _Version, files: tuple[Path, ...]) -> np.ndarray:
    return _as_images(np.concatenate([_rows(place, version, file)[:, version.label_bytes :] for file in files]))


def _pickled_pixels(place: SetFolder, version: _Version, files: tuple[Path, ...]) -> np.ndarray:
    return _as_images(np.concatenate([_pickled_batch(place, version, file)[0] for file in files]))


def _as_images(rows: np.ndarray) -> np.ndarray:
    """(n, 3072), channel by channel -> (n, 32, 32, 3)."""
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def _rows(place: SetFolder, version: _Version, file: Path) -> np.ndarray:
    """(n, label bytes + 3072) of a file of the binary version, memory-mapped."""
    width = version.label_bytes + PIXELS
    if not file.is_file():
        place.refuse(f"there is no file {file}")
    size = file.stat().st_size
    if size == 0 or size % width:
        place.refuse(f"{file} has {size} bytes, no multiple of the {width} of an image: it is damaged or cut off")
    return np.memmap(file, np.uint8, "r").reshape(-1, width)


def _pickled_batch(place: SetFolder, version: _Version, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and labels (n,) of a file of the python version."""
    content = _unpickled(place, file)
    pixels, labels = content.get("data"), content.get(version.label_key)
    array = pixels.as_bytes() if isinstance(pixels, PickledArray) else None
    if array is None or array.ndim != 2 or array.shape[1] != PIXELS or not len(array):
        place.refuse(f"{file} has no array of bytes (images, {PIXELS}) by the key 'data'")
    numbers = isinstance(labels, list) and all(type(label) is int and 0 <= label < 1 << 16 for label in labels)
    if not numbers or len(labels) != len(array):
        place.refuse(f"{file} has no list of {len(array)} labels by the key {version.label_key!r}")
    return array, np.array(labels, dtype=np.int64)


def _unpickled(place: SetFolder, file: Path) -> dict[str, Any]:
    if not file.is_file():
        place.refuse(f"there is no file {file}")
    if file.stat().st_size > LARGEST_BATCH_BYTES:
        place.refuse(f"{file} is larger than {LARGEST_BATCH_BYTES >> 20} MiB, as no published file is")
    try:
        content = read_pickled(file)
    except (OSError, ValueError) as error:
        place.refuse(f"{file} is no pickle of plain values and arrays of bytes ({error})")
    if not isinstance(content, dict):
        place.refuse(f"{file} holds no dictionary")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
