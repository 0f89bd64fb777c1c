from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from modstruct.data.synthetic import factors
from modstruct.data.synthetic.factors import Draws, Scene, sample_scene
from modstruct.data.synthetic.splits import SPLITS, scenes, split_of

NAMES = {
    "shape": factors.SHAPES,
    "colour": factors.COLOURS,
    "size": factors.SIZES,
    "fill": factors.FILLS,
    "place": factors.PLACES,
}


def some_scenes(count: int = 300) -> list[Scene]:
    return [sample_scene(Draws("test", index)) for index in range(count)]


def test_a_choice_is_uniform_and_a_shuffle_keeps_every_item():
    draws = Draws("uniform")
    counts = Counter(draws.choice("abcd") for _ in range(4000))
    assert all(800 < counts[letter] < 1200 for letter in "abcd")
    firsts = Counter(draws.shuffled("abcd")[0] for _ in range(4000))
    assert all(800 < firsts[letter] < 1200 for letter in "abcd")
    assert sorted(draws.shuffled("abcd")) == list("abcd")


def test_a_record_is_plain_json_and_gives_the_scene_back():
    for scene in some_scenes():
        record = json.loads(json.dumps(scene.record(), allow_nan=False))
        assert Scene.from_record(record) == scene


def test_a_record_names_every_factor_by_its_class():
    for scene in some_scenes():
        record = scene.record()
        assert record["count"] == len(record["objects"]) == len(scene.objects)
        for name, classes in NAMES.items():
            assert all(item[name] in classes for item in record["objects"])
            assert record[f"main_{name}"] == record["objects"][0][name]
            assert record[name] == (record[f"main_{name}"] if record["count"] == 1 else None)
        assert record["ground_colour"] in factors.GROUND_COLOURS
        assert record["ground_texture"] in factors.GROUND_TEXTURES
        assert record["light"] in factors.LIGHTS
        assert record["mood"] in factors.MOODS
        assert record["aside"] in factors.ASIDES
        assert record["template"] in factors.TEMPLATES_OF_SEVERAL


def test_a_record_that_lacks_a_factor_is_refused():
    record = some_scenes(1)[0].record()
    del record["light"]
    with pytest.raises(KeyError, match="light"):
        Scene.from_record(record)


def test_objects_lie_in_the_image_in_cells_of_their_own_and_the_main_one_is_the_largest():
    for scene in some_scenes():
        assert len({item.place for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            assert item.radius * 0.9 < item.x < 1 - item.radius * 0.9
            assert item.radius * 0.9 < item.y < 1 - item.radius * 0.9
            assert (int(3 * item.y), int(3 * item.x)) == (item.row, item.column)
        assert all(item.radius < scene.main.radius for item in scene.objects[1:])


def test_objects_hardly_overlap():
    for scene in some_scenes():
        for number, item in enumerate(scene.objects):
            for other in scene.objects[:number]:
                distance = ((item.x - other.x) ** 2 + (item.y - other.y) ** 2) ** 0.5
                assert distance > 0.8 * (item.radius + other.radius)


def test_contents_and_combination_do_not_depend_on_the_order_of_the_objects():
    for scene in some_scenes(50):
        turned = Scene(**{**vars(scene), "objects": scene.objects[::-1]})
        assert turned.contents == scene.contents
        assert turned.combination == scene.combination


def test_sample_i_is_a_function_of_seed_split_and_i():
    assert list(islice(scenes(3, "test"), 40))[:20] == list(islice(scenes(3, "test"), 20))
    assert list(islice(scenes(3, "train"), 20)) != list(islice(scenes(4, "train"), 20))


def test_no_set_of_objects_occurs_in_two_splits_whatever_the_seed():
    contents = {
        split: {scene.contents for seed in (0, 1) for scene, _ in islice(scenes(seed, split), count)}
        for split, count in zip(SPLITS, (2500, 400, 400), strict=True)
    }
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        for other in others:
            assert not contents[split] & contents[other]


def test_held_out_samples_are_distinct_in_combination_and_in_caption():
    for split in ("validation", "test"):
        samples = list(islice(scenes(0, split), 1000))
        assert len({scene.combination for scene, _ in samples}) == 1000
        assert len({text for _, text in samples}) == 1000


def test_every_kind_of_object_is_met_in_every_split():
    for split in SPLITS:
        items = [item for scene, _ in islice(scenes(0, split), 600) for item in scene.objects]
        assert {(item.shape, item.colour) for item in items} >= {
            (shape, colour) for shape in factors.SHAPES for colour in factors.COLOURS
        }
        for name, classes in NAMES.items():
            assert {getattr(item, name) for item in items} == set(classes)


def test_the_splits_hold_out_the_same_share_of_every_shape_and_colour():
    singles = [scene for scene in some_scenes(4000) if len(scene.objects) == 1]
    for name in ("shape", "colour"):
        for value in NAMES[name]:
            splits = Counter(split_of(scene) for scene in singles if getattr(scene.main, name) == value)
            assert 0.7 < splits["train"] / splits.total() < 0.9
            assert splits["validation"] > 0.04 * splits.total()
            assert splits["test"] > 0.04 * splits.total()
