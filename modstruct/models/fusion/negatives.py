"""Hard negatives of image-text matching: for each text a wrong image, for each image a wrong text.

A candidate is drawn with probability proportional to exp(similarity / temperature), as in ALBEF (Li et al. 2021,
section 3.2), but from the pairs of all processes, never a positive (see `_Pairs`), and by a random
number that depends on the seed and on the row's place in the data: neither on the process nor on their number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.data.transforms.augment import sample_seed

NONE = -1
"""In place of a negative where every candidate is a positive."""
NUMBERS_AT_ONCE = 1 << 22
"""Similarities in float64 that are in memory together: of some rows, with all candidates."""


@torch.no_grad()
def hard_negatives(
    rows: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    slots: Tensor,
    seed: int,
    of: Literal["image", "text"],
    scope: Literal["global", "local"] = "global",
) -> Tensor:
    """The row of the global batch that each of this process's rows takes as its negative, (B,) int64, or NONE.

    rows: (B, D), unit norm, of one modality; candidates: (B, D) of the other, this process's. image_ids, text_ids:
    (B,), equal where two pairs have the same image or the same caption. slots: (B,), places in the data. of: modality
    of the candidates. scope: `local` takes candidates of this process alone.
    """
    first = distributed.rank() * len(rows)
    if scope == "global":
        candidates, image_ids_of, text_ids_of = map(distributed.gather, (candidates, image_ids, text_ids))
        first = 0
    else:
        image_ids_of, text_ids_of = image_ids, text_ids
    own, own_of, other_of = (
        (text_ids, text_ids_of, image_ids_of) if of == "image" else (image_ids, image_ids_of, text_ids_of)
    )
    pairs, candidates = _Pairs(own_of, other_of), candidates.double()
    aims = sample_seed(seed, 0, slots, of).double() / 2**63
    at_once = max(1, NUMBERS_AT_ONCE // len(candidates))
    parts = zip(*(each.split(at_once) for each in (rows, own, aims)), strict=True)
    found = [_draw(some, candidates, logit_scale, pairs.positive(ids), aim) for some, ids, aim in parts]
    found = torch.cat(found)
    return torch.where(found == NONE, found, found + first)


def _draw(rows: Tensor, candidates: Tensor, logit_scale: Tensor, positive: Tensor, aims: Tensor) -> Tensor:
    """The candidate of each row (b, D), (b,), or NONE.

    candidates: (N, D) float64. positive: (b, N), the ones left out. aims: (b,), in [0, 1), which decide.
    """
    logits = (rows.double() @ candidates.T) * logit_scale.double()
    logits = logits.masked_fill(positive, -torch.inf)
    best = logits.max(dim=1, keepdim=True).values
    weights = (logits - best).exp().nan_to_num(0.0)  # a row without a candidate: -inf less -inf
    sums = weights.cumsum(dim=1)
    total = sums[:, -1:]
    # The first place whose sum is above the aim; its own weight is above 0, so it is never a positive.
    chosen = torch.searchsorted(sums, aims[:, None] * total, right=True).clamp(max=logits.shape[1] - 1).squeeze(1)
    sound = weights.gather(1, chosen[:, None]).squeeze(1) > 0
    chosen = torch.where(sound, chosen, weights.argmax(dim=1))  # rounding at the very end of the sums
    return torch.where(total.squeeze(1) > 0, chosen, NONE)


class _Pairs:
    """The pairs of the batch as (own content, content of the candidates' modality), each by its id: two times (N,)."""

    def __init__(self, own_of: Tensor, other_of: Tensor):
        # An id's place among the sorted ones stands for it, so that two of them make one number.
        self.own_sorted = own_of.sort().values
        self.other = torch.searchsorted(other_of.sort().values, other_of)
        self.pairs = self._number(own_of, self.other).sort().values

    def positive(self, own: Tensor) -> Tensor:
        """Where a row, by its own id (b,), and a candidate belong together, (b, N).

        Some pair of the batch has the row's content and the candidate's, be it the row's own pair, the candidate's, or
        a third one that shares a caption with the one and an image with the other. Every own id occurs among the
        pairs'.
        """
        wanted = self._number(own[:, None], self.other)
        places = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        return self.pairs[places] == wanted

    def _number(self, own: Tensor, other: Tensor) -> Tensor:
        return torch.searchsorted(self.own_sorted, own) * len(self.own_sorted) + other
