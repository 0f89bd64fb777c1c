"""A set of images with class labels: where its images are stored, and its folder, with one kind of error for what is
missing or wrong in it."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from modstruct import distributed
from modstruct.config import DataConfig
from modstruct.data.faults import NAMED, BadSample, or_bad
from modstruct.data.shards.evaluation_samples import EvaluationSample
from modstruct.data.shards.members import printable
from modstruct.data.shards.workers import shared_tensor
from modstruct.data.transforms.decoding import FORMATS, decode_image

# GTSRB is published as PPM, and some files of Oxford Pets that are called .jpg are GIF or BMP.
FILE_FORMATS = (*FORMATS, "PPM", "GIF", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".gif", ".bmp")
LARGEST_FILE_BYTES = 1 << 28  # are read of a larger one, so that it is found cut off
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}

log = logging.getLogger(__name__)


class ImageFiles:
    """Image files by their paths in a folder, at least one, which are their keys."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        self.folder, self.fingerprint = folder, hashed(list(paths))
        self._paths = np.array([os.fsencode(path) for path in paths])  # a third of the memory of a list of str

    def key(self, index: int) -> str:
        return os.fsdecode(self._paths[index].item())

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB, upright. Raises BadSample."""
        path = self.folder / self.key(index)
        return decode_image(_read(path, 0, LARGEST_FILE_BYTES, str(path)), max_pixels, str(path), FILE_FORMATS)


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
        pixels = np.ascontiguousarray(pixels)
        self._pixels, self._split, self.fingerprint = shared_tensor(pixels), split, hashed(pixels)

    def key(self, index: int) -> str:
        return f"{self._split}/{index:06d}"

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Mode RGB. Raises BadSample."""
        pixels = self._pixels[index].numpy()
        if pixels.shape[0] * pixels.shape[1] > max_pixels:
            raise BadSample("decompression bomb", self.key(index))
        return Image.fromarray(pixels)


ImageStore = ImageFiles | ShardImages | ImageArray


@dataclass(frozen=True)
class SetFolder:
    """A set that is to be read.

    known: its name in the registry, or its own. remedy: what to download if it is incomplete. split: train, validation
    or test. name, templates, config: as LabelledImages has them.
    """

    known: str
    root: Path
    remedy: str
    name: str
    split: str
    templates: Sequence[str]
    config: DataConfig

    def refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.known}@{self.root}: {problem}; {self.remedy}")

    def note(self, what: str, examples: Sequence[str], count: int = 0) -> None:
        """Say in the log, on the main process, what is left out of the set. count: of them; 0 for that of examples."""
        if examples and distributed.is_main():
            first = ", ".join(examples[:NAMED])
            log.warning("%s@%s: %d %s (first %s)", self.known, self.root, count or len(examples), what, first)

    def folder_with(self, content: str, *folders: str) -> Path:
        """The first of the folders in root, or root itself, that holds `content`; refused where none does."""
        for folder in (*(self.root / name for name in folders), self.root):
            if (folder / content).exists():
                return folder
        self.refuse(f"there is no {content} in it" + "".join(f", nor in {name}" for name in folders))

    def first_folder(self, *folders: str) -> Path:
        """The first of the folders that is in root, or root itself."""
        return next((self.root / name for name in folders if (self.root / name).is_dir()), self.root)

    def split_folder(self) -> Path:
        """The folder of the split in root; for test, root itself where no split has a folder."""
        found = self.first_folder(*SPLIT_FOLDERS[self.split])
        any_split = self.first_folder(*sum(SPLIT_FOLDERS.values(), ()))
        if found == self.root and (any_split != self.root or self.split != "test"):
            self.refuse(f"there is no folder {' or '.join(SPLIT_FOLDERS[self.split])} of the split {self.split} in it")
        return found

    def subfolders(self, folder: Path) -> list[str]:
        """Names of the folders in a folder, sorted as text; hidden ones are skipped."""
        if not folder.is_dir():
            self.refuse(f"there is no folder {folder}")
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))

    def lines(self, path: Path) -> list[str]:
        """The lines of a text file in UTF-8 that are not empty, stripped."""
        if not path.is_file():
            self.refuse(f"there is no file {path}")
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            self.refuse(f"{path} cannot be read ({error})")

    def table(self, path: Path, image: str, label: str, delimiter: str = ",") -> list[tuple[str, str]]:
        """The values of two columns in each row of a CSV file."""
        try:
            header, *rows = csv.reader(self.lines(path) or [""], delimiter=delimiter, skipinitialspace=True)
        except csv.Error as error:
            self.refuse(f"{path} is no CSV file ({error})")
        if image == "image" and image not in header and "picture" in header:
            header[header.index("picture")] = "image"
            log.warning("%s: the column 'picture' is now called 'image'; the old name is still read", path)
        if wrong := [name for name in (image, label) if header.count(name) != 1]:
            found = f"{path} has {'two columns' if wrong[0] in header else 'no column'} called {wrong[0]!r}"
            self.refuse(f"{found}; between {delimiter!r} it has {', '.join(map(repr, header))[:200]}")
        if uneven := [row for row in rows if len(row) != len(header)]:
            found = f"{path}: {len(uneven[0])} values in {len(header)} columns"
            self.refuse(f"{found} ({delimiter.join(uneven[0])}); quote one with {delimiter!r}")
        return [(row[header.index(image)], row[header.index(label)]) for row in rows]

    def images(self, folder: Path, paths: Sequence[str]) -> ImageFiles:
        """The files at paths in a folder; all must exist. Each subfolder is listed once."""
        if not paths:
            self.refuse(f"no image of this split is named for {folder}")
        if outside := [path for path in paths if os.path.isabs(path) or ".." in path.split("/")]:
            self.refuse(f"the image path {outside[0]!r} points out of {folder}")
        parents = {os.path.dirname(path): folder / os.path.dirname(path) for path in paths}
        there = {name: set(os.listdir(parent)) if parent.is_dir() else set() for name, parent in parents.items()}
        if missing := [path for path in paths if os.path.basename(path) not in there[os.path.dirname(path)]]:
            first = ", ".join(missing[:NAMED])
            self.refuse(f"{len(missing):,} of {len(paths):,} images are not in {folder}, the first {first}")
        return ImageFiles(folder, paths)


class LabelledImages:
    """A set, however its images are stored. Usable where EvaluationSamples are (`evaluation_loader`).

    name: a plain file name, such as cifar10; with -SPLIT behind it where that is not the set's usual split.
    labels: (n,) int64. classes: readable names, by label. templates: prompts with one {} each, where the name of the
    class goes. left_out: number of images that opening the set left out, by cause. fingerprint: hash of classes, labels
    and image keys (or pixels): equal wherever the same files lie.
    """

    def __init__(self, source: SetFolder, store: ImageStore, labels: np.ndarray, classes: Sequence[str]):
        self.name, self.config, self.templates = source.name, source.config, tuple(source.templates)
        self.classes, self.labels, self.store = tuple(classes), labels, store
        self.left_out: dict[str, int] = {}
        self.fingerprint = hashed(self.classes, labels, store.fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> EvaluationSample:
        """Image, captions (mostly none) and metadata: "label" (-1: none) and "key". Raises BadSample, IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} of {self.name}")
        image = self.store.image(index, self.config.max_image_pixels)
        return EvaluationSample(image, [], {"label": int(self.labels[index]), "key": self.store.key(index)})

    def read(self, indices: Sequence[int]) -> Iterator[EvaluationSample | BadSample]:
        """As EvaluationSamples.read."""
        return (or_bad(self.__getitem__, index) for index in indices)


def read_class_folders(
    source: SetFolder, base: Path, folders: Sequence[str], classes: Sequence[str], whole: str = ""
) -> LabelledImages:
    """Images in class folders, or in folders within these, in order of label and path.

    folders: by label, there or not (torchvision's ImageFolder numbers those that are there, sorted as text). whole:
    what they are, in words, where all must be there. Files without an image's extension are left out and named in the
    log, as are classes without an image.
    """
    labels = {name: label for label, name in enumerate(folders)}
    there = source.subfolders(base)
    absent = [name for name in folders if name not in there]
    if unknown := [name for name in there if name not in labels]:
        source.refuse(f"the folder {base / unknown[0]} is none of the {len(labels):,} {whole or 'classes'}")
    if len(labels) < 2:
        source.refuse(f"{base} has {len(labels)} class folders, where there must be at least two")
    if absent and whole:
        source.refuse(f"{len(absent)} of the {len(labels):,} class folders are not in {base}, the first {absent[0]}")
    start, images, others = len(os.path.join(base, "")), list[str](), list[str]()
    for folder, _, files in sorted(os.walk(base, followlinks=True)):
        for path in (os.path.join(folder, file)[start:] for file in sorted(files)):
            if not any(part.startswith(".") for part in path.split("/")):
                (images if "/" in path and path.lower().endswith(EXTENSIONS) else others).append(path)
    if not images:
        source.refuse(f"there is no image ({', '.join(EXTENSIONS)}) in the folders of {base}")
    images.sort(key=lambda path: labels[path.partition("/")[0]])  # stable: by path within a class
    rows = np.array([labels[path.partition("/")[0]] for path in images], dtype=np.int64)
    counts = np.bincount(rows, minlength=len(labels))
    source.note(f"files in {base} that are no images in a class folder are left out", others)
    source.note(f"classes have no folder in {base}", absent)
    source.note(f"class folders of {base} hold no image", [name for name in there if not counts[labels[name]]])
    return LabelledImages(source, ImageFiles(base, images), rows, classes)


def read_listed(
    source: SetFolder,
    file: Path,
    base: Path,
    listed: Sequence[tuple[str, str]],
    classes: Mapping[str, str],
) -> LabelledImages:
    """Images at the paths in base, each with a label, that a file lists. classes: readable name by label."""
    row_of = {label: row for row, label in enumerate(classes)}
    if wrong := [pair for pair in listed if pair[1] not in row_of]:
        source.refuse(f"{file}: the label {wrong[0][1]!r} of {wrong[0][0]} is none of the {len(classes):,} classes")
    rows = np.array([row_of[label] for _, label in listed], dtype=np.int64)
    counts, times = np.bincount(rows, minlength=len(classes)), Counter(path for path, _ in listed)
    repeated = [path for path, count in times.items() if count > 1]
    source.note(f"images occur in several rows of {file}, each of which counts", repeated)
    source.note(f"classes have no image in {file}", [label for label, row in row_of.items() if not counts[row]])
    return LabelledImages(source, source.images(base, [path for path, _ in listed]), rows, list(classes.values()))


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
