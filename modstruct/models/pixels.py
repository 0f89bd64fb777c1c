"""From pixels to what encoders take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def standardised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, (x / 255 - mean) / std, mean and std by channel."""

    def by_channel(values: Sequence[float]) -> Tensor:
        # Filled on the device: for a tensor made of the host's numbers a GPU would have to be waited for.
        return torch.stack([torch.full((), value, device=images.device) for value in values])[:, None, None]

    return (images.float() / 255 - by_channel(mean)) / by_channel(std)
