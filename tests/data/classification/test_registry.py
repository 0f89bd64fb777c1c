"""How a command line names a set; the built-in scenes as one; and a set in the loader that evaluation reads with."""

from __future__ import annotations

import json

import published_layouts as layouts
import pytest
import torch

from modstruct.config import DataConfig, ScenesConfig, ViewsConfig
from modstruct.data.classification.published import published_sets
from modstruct.data.classification.registry import NamedSet, open_labelled, parse_set, set_splits
from modstruct.data.shards.evaluation_samples import evaluation_loader
from modstruct.data.synthetic.factors import COLOURS, FILLS, SHAPES, SIZES
from modstruct.data.synthetic.shards import ensure_scenes
from modstruct.data.transforms.augment import Views


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cifar10@/data/cifar10", NamedSet("cifar10", None, "/data/cifar10")),
        ("cifar10:train@/data/a@b:c", NamedSet("cifar10", "train", "/data/a@b:c")),
        ("sets/birds.yaml", NamedSet("sets/birds.yaml", None, None)),
        ("sets/birds.yaml:validation", NamedSet("sets/birds.yaml", "validation", None)),
        ("a:b/birds.yml", NamedSet("a:b/birds.yml", None, None)),
        ("colours.yaml@/data/{0..9}.tar", NamedSet("colours.yaml", None, "/data/{0..9}.tar")),
        ("scenes_shape:train@x", NamedSet("scenes_shape", "train", "x")),
        ("scenes_size@x", NamedSet("scenes_size", None, "x")),
    ],
)
def test_a_name_is_read(text, expected):
    assert parse_set(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar", r"there is no set 'cifar' \(did you mean cifar10\?\); the sets are caltech101, .*, a YAML file"),
        ("scenes_color", r"mean scenes_colour\?.*, NAME='SHARDS' for shards with captions, or eval for data.eval"),
        ("mine/coco.tar", r"no set 'mine/coco.tar'; .*, a YAML file, NAME=mine/coco\.tar for shards with captions"),
        ("cifar10", r"give the folder that the files lie in: cifar10@FOLDER"),
        ("cifar10@", r"nothing is named behind the @"),
        ("cifar10:extra@x", r"the split 'extra' is none of train, validation, test"),
        ("cifar10:validation@x", r"cifar10 has no split validation, only train, test"),
        ("imagenet:test@x", r"imagenet has no split test, only train, validation"),
        ("imagenet_a:train@x", r"imagenet_a has no split train, only test"),
        ("colours.yaml:train@x.tar", r"shards with a class file have no splits"),
    ],
)
def test_a_wrong_name_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_set(text)


def test_a_missing_folder_is_named_with_what_to_download_for_every_set(tmp_path):
    for name, published in published_sets().items():
        with pytest.raises(ValueError, match=rf"{name}@{tmp_path}/none: there is no such folder; ") as refusal:
            open_labelled(f"{name}@{tmp_path}/none", DataConfig())
        assert str(refusal.value).endswith(published.download)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"^{name}@"):
            open_labelled(f"{name}@{tmp_path}/{name}", DataConfig())


def test_the_sets_of_the_papers_tables_are_all_there():
    t1_and_t2 = {"cifar10", "cifar100", "imagenet", *(f"imagenet_{variant}" for variant in ("v2", "sketch", "a", "r"))}
    t3 = {"caltech101", "svhn", "stl10", "cifar10", "cifar100", "dtd", "fgvc_aircraft", "oxford_pets", "rendered_sst2"}
    t3 |= {"food101", "gtsrb", "stanford_cars", "flowers102", "imagenet"}
    assert len(t3) == 14
    assert t1_and_t2 | t3 <= published_sets().keys()
    for name in t3:  # linear probes
        assert set_splits(f"{name}@x")[0] == "train"
        assert set_splits(f"{name}@x")[-1] in ("test", "validation")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    config = DataConfig(
        workers=0,
        cache=str(tmp_path_factory.mktemp("cache")),
        scenes=ScenesConfig(train_samples=60, validation_samples=20, test_samples=30),
    )
    paths = ensure_scenes(config.scenes, config.cache, 32)
    return config, paths.test.rsplit("/", 1)[0]


@pytest.mark.parametrize(
    ("label", "values"), [("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("fill", FILLS)]
)
def test_scenes_are_a_labelled_set_with_splits(scenes, label, values):
    config, folder = scenes
    sizes = {}
    for split in set_splits(f"scenes_{label}@{folder}"):
        images = open_labelled(f"scenes_{label}:{split}@{folder}", config)
        sizes[split] = len(images)
        assert images.classes == tuple(values)
        labels = [images[number].metadata["label"] for number in range(len(images))]
        assert set(labels) - {-1}
        for number, row in enumerate(labels):
            sample = images[number]
            assert sample.metadata[label] == (None if row < 0 else values[row])
            assert sample.metadata["key"] == f"{split}-{number:09d}"
            assert sample.captions == [sample.metadata["caption"]]
    assert sizes == {"train": 60, "validation": 20, "test": 30}
    assert open_labelled(f"scenes_{label}@{folder}", config).name == f"scenes_{label}"
    assert open_labelled(f"scenes_{label}:train@{folder}", config).name == f"scenes_{label}-train"
    with pytest.raises(ValueError, match=r"there is no zero_shot.*yaml in it; give the folder that the scenes' shards"):
        open_labelled(f"scenes_{label}@{folder}/..", config)


def test_a_set_goes_through_the_loader_that_evaluation_reads_with(tmp_path):
    root = layouts.oxford_pets(tmp_path)
    layouts.put(root / "oxford-iiit-pet/images/wheaten_terrier_5.jpg", b"no image")
    images = open_labelled(f"oxford_pets@{root}", DataConfig(workers=0))
    views = Views(ViewsConfig(), 8)
    batches = list(evaluation_loader(images, views, 2))
    assert [batch.indices.tolist() for batch in batches] == [[1], [2]]
    assert [cause for batch in batches for cause, _ in batch.faults] == ["undecodable image"]
    assert [fields["label"] for batch in batches for fields in batch.metadata] == [0, 1]
    assert all(torch.equal(b.image[0], views.evaluation_image(images[int(b.indices)].image)) for b in batches)
    json.dumps([batch.metadata for batch in batches])
