"""What embeds: one interface for the checkpoints of modstruct and the models of open_clip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_files import IMAGE_ARRAYS, TEXT_ARRAYS
from modstruct.evaluation.embeddings.in_memory import Encode


class ImageViews(Protocol):
    """From PIL images to what the image tower takes; pickles to loader workers. `data.augment.Views` is one."""

    image_size: int
    """Side in pixels."""
    value_bytes: int
    """Memory of one colour of one pixel."""

    def evaluation_image(self, image: Image) -> Tensor:
        """(3, image_size, image_size)."""

    def augmented_image(self, image: Image, seed: int) -> Tensor:
        """The same of a random view that is drawn from seed."""


@dataclass(frozen=True)
class EmbeddingModel:
    """A model in evaluation mode, whole on each process, with its own preprocessing and tokenizer."""

    name: str
    """What tables call it."""
    fingerprint: str
    """Of its weights: `weights_fingerprint`."""
    dimension: int
    """D of the shared embeddings."""
    arrays: frozenset[str]
    """What it can make, of IMAGE_ARRAYS and TEXT_ARRAYS."""
    views: ImageViews
    tokenize: Callable[[Sequence[str]], Tensor]
    """Texts -> ids (B, L); pickles to loader workers."""
    encode: Encode
    """{"image": (B, 3, H, W) views} -> image and what else of `arrays` one pass gives; {"text": ids} alike. (B, …)."""
    preprocessing: str
    """Views and tokenizer in words: equal words, equal inputs of the towers."""
    details: dict = field(default_factory=dict)
    """What else the manifest says of it, in plain JSON kinds."""

    def described(self) -> dict:
        """What the manifest of an embedded set says of its model."""
        own = {"name": self.name, "fingerprint": self.fingerprint, "dimension": self.dimension}
        return own | {"preprocessing": self.preprocessing} | self.details

    def chosen_arrays(self, wanted: Sequence[str]) -> list[str]:
        """The arrays asked for, `all` replaced by those there are. Raises ValueError for one that there is not."""
        known = (*IMAGE_ARRAYS, *TEXT_ARRAYS)
        for name in wanted:
            require(name in known or name == "all", "embedding.arrays", name, f"may be {', '.join(known)} or all")
            has = name == "all" or name in self.arrays
            remedy = f"{self.name} does not make it; it makes {', '.join(sorted(self.arrays))}"
            require(has, "embedding.arrays", name, remedy)
        chosen = (
            self.arrays if "all" in wanted else {"image", *wanted, *(["text"] if {*wanted} & {*TEXT_ARRAYS} else [])}
        )
        return [name for name in known if name in chosen]


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and buffers by name: names, kinds, shapes and bytes; wherever they lie."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
