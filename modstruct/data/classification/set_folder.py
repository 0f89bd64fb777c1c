"""The folder of a set of images: reading its files, with one kind of error for a missing or wrong one."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from modstruct import distributed
from modstruct.data.classification.labelled_images import EXTENSIONS, FoundImages, ImageFiles
from modstruct.data.classification.prompts import readable

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
LARGEST_TEXT_BYTES = 256 << 20  # a list of two million images
LARGEST_MAT_BYTES = 4 << 30  # SVHN's extra set takes 1.3 GB
NAMES_SHOWN = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetFolder:
    """Where a set lies, and what to download if it is incomplete."""

    name: str
    root: Path
    remedy: str

    def refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.name}@{self.root}: {problem}; {self.remedy}")

    def note(self, what: str, examples: Sequence[str]) -> None:
        """Say in the log, on the main process, what is left out of the set."""
        if distributed.is_main():
            log.warning("%s@%s: %s (first %s)", self.name, self.root, what, ", ".join(examples[:NAMES_SHOWN]))

    def folder_with(self, content: str, *folders: str) -> Path:
        """The first of the folders in root, or root itself, that holds `content`; refused where none does."""
        for folder in (*(self.root / name for name in folders), self.root):
            if (folder / content).exists():
                return folder
        self.refuse(f"there is no {content} in it" + "".join(f", nor in {name}" for name in folders))

    def lines(self, path: Path) -> list[str]:
        """The lines of a text file that are not empty, stripped."""
        return [line.strip() for line in self.text(path).splitlines() if line.strip()]

    def text(self, path: Path) -> str:
        self.require_file(path)
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.refuse(f"{path} cannot be read ({error})")

    def table(
        self, path: Path, columns: Sequence[str], delimiter: str = ",", old_names: Mapping[str, str] | None = None
    ) -> Iterator[list[str]]:
        """The values of some columns of a CSV file, row by row. old_names: former names of columns, still read."""
        rows = csv.DictReader(self.text(path).splitlines(), delimiter=delimiter, skipinitialspace=True)
        header = rows.fieldnames or []
        if twice := [name for name in header if header.count(name) > 1]:
            self.refuse(f"{path} has two columns called {twice[0]!r}")
        for column, old in (old_names or {}).items():
            if column not in header and old in header:
                log.warning("%s: the column %r is now called %r; the old name is still read", path, old, column)
                columns = [old if name == column else name for name in columns]
        absent = [column for column in columns if column not in header]
        if absent:
            self.refuse(f"{path} has no column {absent[0]!r}")
        try:
            for row in rows:
                if any(row[column] is None for column in columns):
                    self.refuse(f"{path}, line {rows.line_num}: a value is missing")
                if row.get(None):  # type: ignore[call-overload]  # csv's key of the values beyond the header
                    self.refuse(
                        f"{path}, line {rows.line_num}: more values than columns; put one with {delimiter!r} in quotes"
                    )
                yield [row[column] for column in columns]
        except csv.Error as error:
            self.refuse(f"{path}, line {rows.line_num}: {error}")

    def matlab(self, path: Path, *variables: str) -> list[np.ndarray]:
        """Variables of a MATLAB file, their axes of length 1 dropped."""
        from scipy.io import loadmat

        self.require_file(path, LARGEST_MAT_BYTES)
        try:
            content = loadmat(path, squeeze_me=True, appendmat=False, variable_names=list(variables))
        except Exception as error:  # scipy raises nearly anything for a damaged file
            self.refuse(f"{path} is no MATLAB file that can be read ({type(error).__name__}: {error})")
        absent = [name for name in variables if name not in content]
        if absent:
            self.refuse(f"{path} holds no variable {absent[0]!r}")
        return [np.atleast_1d(content[name]) for name in variables]

    def matlab_structs(self, path: Path, variable: str, *fields: str) -> np.ndarray:
        """An array of structures of a MATLAB file, which must have these fields."""
        (structs,) = self.matlab(path, variable)
        if not set(fields) <= set(structs.dtype.names or ()):
            self.refuse(f"{path} has no fields {' and '.join(fields)}")
        return structs

    def byte_rows(self, path: Path, width: int) -> np.ndarray:
        """A binary file as (n, width) uint8, memory-mapped."""
        if not path.is_file():
            self.refuse(f"there is no file {path}")
        size = path.stat().st_size
        if size == 0 or size % width:
            self.refuse(f"{path} has {size} bytes, no multiple of the {width} of an image: it is damaged or cut off")
        return np.memmap(path, np.uint8, "r").reshape(-1, width)

    def check_labels(self, labels: np.ndarray, classes: Sized, file: Path) -> np.ndarray:
        """The labels, refused if one is not from 0 to the number of classes less one."""
        if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
            self.refuse(f"{file} has a label outside the {len(classes)} classes")
        return labels

    def labels(self, names: Sequence[str], classes: Sequence[str], file: Path) -> np.ndarray:
        """(n,) int64, the row of each name among the classes. file: where the names are from, for the error."""
        row_of = {name: row for row, name in enumerate(classes)}
        unknown = next((name for name in names if name not in row_of), None)
        if unknown is not None:
            self.refuse(f"{file}: the label {unknown!r} is none of the {len(classes)} classes")
        return np.array([row_of[name] for name in names], dtype=np.int64)

    def images(self, folder: Path, paths: Sequence[str]) -> ImageFiles:
        """The files at paths in a folder; all must exist. Each subfolder is listed once."""
        if not paths:
            self.refuse(f"no image of this split is named for {folder}")
        listings: dict[str, frozenset[str]] = {}
        missing = []
        for path in paths:
            parent, _, file = path.rpartition("/")
            if parent not in listings:
                if ".." in PurePosixPath(parent).parts or parent.startswith("/"):
                    self.refuse(f"the image path {path!r} points out of {folder}")
                listings[parent] = _files(folder / parent)
            if file not in listings[parent]:
                missing.append(path)
        if missing:
            first = ", ".join(missing[:NAMES_SHOWN])
            self.refuse(f"{len(missing):,} of {len(paths):,} images are not in {folder}, the first {first}")
        return ImageFiles(folder, paths)

    def subfolders(self, folder: Path) -> list[str]:
        """Names of the folders in a folder, sorted as text; hidden ones are skipped."""
        if not folder.is_dir():
            self.refuse(f"there is no folder {folder}")
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))

    def class_folders(self, folder: Path, labels: dict[str, int]) -> tuple[ImageFiles, np.ndarray]:
        """The images in class folders, in order of label and file name, and their labels (n,).

        labels: class of each subfolder to read. Files without an image's extension are skipped, and named in the log.
        """
        paths, found, empty = [], [], []
        others = sorted(_files(folder))
        for name, label in sorted(labels.items(), key=lambda item: item[1]):
            there = _files(folder / name)
            files = sorted(file for file in there if file.lower().endswith(EXTENSIONS))
            paths += [f"{name}/{file}" for file in files]
            found += [label] * len(files)
            others += sorted(f"{name}/{file}" for file in there.difference(files))
            empty += [] if files else [name]
        if not paths:
            self.refuse(f"there is no image ({', '.join(EXTENSIONS)}) in the folders of {folder}")
        if others:
            self.note(f"{len(others)} files in {folder} that are no images in a class folder are left out", others)
        if empty:
            self.note(f"{len(empty)} class folders of {folder} hold no image", empty)
        return ImageFiles(folder, paths), np.array(found, dtype=np.int64)

    def split_folder(self, split: str) -> Path:
        """The folder of a split in root; for test, root itself where no split has a folder."""
        there = {name for name in sum(SPLIT_FOLDERS.values(), ()) if (self.root / name).is_dir()}
        found = [name for name in SPLIT_FOLDERS[split] if name in there]
        if found:
            return self.root / found[0]
        if there or split != "test":
            self.refuse(f"there is no folder {' or '.join(SPLIT_FOLDERS[split])} of the split {split} in it")
        return self.root

    def require_file(self, path: Path, largest_bytes: int = LARGEST_TEXT_BYTES) -> None:
        if not path.is_file():
            self.refuse(f"there is no file {path}")
        if path.stat().st_size > largest_bytes:
            self.refuse(f"{path} is larger than {largest_bytes >> 20} MiB, as no published file is")


def _files(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))


def read_folder(source: SetFolder, split: str) -> FoundImages:
    """Class folders of any names, in the split's folder (train; validation, val or valid; test) or in the root itself.

    Without a folder of any split, the root is the split test.
    """
    return read_class_folders(source, source.split_folder(split))


def read_class_folders(source: SetFolder, base: Path, names: dict[str, str] | None = None) -> FoundImages:
    """Images in class folders. names: readable name of each class by its folder; without it, the folders' names."""
    folders = source.subfolders(base)
    if names is None:
        names = {name: readable(name) for name in folders}
    unknown = [name for name in folders if name not in names]
    if unknown:
        source.refuse(f"the folder {base / unknown[0]} is none of the {len(names)} classes")
    if len(names) < 2:
        source.refuse(f"{base} has {len(names)} class folders, where there must be at least two")
    without = [name for name in names if name not in folders]
    if without:
        source.note(f"{len(without)} classes have no folder in {base}", without)
    label = {name: number for number, name in enumerate(names)}
    store, labels = source.class_folders(base, {name: label[name] for name in folders})
    return FoundImages(store, labels, list(names.values()))
