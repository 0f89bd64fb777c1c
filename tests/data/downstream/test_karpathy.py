from __future__ import annotations

import copy
from pathlib import Path

import pytest
from published_samples import KARPATHY_COCO, KARPATHY_FLICKR, as_json, touched

from modstruct.data.downstream.karpathy import read_karpathy


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    images = tmp_path / "images"
    touched(*(images / entry["filepath"] / entry["filename"] for entry in KARPATHY_COCO["images"]))
    return as_json(tmp_path / "dataset_coco.json", KARPATHY_COCO), images


def test_restval_counts_as_train(coco):
    assert [image.image_id for image in read_karpathy(*coco, "train").entries] == [1001, 1002]
    assert [image.image_id for image in read_karpathy(*coco, "val").entries] == [1003]
    (test,) = read_karpathy(*coco, "test").entries
    assert test.image == coco[1] / "val2014" / "COCO_val2014_000000000000.jpg"
    assert test.captions == ("A man, number 0.", "Another caption of 0")


def test_flickr30k_names_no_folders(tmp_path: Path):
    touched(tmp_path / "flickr30k-images" / "1000092795.jpg")
    captions = as_json(tmp_path / "dataset_flickr30k.json", KARPATHY_FLICKR)
    (image,) = read_karpathy(captions, tmp_path / "flickr30k-images", "train").entries
    assert image.image.is_file()
    assert image.image_id == 7
    with pytest.raises(ValueError, match=r"data\.train\.split = 'test': no image of .*dataset_flickr30k\.json"):
        read_karpathy(captions, tmp_path / "flickr30k-images", "test")


def test_restval_is_no_split_to_ask_for(coco):
    with pytest.raises(ValueError, match=r"data\.train\.split = 'restval': one of train, val, test"):
        read_karpathy(*coco, "restval")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "../../etc/passwd"}, r"images\[1\]: filename = '\.\./\.\./etc/passwd': a plain file name"),
        ({"filename": "/etc/passwd"}, r"filename = "),
        ({"filepath": ".."}, r"filepath = '\.\.'"),
        ({"split": "dev"}, r"images\[1\]: split = 'dev'"),
        ({"sentences": []}, r"images\[1\]: sentences = a list of 0: at least one caption"),
        ({"sentences": [{"tokens": []}]}, r"images\[1\], sentences\[0\]: there is no key 'raw'"),
        ({"sentences": [{"raw": ["a"]}]}, r"sentences\[0\]: raw = a list of 1"),
        ({"cocoid": "7"}, r"cocoid = '7'"),
    ],
)
def test_a_malformed_image_is_named_by_file_number_and_key(coco, change: dict, message: str):
    content = copy.deepcopy(KARPATHY_COCO)
    content["images"][1] |= change
    as_json(coco[0], content)
    with pytest.raises(ValueError, match=rf"dataset_coco\.json.*{message}"):
        read_karpathy(*coco, "train")


def test_an_image_that_comes_twice_is_refused(coco):
    as_json(coco[0], {"images": KARPATHY_COCO["images"] + KARPATHY_COCO["images"][:1]})
    with pytest.raises(ValueError, match=r"images\[4\]: filename = .*no other entry"):
        read_karpathy(*coco, "test")


def test_missing_files_are_named(coco):
    with pytest.raises(ValueError, match=r"data\.train\.captions = .*caption_datasets\.zip"):
        read_karpathy(coco[0].with_name("none.json"), coco[1], "train")
    with pytest.raises(ValueError, match=r"data\.train\.images = .*there is no such folder"):
        read_karpathy(coco[0], coco[1] / "none", "train")
    (coco[1] / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images are not there, the first train2014/COCO_train2014_0+1\.jpg"):
        read_karpathy(*coco, "train")
    assert read_karpathy(*coco, "train", leave_out_missing=True).left_out == {"image missing": 1}
