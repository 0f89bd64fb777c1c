"""The metrics of the downstream tasks, as their official programs compute them: SNLI-VE, NLVR2, VQA v2.

VQA: an answer counts by how many annotators gave it: right if at least three others of the ten did (Antol et al.
2015). Which answers are equal is decided by a normalisation that reproduces GT-Vision-Lab/VQA's vqaEval.py, its
oddities included, since published results contain them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from modstruct.data.downstream.nlvr2 import Nlvr2Statement
from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS, EntailmentPair
from modstruct.data.downstream.vqa import VqaQuestion

ENOUGH_ANNOTATORS = 3

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# Official: a period goes unless a digit follows. (Its look-behind for a digit before is misspelt and never matches.)
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = int(re.UNICODE)  # official: the flag stands where re.sub takes the number of replacements, 32
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A contraction is mended if one of its apostrophes is missing; he'll, she'd, we'd, we'll are none here, as
# officially.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, sign in enumerate(word)
    if sign == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # official: this one the wrong way round


def entailment_metrics(predictions: Sequence[int], pairs: Sequence[EntailmentPair]) -> dict[str, float]:
    """Accuracy on SNLI-VE, from 0 to 1, over all pairs and for each label (Xie et al. 2019).

    predictions: a label number for each pair, in their order (pair ids of SNLI-VE are not unique). Returns
    {"accuracy": …, "contradiction": …, "neutral": …, "entailment": …}, the last three over the pairs of that label,
    without a label that no pair has. Raises ValueError if the numbers differ, for a pair without label, and for none.
    """
    if not pairs or len(predictions) != len(pairs):
        raise ValueError(
            f"predictions: {len(predictions):,} for {len(pairs):,} pairs; give one for each of at least one"
        )
    hits: dict[str, list[bool]] = {name: [] for name in ENTAILMENT_LABELS}
    for prediction, pair in zip(predictions, pairs, strict=True):
        if pair.label is None:
            raise ValueError(f"pair {pair.pair_id} has no label and cannot be measured")
        hits[ENTAILMENT_LABELS[pair.label]].append(int(prediction) == pair.label)
    metrics = {"accuracy": sum(map(sum, hits.values())) / len(pairs)}
    return metrics | {name: sum(found) / len(found) for name, found in hits.items() if found}


def sentence_of(identifier: str) -> str:
    """What the statements of one sentence share: `dev-850-3-1` about pair 3 -> `dev-850--1`."""
    split, group, _, sentence = identifier.rsplit("-", 3)
    return f"{split}-{group}--{sentence}"


def nlvr2_metrics(predictions: Mapping[str, bool], statements: Sequence[Nlvr2Statement]) -> dict[str, float]:
    """NLVR2's accuracy over statements, and consistency: sentences right for all their pairs (Suhr et al. 2019).

    From 0 to 1, as lil-lab/nlvr's metrics.py computes them.

    predictions: by identifier. Returns {"accuracy": …, "consistency": …}. Raises ValueError for a statement without
    prediction or label, and for no statement at all.
    """
    if not statements:
        raise ValueError("statements: there are none to measure")
    right = 0
    consistent: dict[str, bool] = {}
    for statement in statements:
        if statement.identifier not in predictions:
            raise ValueError(f"predictions: there is none for the statement {statement.identifier}")
        if statement.label is None:
            raise ValueError(
                f"statement {statement.identifier} has no label: the hidden test set cannot be measured here"
            )
        hit = bool(predictions[statement.identifier]) == statement.label
        right += hit
        sentence = sentence_of(statement.identifier)
        consistent[sentence] = consistent.get(sentence, True) and hit
    return {"accuracy": right / len(statements), "consistency": sum(consistent.values()) / len(consistent)}


@lru_cache(maxsize=100_000)
def normalized(answer: str) -> str:
    """An answer as the official evaluation compares it.

    Punctuation goes where it touches a space, or where the answer has a comma between digits ("1,000"); elsewhere it
    becomes a space. Periods go except before a digit. Then lower case, number words as digits, no articles, and the
    apostrophes of contractions put back.
    """
    text = kept = _one_line(answer)
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if beside_space or DIGIT_COMMA_DIGIT.search(text) else " ")
    kept = PERIOD.sub("", kept, count=MOST_PERIODS)
    words = [NUMBER_WORDS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Accuracy of one answer, from 0 to 1: the mean over the annotators, each left out once, of min(n / 3, 1), where
    n of the others gave that answer.

    annotators: the answer of each, as written. Officially both sides are normalised only if the annotators' answers
    are not all the same; otherwise the answer must be theirs to the letter.
    """
    annotators = [_one_line(given) for given in annotators]
    answer = _one_line(answer)
    if len(set(annotators)) > 1:
        annotators = [normalized(given) for given in annotators]
        answer = normalized(answer)
    agreeing = annotators.count(answer)
    if_out, if_in = min((agreeing - 1) / ENOUGH_ANNOTATORS, 1), min(agreeing / ENOUGH_ANNOTATORS, 1)
    return (agreeing * if_out + (len(annotators) - agreeing) * if_in) / len(annotators)


def vqa_accuracy(predictions: Mapping[int, str], questions: Sequence[VqaQuestion]) -> dict:
    """Official accuracy of answers by question id, from 0 to 1.

    Returns {"overall": …, "answer_type": {"yes/no": …, …}, "question_type": {"how many": …, …}}, each the mean over
    its questions, of which those without a type (ALBEF's) count in none. Raises ValueError for a question without
    prediction or without annotators, for a prediction without question, and for no question at all.
    """
    _require_matching(predictions, questions)
    accuracies: list[float] = []
    types: dict[str, dict[str, list[float]]] = {"answer_type": defaultdict(list), "question_type": defaultdict(list)}
    for question in questions:
        accuracy = answer_accuracy(predictions[question.question_id], question.answers)
        accuracies.append(accuracy)
        for name, by_type in types.items():
            if (kind := getattr(question, name)) is not None:
                by_type[kind].append(accuracy)
    means = {name: {kind: _mean(by_type[kind]) for kind in sorted(by_type)} for name, by_type in types.items()}
    return {"overall": _mean(accuracies)} | means


def best_answers(questions: Iterable[VqaQuestion]) -> dict[str | None, str]:
    """The answer to each question type that gets the highest accuracy over its questions; under None, over all.

    What can be had without the images: to be found on the training set and measured on another by
    `vqa_accuracy(prior_predictions(best, others), others)`. A tie goes to the first text. Raises ValueError if no
    question has annotators.
    """
    gains: dict[str | None, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for question in questions:
        for answer in set(question.answers):
            gain = answer_accuracy(answer, question.answers)
            for kind in (question.question_type, None):
                gains[kind][answer] += gain
    if not gains:
        raise ValueError("questions: none has annotators; give the annotations of the training set")
    return {kind: min(answers, key=lambda answer: (-answers[answer], answer)) for kind, answers in gains.items()}


def prior_predictions(best: Mapping[str | None, str], questions: Iterable[VqaQuestion]) -> dict[int, str]:
    """The best answer of each question's type; of all types for a type that `best` does not know."""
    return {question.question_id: best.get(question.question_type, best[None]) for question in questions}


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _require_matching(predictions: Mapping[int, str], questions: Sequence[VqaQuestion]) -> None:
    if not questions:
        raise ValueError("questions: there are none to measure")
    asked = {question.question_id for question in questions}
    for numbers, what in ((asked - predictions.keys(), "no prediction"), (predictions.keys() - asked, "no question")):
        if numbers:
            raise ValueError(f"predictions: {what} for {len(numbers):,} question ids, the first {min(numbers)}")
    bare = next((question for question in questions if not question.answers), None)
    if bare is not None:
        raise ValueError(f"question {bare.question_id} has no annotators: the accuracy needs the annotations file")
