"""The user's own set of labelled images, described by a small YAML file.

name: my_birds                        # a plain file name
images: {train: train, test: test}    # or one location, which is then the split test; from the YAML file's folder on:
                                      #   a folder with a folder a class; a CSV file with the columns `image` (a
                                      #   path from the CSV file's folder on) and `label`; or tar shards (path, glob
                                      #   or brace pattern) with KEY.cls or, if `label` is given, with KEY.json
label: species                        # CSV column, or field of KEY.json; default: `label`, or KEY.cls
classes: {jay: Eurasian jay, tit: blue tit}   # by folder or label; a list for labels 0, 1, …; optional for
                                              # class folders, whose names are the default
templates: ["a photo of a {}, a bird"]        # default: the paper's single one
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig
from modstruct.data.classification.class_files import ZeroShotClasses, check_classes, check_templates, read_keys
from modstruct.data.classification.labelled_images import SPLIT_FOLDERS, LabelledImages, SetFolder, read_class_folders
from modstruct.data.classification.labelled_shards import LabelledSamples, read_labelled_shards
from modstruct.data.classification.prompts import PAPER_TEMPLATE, published_sets
from modstruct.data.downstream.published_files import PLAIN_NAME
from modstruct.data.shards.sources import expand_pattern
from modstruct.errors import refuse, require

log = logging.getLogger(__name__)
KEYS = ("name", "images", "label", "classes", "templates")


@dataclass(frozen=True)
class UserSet:
    """What a YAML file says, checked. images: place of each split. classes: readable name by label or folder."""

    name: str
    images: dict[str, str]
    label: str | None
    classes: dict[str, str] | None
    templates: tuple[str, ...]


def load_user_set(path: Path) -> UserSet:
    """Read and check a set's YAML file. Raises FileNotFoundError or ValueError, naming file, key and remedy."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a YAML file that describes the set")
    content = read_keys(path, KEYS, {"pictures": "images"})
    name, images, label, classes, templates = (content.get(key) for key in KEYS)
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        refuse(f"{path}: name", name, "give a plain file name: letters, digits, '.', '_' and '-', the first no dot")
    images = {"test": images} if isinstance(images, str) else images
    if not isinstance(images, dict) or not images or not all(isinstance(p, str) and p for p in images.values()):
        wanted = "give a folder, a CSV file or a pattern of shards, or one of them a split"
        refuse(f"{path}: images", images, wanted)
    for split in images:
        wanted = f"give only the splits {', '.join(SPLIT_FOLDERS)}"
        require(split in SPLIT_FOLDERS, f"{path}: images.{split}", images[split], wanted)
    wanted = "give the name of a CSV column or of a field of KEY.json, as text, or leave it out"
    require(label is None or (isinstance(label, str) and label != ""), f"{path}: label", label, wanted)
    classes = dict(enumerate(classes)) if isinstance(classes, list) else classes
    named = None if classes is None else check_classes(path, classes)
    templates = [PAPER_TEMPLATE] if "templates" not in content else templates
    return UserSet(name, images, label, named, check_templates(path, templates))


def open_user_set(path: Path, split: str | None, config: DataConfig) -> LabelledImages:
    """A split of the user's set; None: the first of test, validation, train. Raises ValueError with file and remedy."""
    described = load_user_set(path)
    usual = next(split for split in ("test", "validation", "train") if split in described.images)
    split = split or usual
    require(split in described.images, f"{path}: images", described.images, f"give a place for the split {split}")
    name = described.name if split == usual else f"{described.name}-{split}"
    remedy = f"correct `images` or `classes` in {path}"
    source = SetFolder(name, path.parent, remedy, name, split, described.templates, config)
    images, classes = path.parent / Path(described.images[split]).expanduser(), described.classes
    if images.is_dir():
        folders = source.subfolders(images) if classes is None else list(classes)
        names = published_sets()["folder"].named(folders) if classes is None else list(classes.values())
        return read_class_folders(source, images, folders, names)
    if classes is None:
        wanted = "give a mapping or a list of them; only a folder of class folders names its own"
        refuse(f"{path}: classes", None, wanted)
    if images.suffix.lower() == ".csv":
        return _from_table(source, images, described.label or "label", classes)
    if described.label is not None:
        named = ZeroShotClasses(described.label, described.templates, classes)
        return LabelledSamples(name, split, str(images), named, config)
    shards = [Path(shard) for shard in expand_pattern(str(images), False, f"{path}: images")]
    return read_labelled_shards(source, shards, list(classes.values()))


def _from_table(source: SetFolder, file: Path, column: str, classes: dict[str, str]) -> LabelledImages:
    """column: of the labels."""
    try:
        header, *rows = csv.reader(source.text(file).splitlines() or [""], skipinitialspace=True)
    except csv.Error as error:
        source.refuse(f"{file} is no CSV file ({error})")
    if "image" not in header and "picture" in header:
        header[header.index("picture")] = "image"
        log.warning("%s: the column 'picture' is now called 'image'; the old name is still read", file)
    if wrong := [name for name in ("image", column) if header.count(name) != 1]:
        source.refuse(f"{file} has {'two columns' if wrong[0] in header else 'no column'} called {wrong[0]!r}")
    of_class = {label: row for row, label in enumerate(classes)}
    for line, row in enumerate(rows, 2):
        label = dict(zip(header, row, strict=False)).get(column)
        if row and len(row) != len(header):
            source.refuse(f"{file}, line {line}: {len(row)} values in {len(header)} columns; quote one with ','")
        if row and label not in of_class:
            source.refuse(f"{file}, line {line}: the label {label!r} is none of the {len(classes)} classes")
    paths = [row[header.index("image")] for row in rows if row]
    labels = np.array([of_class[row[header.index(column)]] for row in rows if row], dtype=np.int64)
    present = set(labels.tolist())
    repeated = [path for path, times in Counter(paths).items() if times > 1]
    source.note(f"images occur in several rows of {file}, each of which counts", repeated)
    source.note(f"classes have no image in {file}", [name for name, row in of_class.items() if row not in present])
    return LabelledImages(source, source.images(file.parent, paths), labels, list(classes.values()))
