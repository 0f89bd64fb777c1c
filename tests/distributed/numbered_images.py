"""A tiny source whose images and captions tell their number, and an encoder that looks their embeddings up.

The colour of image i is (number, 0, 0) and its captions end in that number, so the right answer is known; looking up
embeds a row the same way whatever else is in its batch.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from modstruct.config import DataConfig, Source, ViewsConfig
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.transforms.augment import Views

CLASS_FILE = """
label: parity
templates: ["an {} number", "one {}"]
classes: {even: even, odd: odd}
"""


class LastNumberTokenizer:
    """Ids (B, 4): 1 for the start, the number that the text ends in plus 3 (0 where there is none), 2 for the end."""

    def __call__(self, texts):
        last = [text.split()[-1] if text else "" for text in texts]
        numbers = [int(word) + 3 if word.isdigit() else len(word) + 200 for word in last]
        return torch.tensor([[1, number, 2, 0] for number in numbers]).reshape(len(numbers), 4)


class LookUp:
    """encode for `evaluate`: unit rows of a fixed table; noise moves the rows of the texts. Counts its calls."""

    def __init__(self, noise: float = 0.0):
        random = torch.Generator().manual_seed(0)
        table = torch.randn(256, 8, generator=random)
        self.image_table = F.normalize(table, dim=1)
        self.text_table = F.normalize(table + noise * torch.randn(256, 8, generator=random), dim=1)
        self.calls = []

    def __call__(self, batch):
        (name,) = batch
        self.calls.append((name, len(batch[name])))
        if name == "image":
            middle = batch["image"].shape[-1] // 2
            return {"image": self.image_table[batch["image"][:, 0, middle, middle].long()]}
        return {"text": self.text_table[batch["text"][:, 1] - 3]}


def write_source(
    folder: Path, numbers: list[int], captions_of=None, label_of=None, broken=(), stored_otherwise=()
) -> EvaluationSamples:
    """Write a shard with one image for each number, and open it.

    Equal numbers are images of equal bytes. broken: places whose image is no image. stored_otherwise: places whose
    image has the same pixels in other bytes.
    """
    captions_of = captions_of or (lambda number: [f"thing {number}"])
    label_of = label_of or (lambda number: {"parity": "odd" if number % 2 else "even"})
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for place, number in enumerate(numbers):
            png = io.BytesIO()
            Image.new("RGB", (12, 9), (number, 0, 0)).save(
                png, "PNG", compress_level=0 if place in stored_otherwise else 6
            )
            captions = captions_of(number)
            members = {
                "png": b"no image" if place in broken else png.getvalue(),
                "txt": captions[0].encode(),
                "json": json.dumps({"captions": captions, **label_of(number)}).encode(),
            }
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{place:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_source(folder)


def open_source(folder: Path) -> EvaluationSamples:
    config = DataConfig(cache=str(folder / "cache"), workers=0)
    return EvaluationSamples([Source(str(folder / "shard.tar"))], config)


def views() -> Views:
    return Views(ViewsConfig(), image_size=8)
