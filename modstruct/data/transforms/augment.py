"""The two views of a pair: the plain one, which is embedded, and the augmented one.

All randomness of a view comes from one integer seed, which `sample_seed` derives from (seed, epoch, sample): the view
is the same on every process, in every loader worker, before and after a resume.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import overload

import numpy as np
from torch import Tensor

from modstruct.config import ViewsConfig
from modstruct.data.transforms.image_views import ImageViews
from modstruct.data.transforms.text_views import EasyDataAugmentation

BITS = 63  # a seed must fit the signed 64-bit integers of torch and numpy
MASK = (1 << BITS) - 1


class Views(ImageViews):
    """Makes the plain, the augmented and the evaluation view of images and captions; pickles to loader workers."""

    def __init__(self, config: ViewsConfig, image_size: int):
        """As ImageViews. Raises ValueError if WordNet is needed and missing, too."""
        super().__init__(config, image_size)
        self.text_field = config.text_field
        """The field of KEY.json that augmented captions come from, instead of `augmented_text`; None for EDA."""
        self._change = EasyDataAugmentation(config.eda_rate, synonyms=config.eda_synonyms)

    def plain_text(self, text: str) -> str:
        """The caption as it is."""
        return text

    def augmented_text(self, text: str, seed: int) -> str:
        """The caption after one operation of EDA, drawn from seed."""
        return self._change(text, seed)


@cache
def _number(salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest())


@overload
def sample_seed(seed: int, epoch: int, sample: int, salt: int | str) -> int: ...
@overload
def sample_seed(seed: int, epoch: np.ndarray, sample: np.ndarray, salt: int | str) -> np.ndarray: ...
@overload
def sample_seed(seed: int, epoch: int, sample: Tensor, salt: int | str) -> Tensor: ...
def sample_seed(seed, epoch, sample, salt):
    """The seed of one draw for one sample: an integer in [0, 2**63), the same on every machine.

    Arrays of epochs and samples give an array of seeds, each that of its own pair, in uint64; an int64 tensor of
    samples gives an int64 tensor on its device.
    salt: names a draw of the sample ("image", "text"). Each step of the chain is a bijection of 63-bit integers
    (the finisher of splitmix64, Steele et al. 2014, in 63 bits), so two calls that differ in one integer never collide.
    """
    if isinstance(salt, str):
        salt = _number(salt) & MASK
    # Products are taken modulo 2**64 in arrays and tensors, and only then modulo 2**63: the same.
    epoch, sample = (part.astype(np.uint64) if isinstance(part, np.ndarray) else part for part in (epoch, sample))
    state = 0
    for part in (seed, epoch, sample, salt):
        state = (state + 0x1E3779B97F4A7C15 + part) & MASK
        state = ((state ^ (state >> 30)) * 0x3F58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x14D049BB133111EB) & MASK
        state = state ^ (state >> 31)
    return state
