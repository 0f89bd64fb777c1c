"""SNLI-VE: does an image entail a sentence, contradict it, or leave it open? (Xie et al. 2019)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modstruct.config import TaskFiles
from modstruct.data.downstream.batches import Seed
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS, EntailmentPair, read_snli_ve
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.evaluation.result import Result, mean_share, share
from modstruct.evaluation.statistics import majority_label
from modstruct.models.fusion.classifier import Classifier
from modstruct.tasks.metrics import entailment_metrics
from modstruct.tasks.task import Task

ABOUT = "Accuracy over hypotheses, and over those of each label; intervals take the hypotheses of an image together."


class SnliVe(Task[Classifier, EntailmentPair]):
    files = ("images", "hypotheses")

    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries[EntailmentPair]:
        leave_out = self.recipe.data.leave_out_missing
        images, hypotheses = self.required(files)
        return read_snli_ve(hypotheses, images, option=option, leave_out_missing=leave_out)

    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        return TaskFiles(images=paths.snli_ve[split].images, hypotheses=paths.snli_ve[split].hypotheses)

    def build_model(self) -> Classifier:
        return Classifier(self.recipe, self.tokenizer, len(ENTAILMENT_LABELS))

    def sample(
        self, entry: EntailmentPair, open_image: Callable[[Path], Image.Image], seed: Seed | None
    ) -> dict[str, Any]:
        made = {"image": self.image_view(open_image(entry.image), seed), "text": entry.hypothesis}
        return made if entry.label is None else made | {"label": entry.label}

    def measure(
        self, model: Classifier, entries: Sequence[EntailmentPair], split: str = "test"
    ) -> tuple[Result | None, list[dict[str, str | None]]]:
        predicted = self.predict(entries, lambda batch: model.classify(batch).argmax(dim=1).tolist(), "SNLI-VE", split)
        named = [None if number is None else ENTAILMENT_LABELS[number] for number in predicted]
        predictions = [{"pairID": e.pair_id, "label": label} for e, label in zip(entries, named, strict=True)]
        judged = [(n, e) for n, e in zip(predicted, entries, strict=True) if n is not None and e.label is not None]
        return self._result(judged, split) if judged else None, predictions

    def _result(self, judged: list[tuple[int, EntailmentPair]], split: str) -> Result:
        numbers, pairs = zip(*judged, strict=True)
        right = np.array([number == pair.label for number, pair in judged])
        images = np.unique([str(pair.image) for pair in pairs], return_inverse=True)[1]
        most = majority_label(pair.label for pair in pairs)
        prior = sum(pair.label == most for pair in pairs) / len(pairs)
        values = {name: share(value, label=name) for name, value in entailment_metrics(numbers, pairs).items()}
        values["accuracy"] = mean_share(right, images, label="accuracy", chance=prior)
        return Result("snli_ve", split, values, "SNLI-VE", ABOUT, rows={"hypotheses": len(pairs)})
