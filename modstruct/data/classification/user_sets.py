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

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from modstruct.config import DataConfig
from modstruct.data.classification.class_files import (
    ZeroShotClasses,
    check_classes,
    check_templates,
    read_keys,
    refuse_key,
)
from modstruct.data.classification.labelled_images import FoundImages, LabelledImages, LabelledSet
from modstruct.data.classification.labelled_shards import LabelledSamples, labelled_shards
from modstruct.data.classification.prompts import PAPER_TEMPLATE
from modstruct.data.classification.set_folder import SPLIT_FOLDERS, SetFolder, read_class_folders
from modstruct.data.downstream.published_files import PLAIN_NAME
from modstruct.data.shards.sources import expand_pattern

KEYS = ("name", "images", "label", "classes", "templates")
OLD_NAMES = {"images": "pictures"}
OLD_COLUMNS = {"image": "picture"}
SPLITS = tuple(SPLIT_FOLDERS)


@dataclass(frozen=True)
class UserSet:
    """What a YAML file says, checked."""

    path: Path
    name: str
    images: dict[str, str]
    """Folder, CSV file or pattern of shards of each split."""
    label: str | None
    classes: dict[str, str] | None
    """Readable name by label or folder, in order of class."""
    templates: tuple[str, ...]


def load_user_set(path: Path) -> UserSet:
    """Read and check a set's YAML file. Raises FileNotFoundError or ValueError, naming file, key and remedy."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a YAML file that describes the set")
    content = read_keys(path, KEYS, OLD_NAMES)
    name, images, label = content.get("name"), content.get("images"), content.get("label")
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        refuse_key(path, "name", name, "a plain file name: letters, digits, '.', '_' and '-', the first no dot")
    if isinstance(images, str):
        images = {"test": images}
    if not isinstance(images, dict) or not images or not all(isinstance(p, str) and p for p in images.values()):
        refuse_key(path, "images", images, "a folder, a CSV file or a pattern of shards, or one of them a split")
    for split in images:
        if split not in SPLITS:
            refuse_key(path, f"images.{split}", images[split], f"only the splits {', '.join(SPLITS)}")
    if label is not None and (not isinstance(label, str) or not label):
        refuse_key(path, "label", label, "the name of a CSV column or of a field of KEY.json, as text, or leave it out")
    classes = content.get("classes")
    if isinstance(classes, list):
        classes = dict(enumerate(classes))
    templates = content.get("templates", [PAPER_TEMPLATE])
    return UserSet(
        path,
        name,
        images,
        label,
        None if classes is None else check_classes(path, classes),
        check_templates(path, templates),
    )


def open_user_set(path: Path, split: str | None, config: DataConfig) -> LabelledImages:
    """A split of the user's set; None: the first of test, validation, train. Raises ValueError with file and remedy."""
    described = load_user_set(path)
    usual = next(split for split in ("test", "validation", "train") if split in described.images)
    split = split or usual
    if split not in described.images:
        refuse_key(path, "images", described.images, f"a place for the split {split}")
    name = described.name if split == usual else f"{described.name}-{split}"
    source = SetFolder(name, path.parent, f"correct `images` or `classes` in {path}")
    images = str(path.parent / Path(described.images[split]).expanduser())
    if Path(images).is_dir():
        found = read_class_folders(source, Path(images), described.classes)
    elif described.classes is None:
        refuse_key(path, "classes", None, "a mapping or a list of them; only a folder of class folders names its own")
    elif images.lower().endswith(".csv"):
        found = _from_table(source, Path(images), described.label or "label", described.classes)
    elif described.label is not None:
        named = ZeroShotClasses(described.label, described.templates, described.classes)
        return LabelledSamples(name, split, images, named, config)
    else:
        shards = [Path(shard) for shard in expand_pattern(images, False, f"{path}: images")]
        found = labelled_shards(source, shards, list(described.classes.values()))
    return LabelledSet(name, split, found, described.templates, config)


def _from_table(source: SetFolder, file: Path, label: str, classes: dict[str, str]) -> FoundImages:
    rows = list(source.table(file, ("image", label), old_names=OLD_COLUMNS))
    labels = source.labels([text for _, text in rows], list(classes), file)
    paths = Counter(path for path, _ in rows)
    if repeated := [path for path, times in paths.items() if times > 1]:
        source.note(f"{len(repeated)} images occur in several rows of {file}, each of which counts", repeated)
    if absent := sorted(set(classes) - {text for _, text in rows}):
        source.note(f"{len(absent)} classes have no image in {file}", absent)
    return FoundImages(source.images(file.parent, [path for path, _ in rows]), labels, list(classes.values()))
