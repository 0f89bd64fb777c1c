"""Sets published as image files and lists of them: DTD, FGVC Aircraft, Oxford Pets, Food-101, Stanford Cars, Flowers.

Where a folder of the published archive is asked for, the folder around it or the folder itself may be given.
"""

from __future__ import annotations

import numpy as np

from modstruct.data.classification.class_names import flowers, readable
from modstruct.data.classification.labelled_images import FoundImages
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.downstream.published_files import read_json_object

DTD_SPLITS = {"train": "train1.txt", "validation": "val1.txt", "test": "test1.txt"}
AIRCRAFT_SPLITS = {"train": "train", "validation": "val", "test": "test"}
PETS_SPLITS = {"train": "trainval.txt", "test": "test.txt"}
CARS_SPLITS = {
    "train": ("cars_train", "devkit/cars_train_annos.mat"),
    "test": ("cars_test", "cars_test_annos_withlabels.mat"),
}
FLOWERS_SPLITS = {"train": "trnid", "validation": "valid", "test": "tstid"}


def read_dtd(place: SetFolder, split: str) -> FoundImages:
    """Describable textures (Cimpoi et al. 2014), 47 classes; the first of the ten published splits."""
    folder = place.folder_with("labels", "dtd/dtd", "dtd")
    classes = place.subfolders(folder / "images")
    file = folder / "labels" / DTD_SPLITS[split]
    paths = place.lines(file)
    labels = _labels(place, [path.partition("/")[0] for path in paths], classes, file)
    return FoundImages(place.pictures(folder / "images", paths), labels, [readable(name) for name in classes])


def read_fgvc_aircraft(place: SetFolder, split: str) -> FoundImages:
    """Aircraft (Maji et al. 2013), 100 variants."""
    folder = place.folder_with("variants.txt", "fgvc-aircraft-2013b/data", "data")
    classes = place.lines(folder / "variants.txt")
    file = folder / f"images_variant_{AIRCRAFT_SPLITS[split]}.txt"
    rows = [line.partition(" ") for line in place.lines(file)]
    labels = _labels(place, [variant.strip() for _, _, variant in rows], classes, file)
    return FoundImages(place.pictures(folder / "images", [f"{name}.jpg" for name, _, _ in rows]), labels, classes)


def read_oxford_pets(place: SetFolder, split: str) -> FoundImages:
    """Cats and dogs (Parkhi et al. 2012), 37 breeds; train is the published trainval."""
    folder = place.folder_with("annotations", "oxford-iiit-pet")
    file = folder / "annotations" / PETS_SPLITS[split]
    rows = [line.split() for line in place.lines(file) if not line.startswith("#")]
    wrong = next((row for row in rows if len(row) != 4 or not row[1].isdecimal() or int(row[1]) < 1), None)
    if wrong is not None:
        place.refuse(f"{file}: {' '.join(wrong)!r} is no image, class, species and breed")
    labels = np.array([int(row[1]) - 1 for row in rows], dtype=np.int64)
    breeds: dict[int, str] = {}
    for (name, *_), label in zip(rows, labels.tolist(), strict=True):
        breed = name.rpartition("_")[0]
        if breeds.setdefault(label, breed) != breed:
            place.refuse(f"{file}: class {label + 1} is {breeds[label]} and {breed}")
    if sorted(breeds) != list(range(len(breeds))):
        place.refuse(f"{file}: the classes 1 to {max(breeds, default=0) + 1} have no image each")
    classes = [readable(breeds[label]) for label in range(len(breeds))]
    return FoundImages(place.pictures(folder / "images", [f"{row[0]}.jpg" for row in rows]), labels, classes)


def read_food101(place: SetFolder, split: str) -> FoundImages:
    """Dishes (Bossard et al. 2014), 101 classes."""
    folder = place.folder_with("meta", "food-101")
    file = folder / "meta" / f"{split}.json"
    if not file.is_file():
        place.refuse(f"there is no file {file}")
    listed = read_json_object(file).fields
    good = all(isinstance(paths, list) and all(isinstance(p, str) for p in paths) for paths in listed.values())
    if not good:
        place.refuse(f"{file} is no object of lists of images by class")
    classes = sorted(listed)
    paths = [f"{path}.jpg" for dish in listed for path in listed[dish]]
    labels = _labels(place, [dish for dish in listed for _ in listed[dish]], classes, file)
    return FoundImages(place.pictures(folder / "images", paths), labels, [readable(name) for name in classes])


def read_stanford_cars(place: SetFolder, split: str) -> FoundImages:
    """Cars (Krause et al. 2013), 196 models; test labels are in cars_test_annos_withlabels.mat."""
    folder = place.folder_with("devkit", "stanford_cars")
    pictures, annotations = CARS_SPLITS[split]
    (classes,) = place.matlab(folder / "devkit/cars_meta.mat", "class_names")
    (rows,) = place.matlab(folder / annotations, "annotations")
    if rows.dtype.names is None or not {"fname", "class"} <= set(rows.dtype.names):
        place.refuse(f"{folder / annotations} has no fields fname and class")
    labels = rows["class"].astype(np.int64) - 1
    if labels.min() < 0 or labels.max() >= len(classes):
        place.refuse(f"{folder / annotations} has a class outside 1 to {len(classes)}")
    store = place.pictures(folder / pictures, [str(name) for name in rows["fname"]])
    return FoundImages(store, labels, [str(name) for name in classes])


def read_flowers102(place: SetFolder, split: str) -> FoundImages:
    """Flowers (Nilsback & Zisserman 2008), 102 classes; of its published splits, test is the largest."""
    folder = place.folder_with("setid.mat", "flowers-102")
    (numbers,) = place.matlab(folder / "setid.mat", FLOWERS_SPLITS[split])
    (every,) = place.matlab(folder / "imagelabels.mat", "labels")
    numbers, every, classes = numbers.astype(np.int64), every.astype(np.int64) - 1, flowers()
    if not len(numbers) or numbers.min() < 1 or numbers.max() > len(every):
        place.refuse(f"{folder / 'setid.mat'} names an image outside the {len(every)} of imagelabels.mat")
    if every.min() < 0 or every.max() >= len(classes):
        place.refuse(f"{folder / 'imagelabels.mat'} has a class outside 1 to {len(classes)}")
    store = place.pictures(folder / "jpg", [f"image_{number:05d}.jpg" for number in numbers.tolist()])
    return FoundImages(store, every[numbers - 1], classes)


def _labels(place: SetFolder, names: list[str], classes: list[str], file: object) -> np.ndarray:
    """(n,), the place of each name among the classes."""
    label = {name: number for number, name in enumerate(classes)}
    unknown = next((name for name in names if name not in label), None)
    if unknown is not None:
        place.refuse(f"{file}: {unknown!r} is none of the {len(classes)} classes")
    return np.array([label[name] for name in names], dtype=np.int64)
