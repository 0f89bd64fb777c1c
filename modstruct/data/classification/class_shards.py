"""Tar shards with an image and a label a sample: KEY.webp (or png, jpg) and KEY.cls, as CLIP_benchmark converts sets.

FOLDER/
  classnames.txt                          one a line, by label
  zeroshot_classification_templates.txt   one a line, {c} where the name goes (optional)
  test/  nshards.txt  0.tar  1.tar  …     and train/ where it was converted
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.data.classification.folder_sets import split_folder
from modstruct.data.classification.labelled_images import FoundImages, hashed
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.shards.faults import BadSample
from modstruct.data.shards.index import KINDS, LARGEST_BYTES, printable
from modstruct.data.shards.tar_headers import CutOff, DamagedHeader, next_member
from modstruct.data.transforms.decoding import decode_image

NAMES, TEMPLATES, COUNT = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
LONGEST_LABEL = 32  # bytes of a .cls
BUFFER_BYTES = 1 << 20


class ShardImages:
    """Images inside tars, by place; one tar is open at a time, since sets are read in order."""

    def __init__(self, shards: Sequence[Path], places: np.ndarray, keys: Sequence[str]):
        """places: (n, 3) int64: number of the shard, first byte and bytes of each image."""
        self.shards, self._places = tuple(shards), places
        self._keys = np.array([os.fsencode(key) for key in keys])
        self._open: tuple[int, int] | None = None  # number of a shard and its file descriptor
        self.fingerprint = hashed(places, list(keys))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None}

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Close the shard that is open; it is opened again when needed."""
        if getattr(self, "_open", None) is not None:
            os.close(self._open[1])
            self._open = None

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return printable(os.fsdecode(self._keys[index].item()))

    def picture(self, index: int, max_pixels: int) -> Image.Image:
        shard, start, size = self._places[index].tolist()
        where = f"{self.shards[shard]}: {self.key(index)}"
        try:
            if self._open is None or self._open[0] != shard:
                self.close()
                self._open = shard, os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            content = os.pread(self._open[1], size, start)
        except OSError as error:
            raise BadSample("unreadable shard", f"{where}: {error.strerror or error}") from None
        if len(content) < size:
            raise BadSample("truncated shard", where)
        return decode_image(content, max_pixels, where)


def has_class_shards(root: Path) -> bool:
    """Whether a folder is one of a converted set."""
    return (root / NAMES).is_file()


def read_class_shards(place: SetFolder, split: str) -> FoundImages:
    """A split of a converted set. Samples without image or label are left out; a damaged shard is refused."""
    if not (place.root / NAMES).is_file():
        place.refuse(f"there is no {NAMES} in it")
    classes = place.lines(place.root / NAMES)
    templates = place.lines(place.root / TEMPLATES) if (place.root / TEMPLATES).is_file() else None
    if templates is not None:
        templates = [template.replace("{c}", "{}") for template in templates]
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if wrong is not None:
            place.refuse(f"{place.root / TEMPLATES}: {wrong!r} has no single {{c}}, where the name of the class goes")
    folder = split_folder(place, split)
    shards = sorted(folder.glob("*.tar"), key=_by_number)
    if not shards:
        place.refuse(f"there is no shard *.tar in {folder}")
    if (folder / COUNT).is_file():
        stated = place.text(folder / COUNT).strip()
        if stated != str(len(shards)):
            place.refuse(f"{folder} has {len(shards)} shards, and its {COUNT} says {stated}")
    return labelled_shards(place, shards, classes, templates)


def labelled_shards(
    place: SetFolder, shards: Sequence[Path], classes: Sequence[str], templates: Sequence[str] | None = None
) -> FoundImages:
    """The images of tars with a label beside each, from 0 to the number of classes less one."""
    places, labels, keys = [], [], []
    left_out: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        for key, found in _samples(place, shard):
            cause = _cause(found)
            if cause is not None:
                left_out[cause] += 1
                continue
            label = int(found["label"])
            if label >= len(classes):
                place.refuse(f"{shard}: the label {label} of {printable(key)} is none of the {len(classes)} classes")
            places.append((number, *found["picture"]))
            labels.append(label)
            keys.append(key)
    if not places:
        place.refuse(f"no sample of {len(shards)} shards has image and label ({dict(left_out)})")
    store = ShardImages(shards, np.array(places, dtype=np.int64), keys)
    return FoundImages(store, np.array(labels, dtype=np.int64), classes, templates, dict(left_out))


def _cause(found: dict) -> str | None:
    """Why a sample cannot be used."""
    if "picture" not in found:
        return "no image"
    if "label" not in found:
        return "no label"
    if not found["label"].isdigit():
        return "malformed label"
    return "oversized member" if found["picture"][1] > LARGEST_BYTES["image"] else None


def _samples(place: SetFolder, shard: Path):
    """Yields (key, {"image": (first byte, bytes), "label": its text}) of each run of members with one key."""
    key, found = None, {}
    for member_key, extension, start, size, content in _members(place, shard):
        if member_key != key:
            if found:
                yield key, found
            key, found = member_key, {}
        if KINDS.get(extension) == "image":
            found.setdefault("picture", (start, size))
        elif extension == "cls":
            found["label"] = content.decode("ascii", "replace").strip()
    if found:
        yield key, found


def _members(place: SetFolder, shard: Path):
    """Yields (key, extension, first byte, bytes, content of a .cls) of each ordinary member."""
    try:
        with open(shard, "rb", buffering=BUFFER_BYTES) as file:
            total, start = os.fstat(file.fileno()).st_size, 0
            while (member := next_member(file, start)) is not None:
                if member.data + member.size > total:
                    raise CutOff
                start = member.end
                if not member.ordinary:
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension, content = extension.lower(), b""
                if extension == "cls" and member.size <= LONGEST_LABEL:
                    file.seek(member.data)
                    content = file.read(member.size)
                yield f"{folder}{slash}{stem}", extension, member.data, member.size, content
    except (CutOff, DamagedHeader):
        place.refuse(f"{shard} is damaged or cut off")
    except OSError as error:
        place.refuse(f"{shard} cannot be read ({error.strerror or error})")


def _by_number(path: Path) -> list:
    """Sorts 2.tar before 10.tar."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]
