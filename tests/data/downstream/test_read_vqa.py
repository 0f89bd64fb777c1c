from __future__ import annotations

import copy
from pathlib import Path

import pytest
from published_samples import VQA_ANNOTATIONS, VQA_ANSWERS, VQA_QUESTIONS, as_json, touched

from modstruct.data.downstream.vqa import VqaQuestion, answer_weights, build_answer_list, read_answer_list, read_vqa


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    touched(*(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg" for number in (458752, 262146)))
    return {
        "questions": as_json(tmp_path / "questions.json", VQA_QUESTIONS),
        "images": tmp_path,
        "annotations": as_json(tmp_path / "annotations.json", VQA_ANNOTATIONS),
    }


def test_the_published_files_give_questions_with_images_and_ten_answers(files):
    found = read_vqa(**files)
    assert [question.question_id for question in found.entries] == list(VQA_ANSWERS)
    first = found.entries[0]
    assert first.image == files["images"] / "train2014" / "COCO_train2014_000000458752.jpg"
    assert first.question == "What is this photo taken looking through?"
    assert (first.question_type, first.answer_type) == ("what", "other")
    assert first.answers == ("net",) * 8 + ("mesh", "net")
    assert found.left_out == {}


def test_a_test_split_has_questions_only_and_test_dev_has_the_images_of_the_test_split(files):
    content = VQA_QUESTIONS | {"data_subtype": "test-dev2015", "questions": VQA_QUESTIONS["questions"][:1]}
    touched(files["images"] / "test2015" / "COCO_test2015_000000458752.jpg")
    found = read_vqa(as_json(files["questions"], content), files["images"])
    assert found.entries == (
        VqaQuestion(
            458752000,
            files["images"] / "test2015" / "COCO_test2015_000000458752.jpg",
            "What is this photo taken looking through?",
        ),
    )


def test_the_folder_of_the_split_itself_may_be_given(files):
    found = read_vqa(files["questions"], files["images"] / "train2014")
    assert found.entries[0].image.is_file()


def test_missing_images_are_counted_named_and_may_be_left_out(files, caplog):
    (files["images"] / "train2014" / "COCO_train2014_000000458752.jpg").unlink()
    with pytest.raises(ValueError, match=r"data\.train\.images = .*1 of 2 images are not there.*000000458752\.jpg"):
        read_vqa(**files)
    found = read_vqa(**files, leave_out_missing=True)
    assert [question.question_id for question in found.entries] == [262146000]
    assert found.left_out == {"image missing": 2}
    assert (
        "1 of 2 images are not there, the first train2014/COCO_train2014_000000458752.jpg; the entries" in caplog.text
    )


def test_a_folder_without_any_of_the_images_is_the_wrong_folder(files):
    files["images"] = files["images"] / "empty"
    files["images"].mkdir()
    with pytest.raises(ValueError, match=r"2 of 2 images.*cocodataset\.org"):
        read_vqa(**files, leave_out_missing=True)


@pytest.mark.parametrize(("name", "where"), [("questions", "visualqa.org"), ("annotations", "visualqa.org")])
def test_a_missing_file_is_refused_by_its_option_with_where_to_get_it(files, name: str, where: str):
    files[name] = files[name].with_name("nowhere.json")
    with pytest.raises(
        ValueError, match=rf"task\.validation\.{name} = '.*nowhere\.json': there is no such file.*{where}"
    ):
        read_vqa(**files, option="task.validation")


def test_a_missing_image_folder_is_refused_by_its_option(files):
    with pytest.raises(ValueError, match=r"data\.train\.images = '.*none': there is no such folder.*train2014"):
        read_vqa(files["questions"], files["images"] / "none")


def spoilt(content: dict, change) -> dict:
    content = copy.deepcopy(content)
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("questions"), r"there is no key 'questions'"),
        (lambda c: c.update(questions={}), r"questions = a JSON object: a list"),
        (lambda c: c["questions"].append(3), r"questions\[3\]: a JSON object belongs there"),
        (lambda c: c["questions"][1].pop("image_id"), r"questions\[1\]: there is no key 'image_id'"),
        (
            lambda c: c["questions"][1].update(image_id="../../x"),
            r"questions\[1\]: image_id = '\.\./\.\./x': a whole number",
        ),
        (lambda c: c["questions"][1].update(image_id=True), r"image_id = True"),
        (lambda c: c["questions"][1].update(image_id=-1), r"image_id = -1"),
        (lambda c: c["questions"][1].update(image_id=2**80), r"image_id = 1208925819614629174706176"),
        (lambda c: c["questions"][2].update(question=" "), r"questions\[2\]: question = ' '.*not empty"),
        (
            lambda c: c["questions"][2].update(question="x" * 20_000),
            r"question = 'x{60}'… \(20,000 characters\): .*at most 10,000",
        ),
        (lambda c: c["questions"][2].update(question="\ud800"), r"question = '\\ud800': a text in UTF-8"),
        (lambda c: c["questions"][2].update(question_id=458752000), r"an id that no other question has"),
        (lambda c: c["questions"][2].update(question_id=5), r"question_id = 5: an id that .*annotations\.json answers"),
        (lambda c: c["questions"][2].update(image_id=458752), r"answers for this image_id"),
        (lambda c: c.update(data_subtype="../2014"), r"data_subtype = '\.\./2014': train2014"),
    ],
)
def test_a_malformed_question_is_named_by_file_number_and_key(files, change, message: str):
    as_json(files["questions"], spoilt(VQA_QUESTIONS, change))
    with pytest.raises(ValueError, match=rf"questions\.json.*{message}"):
        read_vqa(**files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(answers=[]), r"annotations\[0\]: answers = a list of 0: at least one"),
        (lambda c: c["annotations"][0]["answers"][3].pop("answer"), r"annotations\[0\], answers\[3\]: there is no key"),
        (lambda c: c["annotations"][1].update(answer_type=None), r"annotations\[1\]: answer_type = None"),
        (lambda c: c["annotations"].append(c["annotations"][0]), r"annotations\[3\]: .*no other annotation"),
        (lambda c: c["annotations"].pop(), r"questions\.json, questions\[2\].*annotations\.json answers"),
    ],
)
def test_a_malformed_annotation_is_named_by_file_number_and_key(files, change, message: str):
    as_json(files["annotations"], spoilt(VQA_ANNOTATIONS, change))
    with pytest.raises(ValueError, match=message):
        read_vqa(**files)


def test_answers_weigh_what_share_of_the_annotators_gave_them():
    weights = answer_weights(VQA_ANSWERS[458752001])
    assert weights == {"pitcher": 0.6, "catcher": 0.4}
    assert answer_weights(["b", "a", "b", "a"]) == {"a": 0.5, "b": 0.5}
    assert list(answer_weights(["b", "a", "b", "a"])) == ["a", "b"]
    assert answer_weights(["white", "", "white"]) == {"white": 1.0}
    assert answer_weights([]) == {}


def test_an_answer_list_has_the_most_frequent_answers_and_ties_in_order_of_the_text(files):
    questions = read_vqa(**files).entries
    assert build_answer_list(questions) == ["net", "white", "pitcher", "catcher", "mesh"]
    assert build_answer_list(questions, 2) == ["net", "white"]
    with pytest.raises(ValueError, match=r"length = 0"):
        build_answer_list(questions, 0)
    with pytest.raises(ValueError, match="give the annotations"):
        build_answer_list(read_vqa(files["questions"], files["images"]).entries)


def test_a_published_answer_list_is_read_in_its_order(tmp_path: Path):
    assert read_answer_list(as_json(tmp_path / "answers.json", ["down", "at table", "1"])) == ["down", "at table", "1"]


@pytest.mark.parametrize("content", [{}, [], ["a", "a"], ["a", 1], ["a", ""], "text", None])
def test_anything_but_different_texts_is_no_answer_list(tmp_path: Path, content: object):
    with pytest.raises(ValueError, match=r"answers\.json"):
        read_answer_list(as_json(tmp_path / "answers.json", content))


def test_a_missing_answer_list_is_refused_by_its_option(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.answers = '.*none\.json': .*ALBEF"):
        read_answer_list(tmp_path / "none.json")
