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

from dataclasses import dataclass
from pathlib import Path

from modstruct.data.classification.class_files import ZeroShotClasses, check_classes, check_templates, read_keys
from modstruct.data.classification.labelled_images import (
    SPLIT_FOLDERS,
    LabelledImages,
    SetFolder,
    read_class_folders,
    read_listed,
)
from modstruct.data.classification.labelled_shards import LabelledSamples, read_labelled_shards
from modstruct.data.classification.published import PAPER_TEMPLATE, published_sets
from modstruct.data.downstream.published_files import PLAIN_NAME
from modstruct.data.shards.objects import is_object
from modstruct.data.shards.sources import expand_pattern
from modstruct.errors import refuse, require

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
    content = {"templates": [PAPER_TEMPLATE]} | read_keys(path, KEYS, {"pictures": "images"})
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
    in_order = {split: images[split] for split in SPLIT_FOLDERS if split in images}
    return UserSet(name, in_order, label, named, check_templates(path, templates))


def read_user_set(source: SetFolder, path: Path, described: UserSet) -> LabelledImages:
    """A split of the user's set. path: of the YAML file. Raises ValueError with file and remedy."""
    given, classes = described.images[source.split], described.classes
    images = path.parent / Path(given).expanduser()
    if images.is_dir():
        folders = source.subfolders(images) if classes is None else list(classes)
        names = published_sets()["folder"].named(folders) if classes is None else list(classes.values())
        return read_class_folders(source, images, folders, names)
    if classes is None:
        wanted = "give a mapping or a list of them; only a folder of class folders names its own"
        refuse(f"{path}: classes", None, wanted)
    if is_object(given) and described.label is None:
        refuse(f"{path}: images", given, "shards with KEY.cls are read from local files; copy them, or give `label`")
    if images.suffix.lower() == ".csv":
        listed = source.table(images, "image", described.label or "label")
        return read_listed(source, images, images.parent, listed, classes)
    if described.label is not None:
        labelled = ZeroShotClasses(described.label, described.templates, classes, str(path))
        return LabelledSamples(source.name, given if is_object(given) else str(images), labelled, source.config)
    shards = [Path(shard) for shard in expand_pattern(str(images), False, f"{path}: images")]
    return read_labelled_shards(source, shards, list(classes.values()))
