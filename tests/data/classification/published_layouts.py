"""Tiny sets in the layouts that their authors publish: the same files, fewer and smaller images.

torchvision compares some files with their published MD5 sums, which no tiny set has: see `unchecked` in conftest.py.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def image(number: int, kind: str = "PNG", side: int = 4) -> bytes:
    """An image of one colour, which tells its number exactly unless the kind is JPEG."""
    content = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(content, kind)
    return content.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def pixels(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def dtd(folder: Path) -> Path:
    for number, (split, name) in enumerate(
        [
            ("train", "banded"),
            ("train", "polka-dotted"),
            ("val", "banded"),
            ("val", "polka-dotted"),
            ("test", "polka-dotted"),
            ("test", "banded"),
        ]
    ):
        path = f"{name}/{name}_{number:04d}.jpg"
        put(folder / "dtd/dtd/images" / path, image(number))
        with open(put_folder(folder / "dtd/dtd/labels") / f"{split}1.txt", "a") as file:
            file.write(path + "\n")
    return folder


def put_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fgvc_aircraft(folder: Path) -> Path:
    base = folder / "fgvc-aircraft-2013b/data"
    put(base / "variants.txt", "707-320\nA300B4\nF/A-18\n")
    put(base / "images_variant_train.txt", "0000001 A300B4\n0000002 707-320\n")
    put(base / "images_variant_val.txt", "0000003 F/A-18\n")
    put(base / "images_variant_test.txt", "0000004 F/A-18\n0000005 707-320\n")
    for number in range(1, 6):
        put(base / f"images/{number:07d}.jpg", image(number))
    return folder


def oxford_pets(folder: Path) -> Path:
    base = folder / "oxford-iiit-pet"
    names = ["Abyssinian", "american_bulldog", "wheaten_terrier"]
    for split, numbers in (("trainval", (1, 2, 3, 4)), ("test", (5, 6, 7))):
        rows = []
        for number in numbers:
            label = number % 3
            rows.append(f"{names[label]}_{number} {label + 1} {1 if label == 0 else 2} 1")
            put(base / f"images/{names[label]}_{number}.jpg", image(number, "GIF" if number == 1 else "PNG"))
        put(base / f"annotations/{split}.txt", "\n".join(rows) + "\n")
    return folder


def rendered_sst2(folder: Path) -> Path:
    number = 0
    for split, negative, positive in (("train", 1, 1), ("valid", 1, 1), ("test", 1, 2)):
        for name, count in (("negative", negative), ("positive", positive)):
            for file in range(count):
                put(folder / f"rendered-sst2/{split}/{name}/{file}.png", image(number))
                number += 1
    return folder


def food101(folder: Path) -> Path:
    split = {
        "train": {"waffles": ["waffles/1", "waffles/2"], "apple_pie": ["apple_pie/3"]},
        "test": {"apple_pie": ["apple_pie/4"], "waffles": ["waffles/5"]},
    }
    for name, listed in split.items():
        put(folder / f"food-101/meta/{name}.json", json.dumps(listed))
        for path in (path for paths in listed.values() for path in paths):
            put(folder / f"food-101/images/{path}.jpg", image(int(path[-1])))
    return folder


def gtsrb(folder: Path) -> Path:
    base = folder / "gtsrb"
    for label, number in [(0, 0), (0, 1), (1, 2), (42, 3)]:
        put(base / f"GTSRB/Training/{label:05d}/00000_{number:05d}.ppm", image(number, "PPM"))
    for label in range(2, 42):
        put_folder(base / f"GTSRB/Training/{label:05d}")
        put(base / f"GTSRB/Training/{label:05d}/00000_{label + 10:05d}.ppm", image(label + 10, "PPM"))
    rows = io.StringIO()
    writer = csv.writer(rows, delimiter=";")
    writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
    for number, label in enumerate([16, 1, 42]):
        writer.writerow([f"{number:05d}.ppm", 4, 4, 0, 0, 3, 3, label])
        put(base / f"GTSRB/Final_Test/Images/{number:05d}.ppm", image(number, "PPM"))
    put(base / "GT-final_test.csv", rows.getvalue())
    return folder


def stanford_cars(folder: Path) -> Path:
    base = folder / "stanford_cars"
    put_folder(base / "devkit")
    names = np.array(
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"], dtype=object
    )
    savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for folder_name, file, labels in (
        ("cars_train", "devkit/cars_train_annos.mat", [3, 1]),
        ("cars_test", "cars_test_annos_withlabels.mat", [2, 3, 1]),
    ):
        rows = np.zeros(len(labels), dtype=fields)
        for number, label in enumerate(labels, 1):
            rows[number - 1] = (1, 1, 2, 2, label, f"{number:05d}.jpg")
            put(base / f"{folder_name}/{number:05d}.jpg", image(number))
        savemat(base / file, {"annotations": rows})
    return folder


def flowers102(folder: Path) -> Path:
    base = folder / "flowers-102"
    for number in range(1, 9):
        put(base / f"jpg/image_{number:05d}.jpg", image(number))
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 77, 5, 5, 43, 1]], dtype=np.uint8)})
    savemat(base / "setid.mat", {"trnid": [[7, 2]], "valid": [[3, 1]], "tstid": [[8, 4, 5, 6]]})
    return folder


def caltech101(folder: Path) -> Path:
    base = folder / "caltech101/101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 3), ("Faces_easy", 32), ("crocodile_head", 31), ("wrench", 33)):
        for number in range(1, count + 1):
            put(base / name / f"image_{number:04d}.jpg", image(number))
    return folder


def svhn(folder: Path) -> Path:
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 2])):
        content = {"X": pixels(len(labels), 32).transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
        savemat(put_folder(folder) / f"{split}_32x32.mat", content)
    return folder


def stl10(folder: Path) -> Path:
    base = folder / "stl10_binary"
    put(base / "class_names.txt", "airplane\nbird\ncar\n")
    for split, labels in (("train", [1, 3]), ("test", [2, 2, 3])):
        put(base / f"{split}_X.bin", pixels(len(labels), 96).transpose(0, 3, 2, 1).tobytes())
        put(base / f"{split}_y.bin", bytes(labels))
    put(base / "unlabeled_X.bin", b"")
    return folder


def cifar_rows(count: int, seed: int) -> np.ndarray:
    """(count, 3072), channel by channel."""
    return pixels(count, 32, seed).transpose(0, 3, 1, 2).reshape(count, -1)


def cifar10(folder: Path) -> Path:
    """The python version, by Python 3 instead of 2."""
    base = folder / "cifar-10-batches-py"
    batches = {**{f"data_batch_{n}": [n % 10, 9] for n in range(1, 6)}, "test_batch": [3, 0, 7]}
    for number, (name, labels) in enumerate(batches.items()):
        put(base / name, pickle.dumps({"data": cifar_rows(len(labels), number), "labels": labels}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    put(base / "batches.meta", pickle.dumps({"label_names": names}))
    return folder


def cifar100(folder: Path) -> Path:
    """The python version, by Python 3 instead of 2."""
    for number, (split, labels) in enumerate({"train": [99, 1], "test": [0, 50, 1]}.items()):
        content = {"data": cifar_rows(len(labels), number), "fine_labels": labels, "coarse_labels": [7] * 3}
        put(folder / "cifar-100-python" / split, pickle.dumps(content))
    names = ["apple", "aquarium_fish", *(f"thing_{number}" for number in range(2, 100))]
    put(folder / "cifar-100-python/meta", pickle.dumps({"fine_label_names": names}))
    return folder


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def converted(folder: Path, labels: list[int], classes: list[str], per_shard: int = 2, kind: str = "webp") -> Path:
    """A set as CLIP_benchmark converts it; its images are numbered in order, without loss."""
    put(folder / "classnames.txt", "\n".join(classes) + "\n")
    put(folder / "zeroshot_classification_templates.txt", "a photo of a {c}.\nart of the {c}.\n")
    starts = range(0, len(labels), per_shard)
    for shard, start in enumerate(starts):
        members = []
        for number in range(start, min(start + per_shard, len(labels))):
            content = io.BytesIO()
            Image.new("RGB", (4, 4), (number, 0, 77)).save(content, kind, lossless=True)
            members += [(f"s{number:07d}.cls", b"%d" % labels[number]), (f"s{number:07d}.{kind}", content.getvalue())]
        tar(folder / f"test/{shard}.tar", members)
    put(folder / "test/nshards.txt", f"{len(starts)}\n")
    return folder
