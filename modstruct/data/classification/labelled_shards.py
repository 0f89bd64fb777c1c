"""Labelled images in tar shards.

Converted sets have an image and a label a sample, KEY.webp (or png, jpg) and KEY.cls, as CLIP_benchmark converts them:

FOLDER/
  classnames.txt                          one a line, by label
  zeroshot_classification_templates.txt   one a line, {c} where the name goes (optional)
  test/  nshards.txt  0.tar  1.tar  …     and train/ where it was converted

Image-text shards have the label in the metadata, KEY.json: any such data with a class file, and the built-in scenes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from modstruct import distributed
from modstruct.config import DataConfig, Source
from modstruct.data.classification.class_files import ZeroShotClasses, load_classes, some_of
from modstruct.data.classification.labelled_images import FoundImages, hashed
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.faults import NAMED, BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSample, digest_of, spaced
from modstruct.data.shards.index import LARGEST_BYTES
from modstruct.data.shards.members import IMAGES, MemberGroups, SampleMembers, Tally, printable
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import Samples, open_samples
from modstruct.data.shards.tar_headers import CutOff, DamagedHeader, next_member
from modstruct.data.synthetic.splits import SPLITS
from modstruct.data.transforms.decoding import decode_image

NAMES, TEMPLATES, COUNT = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
LABELLED_KINDS = dict.fromkeys(IMAGES, "image") | {"cls": "label"}
LABELLED = "a sample is KEY.webp (or png, jpg, jpeg) and KEY.cls, one after the other in the tar"
LONGEST_LABEL = 32  # bytes of a .cls
BUFFER_BYTES = 1 << 20
LABELS_CHECKED, MOST_FIELDS = 10_000, 20
SCENES_LABELS = {"colour": "zero_shot.yaml", "shape": "zero_shot_shape.yaml"}

log = logging.getLogger(__name__)


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
    left_out, unused = Tally(), Tally()
    for number, shard in enumerate(shards):
        for sample, label in _samples(source, shard, unused):
            image = sample.found.get("image")
            if image is None:
                left_out.add("no image", f"{shard}: {sample.key}")
            elif label is None:
                left_out.add("no label", f"{shard}: {sample.key}")
            elif not label.isdigit():
                left_out.add("malformed label", f"{shard}: {sample.key}")
            elif image.size > LARGEST_BYTES["image"]:
                left_out.add("oversized member", f"{shard}: {sample.key}")
            elif int(label) >= len(classes):
                text = f"the label {int(label)} of {printable(sample.key)} is none of the {len(classes)} classes"
                source.refuse(f"{shard}: {text}")
            else:
                places.append((number, image.data, image.size))
                labels.append(int(label))
                keys.append(sample.key)
    if not places:
        ignored = f"; not used: {dict(unused.counts)}" if unused.counts else ""
        source.refuse(
            f"no sample of {len(shards)} shards has image and label ({dict(left_out.counts)}{ignored}); {LABELLED}"
        )
    for cause, count in left_out.counts.items():
        source.note(f"{count} samples left out: {cause}", left_out.examples[cause])
    for cause, count in unused.counts.items():
        source.note(f"{count} {cause} are not used", unused.examples[cause])
    store = ShardImages(shards, np.array(places, dtype=np.int64), keys)
    return FoundImages(store, np.array(labels, dtype=np.int64), classes, templates, dict(left_out.counts))


def _samples(source: SetFolder, shard: Path, unused: Tally) -> Iterator[tuple[SampleMembers, str | None]]:
    """Yields each sample that has an image or a label, and its label as text."""
    groups = MemberGroups(LABELLED_KINDS, ("image", "label"), unused)
    try:
        with open(shard, "rb", buffering=BUFFER_BYTES) as file:
            total, start = os.fstat(file.fileno()).st_size, 0
            while (member := next_member(file, start)) is not None:
                if member.data + member.size > total:
                    raise CutOff
                start = member.end
                if member.ordinary:
                    yield from ((sample, _label(file, sample)) for sample in groups.add(member))
            yield from ((sample, _label(file, sample)) for sample in groups.end())
    except (CutOff, DamagedHeader):
        source.refuse(f"{shard} is damaged or cut off")
    except OSError as error:
        source.refuse(f"{shard} cannot be read ({error.strerror or error})")


def _label(file: BinaryIO, sample: SampleMembers) -> str | None:
    member = sample.found.get("label")
    if member is None:
        return None
    if member.size > LONGEST_LABEL:
        return ""
    file.seek(member.data)
    return file.read(member.size).decode("ascii", "replace").strip()


def _by_number(path: Path) -> list:
    """Sorts 2.tar before 10.tar."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


def check_labels(
    classes: ZeroShotClasses, samples: Samples, config: DataConfig, field: str, thorough: bool = True
) -> str | None:
    """Compare the labels of image-text shards with a class file before anything is embedded, reading KEY.json alone.

    Of a large source some 10,000 samples, evenly spaced, are read; thorough: ten times as many where none of them has a
    label. field: the recipe's field of the source, for messages. Returns None if a sample has a label, else what is
    wrong. Raises ValueError for labels that are not among the classes.
    """
    reader = ShardReader(samples, config)
    unknown, seen = Tally(), set[str]()
    fields: dict[str, None] = {}
    for limit in (LABELS_CHECKED, 10 * LABELS_CHECKED) if thorough else (LABELS_CHECKED,):
        numbers = list(spaced(samples, limit))
        for sample in numbers:
            with suppress(BadSample):  # counted where it is read with its image
                metadata = reader.metadata(sample)
                label = classes.label_of(metadata)
                if label is None:
                    fields |= dict.fromkeys(list(metadata)[:MOST_FIELDS])
                elif label in classes.classes:
                    seen.add(label)
                else:
                    unknown.add(repr(metadata[classes.label])[:LONGEST_LABEL], samples.place(sample))
        if seen or unknown.counts or len(numbers) == len(samples):
            break
    if unknown.counts:
        named = "; ".join(f"{label}: {unknown.examples[label][0]}" for label, _ in unknown.counts.most_common(NAMED))
        raise ValueError(
            f"{field}: of {len(numbers)} samples that were looked at, {unknown.counts.total()} have a label "
            f"{classes.label} that is not among the classes {some_of(classes.classes)} ({named}): add it to `classes` "
            "of the class file, or make it null in KEY.json"
        )
    repeated = [name for name, times in Counter(classes.classes.values()).items() if times > 1]
    if repeated:
        log.warning("%s: no prompt tells classes of one name apart: %s", field, some_of(repeated, NAMED))
    absent = [label for label in classes.classes if label not in seen]
    if seen and absent and len(numbers) == len(samples):
        log.warning("%s: no sample is of these classes, which chance counts: %s", field, some_of(absent, NAMED))
    if seen:
        return None
    there = f"its fields are {some_of(map(printable, fields))}" if fields else "there is none, or an empty one"
    missing = f"none of {len(numbers)} samples of {field} has a label {classes.label!r} in its KEY.json ({there})"
    if len(numbers) < len(samples):  # the rest may have labels
        log.warning("%s; zero-shot classification is left out where the others have none either", missing)
        return None
    return missing


class LabelledSamples:
    """The LabelledImages of image-text shards: the label is in each sample's KEY.json, and the captions stay.

    metadata has all fields of KEY.json, and "label" (class row, -1 where the file has none or null) and "key".
    """

    def __init__(self, name: str, split: str, shards: str, classes: ZeroShotClasses, config: DataConfig):
        """shards: path, glob or brace pattern. Raises ValueError as `open_samples` does."""
        self.name, self.split, self.config = name, split, config
        self.classes: Sequence[str] = tuple(classes.classes.values())
        self.templates: Sequence[str] = classes.templates
        self.samples = open_samples([Source(shards)], config, name, distributed.is_main())
        faults: Counter[str] = sum((Counter(shard["faults"]) for shard in self.samples.shard_faults), Counter())
        self.left_out: Mapping[str, int] = dict(faults)
        self.fingerprint = hashed(self.samples.content, classes.label, list(classes.classes.items()))
        self._named, self._reader = classes, ShardReader(self.samples, config)
        missing = check_labels(classes, self.samples, config, name) if distributed.is_main() else None
        if missing:
            raise ValueError(f"{shards}: {missing}: correct `label` of the class file")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EvaluationSample:
        """Raises BadSample, IndexError, and ValueError for a label that is none of the classes."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of {self.name}")
        raw = self._reader.read(index)
        metadata = raw.metadata | {"label": self._named.row_of(raw.metadata), "key": raw.key}
        image = decode_image(raw.image, self.config.max_image_pixels, raw.where)
        return EvaluationSample(image, raw.captions, metadata, digest=digest_of(raw.image))


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
