"""The user's own set of labelled images, described by a small YAML file.

name: my_birds                        # a plain file name
images: {train: train, test: test}  # or one place, which is then the split test; from the YAML file's folder on:
                                      #   a folder with a folder a class; a CSV file with the columns `image` (a
                                      #   path from the CSV file's folder on) and `label`; or tar shards (path, glob
                                      #   or brace pattern) with KEY.cls or, if `label` is given, with KEY.json
label: species                        # CSV column, or field of KEY.json; left out: `label`, or KEY.cls
classes: {jay: Eurasian jay, tit: blue tit}   # by folder or label; a list for labels 0, 1, …; may be left out for
                                              # folders, whose names are then taken
templates: ["a photo of a {}, a bird"]        # left out: the paper's single one
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modstruct.config import DataConfig
from modstruct.data.classification.caption_shards import LabelledSamples
from modstruct.data.classification.class_files import (
    ZeroShotClasses,
    check_classes,
    check_templates,
    read_keys,
    refuse_key,
)
from modstruct.data.classification.class_shards import labelled_shards
from modstruct.data.classification.folder_sets import SPLIT_FOLDERS, class_folders
from modstruct.data.classification.labelled_images import FoundImages, LabelledImages, LabelledSet
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.classification.templates import PAPER_TEMPLATE
from modstruct.data.downstream.published_files import PLAIN_NAME
from modstruct.data.shards.sources import expand_pattern

KEYS = ("name", "pictures", "label", "classes", "templates")
SPLITS = tuple(SPLIT_FOLDERS)


@dataclass(frozen=True)
class UserSet:
    """What a YAML file says, checked."""

    path: Path
    name: str
    pictures: dict[str, str]
    """Place of each split."""
    label: str | None
    classes: dict[str, str] | None
    """Readable name by label or folder, in order of class."""
    templates: tuple[str, ...]


def load_user_set(path: Path) -> UserSet:
    """Read and check a set's YAML file. Raises FileNotFoundError or ValueError, naming file, key and remedy."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a YAML file that describes the set")
    content = read_keys(path, KEYS)
    name, pictures, label = content.get("name"), content.get("pictures"), content.get("label")
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        refuse_key(path, "name", name, "a plain file name: letters, digits, '.', '_' and '-', the first no dot")
    if isinstance(pictures, str):
        pictures = {"test": pictures}
    if not isinstance(pictures, dict) or not pictures or not all(isinstance(p, str) and p for p in pictures.values()):
        refuse_key(path, "pictures", pictures, "a folder, a CSV file or a pattern of shards, or one of them a split")
    for split in pictures:
        if split not in SPLITS:
            refuse_key(path, f"pictures.{split}", pictures[split], f"only the splits {', '.join(SPLITS)}")
    if label is not None and (not isinstance(label, str) or not label):
        refuse_key(path, "label", label, "the name of a CSV column or of a field of KEY.json, as text, or leave it out")
    classes = content.get("classes")
    if isinstance(classes, list):
        classes = dict(enumerate(classes))
    templates = content.get("templates", [PAPER_TEMPLATE])
    return UserSet(
        path,
        name,
        pictures,
        label,
        None if classes is None else check_classes(path, classes),
        check_templates(path, templates),
    )


def open_user_set(path: Path, split: str | None, config: DataConfig) -> LabelledImages:
    """A split of the user's set; split: None for the first there is of test, validation, train.

    Raises ValueError, naming file and remedy.
    """
    described = load_user_set(path)
    usual = next(split for split in ("test", "validation", "train") if split in described.pictures)
    split = split or usual
    if split not in described.pictures:
        refuse_key(path, "pictures", described.pictures, f"a place for the split {split}")
    name = described.name if split == usual else f"{described.name}-{split}"
    place = SetFolder(name, path.parent, f"correct `images` or `classes` in {path}")
    pictures = str(path.parent / Path(described.pictures[split]).expanduser())
    if Path(pictures).is_dir():
        found = class_folders(place, Path(pictures), described.classes)
    elif described.classes is None:
        refuse_key(path, "classes", None, "a mapping or a list of them; only a folder of class folders names its own")
    elif pictures.lower().endswith(".csv"):
        found = _from_table(place, Path(pictures), described)
    elif described.label is not None:
        named = ZeroShotClasses(described.label, described.templates, described.classes)
        return LabelledSamples(name, split, pictures, named, config)
    else:
        shards = [Path(shard) for shard in expand_pattern(pictures, False, f"{path}: images")]
        found = labelled_shards(place, shards, list(described.classes.values()))
    return LabelledSet(name, split, found, described.templates, config)


def _from_table(place: SetFolder, file: Path, described: UserSet) -> FoundImages:
    rows = list(place.table(file, ("picture", described.label or "label")))
    row_of = {label: row for row, label in enumerate(described.classes)}
    unknown = next((label for _, label in rows if label not in row_of), None)
    if unknown is not None:
        place.refuse(f"{file}: the label {unknown!r} is none of the {len(row_of)} classes")
    labels = np.array([row_of[label] for _, label in rows], dtype=np.int64)
    return FoundImages(
        place.pictures(file.parent, [path for path, _ in rows]), labels, list(described.classes.values())
    )
