"""Published JSON, read within bounds and checked key by key, and the folders of the images that it names.

A missing file or folder is refused by the option that named it, with where to download it; a malformed entry by file,
number of the entry and key. Nothing in a file is used as a path, except names that `Record.file_name` finds plain.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from modstruct import distributed
from modstruct.errors import refuse
from modstruct.files import RepeatedKey, unique_keys

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

LARGEST_FILE_BYTES = 2 << 30  # VQA v2's training annotations, the largest we read, take 0.4 GiB
LARGEST_LINE_BYTES = 1 << 20
LONGEST_TEXT = 10_000  # characters
LARGEST_NUMBER = 2**63 - 1
REMEDY = "download the file again, or correct the entry"
MOST_SHOWN = 60  # characters of a value in an error
NAMES_SHOWN = 3  # of missing images in an error
PLAIN_NAME = re.compile(r"(?!\.)[\w.\-]{1,200}", re.ASCII)

Entry = TypeVar("Entry", bound="DataclassInstance")


@dataclass(frozen=True)
class TaskEntries(Generic[Entry]):
    """What a reader found."""

    entries: tuple[Entry, ...]
    """In the order of the file."""
    left_out: dict[str, int]
    """Number of entries left out, by cause."""

    @property
    def fingerprint(self) -> str:
        """Hash of all entries, of their images by name: equal wherever the same files lie."""
        content = hashlib.blake2b(digest_size=16)
        for entry in self.entries:
            content.update(json.dumps(dataclasses.astuple(entry), default=lambda path: path.name).encode())
        return content.hexdigest()


class Record:
    """One JSON object of a published file, with its place for errors."""

    # VQA v2 has millions of them: no instance dictionary, and the place is formatted only for an error.
    __slots__ = ("_parent", "_place", "fields")

    def __init__(self, fields: dict[str, Any], place: str | tuple[str, int], parent: Record | None = None):
        """place: the file (and line); or, in a parent record, the key of the list and the number in it, from 0."""
        self.fields = fields
        self._place = place
        self._parent = parent

    @property
    def where(self) -> str:
        """`questions.json, questions[12]` or `dev.json, line 3`."""
        if self._parent is None or isinstance(self._place, str):
            return str(self._place)
        key, number = self._place
        return f"{self._parent.where}, {key}[{number}]"

    def text(self, key: str, *, empty: bool = False) -> str:
        """The text at a key, stripped; equal texts are one object. Refused: other types, empty (unless allowed)."""
        value = self._value(key)
        # A lone surrogate ("\ud800") is valid JSON, but no tokenizer, log or file takes it.
        if not isinstance(value, str) or len(value) > LONGEST_TEXT or not (value.isascii() or _encodable(value)):
            self.refuse(key, f"a text in UTF-8 of at most {LONGEST_TEXT:,} characters")
        value = value.strip()
        if not value and not empty:
            self.refuse(key, "a text that is not empty")
        return sys.intern(value)

    def whole(self, key: str) -> int:
        """The whole number of 0 or more at a key."""
        value = self._value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_NUMBER:
            self.refuse(key, "a whole number of 0 or more")
        return value

    def file_name(self, key: str) -> str:
        """A plain file name: letters, digits, `.`, `_` and `-`, the first no dot; so never a path."""
        value = self._value(key)
        if not isinstance(value, str) or not PLAIN_NAME.fullmatch(value):
            self.refuse(key, "a plain file name: letters, digits, '.', '_' and '-', without a folder")
        return value

    def flickr_image(self, key: str) -> str:
        """The file of an image of Flickr30K, ID.jpg, whose number may be a text, have the ending, or be a number."""
        value = self._value(key)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(self.whole(key))
        elif isinstance(value, str) and PLAIN_NAME.fullmatch(value):
            value = value.removesuffix(".jpg")
        else:
            self.refuse(key, "the number of an image of Flickr30K, such as 2407214681 or 2407214681.jpg,")
        return f"{value}.jpg"

    def texts(self, key: str, *, empty: bool = False) -> tuple[str, ...]:
        """The texts of the list at a key; empty: whether a text may be."""
        value = self._value(key)
        if not isinstance(value, list):
            self.refuse(key, "a list of texts")
        return tuple(Record({key: text}, (key, n), self).text(key, empty=empty) for n, text in enumerate(value))

    def image_path(self, key: str, folders: ImageFolders, side: int | None = None) -> Path:
        """An image by its path from the folder of all images on; folders that are not there are left out of it.

        side: which of two paths in a list.
        """
        value = self._value(key)
        if side is not None:
            value = value[side] if isinstance(value, list) and len(value) == 2 else None
        *names, image = value.split("/") if isinstance(value, str) else [""]
        if not all(map(PLAIN_NAME.fullmatch, (*names, image))):
            self.refuse(key, "a path of plain file names, such as val2014/COCO_val2014_000000000042.jpg,")
        return folders.inside(names) / image

    def choice(self, key: str, choices: Collection[str]) -> str:
        """One of several texts."""
        value = self._value(key)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return value

    def records(self, key: str) -> Iterator[Record]:
        """The objects of the list at a key."""
        value = self._value(key)
        if not isinstance(value, list):
            self.refuse(key, "a list of objects")
        for number, fields in enumerate(value):
            record = Record(fields, (key, number), self)
            if not isinstance(fields, dict):
                record.refuse_whole("a JSON object")
            yield record

    def refuse(self, key: str, expected: str) -> NoReturn:
        found = f"{key} = {_shortened(self.fields[key])}" if key in self.fields else f"there is no key {key!r}"
        raise ValueError(f"{self.where}: {found}: {expected} belongs there; {REMEDY}")

    def refuse_whole(self, expected: str) -> NoReturn:
        raise ValueError(f"{self.where}: {expected} belongs there; {REMEDY}")

    def _value(self, key: str) -> Any:
        if key not in self.fields:
            self.refuse(key, "one")
        return self.fields[key]


def published_file(path: Path | str, option: str, remedy: str) -> Path:
    """The path of an existing file. option: the field of the recipe that the error names; remedy: where to get it."""
    path = Path(path).expanduser()
    if not path.is_file():
        refuse(option, str(path), f"there is no such file; {remedy}")
    if path.stat().st_size > LARGEST_FILE_BYTES:
        refuse(option, str(path), f"larger than {LARGEST_FILE_BYTES >> 30} GiB, as no published file is; {remedy}")
    return path


def read_json(path: Path, keys: Collection[str] | None = None) -> Any:
    """The content of a JSON file. keys: of every object keep only these, which saves most of the memory.

    Raises ValueError that names the file and what is wrong with it.
    """
    kept = None if keys is None else frozenset(keys)
    return _parsed(path.read_bytes(), str(path), kept)


def read_json_object(path: Path, keys: Collection[str] | None = None) -> Record:
    """The content of a JSON file that holds one object."""
    record = Record(read_json(path, keys), str(path))
    if not isinstance(record.fields, dict):
        record.refuse_whole("a JSON object")
    return record


def is_list(path: Path) -> bool:
    """Whether a file holds a JSON list, as ALBEF's annotation files do, and none of the published ones."""
    with path.open("rb") as file:
        return file.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def read_list(path: Path, keys: Collection[str]) -> Iterator[Record]:
    """The objects of a JSON file that holds a list of them; of every object only these keys."""
    for number, fields in enumerate(read_json(path, keys)):
        record = Record(fields, f"{path}, entry {number}")
        if not isinstance(fields, dict):
            record.refuse_whole("a JSON object")
        yield record


def read_json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file with one JSON object a line; empty lines are skipped.

    Raises ValueError that names file and line.
    """
    with path.open("rb") as file:
        for number in range(1, sys.maxsize):
            line = file.readline(LARGEST_LINE_BYTES + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > LARGEST_LINE_BYTES:
                Record({}, where).refuse_whole(f"a line of at most {LARGEST_LINE_BYTES >> 20} MiB")
            if line.strip():
                record = Record(_parsed(line, where), where)
                if not isinstance(record.fields, dict):
                    record.refuse_whole("a JSON object")
                yield record


def _parsed(content: bytes, where: str, keys: frozenset[str] | None = None) -> Any:
    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return unique_keys(pairs if keys is None else [pair for pair in pairs if pair[0] in keys])

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=kept)
    except RepeatedKey as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits, too deep
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not JSON in UTF-8 ({reason}); download the file again") from None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shortened(value: object) -> str:
    # Of a container only the kind is shown: its repr would fill the screen, or the memory.
    if isinstance(value, dict):
        return "a JSON object"  # some of its keys were not kept
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = value if isinstance(value, str) else str(value)
    if len(text) > MOST_SHOWN:
        return f"{text[:MOST_SHOWN]!r}… ({len(text):,} characters)"
    return repr(value)


@dataclass
class ImageFolders:
    """The folder of a task's images and its subfolders, each listed once: no image is looked up by itself."""

    root: Path
    option: str
    """The recipe's field that named the folder, for errors."""
    remedy: str
    """Where to get the images."""
    leave_out_missing: bool = False
    """Whether missing images are left out instead of refused."""
    looked_up: set[Path] = field(default_factory=set)
    """Images looked up."""
    missing: dict[Path, None] = field(default_factory=dict)
    """Images looked up that are not there, in order."""
    _subfolders: dict[str, Path] = field(default_factory=dict)
    _listings: dict[Path, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self):
        self.root = Path(self.root).expanduser()
        if not self.root.is_dir():
            refuse(self.option, str(self.root), f"there is no such folder; {self.remedy}")

    def subfolder(self, name: str) -> Path:
        """`root/name` if that is a folder, else root itself: images unpacked without their folder are found too."""
        return self.inside([name])

    def inside(self, names: Sequence[str]) -> Path:
        """The folder of these names, one in the other, from root on, without those that are not there."""
        path = "/".join(names)
        if path not in self._subfolders:
            here = self.root
            for name in names:
                here = here / name if name in self._listing(here) and (here / name).is_dir() else here
            self._subfolders[path] = here
        return self._subfolders[path]

    def has(self, image: Path) -> bool:
        """Whether an image is there; if not, it is recorded for `refuse_missing`."""
        self.looked_up.add(image)
        there = image.name in self._listing(image.parent)
        if not there:
            self.missing[image] = None
        return there

    def refuse_missing(self) -> None:
        """Raise ValueError, with the number and the first names, if an image was missing and may not be left out."""
        if not self.looked_up:
            return
        first = ", ".join(str(path.relative_to(self.root)) for path in list(self.missing)[:NAMES_SHOWN])
        counts = f"{len(self.missing):,} of {len(self.looked_up):,} images are not there, the first {first}"
        if len(self.missing) == len(self.looked_up):
            refuse(self.option, str(self.root), f"{counts}; {self.remedy}")
        if self.missing and not self.leave_out_missing:
            waiver = f"{self.option.partition('.')[0]}.leave_out_missing"  # one field for all splits
            refuse(self.option, str(self.root), f"{counts}; {self.remedy}, or go without them by {waiver}")
        if self.missing and distributed.is_main():
            log.warning("%s = %r: %s; the entries that name them are left out", self.option, str(self.root), counts)

    def keep(self, entries: Iterable[Entry], images: Callable[[Entry], Iterable[Path]]) -> TaskEntries[Entry]:
        """The entries whose images are all there. Raises ValueError as `refuse_missing`."""
        # All are looked up, so that each counts as missing.
        there = [(entry, all([self.has(image) for image in images(entry)])) for entry in entries]
        self.refuse_missing()
        kept = tuple(entry for entry, found in there if found)
        return TaskEntries(kept, {"image missing": len(there) - len(kept)} if len(kept) < len(there) else {})

    def _listing(self, folder: Path) -> frozenset[str]:
        if folder not in self._listings:
            self._listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        return self._listings[folder]
