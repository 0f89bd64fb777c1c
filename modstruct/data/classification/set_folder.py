"""The folder of a published set: what must be there, and the one error that a missing or wrong file gets."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from modstruct.data.classification.image_stores import EXTENSIONS, ImageFiles

LARGEST_TEXT_BYTES = 256 << 20  # a list of two million images
LARGEST_MAT_BYTES = 4 << 30  # SVHN's extra set takes 1.3 GB
NAMES_SHOWN = 3


@dataclass(frozen=True)
class SetFolder:
    """Where a set lies, and what to download if it does not."""

    name: str
    root: Path
    remedy: str

    def refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.name}@{self.root}: {problem}; {self.remedy}")

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
        self._check_file(path, LARGEST_TEXT_BYTES)
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.refuse(f"{path} cannot be read ({error})")

    def table(self, path: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[list[str]]:
        """The values of some columns of a CSV file, row by row."""
        rows = csv.DictReader(self.text(path).splitlines(), delimiter=delimiter, skipinitialspace=True)
        absent = [column for column in columns if column not in (rows.fieldnames or [])]
        if absent:
            self.refuse(f"{path} has no column {absent[0]!r}")
        try:
            for row in rows:
                if any(row[column] is None for column in columns):
                    self.refuse(f"{path}, line {rows.line_num}: a value is missing")
                yield [row[column] for column in columns]
        except csv.Error as error:
            self.refuse(f"{path}, line {rows.line_num}: {error}")

    def matlab(self, path: Path, *variables: str) -> list[np.ndarray]:
        """Variables of a MATLAB file, their axes of length 1 dropped."""
        from scipy.io import loadmat

        self._check_file(path, LARGEST_MAT_BYTES)
        try:
            content = loadmat(path, squeeze_me=True, appendmat=False, variable_names=list(variables))
        except Exception as error:  # scipy raises nearly anything for a damaged file
            self.refuse(f"{path} is no MATLAB file that can be read ({type(error).__name__}: {error})")
        absent = [name for name in variables if name not in content]
        if absent:
            self.refuse(f"{path} holds no variable {absent[0]!r}")
        return [np.atleast_1d(content[name]) for name in variables]

    def pictures(self, folder: Path, paths: Sequence[str]) -> ImageFiles:
        """The files at paths in a folder, all of which must be there; each subfolder is listed once."""
        if not paths:
            self.refuse(f"no image of this split is named for {folder}")
        listings: dict[str, frozenset[str]] = {}
        missing = []
        for path in paths:
            parent, _, file = path.rpartition("/")
            if parent not in listings:
                if ".." in PurePosixPath(parent).parts or parent.startswith("/"):
                    self.refuse(f"an image is called {path!r}, which points out of {folder}")
                listings[parent] = _files(folder / parent)
            if file not in listings[parent]:
                missing.append(path)
        if missing:
            first = ", ".join(missing[:NAMES_SHOWN])
            self.refuse(f"{len(missing):,} of {len(paths):,} images are not in {folder}, the first {first}")
        return ImageFiles(folder, paths)

    def subfolders(self, folder: Path) -> list[str]:
        """Names of the folders in a folder, sorted as texts; hidden ones are passed over."""
        if not folder.is_dir():
            self.refuse(f"there is no folder {folder}")
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))

    def class_folders(self, folder: Path, labels: dict[str, int]) -> tuple[ImageFiles, np.ndarray]:
        """The images in class folders, in order of label and file name, and their labels (n,).

        labels: class of each subfolder that is read. Files that are not called like images are passed over.
        """
        paths, found = [], []
        for name, label in sorted(labels.items(), key=lambda item: item[1]):
            files = sorted(file for file in _files(folder / name) if file.lower().endswith(EXTENSIONS))
            paths += [f"{name}/{file}" for file in files]
            found += [label] * len(files)
        if not paths:
            self.refuse(f"there is no image ({', '.join(EXTENSIONS)}) in the folders of {folder}")
        return ImageFiles(folder, paths), np.array(found, dtype=np.int64)

    def _check_file(self, path: Path, largest_bytes: int) -> None:
        if not path.is_file():
            self.refuse(f"there is no file {path}")
        if path.stat().st_size > largest_bytes:
            self.refuse(f"{path} is larger than {largest_bytes >> 20} MiB, as no published file is")


def _files(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
