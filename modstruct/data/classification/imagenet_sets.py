"""ImageNet-1K (Russakovsky et al. 2015) and the sets that test its classes under a shift of distribution.

V2 (Recht et al. 2019), Sketch (Wang et al. 2019), A (Hendrycks et al. 2021b) and R (Hendrycks et al. 2021a). The
folders of V2 are called by label, 0 to 999; all others by WordNet id. A and R have 200 of the classes each, and
their labels count those 200.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from modstruct.data.classification.class_names import imagenet, imagenet_labels
from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.set_folder import SetFolder

CLASSES = 1000
OF_A_SUBSET = 200
V2_FOLDERS = (
    "imagenetv2-matched-frequency-format-val",
    "imagenetv2-matched-frequency",
    "imagenetv2-threshold0.7-format-val",
    "imagenetv2-top-images-format-val",
)
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE_TRUTH = "LOC_val_solution.csv"


def read_imagenet(place: SetFolder, split: str) -> FoundImages:
    """train in folders by WordNet id; validation likewise, or in one folder as published, with its list of labels."""
    folder = {"train": "train", "validation": "val"}[split]
    base = place.folder_with(folder, "ILSVRC/Data/CLS-LOC", "imagenet") / folder
    if split == "validation" and not place.subfolders(base):
        return _flat_validation(place, base)
    return _by_wnid(place, base, CLASSES)


def read_imagenet_v2(place: SetFolder, split: str) -> FoundImages:
    """10,000 images in folders 0 to 999, in order of number (sorted as texts, 10 would come before 2)."""
    base = place.folder_with("0", *V2_FOLDERS)
    folders = place.subfolders(base)
    labels = {name: int(name) for name in folders if re.fullmatch(r"0|[1-9]\d{0,2}", name)}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        place.refuse(f"the folder {base / unknown[0]} is no class number from 0 to 999")
    absent = sorted(set(range(CLASSES)) - set(labels.values()))
    if absent:
        place.refuse(f"{len(absent)} of the 1,000 class folders are not in {base}, the first {absent[0]}")
    store, numbers = place.class_folders(base, labels)
    return FoundImages(store, numbers, imagenet())


def read_imagenet_sketch(place: SetFolder, split: str) -> FoundImages:
    """50,889 drawings of the 1,000 classes."""
    return _by_wnid(place, _wnid_folder(place, "sketch", "imagenet-sketch"), CLASSES)


def read_imagenet_a(place: SetFolder, split: str) -> FoundImages:
    """7,500 images that a ResNet-50 gets wrong, of 200 classes."""
    return _by_wnid(place, _wnid_folder(place, "imagenet-a"), OF_A_SUBSET)


def read_imagenet_r(place: SetFolder, split: str) -> FoundImages:
    """30,000 renditions (art, cartoons, toys, …) of 200 classes."""
    return _by_wnid(place, _wnid_folder(place, "imagenet-r"), OF_A_SUBSET)


def _wnid_folder(place: SetFolder, *folders: str) -> Path:
    return next((place.root / name for name in folders if (place.root / name).is_dir()), place.root)


def _by_wnid(place: SetFolder, base: Path, expected: int) -> FoundImages:
    """Class folders by WordNet id. expected: how many there must be; a subset is numbered in ImageNet's order."""
    folders, known = place.subfolders(base), imagenet_labels()
    unknown = [name for name in folders if name not in known]
    if unknown:
        place.refuse(f"the folder {base / unknown[0]} is none of ImageNet's 1,000 WordNet ids")
    if len(folders) != expected:
        absent = sorted(known.keys() - set(folders)) if expected == CLASSES else []
        first = f", {absent[0]} for one is not there" if absent else ""
        place.refuse(
            f"{base} has {len(folders)} class folders instead of {expected}{first} (a set of your own that has other "
            "classes is described by a YAML file)"
        )
    subset = sorted(folders, key=known.__getitem__)
    names = imagenet()
    store, labels = place.class_folders(base, {name: number for number, name in enumerate(subset)})
    return FoundImages(store, labels, [names[known[name]] for name in subset])


def _flat_validation(place: SetFolder, base: Path) -> FoundImages:
    """The 50,000 images in one folder, labelled by the development kit, or by Kaggle's table of solutions."""
    for table in (place.root / KAGGLE_TRUTH, base.parent / KAGGLE_TRUTH):
        if table.is_file():
            wnids = {name: value.split(" ")[0] for name, value in place.table(table, ("ImageId", "PredictionString"))}
            paths = [f"{name}.JPEG" for name in sorted(wnids)]
            return _labelled_by(place, base, paths, [wnids[name] for name in sorted(wnids)], table)
    kits = [place.root / name for name in ("ILSVRC2012_devkit_t12/data", "data", ".")]
    kit = next((folder for folder in kits if (folder / TRUTH).is_file()), None)
    if kit is None:
        place.refuse(
            f"{base} has no class folders, and neither ILSVRC2012_devkit_t12 nor {KAGGLE_TRUTH} is there to say which "
            "image is of which class"
        )
    (synsets,) = place.matlab(kit / "meta.mat", "synsets")
    if synsets.dtype.names is None or not {"ILSVRC2012_ID", "WNID"} <= set(synsets.dtype.names):
        place.refuse(f"{kit / 'meta.mat'} has no fields ILSVRC2012_ID and WNID")
    wnid_of = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    numbers = place.lines(kit / TRUTH)
    paths = [f"ILSVRC2012_val_{place_in_list:08d}.JPEG" for place_in_list in range(1, len(numbers) + 1)]
    return _labelled_by(place, base, paths, [wnid_of.get(number, number) for number in numbers], kit / TRUTH)


def _labelled_by(place: SetFolder, base: Path, paths: list[str], wnids: list[str], file: Path) -> FoundImages:
    known = imagenet_labels()
    unknown = next((wnid for wnid in wnids if wnid not in known), None)
    if unknown is not None:
        place.refuse(f"{file}: {unknown!r} is none of ImageNet's 1,000 classes")
    labels = np.array([known[wnid] for wnid in wnids], dtype=np.int64)
    return FoundImages(place.pictures(base, paths), labels, imagenet())
