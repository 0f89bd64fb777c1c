"""Retrieval on Karpathy's splits: contrast and matching learned further, recall before and after matching reranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modstruct import distributed
from modstruct.config import EvaluationConfig, FinetuneRecipe, TaskFiles
from modstruct.data.downstream.batches import Seed
from modstruct.data.downstream.karpathy import SPLIT_OF_RUN, CaptionedImage, read_karpathy
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.shards.evaluation_samples import digest_of
from modstruct.data.shards.loader import identity
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.text_views import mask_tokens, masked_places
from modstruct.distributed.collect import on_main
from modstruct.errors import require
from modstruct.evaluation.embeddings.embed import embed_texts
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import merged_pairs
from modstruct.evaluation.embeddings.source import distinct, say_merged
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval.measure import DIRECTIONS, RetrievalConfig, measure
from modstruct.evaluation.retrieval.reranking import reranked_retrieval
from modstruct.losses.objective import Objective, build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.fusion.pretraining import FusionModel
from modstruct.tasks.task import Task


@dataclass(frozen=True)
class CaptionPair:
    """An image with one of its captions: what training takes."""

    image: Path
    caption: str
    image_id: int


class Retrieval(Task[FusionModel, CaptionPair | CaptionedImage]):
    files = ("images", "captions")

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer):
        super().__init__(recipe, tokenizer)
        self.masks = recipe.losses.masked_language.weight > 0

    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries:
        leave_out = self.recipe.data.leave_out_missing
        published = SPLIT_OF_RUN[split]
        images, captions = self.required(files)
        found = read_karpathy(captions, images, published, option=option, leave_out_missing=leave_out)
        if split != "train":
            return found
        pairs = (CaptionPair(p.image, caption, p.image_id) for p in found.entries for caption in p.captions)
        return TaskEntries(tuple(pairs), found.left_out)

    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        return TaskFiles(images=paths.karpathy.images, captions=paths.karpathy.captions)

    def build_model(self) -> FusionModel:
        return FusionModel(self.recipe, self.tokenizer, build_objective(self.recipe.losses))

    def objective(self, epoch_steps: int) -> Objective:
        train = self.recipe.train
        return build_objective(self.recipe.losses, LossSettings(train.pairwise_precision, epoch_steps, train.seed))

    def sample(
        self, entry: CaptionPair | CaptionedImage, open_image: Callable[[Path], Image.Image], seed: Seed | None
    ) -> dict[str, Any]:
        made = {"image": self.image_view(open_image(entry.image), seed)}
        if seed is None or isinstance(entry, CaptionedImage):
            return made
        ids = {"image_id": entry.image_id, "text_id": identity(entry.caption.encode())}
        return made | {"text": entry.caption, "mask_seed": seed("text_masked")} | ids

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"image": torch.stack([sample["image"] for sample in samples])}
        if "text" not in samples[0]:
            return batch
        batch["text"] = self.tokenizer([sample["text"] for sample in samples])
        batch |= {n: torch.tensor([sample[n] for sample in samples]) for n in ("image_id", "text_id", "slot")}
        if self.masks:
            seeds = [sample["mask_seed"] for sample in samples]
            rate = self.recipe.losses.masked_language.rate
            batch["text_masked"], batch["masked_labels"] = mask_tokens(batch["text"], seeds, rate, self.tokenizer)
            batch["masked_places"] = masked_places(batch["masked_labels"])
        return batch

    def measure(
        self, model: FusionModel, entries: Sequence[CaptionPair | CaptionedImage], split: str = "test"
    ) -> tuple[Result, None]:
        device, batch = distributed.device(), self.recipe.evaluation.batch
        of_split = [entry for entry in entries if isinstance(entry, CaptionedImage)]
        remedy = "retrieval is measured on whole images with all their captions: validation or test"
        require(bool(of_split), "--split", split, remedy)
        rows = self.predict(of_split, lambda some: _listed(model, some), "embedding images", split)
        image = np.array([row for row in rows if row is not None], dtype=np.float32)
        kept = [entry for entry, row in zip(of_split, rows, strict=True) if row is not None]
        first, image_row = distinct(np.array(on_main(lambda: _file_kinds(kept)), dtype=np.int64))
        row_of: dict[str, int] = {}
        pairs = np.array([(n, row_of.setdefault(c, len(row_of))) for n, e in enumerate(kept) for c in e.captions])
        captions = list(row_of)
        if len(first) < len(kept):
            if distributed.is_main():
                say_merged("task retrieval", len(kept), len(first))
            image, pairs, kept = image[first], merged_pairs(pairs, image_row), [kept[row] for row in first]

        def encode(some: dict[str, Tensor]) -> dict[str, Tensor]:
            return model.embed("text", model.backbone.encode_text(some["text"])[:, 0])

        text = embed_texts(encode, captions, self.tokenizer, batch, "embedding captions")
        recall_at = tuple(sorted({1, *self.recipe.evaluation.recall_at}))
        task = self.recipe.task
        settings = EvaluationConfig(batch=batch, recall_at=[*recall_at], rerank=task.rerank, rerank_by=task.rerank_by)
        embedded = EmbeddedSet(split, {}, {"image": image, "text": text}, pairs=pairs, captions=captions)
        images = self._images(kept, batch, device)
        matched = reranked_retrieval(model, images, self.tokenizer, embedded, settings)
        config = RetrievalConfig("recall", recall_at, curve_at=())
        found = on_main(lambda: replace(measure(embedded, config), outcomes={}))
        values = {**found.values, **{f"matched_{name}": value for name, value in matched.values.items()}}
        groups = {**found.groups, **{f"matched_{name}": label for name, label in matched.groups.items()}}
        sizes = {"images": len(image), "captions": len(captions)}
        return replace(found, values=values, groups=groups, rows=sizes), None

    def _images(self, entries: Sequence[CaptionedImage], batch: int, device: torch.device) -> Iterator[Tensor]:
        """This process's batches, all of whose images could be read a moment ago."""
        for found in self.batches_of(entries, batch):
            if found.numbers:
                yield found.tensors["image"].to(device)

    def score(self, result: Result) -> float:
        """Mean R@1 of both directions after matching."""
        return sum(result.values[f"matched_{direction}/recall_at_1"].value for direction in DIRECTIONS) / 2


def _file_kinds(entries: Sequence[CaptionedImage]) -> list[int]:
    """Numbers, (n,), that are equal where images have equal bytes; only files of equal size are read."""
    sizes = [entry.image.stat().st_size for entry in entries]
    of_size, kinds = Counter(sizes), dict[tuple[int, bytes], int]()
    found = []
    for entry, size in zip(entries, sizes, strict=True):
        content = digest_of(entry.image.read_bytes()) if of_size[size] > 1 else b""
        found.append(kinds.setdefault((size, content), len(kinds)))
    return found


def _listed(model: FusionModel, batch: dict[str, Tensor]) -> list[list[float]]:
    return model.embed("image", model.backbone.encode_image(batch["image"])[:, 0])["image"].tolist()
