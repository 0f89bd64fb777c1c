"""What `evaluate.py embed` makes of each set, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from modstruct.errors import require


@dataclass
class EmbeddingConfig:
    arrays: list[str] = field(default_factory=lambda: ["image", "text"])
    """What is written of each image and text: image and text (the shared embeddings); image_features, text_features
    (before the projection); image_projected, text_projected (after it, before normalisation); image_independent,
    text_independent (of the independent heads); image_augmented (of one augmented view an image). `all`: what the
    model has."""
    dtype: Literal["float16", "float32"] = "float16"
    """Kind of number written. float16 takes half the disk and the time to read it; of a unit vector of 512 numbers it
    moves an inner product by 1.5e-5 (root mean square, measured), which changes the order of near ties alone."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the model computes in, by autocast. fp16 needs a GPU."""
    batch: int = 256
    """Images or texts embedded at once by each process."""
    part_batches: int = 16
    """Batches of a part: so much is lost at most, of each process, when it is stopped."""
    workers: int = 1
    """Loader processes beside each process; 0 loads in the process itself."""
    max_bad_share: float = 0.1
    """Largest share of unreadable images of a set that is put up with."""
    seed: int = 0
    """Seed of the augmented views, beside each image's number."""
    overwrite: bool = False
    """Start anew where a set is there, finished or begun."""

    def __post_init__(self):
        require(bool(self.arrays), "embedding.arrays", self.arrays, "at least one name, such as image")
        for name in ("batch", "part_batches"):
            require(getattr(self, name) >= 1, f"embedding.{name}", getattr(self, name), "at least 1")
        require(self.workers >= 0, "embedding.workers", self.workers, "0 or more")
        require(0 <= self.max_bad_share <= 1, "embedding.max_bad_share", self.max_bad_share, "a share from 0 to 1")
        require(0 <= self.seed < inf, "embedding.seed", self.seed, "0 or more")
