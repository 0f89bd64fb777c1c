"""VQA v2: open questions about COCO images, each answered by ten annotators (Goyal et al. 2017).

Files, from https://visualqa.org/download.html: `v2_OpenEnded_mscoco_train2014_questions.json` and, except for the
test splits, `v2_mscoco_train2014_annotations.json`; the images are COCO's,
`train2014/COCO_train2014_000000000009.jpg`. Or ALBEF's vqa_train.json, vqa_val.json, vqa_test.json, lists of
{"question_id", "question", "answer": [...], "image", "dataset": "vqa"}, answers and all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch

from modstruct.data.downstream.published_files import (
    ImageFolders,
    Record,
    TaskEntries,
    is_list,
    published_file,
    read_json,
    read_json_object,
    read_list,
)
from modstruct.errors import require

QUESTIONS_REMEDY = "download the questions from https://visualqa.org/download.html and unzip them"
ANNOTATIONS_REMEDY = "download the annotations from https://visualqa.org/download.html and unzip them, or give null"
IMAGES_REMEDY = "download COCO's images from https://cocodataset.org/#download and give the folder that holds {folder}"
ANSWERS_REMEDY = "give ALBEF's answer_list.json, or null to take the most frequent answers of the training set"

QUESTION_KEYS = ("data_subtype", "questions", "question_id", "image_id", "question")
ANNOTATION_KEYS = ("annotations", "question_id", "image_id", "question_type", "answer_type", "answers", "answer")
MOST_ANSWERS = 1_000_000
ANSWER_LIST_LENGTH = 3_128  # as ALBEF's published list


@dataclass(frozen=True)
class VqaQuestion:
    question_id: int
    image: Path
    question: str
    question_type: str | None = None
    """The question's first words ("what color is the"); None without annotations, like all below."""
    answer_type: str | None = None
    """yes/no, number or other."""
    answers: tuple[str, ...] = ()
    """One per annotator, as written (the official accuracy normalises them); empty without annotations."""


def read_vqa(
    questions: Path | str,
    images: Path | str,
    annotations: Path | str | None = None,
    *,
    option: str = "data.train",
    leave_out_missing: bool = False,
) -> TaskEntries[VqaQuestion]:
    """The questions of one split, in the order of their file.

    images: the folder that holds train2014, val2014 or test2015, or that folder itself; the questions file says which
    (test-dev2015 has the images of test2015). option: the section of the recipe that errors name. leave_out_missing:
    leave out questions with a missing image instead of refusing them.

    Raises ValueError for a missing file, folder or image, a malformed entry, a duplicate question id, and questions
    without annotation.
    """
    path = published_file(questions, f"{option}.questions", QUESTIONS_REMEDY)
    if is_list(path):
        remedy = "null: ALBEF's list holds the answers, too"
        require(annotations is None, f"{option}.annotations", str(annotations), remedy)
        any_images = IMAGES_REMEDY.format(folder="train2014, val2014 or test2015")
        folders = ImageFolders(Path(images), f"{option}.images", any_images, leave_out_missing=leave_out_missing)
        return folders.keep(_of_albef(path, folders), lambda question: [question.image])
    content = read_json_object(path, QUESTION_KEYS)
    subset = _image_subset(content)
    folders = ImageFolders(
        Path(images), f"{option}.images", IMAGES_REMEDY.format(folder=subset), leave_out_missing=leave_out_missing
    )
    folder = folders.subfolder(subset)
    answered = None
    if annotations is not None:
        answered = _read_annotations(published_file(annotations, f"{option}.annotations", ANNOTATIONS_REMEDY))

    entries, seen = [], set()
    found: dict[int, Path | None] = {}  # several questions share an image
    left_out: Counter[str] = Counter()
    for record in content.records("questions"):
        number, image_id = record.whole("question_id"), record.whole("image_id")
        if number in seen:
            record.refuse("question_id", "an id that no other question has")
        seen.add(number)
        known = _Answered(image_id)
        if answered is not None:
            if number not in answered or answered[number].image_id != image_id:
                record.refuse("question_id", f"an id that {annotations} answers for this image_id")
            known = answered[number]
        if image_id not in found:
            path_of_image = folder / f"COCO_{subset}_{image_id:012d}.jpg"
            found[image_id] = path_of_image if folders.has(path_of_image) else None
        if (image := found[image_id]) is not None:
            entries.append(
                VqaQuestion(
                    number, image, record.text("question"), known.question_type, known.answer_type, known.answers
                )
            )
        else:
            left_out["image missing"] += 1
    folders.refuse_missing()
    return TaskEntries(tuple(entries), dict(left_out))


def _of_albef(path: Path, folders: ImageFolders) -> Iterator[VqaQuestion]:
    """The questions of ALBEF's list."""
    seen = set()
    for record in read_list(path, ("question_id", "question", "answer", "image", "dataset")):
        if record.fields.get("dataset") != "vqa":
            record.refuse("dataset", "vqa (vg, Visual Genome's questions, have one answer each and are not read)")
        number = record.whole("question_id")
        if number in seen:
            record.refuse("question_id", "an id that no other question has")
        seen.add(number)
        answers = record.texts("answer", empty=True) if "answer" in record.fields else ()
        yield VqaQuestion(number, record.image_path("image", folders), record.text("question"), answers=answers)


@dataclass(frozen=True)
class _Answered:
    image_id: int
    question_type: str | None = None
    answer_type: str | None = None
    answers: tuple[str, ...] = ()


def _image_subset(content: Record) -> str:
    """`train2014` of the questions' data_subtype: the folder, and a part of each image's name."""
    parts = fullmatch(r"(train|val|test)(?:-\w+)?(\d{4})", content.text("data_subtype"))
    if parts is None:
        content.refuse("data_subtype", "train2014, val2014, test2015 or test-dev2015")
    return parts[1] + parts[2]


def _read_annotations(path: Path) -> dict[int, _Answered]:
    answered: dict[int, _Answered] = {}
    for record in read_json_object(path, ANNOTATION_KEYS).records("annotations"):
        number = record.whole("question_id")
        if number in answered:
            record.refuse("question_id", "an id that no other annotation has")
        answers = tuple(answer.text("answer", empty=True) for answer in record.records("answers"))
        if not answers:
            record.refuse("answers", "at least one answer")
        answered[number] = _Answered(
            record.whole("image_id"), record.text("question_type"), record.text("answer_type"), answers
        )
    return answered


def answer_weights(answers: Sequence[str]) -> dict[str, float]:
    """Each distinct answer with the share of the annotators who gave it, most frequent first (ALBEF's weights).

    The shares sum to 1. Empty answers, of which VQA v2 has a few, are ignored.
    """
    counts = Counter(answer for answer in answers if answer)
    return {answer: count / counts.total() for answer, count in _ranked(counts)}


def build_answer_list(questions: Iterable[VqaQuestion], length: int = ANSWER_LIST_LENGTH) -> list[str]:
    """The answers that annotators gave most often, at most `length` of them; ties in alphabetical order.

    Raises ValueError if length is below 1, or if no question has an answer.
    """
    require(length >= 1, "length", length, "at least 1")
    counts = Counter(answer for question in questions for answer in question.answers if answer)
    require(bool(counts), "questions", "without answers", "give the annotations of the training set")
    return [answer for answer, _ in _ranked(counts)[:length]]


def read_answer_list(path: Path | str, option: str = "data.answers") -> list[str]:
    """The answers that evaluation ranks: a JSON list of texts, as ALBEF's answer_list.json.

    Raises ValueError for a missing file, for anything but different, non-empty texts, and for none or over a million.
    """
    path = published_file(path, option, ANSWERS_REMEDY)
    content = read_json(path)
    if not isinstance(content, list) or not 0 < len(content) <= MOST_ANSWERS:
        raise ValueError(f"{path}: a list of 1 to {MOST_ANSWERS:,} answers belongs there; {ANSWERS_REMEDY}")
    answers: dict[str, None] = {}
    for number, answer in enumerate(content):
        record = Record({"answer": answer}, f"{path}, entry {number}")
        text = record.text("answer")
        if text in answers:
            record.refuse("answer", "an answer that no other entry has")
        answers[text] = None
    return list(answers)


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
