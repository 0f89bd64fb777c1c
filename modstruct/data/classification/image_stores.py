"""Where labelled images lie: in files of their own, or as rows of one array of pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.data.classification.labelled_images import hashed
from modstruct.data.shards.faults import BadSample
from modstruct.data.transforms.decoding import FORMATS, decode_image

# GTSRB is published as PPM, and some files of Oxford Pets that are called .jpg are GIF or BMP.
FILE_FORMATS = (*FORMATS, "PPM", "GIF", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".gif", ".bmp")
LARGEST_FILE_BYTES = 1 << 28


class ImageFiles:
    """Image files by their paths in a folder, which are their keys."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        """paths: relative to the folder, at least one."""
        self.folder = folder
        self._paths = np.array([os.fsencode(path) for path in paths])  # a third of the memory of a list of texts
        self.fingerprint = hashed(list(paths))

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return os.fsdecode(self._paths[index].item())

    def picture(self, index: int, max_pixels: int) -> Image.Image:
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

    load: returns the array; can be sent to another process. key: what stands before the number in an image's key.
    """

    def __init__(self, load: Callable[[], np.ndarray], key: str):
        self._load, self._key = load, key
        self._pixels: np.ndarray | None = load()
        self.fingerprint = hashed(self._pixels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None}  # a gigabyte of SVHN would travel to every loader process

    def __len__(self) -> int:
        return len(self._array())

    def key(self, index: int) -> str:
        return f"{self._key}{index:06d}"

    def picture(self, index: int, max_pixels: int) -> Image.Image:
        pixels = self._array()[index]
        if pixels.shape[0] * pixels.shape[1] > max_pixels:
            raise BadSample("decompression bomb", self.key(index))
        return Image.fromarray(np.ascontiguousarray(pixels))

    def _array(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self._load()
        return self._pixels
