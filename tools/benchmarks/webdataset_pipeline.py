"""The loader that open_clip trains with, rebuilt of webdataset's and torchvision's parts.

Shards drawn with replacement, samples through a shuffle buffer, decoded by Pillow, one view: a random crop of 90 to
100 % of the area, resized by Pillow, as a normalised float32 tensor. Captions get the tokenizer of the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision import transforms

from modstruct.config import ViewsConfig
from modstruct.data.tokenizers import Tokenizer

OPEN_CLIP = "webdataset, as open_clip"
CROP_SCALE = (0.9, 1.0)
SHUFFLED = 256  # samples in the buffer; open_clip's has 5,000, which fill slowly and cost the same once they are there


def open_clip_batches(
    shards: Sequence[str], side: int, views: ViewsConfig, tokenizer: Tokenizer, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images (batch, 3, side, side) and token ids (batch, L), without end."""
    crop = transforms.RandomResizedCrop(side, scale=CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(views.mean, views.std)
    view = transforms.Compose([crop, _rgb, transforms.ToTensor(), normalize])
    stages = (
        webdataset.ResampledShards(list(shards)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(SHUFFLED, initial=SHUFFLED),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=view, text=lambda text: tokenizer([text])[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch, collation_fn=_stacked),
    )
    return iter(webdataset.DataPipeline(*stages))


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _stacked(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(texts)
