from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from modstruct.data.synthetic.drawing import GROUND_RGB, OUTLINES, RGB, draw, texture
from modstruct.data.synthetic.factors import (
    COLOURS,
    FILLS,
    GROUND_COLOURS,
    GROUND_TEXTURES,
    LIGHTS,
    SHAPES,
    Draws,
    Scene,
    SceneObject,
    sample_scene,
)


def pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(draw(scene, size)).astype(int)


def one_object(**changes: object) -> Scene:
    """A large solid red circle in the middle of a white ground."""
    item = SceneObject("circle", "red", "large", "solid", "middle", 0.5, 0.5, 0.17, 0.0, 0.0)
    scene = replace(sample_scene(Draws(0)), ground_colour="white", ground_texture="ribs", light="left")
    return replace(scene, objects=(replace(item, **changes),))


def test_a_scene_has_one_image_of_the_size_asked_for():
    for index, size in enumerate((32, 64, 100)):
        scene = sample_scene(Draws("picture", index))
        assert pixels(scene, size).shape == (size, size, 3)
        assert np.array_equal(pixels(scene, size), pixels(scene, size))


def test_words_do_not_change_the_image():
    scene = sample_scene(Draws("words"))
    other = replace(scene, mood="lonely", aside="doubt", template="counted", wording_seed=scene.wording_seed + 1)
    assert np.array_equal(pixels(scene), pixels(other))


@pytest.mark.parametrize(("factor", "values"), [("ground_texture", GROUND_TEXTURES), ("light", LIGHTS)])
def test_every_value_of_a_image_only_factor_changes_the_image(factor: str, values: tuple[str, ...]):
    drawn = [pixels(replace(one_object(), **{factor: value})) for value in values]
    for number, image in enumerate(drawn):
        for other in drawn[:number]:
            assert np.abs(image - other).mean() > 2


def test_every_class_of_the_rest_has_a_drawing():
    assert set(OUTLINES) == set(SHAPES)
    assert set(RGB) == set(COLOURS)
    assert set(GROUND_RGB) == set(GROUND_COLOURS)


def test_shapes_and_fills_look_different():
    drawn = [pixels(one_object(shape=shape, fill=fill)) for shape in SHAPES for fill in FILLS]
    for number, image in enumerate(drawn):
        for other in drawn[:number]:
            assert np.abs(image - other).mean() > 1


def test_shapes_cover_about_the_same_area():
    for corners in OUTLINES.values():
        x, y = np.array(corners).T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        assert 1.2 < area < 2.9
        assert np.hypot(x, y).max() < 1.35


@pytest.mark.parametrize("colour", COLOURS)
def test_a_solid_object_has_its_colour_at_its_place(colour: str):
    scene = one_object(colour=colour, x=0.25, y=0.75)
    centre = pixels(scene)[48, 16]
    nearest = min(RGB, key=lambda name: np.abs(centre - RGB[name]).sum())
    assert nearest == colour


def test_the_light_falls_from_its_side():
    for light, brighter, darker in (
        ("left", np.s_[:, :8], np.s_[:, -8:]),
        ("right", np.s_[:, -8:], np.s_[:, :8]),
        ("above", np.s_[:8], np.s_[-8:]),
        ("below", np.s_[-8:], np.s_[:8]),
    ):
        image = pixels(replace(one_object(), light=light, ground_colour="grey", ground_texture="grain"))
        assert image[brighter].mean() > image[darker].mean() + 5


def test_a_texture_leaves_the_mean_brightness_alone():
    for name in GROUND_TEXTURES:
        patterns = np.stack([texture(name, 64, seed) for seed in range(30)])
        assert abs(patterns.mean()) < 0.25
        assert 0.6 < patterns.std() < 1.5
