"""Published sets of image files, in class folders or with lists of labels.

Caltech-101, rendered SST-2, GTSRB; DTD, FGVC Aircraft, Oxford Pets, Food-101, Stanford Cars, Flowers102; ImageNet-1K
(Russakovsky et al. 2015) and the sets that test its classes under a shift of distribution: V2 (Recht et al. 2019),
Sketch (Wang et al. 2019), A (Hendrycks et al. 2021b) and R (Hendrycks et al. 2021a). Where a folder of the published
archive is meant, the folder around it or the folder itself may be given.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.prompts import (
    CALTECH101_CORRECTED,
    GTSRB,
    flowers,
    imagenet,
    imagenet_labels,
    readable,
)
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.downstream.published_files import read_json_object

CALTECH101_TRAINING = 30
"""Images of each class for training, as most work on it has (and Radford et al. 2021)."""
SST2_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
SST2_CLASSES = ("negative", "positive")
DTD_SPLITS = {"train": "train1.txt", "validation": "val1.txt", "test": "test1.txt"}
AIRCRAFT_SPLITS = {"train": "train", "validation": "val", "test": "test"}
PETS_SPLITS = {"train": "trainval.txt", "test": "test.txt"}
CARS_SPLITS = {
    "train": ("cars_train", "devkit/cars_train_annos.mat"),
    "test": ("cars_test", "cars_test_annos_withlabels.mat"),
}
FLOWERS_SPLITS = {"train": "trnid", "validation": "valid", "test": "tstid"}
IMAGENET_CLASSES = 1000
SUBSET_CLASSES = 200  # of ImageNet-A and -R; labels count those
V2_FOLDERS = (
    "imagenetv2-matched-frequency-format-val",
    "imagenetv2-matched-frequency",
    "imagenetv2-threshold0.7-format-val",
    "imagenetv2-top-images-format-val",
)
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE_TRUTH = "LOC_val_solution.csv"


def read_caltech101(source: SetFolder, split: str) -> FoundImages:
    """Objects (Fei-Fei et al. 2004), 101 classes without the background class.

    No split is published. Here 30 images of each class, those with the smallest hash of their name, are for training
    and all others for test: a draw that is the same everywhere.
    """
    base = source.folder_with("101_ObjectCategories", "caltech101", "caltech-101") / "101_ObjectCategories"
    names = [name for name in source.subfolders(base) if name != "BACKGROUND_Google"]
    store, labels = source.class_folders(base, {name: label for label, name in enumerate(names)})
    keys = [store.key(number) for number in range(len(store))]
    hashes = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys]
    chosen = np.zeros(len(keys), dtype=bool)
    for label in range(len(names)):
        rows = np.flatnonzero(labels == label).tolist()
        chosen[sorted(rows, key=hashes.__getitem__)[:CALTECH101_TRAINING]] = True
    kept = np.flatnonzero(chosen if split == "train" else ~chosen)
    classes = [CALTECH101_CORRECTED.get(name, readable(name)).lower() for name in names]
    return FoundImages(source.images(base, [keys[row] for row in kept]), labels[kept], classes)


def read_rendered_sst2(source: SetFolder, split: str) -> FoundImages:
    """Sentences of film reviews drawn as images (Radford et al. 2021), negative or positive."""
    base = source.folder_with(SST2_SPLITS[split], "rendered-sst2") / SST2_SPLITS[split]
    absent = [name for name in SST2_CLASSES if not (base / name).is_dir()]
    if absent:
        source.refuse(f"there is no folder {base / absent[0]}")
    store, labels = source.class_folders(base, {name: label for label, name in enumerate(SST2_CLASSES)})
    return FoundImages(store, labels, SST2_CLASSES)


def read_gtsrb(source: SetFolder, split: str) -> FoundImages:
    """German traffic signs (Stallkamp et al. 2012), 43 classes."""
    signs = next((path for path in (source.root / "gtsrb/GTSRB", source.root / "GTSRB") if path.is_dir()), source.root)
    if split == "train":
        found = [name for name in ("Training", "Final_Training/Images") if (signs / name).is_dir()]
        if not found:
            source.refuse(f"there is no folder Training in {signs}")
        base = signs / found[0]
        store, labels = source.class_folders(
            base, {name: int(name) for name in source.subfolders(base) if name.isdecimal()}
        )
        return FoundImages(store, source.check_labels(labels, GTSRB, base), GTSRB)
    file = source.folder_with("GT-final_test.csv", "gtsrb") / "GT-final_test.csv"
    rows = list(source.table(file, ("Filename", "ClassId"), delimiter=";"))
    if not all(label.isdecimal() for _, label in rows):
        source.refuse(f"{file} has a ClassId that is no number")
    labels = source.check_labels(np.array([int(label) for _, label in rows], dtype=np.int64), GTSRB, file)
    return FoundImages(source.images(signs / "Final_Test/Images", [name for name, _ in rows]), labels, GTSRB)


def read_dtd(source: SetFolder, split: str) -> FoundImages:
    """Describable textures (Cimpoi et al. 2014), 47 classes; the first of the ten published splits."""
    folder = source.folder_with("labels", "dtd/dtd", "dtd")
    classes = source.subfolders(folder / "images")
    file = folder / "labels" / DTD_SPLITS[split]
    paths = source.lines(file)
    labels = source.labels([path.partition("/")[0] for path in paths], classes, file)
    return FoundImages(source.images(folder / "images", paths), labels, [readable(name) for name in classes])


def read_fgvc_aircraft(source: SetFolder, split: str) -> FoundImages:
    """Aircraft (Maji et al. 2013), 100 variants."""
    folder = source.folder_with("variants.txt", "fgvc-aircraft-2013b/data", "data")
    classes = source.lines(folder / "variants.txt")
    file = folder / f"images_variant_{AIRCRAFT_SPLITS[split]}.txt"
    rows = [line.partition(" ") for line in source.lines(file)]
    labels = source.labels([variant.strip() for _, _, variant in rows], classes, file)
    return FoundImages(source.images(folder / "images", [f"{name}.jpg" for name, _, _ in rows]), labels, classes)


def read_oxford_pets(source: SetFolder, split: str) -> FoundImages:
    """Cats and dogs (Parkhi et al. 2012), 37 breeds; train is the published trainval."""
    folder = source.folder_with("annotations", "oxford-iiit-pet")
    file = folder / "annotations" / PETS_SPLITS[split]
    rows = [line.split() for line in source.lines(file) if not line.startswith("#")]
    wrong = next((row for row in rows if len(row) != 4 or not row[1].isdecimal() or int(row[1]) < 1), None)
    if wrong is not None:
        source.refuse(f"{file}: {' '.join(wrong)!r} is no image, class, species and breed")
    labels = np.array([int(row[1]) - 1 for row in rows], dtype=np.int64)
    breeds: dict[int, str] = {}
    for (name, *_), label in zip(rows, labels.tolist(), strict=True):
        breed = name.rpartition("_")[0]
        if breeds.setdefault(label, breed) != breed:
            source.refuse(f"{file}: class {label + 1} is {breeds[label]} and {breed}")
    if sorted(breeds) != list(range(len(breeds))):
        source.refuse(f"{file}: the classes 1 to {max(breeds, default=0) + 1} have no image each")
    classes = [readable(breeds[label]) for label in range(len(breeds))]
    return FoundImages(source.images(folder / "images", [f"{row[0]}.jpg" for row in rows]), labels, classes)


def read_food101(source: SetFolder, split: str) -> FoundImages:
    """Dishes (Bossard et al. 2014), 101 classes."""
    folder = source.folder_with("meta", "food-101")
    file = folder / "meta" / f"{split}.json"
    source.require_file(file)
    listed = read_json_object(file).fields
    good = all(isinstance(paths, list) and all(isinstance(p, str) for p in paths) for paths in listed.values())
    if not good:
        source.refuse(f"{file} is no object of lists of images by class")
    classes = sorted(listed)
    paths = [f"{path}.jpg" for dish in listed for path in listed[dish]]
    labels = source.labels([dish for dish in listed for _ in listed[dish]], classes, file)
    return FoundImages(source.images(folder / "images", paths), labels, [readable(name) for name in classes])


def read_stanford_cars(source: SetFolder, split: str) -> FoundImages:
    """Cars (Krause et al. 2013), 196 models; test labels are in cars_test_annos_withlabels.mat."""
    folder = source.folder_with("devkit", "stanford_cars")
    images, annotations = CARS_SPLITS[split]
    (classes,) = source.matlab(folder / "devkit/cars_meta.mat", "class_names")
    rows = source.matlab_structs(folder / annotations, "annotations", "fname", "class")
    labels = source.check_labels(rows["class"].astype(np.int64) - 1, classes, folder / annotations)
    store = source.images(folder / images, [str(name) for name in rows["fname"]])
    return FoundImages(store, labels, [str(name) for name in classes])


def read_flowers102(source: SetFolder, split: str) -> FoundImages:
    """Flowers (Nilsback & Zisserman 2008), 102 classes; of its published splits, test is the largest."""
    folder = source.folder_with("setid.mat", "flowers-102")
    (numbers,) = source.matlab(folder / "setid.mat", FLOWERS_SPLITS[split])
    (every,) = source.matlab(folder / "imagelabels.mat", "labels")
    classes, numbers = flowers(), numbers.astype(np.int64)
    every = source.check_labels(every.astype(np.int64) - 1, classes, folder / "imagelabels.mat")
    if not len(numbers) or numbers.min() < 1 or numbers.max() > len(every):
        source.refuse(f"{folder / 'setid.mat'} names an image outside the {len(every)} of imagelabels.mat")
    store = source.images(folder / "jpg", [f"image_{number:05d}.jpg" for number in numbers.tolist()])
    return FoundImages(store, every[numbers - 1], classes)


def read_imagenet(source: SetFolder, split: str) -> FoundImages:
    """train in folders by WordNet id; validation likewise, or in one folder as published, with its list of labels."""
    folder = {"train": "train", "validation": "val"}[split]
    base = source.folder_with(folder, "ILSVRC/Data/CLS-LOC", "imagenet") / folder
    if split == "validation" and not source.subfolders(base):
        return _flat_validation(source, base)
    return _by_wnid(source, base, IMAGENET_CLASSES)


def read_imagenet_v2(source: SetFolder, split: str) -> FoundImages:
    """10,000 images in folders 0 to 999, in order of number (sorted as text, 10 would come before 2)."""
    base = source.folder_with("0", *V2_FOLDERS)
    folders = source.subfolders(base)
    labels = {name: int(name) for name in folders if re.fullmatch(r"0|[1-9]\d{0,2}", name)}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        source.refuse(f"the folder {base / unknown[0]} is no class number from 0 to 999")
    absent = sorted(set(range(IMAGENET_CLASSES)) - set(labels.values()))
    if absent:
        source.refuse(f"{len(absent)} of the 1,000 class folders are not in {base}, the first {absent[0]}")
    store, numbers = source.class_folders(base, labels)
    return FoundImages(store, numbers, imagenet())


def read_imagenet_sketch(source: SetFolder, split: str) -> FoundImages:
    """50,889 drawings of the 1,000 classes."""
    return _by_wnid(source, _wnid_folder(source, "sketch", "imagenet-sketch"), IMAGENET_CLASSES)


def read_imagenet_a(source: SetFolder, split: str) -> FoundImages:
    """7,500 images that a ResNet-50 gets wrong, of 200 classes."""
    return _by_wnid(source, _wnid_folder(source, "imagenet-a"), SUBSET_CLASSES)


def read_imagenet_r(source: SetFolder, split: str) -> FoundImages:
    """30,000 renditions (art, cartoons, toys, …) of 200 classes."""
    return _by_wnid(source, _wnid_folder(source, "imagenet-r"), SUBSET_CLASSES)


def _wnid_folder(source: SetFolder, *folders: str) -> Path:
    return next((source.root / name for name in folders if (source.root / name).is_dir()), source.root)


def _by_wnid(source: SetFolder, base: Path, expected: int) -> FoundImages:
    """Class folders by WordNet id. expected: how many there must be; a subset is numbered in ImageNet's order."""
    folders, known = source.subfolders(base), imagenet_labels()
    unknown = [name for name in folders if name not in known]
    if unknown:
        source.refuse(f"the folder {base / unknown[0]} is none of ImageNet's 1,000 WordNet ids")
    if len(folders) != expected:
        absent = sorted(known.keys() - set(folders)) if expected == IMAGENET_CLASSES else []
        first = f", {absent[0]} for one is not there" if absent else ""
        source.refuse(
            f"{base} has {len(folders)} class folders instead of {expected}{first} (a set of your own that has other "
            "classes is described by a YAML file)"
        )
    subset = sorted(folders, key=known.__getitem__)
    names = imagenet()
    store, labels = source.class_folders(base, {name: number for number, name in enumerate(subset)})
    return FoundImages(store, labels, [names[known[name]] for name in subset])


def _flat_validation(source: SetFolder, base: Path) -> FoundImages:
    """The 50,000 images in one folder, labelled by the development kit, or by Kaggle's table of solutions."""
    for table in (source.root / KAGGLE_TRUTH, base.parent / KAGGLE_TRUTH):
        if table.is_file():
            wnids = {name: value.split(" ")[0] for name, value in source.table(table, ("ImageId", "PredictionString"))}
            labels = source.labels([wnids[name] for name in sorted(wnids)], list(imagenet_labels()), table)
            return FoundImages(source.images(base, [f"{name}.JPEG" for name in sorted(wnids)]), labels, imagenet())
    kits = [source.root / name for name in ("ILSVRC2012_devkit_t12/data", "data", ".")]
    kit = next((folder for folder in kits if (folder / TRUTH).is_file()), None)
    if kit is None:
        source.refuse(
            f"{base} has no class folders, and neither ILSVRC2012_devkit_t12 nor {KAGGLE_TRUTH} is there to say which "
            "image is of which class"
        )
    synsets = source.matlab_structs(kit / "meta.mat", "synsets", "ILSVRC2012_ID", "WNID")
    wnid_of = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    numbers = source.lines(kit / TRUTH)
    paths = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(numbers) + 1)]
    labels = source.labels([wnid_of.get(number, number) for number in numbers], list(imagenet_labels()), kit / TRUTH)
    return FoundImages(source.images(base, paths), labels, imagenet())
