"""NLVR2: is a sentence true of two photographs? (Suhr et al. 2019)

Files, from https://github.com/lil-lab/nlvr (nlvr2/data): train.json, dev.json, test1.json (called test-P in papers),
one JSON object a line. The identifier `dev-850-0-1` is split, set, pair of the set and sentence of the set; its
images are `dev-850-0-img0.png` (left) and `dev-850-0-img1.png` (right), whatever format they have inside. Or ALBEF's
nlvr_train.json, nlvr_dev.json, nlvr_test.json, lists of {"images": [left, right], "sentence", "label"}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import ASCII, fullmatch

from modstruct.data.downstream.published_files import (
    ImageFolders,
    Record,
    TaskEntries,
    is_list,
    published_file,
    read_json_lines,
    read_list,
)

STATEMENTS_REMEDY = "download it from https://github.com/lil-lab/nlvr (nlvr2/data)"
IMAGES_REMEDY = (
    "ask for the images by the form in https://github.com/lil-lab/nlvr (nlvr2/README.md) and give the split's own "
    "folder: images/train, dev or test1"
)
LABELS = {"True": True, "False": False}


@dataclass(frozen=True)
class Nlvr2Statement:
    identifier: str
    images: tuple[Path, Path]
    """Left, right."""
    sentence: str
    label: bool | None
    """None where the file has no label (the hidden test set)."""


def read_nlvr2(
    statements: Path | str, images: Path | str, *, option: str = "data.train", leave_out_missing: bool = False
) -> TaskEntries[Nlvr2Statement]:
    """The statements of one split, in the order of their file.

    images: the folder of this split's images. Training images are in its subfolders 0 to 99, named by each entry's
    `directory`, or without subfolders, as the download script leaves them; of ALBEF's lists any folder on the way to
    them does. option: the section of the recipe that
    errors name. leave_out_missing: leave out statements with a missing image (about 5 % of the published addresses are
    dead) instead of refusing them.

    Raises ValueError for a missing file, folder or image, a malformed entry, and a duplicate identifier.
    """
    path = published_file(statements, f"{option}.statements", STATEMENTS_REMEDY)
    folders = ImageFolders(Path(images), f"{option}.images", IMAGES_REMEDY, leave_out_missing=leave_out_missing)
    if is_list(path):
        return folders.keep(_of_albef(path, folders), lambda statement: statement.images)
    entries, seen = [], set()
    left_out: Counter[str] = Counter()
    for record in read_json_lines(path):
        identifier = record.text("identifier")
        if not fullmatch(r"\w+-\d+-\d+-\d+", identifier, ASCII):
            record.refuse("identifier", "split-set-pair-sentence, such as dev-850-0-1,")
        if identifier in seen:
            record.refuse("identifier", "an identifier that no other statement has")
        seen.add(identifier)
        pair = identifier.rpartition("-")[0]
        folder = folders.root
        if "directory" in record.fields:
            folder = folders.subfolder(str(record.whole("directory")))
        left, right = (folder / f"{pair}-img{side}.png" for side in (0, 1))
        # Both are looked up, so that both count as missing.
        if all([folders.has(left), folders.has(right)]):
            entries.append(Nlvr2Statement(identifier, (left, right), record.text("sentence"), _label(record)))
        else:
            left_out["image missing"] += 1
    folders.refuse_missing()
    return TaskEntries(tuple(entries), dict(left_out))


def _label(record: Record) -> bool | None:
    if "label" not in record.fields:
        return None
    label = record.fields["label"]
    return label if isinstance(label, bool) else LABELS[record.choice("label", LABELS)]


def _of_albef(path: Path, folders: ImageFolders) -> Iterator[Nlvr2Statement]:
    """The statements of ALBEF's list, with identifiers from their images' names and the sentence's number in its set:
    those of one sentence share it, by which consistency is counted."""
    sentences: dict[str, dict[str, int]] = {}
    seen = set()
    for record in read_list(path, ("images", "sentence", "label")):
        left, right = (record.image_path("images", folders, side) for side in (0, 1))
        named = fullmatch(r"(\w+-\d+)-(\d+)-img0\.\w+", left.name, ASCII)
        if named is None:
            record.refuse("images", "two paths, whose names are such as dev-850-0-img0.png and dev-850-0-img1.png,")
        sentence = record.text("sentence")
        of_set = sentences.setdefault(named[1], {})
        identifier = f"{named[1]}-{named[2]}-{of_set.setdefault(sentence, len(of_set))}"
        if identifier in seen:
            record.refuse("sentence", "a sentence that these images have not had yet")
        seen.add(identifier)
        yield Nlvr2Statement(identifier, (left, right), sentence, _label(record))
