"""Converted sets: shards in order of number, an image and a label a sample."""

from __future__ import annotations

import os
import pickle

import published_layouts as layouts
import pytest

from modstruct.config import DataConfig
from modstruct.data.classification.published import PAPER_TEMPLATE
from modstruct.data.classification.registry import open_labelled
from modstruct.data.faults import BadSample

CONFIG = DataConfig(workers=0)
CLASSES = ["plane", "bird", "cat"]


def test_shards_are_read_in_order_of_number(tmp_path):
    labels = [number % 3 for number in range(23)]
    root = layouts.converted(tmp_path / "wds_things", labels, CLASSES)  # 0.tar to 11.tar
    images = open_labelled(f"shards@{root}", CONFIG)
    assert images.name == "wds_things"
    assert images.classes == tuple(CLASSES)
    assert images.templates == (PAPER_TEMPLATE, "a photo of a {}.", "art of the {}.")
    assert [layouts.number_of(images[n].image) for n in range(23)] == list(range(23))
    assert [images[n].metadata for n in range(23)] == [
        {"label": label, "key": f"s{number:07d}"} for number, label in enumerate(labels)
    ]
    copy = pickle.loads(pickle.dumps(images))
    assert layouts.number_of(copy[22].image) == 22


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_published_set_is_read_from_shards_too(tmp_path, kind):
    root = layouts.converted(tmp_path / "wds", [0, 1, 2], CLASSES, kind=kind)
    images = open_labelled(f"imagenet@{root}", CONFIG)  # its usual split is validation, which is converted as test
    assert (images.name, images.classes) == ("imagenet", tuple(CLASSES))
    (root / "zeroshot_classification_templates.txt").unlink()
    assert len(open_labelled(f"cifar10@{root}", CONFIG).templates) == 19
    with pytest.raises(ValueError, match=r"cifar10@.*there is no folder train of the split train in it"):
        open_labelled(f"cifar10:train@{root}", CONFIG)


def test_samples_without_image_or_label_are_left_out_and_counted(tmp_path):
    root = layouts.converted(tmp_path, [0, 1], CLASSES)
    good = layouts.image(9)
    layouts.tar(
        root / "test/0.tar",
        [("a.png", good), ("b.cls", b"1"), ("c.png", good), ("c.cls", b"one"), ("d.png", good), ("d.cls", b" 2\n")],
    )
    images = open_labelled(f"shards@{root}", CONFIG)
    assert images.labels.tolist() == [2]
    assert images.left_out == {"no label": 1, "no image": 1, "malformed label": 1}


def test_an_undecodable_image_is_a_bad_sample_and_a_shard_that_shrinks_too(tmp_path):
    root = layouts.converted(tmp_path, [0, 1], CLASSES)
    layouts.tar(root / "test/0.tar", [("a.png", b"no image"), ("a.cls", b"1"), ("b.png", b"x" * 999), ("b.cls", b"0")])
    images = open_labelled(f"shards@{root}", CONFIG)
    with pytest.raises(BadSample, match=r"undecodable image: .*0\.tar: a"):
        images[0]
    os.truncate(root / "test/0.tar", 2000)
    with pytest.raises(BadSample, match=r"truncated shard: .*0\.tar: b"):
        images[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "test/1.tar").unlink(), r"has 2 shards, and its nshards.txt says 3"),
        (lambda root: os.truncate(root / "test/1.tar", 1500), r"1\.tar is damaged or cut off"),
        (lambda root: layouts.put(root / "test/1.tar", b"x" * 2000), r"1\.tar is damaged or cut off"),
        (lambda root: layouts.put(root / "classnames.txt", "plane\nbird\n"), r"label 2 of s0000002 is none of the 2"),
        (
            lambda root: layouts.put(root / "zeroshot_classification_templates.txt", "a thing"),
            r"'a thing' has no",
        ),
        (lambda root: (root / "classnames.txt").unlink(), r"there is no file .*/classnames.txt; give a set's folder"),
    ],
)
def test_an_incomplete_or_damaged_set_is_refused(tmp_path, change, message):
    root = layouts.converted(tmp_path, [0, 1, 2, 0, 1], CLASSES)
    change(root)
    with pytest.raises(ValueError, match=message):
        open_labelled(f"shards@{root}", CONFIG)


def test_a_set_without_a_usable_sample_is_refused(tmp_path):
    root = layouts.converted(tmp_path, [0], CLASSES)
    layouts.tar(root / "test/0.tar", [("a.png", layouts.image(1))])
    with pytest.raises(ValueError, match=r"no sample of 1 shards has image and label \(\{'no label': 1\}\)"):
        open_labelled(f"shards@{root}", CONFIG)
