"""Labelled images in tar shards.

Converted sets have an image and a label a sample, KEY.webp (or png, jpg) and KEY.cls, as CLIP_benchmark converts them:

FOLDER/
  classnames.txt                          one a line, by label
  zeroshot_classification_templates.txt   one a line, {c} where the name goes (optional)
  test/  nshards.txt  0.tar  1.tar  …     and train/ where it was converted

Image-text shards have the label in the metadata, KEY.json: any such data with a class file, and the built-in scenes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from modstruct.config import DataConfig, Source
from modstruct.data.classification.class_files import ZeroShotClasses, load_classes
from modstruct.data.classification.labelled_images import FoundImages, hashed
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSample
from modstruct.data.shards.index import KINDS, LARGEST_BYTES, printable
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples
from modstruct.data.shards.tar_headers import CutOff, DamagedHeader, next_member
from modstruct.data.synthetic.splits import SPLITS
from modstruct.data.transforms.decoding import decode_image

NAMES, TEMPLATES, COUNT = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
LONGEST_LABEL = 32  # bytes of a .cls
BUFFER_BYTES = 1 << 20
SCENES_LABELS = {"colour": "zero_shot.yaml", "shape": "zero_shot_shape.yaml"}


class ShardImages:
    """Images inside tars, by offset; one tar is open at a time, since sets are read in order."""

    _open: tuple[int, int] | None = None  # number of a shard and its file descriptor

    def __init__(self, shards: Sequence[Path], places: np.ndarray, keys: Sequence[str]):
        """places: (n, 3) int64: number of the shard, first byte and bytes of each image."""
        self.shards, self._places = tuple(shards), places
        self._keys = np.array([os.fsencode(key) for key in keys])
        self.fingerprint = hashed(places, list(keys))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None}

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Close the open shard; it is opened again when needed."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return printable(os.fsdecode(self._keys[index].item()))

    def image(self, index: int, max_pixels: int) -> Image.Image:
        shard, start, size = self._places[index].tolist()
        where = f"{self.shards[shard]}: {self.key(index)}"
        try:
            content = os.pread(self._descriptor(shard), size, start)
        except OSError as error:
            raise BadSample("unreadable shard", f"{where}: {error.strerror or error}") from None
        if len(content) < size:
            raise BadSample("truncated shard", where)
        return decode_image(content, max_pixels, where)

    def _descriptor(self, shard: int) -> int:
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = shard, os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[1]


def has_class_shards(root: Path) -> bool:
    """Whether a folder holds a converted set."""
    return (root / NAMES).is_file()


def read_class_shards(source: SetFolder, split: str) -> FoundImages:
    """A split of a converted set. Samples without image or label are left out; a damaged shard is refused."""
    if not (source.root / NAMES).is_file():
        source.refuse(f"there is no {NAMES} in it")
    classes = source.lines(source.root / NAMES)
    templates = source.lines(source.root / TEMPLATES) if (source.root / TEMPLATES).is_file() else None
    if templates is not None:
        templates = [template.replace("{c}", "{}") for template in templates]
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if wrong is not None:
            source.refuse(f"{source.root / TEMPLATES}: {wrong!r} has no single {{c}}, where the name of the class goes")
    folder = source.split_folder(split)
    shards = sorted(folder.glob("*.tar"), key=_by_number)
    if not shards:
        source.refuse(f"there is no shard *.tar in {folder}")
    if (folder / COUNT).is_file():
        stated = source.text(folder / COUNT).strip()
        if stated != str(len(shards)):
            source.refuse(f"{folder} has {len(shards)} shards, and its {COUNT} says {stated}")
    return labelled_shards(source, shards, classes, templates)


def labelled_shards(
    source: SetFolder, shards: Sequence[Path], classes: Sequence[str], templates: Sequence[str] | None = None
) -> FoundImages:
    """The images of tars with a label beside each, from 0 to the number of classes less one."""
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    keys: list[str] = []
    left_out: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        for key, span, label in _samples(source, shard):
            if span is None:
                left_out["no image"] += 1
            elif label is None:
                left_out["no label"] += 1
            elif not label.isdigit():
                left_out["malformed label"] += 1
            elif span[1] > LARGEST_BYTES["image"]:
                left_out["oversized member"] += 1
            elif int(label) >= len(classes):
                text = f"the label {int(label)} of {printable(key)} is none of the {len(classes)} classes"
                source.refuse(f"{shard}: {text}")
            else:
                places.append((number, *span))
                labels.append(int(label))
                keys.append(key)
    if not places:
        source.refuse(f"no sample of {len(shards)} shards has image and label ({dict(left_out)})")
    store = ShardImages(shards, np.array(places, dtype=np.int64), keys)
    return FoundImages(store, np.array(labels, dtype=np.int64), classes, templates, dict(left_out))


def _samples(source: SetFolder, shard: Path) -> Iterator[tuple[str, tuple[int, int] | None, str | None]]:
    """Yields key, (first byte, bytes) of the image, and label as text, of each run of members with one key."""
    for key, members in groupby(_members(source, shard), key=itemgetter(0)):
        span, label = None, None
        for _, extension, start, size, content in members:
            if KINDS.get(extension) == "image":
                span = span or (start, size)
            elif extension == "cls":
                label = content.decode("ascii", "replace").strip()
        if span is not None or label is not None:
            yield key, span, label


def _members(source: SetFolder, shard: Path) -> Iterator[tuple[str, str, int, int, bytes]]:
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
        source.refuse(f"{shard} is damaged or cut off")
    except OSError as error:
        source.refuse(f"{shard} cannot be read ({error.strerror or error})")


def _by_number(path: Path) -> list:
    """Sorts 2.tar before 10.tar."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


class LabelledSamples:
    """The LabelledImages of image-text shards: the label is in each sample's KEY.json, and the captions stay.

    metadata has all fields of KEY.json, and "label" (class row, -1 where the file has none or null) and "key".
    """

    def __init__(self, name: str, split: str, shards: str, classes: ZeroShotClasses, config: DataConfig):
        """shards: path, glob or brace pattern. Raises ValueError as `open_samples` does."""
        self.name, self.split, self.config = name, split, config
        self.classes: Sequence[str] = tuple(classes.classes.values())
        self.templates: Sequence[str] = classes.templates
        self.samples = open_samples([Source(shards)], config, name)
        faults: Counter[str] = sum((Counter(shard["faults"]) for shard in self.samples.shard_faults), Counter())
        self.left_out: Mapping[str, int] = dict(faults)
        self.fingerprint = hashed(self.samples.fingerprint, classes.label, list(classes.classes.items()))
        self._named, self._reader = classes, ShardReader(self.samples, config)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EvaluationSample:
        """Raises BadSample, IndexError, and ValueError for a label that is none of the classes."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of {self.name}")
        raw = self._reader.read(index)
        metadata = raw.metadata | {"label": self._named.row_of(raw.metadata), "key": raw.key}
        return EvaluationSample(
            decode_image(raw.image, self.config.max_image_pixels, raw.where), raw.captions, metadata
        )


def open_scenes(name: str, source: SetFolder, split: str, label: str, config: DataConfig) -> LabelledSamples:
    """A split of the built-in images, in the folder that `ensure_scenes` fills, by colour or by shape."""
    file = source.root / SCENES_LABELS[label]
    if not file.is_file():
        source.refuse(f"there is no {file.name} in it")
    shards = sorted(source.root.glob(f"{split}-*.tar"))
    if split not in SPLITS or not shards:
        source.refuse(f"there is no shard {split}-*.tar in it")
    return LabelledSamples(name, split, str(source.root / f"{split}-*.tar"), load_classes(file), config)


def open_with_class_file(file: Path, shards: str, config: DataConfig) -> LabelledSamples:
    """Image-text shards with a class file (`label`, `templates`, `classes`), named after that file."""
    return LabelledSamples(file.stem, "test", shards, load_classes(file), config)
