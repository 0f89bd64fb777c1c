"""SNLI-VE: does an image entail a sentence, contradict it, or leave it open? (Xie et al. 2019)

Files, from https://github.com/necla-ml/SNLI-VE: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl; or ALBEF's
ve_train.json, ve_dev.json, ve_test.json, lists of {"image", "sentence", "label"}. The images are Flickr30K's,
`flickr30k-images/2407214681.jpg`, whose number may be written with or without `.jpg`.
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
    read_json_lines,
    read_list,
)

HYPOTHESES_REMEDY = "download it by the links in https://github.com/necla-ml/SNLI-VE"
IMAGES_REMEDY = (
    "ask for Flickr30K at https://shannon.cs.illinois.edu/DenotationGraph and give the folder of ID.jpg files"
)

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
"""The name of each label number: ALBEF's numbering, so that its fine-tuned heads fit."""
NO_LABEL = "-"  # the annotators did not agree
IMAGE_KEYS = ("Flickr30K_ID", "Flikr30kID")  # the second is the first release's spelling


@dataclass(frozen=True)
class EntailmentPair:
    pair_id: str
    image: Path
    hypothesis: str
    label: int | None
    """Index in ENTAILMENT_LABELS; None where the file has none."""


def read_snli_ve(
    hypotheses: Path | str, images: Path | str, *, option: str = "data.train", leave_out_missing: bool = False
) -> TaskEntries[EntailmentPair]:
    """The hypotheses of one split, in the order of their file; those labelled "-" are left out and counted.

    images: the folder of the images ID.jpg. option: the section of the recipe that errors name. leave_out_missing:
    leave out hypotheses with a missing image instead of refusing them.

    Raises ValueError for a missing file, folder or image, and for a malformed entry.
    """
    path = published_file(hypotheses, f"{option}.hypotheses", HYPOTHESES_REMEDY)
    folders = ImageFolders(Path(images), f"{option}.images", IMAGES_REMEDY, leave_out_missing=leave_out_missing)
    if is_list(path):
        return folders.keep(_of_albef(path, folders), lambda pair: [pair.image])
    entries = []
    left_out: Counter[str] = Counter()
    for record in read_json_lines(path):
        label = None
        if "gold_label" in record.fields:
            name = record.choice("gold_label", (*ENTAILMENT_LABELS, NO_LABEL))
            if name == NO_LABEL:
                left_out["no label agreed on"] += 1
                continue
            label = ENTAILMENT_LABELS.index(name)
        image_key = next((key for key in IMAGE_KEYS if key in record.fields), IMAGE_KEYS[0])
        image = folders.root / record.flickr_image(image_key)
        if folders.has(image):
            entries.append(EntailmentPair(record.text("pairID"), image, record.text("sentence2"), label))
        else:
            left_out["image missing"] += 1
    folders.refuse_missing()
    return TaskEntries(tuple(entries), dict(left_out))


def _of_albef(path: Path, folders: ImageFolders) -> Iterator[EntailmentPair]:
    """The hypotheses of ALBEF's list, which have no id but their number in the file."""
    for number, record in enumerate(read_list(path, ("image", "sentence", "label"))):
        label = ENTAILMENT_LABELS.index(record.choice("label", ENTAILMENT_LABELS)) if "label" in record.fields else None
        image = folders.root / record.flickr_image("image")
        yield EntailmentPair(str(number), image, record.text("sentence"), label)
