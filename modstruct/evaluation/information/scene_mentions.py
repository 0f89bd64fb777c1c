"""How many objects the scenes of a split have, and how often captions mention the ground: exactly, from the generator.

Summed over digits of the split rule (splits.py), details that a caption could mention, and their random orders against
its budget of words (captions.py); nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from modstruct.data.synthetic import captions
from modstruct.data.synthetic.factors import (
    COLOURS,
    COUNT_SHARES,
    FILLS,
    PLAIN_SHARE,
    SHAPES,
    SIZES,
    TEMPLATES,
    TEMPLATES_OF_SEVERAL,
)
from modstruct.data.synthetic.splits import DIGITS, SPLIT_OF_DIGIT, digit_of

SAID_SHARE = 1 - captions.LEFT_OUT_SHARE
PLACE_COST = captions.DETAIL_COST["place"]
SHORT_COST = captions.DETAIL_COST["fill"]
"""Of a fill or a size."""


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
            for template in templates_of(count):
                for aside, aside_share in ((False, PLAIN_SHARE), (True, 1 - PLAIN_SHARE)):
                    told = _ground_said(template, aside, count, of_main, of_others)
                    said += share * weight / whole * aside_share * told / len(templates_of(count))
    return said


def object_digits() -> np.ndarray:
    """Digit of each object by shape, colour, size and fill, (8, 8, 3, 4)."""
    objects = [(s, c, z, f) for s in SHAPES for c in COLOURS for z in SIZES for f in FILLS]
    return np.array([digit_of([o]) for o in objects]).reshape(len(SHAPES), len(COLOURS), len(SIZES), len(FILLS))


def digits_of(split: str) -> list[int]:
    return [digit for digit in range(DIGITS) if SPLIT_OF_DIGIT[digit] == split]


def _counts() -> range:
    return range(1, len(COUNT_SHARES) + 1)


def templates_of(count: int) -> Sequence[str]:
    return TEMPLATES if count == 1 else TEMPLATES_OF_SEVERAL


@lru_cache
def _contents(count: int, split: str) -> dict[tuple[int, int], float]:
    """Probability, before the split is chosen, of being in it with so many fills and sizes to mention.

    By (those of the main object, those of all others).
    """
    kept = digits_of(split)
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
    digits = object_digits()
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
    total = 0.0
    for number, cost, to_come in ((places, PLACE_COST, (places - 1, short)), (short, SHORT_COST, (places, short - 1))):
        if number:
            total += number * _mentioned_or_not(cost, left, partial(_after_main, *to_come, other_places, other_short))
    return total / (places + short)


@lru_cache
def _ground_among(places: int, short: int, left: int) -> float:
    """The same among the details of the other objects, with which the ground is shuffled."""
    total = SAID_SHARE if captions.DETAIL_COST["ground"] <= left else 0.0
    for number, cost, to_come in ((places, PLACE_COST, (places - 1, short)), (short, SHORT_COST, (places, short - 1))):
        if number:
            total += number * _mentioned_or_not(cost, left, partial(_ground_among, *to_come))
    return total / (places + short + 1)


def _mentioned_or_not(cost: int, left: int, follows: Callable[[int], float]) -> float:
    """The mean of follows(words left) over whether a detail is mentioned."""
    if cost > left:
        return follows(left)
    return SAID_SHARE * follows(left - cost) + (1 - SAID_SHARE) * follows(left)
