"""What caption and picture of a built-in scene know about its factors, exactly, from the generator's probabilities.

The factors a picture shows are read from it without doubt (no two of their values are drawn alike), and so are those
that a caption words; what remains is how often captions mention a thing, and what the split rule (splits.py) lets one
factor tell of another. All of that is summed here over the generator's choices; nothing is sampled.
The samples of the training split are independent draws of exactly this distribution. In validation and test a scene or
caption that came before is drawn anew, which this does not follow: it makes scenes of one object a little rarer there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from modstruct.data.scenes import captions
from modstruct.data.scenes.factors import (
    ASIDES,
    COLOURS,
    COUNT_SHARES,
    FILLS,
    GROUND_COLOURS,
    GROUND_TEXTURES,
    LIGHTS,
    MOODS,
    PLACES,
    PLAIN_SHARE,
    SHAPES,
    SIZES,
    TEMPLATES,
    TEMPLATES_OF_SEVERAL,
)
from modstruct.data.scenes.splits import DIGITS, SPLIT_OF_DIGIT, SPLITS, digit_of
from modstruct.evaluation.information.discrete import entropy, mutual_information

SAID_SHARE = 1 - captions.LEFT_OUT_SHARE
OBJECT_FACTORS = ("shape", "colour", "size", "fill")
"""Axes of `objects_of_a_split`; the first two are in every caption."""
BOTH = ("shape", "colour", "size", "fill", "place", "count", "ground_colour")
PICTURE_ONLY = ("ground_texture", "light")
CAPTION_ONLY = ("mood", "aside", "template")
TARGETS = (*BOTH, *PICTURE_ONLY, *CAPTION_ONLY)
"""Labels, by their names in a scene's record, whose values are known. The first five: of scenes of one object."""


@dataclass(frozen=True)
class ExactInformation:
    """Of one label, in nats: H(Y), I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y), and the most an exactly aligned Z can keep."""

    entropy: float
    text: float
    image: float
    joint: float
    aligned: float

    @property
    def gap(self) -> float:
        """Delta_p, the right side of Theorem 3.1."""
        return abs(self.text - self.image)

    @property
    def aligned_excess(self) -> float:
        """The least left side of Theorem 3.1 that exactly aligned features reach."""
        return self.joint - self.aligned


def split_of_scenes(metadata: Sequence[Mapping]) -> str | None:
    """The split if these are records of built-in scenes, all of one split, else None."""
    splits = {record.get("split") for record in metadata}
    known = len(splits) == 1 and splits <= set(SPLITS)
    return splits.pop() if known and all({*TARGETS, "wording_seed"} <= record.keys() for record in metadata) else None


def exact_information(label: str, split: str) -> ExactInformation | None:
    """The exact values of a label of a split, or None for a label whose values are not derived here."""
    if label not in TARGETS:
        return None
    if label in ("shape", "colour", "size", "fill"):
        return _of_a_single_object(label, split)
    if label == "place":
        return _told_or_not(len(PLACES), _said_of_a_single_object("places first"))
    if label == "ground_colour":
        return _told_or_not(len(GROUND_COLOURS), ground_said_share(split))
    if label in PICTURE_ONLY:
        whole = np.log(len({"ground_texture": GROUND_TEXTURES, "light": LIGHTS}[label]))
        return ExactInformation(whole, 0.0, whole, whole, 0.0)
    counts = count_shares(split)
    if label == "count":
        whole = entropy(counts)
        return ExactInformation(whole, whole, whole, whole, whole)
    if label == "template":  # a picture tells of it what the number of objects tells
        shared = np.array([[(t in _templates(c)) / len(_templates(c)) for t in TEMPLATES_OF_SEVERAL] for c in (1, 2)])
        joint = counts[:, None] * shared[[0, 1, 1, 1]]
        whole, told = entropy(joint.sum(0)), mutual_information(joint)
        return ExactInformation(whole, whole, told, whole, told)
    if label == "mood":
        whole = np.log(len(MOODS))
    else:
        whole = entropy(np.array([PLAIN_SHARE] + [(1 - PLAIN_SHARE) / (len(ASIDES) - 1)] * (len(ASIDES) - 1)))
    return ExactInformation(whole, whole, 0.0, whole, 0.0)


def objects_of_a_split(split: str) -> np.ndarray:
    """p(shape, colour, size, fill) of the object of a scene of one object, (8, 8, 3, 4)."""
    digits = _digits()
    kept = np.isin(digits, _digits_of(split)).astype(float)
    return kept / kept.sum()


def captions_of_a_split(split: str) -> np.ndarray:
    """p(size as said, fill as said, shape, colour, size, fill) of scenes of one object; (4, 5, 8, 8, 3, 4).

    As said: 0 where it is not mentioned, else 1 + its number. The budget of words never runs out on one object, so
    that each is mentioned or not whatever else is.
    """
    size, fill = _said("medium", SIZES), _said("solid", FILLS)  # (said, true)
    return np.einsum("az,bf,sczf->absczf", size, fill, objects_of_a_split(split))


def count_shares(split: str) -> np.ndarray:
    """p(number of objects), (4,): the split rule shifts the generator's shares a little."""
    shares = np.array([sum(_contents(count, split).values()) for count in _counts()]) * COUNT_SHARES
    return shares / shares.sum()


def ground_said_share(split: str) -> float:
    """How often captions of a split mention the colour of the ground."""
    said = 0.0
    for count, share in zip(_counts(), count_shares(split), strict=True):
        contents = _contents(count, split)
        whole = sum(contents.values())
        for (of_main, of_others), weight in contents.items():
            for template in _templates(count):
                for aside, aside_share in ((False, PLAIN_SHARE), (True, 1 - PLAIN_SHARE)):
                    told = _ground_said(template, aside, count, of_main, of_others)
                    said += share * weight / whole * aside_share * told / len(_templates(count))
    return said


def _of_a_single_object(label: str, split: str) -> ExactInformation:
    joint = captions_of_a_split(split)
    axis = 2 + OBJECT_FACTORS.index(label)
    whole = entropy(joint.sum(tuple(a for a in range(6) if a != axis)))
    if label in OBJECT_FACTORS[:2]:
        return ExactInformation(whole, whole, whole, whole, whole)
    joint = joint.sum(9 - axis)  # the other one of size and fill, as it is
    told = mutual_information(joint.reshape(-1, joint.shape[-1]))
    # Where neither is said every size and fill is possible: shape and colour are all that both always know.
    common = mutual_information(joint.sum((0, 1)).reshape(-1, joint.shape[-1]))
    return ExactInformation(whole, told, whole, whole, common)


def _told_or_not(values: int, said: float) -> ExactInformation:
    """Of a uniform factor that no other one tells of, and a caption that names it or leaves it open."""
    whole = float(np.log(values))
    return ExactInformation(whole, said * whole, whole, whole, 0.0)


def _said_of_a_single_object(needing: str) -> float:
    """How often a detail is mentioned that one template needs and that is otherwise left out only by chance."""
    return sum(1.0 if template == needing else SAID_SHARE for template in TEMPLATES) / len(TEMPLATES)


def _said(unremarkable: str, values: Sequence[str]) -> np.ndarray:
    """p(said | value), (1 + values, values)."""
    said = np.array([SAID_SHARE * (1 - captions.UNSAID_SHARE * (value == unremarkable)) for value in values])
    return np.vstack([1 - said, np.diag(said)])


def _digits() -> np.ndarray:
    """Digit of each object by shape, colour, size and fill, (8, 8, 3, 4)."""
    objects = [(s, c, z, f) for s in SHAPES for c in COLOURS for z in SIZES for f in FILLS]
    return np.array([digit_of([o]) for o in objects]).reshape(len(SHAPES), len(COLOURS), len(SIZES), len(FILLS))


def _digits_of(split: str) -> list[int]:
    return [digit for digit in range(DIGITS) if SPLIT_OF_DIGIT[digit] == split]


def _counts() -> range:
    return range(1, len(COUNT_SHARES) + 1)


def _templates(count: int) -> Sequence[str]:
    return TEMPLATES if count == 1 else TEMPLATES_OF_SEVERAL


@lru_cache
def _contents(count: int, split: str) -> dict[tuple[int, int], float]:
    """Probability, before the split is chosen, of being in it with so many fills and sizes to mention.

    By (those of the main object, those of all others).
    """
    kept = _digits_of(split)
    shares: dict[tuple[int, int], float] = {}
    main_sizes = SIZES if count == 1 else SIZES[1:]
    for main_size in main_sizes:
        others = np.zeros((DIGITS, 1))
        others[0, 0] = 1.0
        for _ in range(count - 1):
            others = _summed(others, _details(SIZES[: SIZES.index(main_size)]))
        main = _details([main_size])
        for of_main in range(main.shape[1]):
            column = _summed(main[:, of_main : of_main + 1], others)[kept].sum(0)
            for of_others, share in enumerate(column):
                key = (of_main, of_others)
                shares[key] = shares.get(key, 0.0) + share / len(main_sizes)
    return shares


def _details(sizes: Sequence[str]) -> np.ndarray:
    """p(digit, number of fills and sizes that could be mentioned) of an object, its size drawn from sizes; (10, 3)."""
    table = np.zeros((DIGITS, 3))
    digits = _digits()
    for size in sizes:
        for fill_number, fill in enumerate(FILLS):
            shares = np.bincount(digits[:, :, SIZES.index(size), fill_number].ravel(), minlength=DIGITS)
            open_share = np.array([1.0])  # of so many details to mention
            for value, unremarkable in ((fill, "solid"), (size, "medium")):
                left = captions.UNSAID_SHARE if value == unremarkable else 0.0
                open_share = np.convolve(open_share, [left, 1 - left])
            table += shares[:, None] * open_share
    return table / table.sum()


def _summed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """p(digit, number) of the sum of two independent ones: digits modulo 10."""
    result = np.zeros((DIGITS, a.shape[1] + b.shape[1] - 1))
    for i in range(DIGITS):
        for j in range(DIGITS):
            result[(i + j) % DIGITS] += np.convolve(a[i], b[j])
    return result


@lru_cache
def _ground_said(template: str, aside: bool, count: int, of_main: int, of_others: int) -> float:
    """How often the ground is mentioned, given how many fills and sizes could be, of the main object and of others."""
    if template == "ground first":
        return 1.0
    left = captions.WORD_BUDGET - captions.MOOD_COST - captions.NAME_COST * count
    left -= captions.FRAME_COST.get(template, 0) + captions.ASIDE_COST * aside
    if template not in ("places first", "related"):
        return _after_main(1, of_main, count - 1, of_others, left)
    if template == "places first":
        left -= captions.DETAIL_COST["place"]
    # The place of the object named first is no detail to choose: it is mentioned, or a relation stands for it.
    main_first = _after_main(0, of_main, count - 1, of_others, left)
    other_first = _after_main(1, of_main, count - 2, of_others, left) if count > 1 else 0.0
    return main_first / count + other_first * (count - 1) / count


@lru_cache
def _after_main(places: int, short: int, other_places: int, other_short: int, left: int) -> float:
    """Share of orders in which the ground is mentioned, from where the main object's details are chosen.

    places, short: of the main object, still to come; short: fills and sizes. left: words of the budget.
    """
    if places + short == 0:
        return _ground_among(other_places, other_short, left)
    return _next(
        (
            places,
            captions.DETAIL_COST["place"],
            lambda now: _after_main(places - 1, short, other_places, other_short, now),
        ),
        (
            short,
            captions.DETAIL_COST["fill"],
            lambda now: _after_main(places, short - 1, other_places, other_short, now),
        ),
        left,
    ) / (places + short)


@lru_cache
def _ground_among(places: int, short: int, left: int) -> float:
    """The same among the details of the other objects, with which the ground is shuffled."""
    own = SAID_SHARE if captions.DETAIL_COST["ground"] <= left else 0.0
    return (
        own
        + _next(
            (places, captions.DETAIL_COST["place"], lambda now: _ground_among(places - 1, short, now)),
            (short, captions.DETAIL_COST["fill"], lambda now: _ground_among(places, short - 1, now)),
            left,
        )
    ) / (places + short + 1)


def _next(places, short, left: int) -> float:
    """Sum, over the details that may be next, of what follows whether it is mentioned or left out."""
    total = 0.0
    for number, cost, follows in (places, short):
        if number:
            said = SAID_SHARE if cost <= left else 0.0
            total += number * ((1 - said) * follows(left) + (said * follows(left - cost) if said else 0.0))
    return total
