"""What caption and image of a built-in scene know about its factors, exactly, from the generator's probabilities.

The factors an image shows are read from it without doubt (no two of their values are drawn alike), and so are those
that a caption words; what remains is how often captions mention a thing, and what the split rule (splits.py) lets one
factor tell of another. All of that is summed here over the generator's choices; nothing is sampled.
The samples of the training split are independent draws of exactly this distribution. In validation and test a scene or
caption that came before is drawn anew, which this does not follow: it makes scenes of one object a little rarer there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modstruct.data.synthetic import captions
from modstruct.data.synthetic.factors import (
    ASIDES,
    FILLS,
    GROUND_COLOURS,
    GROUND_TEXTURES,
    LIGHTS,
    MOODS,
    PLACES,
    PLAIN_SHARE,
    SIZES,
    TEMPLATES,
    TEMPLATES_OF_SEVERAL,
)
from modstruct.data.synthetic.splits import SPLITS
from modstruct.evaluation.information.discrete import entropy, mutual_information
from modstruct.evaluation.information.scene_mentions import (
    SAID_SHARE,
    count_shares,
    digits_of,
    ground_said_share,
    object_digits,
    templates_of,
)

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
    if label == "template":  # an image tells of it what the number of objects tells
        shared = np.array(
            [[(t in templates_of(c)) / len(templates_of(c)) for t in TEMPLATES_OF_SEVERAL] for c in (1, 2)]
        )
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
    digits = object_digits()
    kept = np.isin(digits, digits_of(split)).astype(float)
    return kept / kept.sum()


def captions_of_a_split(split: str) -> np.ndarray:
    """p(size as said, fill as said, shape, colour, size, fill) of scenes of one object; (4, 5, 8, 8, 3, 4).

    As said: 0 where it is not mentioned, else 1 + its number. The budget of words never runs out on one object, so
    that each is mentioned or not whatever else is.
    """
    size, fill = _said("medium", SIZES), _said("solid", FILLS)  # (said, true)
    return np.einsum("az,bf,sczf->absczf", size, fill, objects_of_a_split(split))


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
