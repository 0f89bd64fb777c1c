from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from itertools import islice

import pytest

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import BODIES, Wording, caption, joined, relation, reworded, with_article
from modstruct.data.synthetic.factors import (
    ASIDES,
    GROUND_TEXTURES,
    LIGHTS,
    MOODS,
    TEMPLATES_OF_SEVERAL,
    Draws,
    Scene,
    SceneObject,
    sample_scene,
)
from modstruct.data.synthetic.splits import scenes


def some_scenes(count: int = 700) -> list[Scene]:
    return [sample_scene(Draws("captions", index)) for index in range(count)]


def has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text) is not None


def classes_named(text: str, words: dict[str, tuple[str, ...]]) -> set[str]:
    """Classes with a word in the text; a phrase that is part of a longer one of another class counts for neither."""
    found = sorted(
        ((phrase, name) for name, phrases in words.items() for phrase in phrases), key=lambda pair: -len(pair[0])
    )
    named = set()
    for phrase, name in found:
        if has(text, phrase):
            named.add(name)
            text = re.sub(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", "#", text)
    return named


def said_of_the_image(text: str) -> dict[str, set[str]]:
    """By factor the classes that a caption names; the counts of `a trio of shapes` and the like aside."""
    text = re.sub("|".join(sum(vocabulary.COUNT_WORDS.values(), ())), "", text)
    grounds = {
        name: tuple(f"{word} {ground}" for word in words for ground in vocabulary.GROUND_WORDS)
        for name, words in vocabulary.GROUND_COLOUR_WORDS.items()
    }
    named = {"ground": classes_named(text, grounds)}
    # The ground has colours of its own, which contain words of the objects' colours.
    for words in vocabulary.GROUND_COLOUR_WORDS.values():
        for word in words:
            text = re.sub(rf"{word} (?={'|'.join(vocabulary.GROUND_WORDS)})", "", text)
    words_of = {
        "shape": vocabulary.SHAPE_WORDS,
        "colour": vocabulary.COLOUR_WORDS,
        "size": vocabulary.SIZE_WORDS,
        "fill": vocabulary.FILL_WORDS,
        "place": vocabulary.PLACE_WORDS,
    }
    return named | {factor: classes_named(text, words) for factor, words in words_of.items()}


def test_a_scene_has_one_caption():
    for scene in some_scenes(50):
        assert caption(scene) == caption(scene)
        assert caption(scene, 0.5) == caption(scene, 0.5)
        assert reworded(scene, 0.5) == reworded(scene, 0.5)


def test_captions_that_tell_all_are_those_of_earlier_versions():
    texts = "\n".join(text for _, text in islice(scenes(0, "train"), 400))
    assert hashlib.blake2b(texts.encode(), digest_size=8).hexdigest() == "58fc385f3d59fbbe"


@pytest.mark.parametrize("told", [1.0, 0.4, 0.0])
def test_another_wording_mentions_the_same(told):
    for scene in some_scenes(300):
        text, other = caption(scene, told), reworded(scene, told)
        assert text != other
        assert said_of_the_image(text) == said_of_the_image(other), (text, other)
        assert classes_named(other, vocabulary.MOOD_WORDS) == {scene.mood}
        first, second = Wording(scene, told), Wording(scene, told, other=0)
        assert (first.mentions, sorted(first.order)) == (second.mentions, sorted(second.order))
        if scene.template in ("places first", "related"):
            assert first.order == second.order


def test_most_words_and_the_order_of_objects_are_drawn_anew():
    pairs = [(caption(scene), reworded(scene)) for scene in some_scenes(300)]
    kept = [len({*text.split()} & {*other.split()}) / len({*text.split()}) for text, other in pairs]
    assert 0.4 < sum(kept) / len(kept) < 0.8
    several = [scene for scene in some_scenes(300) if len(scene.objects) > 2 and scene.template == "list"]
    assert any(Wording(scene).order != Wording(scene, other=0).order for scene in several)


def test_less_told_names_less_and_lists_every_object_all_the_same():
    shares = []
    for told in (1.0, 0.7, 0.4, 0.0):
        named = 0
        for scene in some_scenes(400):
            mentions = Wording(scene, told).mentions
            named += sum(kind in ("shape", "colour") for kind, _ in mentions)
            text = caption(scene, told)
            body = re.sub("|".join(sum(vocabulary.COUNT_WORDS.values(), ())), "", text)
            unnamed = sum(("shape", number) not in mentions for number in range(len(scene.objects)))
            assert len(re.findall(rf"\b{vocabulary.UNNAMED}\b", body)) == unnamed, text
            if told == 0:
                needed = {"ground first": "ground", "places first": "place"}.get(scene.template)
                assert {kind for kind, _ in mentions} == ({needed} if needed else set())
        shares.append(named / sum(2 * len(scene.objects) for scene in some_scenes(400)))
    assert shares == pytest.approx([1, 0.7, 0.4, 0], abs=0.04)
    assert (shares[0], shares[-1]) == (1, 0)


def test_what_only_the_image_shows_does_not_change_the_caption():
    for scene in some_scenes(100):
        other = replace(
            scene,
            ground_texture=GROUND_TEXTURES[GROUND_TEXTURES.index(scene.ground_texture) - 1],
            light=LIGHTS[LIGHTS.index(scene.light) - 1],
            texture_seed=scene.texture_seed + 1,
            objects=tuple(
                replace(item, x=item.y, y=item.x, radius=item.radius / 2, angle=-item.angle, shade=-item.shade)
                for item in scene.objects
            ),
        )
        assert caption(other) == caption(scene)


def test_every_shape_and_colour_of_the_scene_is_named_and_no_other():
    for scene in some_scenes():
        text = caption(replace(scene, aside="none"))
        # The ground has colours of its own, which contain words of the objects' colours.
        for words in vocabulary.GROUND_COLOUR_WORDS.values():
            for word in words:
                text = re.sub(rf"{word} (?={'|'.join(vocabulary.GROUND_WORDS)})", "", text)
        assert classes_named(text, vocabulary.COLOUR_WORDS) == {item.colour for item in scene.objects}, text
        text = re.sub("|".join(f"{words}: " for words in sum(vocabulary.COUNT_WORDS.values(), ())), "", text)
        assert classes_named(text, vocabulary.SHAPE_WORDS) == {item.shape for item in scene.objects}, text


def test_only_true_sizes_fills_and_places_are_named():
    for scene in some_scenes():
        text = caption(scene)
        for name, words in (
            ("size", vocabulary.SIZE_WORDS),
            ("fill", vocabulary.FILL_WORDS),
            ("place", vocabulary.PLACE_WORDS),
        ):
            assert classes_named(text, words) <= {getattr(item, name) for item in scene.objects}, text


def test_the_ground_is_named_truly_or_not_at_all():
    for scene in some_scenes():
        grounds = {
            name: tuple(f"{word} {ground}" for word in words for ground in vocabulary.GROUND_WORDS)
            for name, words in vocabulary.GROUND_COLOUR_WORDS.items()
        }
        assert classes_named(caption(scene), grounds) <= {scene.ground_colour}


def test_the_mood_is_always_named_and_no_other_is():
    for scene in some_scenes():
        assert classes_named(caption(scene), vocabulary.MOOD_WORDS) == {scene.mood}


def test_an_aside_is_made_exactly_when_the_scene_has_one():
    for scene in some_scenes(300):
        words = [word for words in vocabulary.ASIDE_WORDS.values() for word in words if word]
        made = [word for word in words if caption(scene).endswith(f", {word}")]
        assert made == ([] if scene.aside == "none" else made[:1])
        assert all(word in vocabulary.ASIDE_WORDS[scene.aside] for word in made)
        assert bool(made) == (scene.aside != "none")


def test_a_relation_is_true():
    relations = {phrase: name for name, phrases in vocabulary.RELATION_WORDS.items() for phrase in phrases}
    met = set()
    for scene in some_scenes():
        if scene.template != "related":
            continue
        first, second = (scene.objects[number] for number in Wording(scene).order[:2])
        phrase = max((phrase for phrase in relations if has(caption(scene), phrase)), key=len)
        met.add(relations[phrase])
        assert {
            "above": first.y < second.y,
            "below": first.y > second.y,
            "left": first.x < second.x,
            "right": first.x > second.x,
        }[relations[phrase]]
    assert met == set(vocabulary.RELATION_WORDS)


def test_a_relation_turns_round_with_its_objects():
    for scene in some_scenes(200):
        if len(scene.objects) > 1:
            first, second = scene.objects[:2]
            opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
            assert relation(first, second) == opposite[relation(second, first)]


def test_a_count_is_true():
    for scene in some_scenes(600):
        if scene.template == "counted":
            start = caption(scene)
            named = {count for count, words in vocabulary.COUNT_WORDS.items() if start.startswith(words)}
            assert named == {len(scene.objects)}


def test_every_template_mood_and_aside_has_words():
    assert set(BODIES) == set(TEMPLATES_OF_SEVERAL)
    assert set(vocabulary.MOOD_WORDS) == set(MOODS)
    assert set(vocabulary.ASIDE_WORDS) == set(ASIDES)


@pytest.mark.parametrize("told", [1.0, 0.4, 0.0])
def test_captions_are_tidy(told):
    for text in [made(scene, told) for scene in some_scenes(300) for made in (caption, reworded)]:
        assert text == text.strip()
        assert re.search(r"  | [,:]|[,:](?! )|\ba [aeiou]|\ban [^aeiou]", text) is None, text
        assert len(text.split()) <= 30, text


def test_captions_use_a_few_hundred_words():
    vocabulary = {word.strip(",:") for _, text in islice(scenes(0, "train"), 2500) for word in text.split()}
    assert 150 <= len(vocabulary) <= 300


def test_things_alike_in_shape_and_colour_are_told_apart_by_another():
    item = SceneObject("star", "red", "large", "solid", "top left", 0.2, 0.2, 0.17, 0, 0)
    twin = replace(item, size="small", place="bottom left", y=0.8, radius=0.1)
    scene = replace(sample_scene(Draws(1)), objects=(item, twin), template="list")
    assert has(caption(scene), "another")


@pytest.mark.parametrize(("phrases", "text"), [(["x"], "x"), (["x", "y"], "x and y"), (["x", "y", "z"], "x, y and z")])
def test_things_are_joined_as_in_a_sentence(phrases: list[str], text: str):
    assert joined(phrases) == text


def test_the_article_fits_the_word():
    assert with_article("orange star") == "an orange star"
    assert with_article("red star") == "a red star"
