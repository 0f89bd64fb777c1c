"""The images of a training batch, row by row: as finished views, or as what the device makes them of (`views.on`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modstruct.data.shards.workers import OutgoingRows
from modstruct.data.transforms.decoding import Whole
from modstruct.data.transforms.device_views import PIXELS, SentImages, as_sent
from modstruct.data.transforms.image_views import ImageViews


class FinishedRows:
    """Image views of a batch, made here."""

    def __init__(self, views: ImageViews, names: Sequence[str], rows: int, outgoing: OutgoingRows):
        self.views, self.row = views, 0
        shape = (rows, 3, views.image_size, views.image_size)
        self.arrays = {name: outgoing.empty(name, shape) for name in names}

    def add(self, image: Image.Image, whole: Whole, plain_seed: int, augmented_seed: int | None) -> None:
        """The next row. augmented_seed: None where that view is not made."""
        # Views are written straight to their rows, which saves a copy.
        into = [array[self.row] for array in self.arrays.values()]
        self.views.plain_image(image, plain_seed, into[0], whole)
        if augmented_seed is not None:
            self.views.augmented_image(image, augmented_seed, into[1], whole)
        self.row += 1

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


class RowsForDevice:
    """The same, to be made on the device."""

    def __init__(self, views: ImageViews, names: Sequence[str], rows: int, outgoing: OutgoingRows):
        self.views, self.outgoing = views, outgoing
        self.sent = SentImages(names, rows, views.image_size)

    def add(self, image: Image.Image, whole: Whole, plain_seed: int, augmented_seed: int | None) -> None:
        smaller = self.views.smaller(whole.size, plain_seed, augmented_seed)
        image, whole = as_sent(image, whole, smaller)
        self.sent.add(image, self.views.drawn(whole, plain_seed, augmented_seed))

    def tensors(self) -> dict[str, Tensor]:
        pixels = self.outgoing.empty(PIXELS, (sum(map(len, self.sent.tiles)), 3))
        np.concatenate(self.sent.tiles, out=pixels)
        return self.sent.draws | {PIXELS: torch.from_numpy(pixels)}


ImageRows = FinishedRows | RowsForDevice
