"""Sets published as arrays of pixels: SVHN (Netzer et al. 2011) and STL-10 (Coates et al. 2011)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from modstruct.data.classification.class_names import readable
from modstruct.data.classification.image_stores import ImageArray
from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.set_folder import SetFolder

STL10_SIDE = 96


def read_svhn(place: SetFolder, split: str) -> FoundImages:
    """Cropped digits, 32 x 32: 73,257 for training, 26,032 for test. The file's label 10 is the digit 0."""
    file = place.folder_with(f"{split}_32x32.mat", "svhn") / f"{split}_32x32.mat"
    (labels,) = place.matlab(file, "y")
    if not np.issubdtype(labels.dtype, np.number) or labels.ndim != 1 or not np.isin(labels, range(1, 11)).all():
        place.refuse(f"{file} has labels other than 1 to 10")
    store = ImageArray(partial(_svhn_pixels, place, file), f"{split}/")
    if len(store) != len(labels):
        place.refuse(f"{file} has {len(store)} images and {len(labels)} labels")
    return FoundImages(store, labels.astype(np.int64) % 10, [str(digit) for digit in range(10)])


def read_stl10(place: SetFolder, split: str) -> FoundImages:
    """Images of ten classes, 96 x 96: 5,000 for training, 8,000 for test."""
    folder = place.folder_with("class_names.txt", "stl10_binary")
    classes = [readable(name) for name in place.lines(folder / "class_names.txt")]
    store = ImageArray(partial(_stl10_pixels, place, folder / f"{split}_X.bin"), f"{split}/")
    labels = _bytes(place, folder / f"{split}_y.bin").astype(np.int64) - 1
    if len(labels) != len(store):
        place.refuse(f"{folder} has {len(store)} images and {len(labels)} labels of the split {split}")
    if labels.min() < 0 or labels.max() >= len(classes):
        place.refuse(f"{folder / f'{split}_y.bin'} has a label outside 1 to {len(classes)}")
    return FoundImages(store, labels, classes)


def _svhn_pixels(place: SetFolder, file: Path) -> np.ndarray:
    (pixels,) = place.matlab(file, "X")
    if pixels.ndim == 3:  # a single image
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
        place.refuse(f"{file} has no pixels (height, width, 3, images) of bytes")
    return pixels.transpose(3, 0, 1, 2)


def _stl10_pixels(place: SetFolder, file: Path) -> np.ndarray:
    content, picture = _bytes(place, file), 3 * STL10_SIDE**2
    if len(content) % picture:
        place.refuse(f"{file} has {len(content)} bytes, no multiple of the {picture} of an image: it is cut off")
    # Channel by channel, and each channel column by column.
    return content.reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)


def _bytes(place: SetFolder, file: Path) -> np.ndarray:
    """The content of a file, memory-mapped, (bytes,)."""
    if not file.is_file() or not file.stat().st_size:
        place.refuse(f"{file} is {'empty' if file.exists() else 'not there'}")
    return np.memmap(file, np.uint8, "r")
