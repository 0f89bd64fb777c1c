"""The information of embedded sets, as a result."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from modstruct.data.synthetic.factors import COLOURS, MOODS
from modstruct.data.synthetic.information import exact_information
from modstruct.data.synthetic.splits import scenes
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.information.measure import bag_of_words, measure, scene_pixels
from modstruct.evaluation.information.probes import ProbeConfig

QUICK = ProbeConfig(folds=2, strengths=(1.0,), iterations=30, hidden=0, words=80, samples=200)
COLOUR_WORDS, MOOD_WORDS = ("red", "green", "blue"), ("calm", "sad", "merry", "odd")
MODEL = {"name": "toy", "fingerprint": "0"}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def toy_set(folder, rows=400, captions_each=1):
    """Images that show colour and light, captions that name colour and mood; embeddings know the colour alone."""
    random = np.random.default_rng(0)
    colour, light, mood = random.integers(0, [[3], [2], [4]], (3, rows))
    image = unit(np.eye(3)[colour] + 0.02 * random.normal(size=(rows, 3)))
    of = np.repeat(np.arange(rows), captions_each)
    return EmbeddedSet(
        "toy",
        MODEL,
        {
            "image": image,
            "text": image[of],
            "image_features": np.column_stack([np.eye(3)[colour], light]).astype(np.float32),
        },
        pairs=np.column_stack([of, np.arange(len(of))]),
        labels=np.where(np.arange(rows) < 5, -1, colour),
        class_names=COLOUR_WORDS,
        label_field="colour",
        captions=[
            f"a {['red', 'green', 'blue'][colour[r]]} thing, {['calm', 'sad', 'merry', 'odd'][mood[r]]}" for r in of
        ],
        metadata=[{"light": bool(light[r]), "mood": int(mood[r]), "size": 0.5, "one": 1} for r in range(rows)],
        source={"name": "toy", "fingerprint": "f"},
    ).save(folder)


def test_what_each_modality_knows_is_found(tmp_path):
    result = measure(toy_set(tmp_path / "set"), replace(QUICK, labels=["colour", "light", "mood"]))
    metrics, outcomes = result.grouped, result.outcomes
    for label, entropy, text, image in (("colour", 3, True, True), ("light", 2, False, True), ("mood", 4, True, False)):
        own = metrics[label]
        assert own["entropy"].value == pytest.approx(np.log(entropy), abs=0.02)
        for name, knows in (("text", text), ("image", image), ("joint", True)):
            assert own[name].value == pytest.approx(knows * np.log(entropy), abs=0.1)
        assert own["gap"].value == pytest.approx((text != image) * np.log(entropy), abs=0.1)
        # The shared embeddings are aligned exactly and know the colour: the theorem's left side is its right one here.
        assert own["excess"].value == pytest.approx((label != "colour") * np.log(entropy), abs=0.1)
        for name in ("text", "image", "joint", "shared"):
            assert outcomes[f"{label}/{name}"].mean() == pytest.approx(own[name].value, abs=1e-5)
            assert own[name].low <= own[name].value <= own[name].high
    used = {"used for colour": 395, "used for light": 400, "used for mood": 400}
    assert result.rows == {"image": 400, "text": 400} | used
    assert result.metric == "information"
    assert result.fingerprint == "f"
    assert any("no bound of Delta_p" in note for note in result.settings["notes"])


def test_the_classes_of_a_set_are_its_label_by_default(tmp_path):
    result = measure(toy_set(tmp_path / "set"), QUICK)
    assert list(result.grouped) == ["colour"]


def test_several_captions_of_an_image_are_one_piece_of_evidence(tmp_path):
    single = measure(toy_set(tmp_path / "one"), replace(QUICK, labels=["mood"]))
    several = measure(toy_set(tmp_path / "four", captions_each=4), replace(QUICK, labels=["mood"]))
    assert several.rows["used for mood"] == 1600
    widths = [r.values["mood/entropy"].high - r.values["mood/entropy"].low for r in (single, several)]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def test_of_many_pairs_some_are_drawn(tmp_path):
    config = ProbeConfig(folds=2, rows=100, strengths=(10.0,), iterations=10, hidden=0, words=0, samples=100)
    result = measure(toy_set(tmp_path / "set"), replace(config, labels=["colour"]))
    assert result.rows["used for colour"] == 100
    assert len(result.outcomes["colour/text"]) == 100


def scenes_set(folder, told=None, **more):
    """told: by scene, what its record says. more: of the set."""
    drawn = list(islice(scenes(3, "train"), 240))
    records = [
        scene.record() | {"split": "train"} | ({"told": told(n)} if told else {}) for n, (scene, _) in enumerate(drawn)
    ]
    colour = np.array([COLOURS.index(record["main_colour"]) for record in records])
    mood = np.array([MOODS.index(record["mood"]) for record in records])
    return EmbeddedSet(
        "scenes",
        MODEL,
        {"image": unit(np.eye(8)[colour]), "text": unit(np.eye(8)[mood])},
        pairs=np.repeat(np.arange(240)[:, None], 2, 1),
        captions=[text for _, text in drawn],
        metadata=records,
        **more,
    ).save(folder)


def test_exact_values_are_those_of_how_much_the_captions_tell(tmp_path):
    labels = replace(QUICK, labels=["ground_colour"])
    gaps = {}
    for told in (None, 1.0, 0.4):
        result = measure(scenes_set(tmp_path / str(told), told and (lambda _, told=told: told)), labels)
        gaps[told] = result.values["ground_colour/exact/gap"].value
        assert result.settings["told"] == (told or 1.0)
    assert gaps[None] == gaps[1.0] == exact_information("ground_colour", "train").gap
    assert gaps[0.4] == exact_information("ground_colour", "train", 0.4).gap > gaps[1.0] + 0.2


def test_without_knowing_how_much_the_captions_tell_there_are_no_exact_values(tmp_path):
    result = measure(scenes_set(tmp_path / "set", lambda n: n % 2), replace(QUICK, labels=["ground_colour"]))
    assert "ground_colour" in result.grouped
    assert not any("exact" in name or "bias" in name for name in result.values)
    assert result.settings["told"] is None
    assert any(note.startswith("no exact values: the samples' `told`") for note in result.settings["notes"])


def test_scenes_come_with_exact_values(tmp_path):
    embedded = scenes_set(tmp_path / "set")
    result = measure(embedded, replace(QUICK, labels=["mood", "main_colour"]))
    mood = result.grouped["mood"]
    exact, bias = result.grouped["mood/exact"], result.grouped["mood/bias"]
    assert {name for name, leaf in exact.items() if leaf.value == pytest.approx(np.log(8))} == {
        *("entropy", "text", "joint", "gap", "aligned_excess")
    }
    assert exact["image"].value == 0
    for name in ("text", "image", "joint", "gap"):
        assert bias[name].value == pytest.approx(mood[name].value - exact[name].value)
    assert mood["text"].value > 1.8
    assert abs(mood["image"].value) < 0.1
    assert "main_colour/exact" not in result.grouped


def test_headlines_are_of_the_label_that_is_the_sets_classes_with_the_exact_gap(tmp_path):
    metadata = scenes_set(tmp_path / "plain").metadata
    grounds = sorted({record["ground_colour"] for record in metadata}, reverse=True)
    classes = {"labels": np.array([grounds.index(record["ground_colour"]) for record in metadata])}
    embedded = scenes_set(tmp_path / "set", label_field="label", class_names=tuple(grounds), **classes)
    result = measure(embedded, replace(QUICK, labels=["mood", "ground_colour", "main_colour"]))
    assert result.headlines == tuple(f"ground_colour/{name}" for name in ("text", "image", "gap", "exact/gap"))
    result = measure(embedded, replace(QUICK, labels=["main_colour", "mood"]))
    assert result.headlines == ("main_colour/text", "main_colour/image", "main_colour/gap")
    result = measure(toy_set(tmp_path / "toy"), replace(QUICK, labels=["mood", "colour"]))
    assert result.headlines == ("colour/text", "colour/image", "colour/gap")


def test_words_and_neighbours_are_counted_without_their_marks():
    bags = bag_of_words(["A red star, red!", "a red star", "a blue moon"], largest=10, least=2)
    assert bags.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]  # a, a red, red, red star, star
    assert bag_of_words(["a", "b"], largest=5).tolist() == [[0], [0]]


def test_scenes_are_drawn_again_from_their_records():
    scene, _ = next(scenes(3, "train"))
    pixels = scene_pixels([scene.record(), scene.record()], 8)
    assert pixels.shape == (2, 192)
    assert np.array_equal(pixels[0], pixels[1])
    assert 0.2 < pixels.mean() < 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("shape", "labels = 'shape': no image has it"),
        ("size", "labels = 'size': has the value 0.5"),
        ("one", "labels = 'one': all images have the value '1'"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        measure(toy_set(tmp_path / "set"), replace(QUICK, labels=[label]))


def test_sets_without_captions_or_classes_are_refused(tmp_path):
    rows = unit(np.ones((4, 2)))
    with pytest.raises(ValueError, match="has no captions"):
        measure(EmbeddedSet("a", MODEL, {"image": rows}).save(tmp_path / "a"), QUICK)
    pairs = np.repeat(np.arange(4)[:, None], 2, 1)
    both = EmbeddedSet("b", MODEL, {"image": rows, "text": rows}, pairs=pairs, captions="abcd").save(tmp_path / "b")
    with pytest.raises(ValueError, match="has no classes"):
        measure(both, QUICK)
