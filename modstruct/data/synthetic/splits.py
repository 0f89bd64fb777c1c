"""Which scenes belong to training, validation and test, and the samples of each in order.

The rule works like a check digit. An object's digit is 3 times its shape's number plus 7 times its colour's plus 4
times its size's plus its fill's (numbers as in factors.py, from 0); a scene's digit is the sum over its objects
modulo 10. Digit 8 is validation, 9 is test, the rest is training. So the objects of a held-out scene, each with shape,
colour, size and fill, never occur together in training, at any places and on any ground: held-out scenes are unseen
combinations of known objects. The digit holds out the same share of every shape, colour, size, fill and number of
objects, which a hash would not; and it does not depend on the seed, so scenes of another seed mix in without leaking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count

from modstruct.data.synthetic.captions import caption
from modstruct.data.synthetic.factors import COLOURS, FILLS, SHAPES, SIZES, Draws, Scene, sample_scene

SPLITS = ("train", "validation", "test")
DIGITS = 10
SPLIT_OF_DIGIT = ("train",) * 8 + ("validation", "test")


def digit_of(contents: Iterable[tuple[str, str, str, str]]) -> int:
    """The digit of objects, each (shape, colour, size, fill)."""
    digit = sum(
        3 * SHAPES.index(shape) + 7 * COLOURS.index(colour) + 4 * SIZES.index(size) + FILLS.index(fill)
        for shape, colour, size, fill in contents
    )
    return digit % DIGITS


def split_of(scene: Scene) -> str:
    """The one split that a scene may occur in."""
    return SPLIT_OF_DIGIT[digit_of(scene.contents)]


def scenes(seed: int | str, split: str) -> Iterator[tuple[Scene, str]]:
    """Endless (scene, caption that tells all) of one split.

    Sample i is a function of (seed, split, i), however many samples are taken. In validation and test neither a
    combination of the factors that both modalities share nor a caption is repeated, so that retrieval has one answer.
    """
    seen: set[object] = set()
    for index in count():
        for attempt in count():
            scene = sample_scene(Draws(seed, split, index, attempt))
            if split_of(scene) != split:
                continue
            text = caption(scene)
            if split == "train":
                break
            if scene.combination not in seen and text not in seen:
                seen |= {scene.combination, text}
                break
        yield scene, text
