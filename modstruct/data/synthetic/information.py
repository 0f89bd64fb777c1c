"""What caption and image of a built-in scene know about its factors, exactly, from the generator's probabilities.

The factors that an image shows can be read from it without error (no two of their values are drawn alike), and so can
those that a caption words; what remains is how often captions mention a thing, which data.scenes.told scales, and what
the split rule (splits.py) lets one factor tell about another. All of this is summed over the generator's choices, the
digits of the split rule and the random orders in which details compete for a caption's budget of words (captions.py);
nothing is sampled.
Samples of the training split are independent draws of exactly this distribution. In validation and test a scene or
caption that occurred before is drawn again, which is not modelled: it makes scenes of one object slightly rarer there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from modstruct.data.synthetic import captions
from modstruct.data.synthetic.factors import (
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
from modstruct.data.synthetic.splits import DIGITS, SPLIT_OF_DIGIT, SPLITS, digit_of

OBJECT_FACTORS = ("shape", "colour", "size", "fill")
"""Axes of `objects_of_a_split`; the first two are in every caption that tells all."""
BOTH = ("shape", "colour", "size", "fill", "place", "count", "ground_colour")
IMAGE_ONLY = ("ground_texture", "light")
CAPTION_ONLY = ("mood", "aside", "template")
TARGETS = (*BOTH, *IMAGE_ONLY, *CAPTION_ONLY)
"""Labels, by their names in a scene's record, whose information is known. The first five: of scenes of one object."""
PLACE_COST = captions.DETAIL_COST["place"]
SHORT_COST = captions.DETAIL_COST["fill"]
"""Of a fill or a size."""


def entropy(distribution: np.ndarray) -> float:
    """-sum p log p of a table of probabilities of any shape, in nats; 0 log 0 is 0."""
    known = distribution[distribution > 0]
    return float(-(known * np.log(known)).sum()) + 0.0  # no -0.0


def mutual_information(joint: np.ndarray) -> float:
    """I(X; Y) of p(x, y), (X, Y), in nats."""
    return max(0.0, entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint))


@dataclass(frozen=True)
class ExactInformation:
    """Of one label, in nats: H(Y), I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y); the most that an exactly aligned Z keeps.

    Differences of equal ones are 0, not what their sums rounded off.
    """

    entropy: float
    text: float
    image: float
    joint: float
    aligned: float

    @property
    def gap(self) -> float:
        """Delta_p, the right side of Theorem 3.1."""
        return round(abs(self.text - self.image), 12)

    @property
    def aligned_excess(self) -> float:
        """The smallest left side of Theorem 3.1 over exactly aligned features."""
        return max(0.0, round(self.joint - self.aligned, 12))


def split_of_scenes(metadata: Sequence[Mapping]) -> str | None:
    """The split if all records are of built-in scenes of one split, else None."""
    splits = {record.get("split") for record in metadata}
    known = len(splits) == 1 and splits <= set(SPLITS)
    return splits.pop() if known and all({*TARGETS, "wording_seed"} <= record.keys() for record in metadata) else None


def told_of_scenes(metadata: Sequence[Mapping]) -> float | None:
    """data.scenes.told of built-in scenes; None where the records do not agree. Without a `told`, captions tell all."""
    found = [record.get("told", 1.0) for record in metadata]
    known = isinstance(found[0], int | float) and 0 <= found[0] <= 1 and all(told == found[0] for told in found)
    return found[0] if known else None


def exact_information(label: str, split: str, told: float = 1.0) -> ExactInformation | None:
    """The exact values of a label of a split, or None if they are not derived here. told: of data.scenes."""
    if label not in TARGETS:
        return None
    if label in OBJECT_FACTORS:
        return _of_a_single_object(label, split, told)
    if label == "place":
        return _named_or_open(len(PLACES), _mention_share_of_a_single_object("places first", told))
    if label == "ground_colour":
        return _named_or_open(len(GROUND_COLOURS), ground_mention_share(split, told))
    if label in IMAGE_ONLY:
        whole = np.log(len({"ground_texture": GROUND_TEXTURES, "light": LIGHTS}[label]))
        return ExactInformation(whole, 0.0, whole, whole, 0.0)
    counts = count_shares(split)
    if label == "count":
        whole = entropy(counts)
        return ExactInformation(whole, whole, whole, whole, whole)
    if label == "template":  # an image knows of it what the number of objects tells
        shared = np.array(
            [[(t in templates_of(c)) / len(templates_of(c)) for t in TEMPLATES_OF_SEVERAL] for c in (1, 2)]
        )
        joint = counts[:, None] * shared[[0, 1, 1, 1]]
        whole, known = entropy(joint.sum(0)), mutual_information(joint)
        return ExactInformation(whole, whole, known, whole, known)
    if label == "mood":
        whole = np.log(len(MOODS))
    else:
        whole = entropy(np.array([PLAIN_SHARE] + [(1 - PLAIN_SHARE) / (len(ASIDES) - 1)] * (len(ASIDES) - 1)))
    return ExactInformation(whole, whole, 0.0, whole, 0.0)


def objects_of_a_split(split: str) -> np.ndarray:
    """p(shape, colour, size, fill) of the object of a scene of one object, (8, 8, 3, 4)."""
    digits = object_digits()
    kept = np.isin(digits, digits_of(split)).astype(float)
    return kept / kept.sum()


def captions_of_a_split(split: str, told: float = 1.0) -> np.ndarray:
    """p(mentioned shape, colour, size, fill; true ones) of scenes of one object; (9, 9, 4, 5, 8, 8, 3, 4).

    Mentioned: 0 if it is not, else 1 + its number. The budget of words never runs out on one object, so that
    mentions are independent.
    """
    detail = 1 - captions.left_out_share(told)
    mentions = [
        _mention_table(SHAPES, told),
        _mention_table(COLOURS, told),
        _mention_table(SIZES, detail, "medium"),
        _mention_table(FILLS, detail, "solid"),
    ]
    return np.einsum("as,bc,dz,ef,sczf->abdesczf", *mentions, objects_of_a_split(split), optimize=True)


def _of_a_single_object(label: str, split: str, told: float) -> ExactInformation:
    axis = OBJECT_FACTORS.index(label)
    joint = captions_of_a_split(split, told).sum(tuple(4 + other for other in range(4) if other != axis))
    whole, known = entropy(joint.sum((0, 1, 2, 3))), mutual_information(joint.reshape(-1, joint.shape[-1]))
    # Where a caption need mention nothing, every image is possible. Else shape and colour are what both always know.
    common = mutual_information(joint.sum((2, 3)).reshape(-1, joint.shape[-1])) if told == 1 else 0.0
    return ExactInformation(whole, known, whole, whole, common)


def _named_or_open(values: int, mentioned: float) -> ExactInformation:
    """Of a uniform factor, independent of all others, that a caption names or leaves open."""
    whole = float(np.log(values))
    return ExactInformation(whole, mentioned * whole, whole, whole, 0.0)


def _mention_share_of_a_single_object(needing: str, told: float) -> float:
    """Share of captions with a detail that one template requires and that is otherwise left out at random."""
    mentioned = 1 - captions.left_out_share(told)
    return sum(1.0 if template == needing else mentioned for template in TEMPLATES) / len(TEMPLATES)


def _mention_table(values: Sequence[str], share: float, unremarkable: str | None = None) -> np.ndarray:
    """p(mentioned as | value), (1 + values, values)."""
    mentioned = np.array([share * (1 - captions.UNSAID_SHARE * (value == unremarkable)) for value in values])
    return np.vstack([1 - mentioned, np.diag(mentioned)])


def count_shares(split: str) -> np.ndarray:
    """p(number of objects), (4,): the split rule shifts the generator's shares a little."""
    shares = np.array([sum(_contents(count, split).values()) for count in _counts()]) * COUNT_SHARES
    return shares / shares.sum()


def ground_mention_share(split: str, told: float = 1.0) -> float:
    """Share of a split's captions that mention the colour of the ground."""
    mentioned, detail = 0.0, 1 - captions.left_out_share(told)
    for count, share in zip(_counts(), count_shares(split), strict=True):
        contents = _contents(count, split)
        whole = sum(contents.values())
        for (of_main, of_others), weight in contents.items():
            for template in templates_of(count):
                for aside, aside_share in ((False, PLAIN_SHARE), (True, 1 - PLAIN_SHARE)):
                    given = _ground_mentioned(detail, template, aside, count, of_main, of_others)
                    mentioned += share * weight / whole * aside_share * given / len(templates_of(count))
    return mentioned


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
    """Probability of being in the split with so many fills and sizes to mention.

    By (number of the main object, number of all others).
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
    """p(digit, number of fills and sizes that may be mentioned) of an object, its size drawn from sizes; (10, 3)."""
    table = np.zeros((DIGITS, 3))
    digits = object_digits()
    for size in sizes:
        for fill_number, fill in enumerate(FILLS):
            shares = np.bincount(digits[:, :, SIZES.index(size), fill_number].ravel(), minlength=DIGITS)
            open_share = np.array([1.0])  # by number of details to mention
            for value, unremarkable in ((fill, "solid"), (size, "medium")):
                left = captions.UNSAID_SHARE if value == unremarkable else 0.0
                open_share = np.convolve(open_share, [left, 1 - left])
            table += shares[:, None] * open_share
    return table / table.sum()


def _summed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """p(digit, number) of the sum of two independent variables, digits modulo 10."""
    result = np.zeros((DIGITS, a.shape[1] + b.shape[1] - 1))
    for i in range(DIGITS):
        for j in range(DIGITS):
            result[(i + j) % DIGITS] += np.convolve(a[i], b[j])
    return result


@lru_cache
def _ground_mentioned(share: float, template: str, aside: bool, count: int, of_main: int, of_others: int) -> float:
    """P(ground is mentioned), given how many fills and sizes may be, of the main object and of the others.

    share: of the details that are mentioned where there is room.
    """
    if template == "ground first":
        return 1.0
    left = captions.WORD_BUDGET - captions.MOOD_COST - captions.NAME_COST * count
    left -= captions.FRAME_COST.get(template, 0) + captions.ASIDE_COST * aside
    if template not in ("places first", "related"):
        return _after_main(share, 1, of_main, count - 1, of_others, left)
    if template == "places first":
        left -= captions.DETAIL_COST["place"]
    # The place of the object named first is not optional: it is mentioned, or a relation replaces it.
    main_first = _after_main(share, 0, of_main, count - 1, of_others, left)
    other_first = _after_main(share, 1, of_main, count - 2, of_others, left) if count > 1 else 0.0
    return main_first / count + other_first * (count - 1) / count


@lru_cache
def _after_main(share: float, places: int, short: int, other_places: int, other_short: int, left: int) -> float:
    """P(ground is mentioned) over random orders, from where the main object's details are chosen.

    places, short: details of the main object still to come; short: fills and sizes. left: words of the budget.
    """
    if places + short == 0:
        return _ground_among(share, other_places, other_short, left)
    total = 0.0
    for number, cost, to_come in ((places, PLACE_COST, (places - 1, short)), (short, SHORT_COST, (places, short - 1))):
        if number:
            follows = partial(_after_main, share, *to_come, other_places, other_short)
            total += number * _mentioned_or_not(share, cost, left, follows)
    return total / (places + short)


@lru_cache
def _ground_among(share: float, places: int, short: int, left: int) -> float:
    """The same among the details of the other objects, among which the ground is shuffled."""
    total = share if captions.DETAIL_COST["ground"] <= left else 0.0
    for number, cost, to_come in ((places, PLACE_COST, (places - 1, short)), (short, SHORT_COST, (places, short - 1))):
        if number:
            total += number * _mentioned_or_not(share, cost, left, partial(_ground_among, share, *to_come))
    return total / (places + short + 1)


def _mentioned_or_not(share: float, cost: int, left: int, follows: Callable[[int], float]) -> float:
    """Mean of follows(words left) over whether a detail is mentioned."""
    if cost > left:
        return follows(left)
    return share * follows(left - cost) + (1 - share) * follows(left)
