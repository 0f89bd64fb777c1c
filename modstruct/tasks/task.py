"""What a downstream task is to the fine-tuning run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from modstruct import distributed
from modstruct.config import FinetuneRecipe, TaskFiles
from modstruct.data.downstream.batches import EntryBatch, Seed, entry_batches
from modstruct.data.downstream.published_files import Entry, TaskEntries
from modstruct.data.faults import BadSample, BadSampleCounter
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.distributed.collect import collect_values, rounds_of
from modstruct.errors import refuse, require
from modstruct.evaluation.result import Result
from modstruct.losses.distillation import Distillation
from modstruct.losses.objective import Objective
from modstruct.models.fusion.ema import EmaModel

SPLITS = ("train", "validation", "test")
Model = TypeVar("Model", bound=EmaModel)


class Task(ABC, Generic[Model, Entry]):
    """Entries, model, objective and metrics of one task. Travels to loader processes, so it holds no model."""

    files: tuple[str, str]
    """Fields of TaskFiles that a split needs: the images', and the entries'."""

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.views = Views(recipe.views, recipe.fusion.vision.image_size)

    @abstractmethod
    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries[Entry]:
        """The entries of a split. option: its section of the recipe, for errors. split: one of SPLITS."""

    @abstractmethod
    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        """The built-in task's files of a split."""

    @abstractmethod
    def build_model(self) -> Model:
        """The model, with newly initialized weights."""

    @abstractmethod
    def sample(self, entry: Entry, open_image: Callable[[Path], Image.Image], seed: Seed | None) -> dict[str, Any]:
        """See data/downstream/batches.Composer."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """See data/downstream/batches.Composer. Here: image, text and, where every sample has one, label."""
        batch = {
            "image": torch.stack([s["image"] for s in samples]),
            "text": self.tokenizer([s["text"] for s in samples]),
        }
        if all("label" in sample for sample in samples):
            batch["label"] = torch.tensor([sample["label"] for sample in samples])
        return batch

    @abstractmethod
    def measure(self, model: Model, entries: Sequence[Entry], split: str = "test") -> tuple[Result | None, Any]:
        """The result on a split, None where no entry could be judged, and the predictions, written beside it as JSON.

        Every process calls it and gets the same; ZeRO-3 needs the same number of forward passes on each.
        """

    def score(self, result: Result) -> float:
        """The value by which the best checkpoint is chosen, from 0 to 1."""
        return result.values["accuracy"].value

    def objective(self, epoch_steps: int) -> Objective:
        """epoch_steps: length of an epoch, over which distillation rises by default."""
        task = self.recipe.task
        ramp_steps = epoch_steps if task.ramp_steps is None else task.ramp_steps
        return Objective({"task": Distillation(task.alpha, ramp_steps)}, {"task": 1.0})

    def entries(self, split: str, paths: SceneTaskPaths | None) -> TaskEntries[Entry] | None:
        """The entries of a split; None for one without files. paths: the built-in task, if the recipe uses it.

        Raises ValueError, naming the field, for a file that is not given, that has no entry, or, except for the test
        split, entries without label.
        """
        files = getattr(self.recipe.data, split) if paths is None else self.scene_files(paths, split)
        given = [name for name in self.files if getattr(files, name) is not None]
        if not given and split != "train":
            return None
        for name in self.files:
            if getattr(files, name) is None:
                refuse(f"data.{split}.{name}", None, f"{self.recipe.task.name} needs it: give the published file")
        found = self.read(files, f"data.{split}", split)
        option, file = f"data.{split}.{self.files[1]}", getattr(files, self.files[1])
        require(bool(found.entries), option, str(file), "it has no entry that can be used; give another file")
        unlabelled = sum(getattr(entry, "label", 0) is None for entry in found.entries)
        if split != "test":
            need = "training" if split == "train" else "the choice of the best checkpoint"
            remedy = f"{unlabelled:,} of its {len(found.entries):,} entries have no label, which {need} needs"
            require(unlabelled == 0, option, str(file), f"{remedy}; give a split with labels")
        if split != "train":
            self._filler(found.entries, split)
        return found

    def required(self, files: TaskFiles) -> tuple[str, str]:
        """The images and the entries' file of a split; `entries` has checked that they are given."""
        images, entries = (getattr(files, name) for name in self.files)
        return images, entries

    def identity(self) -> dict[str, str]:
        """What else must be equal on all hosts, by the field that it comes from."""
        return {}

    def image_view(self, image: Image.Image, seed: Seed | None, salt: str = "image") -> Tensor:
        """The view of an image that training (with a seed) or evaluation takes, (3, H, W) uint8."""
        return self.views.evaluation_image(image) if seed is None else self.views.plain_image(image, seed(salt))

    @torch.no_grad()
    def predict(
        self, entries: Sequence[Entry], answer: Callable[[dict[str, Tensor]], list[Any]], title: str, split: str
    ) -> list[Any]:
        """What `answer` says of every entry, in order, on every process; None where an image cannot be read.

        answer: a batch -> one value of plain JSON kinds for each row; may be collective. Raises TooManyBadSamples above
        data.max_bad_share, and ValueError where no entry can be used, each naming the split.
        """
        recipe, device = self.recipe, distributed.device()
        batch = recipe.evaluation.batch
        rounds = rounds_of(-(-len(entries) // batch))
        batches = self.batches_of(entries, batch)
        bad_samples = BadSampleCounter(f"data.{split}", recipe.data.max_bad_share, distributed.rank())
        mine: list[tuple[int, Any]] = []
        filler: dict[str, Tensor] = {}
        for _ in tqdm(range(rounds), desc=title, unit="batch", leave=False, disable=not distributed.is_main()):
            some = next(batches, EntryBatch({}, []))
            bad_samples.add(some.faults, len(some.numbers) + len(some.faults))
            tensors = some.tensors or filler or self._filler(entries, split)
            filler = {name: rows[:1] for name, rows in tensors.items()}
            predicted = answer({name: rows.to(device) for name, rows in tensors.items()})
            mine += zip(some.numbers, predicted, strict=False)
        found: list[Any] = [None] * len(entries)
        for part in collect_values({"found": mine, "bad": bad_samples.bad}, device):
            for number, value in part["found"]:
                found[number] = value
        bad = sum(value is None for value in found)
        bad_samples.check(bad, len(entries), fewest=1)
        if bad == len(entries):
            remedy = f"none can be read (this process: {bad_samples.summary()}); repair them or give others"
            self._refuse(split, "images", remedy)
        return found

    def batches_of(self, entries: Sequence[Entry], batch: int) -> Iterator[EntryBatch]:
        """This process's share of the entries, in order."""
        return entry_batches(self, entries, self.recipe.data, batch)

    def _filler(self, entries: Sequence[Entry], split: str) -> dict[str, Tensor]:
        """A batch for a process that has no usable entry, of a grey image. Raises ValueError if the split has none."""

        def grey(path: Path) -> Image.Image:
            return Image.new("RGB", (self.views.image_size, self.views.image_size), (128, 128, 128))

        for entry in entries:
            try:
                return self.collate([self.sample(entry, grey, None)])
            except BadSample as error:
                bad = error
        self._refuse(split, self.files[1], f"none of its entries can be used, the last: {bad}; give others")

    def _refuse(self, split: str, name: str, remedy: str) -> NoReturn:
        refuse(f"data.{split}.{name}", getattr(getattr(self.recipe.data, split), name), remedy)
