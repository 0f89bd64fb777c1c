"""The sets of labelled images by name, and how to name one on a command line.

cifar10@/data/cifar10              a published set's usual split: test, or validation where test has no labels
cifar10:train@/data/cifar10        another split
imagenet_a@/data/wds_imagenet-a    the same set as converted shards (KEY.webp, KEY.cls, classnames.txt)
folder@/data/birds                 class folders of any names;  shards@/data/wds_birds  converted shards
scenes_shape:train@FOLDER          the built-in images, in the folder that holds their shards
birds.yaml, birds.yaml:train       the user's own set (see user_sets)
classes.yaml@/data/pairs-*.tar     image-text shards and a class file (label, templates, classes)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from modstruct.config import DataConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.classification.labelled_images import SPLIT_FOLDERS, LabelledImages, SetFolder
from modstruct.data.classification.labelled_shards import NAMES, LabelledSamples, read_class_shards
from modstruct.data.classification.published import READERS, published_sets, read_by_torchvision, templates_of
from modstruct.data.classification.user_sets import load_user_set, read_user_set
from modstruct.errors import require

YAML = (".yaml", ".yml")
SCENES = {"scenes_colour": "zero_shot.yaml"} | {
    f"scenes_{factor}": f"zero_shot_{factor}.yaml" for factor in ("shape", "size", "fill")
}
"""The class file that each of the built-in sets has beside its shards."""
SCENES_REMEDY = "give the folder that the scenes' shards were written to (data.cache has it)"


@dataclass(frozen=True)
class NamedSet:
    """name: of published_sets or SCENES, or a YAML file. split: None for the usual one. location: behind the @."""

    name: str
    split: str | None
    location: str | None


def parse_set(text: str) -> NamedSet:
    """Read `NAME[:SPLIT]@FOLDER`, `FILE.yaml[:SPLIT]` or `FILE.yaml@SHARDS`; ValueError says what is wrong."""

    def need(condition: object, problem: str) -> None:
        if not condition:
            raise ValueError(f"the set {text!r}: {problem}")

    head, at, location = text.partition("@")
    # A file's name may have a colon.
    name, _, split = (head, "", None) if head.endswith(YAML) or ":" not in head else head.rpartition(":")
    parsed = NamedSet(name, split, location or None)
    need(split in (None, *SPLIT_FOLDERS), f"the split {split!r} is none of {', '.join(SPLIT_FOLDERS)}")
    need(location or not at, "nothing is named behind the @")
    if parsed.name.endswith(YAML):
        need(not location or not split, "shards with a class file have no splits: name the shards of one split")
        return parsed
    known = (*published_sets(), *SCENES)
    near = "".join(f" (did you mean {other}?)" for other in difflib.get_close_matches(name, known, 1))
    shards = text if "/" in text or ".tar" in text else "'SHARDS'"
    others = f"a YAML file, NAME={shards} for shards with captions, or eval for data.eval"
    need(name in known, f"there is no set {name!r}{near}; the sets are {', '.join(known)}, {others}")
    need(location, f"give the folder that the files lie in: {name}@FOLDER")
    need(split in (None, *_splits(name)), f"{name} has no split {split}, only {', '.join(_splits(name))}")
    return parsed


def set_splits(text: str) -> tuple[str, ...]:
    """The splits that a set can have, training first; results are published on the last, its usual one."""
    parsed = parse_set(text)
    if not parsed.name.endswith(YAML):
        return _splits(parsed.name)
    return ("test",) if parsed.location else tuple(load_user_set(Path(parsed.name).expanduser()).images)


def open_labelled(text: str, config: DataConfig) -> LabelledImages:
    """The set that a command line names (see the module), its files checked and its labels read.

    config: workers, cache, largest image, tolerated fraction of bad images. The set is named as in the registry, after
    its folder (`folder`, `shards`) or by its YAML file; -SPLIT is appended unless it is the usual split.
    Raises ValueError or FileNotFoundError that names the set, what is missing or wrong, and what to download.
    """
    parsed = parse_set(text)
    known, file = parsed.name, Path(parsed.name).expanduser()
    if known.endswith(YAML) and parsed.location is not None:
        return LabelledSamples(file.stem, parsed.location, load_classes(file), config)
    described = load_user_set(file) if parsed.location is None else None
    splits = tuple(described.images) if described else _splits(known)
    split = parsed.split or splits[-1]
    suffix = "" if split == splits[-1] else f"-{split}"
    if described:
        remedy = f"correct `images` or `classes` in {file}"
        require(split in splits, f"{file}: images", described.images, f"give a place for the split {split}")
        name = described.name + suffix
        source = SetFolder(name, file.parent, remedy, name, split, described.templates, config)
        return read_user_set(source, file, described)
    root = Path(parsed.location or "").expanduser()
    name = (root.resolve().name if known in ("folder", "shards") else known) + suffix
    remedy = SCENES_REMEDY if known in SCENES else published_sets()[known].download
    source = SetFolder(known, root, remedy, name, split, templates_of(known), config)
    if not root.is_dir():
        source.refuse("there is no such folder")
    if known in SCENES:
        for needed in (SCENES[known], f"{split}-*.tar"):
            if not any(root.glob(needed)):
                source.refuse(f"there is no {needed} in it")
        return LabelledSamples(name, str(root / f"{split}-*.tar"), load_classes(root / SCENES[known]), config)
    if known == "shards" or (root / NAMES).is_file():
        # In converted sets the split that results are published on is always called test.
        return read_class_shards(replace(source, split=split if suffix else "test"))
    return READERS.get(known, read_by_torchvision)(source)


def _splits(name: str) -> tuple[str, ...]:
    return tuple(SPLIT_FOLDERS if name in SCENES else published_sets()[name].splits)
