"""What can be said of one scene and checked against its factors: `Claim.holds(scene)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import USUAL_SHARE, with_article
from modstruct.data.synthetic.factors import COLOURS, GROUND_COLOURS, SHAPES, Draws, Scene, sample_scene
from modstruct.data.synthetic.splits import split_of

THING_WORDS = ("shape", "thing")
MOST_OBJECTS = 3
# Few objects are learned first: of scenes with three, a fifth of all, half are kept, of those with four none.
KEPT_SHARES = {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.0}

Item = TypeVar("Item")


def task_scenes(seed: int, task: str, split: str) -> Iterator[Scene]:
    """Endless scenes of one split with one to three objects; scene i is a function of (seed, task, split, i)."""
    for index in count():
        for attempt in count():
            draws = Draws(seed, task, split, index, attempt)
            scene = sample_scene(draws)
            if split_of(scene) == split and draws.chance(KEPT_SHARES[len(scene.objects)]):
                break
        yield scene


def drawn(shares: Mapping[Item, float], draws: Draws) -> Item:
    """A key, drawn by the shares; they need not sum to 1."""
    level = draws.uniform(0, sum(shares.values()))
    for item, share in shares.items():
        level -= share
        if level < 0:
            return item
    return item  # level was the very end of the range


def say(words: Sequence[str], draws: Draws) -> str:
    """The usual word, or now and then another, as captions have it."""
    return words[0] if draws.chance(USUAL_SHARE) else draws.choice(words)


@dataclass(frozen=True)
class Claim:
    """A claim about a scene.

    What is None is not claimed; of the others, colour and shape belong to one object.
    """

    colour: str | None = None
    shape: str | None = None
    ground: str | None = None
    number: int | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether a scene shows it; what it does not show it denies, as its objects and ground are all in sight."""
        if self.number is not None:
            return len(scene.objects) == self.number
        if self.ground is not None:
            return scene.ground_colour == self.ground
        return any(self.colour in (None, item.colour) and self.shape in (None, item.shape) for item in scene.objects)

    @property
    def plural(self) -> bool:
        return self.number is not None and self.number > 1

    def phrase(self, draws: Draws) -> str:
        """`a red shape`, `a star`, `a red star`, `a mint ground`, `two shapes`."""
        if self.number is not None:
            return draws.choice(vocabulary.COUNT_WORDS[self.number])
        if self.ground is not None:
            colour = say(vocabulary.GROUND_COLOUR_WORDS[self.ground], draws)
            return with_article(f"{colour} {say(vocabulary.GROUND_WORDS, draws)}")
        shape = draws.choice(THING_WORDS) if self.shape is None else say(vocabulary.SHAPE_WORDS[self.shape], draws)
        colour = [] if self.colour is None else [say(vocabulary.COLOUR_WORDS[self.colour], draws)]
        return with_article(" ".join([*colour, shape]))


KINDS = ("colour", "shape", "thing", "ground", "number")


def true_claim(kind: str, scene: Scene, draws: Draws) -> Claim:
    """A claim of a kind that the scene shows; `thing` is a colour with a shape."""
    item = draws.choice(scene.objects)
    return {
        "colour": Claim(colour=item.colour),
        "shape": Claim(shape=item.shape),
        "thing": Claim(colour=item.colour, shape=item.shape),
        "ground": Claim(ground=scene.ground_colour),
        "number": Claim(number=len(scene.objects)),
    }[kind]


def any_claim(kind: str, draws: Draws) -> Claim:
    """A claim of a kind about no scene in particular, every value equally likely."""
    colour, shape = draws.choice(COLOURS), draws.choice(SHAPES)
    return {
        "colour": Claim(colour=colour),
        "shape": Claim(shape=shape),
        "thing": Claim(colour=colour, shape=shape),
        "ground": Claim(ground=draws.choice(GROUND_COLOURS)),
        "number": Claim(number=1 + draws.whole(MOST_OBJECTS)),
    }[kind]


def false_claim(kind: str, scene: Scene, draws: Draws) -> Claim:
    """A claim of a kind that the scene denies. Of a `thing`, either the colour or the shape may well be there."""
    while True:
        claim = any_claim(kind, draws)
        if kind == "thing" and draws.chance(0.5):
            item = draws.choice(scene.objects)
            kept = {"colour": item.colour} if draws.chance(0.5) else {"shape": item.shape}
            claim = replace(claim, **kept)
        if not claim.holds(scene):
            return claim
