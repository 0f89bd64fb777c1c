"""Small files in the published formats, as the data sets' authors write them, with images that are empty files."""

from __future__ import annotations

import json
from pathlib import Path

VQA_QUESTIONS = {
    "info": {"description": "This is v2.0 of the VQA dataset.", "url": "http://visualqa.org", "version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons"},
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 262146, "question": "What color is the snow?", "question_id": 262146000},
    ],
}
VQA_ANSWERS = {
    458752000: ["net"] * 8 + ["mesh", "net "],
    458752001: ["pitcher"] * 6 + ["catcher"] * 4,
    262146000: ["white"] * 9 + [""],
}
VQA_ANNOTATIONS = {
    "info": VQA_QUESTIONS["info"],
    "data_type": "mscoco",
    "data_subtype": "train2014",
    "license": VQA_QUESTIONS["license"],
    "annotations": [
        {
            "question_type": "what",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "maybe", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": number_of_question // 1000,
            "answer_type": "other",
            "question_id": number_of_question,
        }
        for number_of_question, answers in VQA_ANSWERS.items()
    ],
}
NLVR2_DEV = [
    {
        "validation": {"61": "False"},
        "sentence": "The right image shows a curving walkway.",
        "left_url": "https://example.org/a.jpg",
        "writer": "61",
        "label": "False",
        "right_url": "https://example.org/b.jpg",
        "synset": "beer bottle",
        "query": "some beer bottles38",
        "identifier": "dev-850-0-0",
        "extra_validations": {"154": "False", "139": "False"},
    },
    {"sentence": "There are six bottles.", "label": "True", "identifier": "dev-896-0-1"},
]
SNLI_VE = [
    {
        "annotator_labels": ["neutral", "neutral", "entailment"],
        "captionID": "2407214681.jpg#0",
        "gold_label": label,
        "pairID": f"2407214681.jpg#0r{number}n",
        "sentence1": "A young family enjoys feeling ocean waves lap at their feet.",
        "sentence2": f"Hypothesis {number}.",
        "Flickr30K_ID": "2407214681",
    }
    for number, label in enumerate(["neutral", "-", "entailment", "contradiction"])
]
KARPATHY_COCO = {
    "images": [
        {
            "filepath": "val2014" if split != "train" else "train2014",
            "sentids": [10 * number, 10 * number + 1],
            "filename": f"COCO_{'val2014' if split != 'train' else 'train2014'}_{number:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": [
                {"tokens": ["a", "man"], "raw": f"A man, number {number}. ", "imgid": number, "sentid": 10 * number},
                {"tokens": ["a"], "raw": f"Another caption of {number}", "imgid": number, "sentid": 10 * number + 1},
            ],
            "cocoid": 1000 + number,
        }
        for number, split in enumerate(["test", "train", "restval", "val"])
    ],
    "dataset": "coco",
}
KARPATHY_FLICKR = {
    "images": [
        {
            "sentids": [0],
            "imgid": 7,
            "sentences": [{"tokens": ["two"], "raw": "Two young guys.", "imgid": 7, "sentid": 0}],
            "split": "train",
            "filename": "1000092795.jpg",
        }
    ],
    "dataset": "flickr30k",
}


def touched(*paths: Path) -> None:
    """Empty files, and the folders they lie in."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def as_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def as_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
