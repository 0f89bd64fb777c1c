from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modstruct.data.downstream.vqa import VqaQuestion
from modstruct.tasks.metrics import (
    answer_accuracy,
    best_answers,
    normalized,
    prior_predictions,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  two\n", "2"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("The dog", "dog"),
        ("a an the", ""),
        ("an apple on a table", "apple on table"),
        # Punctuation beside a space goes, inside a word it becomes a space.
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("what?", "what"),
        ("black/white", "black white"),
        ("(left)", "left"),
        # A comma between digits makes all punctuation go without a space.
        ("1,000", "1000"),
        ("1,000/2", "10002"),
        ("1, 000", "1 000"),
        # A period stays before a digit only.
        ("2.5", "2.5"),
        ("5.", "5"),
        ("st. louis", "st louis"),
        ("p.m.", "pm"),
        (".5", ".5"),
        # A colon and an apostrophe are no punctuation here.
        ("5:30", "5:30"),
        ("man's", "man's"),
        # One missing apostrophe is put back.
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # lower case comes before the list, which has "Im"
        ("hell", "hell"),  # he'll is not in the list
    ],
)
def test_the_official_normalisation(answer: str, expected: str):
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_an_answer_is_right_by_how_many_annotators_gave_it(agreeing: int, expected: float):
    annotators = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
    assert answer_accuracy("cat", annotators) == pytest.approx(expected)


def test_both_sides_are_normalised_only_if_annotators_differ():
    assert answer_accuracy("Two", ["2"] * 9 + ["two"]) == 1
    assert answer_accuracy("a t-shirt.", ["t shirt"] * 5 + ["shirt"] * 5) == 1
    assert answer_accuracy("two", ["2"] * 10) == 0
    assert answer_accuracy("the cat", ["cat"] * 10) == 0
    assert answer_accuracy(" cat\n", ["cat"] * 10) == 1


def mean_over_left_out(answer: str, annotators: list[str]) -> float:
    """The definition, word for word."""
    accuracies = []
    for left_out in range(len(annotators)):
        others = [given for number, given in enumerate(annotators) if number != left_out]
        accuracies.append(min(others.count(answer) / 3, 1))
    return sum(accuracies) / len(accuracies)


@given(st.lists(st.sampled_from(["cat", "dog", "cow"]), min_size=1, max_size=12), st.sampled_from(["cat", "pig"]))
def test_the_accuracy_is_the_mean_over_the_annotators_each_left_out_once(annotators: list[str], answer: str):
    assert answer_accuracy(answer, annotators) == pytest.approx(mean_over_left_out(answer, annotators))


@given(st.text(max_size=30))
def test_normalising_gives_single_spaced_words_without_articles(answer: str):
    words = normalized(answer).split(" ")
    assert words == [""] or all(words)
    assert not {"a", "an", "the"} & set(words)


def question(number: int, kind: str, answers: list[str], answer_type: str = "other") -> VqaQuestion:
    return VqaQuestion(number, Path(f"{number}.jpg"), f"{kind} so?", kind, answer_type, tuple(answers))


QUESTIONS = (
    question(1, "what colour", ["red"] * 10),
    question(2, "what colour", ["blue"] * 8 + ["red"] * 2),
    question(3, "how many", ["2"] * 9 + ["two"], "number"),
    question(4, "is it", ["yes"] * 7 + ["no"] * 3, "yes/no"),
)


def test_means_are_taken_over_all_and_by_type():
    metrics = vqa_accuracy({1: "red", 2: "red", 3: "two", 4: "no"}, QUESTIONS)
    assert metrics["overall"] == pytest.approx((1 + 0.6 + 1 + 0.9) / 4)
    assert metrics["question_type"] == pytest.approx({"how many": 1, "is it": 0.9, "what colour": 0.8})
    assert metrics["answer_type"] == pytest.approx({"number": 1, "other": 0.8, "yes/no": 0.9})


def test_questions_without_a_type_count_in_none():
    untyped = [VqaQuestion(1, Path("1.jpg"), "So?", answers=("yes",) * 10)]
    assert vqa_accuracy({1: "yes"}, untyped) == {"overall": 1.0, "answer_type": {}, "question_type": {}}


def test_predictions_and_questions_must_match():
    answers = {1: "red", 2: "red", 3: "two", 4: "no"}
    with pytest.raises(ValueError, match="no prediction for 1 question ids, the first 4"):
        vqa_accuracy({number: answers[number] for number in (1, 2, 3)}, QUESTIONS)
    with pytest.raises(ValueError, match="no question for 1 question ids, the first 5"):
        vqa_accuracy(answers | {5: "x"}, QUESTIONS)
    with pytest.raises(ValueError, match="none to measure"):
        vqa_accuracy({}, [])
    with pytest.raises(ValueError, match="question 9 has no annotators"):
        vqa_accuracy({9: "x"}, [VqaQuestion(9, Path("9.jpg"), "So?")])


def test_the_best_answer_of_each_type_is_the_one_with_the_highest_accuracy():
    best = best_answers(QUESTIONS)
    assert best["what colour"] == "red"  # 1 + 0.6 against 0 + 1
    assert best["is it"] == "yes"
    assert best["how many"] == "2"
    assert best[None] == "red"
    others = [question(7, "is it", ["no"] * 10, "yes/no"), question(8, "where is", ["here"] * 10)]
    assert prior_predictions(best, others) == {7: "yes", 8: "red"}
    with pytest.raises(ValueError, match="give the annotations"):
        best_answers([VqaQuestion(9, Path("9.jpg"), "So?")])


def test_no_constant_answer_beats_the_best_one():
    best = best_answers(QUESTIONS)
    prior = vqa_accuracy(prior_predictions(best, QUESTIONS), QUESTIONS)
    for answer in ("red", "blue", "2", "two", "yes", "no"):
        constant = vqa_accuracy({item.question_id: answer for item in QUESTIONS}, QUESTIONS)
        assert all(constant["question_type"][kind] <= prior["question_type"][kind] for kind in prior["question_type"])
