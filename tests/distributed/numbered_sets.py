"""Numbered images as sets to embed, a model that looks embeddings up, and what an embedded folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from numbered_images import LastNumberTokenizer, LookUp, views
from PIL import Image

from modstruct.config.training import EmbeddingConfig
from modstruct.data.faults import BadSample, or_bad
from modstruct.data.shards.evaluation_samples import EvaluationSample
from modstruct.evaluation.embeddings.model import EmbeddingModel

ARRAYS = ("image", "text", "image_features", "text_features", "image_augmented")


class Encode:
    """LookUp with features, which may stop after so many batches."""

    def __init__(self, stop_after: int | None = None):
        self.table, self.calls, self._stop_after = LookUp(noise=0.5), [], stop_after

    def __call__(self, batch):
        if len(self.calls) == self._stop_after:
            raise ArithmeticError("stopped in the middle")
        self.calls.append({name: len(rows) for name, rows in batch.items()})
        (modality,) = batch
        made = self.table(batch)
        return made | {f"{modality}_features": 30 * made[modality][:, :5]}


def numbered_model(encode=None, fingerprint: str = "weights 0") -> EmbeddingModel:
    return EmbeddingModel(
        name="look up",
        fingerprint=fingerprint,
        dimension=8,
        arrays=frozenset(ARRAYS),
        views=views(),
        tokenize=LastNumberTokenizer(),
        encode=encode or Encode(),
        preprocessing="numbers",
    )


def config(**changes) -> EmbeddingConfig:
    return EmbeddingConfig(**{"arrays": ["all"], "batch": 4, "part_batches": 2, "workers": 0} | changes)


class LabelledNumbers:
    """A set of labelled images; number i is of class i % 3, but those of `broken` cannot be read."""

    name, fingerprint = "numbers", "labelled 0"
    classes, templates = ("number 7", "number 8", "number 9"), ("a {}", "one {}")

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self._count, self._broken, self.left_out = count, broken, {"no label": 2}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> EvaluationSample:
        if i in self._broken:
            raise BadSample("undecodable image", f"number {i}")
        return EvaluationSample(Image.new("RGB", (12, 9), (i, 0, 0)), [], {"label": i % 3, "key": f"key {i}"})

    def read(self, numbers):
        return (or_bad(self.__getitem__, number) for number in numbers)


def content(folder: Path) -> dict[str, bytes | dict]:
    """All files by name, the manifest without what tells runs apart."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found["manifest.json"])
    found["manifest.json"] = {name: manifest[name] for name in manifest if name not in ("seconds", "command")}
    return found


def rows_of(numbers, table: torch.Tensor):
    return table[torch.tensor(numbers)].numpy()
