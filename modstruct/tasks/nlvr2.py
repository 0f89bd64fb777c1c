"""NLVR2: is a sentence true of two photographs? (Suhr et al. 2019)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modstruct.config import TaskFiles
from modstruct.data.downstream.batches import Seed
from modstruct.data.downstream.nlvr2 import Nlvr2Statement, read_nlvr2
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.evaluation.result import Result, mean_share
from modstruct.evaluation.statistics import majority_label
from modstruct.models.fusion.classifier import PairClassifier
from modstruct.tasks.metrics import nlvr2_metrics, sentence_of
from modstruct.tasks.task import Task

ABOUT = "Accuracy over statements; consistency: the share of sentences that are right for all their image pairs."
SIDES = ("left", "right")


class Nlvr2(Task[PairClassifier, Nlvr2Statement]):
    """predictions.json: [{"identifier": "test1-0-1-0", "prediction": "True"}, …], null without a readable image.

    lil-lab/nlvr's metrics.py takes the same as lines of CSV: jq -r '.[] | "\\(.identifier),\\(.prediction)"'.
    """

    files = ("images", "statements")

    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries[Nlvr2Statement]:
        leave_out = self.recipe.data.leave_out_missing
        images, statements = self.required(files)
        return read_nlvr2(statements, images, option=option, leave_out_missing=leave_out)

    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        return TaskFiles(images=paths.nlvr2[split].images, statements=paths.nlvr2[split].statements)

    def build_model(self) -> PairClassifier:
        return PairClassifier(self.recipe, self.tokenizer, classes=2)

    def sample(
        self, entry: Nlvr2Statement, open_image: Callable[[Path], Image.Image], seed: Seed | None
    ) -> dict[str, Any]:
        views = [self.image_view(open_image(path), seed, side) for path, side in zip(entry.images, SIDES, strict=True)]
        made = {"image": torch.stack(views), "text": entry.sentence}  # (2, 3, H, W)
        return made if entry.label is None else made | {"label": int(entry.label)}

    def measure(
        self, model: PairClassifier, entries: Sequence[Nlvr2Statement], split: str = "test"
    ) -> tuple[Result | None, list[dict[str, str | None]]]:
        predicted = self.predict(entries, lambda batch: model.classify(batch).argmax(dim=1).tolist(), "NLVR2", split)
        found = {e.identifier: bool(n) for e, n in zip(entries, predicted, strict=True) if n is not None}
        predictions = [
            {"identifier": e.identifier, "prediction": str(found[e.identifier]) if e.identifier in found else None}
            for e in entries
        ]
        judged = [e for e in entries if e.identifier in found and e.label is not None]
        return self._result(found, judged, split) if judged else None, predictions

    @staticmethod
    def _result(found: dict[str, bool], judged: list[Nlvr2Statement], split: str) -> Result:
        most = majority_label(statement.label for statement in judged)
        prior = nlvr2_metrics(dict.fromkeys(found, most), judged)
        right = np.array([found[statement.identifier] == statement.label for statement in judged])
        sentence = np.unique([sentence_of(statement.identifier) for statement in judged], return_inverse=True)[1]
        whole = np.bincount(sentence, ~right) == 0
        values = {
            "accuracy": mean_share(right, sentence, label="accuracy", chance=prior["accuracy"]),
            "consistency": mean_share(whole, label="consistency", chance=prior["consistency"]),
        }
        return Result("nlvr2", split, values, "NLVR2", ABOUT, rows={"statements": len(judged)})
