"""Sets published as one folder a class: Caltech-101, rendered SST-2, GTSRB, and any folder of class folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from modstruct.data.classification.class_names import CALTECH101_MENDED, GTSRB, readable
from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.set_folder import SetFolder

CALTECH101_TRAINING = 30
"""Images of each class for training, as most work on it has (and Radford et al. 2021)."""
SST2_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
SST2_CLASSES = ("negative", "positive")
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def read_caltech101(place: SetFolder, split: str) -> FoundImages:
    """Objects (Fei-Fei et al. 2004), 101 classes without the background class.

    No split is published. Here 30 images of each class, those with the smallest hash of their name, are for training
    and all others for test: a draw that is the same everywhere.
    """
    base = place.folder_with("101_ObjectCategories", "caltech101", "caltech-101") / "101_ObjectCategories"
    names = [name for name in place.subfolders(base) if name != "BACKGROUND_Google"]
    store, labels = place.class_folders(base, {name: label for label, name in enumerate(names)})
    keys = [store.key(number) for number in range(len(store))]
    hashes = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys]
    chosen = np.zeros(len(keys), dtype=bool)
    for label in range(len(names)):
        rows = np.flatnonzero(labels == label).tolist()
        chosen[sorted(rows, key=hashes.__getitem__)[:CALTECH101_TRAINING]] = True
    kept = np.flatnonzero(chosen if split == "train" else ~chosen)
    classes = [CALTECH101_MENDED.get(name, readable(name)).lower() for name in names]
    return FoundImages(place.pictures(base, [keys[row] for row in kept]), labels[kept], classes)


def read_rendered_sst2(place: SetFolder, split: str) -> FoundImages:
    """Sentences of film reviews drawn as images (Radford et al. 2021), negative or positive."""
    base = place.folder_with(SST2_SPLITS[split], "rendered-sst2") / SST2_SPLITS[split]
    absent = [name for name in SST2_CLASSES if not (base / name).is_dir()]
    if absent:
        place.refuse(f"there is no folder {base / absent[0]}")
    store, labels = place.class_folders(base, {name: label for label, name in enumerate(SST2_CLASSES)})
    return FoundImages(store, labels, SST2_CLASSES)


def read_gtsrb(place: SetFolder, split: str) -> FoundImages:
    """German traffic signs (Stallkamp et al. 2012), 43 classes."""
    if split == "train":
        found = [name for name in ("Training", "Final_Training/Images") if (_signs(place) / name).is_dir()]
        if not found:
            place.refuse(f"there is no folder Training in {_signs(place)}")
        base = _signs(place) / found[0]
        labels = {name: int(name) for name in place.subfolders(base) if name.isdecimal()}
        _require_signs(place, base, list(labels.values()))
        store, numbers = place.class_folders(base, labels)
        return FoundImages(store, numbers, GTSRB)
    file = place.folder_with("GT-final_test.csv", "gtsrb") / "GT-final_test.csv"
    rows = list(place.table(file, ("Filename", "ClassId"), delimiter=";"))
    if not all(label.isdecimal() for _, label in rows):
        place.refuse(f"{file} has a ClassId that is no number")
    numbers = np.array([int(label) for _, label in rows], dtype=np.int64)
    _require_signs(place, file, numbers.tolist())
    return FoundImages(place.pictures(_signs(place) / "Final_Test/Images", [name for name, _ in rows]), numbers, GTSRB)


def _signs(place: SetFolder) -> Path:
    return next((path for path in (place.root / "gtsrb/GTSRB", place.root / "GTSRB") if path.is_dir()), place.root)


def _require_signs(place: SetFolder, where: Path, labels: list[int]) -> None:
    if labels and max(labels) >= len(GTSRB):
        place.refuse(f"{where} has the class {max(labels)}, above the last of the {len(GTSRB)} signs")


def read_folder(place: SetFolder, split: str) -> FoundImages:
    """Class folders of any names, in the split's folder (train; validation, val or valid; test) or in the root itself.

    Without a folder of any split, the root is taken for the split test.
    """
    return class_folders(place, split_folder(place, split))


def class_folders(place: SetFolder, base: Path, names: dict[str, str] | None = None) -> FoundImages:
    """Images in class folders. names: readable name of each class by its folder; without it, the folders' names."""
    folders = place.subfolders(base)
    if names is None:
        names = {name: readable(name) for name in folders}
    unknown = [name for name in folders if name not in names]
    if unknown:
        place.refuse(f"the folder {base / unknown[0]} is none of the {len(names)} classes")
    if len(names) < 2:
        place.refuse(f"{base} has {len(names)} class folders, where there must be at least two")
    label = {name: number for number, name in enumerate(names)}
    store, labels = place.class_folders(base, {name: label[name] for name in folders})
    return FoundImages(store, labels, list(names.values()))


def split_folder(place: SetFolder, split: str) -> Path:
    """The folder of a split in root; root itself, for test, where there is a folder of no split."""
    there = {name for name in sum(SPLIT_FOLDERS.values(), ()) if (place.root / name).is_dir()}
    found = [name for name in SPLIT_FOLDERS[split] if name in there]
    if found:
        return place.root / found[0]
    if there or split != "test":
        place.refuse(f"there is no folder {' or '.join(SPLIT_FOLDERS[split])} of the split {split} in it")
    return place.root
