"""The published sets as published_sets.yaml lists them, and their readers, by their own files; nothing is downloaded.

torchvision.datasets says which images and labels there are. The check of every path and label, the error for what is
missing or damaged, and the decoding (data.max_image_pixels, bad samples) are ours. torchvision compares the files of
CIFAR, SVHN, STL10 and Flowers102 with their published MD5 before it reads them: CIFAR's are pickles, which could run
any code, so no others than the published ones are opened.
Not by torchvision: GTSRB, of which that reads one form alone; Caltech-101, to which that gives no split; ImageNet,
since that unpacks archives into the user's folder; and what it does not know: V2 (Recht et al. 2019), Sketch (Wang et
al. 2019), A and R (Hendrycks et al. 2021).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from scipy.io import loadmat
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from modstruct.data.classification.labelled_images import (
    ImageArray,
    LabelledImages,
    SetFolder,
    read_class_folders,
    read_listed,
)
from modstruct.files import read_yaml

PAPER_TEMPLATE = "a photo of the {}"  # Jiang et al. 2023; without a full stop, unlike all of CLIP's
DRAWN = 30
"""Images of each class of Caltech-101 for training, as most work on it has (and Radford et al. 2021)."""
BACKGROUND = "BACKGROUND_Google"  # no class of Caltech-101
V2_FOLDERS = ("matched-frequency-format-val", "matched-frequency", "threshold0.7-format-val", "top-images-format-val")
SUBSET_CLASSES = 200  # of ImageNet-A and -R
TRUTH, KAGGLE_TRUTH = "ILSVRC2012_validation_ground_truth.txt", "LOC_val_solution.csv"
SIGNS_TRUTH = "GT-final_test.csv"
CHECKSUMS = ("train_list", "test_list", "meta", "split_list", "_file_dict")  # where torchvision's classes have them


@dataclass(frozen=True)
class PublishedSet:
    """An entry of published_sets.yaml, whose head explains the keys."""

    download: str
    splits: Any
    torchvision: str = ""
    folder: str = ""
    unread: Sequence[str] = ()
    classes: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    templates: Sequence[str] = ()

    def named(self, classes: Sequence[str]) -> list[str]:
        """Names of classes by label, as words. classes: as they are published."""
        return [self.renamed.get(name, " ".join(name.replace("_", " ").split())) for name in self.classes or classes]


@cache
def published_sets() -> dict[str, PublishedSet]:
    """Every set that is known by name."""
    content = cast(dict[str, Any], read_yaml(Path(__file__).with_name("published_sets.yaml")))
    return {name: PublishedSet(**fields) for name, fields in content.items()}


def templates_of(name: str) -> tuple[str, ...]:
    """The paper's template and, behind it, CLIP's ensemble for a set; imagenet_* share ImageNet's."""
    if name.startswith("imagenet"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # takes seconds

        return (PAPER_TEMPLATE, *(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    return (PAPER_TEMPLATE, *(published_sets()[name].templates if name in published_sets() else ()))


@cache
def imagenet() -> dict[str, str]:
    """CLIP's name of each of ImageNet's 1,000 WordNet ids, by label. Two names occur twice: missile and sunglasses."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


class LabelledSTL10(datasets.STL10):
    """Without the images that have no label, whose 2.7 GB would be needed and summed."""

    train_list = datasets.STL10.train_list[:2]


def read_by_torchvision(source: SetFolder) -> LabelledImages:
    """A split of a set that torchvision reads. Raises ValueError that names the set, its file and what to download."""
    known = published_sets()[source.known]
    theirs, first, *others = known.splits[source.split]
    for other in known.unread:
        if (source.root / other).exists() and not (source.root / known.folder).exists():
            source.refuse(f"{source.root / other} is of the binary version, which is not read")
    parts = known.folder.split("/")
    base = source.folder_with(first, *("/".join(parts[start:]) for start in range(len(parts))))
    if missing := [base / file for file in others if not (base / file).exists()]:
        source.refuse(f"there is no {missing[0]}")
    with TemporaryDirectory() as root:  # in which the set lies where torchvision looks for it
        link = Path(root, known.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base.resolve())
        try:
            images, labels, names = _contents(source.known, Path(root), theirs)
        except Exception as error:  # torchvision, pickle, scipy and csv raise nearly anything for a damaged file
            published = repr([getattr(getattr(datasets, known.torchvision), name, None) for name in CHECKSUMS])
            for file in (first, *others):
                if repr(file) in published and calculate_md5(base / file) not in published:
                    source.refuse(f"{base / file} is not the published file: its MD5 is another")
            problem = f"{type(error).__name__}: {error}".replace(str(link), str(base))
            source.refuse(f"torchvision cannot read {', '.join(others or [first])} in {base} ({problem})")
    rows, classes = np.array(labels, dtype=np.int64), known.named(names)
    if len(images) != len(rows):
        source.refuse(f"the split {source.split} has {len(images)} images and {len(rows)} labels")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(classes):
        source.refuse(f"the split {source.split} has a label outside the {len(classes)} classes")
    if isinstance(images, np.ndarray):
        return LabelledImages(source, ImageArray(images, source.split), rows, classes)
    paths = [os.path.relpath(path, link / first) for path in images]
    return LabelledImages(source, source.images(base / first, paths), rows, classes)


def _contents(name: str, root: Path, split: str) -> tuple[Sequence[str] | np.ndarray, Sequence[int], Sequence[str]]:
    """Paths, or pixels (n, H, W, 3); labels (n,); names of the classes, none where torchvision has none."""
    dataset = LabelledSTL10 if name == "stl10" else getattr(datasets, published_sets()[name].torchvision)
    if name.startswith("cifar"):
        found = dataset(root, split == "train")
        return found.data, found.targets, found.classes
    if name in ("stl10", "svhn"):
        found = dataset(root if name == "stl10" else root / name, split)
        return found.data.transpose(0, 2, 3, 1), found.labels, getattr(found, "classes", ())
    if name == "oxford_pets":  # torchvision's own names have every word with a capital
        found = dataset(root, split)
        breeds = {label: path.stem.rpartition("_")[0] for path, label in zip(found._images, found._labels, strict=True)}
        if len(breeds) != len(found.classes):
            raise ValueError("two breeds have one number")
        return found._images, found._labels, [breeds[label] for label in range(len(breeds))]
    found = dataset(root, split, loader=str)  # of images: gives the path
    if name == "dtd" and len(found.classes) != sum(path.is_dir() for path in (root / "dtd/dtd/images").glob("[!.]*")):
        raise ValueError("its classes, which torchvision would number, are not those of the images")
    paths, labels = zip(*(found[number] for number in range(len(found))), strict=True)
    return paths, labels, found.classes


def read_folder(source: SetFolder) -> LabelledImages:
    """Class folders of any names, in the split's folder or, for test where no split has a folder, in the root."""
    base = source.split_folder()
    folders = source.subfolders(base)
    return read_class_folders(source, base, folders, published_sets()["folder"].named(folders))


def read_caltech101(source: SetFolder) -> LabelledImages:
    """Objects (Fei-Fei et al. 2004), 101 classes without the background class.

    No split is published. Here 30 images of each class, those with the smallest hash of their name, are for training
    and all others for test: a draw that is the same everywhere.
    """
    base = source.folder_with("101_ObjectCategories", "caltech101", "caltech-101") / "101_ObjectCategories"
    folders = sorted(source.subfolders(base), key=lambda name: (name == BACKGROUND, name))
    every, drawn = read_class_folders(source, base, folders, folders), list[str]()
    classes = [name.lower() for name in published_sets()["caltech101"].named(folders) if name != "BACKGROUND Google"]
    keys = [every.store.key(number) for number in range(len(every))]
    for folder in folders:
        of_class = [key for key in keys if key.startswith(f"{folder}/")]
        drawn += sorted(of_class, key=lambda key: hashlib.blake2b(key.encode(), digest_size=16).digest())[:DRAWN]
    ours = (every.labels < len(classes)) & (np.isin(keys, drawn) == (source.split == "train"))
    return LabelledImages(source, source.images(base, np.array(keys)[ours].tolist()), every.labels[ours], classes)


def read_imagenet(source: SetFolder) -> LabelledImages:
    """ImageNet-1K (Russakovsky et al. 2015) and its classes under a shift of distribution.

    In folders by WordNet id; those of V2 are numbers (sorted as text, 10 would come before 2). Labels of A and R count
    their 200 classes, in ImageNet's order.
    """
    classes, kind = imagenet(), "WordNet ids of ImageNet"
    if source.known == "imagenet":
        split = {"train": "train", "validation": "val"}[source.split]
        base = source.folder_with(split, "ILSVRC/Data/CLS-LOC", "imagenet") / split
        if split == "val" and not source.subfolders(base):
            return _flat_validation(source, base)
    elif source.known == "imagenet_v2":
        base = source.folder_with("0", *(f"imagenetv2-{name}" for name in V2_FOLDERS))
        classes = {str(label): name for label, name in enumerate(classes.values())}
        kind = "class numbers from 0 to 999"
    else:
        base = source.first_folder(source.known.replace("_", "-"), source.known.removeprefix("imagenet_"))
    if source.known in ("imagenet_a", "imagenet_r"):
        there = source.subfolders(base)
        if len(there) != SUBSET_CLASSES:
            own = "a set of your own that has other classes is described by a YAML file"
            source.refuse(f"{base} has {len(there)} class folders instead of {SUBSET_CLASSES} ({own})")
        classes = {wnid: name for wnid, name in classes.items() if wnid in there}
    return read_class_folders(source, base, list(classes), list(classes.values()), kind)


def _flat_validation(source: SetFolder, base: Path) -> LabelledImages:
    """The images in one folder, as published, with Kaggle's table of their labels or the development kit's."""
    file = source.root / KAGGLE_TRUTH
    if file.is_file():
        rows = sorted(source.table(file, "ImageId", "PredictionString"))
        listed = [(f"{image}.JPEG", boxes.partition(" ")[0]) for image, boxes in rows]
    else:
        kit = source.folder_with(TRUTH, "ILSVRC2012_devkit_t12/data", "data")
        file = kit / TRUTH
        try:
            synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
            wnids = {str(number): str(wnid) for number, wnid in synsets[["ILSVRC2012_ID", "WNID"]].tolist()}
        except Exception as error:  # scipy raises nearly anything for a damaged file
            source.refuse(f"{kit / 'meta.mat'} cannot be read ({type(error).__name__}: {error})")
        labels = [wnids.get(number, number) for number in source.lines(file)]
        listed = [(f"ILSVRC2012_val_{number:08d}.JPEG", label) for number, label in enumerate(labels, 1)]
    return read_listed(source, file, base, listed, imagenet())


def read_gtsrb(source: SetFolder) -> LabelledImages:
    """Traffic signs (Stallkamp et al. 2012). torchvision reads one of the two forms of the training images."""
    classes, signs = published_sets()["gtsrb"].classes, source.first_folder("gtsrb/GTSRB", "GTSRB")
    if source.split == "train":
        forms = [signs / name for name in ("Training", "Final_Training/Images")]
        base = next((folder for folder in forms if folder.is_dir()), forms[0])
        return read_class_folders(source, base, [f"{label:05d}" for label in range(len(classes))], classes)
    file = source.folder_with(SIGNS_TRUTH, "gtsrb", "..") / SIGNS_TRUTH
    named = {str(label): name for label, name in enumerate(classes)}
    listed = source.table(file, "Filename", "ClassId", ";")
    return read_listed(source, file, signs / "Final_Test/Images", listed, named)


READERS: dict[str, Callable[[SetFolder], LabelledImages]] = {
    **dict.fromkeys(("imagenet", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2"), read_imagenet),
    "caltech101": read_caltech101,
    "gtsrb": read_gtsrb,
    "folder": read_folder,
}
"""Of the sets that torchvision.datasets does not read as they should be."""
