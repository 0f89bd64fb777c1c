"""The exact values of the built-in scenes against scenes that were drawn."""

from collections import Counter
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import pytest

from modstruct.data.synthetic import captions
from modstruct.data.synthetic.factors import COLOURS, FILLS, SHAPES, SIZES
from modstruct.data.synthetic.information import (
    BOTH,
    CAPTION_ONLY,
    IMAGE_ONLY,
    TARGETS,
    captions_of_a_split,
    count_shares,
    entropy,
    exact_information,
    ground_mention_share,
    objects_of_a_split,
    split_of_scenes,
    told_of_scenes,
)
from modstruct.data.synthetic.splits import scenes, split_of

DRAWN = 6_000
FACTORS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "fill": FILLS}
at_each_level = pytest.mark.parametrize("told", [1.0, 0.6, 0.2])


@lru_cache
def drawn_scenes():
    return [scene for scene, _ in islice(scenes(5, "train"), DRAWN)]


@lru_cache
def drawn(told=1.0):
    return [(scene, captions.Wording(scene, told).mentions) for scene in drawn_scenes()]


def close(count: int, of: int, share: float) -> bool:
    """Whether a count is within 4 standard deviations of its expectation."""
    return abs(count - of * share) <= 4 * np.sqrt(of * share * (1 - share)) + 1e-9


def test_numbers_of_objects_occur_as_often_as_derived():
    counts = Counter(len(scene.objects) for scene, _ in drawn())
    for number, share in enumerate(count_shares("train"), start=1):
        assert close(counts[number], DRAWN, share)


@at_each_level
def test_the_ground_is_mentioned_as_often_as_derived(told):
    said = sum(("ground", None) in mentions for _, mentions in drawn(told))
    assert close(said, DRAWN, ground_mention_share("train", told))
    assert exact_information("ground_colour", "train", told).text == pytest.approx(
        ground_mention_share("train", told) * np.log(6)
    )


@at_each_level
def test_captions_of_one_object_mention_size_and_fill_as_often_as_derived(told):
    joint = captions_of_a_split("train", told).sum((0, 1, 4, 5))
    assert joint.sum() == pytest.approx(1)
    single = [(scene.main, mentions) for scene, mentions in drawn(told) if len(scene.objects) == 1]
    found = Counter(
        (("size", 0) in mentions, ("fill", 0) in mentions, item.size, item.fill) for item, mentions in single
    )
    for z, size in enumerate(SIZES):
        for f, fill in enumerate(FILLS):
            for size_said in (0, z + 1):
                for fill_said in (0, f + 1):
                    share = joint[size_said, fill_said, z, f]
                    assert close(found[size_said > 0, fill_said > 0, size, fill], len(single), share)


@at_each_level
@pytest.mark.parametrize("label", FACTORS)
def test_what_a_caption_leaves_open_is_as_much_as_derived(label, told):
    """H(Y | X_T) as the mean of -log of the posterior of what was drawn."""
    others = tuple(4 + axis for axis, factor in enumerate(FACTORS) if factor != label)
    joint = captions_of_a_split("train", told).sum(others)  # what is mentioned of each factor, and the label
    surprises = []
    for scene, mentions in drawn(told):
        if len(scene.objects) == 1:
            values = {factor: classes.index(getattr(scene.main, factor)) for factor, classes in FACTORS.items()}
            seen = tuple(1 + value if (factor, 0) in mentions else 0 for factor, value in values.items())
            posterior = joint[seen] / joint[seen].sum()
            surprises.append(-np.log(posterior[values[label]]))
    exact = exact_information(label, "train", told)
    error = np.std(surprises) / np.sqrt(len(surprises))
    assert abs(np.mean(surprises) - (exact.entropy - exact.text)) <= 4 * error + 1e-12


@at_each_level
def test_places_of_one_object_are_mentioned_as_often_as_derived(told):
    single = [mentions for scene, mentions in drawn(told) if len(scene.objects) == 1]
    exact = exact_information("place", "train", told)
    assert close(sum(("place", 0) in mentions for mentions in single), len(single), exact.text / exact.entropy)


@pytest.mark.parametrize("label", TARGETS)
def test_entropies_are_those_of_what_was_drawn(label):
    values = [record[label] for record in (scene.record() for scene, _ in drawn()) if record[label] is not None]
    shares = np.array(list(Counter(values).values())) / len(values)
    # The plug-in entropy is low by (classes - 1) / 2n; its deviation is below log(classes) / sqrt(n).
    expected = exact_information(label, "train").entropy - (len(shares) - 1) / (2 * len(values))
    assert entropy(shares) == pytest.approx(expected, abs=4 * np.log(len(shares)) / np.sqrt(len(values)) / 4)


def test_a_template_shows_in_the_image_only_by_the_number_of_objects():
    table = Counter((len(scene.objects) == 1, scene.template) for scene, _ in drawn())
    shares = np.array([[table[one, t] for t in sorted({t for _, t in table})] for one in (True, False)]) / DRAWN
    found = entropy(shares.sum(0)) + entropy(shares.sum(1)) - entropy(shares)
    assert found == pytest.approx(exact_information("template", "train").image, abs=0.01)


def test_the_budget_of_words_never_runs_out_on_one_object():
    costs = captions.MOOD_COST + captions.NAME_COST + max(captions.FRAME_COST.values()) + captions.ASIDE_COST
    assert costs + sum(captions.DETAIL_COST.values()) <= captions.WORD_BUDGET


@pytest.mark.parametrize("label", ["shape", "colour", "count"])
def test_what_both_always_tell_has_a_gap_of_zero_and_not_of_what_sums_round_off(label):
    for split in ("train", "validation", "test"):
        exact = exact_information(label, split)
        assert (str(float(exact.gap)), str(float(exact.aligned_excess))) == ("0.0", "0.0")


@pytest.mark.parametrize(("split", "told"), [("train", 1), ("validation", 1), ("test", 1), ("test", 0.3), ("test", 0)])
@pytest.mark.parametrize("label", TARGETS)
def test_the_values_keep_to_the_theorem_and_to_each_other(label, split, told):
    exact = exact_information(label, split, told)
    assert 0 <= exact.aligned <= min(exact.text, exact.image) + 1e-12
    assert max(exact.text, exact.image) <= exact.joint + 1e-12 <= exact.entropy + 2e-12
    assert exact.aligned_excess >= exact.gap - 1e-12
    if label in IMAGE_ONLY:
        assert exact.text == 0
    if label in ("mood", "aside"):
        assert exact.image == 0
    assert label in (*BOTH, *IMAGE_ONLY, *CAPTION_ONLY)


def test_objects_of_a_split_are_those_that_the_rule_lets_in():
    scene = next(scene for scene, _ in drawn() if len(scene.objects) == 1)
    place = tuple(values.index(getattr(scene.main, name)) for name, values in FACTORS.items())
    assert split_of(scene) == "train"
    tables = [objects_of_a_split(split) for split in ("train", "validation", "test")]
    assert [bool(table[place]) for table in tables] == [True, False, False]
    assert np.all(sum(table > 0 for table in tables) == 1)


def test_less_told_is_a_wider_gap_in_what_both_show_and_the_same_in_the_rest():
    gaps = {label: [exact_information(label, "test", told).gap for told in (1.0, 0.7, 0.4)] for label in TARGETS}
    for label in BOTH:
        if label != "count":  # objects are listed whatever is told of them
            assert all(less - more > 0.04 for more, less in pairwise(gaps[label])), label
    assert all(len(set(gaps[label])) == 1 for label in ("count", *IMAGE_ONLY, *CAPTION_ONLY))


def test_how_much_is_told_is_read_from_the_records():
    assert told_of_scenes([{}, {}]) == 1
    assert told_of_scenes([{"told": 0.5}, {"told": 0.5}]) == 0.5
    for unknown in ([{"told": 0.5}, {}], [{"told": 2}], [{"told": "all"}], [{"told": [1]}], [{"told": None}]):
        assert told_of_scenes(unknown) is None


def test_records_of_scenes_are_recognised():
    record = drawn()[0][0].record() | {"split": "train"}
    assert split_of_scenes([record, record]) == "train"
    assert split_of_scenes([record, record | {"split": "test"}]) is None
    assert split_of_scenes([{"split": "train", "colour": "red"}]) is None
    assert split_of_scenes([]) is None
    assert exact_information("main_shape", "train") is None
