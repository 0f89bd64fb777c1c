"""Sets in class folders: Caltech-101 with its split; ImageNet and its variants, by WordNet id or by number."""

from __future__ import annotations

import pkgutil
import re
import shutil

import numpy as np
import published_layouts as layouts
import pytest
from scipy.io import savemat
from timm.data import ImageNetInfo

from modstruct.config import DataConfig
from modstruct.data.classification.published import PAPER_TEMPLATE, imagenet
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
    assert images.classes == tuple(imagenet().values())
    assert images.classes[0] == "tench"
    assert images.classes[999] == "toilet paper"
    assert len(images.templates) == 81
    assert images.templates[0] == PAPER_TEMPLATE
    assert images.name == name


def test_a_missing_or_unknown_class_folder_is_named(by_wnid, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(by_wnid, root)
    (root / "val/n00000001").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*n00000001 is none of the 1,000 WordNet ids of ImageNet; "):
        open_labelled(f"imagenet@{root}", CONFIG)
    (root / "val/n00000001").rmdir()
    shutil.rmtree(root / "val" / WNIDS[7])
    with pytest.raises(ValueError, match=rf"1 of the 1,000 class folders are not in .*, the first {WNIDS[7]};"):
        open_labelled(f"imagenet@{root}", CONFIG)
    with pytest.raises(ValueError, match=r"there is no train in it, nor in ILSVRC/Data/CLS-LOC"):
        open_labelled(f"imagenet:train@{root}", CONFIG)


LABELS = [3, 999, 0]  # of the validation images in one folder, by number


@pytest.fixture
def flat(tmp_path):
    for number in range(3):
        layouts.put(tmp_path / f"val/ILSVRC2012_val_{number + 1:08d}.JPEG", IMAGES[number])
    return tmp_path


def put_kit(folder):
    synsets = np.zeros(1002, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    synsets[:] = [(number, f"n{number:08d}", "of no image") for number in range(1002)]
    for row, label in enumerate(LABELS):
        synsets[row] = (5000 + row, WNIDS[label], "thing")
    layouts.put_folder(folder)
    savemat(folder / "meta.mat", {"synsets": synsets})
    layouts.put(folder / "ILSVRC2012_validation_ground_truth.txt", "5000\n5001\n5002\n")


@pytest.mark.parametrize("kit", ["ILSVRC2012_devkit_t12/data", "data", ""])
def test_validation_images_in_one_folder_are_labelled_by_the_development_kit(flat, kit):
    put_kit(flat / kit)
    images = open_labelled(f"imagenet@{flat}", CONFIG)
    assert images.labels.tolist() == LABELS
    assert [layouts.number_of(images[n].image) for n in range(3)] == [0, 1, 2]
    assert images.classes == tuple(imagenet().values())
    layouts.put(flat / kit / "ILSVRC2012_validation_ground_truth.txt", "5000\n999\n")
    with pytest.raises(ValueError, match=r"ground_truth.txt: the label 'n00000999' of .*2.JPEG is none of the 1,000"):
        open_labelled(f"imagenet@{flat}", CONFIG)
    layouts.put(flat / kit / "meta.mat", b"no mat")
    with pytest.raises(ValueError, match=r"meta\.mat cannot be read \(.*; download ILSVRC2012"):
        open_labelled(f"imagenet@{flat}", CONFIG)


def test_validation_images_in_one_folder_are_labelled_by_kaggles_table(flat):
    rows = [f"ILSVRC2012_val_{n + 1:08d},{WNIDS[label]} 1 2 3 4 \n" for n, label in reversed(list(enumerate(LABELS)))]
    layouts.put(flat / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(rows))
    images = open_labelled(f"imagenet@{flat}", CONFIG)
    assert images.labels.tolist() == LABELS
    assert [layouts.number_of(images[n].image) for n in range(3)] == [0, 1, 2]


def test_validation_images_in_one_folder_without_their_labels_are_refused_with_the_remedy(flat):
    missing = r"no ILSVRC2012_validation_ground_truth.txt in it.*val/n01440764/, as torchvision.* LOC_val_solution.csv"
    with pytest.raises(ValueError, match=missing):
        open_labelled(f"imagenet@{flat}", CONFIG)


def test_the_folders_of_v2_are_sorted_as_numbers(tmp_path):
    for label in range(1000):
        layouts.put(tmp_path / f"imagenetv2-matched-frequency-format-val/{label}/{label:04x}.jpeg", IMAGES[label])
    images = open_labelled(f"imagenet_v2@{tmp_path}", CONFIG)
    assert images.labels.tolist() == list(range(1000))
    for label in (0, 2, 10, 100, 999):  # as texts 10 and 100 would come before 2
        assert layouts.number_of(images[label].image) == images[label].metadata["label"] == label
    assert images.classes == tuple(imagenet().values())
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    (folder / "31").rename(folder / "031")
    with pytest.raises(ValueError, match=r"the folder .*031 is none of the 1,000 class numbers from 0 to 999"):
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
    assert images.classes == tuple(list(imagenet().values())[row] for row in sorted(rows))
    shutil.rmtree(tmp_path / f"imagenet-{variant}" / subset[0])
    with pytest.raises(ValueError, match=re.escape("has 199 class folders instead of 200")):
        open_labelled(f"imagenet_{variant}@{tmp_path}", CONFIG)


def test_caltech101_draws_30_of_each_class_for_training_and_tests_on_the_others(tmp_path):
    root = layouts.caltech101(tmp_path)
    train, test = (open_labelled(f"caltech101:{split}@{root}", CONFIG) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [30, 30, 30]
    assert np.bincount(test.labels).tolist() == [2, 1, 3]
    keys = [{s[n].metadata["key"] for n in range(len(s))} for s in (train, test)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 96
    assert not any("BACKGROUND" in key for key in keys[0] | keys[1])
    again = open_labelled(f"caltech101:train@{layouts.caltech101(tmp_path / 'other')}", CONFIG)
    assert again.fingerprint == train.fingerprint
    assert again.classes == ("centered face", "head of a crocodile", "wrench")
