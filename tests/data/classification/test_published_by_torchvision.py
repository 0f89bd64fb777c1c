"""Sets that torchvision reads: its images and labels in its order; our errors, bounds and names."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import published_layouts as layouts
import pytest
import torchvision.datasets as peers

from modstruct.config import DataConfig
from modstruct.data.classification.published import PAPER_TEMPLATE, published_sets
from modstruct.data.classification.registry import open_labelled
from modstruct.data.faults import BadSample

CONFIG = DataConfig(workers=0)
pytestmark = pytest.mark.usefixtures("unchecked")
# Our name, our split, and torchvision's reader of the same split.
PEERS: list[tuple[str, str, Callable[[Path], object]]] = [
    *(("dtd", ours, lambda root, s=theirs: peers.DTD(root, s)) for ours, theirs in
      (("train", "train"), ("validation", "val"), ("test", "test"))),
    *(("fgvc_aircraft", ours, lambda root, s=theirs: peers.FGVCAircraft(root, s)) for ours, theirs in
      (("train", "train"), ("validation", "val"), ("test", "test"))),
    *(("oxford_pets", ours, lambda root, s=theirs: peers.OxfordIIITPet(root, s)) for ours, theirs in
      (("train", "trainval"), ("test", "test"))),
    *(("rendered_sst2", ours, lambda root, s=theirs: peers.RenderedSST2(root, s)) for ours, theirs in
      (("train", "train"), ("validation", "val"), ("test", "test"))),
    *(("food101", split, lambda root, s=split: peers.Food101(root, s)) for split in ("train", "test")),
    *(("gtsrb", split, lambda root, s=split: peers.GTSRB(root, s)) for split in ("train", "test")),
    *(("stanford_cars", split, lambda root, s=split: peers.StanfordCars(root, s)) for split in ("train", "test")),
    *(("flowers102", ours, lambda root, s=theirs: peers.Flowers102(root, s)) for ours, theirs in
      (("train", "train"), ("validation", "val"), ("test", "test"))),
    *(("svhn", split, lambda root, s=split: peers.SVHN(root, s)) for split in ("train", "test")),
    *(("stl10", split, lambda root, s=split: peers.STL10(root, s)) for split in ("train", "test")),
    *(("cifar10", split, lambda root, s=split: peers.CIFAR10(root, s == "train")) for split in ("train", "test")),
    *(("cifar100", split, lambda root, s=split: peers.CIFAR100(root, s == "train")) for split in ("train", "test")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "peer"), PEERS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_set_agrees_with_torchvision(tmp_path, name, split, peer):
    root = getattr(layouts, name)(tmp_path)
    ours, theirs = open_labelled(f"{name}:{split}@{root}", CONFIG), peer(root)
    assert len(ours) == len(theirs) > 0
    for number in range(len(ours)):
        sample, (image, label) = ours[number], theirs[number]
        assert sample.image.mode == "RGB"
        assert np.array_equal(np.asarray(sample.image), np.asarray(image.convert("RGB")))
        assert sample.metadata["label"] == label
        assert sample.captions == []
    assert len({ours[number].metadata["key"] for number in range(len(ours))}) == len(ours)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("dtd", ("banded", "polka-dotted")),
        ("fgvc_aircraft", ("707-320", "A300B4", "F/A-18")),
        ("oxford_pets", ("Abyssinian", "american bulldog", "wheaten terrier")),
        ("rendered_sst2", ("negative", "positive")),
        ("food101", ("apple pie", "waffles")),
        ("stanford_cars", ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")),
        ("svhn", tuple("0123456789")),
        ("stl10", ("airplane", "bird", "car")),
        ("cifar10", ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    ],
)
def test_class_names_are_readable(tmp_path, name, classes):
    assert open_labelled(f"{name}@{getattr(layouts, name)(tmp_path)}", CONFIG).classes == classes


def test_numbered_classes_have_names(tmp_path):
    signs = open_labelled(f"gtsrb@{layouts.gtsrb(tmp_path / 'signs')}", CONFIG)
    assert len(set(signs.classes)) == 43
    assert [signs.classes[signs[n].metadata["label"]] for n in range(3)] == [
        "no trucks",
        "speed limit 30 km/h",
        "end of no passing for trucks",
    ]
    flowers = open_labelled(f"flowers102@{layouts.flowers102(tmp_path / 'flowers')}", CONFIG)
    assert len(set(flowers.classes)) == 102
    assert flowers.classes[flowers[0].metadata["label"]] == "pink primrose"


@pytest.mark.parametrize("name", ["dtd", "svhn", "stl10", "oxford_pets"])
def test_a_set_survives_the_way_to_a_loader_process(tmp_path, name):
    images = open_labelled(f"{name}@{getattr(layouts, name)(tmp_path)}", CONFIG)
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(copy[1].image), np.asarray(images[1].image))
    assert copy[1].metadata == images[1].metadata
    assert copy.fingerprint == images.fingerprint


def test_pixels_are_mapped_by_loader_processes_not_copied_to_them(tmp_path):
    images = open_labelled(f"stl10@{layouts.stl10(tmp_path)}", CONFIG)
    content = bytes(ForkingPickler.dumps(images))
    assert len(content) < 8_000 < len(images) * 96 * 96 * 3
    copy = pickle.loads(content)
    assert np.array_equal(np.asarray(copy[1].image), np.asarray(images[1].image))
    assert copy.fingerprint == images.fingerprint


def test_both_forms_of_gtsrbs_training_images_and_its_inner_folder_are_read(tmp_path):
    root = layouts.gtsrb(tmp_path)
    inner = root / "gtsrb/GTSRB"
    train, test = (open_labelled(f"gtsrb:{split}@{root}", CONFIG) for split in ("train", "test"))
    layouts.put_folder(inner / "Final_Training")
    (inner / "Training").rename(inner / "Final_Training/Images")
    for place in (root, root / "gtsrb", inner):
        assert open_labelled(f"gtsrb:train@{place}", CONFIG).fingerprint == train.fingerprint
        assert open_labelled(f"gtsrb@{place}", CONFIG).fingerprint == test.fingerprint
    shutil.rmtree(inner / "Final_Training/Images/00001")  # torchvision would number those behind it anew
    assert open_labelled(f"gtsrb:train@{root}", CONFIG).labels.max() == 42
    shutil.rmtree(inner / "Final_Training")
    with pytest.raises(ValueError, match=r"there is no folder .*/GTSRB/Training; download GTSRB-Training_fixed"):
        open_labelled(f"gtsrb:train@{root}", CONFIG)


def test_the_archives_own_folder_is_found_too(tmp_path):
    root = layouts.food101(tmp_path)
    inner, outer = open_labelled(f"food101@{root}/food-101", CONFIG), open_labelled(f"food101@{root}", CONFIG)
    assert inner.fingerprint == outer.fingerprint
    textures = layouts.dtd(tmp_path)
    assert len(open_labelled(f"dtd@{textures}/dtd/dtd", CONFIG)) == len(open_labelled(f"dtd@{textures}", CONFIG)) == 2


def test_every_published_set_has_the_papers_template_first_and_an_ensemble_behind_it(tmp_path):
    listed = {name: published.templates for name, published in published_sets().items()}
    for name in listed.keys() - {"folder", "shards"}:
        assert name.startswith("imagenet") or len(listed[name]) == len(set(listed[name])) >= 1
    sizes = {"cifar10": 18, "caltech101": 34, "dtd": 8, "stanford_cars": 8, "gtsrb": 3, "fgvc_aircraft": 2, "stl10": 2}
    assert {name: len(listed[name]) for name in sizes} == sizes  # as many as CLIP was released with
    images = open_labelled(f"stl10@{layouts.stl10(tmp_path)}", CONFIG)
    assert images.templates == (PAPER_TEMPLATE, "a photo of a {}.", "a photo of the {}.")
    assert all(template.count("{}") == 1 for templates in listed.values() for template in templates)


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("dtd", "dtd/dtd/labels/test1.txt", r"dtd@.*there is no .*/dtd/dtd/labels/test1\.txt; download dtd-r1\.0\.1"),
        ("dtd", "dtd/dtd/images/banded/banded_0005.jpg", r"1 of 2 images are not in .*first banded/banded_0005\.jpg"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/variants.txt", "no .*/data/variants.txt; download fgvc-air"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", "no .*/annotations/test.txt; download images.tar"),
        ("food101", "food-101/meta/test.json", "food101@.*there is no .*/test.json; download food-101"),
        ("gtsrb", "gtsrb/GT-final_test.csv", "there is no GT-final_test.csv in it, nor in gtsrb, .*; download GTSRB"),
        ("stanford_cars", "stanford_cars/devkit/cars_meta.mat", "there is no .*/cars_meta.mat; put cars_train"),
        ("stanford_cars", "stanford_cars/cars_test_annos_withlabels.mat", "there is no .*/cars_test_annos_withlabels"),
        ("flowers102", "flowers-102/imagelabels.mat", "there is no .*/imagelabels.mat; download 102flowers"),
        ("svhn", "test_32x32.mat", "svhn@.*there is no test_32x32.mat in it, nor in svhn; download"),
        ("stl10", "stl10_binary/test_y.bin", "there is no .*/test_y.bin; download stl10_binary.tar.gz"),
        ("stl10", "stl10_binary/class_names.txt", "there is no .*/class_names.txt; download stl10_binary.tar.gz"),
        ("cifar10", "cifar-10-batches-py/data_batch_2", "there is no .*/data_batch_2; download cifar-10-python"),
        ("cifar100", "cifar-100-python/meta", "there is no meta in it, nor in cifar-100-python; download cifar-100-py"),
    ],
)
def test_a_missing_file_is_named_with_the_set_and_what_to_download(tmp_path, name, gone, message):
    root = getattr(layouts, name)(tmp_path)
    (root / gone).unlink()
    with pytest.raises(ValueError, match=message):
        open_labelled(f"{name}@{root}", CONFIG)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("dtd", "labels/test1.txt", "banded/banded_0005.jpg\nblue/x.jpg\n", "not in .*/images, the first blue/x.jpg"),
        (
            "dtd",
            "labels/test1.txt",
            "banded/../../../../passwd",
            "torchvision cannot read labels/test1.txt in .*/dtd",
        ),
        ("dtd", "labels/test1.txt", "../passwd\nbanded/x", r"the image path '\.\./passwd' points out of"),
        (
            "dtd",
            "labels/test1.txt",
            "banded/banded_0005.jpg\n",
            "labels/test1.txt .*its classes, which",
        ),
        ("dtd", "labels/test1.txt", "", "cannot read labels/test1.txt"),
        ("dtd", "labels/test1.txt", b"\xff\xfe\xff", "cannot read labels/test1.txt .*UnicodeDecodeError"),
        ("fgvc_aircraft", "images_variant_test.txt", "1 Zeppelin\n", "images_variant_test.txt .*KeyError: 'Zeppelin'"),
        ("oxford_pets", "annotations/test.txt", "a_1 1 1\n", "annotations/test.txt .*not enough values"),
        ("oxford_pets", "annotations/test.txt", "a_1 1 1 1\nb_1 1 1 1\n", "annotations/test.txt .*two breeds have one"),
        ("oxford_pets", "annotations/test.txt", "a_1 1 1 1\nb_1 3 1 1\n", "annotations/test.txt .*KeyError: 1"),
        ("food101", "meta/test.json", "{", "cannot read meta/test.json .*JSONDecodeError"),
        ("gtsrb", "GT-final_test.csv", "Filename;Class\n1.ppm;2\n", "GT-final_test.csv has no column called 'ClassId'"),
        ("gtsrb", "GT-final_test.csv", "Filename;ClassId\n0.ppm;43\n", "'43' of 0.ppm is none of the 43 classes"),
        ("gtsrb", "GT-final_test.csv", "Filename;ClassId\n0.ppm;-1\n", "'-1' of 0.ppm is none of the 43 classes"),
        ("stanford_cars", "devkit/cars_meta.mat", b"no mat", "cannot read devkit/cars_meta.mat, .*MatReadError"),
        ("svhn", "../test_32x32.mat", b"", "/test_32x32.mat is not the published file: its MD5 is another"),
        ("stl10", "test_X.bin", b"123", "_X.bin is not the published file: its MD5 is another"),
        ("stl10", "test_y.bin", b"\x01\x02\x04", "label outside the 3 classes"),
        ("stl10", "test_y.bin", b"\x01", "3 images and 1 labels"),
        ("cifar10", "test_batch", b"no pickle", "batches.meta is not the published file: its MD5 is another"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, file, content, message):
    root = getattr(layouts, name)(tmp_path)
    layouts.put(root / ("gtsrb" if name == "gtsrb" else published_sets()[name].folder) / file, content)
    with pytest.raises(ValueError, match=message) as refusal:
        open_labelled(f"{name}@{root}", CONFIG)
    assert str(refusal.value).startswith(f"{name}@{root}: ")
    assert str(refusal.value).endswith(published_sets()[name].download)


def test_an_image_that_cannot_be_decoded_is_a_bad_sample(tmp_path):
    root = layouts.dtd(tmp_path)
    layouts.put(root / "dtd/dtd/images/polka-dotted/polka-dotted_0004.jpg", b"no image")
    images = open_labelled(f"dtd@{root}", CONFIG)
    with pytest.raises(BadSample, match=r"undecodable image: .*polka-dotted_0004"):
        images[0]
    assert layouts.number_of(images[1].image) == 5
    (root / "dtd/dtd/images/banded/banded_0005.jpg").unlink()
    with pytest.raises(BadSample, match=r"unreadable image: .*banded_0005"):
        images[1]
    with pytest.raises(IndexError, match="image 2 of 2 of dtd"):
        images[2]


def test_the_largest_image_allowed_holds_for_arrays_and_files(tmp_path):
    small = DataConfig(workers=0, max_image_pixels=15)
    for name in ("svhn", "dtd"):
        with pytest.raises(BadSample, match="decompression bomb"):
            open_labelled(f"{name}@{getattr(layouts, name)(tmp_path)}", small)[0]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_version_of_cifar_is_refused_by_name(tmp_path, name):
    folder, listed = published_sets()[name].unread
    layouts.put(tmp_path / folder / listed, "a\nb\n")
    for given in (tmp_path, tmp_path / folder):
        with pytest.raises(ValueError, match=rf"{name}@.*is of the binary version, which is not read; .*python"):
            open_labelled(f"{name}@{given}", CONFIG)
    assert len(open_labelled(f"{name}@{getattr(layouts, name)(tmp_path)}", CONFIG)) == 3  # both are there


def test_a_published_set_in_another_folder_is_found_too(tmp_path):
    names = ("dtd", "fgvc_aircraft", "flowers102", "oxford_pets", "cifar10", "stl10")
    for name in names:
        known, root = published_sets()[name], getattr(layouts, name)(tmp_path / name)
        renamed = tmp_path / f"my {name}"
        (root / known.folder).rename(renamed)
        images = open_labelled(f"{name}@{renamed}", CONFIG)
        assert images.fingerprint == open_labelled(f"{name}@{getattr(layouts, name)(root)}", CONFIG).fingerprint
        assert images[0].image.mode == "RGB"
