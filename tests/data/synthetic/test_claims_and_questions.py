"""What the built-in tasks say is true of their scenes, balanced, held out and the same every time."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice

import pytest

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import relation
from modstruct.data.synthetic.claims import (
    KINDS,
    Claim,
    PairClaim,
    any_claim,
    false_claim,
    statement_sets,
    task_scenes,
    true_claim,
)
from modstruct.data.synthetic.factors import Draws, Scene
from modstruct.data.synthetic.questions import (
    NUMBERS,
    PLACES,
    Hypothesis,
    captioned_scenes,
    denied_partners,
    scene_hypotheses,
    scene_questions,
)
from modstruct.data.synthetic.splits import scenes, split_of
from modstruct.data.synthetic.task_files import SceneTaskSizes

QUESTIONS, STATEMENTS, HYPOTHESES, CAPTIONED = 2_000, 800, 1_500, 300


@pytest.fixture(scope="module")
def questions():
    return scene_questions(0, "train", QUESTIONS)


@pytest.fixture(scope="module")
def statements():
    return statement_sets(0, "train", STATEMENTS)


@pytest.fixture(scope="module")
def hypotheses():
    return scene_hypotheses(0, "train", HYPOTHESES)


def meant(words: dict, said: str, prefix: str = "", suffix: str = "") -> set:
    """The values that a text may stand for: those of whose words one stands between prefix and suffix."""
    return {value for value, synonyms in words.items() if said in {f"{prefix}{word}{suffix}" for word in synonyms}}


def shape_of(noun: str) -> str | None:
    """The shape that a noun names; None for `shape` and `thing`."""
    return next(iter(meant(vocabulary.SHAPE_WORDS, noun)), None)


def true_answer(scene: Scene, question: str) -> str:
    """The answer found by taking the question's words apart: a second way, which shares nothing with the generator."""
    text = question.removesuffix("?")
    for start in ("what colour is the ", "what is the colour of the ", "where is the "):
        if text.startswith(start):
            noun = text.removeprefix(start)
            if noun in vocabulary.GROUND_WORDS:
                return vocabulary.GROUND_COLOUR_WORDS[scene.ground_colour][0]
            (item,) = [item for item in scene.objects if shape_of(noun) in (None, item.shape)]
            return PLACES[item.place][0] if start.startswith("where") else vocabulary.COLOUR_WORDS[item.colour][0]
    if text.startswith("how many "):
        return NUMBERS[len(scene.objects)][0]
    if text.startswith("what shape is the "):
        adjective = text.removeprefix("what shape is the ").removesuffix("thing").strip()
        colours = meant(vocabulary.COLOUR_WORDS, adjective) or set(vocabulary.COLOUR_WORDS)
        (item,) = [item for item in scene.objects if item.colour in colours]
        return vocabulary.SHAPE_WORDS[item.shape][0]
    if text.startswith("is there a"):
        named = text.removeprefix("is there a").removeprefix("n").strip()
        return "yes" if any(named in names(item.colour, item.shape) for item in scene.objects) else "no"
    for side, phrases in vocabulary.RELATION_WORDS.items():
        for phrase in phrases:
            first, found, second = text.removeprefix("is the ").partition(f" {phrase} the ")
            if found:
                (item,) = [item for item in scene.objects if item.shape == shape_of(first)]
                (other,) = [item for item in scene.objects if item.shape == shape_of(second)]
                return "yes" if relation(item, other) == side else "no"
    raise AssertionError(question)


def names(colour: str, shape: str) -> set[str]:
    """All that an object may be called in a presence question."""
    colours, shapes = vocabulary.COLOUR_WORDS[colour], vocabulary.SHAPE_WORDS[shape]
    nouns = (*shapes, "shape", "thing")
    return {*shapes, *(f"{word} {noun}" for word in colours for noun in nouns)}


def test_every_answer_is_true_of_its_scene(questions):
    for scene, asked in questions:
        for question in asked:
            assert question.answer == true_answer(scene, question.question), question


def test_annotators_mostly_agree_and_sometimes_say_it_otherwise_or_err(questions):
    answers = Counter()
    for _, asked in questions:
        for question in asked:
            assert len(question.answers) == 10
            assert question.answers.count(question.answer) >= 4  # so that the true answer is officially right
            answers.update(answer == question.answer for answer in question.answers)
    assert 0.85 < answers[True] / answers.total() < 0.97


def test_question_types_say_how_the_question_begins(questions):
    shares = Counter()
    for _, asked in questions:
        for question in asked:
            if question.question_type != "what colour is the ground":  # which has several words for the ground
                assert question.question.startswith(question.question_type)
            assert (question.answer_type == "yes/no") == (question.answer in ("yes", "no"))
            assert (question.answer_type == "number") == question.answer.isdigit()
            shares[question.question_type] += 1 / QUESTIONS
    colours = sum(share for kind, share in shares.items() if "colour" in kind)
    assert colours > 0.4  # what is learned first


def test_guessing_from_the_question_gains_little(questions):
    by_type = defaultdict(Counter)
    for _, asked in questions:
        for question in asked:
            by_type[question.question_type][question.answer] += 1
    best = sum(counts.most_common(1)[0][1] for counts in by_type.values()) / QUESTIONS
    assert best < 0.4
    for kind in ("is there a", "is the"):
        assert by_type[kind]["yes"] / by_type[kind].total() == pytest.approx(0.5, abs=0.12)


def test_a_set_of_statements_has_each_combination_of_truths_once(statements):
    for group in statements:
        labels = [(group.label(pair, 0), group.label(pair, 1)) for pair in range(4)]
        assert sorted(labels) == [(False, False), (False, True), (True, False), (True, True)]
        assert all(left is not right for left, right in group.pairs)


def test_the_place_in_a_set_does_not_tell_the_label(statements):
    for pair in range(4):
        assert sum(group.label(pair, 0) for group in statements) / len(statements) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    ("kind", "truths"),
    [
        ("left", (True, True, False, False)),
        ("right", (True, False, True, False)),
        ("either", (True, True, True, False)),
        ("both", (True, False, False, False)),
    ],
)
def test_a_claim_about_two_images_is_asked_of_the_right_ones(kind: str, truths: tuple[bool, ...]):
    stream = list(islice(task_scenes(0, "test", "train"), 50))
    red = Claim(colour="red")
    yes = next(scene for scene in stream if red.holds(scene))
    no = next(scene for scene in stream if not red.holds(scene))
    pairs = ((yes, yes), (yes, no), (no, yes), (no, no))
    assert tuple(PairClaim(kind, red).holds(*pair) for pair in pairs) == truths


def test_comparisons_count_objects_and_samenesses_compare_colours():
    stream = list(islice(task_scenes(0, "test", "train"), 60))
    for left, right in zip(stream[::2], stream[1::2], strict=True):
        more = len(left.objects) - len(right.objects)
        truths = [PairClaim(kind).holds(left, right) for kind in ("more left", "more right", "same number")]
        assert truths == [more > 0, more < 0, more == 0]
        assert PairClaim("same ground").holds(left, right) == (left.ground_colour == right.ground_colour)
        common = {item.colour for item in left.objects} & {item.colour for item in right.objects}
        assert PairClaim("same colour").holds(left, right) == bool(common)


def test_the_sentence_names_the_side_that_it_is_about(statements):
    for group in statements:
        for claim, sentence in zip(group.claims, group.sentences, strict=True):
            if claim.kind in ("left", "right"):
                assert f" {claim.kind} " in sentence
                assert {"left": " right ", "right": " left "}[claim.kind] not in sentence
            first_side = "right" if " fewer " in sentence else "left"
            if claim.kind == "more left":
                assert sentence.startswith(f"the {first_side} ")


def test_a_scene_shows_what_is_entailed_and_denies_what_is_contradicted(hypotheses):
    for scene, said in hypotheses:
        assert sorted(hypothesis.label for hypothesis in said) == ["contradiction", "entailment", "neutral"]
        for hypothesis in said:
            if hypothesis.label == "neutral":
                assert hypothesis.claim is None
            else:
                assert hypothesis.claim.holds(scene) == (hypothesis.label == "entailment")


def test_every_wording_is_entailed_as_often_as_contradicted(hypotheses):
    texts = defaultdict(Counter)
    for _, said in hypotheses:
        for hypothesis in said:
            texts[hypothesis.label][hypothesis.text] += 1
    assert texts["entailment"] == texts["contradiction"]
    assert not texts["neutral"].keys() & texts["entailment"].keys()


def test_no_contradiction_is_a_scenes_own_entailment(hypotheses):
    for _, said in hypotheses:
        assert len({hypothesis.text for hypothesis in said}) == 3


def test_scenes_too_much_alike_to_contradict_each_other_are_refused():
    scene = next(task_scenes(0, "test", "train"))
    entailed = [Hypothesis("", "entailment", Claim(ground=scene.ground_colour))] * 3
    with pytest.raises(ValueError, match="3 scenes are too few"):
        denied_partners([scene] * 3, entailed, Draws(0))


@pytest.mark.parametrize("kind", KINDS)
def test_true_and_false_claims_are_so_and_name_each_value_alike(kind: str):
    drawn = {True: Counter(), False: Counter()}
    for number, scene in enumerate(islice(task_scenes(1, "test", "train"), 1_500)):
        draws = Draws("claims", kind, number)
        right, wrong = true_claim(kind, scene, draws), false_claim(kind, scene, draws)
        assert right.holds(scene)
        assert not wrong.holds(scene)
        drawn[True][right] += 1
        drawn[False][wrong] += 1
    if kind in ("colour", "shape", "ground"):
        assert len(drawn[True]) == len(drawn[False])
        for truth in drawn.values():
            assert max(truth.values()) < 1.4 * truth.total() / len(truth)


def test_a_phrase_says_all_that_the_claim_claims():
    for number in range(200):
        draws = Draws("phrases", number)
        claim = any_claim(KINDS[number % len(KINDS)], draws)
        phrase = claim.phrase(draws)
        if claim.colour:
            assert any(f" {word} " in f"{phrase} " for word in vocabulary.COLOUR_WORDS[claim.colour])
        if claim.shape:
            assert any(phrase.endswith(word) for word in vocabulary.SHAPE_WORDS[claim.shape])
        if claim.ground:
            assert any(f" {word} " in phrase for word in vocabulary.GROUND_COLOUR_WORDS[claim.ground])
        if claim.number:
            assert phrase in vocabulary.COUNT_WORDS[claim.number]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_all_tasks_keep_to_the_scenes_of_their_split(split: str):
    found = [scene for scene, _ in scene_questions(3, split, 40)]
    found += [scene for group in statement_sets(3, split, 8) for pair in group.pairs for scene in pair]
    found += [scene for scene, _ in scene_hypotheses(3, split, 60)]
    assert {len(scene.objects) for scene in found} <= {1, 2, 3}
    found += [scene for scene, _ in captioned_scenes(3, split, 20)]
    assert {split_of(scene) for scene in found} == {split}


def test_held_out_images_share_no_caption_and_have_two_to_five_each():
    found = captioned_scenes(0, "test", CAPTIONED)
    texts = [text for _, captions in found for text in captions]
    assert len(texts) == len(set(texts))
    assert {len(captions) for _, captions in found} == {2, 3, 4, 5}
    assert len({scene.combination for scene, _ in found}) == CAPTIONED


def test_captioned_images_are_not_those_of_pretraining():
    shards = {scene for scene, _ in islice(scenes(0, "train"), CAPTIONED)}
    assert not shards & {scene for scene, _ in captioned_scenes(0, "train", CAPTIONED)}


@pytest.mark.parametrize(
    ("make", "fewer", "more"),
    [
        (scene_questions, 20, 60),
        (scene_hypotheses, 60, 60),  # contradictions are dealt out among all
        (statement_sets, 16, 32),  # from a pool of the same size
        (captioned_scenes, 10, 30),
    ],
)
def test_the_same_seed_gives_the_same_items_and_another_seed_others(make, fewer: int, more: int):
    first = make(0, "validation", fewer)
    assert make(0, "validation", more)[: len(first)] == first
    assert make(1, "validation", fewer) != first


@pytest.mark.parametrize(
    "change",
    [{"train_questions": 7}, {"train_statements": 12}, {"evaluation_hypotheses": 1000}, {"train_captioned": 0}],
)
def test_sizes_that_would_cut_an_image_or_a_set_in_two_are_refused(change: dict):
    (name,) = change
    with pytest.raises(ValueError, match=rf"scene_tasks\.{name} = \d+: a multiple of"):
        SceneTaskSizes(**change)
