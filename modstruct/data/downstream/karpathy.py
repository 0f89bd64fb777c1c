"""Captions of COCO and Flickr30K in the splits of Karpathy & Fei-Fei 2015, by which retrieval is measured.

Files: dataset_coco.json and dataset_flickr30k.json of https://cs.stanford.edu/people/karpathy/deepimagesent/
(caption_datasets.zip). COCO's entries name the folder of their image (`filepath`: train2014 or val2014),
Flickr30K's do not. Or ALBEF's coco_train.json, flickr30k_test.json and their like, each of one split: lists of
{"image", "caption"}, the caption one text or several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modstruct.data.downstream.published_files import (
    ImageFolders,
    TaskEntries,
    is_list,
    published_file,
    read_json_object,
    read_list,
)
from modstruct.errors import refuse, require

CAPTIONS_REMEDY = (
    "download caption_datasets.zip from https://cs.stanford.edu/people/karpathy/deepimagesent/ and unzip it"
)
IMAGES_REMEDY = (
    "download the images (COCO 2014, or Flickr30K) and give the folder that holds train2014 and val2014, or the "
    "ID.jpg files"
)
CAPTION_KEYS = ("images", "annotations", "filename", "filepath", "split", "sentences", "raw", "cocoid", "imgid")
SPLITS = ("train", "val", "test")
SPLIT_OF_RUN = {"train": "train", "validation": "val", "test": "test"}
"""Our split names -> Karpathy's."""
# COCO's validation images that are in neither val nor test. Published retrieval results, ALBEF's too, train on them
# (113,287 images with them, 82,783 without), so here they are training images.
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class CaptionedImage:
    image: Path
    captions: tuple[str, ...]
    image_id: int
    """COCO's own id, or the number in the file for Flickr30K."""


def read_karpathy(
    captions: Path | str,
    images: Path | str,
    split: str,
    *,
    option: str = "data.train",
    leave_out_missing: bool = False,
) -> TaskEntries[CaptionedImage]:
    """The images of a split (train, val or test) with their captions, in the order of the file; restval is train.

    images: the folder that holds `filepath`/`filename`, or `filename` itself. option: the section of the recipe that
    errors name. leave_out_missing: leave out missing images instead of refusing them.

    Raises ValueError for a missing file, folder or image, a malformed entry, and a split that has no image.
    """
    require(split in SPLITS, f"{option}.split", split, f"one of {', '.join(SPLITS)}")
    path = published_file(captions, f"{option}.captions", CAPTIONS_REMEDY)
    folders = ImageFolders(Path(images), f"{option}.images", IMAGES_REMEDY, leave_out_missing=leave_out_missing)
    if is_list(path):
        return folders.keep(_of_albef(path, folders), lambda captioned: [captioned.image])
    content = read_json_object(path, CAPTION_KEYS)
    if "annotations" in content.fields:
        coco = "this is COCO's own captions file, which does not have the splits that retrieval is measured by"
        refuse(f"{option}.captions", str(path), f"{coco}: give dataset_coco.json ({CAPTIONS_REMEDY})")
    entries, seen = [], set()
    left_out: Counter[str] = Counter()
    for record in content.records("images"):
        if SPLIT_OF[record.choice("split", SPLIT_OF)] != split:
            continue
        folder = folders.subfolder(record.file_name("filepath")) if "filepath" in record.fields else folders.root
        image = folder / record.file_name("filename")
        if image in seen:
            record.refuse("filename", "an image that no other entry has")
        seen.add(image)
        texts = tuple(sentence.text("raw") for sentence in record.records("sentences"))
        if not texts:
            record.refuse("sentences", "at least one caption")
        if folders.has(image):
            image_id = record.whole("cocoid" if "cocoid" in record.fields else "imgid")
            entries.append(CaptionedImage(image, texts, image_id))
        else:
            left_out["image missing"] += 1
    require(bool(seen), f"{option}.split", split, f"no image of {path} belongs to it; give another split or file")
    folders.refuse_missing()
    return TaskEntries(tuple(entries), dict(left_out))


def _of_albef(path: Path, folders: ImageFolders) -> Iterator[CaptionedImage]:
    """The images of ALBEF's list, numbered in its order; an image with an entry for each caption is put together."""
    captions: dict[Path, list[str]] = {}
    for record in read_list(path, ("image", "caption")):
        several = isinstance(record.fields.get("caption"), list)
        texts = record.texts("caption") if several else (record.text("caption"),)
        if not texts:
            record.refuse("caption", "at least one caption")
        captions.setdefault(record.image_path("image", folders), []).extend(texts)
    for number, (image, texts_of_image) in enumerate(captions.items()):
        yield CaptionedImage(image, tuple(texts_of_image), number)
