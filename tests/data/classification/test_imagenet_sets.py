"""ImageNet and its variants: folders by WordNet id or by number give the label that ImageNet gives."""

from __future__ import annotations

import csv
import io
import pkgutil
import re
import shutil

import numpy as np
import published_layouts as layouts
import pytest
from scipy.io import savemat
from timm.data import ImageNetInfo

from modstruct.config import DataConfig
from modstruct.data.classification.prompts import PAPER_TEMPLATE, imagenet
from modstruct.data.classification.registry import open_labelled

CONFIG = DataConfig(workers=0)
WNIDS = ImageNetInfo().label_names()
IMAGES = [layouts.image(number) for number in range(1000)]


def lines_of_timm(file):
    return pkgutil.get_data("timm.data", f"_info/{file}").decode().split()


@pytest.fixture(scope="module")
def by_wnid(tmp_path_factory):
    """An image in each of the 1,000 folders; it tells the label."""
    root = tmp_path_factory.mktemp("wnids")
    for label, wnid in enumerate(WNIDS):
        layouts.put(root / f"val/{wnid}/ILSVRC2012_val_{label + 1:08d}.JPEG", IMAGES[label])
    return root


@pytest.mark.parametrize("name", ["imagenet", "imagenet_sketch"])
def test_folders_by_wordnet_id_are_labelled_in_imagenets_order(by_wnid, tmp_path, name):
    root = by_wnid
    if name == "imagenet_sketch":
        (tmp_path / "sketch").symlink_to(by_wnid / "val")
        root = tmp_path
    images = open_labelled(f"{name}@{root}", CONFIG)
    assert images.labels.tolist() == list(range(1000))
    assert all(layouts.number_of(images[label].image) == label for label in (0, 1, 2, 10, 500, 999))
    assert images.classes == imagenet()
    assert images.classes[0] == "tench"
    assert images.classes[999] == "toilet paper"
    assert len(images.templates) == 81
    assert images.templates[0] == PAPER_TEMPLATE
    assert images.name == name


def test_a_missing_or_unknown_class_folder_is_named(by_wnid, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(by_wnid, root)
    (root / "val/n00000001").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*n00000001 is none of ImageNet's 1,000 WordNet ids; download"):
        open_labelled(f"imagenet@{root}", CONFIG)
    (root / "val/n00000001").rmdir()
    shutil.rmtree(root / "val" / WNIDS[7])
    with pytest.raises(ValueError, match=rf"999 class folders instead of 1000, {WNIDS[7]} for one is not there"):
        open_labelled(f"imagenet@{root}", CONFIG)
    with pytest.raises(ValueError, match=r"there is no train in it, nor in ILSVRC/Data/CLS-LOC"):
        open_labelled(f"imagenet:train@{root}", CONFIG)


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """The published validation images in one folder, their labels in no order, and the development kit's numbers."""
    root = tmp_path_factory.mktemp("flat")
    labels = np.random.default_rng(0).integers(0, 1000, 30)
    for number, label in enumerate(labels.tolist(), 1):
        layouts.put(root / f"val/ILSVRC2012_val_{number:08d}.JPEG", IMAGES[label])
    return root, labels


def test_the_published_validation_folder_is_labelled_by_the_development_kit(validation, tmp_path):
    root, labels = validation
    base = tmp_path / "set"
    shutil.copytree(root, base)
    with pytest.raises(ValueError, match=r"neither ILSVRC2012_devkit_t12 nor LOC_val_solution.csv is there"):
        open_labelled(f"imagenet@{base}", CONFIG)
    # The kit numbers its classes in an order of its own, from 1, and lists inner nodes of the tree behind them.
    order = np.random.default_rng(1).permutation(1000)
    synsets = np.zeros(1001, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for number, label in enumerate(order):
        synsets[number] = (number + 1, WNIDS[label], "words")
    synsets[1000] = (1001, "n99999999", "an inner node")
    kit = layouts.put_folder(base / "ILSVRC2012_devkit_t12/data")
    savemat(kit / "meta.mat", {"synsets": synsets})
    truth = [str(np.flatnonzero(order == label)[0] + 1) for label in labels]
    layouts.put(kit / "ILSVRC2012_validation_ground_truth.txt", "\n".join(truth) + "\n")
    images = open_labelled(f"imagenet@{base}", CONFIG)
    assert images.labels.tolist() == labels.tolist()
    assert [layouts.number_of(images[n].image) for n in range(30)] == labels.tolist()
    layouts.put(kit / "ILSVRC2012_validation_ground_truth.txt", "\n".join([*truth[1:], "1001"]) + "\n")
    with pytest.raises(ValueError, match=r"the label 'n99999999' is none of the 1000 classes"):
        open_labelled(f"imagenet@{base}", CONFIG)


def test_the_published_validation_folder_is_labelled_by_kaggles_table(validation, tmp_path):
    root, labels = validation
    base = tmp_path / "set"
    shutil.copytree(root / "val", base / "ILSVRC/Data/CLS-LOC/val")
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["ImageId", "PredictionString"])
    for number in np.random.default_rng(2).permutation(30):
        boxes = f"{WNIDS[labels[number]]} 85 1 499 272 {WNIDS[labels[number]]} 1 2 3 4 "
        writer.writerow([f"ILSVRC2012_val_{number + 1:08d}", boxes])
    layouts.put(base / "LOC_val_solution.csv", rows.getvalue())
    assert open_labelled(f"imagenet@{base}", CONFIG).labels.tolist() == labels.tolist()


def test_the_folders_of_v2_are_sorted_as_numbers(tmp_path):
    for label in range(1000):
        layouts.put(tmp_path / f"imagenetv2-matched-frequency-format-val/{label}/{label:04x}.jpeg", IMAGES[label])
    images = open_labelled(f"imagenet_v2@{tmp_path}", CONFIG)
    assert images.labels.tolist() == list(range(1000))
    for label in (0, 2, 10, 100, 999):  # as texts 10 and 100 would come before 2
        assert layouts.number_of(images[label].image) == images[label].metadata["label"] == label
    assert images.classes == imagenet()
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    (folder / "31").rename(folder / "031")
    with pytest.raises(ValueError, match=r"the folder .*031 is no class number from 0 to 999"):
        open_labelled(f"imagenet_v2@{folder}", CONFIG)
    (folder / "031").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"1 of the 1,000 class folders are not in .*, the first 31"):
        open_labelled(f"imagenet_v2@{folder}", CONFIG)


@pytest.mark.parametrize("variant", ["a", "r"])
def test_the_200_classes_of_a_and_r_are_those_of_their_folders(tmp_path, variant):
    subset = lines_of_timm(f"imagenet_{variant}_synsets.txt")
    rows = [int(row) for row in lines_of_timm(f"imagenet_{variant}_indices.txt")]
    layouts.put(tmp_path / f"imagenet-{variant}/README.txt", "about")
    for wnid in reversed(subset):
        layouts.put(tmp_path / f"imagenet-{variant}/{wnid}/one.jpg", IMAGES[WNIDS.index(wnid)])
    images = open_labelled(f"imagenet_{variant}@{tmp_path}", CONFIG)
    assert len(images) == len(images.classes) == 200
    assert images.labels.tolist() == list(range(200))
    # timm's list of the subset's rows among the 1,000: the image tells its own.
    assert [layouts.number_of(images[n].image) for n in range(200)] == sorted(rows)
    assert images.classes == tuple(imagenet()[row] for row in sorted(rows))
    shutil.rmtree(tmp_path / f"imagenet-{variant}" / subset[0])
    with pytest.raises(ValueError, match=re.escape("has 199 class folders instead of 200")):
        open_labelled(f"imagenet_{variant}@{tmp_path}", CONFIG)
