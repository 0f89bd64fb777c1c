"""What can be said of one scene or of two and checked against their factors: `Claim.holds(scene)`.

Statements about two scenes, true or false, are made of such claims in the manner of NLVR2. A set has two sentences and
four pairs of scenes, one pair for each combination of their truth. So every sentence is true of two pairs and false of
two, neither sentence tells the label of the other, and consistency (right about a sentence for all of its pairs) is
meaningful. From the words alone, accuracy is exactly one half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TypeVar

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import USUAL_SHARE, with_article
from modstruct.data.synthetic.factors import COLOURS, GROUND_COLOURS, SHAPES, Draws, Scene, sample_scene
from modstruct.data.synthetic.splits import split_of

THING_WORDS = ("shape", "thing")
MOST_OBJECTS = 3
# Scenes of few objects are learned first: half of those with three objects are kept, none with four.
KEPT_SHARES = {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.0}

STATEMENTS_PER_SET = 8  # two sentences about four pairs of images
SENTENCES_PER_SET = 2
PAIRS_PER_SET = 4
MOST_TRIES = 4_000  # pairs drawn before a set gets other sentences
# Images of a split are used about once each; below this number there would be too few pairs to choose from.
SMALLEST_POOL = 400

STATEMENT_SHARES = {
    "left": 0.3,
    "right": 0.3,
    "either": 0.1,
    "both": 0.05,
    "same ground": 0.1,
    "number": 0.12,
    "same colour": 0.03,
}
CLAIM_SHARES = {"colour": 0.5, "ground": 0.3, "number": 0.12, "shape": 0.08}
SHOWS = ("shows", "has")
SHOW = ("show", "have")

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
    """A key drawn with probability proportional to its share."""
    level = draws.uniform(0, sum(shares.values()))
    for item, share in shares.items():
        level -= share
        if level < 0:
            return item
    return item  # level was the very end of the range


def say(words: Sequence[str], draws: Draws) -> str:
    """The usual word or, less often, a synonym, as in captions."""
    return words[0] if draws.chance(USUAL_SHARE) else draws.choice(words)


@dataclass(frozen=True)
class Claim:
    """A claim about a scene. None: nothing is claimed of it; colour and shape belong to one object."""

    colour: str | None = None
    shape: str | None = None
    ground: str | None = None
    number: int | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether it is true of a scene, whose objects and ground are all visible."""
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
        adjective = [] if self.colour is None else [say(vocabulary.COLOUR_WORDS[self.colour], draws)]
        return with_article(" ".join([*adjective, shape]))


KINDS = ("colour", "shape", "thing", "ground", "number")


def true_claim(kind: str, scene: Scene, draws: Draws) -> Claim:
    """A claim of a kind that is true of the scene; `thing` is a colour with a shape."""
    item = draws.choice(scene.objects)
    return {
        "colour": Claim(colour=item.colour),
        "shape": Claim(shape=item.shape),
        "thing": Claim(colour=item.colour, shape=item.shape),
        "ground": Claim(ground=scene.ground_colour),
        "number": Claim(number=len(scene.objects)),
    }[kind]


def any_claim(kind: str, draws: Draws) -> Claim:
    """A claim of a kind, every value equally likely."""
    colour, shape = draws.choice(COLOURS), draws.choice(SHAPES)
    return {
        "colour": Claim(colour=colour),
        "shape": Claim(shape=shape),
        "thing": Claim(colour=colour, shape=shape),
        "ground": Claim(ground=draws.choice(GROUND_COLOURS)),
        "number": Claim(number=1 + draws.whole(MOST_OBJECTS)),
    }[kind]


def false_claim(kind: str, scene: Scene, draws: Draws) -> Claim:
    """A claim of a kind that is false of the scene. Of a `thing`, either colour or shape may occur in it."""
    while True:
        claim = any_claim(kind, draws)
        if kind == "thing" and draws.chance(0.5):
            item = draws.choice(scene.objects)
            claim = replace(claim, colour=item.colour) if draws.chance(0.5) else replace(claim, shape=item.shape)
        if not claim.holds(scene):
            return claim


@dataclass(frozen=True)
class PairClaim:
    """What a statement says of a left and a right scene."""

    kind: str
    """left, right, either, both: where `claim` holds; same ground, same colour; more left, more right, same number (of
    objects)."""
    claim: Claim | None = None

    def holds(self, left: Scene, right: Scene) -> bool:
        if self.claim is not None:
            one, other = self.claim.holds(left), self.claim.holds(right)
            return {"left": one, "right": other, "either": one or other, "both": one and other}[self.kind]
        if self.kind == "same ground":
            return left.ground_colour == right.ground_colour
        if self.kind == "same colour":
            return not {item.colour for item in left.objects}.isdisjoint(item.colour for item in right.objects)
        more = len(left.objects) - len(right.objects)
        return {"more left": more > 0, "more right": more < 0, "same number": more == 0}[self.kind]

    def sentence(self, draws: Draws) -> str:
        """In lower case, without a full stop, like the captions."""
        image = draws.choice(("picture", "image"))
        if self.claim is not None:
            phrase = self.claim.phrase(draws)
            where = {
                "left": f"the left {image}",
                "right": f"the right {image}",
                "either": f"at least one {image}",
                "both": f"both {image}s",
            }[self.kind]
            if draws.chance(0.4):
                return f"there {'are' if self.claim.plural else 'is'} {phrase} in {where}"
            return f"{where} {say(SHOW if self.kind == 'both' else SHOWS, draws)} {phrase}"
        if self.kind == "same ground":
            return f"both {image}s {say(SHOW, draws)} the same ground colour"
        if self.kind == "same colour":
            return f"both {image}s {say(SHOW, draws)} a shape of the same colour"
        if self.kind == "same number":
            return f"both {image}s {say(SHOW, draws)} the same number of shapes"
        one, other = ("left", "right") if self.kind == "more left" else ("right", "left")
        if draws.chance(0.5):
            return f"the {one} {image} {say(SHOWS, draws)} more shapes than the {other} {image}"
        return f"the {other} {image} {say(SHOWS, draws)} fewer shapes than the {one} {image}"


@dataclass(frozen=True)
class StatementSet:
    claims: tuple[PairClaim, ...]
    sentences: tuple[str, ...]
    pairs: tuple[tuple[Scene, Scene], ...]

    def label(self, pair: int, sentence: int) -> bool:
        return self.claims[sentence].holds(*self.pairs[pair])


def sample_pair_claim(draws: Draws) -> PairClaim:
    kind = drawn(STATEMENT_SHARES, draws)
    if kind in ("left", "right", "either", "both"):
        return PairClaim(kind, any_claim(drawn(CLAIM_SHARES, draws), draws))
    return PairClaim(draws.choice(("more left", "more right", "same number")) if kind == "number" else kind)


def statement_sets(seed: int, split: str, statements: int) -> list[StatementSet]:
    """As many sets as make up `statements`, STATEMENTS_PER_SET each."""
    sets = statements // STATEMENTS_PER_SET
    pool = list(islice(task_scenes(seed, "nlvr2", split), max(SMALLEST_POOL, 2 * PAIRS_PER_SET * sets)))
    return [_sample_set(pool, seed, split, index) for index in range(sets)]


def _sample_set(pool: list[Scene], seed: int, split: str, index: int) -> StatementSet:
    attempt = 0
    while True:
        draws = Draws(seed, "nlvr2 statements", split, index, attempt)
        claims = tuple(sample_pair_claim(draws) for _ in range(SENTENCES_PER_SET))
        pairs: dict[tuple[bool, ...], tuple[Scene, Scene]] = {}
        for _ in range(MOST_TRIES):
            left, right = draws.choice(pool), draws.choice(pool)
            if left is right:
                continue
            pairs.setdefault(tuple(claim.holds(left, right) for claim in claims), (left, right))
            if len(pairs) == PAIRS_PER_SET:
                sentences = tuple(claim.sentence(draws) for claim in claims)
                return StatementSet(claims, sentences, tuple(draws.shuffled(list(pairs.values()))))
        attempt += 1
