"""What a scene is: the factors of one built-in image and its caption, and how they are drawn at random.

A scene is a frozen record. Its image (drawing.py) and its caption (captions.py) are functions of that record, and so
are questions, statements and hypotheses about it. Three kinds of factors:

both modalities  the objects (shape, colour, size, fill, place, number of them) and the colour of the ground
image only       texture of the ground, direction of the light, exact position, radius, angle and shade of each object
caption only       mood, aside of the speaker, template and wording
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "medium", "large")
FILLS = ("solid", "outlined", "striped", "dotted")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
GROUND_COLOURS = ("white", "grey", "tan", "sky blue", "mint", "lavender")
GROUND_TEXTURES = ("grain", "clouds", "waves", "weave", "checks", "ribs")
LIGHTS = ("left", "right", "above", "below")
MOODS = ("calm", "cheerful", "gloomy", "lonely", "playful", "mysterious", "dreamy", "serious")
ASIDES = ("none", "opinion", "doubt", "delight", "memory")
TEMPLATES = ("list", "frame", "there", "seen", "ground first", "places first", "counted")
TEMPLATES_OF_SEVERAL = (*TEMPLATES, "related", "main first")

# Share of scenes with one, two, three and four objects: few objects are learned first, many make hard neighbours.
COUNT_SHARES = (0.35, 0.35, 0.2, 0.1)
# Share of captions without an aside.
PLAIN_SHARE = 0.6

# As shares of the image's side. Neighbouring cells lie 0.305 apart and only the main object may be the largest,
# so two objects meet at most at their tips.
RADIUS = {"small": 0.105, "medium": 0.14, "large": 0.178}
CELL_CENTRES = (0.195, 0.5, 0.805)
PLACE_JITTER = 0.022
RADIUS_JITTER = 0.06
ANGLE_JITTER = 12.0

Item = TypeVar("Item")


class Draws:
    """Random choices that are the same on every machine and Python version.

    Python promises a stable stream for `Random.random()` alone, so every choice is made from it.
    """

    def __init__(self, *seed: object):
        digest = hashlib.blake2b("/".join(map(str, seed)).encode(), digest_size=8).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def whole(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self._random() * count)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[int(self._random() * len(items))]

    def uniform(self, low: float, high: float) -> float:
        """A number from low to high with four decimals, so that JSON keeps it exactly."""
        return round(low + (high - low) * self._random(), 4)

    def chance(self, share: float) -> bool:
        return self._random() < share

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All items in random order (Fisher & Yates)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.whole(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


@dataclass(frozen=True)
class SceneObject:
    """One object. The first five are class names; the rest is exact and in the image only."""

    shape: str
    colour: str
    size: str
    fill: str
    place: str
    x: float
    """Centre, from 0 (left) to 1 (right)."""
    y: float
    """Centre, from 0 (top) to 1 (bottom)."""
    radius: float
    """As a share of the image's side."""
    angle: float
    """Degrees, clockwise."""
    shade: float
    """From -1 (darker) to 1 (lighter)."""

    @property
    def row(self) -> int:
        """0 (top) to 2 (bottom)."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """0 (left) to 2 (right)."""
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """All factors of one sample. objects: the main one first, which is larger than every other."""

    objects: tuple[SceneObject, ...]
    ground_colour: str
    ground_texture: str
    light: str
    texture_seed: int
    mood: str
    aside: str
    template: str
    wording_seed: int

    @property
    def main(self) -> SceneObject:
        return self.objects[0]

    @property
    def contents(self) -> tuple[tuple[str, str, str, str], ...]:
        """The objects without their places: the sorted multiset of (shape, colour, size, fill)."""
        return tuple(sorted((o.shape, o.colour, o.size, o.fill) for o in self.objects))

    @property
    def combination(self) -> tuple:
        """Everything that image and caption share: the objects with their places, and the colour of the ground."""
        placed = sorted((o.shape, o.colour, o.size, o.fill, o.place) for o in self.objects)
        return (tuple(placed), self.ground_colour)

    def record(self) -> dict[str, Any]:
        """The factors as plain JSON, from which `Scene.from_record` restores the scene.

        `shape`, `colour`, `size`, `fill` and `place` are set for scenes of one object and null for others, so that they
        can serve as labels of the whole image; `main_shape` and so on belong to the main object of every scene.
        """
        record: dict[str, Any] = {"count": len(self.objects)}
        for name in ("shape", "colour", "size", "fill", "place"):
            record[f"main_{name}"] = getattr(self.main, name)
            record[name] = getattr(self.main, name) if len(self.objects) == 1 else None
        record |= {name: value for name, value in vars(self).items() if name != "objects"}
        record["objects"] = [dict(vars(o)) for o in self.objects]
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Scene:
        """The scene of a `record()`, or of a whole key.json. Raises KeyError if a factor is missing."""
        fields = {name: record[name] for name in cls.__dataclass_fields__ if name != "objects"}
        objects = (SceneObject(**{n: o[n] for n in SceneObject.__dataclass_fields__}) for o in record["objects"])
        return cls(objects=tuple(objects), **fields)


def sample_object(draws: Draws, size: str, place: str) -> SceneObject:
    row, column = divmod(PLACES.index(place), 3)
    return SceneObject(
        shape=draws.choice(SHAPES),
        colour=draws.choice(COLOURS),
        size=size,
        fill=draws.choice(FILLS),
        place=place,
        x=round(CELL_CENTRES[column] + draws.uniform(-PLACE_JITTER, PLACE_JITTER), 4),
        y=round(CELL_CENTRES[row] + draws.uniform(-PLACE_JITTER, PLACE_JITTER), 4),
        radius=round(RADIUS[size] * draws.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER), 4),
        angle=draws.uniform(-ANGLE_JITTER, ANGLE_JITTER),
        shade=draws.uniform(-1, 1),
    )


def sample_count(draws: Draws) -> int:
    level = draws.uniform(0, 1)
    count = 1
    while count < len(COUNT_SHARES) and level >= sum(COUNT_SHARES[:count]):
        count += 1
    return count


def sample_scene(draws: Draws) -> Scene:
    """A scene of any split."""
    count = sample_count(draws)
    places = draws.shuffled(PLACES)[:count]
    main_size = draws.choice(SIZES if count == 1 else SIZES[1:])
    smaller = SIZES[: SIZES.index(main_size)]
    sizes = [main_size, *(draws.choice(smaller) for _ in range(count - 1))]
    return Scene(
        objects=tuple(sample_object(draws, size, place) for size, place in zip(sizes, places, strict=True)),
        ground_colour=draws.choice(GROUND_COLOURS),
        ground_texture=draws.choice(GROUND_TEXTURES),
        light=draws.choice(LIGHTS),
        texture_seed=draws.whole(2**31),
        mood=draws.choice(MOODS),
        aside="none" if draws.chance(PLAIN_SHARE) else draws.choice(ASIDES[1:]),
        template=draws.choice(TEMPLATES if count == 1 else TEMPLATES_OF_SEVERAL),
        wording_seed=draws.whole(2**31),
    )
