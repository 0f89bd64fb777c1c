"""Statements about two scenes, true or false (in the manner of NLVR2).

A set has two sentences and four pairs of scenes, one pair for each combination of their truth. So every sentence is
true of two pairs and false of two, neither sentence tells the label of the other, and consistency (right about a
sentence for all of its pairs) means something. The words alone give exactly one half.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count as endless
from itertools import islice

from modstruct.data.synthetic.factors import Draws, Scene
from modstruct.data.synthetic.tasks.claims import Claim, any_claim, drawn, say, task_scenes
from modstruct.data.synthetic.tasks.sizes import STATEMENTS_PER_SET

SENTENCES_PER_SET = 2
PAIRS_PER_SET = 4
MOST_TRIES = 4_000  # pairs looked at before a set gets other sentences
# Images of a split are used about once each; below this number there would be too few pairs to choose from.
SMALLEST_POOL = 400

KIND_SHARES = {
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


@dataclass(frozen=True)
class PairClaim:
    """What a statement says of a left and a right scene."""

    kind: str
    """left, right, either, both: where `claim` holds; same ground, same colour: a sameness; more left, more right,
    same number: a comparison of how many objects they have."""
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
        picture = draws.choice(("picture", "image"))
        if self.claim is not None:
            phrase = self.claim.phrase(draws)
            where = {
                "left": f"the left {picture}",
                "right": f"the right {picture}",
                "either": f"at least one {picture}",
                "both": f"both {picture}s",
            }[self.kind]
            if draws.chance(0.4):
                return f"there {'are' if self.claim.plural else 'is'} {phrase} in {where}"
            return f"{where} {say(SHOW if self.kind == 'both' else SHOWS, draws)} {phrase}"
        if self.kind == "same ground":
            return f"both {picture}s {say(SHOW, draws)} the same ground colour"
        if self.kind == "same colour":
            return f"both {picture}s {say(SHOW, draws)} a shape of the same colour"
        if self.kind == "same number":
            return f"both {picture}s {say(SHOW, draws)} the same number of shapes"
        one, other = ("left", "right") if self.kind == "more left" else ("right", "left")
        if draws.chance(0.5):
            return f"the {one} {picture} {say(SHOWS, draws)} more shapes than the {other} {picture}"
        return f"the {other} {picture} {say(SHOWS, draws)} fewer shapes than the {one} {picture}"


@dataclass(frozen=True)
class StatementSet:
    claims: tuple[PairClaim, ...]
    sentences: tuple[str, ...]
    pairs: tuple[tuple[Scene, Scene], ...]

    def label(self, pair: int, sentence: int) -> bool:
        return self.claims[sentence].holds(*self.pairs[pair])


def sample_pair_claim(draws: Draws) -> PairClaim:
    kind = drawn(KIND_SHARES, draws)
    if kind in ("left", "right", "either", "both"):
        return PairClaim(kind, any_claim(drawn(CLAIM_SHARES, draws), draws))
    return PairClaim(draws.choice(("more left", "more right", "same number")) if kind == "number" else kind)


def statement_sets(seed: int, split: str, count: int) -> list[StatementSet]:
    """count: statements in all, STATEMENTS_PER_SET a set."""
    sets = count // STATEMENTS_PER_SET
    pool = list(islice(task_scenes(seed, "nlvr2", split), max(SMALLEST_POOL, 2 * PAIRS_PER_SET * sets)))
    return [_sample_set(pool, seed, split, index) for index in range(sets)]


def _sample_set(pool: list[Scene], seed: int, split: str, index: int) -> StatementSet:
    for attempt in endless():
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
                return StatementSet(claims, sentences, tuple(draws.shuffled(pairs.values())))
