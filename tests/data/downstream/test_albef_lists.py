"""ALBEF's own annotation files, and COCO's, which are others than the published ones that a task asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_samples import as_json, touched
from tiny_models import word_tokenizer

from modstruct.config import FinetuneRecipe, TaskConfig, TaskDataConfig, TaskFiles
from modstruct.data.downstream.karpathy import read_karpathy
from modstruct.data.downstream.nlvr2 import read_nlvr2
from modstruct.data.downstream.snli_ve import read_snli_ve
from modstruct.data.downstream.vqa import read_vqa
from modstruct.tasks.metrics import nlvr2_metrics
from modstruct.tasks.vqa import Vqa

QUESTIONS = [
    {"question_id": 7, "question": "What?", "answer": ["net"] * 9 + [""], "image": "val2014/a.jpg", "dataset": "vqa"},
    {"question_id": 8, "question": "Who?", "answer": ["he"] * 10, "image": "val2014/b.jpg", "dataset": "vqa"},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pairs = [f"images/train/69/train-{n}-0-img{side}.png" for n in (1, 2) for side in (0, 1)]
    names = ["val2014/a.jpg", "val2014/b.jpg", "11.jpg", "12.jpg", *pairs]
    touched(*(tmp_path / "all" / name for name in names))
    return tmp_path / "all"


def test_captions_of_training_are_put_together_by_image(tmp_path, images):
    entries = [("a", "one"), ("b", "two"), ("a", "three")]
    listed = [{"image": f"val2014/{name}.jpg", "caption": text, "image_id": f"coco_{name}"} for name, text in entries]
    found = read_karpathy(as_json(tmp_path / "coco_train.json", listed), images, "train").entries
    assert [(e.image, e.captions, e.image_id) for e in found] == [
        (images / "val2014" / "a.jpg", ("one", "three"), 0),
        (images / "val2014" / "b.jpg", ("two",), 1),
    ]


def test_captions_of_evaluation_are_a_list_and_missing_images_are_counted(tmp_path, images):
    listed = [{"image": f"val2014/{name}.jpg", "caption": [name, "x"]} for name in "abc"]
    file = as_json(tmp_path / "coco_test.json", listed)
    with pytest.raises(ValueError, match=r"1 of 3 images are not there, the first val2014/c\.jpg"):
        read_karpathy(file, images, "test")
    found = read_karpathy(file, images, "test", leave_out_missing=True)
    assert [entry.captions for entry in found.entries] == [("a", "x"), ("b", "x")]
    assert found.left_out == {"image missing": 1}
    # The folder of one split does, too.
    assert len(read_karpathy(file, images / "val2014", "test", leave_out_missing=True).entries) == 2


def test_coco_s_own_captions_are_named_for_what_they_are(tmp_path, images):
    coco = {"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    message = r"data\.train\.captions = .*captions_val2014\.json.*COCO's own captions.*give dataset_coco\.json"
    with pytest.raises(ValueError, match=message):
        read_karpathy(as_json(tmp_path / "captions_val2014.json", coco), images, "train")


def test_questions_bring_their_answers(tmp_path, images):
    file = as_json(tmp_path / "vqa_val.json", QUESTIONS)
    found = read_vqa(file, images).entries
    assert [(e.question_id, e.image.name, e.question) for e in found] == [(7, "a.jpg", "What?"), (8, "b.jpg", "Who?")]
    assert found[0].answers == (*["net"] * 9, "")
    test = [{key: value for key, value in QUESTIONS[0].items() if key != "answer"}]
    assert read_vqa(as_json(tmp_path / "vqa_test.json", test), images).entries[0].answers == ()
    with pytest.raises(ValueError, match=r"annotations = 'x\.json': null: ALBEF's list holds the answers"):
        read_vqa(file, images, "x.json")
    visual_genome = [QUESTIONS[0] | {"dataset": "vg", "answer": "net"}]
    with pytest.raises(ValueError, match=r"entry 0: dataset = 'vg': vqa \(vg, Visual Genome's"):
        read_vqa(as_json(tmp_path / "vg_qa.json", visual_genome), images)


def test_the_task_needs_no_annotations_beside_a_list_but_its_answers(tmp_path, images):
    task = Vqa(FinetuneRecipe(task=TaskConfig(name="vqa"), data=TaskDataConfig(source="files")), word_tokenizer())
    files = TaskFiles(images=str(images), questions=str(as_json(tmp_path / "vqa_train.json", QUESTIONS)))
    assert len(task.read(files, "data.train", "train").entries) == 2
    without = [{k: v for k, v in q.items() if k != "answer"} for q in QUESTIONS]
    for unanswered in (without, [q | {"answer": ["", ""]} for q in QUESTIONS]):
        as_json(tmp_path / "vqa_train.json", unanswered)
        with pytest.raises(ValueError, match=r"data\.train\.questions = .*vqa_train\.json.*no answers, or empty ones"):
            task.read(files, "data.train", "train")


def test_statements_of_one_sentence_are_counted_together(tmp_path, images):
    pair = [f"images/train/69/train-{{}}-0-img{side}.png" for side in (0, 1)]
    entries = [(1, "six", "True"), (1, "seven", "False"), (2, "six", "True")]
    listed = [{"images": [p.format(n) for p in pair], "sentence": text, "label": label} for n, text, label in entries]
    listed[2]["images"] = [path.replace("-2-", "-1-").replace("1-0-img", "1-1-img") for path in listed[2]["images"]]
    touched(*(images / path for path in listed[2]["images"]))
    file = as_json(tmp_path / "nlvr_train.json", listed)
    for root in (images, images / "images" / "train"):
        found = read_nlvr2(file, root).entries
    assert found[0].images == tuple(images / path for path in listed[0]["images"])
    assert [e.identifier for e in found] == ["train-1-0-0", "train-1-0-1", "train-1-1-0"]
    assert [e.label for e in found] == [True, False, True]
    right = {"train-1-0-0": True, "train-1-0-1": False, "train-1-1-0": False}
    assert nlvr2_metrics(right, found) == {"accuracy": 2 / 3, "consistency": 1 / 2}


@pytest.mark.parametrize("written", ["11", "11.jpg", 11])
def test_hypotheses(tmp_path, images, written):
    listed = [{"image": written, "sentence": "A man.", "label": "entailment"}, {"image": "12", "sentence": "A dog."}]
    found = read_snli_ve(as_json(tmp_path / "ve_dev.json", listed), images).entries
    assert [(e.image.name, e.hypothesis, e.label) for e in found] == [
        ("11.jpg", "A man.", 2),
        ("12.jpg", "A dog.", None),
    ]


@pytest.mark.parametrize(
    "path", ["../a.jpg", "/etc/passwd", "val2014//a.jpg", "val2014/.a.jpg", "", 7, None, ["a.jpg"]]
)
def test_a_path_leads_nowhere_but_into_the_folder(tmp_path, images, path):
    file = as_json(tmp_path / "list.json", [{"image": path, "caption": "x"}])
    with pytest.raises(ValueError, match=r"list\.json, entry 0: image = .*a path of plain file names"):
        read_karpathy(file, images, "train")
