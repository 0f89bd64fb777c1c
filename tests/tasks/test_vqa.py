"""The VQA task: batches of questions with any number of answers, metrics, prior, and the server's file."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_answers import answer_model, answer_recipe, answer_tokenizer

from modstruct.config import FinetuneRecipe, TaskDataConfig, TaskEvaluationConfig, TaskFiles
from modstruct.data.downstream.batches import TaskBatches
from modstruct.data.downstream.vqa import VqaQuestion
from modstruct.data.synthetic.task_files import SceneTaskSizes, vqa_files, write_scene_tasks
from modstruct.tasks import build_task
from modstruct.tasks.vqa import Vqa


def question(number: int, image: Path, text: str, answers: list[str], kind: str = "other") -> VqaQuestion:
    first = " ".join(text.split()[:2])
    return (
        VqaQuestion(number, image, text, first, kind, tuple(answers)) if answers else VqaQuestion(number, image, text)
    )


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 16), (200, 10, 10)).save(path)
    return path


@pytest.fixture
def questions(picture) -> list[VqaQuestion]:
    return [
        question(11, picture, "what colour is the star?", ["dark blue"] * 6 + ["blue"] * 4),
        question(12, picture, "is there a star?", ["yes"] * 10, "yes/no"),
        question(13, picture, "is there a red star?", ["no"] * 7 + ["yes"] * 3, "yes/no"),
        question(14, picture, "what colour is there?", [""] * 10),
        question(15, picture, "is there a blue star?", ["no"] * 10, "yes/no"),
    ]


def task_of(questions: list[VqaQuestion], recipe: FinetuneRecipe | None = None, **task) -> Vqa:
    made = Vqa(recipe or small(answer_recipe(**task)), answer_tokenizer())
    made.learn_answers(questions)
    return made


def small(recipe: FinetuneRecipe, **data) -> FinetuneRecipe:
    data = TaskDataConfig(workers=0, max_bad_share=1.0, **data)
    return replace(recipe, data=data, evaluation=TaskEvaluationConfig(batch=2))


def test_registered_and_pickled(questions):
    task = build_task(small(answer_recipe()), answer_tokenizer())
    task.learn_answers(questions)
    other = pickle.loads(pickle.dumps(task))
    assert (other.answer_list, other.prior) == (task.answer_list, task.prior)
    assert other.answer_tokenizer.context_length == 6


def test_a_batch_holds_every_different_answer_with_its_share(questions):
    task = task_of(questions)
    loaded = TaskBatches(task, questions, task.recipe.data, global_batch=5, seed=0, rank=0, world_size=1)
    batch = loaded[0].tensors
    texts = [task.tokenizer.decode(row) for row in batch["text"].tolist()]
    answers = zip(batch["answer_of"].tolist(), batch["answer"].tolist(), batch["answer_weight"].tolist(), strict=True)
    found = {(texts[of], task.answer_tokenizer.decode(row)): round(weight, 6) for of, row, weight in answers}
    assert found == {
        ("what colour is [UNK] star ?", "dark blue"): 0.6,
        ("what colour is [UNK] star ?", "blue"): 0.4,
        ("is there a star ?", "yes"): 1.0,
        ("is there a red star ?", "no"): 0.7,
        ("is there a red star ?", "yes"): 0.3,
        ("is there a blue star ?", "no"): 1.0,
    }
    assert len(batch["answer"]) == 6
    assert batch["image"].shape == (5, 3, 16, 16)
    # As wide as the longest: [CLS] what colour is [UNK] star ? [SEP], and [CLS] dark blue [SEP].
    assert (batch["text"].shape[1], batch["answer"].shape[1]) == (8, 4)


def test_a_batch_without_any_answer_has_one_that_weighs_nothing(questions):
    task = task_of(questions)
    unanswered = [questions[3]] * 2
    batch = TaskBatches(task, unanswered, task.recipe.data, global_batch=2, seed=0, rank=0, world_size=1)[0].tensors
    assert batch["answer"].tolist() == [[2, 3]]
    assert (batch["answer_of"].tolist(), batch["answer_weight"].tolist()) == ([0], [0.0])


def test_the_answer_list_is_the_training_sets_or_a_file(questions, tmp_path):
    assert task_of(questions).answer_list == ["no", "yes", "dark blue", "blue"]
    listed = tmp_path / "answer_list.json"
    listed.write_text('["red", "two"]')
    recipe = small(answer_recipe(), answers=str(listed))
    assert task_of(questions, recipe).answer_list == ["red", "two"]


@pytest.mark.parametrize("answering", ["rank", "generate"])
def test_metrics_and_predictions(questions, answering, monkeypatch):
    task = task_of(questions, answering=answering)
    model = answer_model(task.recipe)
    said = ["blue", "yes", "yes", "red", "no"]
    monkeypatch.setattr(Vqa, "predict", lambda *_: list(said))
    result, predictions = task.measure(model, questions)
    assert predictions == [{"question_id": 11 + n, "answer": answer} for n, answer in enumerate(said)]
    assert result.rows == {"questions": 5, "listed_answers": 4}
    # Officially: 4 of 10 -> 1; 10 of 10 -> 1; 3 of 10 -> 0.9 (7 leave-one-outs at 1, 3 at 2/3); 0; 1.
    assert result.values["accuracy"].value == pytest.approx((1 + 1 + 0.9 + 0 + 1) / 5)
    assert result.values["accuracy yes/no"].value == pytest.approx((1 + 0.9 + 1) / 3)
    assert result.values["accuracy other"].value == pytest.approx(1 / 2)
    # The prior says "dark blue" ("blue" is as right, and later), or "" which is right of one of two, to what colour.
    assert task.prior == {"what colour": "", "is there": "no", None: "no"}
    assert result.values["accuracy"].chance == pytest.approx((0 + 0 + 1 + 1 + 1) / 5)
    assert result.values["accuracy yes/no"].chance == pytest.approx(2 / 3)
    assert task.score(result) == result.values["accuracy"].value


@pytest.mark.parametrize("answering", ["rank", "generate"])
def test_predictions_are_the_models(questions, answering):
    task = task_of(questions, answering=answering)
    model = answer_model(task.recipe)
    result, predictions = task.measure(model, questions)
    batch = task.collate([task.sample(q, lambda path: Image.open(path), None) for q in questions])
    if answering == "rank":
        numbers, _ = model.rank(batch, task.answer_tokenizer(task.answer_list), 128)
        expected = [task.answer_list[n] for n in numbers[:, 0].tolist()]
    else:
        expected = [task.answer_tokenizer.decode(row) for row in model.generate(batch).tolist()]
    assert [p["answer"] for p in predictions] == expected
    assert 0 <= result.values["accuracy"].value <= 1


def test_a_split_without_annotations_has_predictions_only(questions):
    task = task_of(questions)
    bare = [question(q.question_id, q.image, q.question, []) for q in questions]
    result, predictions = task.measure(answer_model(task.recipe), bare)
    assert result is None
    assert [p["question_id"] for p in predictions] == [11, 12, 13, 14, 15]
    assert all(p["answer"] in task.answer_list for p in predictions)


def test_an_image_that_cannot_be_read_gets_the_priors_answer(questions, tmp_path):
    task = task_of(questions)
    broken = replace(questions[1], image=tmp_path / "none.png")
    result, predictions = task.measure(answer_model(task.recipe), [questions[0], broken, *questions[2:]])
    assert predictions[1] == {"question_id": 12, "answer": "no"}
    assert result.rows["questions"] == 4


def test_training_and_validation_need_annotations(tmp_path):
    task = Vqa(small(answer_recipe()), answer_tokenizer())
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=rf"data\.{split}\.annotations = None: .*give the published file"):
            task.read(TaskFiles(images="pictures", questions="questions.json"), f"data.{split}", split)


def test_published_files_are_read(tmp_path):
    sizes = SceneTaskSizes(4, 2, 8, 8, 24, 24, 2, 2)
    write_scene_tasks(tmp_path, 0, sizes, 32)
    files = {split: vqa_files(tmp_path, split) for split in ("train", "test")}
    data = {s: TaskFiles(str(tmp_path / "vqa" / "images"), *map(str, paths)) for s, paths in files.items()}
    data["test"].annotations = None
    task = Vqa(small(answer_recipe(), source="files", **data), answer_tokenizer())
    train, test = (task.entries(split, None) for split in ("train", "test"))
    assert (len(train.entries), len(test.entries)) == (4, 2)
    assert task.entries("validation", None) is None
    assert task.answer_list
    assert task.prior.keys() >= {None, train.entries[0].question_type}
    result, predictions = task.measure(answer_model(task.recipe), test.entries)
    assert result is None
    assert [p["question_id"] for p in predictions] == [q.question_id for q in test.entries]


def test_listed_answers_with_the_same_tokens_tie_for_the_first(questions):
    task = task_of(questions)
    task.answer_list = ["a dark light blue star", "a dark light blue", "a dark light blue two"]  # cut to four tokens
    said = {p["answer"] for p in task.measure(answer_model(task.recipe), questions)[1]}
    assert said == {"a dark light blue star"}
    assert torch.equal(*task.answer_tokenizer(task.answer_list)[:2])
