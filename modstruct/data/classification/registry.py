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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from modstruct.config import DataConfig
from modstruct.data.classification.labelled_images import FoundImages, LabelledImages, LabelledSet
from modstruct.data.classification.labelled_shards import (
    SCENES_LABELS,
    has_class_shards,
    open_scenes,
    open_with_class_file,
    read_class_shards,
)
from modstruct.data.classification.prompts import PAPER_TEMPLATE, templates_of
from modstruct.data.classification.published_arrays import read_cifar10, read_cifar100, read_stl10, read_svhn
from modstruct.data.classification.published_images import (
    read_caltech101,
    read_dtd,
    read_fgvc_aircraft,
    read_flowers102,
    read_food101,
    read_gtsrb,
    read_imagenet,
    read_imagenet_a,
    read_imagenet_r,
    read_imagenet_sketch,
    read_imagenet_v2,
    read_oxford_pets,
    read_rendered_sst2,
    read_stanford_cars,
)
from modstruct.data.classification.set_folder import SetFolder, read_folder
from modstruct.data.classification.user_sets import load_user_set, open_user_set

SPLITS = ("train", "validation", "test")
TWO, THREE, TEST = ("train", "test"), SPLITS, ("test",)


@dataclass(frozen=True)
class PublishedSet:
    """A set: its reader, its splits, and where its files come from."""

    read: Callable[[SetFolder, str], FoundImages]
    splits: tuple[str, ...]
    """Those with public labels; results are published on the last."""
    download: str
    """What to download, and which folder to give."""


SETS: dict[str, PublishedSet] = {
    "caltech101": PublishedSet(
        read_caltech101,
        TWO,
        "download caltech-101.zip from Caltech's archive and unpack 101_ObjectCategories.tar.gz",
    ),
    "cifar10": PublishedSet(
        read_cifar10, TWO, "download CIFAR-10, python or binary version, from its page at Toronto and unpack it"
    ),
    "cifar100": PublishedSet(
        read_cifar100, TWO, "download CIFAR-100, python or binary version, from its page at Toronto and unpack it"
    ),
    "dtd": PublishedSet(read_dtd, THREE, "download dtd-r1.0.1.tar.gz from Oxford's VGG page and unpack it"),
    "fgvc_aircraft": PublishedSet(
        read_fgvc_aircraft, THREE, "download fgvc-aircraft-2013b.tar.gz from Oxford's VGG page and unpack it"
    ),
    "flowers102": PublishedSet(
        read_flowers102,
        THREE,
        "download 102flowers.tgz (unpack it: jpg/), imagelabels.mat and setid.mat from Oxford's VGG page",
    ),
    "food101": PublishedSet(read_food101, TWO, "download food-101.tar.gz from ETH Zurich's page and unpack it"),
    "gtsrb": PublishedSet(
        read_gtsrb,
        TWO,
        "download GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip from the "
        "benchmark's archive and unpack them into one folder",
    ),
    "imagenet": PublishedSet(
        read_imagenet,
        ("train", "validation"),
        "download ILSVRC2012 from image-net.org and unpack it into train/WNID/ and val/ (in folders by WordNet id, or "
        "in one folder with ILSVRC2012_devkit_t12 beside it)",
    ),
    "imagenet_a": PublishedSet(read_imagenet_a, TEST, "download imagenet-a.tar from the authors' page and unpack it"),
    "imagenet_r": PublishedSet(read_imagenet_r, TEST, "download imagenet-r.tar from the authors' page and unpack it"),
    "imagenet_sketch": PublishedSet(
        read_imagenet_sketch, TEST, "download ImageNet-Sketch.zip from the authors' page and unpack it (sketch/)"
    ),
    "imagenet_v2": PublishedSet(
        read_imagenet_v2,
        TEST,
        "download imagenetv2-matched-frequency.tar.gz from the authors' page and unpack it into folders 0 to 999",
    ),
    "oxford_pets": PublishedSet(
        read_oxford_pets, TWO, "download images.tar.gz and annotations.tar.gz from Oxford's VGG page and unpack both"
    ),
    "rendered_sst2": PublishedSet(
        read_rendered_sst2, THREE, "download rendered-sst2.tgz as CLIP's page on it says, and unpack it"
    ),
    "stanford_cars": PublishedSet(
        read_stanford_cars,
        TWO,
        "put cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into one folder (Stanford's own page "
        "is gone, so they come from a copy)",
    ),
    "stl10": PublishedSet(read_stl10, TWO, "download stl10_binary.tar.gz from Stanford's STL-10 page and unpack it"),
    "svhn": PublishedSet(read_svhn, TWO, "download train_32x32.mat and test_32x32.mat from Stanford's SVHN page"),
    "folder": PublishedSet(read_folder, SPLITS, "give a folder with a folder of images for each class"),
    "shards": PublishedSet(
        read_class_shards, SPLITS, "give a set's folder as CLIP_benchmark converts it: classnames.txt and test/0.tar, …"
    ),
}
YAML = (".yaml", ".yml")
NAMED_BY_FOLDER = ("folder", "shards")
SCENES = {f"scenes_{label}": label for label in SCENES_LABELS}


@dataclass(frozen=True)
class NamedSet:
    """A set as a command line names it."""

    name: str
    """Of SETS or SCENES; or a YAML file."""
    split: str | None
    """None for the usual one."""
    location: str | None
    """Behind the @: a folder, or a pattern of shards."""

    @property
    def is_file(self) -> bool:
        return self.name.endswith(YAML)


def parse_set(text: str) -> NamedSet:
    """Read `NAME[:SPLIT]@FOLDER`, `FILE.yaml[:SPLIT]` or `FILE.yaml@SHARDS`; ValueError says what is wrong."""
    named, at, location = text.partition("@")
    head, colon, split = named.rpartition(":")
    whole = not colon or named.endswith(YAML)  # a colon in a file's name
    parsed = NamedSet(named, None, location or None) if whole else NamedSet(head, split, location or None)
    if parsed.split is not None and parsed.split not in SPLITS:
        _refuse(text, f"the split {parsed.split!r} is none of {', '.join(SPLITS)}")
    if at and not location:
        _refuse(text, "nothing is named behind the @")
    if parsed.is_file:
        if location and parsed.split is not None:
            _refuse(text, "shards with a class file have no splits: name the shards of one split behind the @")
        return parsed
    if parsed.name not in SETS and parsed.name not in SCENES:
        _refuse(text, f"there is no set {parsed.name!r}; the sets are {', '.join((*SETS, *SCENES))}, or a YAML file")
    if not location:
        _refuse(text, f"give the folder that the files lie in: {parsed.name}@FOLDER")
    if parsed.split is not None and parsed.split not in _splits(parsed):
        _refuse(text, f"{parsed.name} has no split {parsed.split}, only {', '.join(_splits(parsed))}")
    return parsed


def set_splits(text: str) -> tuple[str, ...]:
    """The splits that a set can have, training first."""
    parsed = parse_set(text)
    if parsed.is_file:
        there = () if parsed.location else load_user_set(Path(parsed.name).expanduser()).images
        return tuple(split for split in SPLITS if split in there) or TEST
    return _splits(parsed)


def open_labelled(text: str, config: DataConfig) -> LabelledImages:
    """The set that a command line names (see the module), its files checked and its labels read.

    config: workers, cache, largest image, tolerated fraction of bad images. The set is named as in the registry, after
    its folder (`folder`, `shards`) or by its YAML file; -SPLIT is appended unless it is the usual split.
    Raises ValueError or FileNotFoundError that names the set, what is missing or wrong, and what to download.
    """
    parsed = parse_set(text)
    if parsed.location is None:
        return open_user_set(Path(parsed.name).expanduser(), parsed.split, config)
    if parsed.is_file:
        return open_with_class_file(Path(parsed.name).expanduser(), parsed.location, config)
    root = Path(parsed.location).expanduser()
    usual = _splits(parsed)[-1]
    split = parsed.split or usual
    name = root.resolve().name if parsed.name in NAMED_BY_FOLDER else parsed.name
    name = name if split == usual else f"{name}-{split}"
    if parsed.name in SCENES:
        remedy = "give the folder that the scenes' shards were written to (data.cache has it)"
        source = _folder(parsed.name, root, remedy)
        return open_scenes(name, source, split, SCENES[parsed.name], config)
    published = SETS[parsed.name]
    source = _folder(parsed.name, root, published.download)
    if has_class_shards(root):
        # In converted sets the split that results are published on is always called test.
        found = read_class_shards(source, "test" if split == usual else split)
    else:
        found = published.read(source, split)
    templates = templates_of(parsed.name) if found.templates is None else (PAPER_TEMPLATE, *found.templates)
    return LabelledSet(name, split, found, templates, config)


def _splits(parsed: NamedSet) -> tuple[str, ...]:
    return SPLITS if parsed.name in SCENES else SETS[parsed.name].splits


def _folder(name: str, root: Path, remedy: str) -> SetFolder:
    source = SetFolder(name, root, remedy)
    if not root.is_dir():
        source.refuse("there is no such folder")
    return source


def _refuse(text: str, problem: str) -> NoReturn:
    raise ValueError(f"the set {text!r}: {problem}")
