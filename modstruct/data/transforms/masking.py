"""Masked tokens of captions for masked language modelling, drawn from each sample's own seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modstruct.data.tokenizers import Tokenizer

IGNORED = -100
"""Label of tokens that are not predicted; what torch's cross entropy leaves out."""
MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the others stay (Devlin et al. 2019, section 3.1)


def mask_tokens(ids: Tensor, seeds: Sequence[int], rate: float, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Captions (B, L) with some tokens masked, and the labels (B, L): the true id where one was chosen, else IGNORED.

    Each token but the start and padding is chosen with probability `rate`, as in ALBEF's code; of the chosen, 80 %
    become the mask token, 10 % any id of the vocabulary, 10 % stay. seeds: one for each caption.
    """
    tokens = ids.numpy()
    length = tokens.shape[1]
    draws = _uniform(np.array(seeds, dtype=np.uint64)[:, None], 3 * length).reshape(len(tokens), 3, length)
    chosen = (draws[:, 0] < rate) & (tokens != tokenizer.padding_id)
    chosen[:, 0] = False
    kind = draws[:, 1]
    other = np.minimum((draws[:, 2] * tokenizer.vocab_size).astype(np.int64), tokenizer.vocab_size - 1)
    masked = np.where(chosen & (kind < MASKED), tokenizer.mask_id, tokens)
    masked = np.where(chosen & (kind >= MASKED) & (kind < MASKED + REPLACED), other, masked)
    return torch.from_numpy(masked), torch.from_numpy(np.where(chosen, tokens, IGNORED))


def masked_places(labels: Tensor) -> Tensor:
    """Row and column of every masked token, (M, 2), row by row, of labels (B, L). Waits for the GPU."""
    return (labels != IGNORED).nonzero()


def _uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """(B, count) numbers in [0, 1) that depend on the seeds (B, 1) alone: splitmix64 (Steele et al. 2014)."""
    state = seeds + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
