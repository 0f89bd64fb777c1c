"""VQA v2: open questions about images, by the official accuracy (Goyal et al. 2017)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modstruct import distributed
from modstruct.config import FinetuneRecipe, TaskFiles
from modstruct.data.downstream.batches import Seed
from modstruct.data.downstream.published_files import TaskEntries, is_list
from modstruct.data.downstream.vqa import VqaQuestion, answer_weights, build_answer_list, read_answer_list, read_vqa
from modstruct.data.synthetic.task_files import SceneTaskPaths
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import refuse
from modstruct.evaluation.result import Result, mean_share, share
from modstruct.models.fusion.answering import AnswerModel, answer_tokens
from modstruct.tasks.metrics import answer_accuracy, best_answers, prior_predictions, vqa_accuracy
from modstruct.tasks.task import Task

ABOUT = "Official accuracy: an answer counts fully if three other annotators gave it. Chance: each type's best answer."
log = logging.getLogger("modstruct")
ANSWERS_AT_ONCE = 1024
"""Answers that a process scores together when it ranks: some of each of evaluation.batch questions."""


class Vqa(Task[AnswerModel, VqaQuestion]):
    """`entries("train", …)` comes before `measure`: from the training split it takes what measuring needs, which is
    the answer list (unless data.answers names one) and the prior."""

    files = ("images", "questions")

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer):
        super().__init__(recipe, tokenizer)
        self.answer_tokenizer = type(tokenizer)(tokenizer.model, recipe.task.answer_context)
        self.answer_list: list[str] = []
        self.prior: dict[str | None, str] = {}
        """The best answer to each question type, under None to any."""

    def read(self, files: TaskFiles, option: str, split: str) -> TaskEntries[VqaQuestion]:
        leave_out = self.recipe.data.leave_out_missing
        images, questions = self.required(files)
        purpose = "trained on" if split == "train" else "what the best checkpoint is chosen by"
        remedy = f"the answers are {purpose}: give the published file"
        holds_answers = Path(questions).expanduser().is_file() and is_list(Path(questions).expanduser())  # ALBEF's
        if files.annotations is None and split != "test" and not holds_answers:
            refuse(f"{option}.annotations", None, remedy)
        found = read_vqa(questions, images, files.annotations, option=option, leave_out_missing=leave_out)
        if split != "test" and found.entries and not any(any(entry.answers) for entry in found.entries):
            name = "questions" if holds_answers else "annotations"
            refuse(f"{option}.{name}", getattr(files, name), f"it holds no answers, or empty ones alone; {remedy}")
        return found

    def entries(self, split: str, paths: SceneTaskPaths | None) -> TaskEntries[VqaQuestion] | None:
        found = super().entries(split, paths)
        if split == "train" and found is not None:
            self.learn_answers(found.entries)
        return found

    def learn_answers(self, questions: Sequence[VqaQuestion]) -> None:
        """Take the answer list and the prior from the training split."""
        named = self.recipe.data.answers
        self.answer_list = build_answer_list(questions) if named is None else read_answer_list(named)
        self.prior = best_answers(questions)
        alike = len(self.answer_list) - len(self.answer_tokenizer(self.answer_list).unique(dim=0))
        if alike and self.recipe.task.answering == "rank":
            log.info("%d of %d listed answers have the tokens of another one", alike, len(self.answer_list))

    def identity(self) -> dict[str, str]:
        content = json.dumps(self.answer_list).encode()
        return {"data.answers": hashlib.blake2b(content, digest_size=16).hexdigest()}

    def scene_files(self, paths: SceneTaskPaths, split: str) -> TaskFiles:
        found = paths.vqa[split]
        return TaskFiles(images=found.images, questions=found.questions, annotations=found.annotations)

    def build_model(self) -> AnswerModel:
        return AnswerModel(self.recipe, self.tokenizer)

    def sample(
        self, entry: VqaQuestion, open_image: Callable[[Path], Image.Image], seed: Seed | None
    ) -> dict[str, Any]:
        made = {"image": self.image_view(open_image(entry.image), seed), "text": entry.question}
        return made if seed is None else made | {"answers": answer_weights(entry.answers)}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """image (B, 3, H, W) uint8, text (B, L) ids; in training also AnswerModel's answer, answer_of, answer_weight
        and answer_tokens.

        Texts are as wide as the longest of them.
        """
        batch = {
            "image": torch.stack([sample["image"] for sample in samples]),
            "text": _narrow(self.tokenizer, [sample["text"] for sample in samples]),
        }
        if "answers" not in samples[0]:
            return batch
        rows = [(answer, of, w) for of, s in enumerate(samples) for answer, w in s["answers"].items()]
        # Annotators may all have left their answer empty. One row of no weight keeps the decoder in every graph.
        answers, of, weights = zip(*(rows or [("", 0, 0.0)]), strict=True)
        answer = _narrow(self.answer_tokenizer, answers)
        batch |= {"answer": answer, "answer_of": torch.tensor(of), "answer_weight": torch.tensor(weights)}
        return batch | {"answer_tokens": answer_tokens(answer, self.answer_tokenizer.padding_id)}

    def measure(
        self, model: AnswerModel, entries: Sequence[VqaQuestion], split: str = "test"
    ) -> tuple[Result | None, list[dict[str, int | str]]]:
        """The result, None without annotations, and what the evaluation server takes: an answer to every question.

        A question whose image cannot be read gets the prior's answer there, and no part in the metrics.
        """
        predicted = self.predict(entries, self._answers_of(model), "VQA", split)
        answered = {e.question_id: answer for e, answer in zip(entries, predicted, strict=True) if answer is not None}
        prior = prior_predictions(self.prior, entries)
        judged = [e for e in entries if e.answers and e.question_id in answered]
        result = self._result(answered, prior, judged, split) if judged else None
        full = prior | answered
        return result, [{"question_id": e.question_id, "answer": full[e.question_id]} for e in entries]

    def _answers_of(self, model: AnswerModel) -> Callable[[dict[str, Tensor]], list[str]]:
        """A batch -> the answer to each of its questions."""
        task = self.recipe.task
        if task.answering == "generate":
            return lambda batch: [self.answer_tokenizer.decode(row) for row in model.generate(batch).tolist()]
        # Of answers with the same tokens the first stands for all: which of them came first would be rounding's choice.
        ids = self.answer_tokenizer(self.answer_list).tolist()
        told_apart = {tuple(row): answer for row, answer in zip(ids[::-1], self.answer_list[::-1], strict=True)}
        answers = list(told_apart.values())[::-1]
        listed = _narrow(self.answer_tokenizer, answers).to(distributed.device())
        # Not by the rows of a batch: every process must make as many passes.
        at_once = max(1, ANSWERS_AT_ONCE // self.recipe.evaluation.batch)

        def best(batch: dict[str, Tensor]) -> list[str]:
            numbers, _ = model.rank(batch, listed, task.first_token_candidates, at_once)
            return [answers[number] for number in numbers[:, 0].tolist()]

        return best

    def _result(self, answered: dict[int, str], prior: dict[int, str], judged: list[VqaQuestion], split: str) -> Result:
        ours, chance = (
            vqa_accuracy({e.question_id: answers[e.question_id] for e in judged}, judged)
            for answers in (answered, prior)
        )
        right = np.array([answer_accuracy(answered[e.question_id], e.answers) for e in judged])
        images = np.unique([str(e.image) for e in judged], return_inverse=True)[1]
        values = {"accuracy": mean_share(right, images, label="accuracy", chance=chance["overall"])}
        for kind, value in ours["answer_type"].items():
            label = f"accuracy {kind}"
            values[label] = share(value, label=label, chance=chance["answer_type"][kind])
        rows = {"questions": len(judged), "listed_answers": len(self.answer_list)}
        return Result("vqa", split, values, "VQA v2", ABOUT, rows=rows)


def _narrow(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Ids (B, L) of texts, without the columns that are padding in all of them."""
    ids = tokenizer(list(texts))
    return ids[:, : int(tokenizer.mask(ids).sum(dim=1).max())]
