"""Text assignment: of two images, does a text belong to the first, to the second, or to neither?

The stage between pre-training and NLVR2, in which the doubled fusion layers learn to tell the images apart (Li et
al. 2021, section 3.5). It needs images with captions, no labels. The other images are drawn from the whole split,
all alike; ALBEF draws them from the process's batch, similar ones more often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modstruct.config import FinetuneRecipe, TaskFiles
from modstruct.data.downstream.batches import Seed
from modstruct.data.downstream.karpathy import SPLIT_OF_RUN, CaptionedImage, read_karpathy
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.faults import BadSample
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import sample_seed
from modstruct.errors import require
from modstruct.evaluation.result import Result, mean_share
from modstruct.models.fusion.classifier import PairClassifier
from modstruct.tasks.nlvr2 import SIDES
from modstruct.tasks.task import Task

ANSWERS = ("first", "second", "neither")
FEWEST_IMAGES = 3  # a text's own and two others
MOST_DRAWS = 100  # images looked at for one that does not have the text as well


@dataclass(frozen=True)
class SplitImage:
    """An image of a split, and where it stands there."""

    captioned: CaptionedImage
    split: str
    number: int


@dataclass(frozen=True)
class Assignment:
    """A text, two images, and the number of the right one of ANSWERS."""

    text: str
    images: tuple[Path, Path]
    label: int


class TextAssignment(Task[PairClassifier, SplitImage]):
    """predictions.json: [{"image_id": …, "assignment": "first" | "second" | "neither" | null}, …]."""

    files = ("images", "captions")

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer):
        super().__init__(recipe, tokenizer)
        self.images: dict[str, tuple[CaptionedImage, ...]] = {}
        """Of each split that was read: whence the other images of a text come."""

    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries[SplitImage]:
        """Raises ValueError for a split of fewer than FEWEST_IMAGES too."""
        name, leave_out = SPLIT_OF_RUN[split], self.recipe.data.leave_out_missing
        images_root, captions = self.required(files)
        found = read_karpathy(captions, images_root, name, option=option, leave_out_missing=leave_out)
        images = self.images[split] = found.entries
        remedy = f"has {len(images)} images in its split {name}; give at least {FEWEST_IMAGES}"
        require(len(images) >= FEWEST_IMAGES, f"{option}.captions", str(files.captions), remedy)
        entries = tuple(SplitImage(image, split, number) for number, image in enumerate(images))
        return TaskEntries(entries, found.left_out)

    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        return TaskFiles(images=paths.karpathy.images, captions=paths.karpathy.captions)

    def build_model(self) -> PairClassifier:
        return PairClassifier(self.recipe, self.tokenizer, classes=len(ANSWERS))

    def assignment(self, entry: SplitImage, seed: Seed | None) -> Assignment:
        """What is asked about an image: one of its captions, one or two other images, their order.

        In training the seed draws all of it, each answer with probability 1/3; in evaluation (None) the number of the
        image does, and the answers take turns. The seed alone decides the others, wherever in the split they stand,
        so that every number of processes asks the same. Raises BadSample where nearly all images have the text.
        """
        if seed is None:
            draws, label = random.Random(sample_seed(0, 0, entry.number, "assignment")), entry.number % len(ANSWERS)
        else:
            draws = random.Random(seed("assignment"))
            label = draws.randrange(len(ANSWERS))
        text = draws.choice(entry.captioned.captions)
        one = self._other(entry, text, draws, {entry.number})
        if ANSWERS[label] == "neither":
            pair = (one, self._other(entry, text, draws, {entry.number, one}))
        else:
            pair = (entry.number, one) if ANSWERS[label] == "first" else (one, entry.number)
        left, right = (self.images[entry.split][number].image for number in pair)
        return Assignment(text, (left, right), label)

    def _other(self, entry: SplitImage, text: str, draws: random.Random, taken: set[int]) -> int:
        """An image of the split that is not taken and does not have the text among its captions."""
        images = self.images[entry.split]
        for _ in range(MOST_DRAWS):
            number = draws.randrange(len(images))
            if number not in taken and text not in images[number].captions:
                return number
        raise BadSample("caption of too many images", f"{entry.captioned.image}: {text!r}")

    def sample(self, entry: SplitImage, open_image: Callable[[Path], Image.Image], seed: Seed | None) -> dict[str, Any]:
        asked = self.assignment(entry, seed)
        views = [self.image_view(open_image(path), seed, side) for path, side in zip(asked.images, SIDES, strict=True)]
        return {"image": torch.stack(views), "text": asked.text, "label": asked.label}  # image (2, 3, H, W)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "image": torch.stack([s["image"] for s in samples]),
            "text": self.tokenizer([s["text"] for s in samples]),
            "label": torch.tensor([s["label"] for s in samples]),
        }

    def measure(
        self, model: PairClassifier, entries: Sequence[SplitImage], split: str = "test"
    ) -> tuple[Result | None, list[dict[str, Any]]]:
        title = "text assignment"
        predicted = self.predict(entries, lambda some: model.classify(some).argmax(dim=1).tolist(), title, split)
        named = [None if number is None else ANSWERS[number] for number in predicted]
        predictions = [
            {"image_id": e.captioned.image_id, "assignment": name} for e, name in zip(entries, named, strict=True)
        ]
        judged = [(e.number % len(ANSWERS), n) for e, n in zip(entries, predicted, strict=True) if n is not None]
        if not judged:
            return None, predictions
        right = np.array([label == number for label, number in judged])
        values = {"accuracy": mean_share(right, label="accuracy", chance=1 / len(ANSWERS))}
        return Result("text_assignment", split, values, title.capitalize(), rows={"images": len(judged)}), predictions
