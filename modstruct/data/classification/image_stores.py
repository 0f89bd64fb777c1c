"""Where the images of a set are stored: files, parts of shards, or an array. Each is found by its number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.data.faults import BadSample
from modstruct.data.shards.members import printable
from modstruct.data.transforms.decoding import FORMATS, decode_image

# GTSRB is published as PPM, and some files of Oxford Pets that are called .jpg are GIF or BMP.
FILE_FORMATS = (*FORMATS, "PPM", "GIF", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".gif", ".bmp")
LARGEST_FILE_BYTES = 1 << 28


class ImageFiles:
    """Image files by their paths in a folder, which are their keys."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        """paths: relative to the folder, at least one."""
        self.folder, self.fingerprint = folder, hashed(list(paths))
        self._paths = np.array([os.fsencode(path) for path in paths])  # a third of the memory of a list of str

    def key(self, index: int) -> str:
        return os.fsdecode(self._paths[index].item())

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB, upright. Raises BadSample."""
        path = self.folder / self.key(index)
        content = _read(path, 0, LARGEST_FILE_BYTES + 1, str(path))
        if len(content) > LARGEST_FILE_BYTES:
            raise BadSample("oversized image", str(path))
        return decode_image(content, max_pixels, str(path), FILE_FORMATS)


class ShardImages:
    """Images inside tars. places: (n, 3) int64, number of the shard, first byte and bytes of each image."""

    def __init__(self, shards: Sequence[Path], places: np.ndarray, keys: Sequence[str]):
        self.shards, self._places, self.fingerprint = tuple(shards), places, hashed(places, list(keys))
        self._keys = np.array([os.fsencode(key) for key in keys])

    def key(self, index: int) -> str:
        return printable(os.fsdecode(self._keys[index].item()))

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB, upright. Raises BadSample."""
        shard, start, size = self._places[index].tolist()
        where = f"{self.shards[shard]}: {self.key(index)}"
        content = _read(self.shards[shard], start, size, where)
        if len(content) < size:
            raise BadSample("truncated shard", where)
        return decode_image(content, max_pixels, where)


class ImageArray:
    """Images as rows of an array (n, H, W, 3) uint8. Their keys are the name of the split and a number."""

    def __init__(self, pixels: np.ndarray, split: str):
        self._pixels, self._split, self.fingerprint = pixels, split, hashed(pixels)

    def key(self, index: int) -> str:
        return f"{self._split}/{index:06d}"

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB. Raises BadSample."""
        pixels = np.ascontiguousarray(self._pixels[index])
        if pixels.shape[0] * pixels.shape[1] > max_pixels:
            raise BadSample("decompression bomb", self.key(index))
        return Image.fromarray(pixels)


ImageStore = ImageFiles | ShardImages | ImageArray


def hashed(*parts: object) -> str:
    """A hash of arrays, by their bytes, and of plain values, by their JSON."""
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else json.dumps(part).encode()
        content.update(len(encoded).to_bytes(8, "little"))
        content.update(encoded)
    return content.hexdigest()


def _read(path: Path, start: int, size: int, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise BadSample("unreadable image", f"{where}: {error.strerror or error}") from None
